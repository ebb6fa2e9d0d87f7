"""Several hosts, one run: who takes part, who writes, and what the first one tells the others.

Every host runs the same command and the same programs; the devices of all of them share each
batch. The first host alone writes results and reads checkpoints.
"""

import contextlib
import json
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from bpnjax.utils import prng
from bpnjax.utils.errors import UserError


def join(coordinator: str = "", number: int | None = None, me: int | None = None) -> None:
    """Takes part in a run of several hosts; call it before anything touches a device.

    Args:
      coordinator: ``HOST:PORT`` of the first host; "" leaves it, as the other two, to what JAX
        finds out by itself (Slurm, Open MPI, Cloud TPU, JAX_COORDINATOR_ADDRESS).
      number: of hosts.
      me: number of this one, from 0.

    Raises:
      UserError: the hosts cannot be found, or did not come together.
    """
    try:
        # Without a collectives library the CPU backend has devices of this host only.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(coordinator or None, number, me)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"--distributed: {' '.join(str(error).split())}; where the hosts are not found by "
            "themselves pass --coordinator=HOST:PORT --hosts=N --host=0 (to N - 1, one each)"
        ) from error


def is_first() -> bool:
    """Does this host write the results?

    Returns:
      True on the first host; always without several.
    """
    return jax.process_index() == 0


def first_asks(question: Callable[[], Any]) -> Any:
    """The answer to a question that only the first host can ask, on every host.

    Args:
      question: returns JSON, or raises `UserError`; called on the first host.

    Returns:
      The answer.

    Raises:
      UserError: the question did, on all hosts.
    """
    answer, complaint = None, ""
    if is_first():
        try:
            answer = question()
        except UserError as error:
            complaint = str(error)
    answer, complaint = tell([answer, complaint])
    if complaint:
        raise UserError(complaint)
    return answer


@contextlib.contextmanager
def own_folder(workdir: pathlib.Path) -> Iterator[pathlib.Path]:
    """Where this host writes: the first one the run's folder, others one that nobody reads.

    Args:
      workdir: the run's folder.

    Yields:
      A path; the folder of another host is removed at the end.
    """
    if is_first():
        yield workdir
    else:
        with tempfile.TemporaryDirectory(prefix="bpnjax-host-") as scratch:
            yield pathlib.Path(scratch)


def tell(value: Any) -> Any:
    """What the first host gives, on every host; call it on all of them.

    Args:
      value: any JSON; what the others give is not looked at.

    Returns:
      The first host's value, gone through JSON where there are several: tuples come as lists.
    """
    if jax.process_count() == 1:
        return value
    from jax.experimental.multihost_utils import broadcast_one_to_all

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(broadcast_one_to_all(np.int32(text.size)))
    sent = np.zeros(length, np.uint8)
    if is_first():
        sent[:] = text
    return json.loads(bytes(np.asarray(broadcast_one_to_all(sent))))


def tell_arrays(tree: Any) -> Any:
    """The arrays of the first host, on every host; call it on all of them.

    Args:
      tree: of arrays; all hosts must give the same structure, shapes and dtypes.

    Returns:
      The first host's, as NumPy arrays and PRNG keys; ``tree`` itself on one host.
    """
    if jax.process_count() == 1:
        return tree
    from jax.experimental.multihost_utils import broadcast_one_to_all

    told = broadcast_one_to_all(prng.to_numbers(tree))
    return prng.from_numbers(jax.tree.map(np.asarray, told), tree)
