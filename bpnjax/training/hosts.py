"""One run on several hosts: joining it, and messages from the first host to the others.

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
    """Joins a run of several hosts. Call it before any use of a device.

    Args:
      coordinator: ``HOST:PORT`` of the first host. With "" JAX finds all three arguments by itself
        (Slurm, Open MPI, Cloud TPU, JAX_COORDINATOR_ADDRESS).
      number: how many hosts there are.
      me: the number of this host, from 0.

    Raises:
      UserError: the hosts cannot be found, or not all of them joined.
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
    """Says whether this host writes the results.

    Returns:
      True on the first host, and if there is only one.
    """
    return jax.process_index() == 0


def first_asks(question: Callable[[], Any]) -> Any:
    """Asks a question on the first host and gives every host the answer.

    Args:
      question: a function that returns JSON or raises `UserError`; called on the first host only.

    Returns:
      The answer.

    Raises:
      UserError: the question raised it; it is then raised on all hosts.
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
    """The folder that this host writes to.

    The first host writes to the run's folder, the others to a temporary folder.

    Args:
      workdir: the run's folder.

    Yields:
      A path. Temporary folders are removed at the end.
    """
    if is_first():
        yield workdir
    else:
        with tempfile.TemporaryDirectory(prefix="bpnjax-host-") as scratch:
            yield pathlib.Path(scratch)


def tell(value: Any) -> Any:
    """Sends a value from the first host to every host. Call it on all of them.

    Args:
      value: any JSON; the values of the other hosts are ignored.

    Returns:
      The first host's value. With several hosts tuples become lists, as JSON has no tuples.
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
    """Sends arrays from the first host to every host. Call it on all of them.

    Args:
      tree: a tree of arrays; all hosts must give the same structure, shapes and dtypes.

    Returns:
      The first host's, as NumPy arrays and PRNG keys; ``tree`` itself on one host.
    """
    if jax.process_count() == 1:
        return tree
    from jax.experimental.multihost_utils import broadcast_one_to_all

    told = broadcast_one_to_all(prng.to_numbers(tree))
    return prng.from_numbers(jax.tree.map(np.asarray, told), tree)
