"""What memory a run asks for, compared with what there is, before any of it is allocated."""

import pathlib

import jax

from bpnjax.data import TaskSequence
from bpnjax.run import byte_counts
from bpnjax.training import streaming
from bpnjax.training.experiment import Experiment
from bpnjax.utils.errors import UserError

__all__ = ["available", "check", "needed"]


def needed(experiment: Experiment, sequence: TaskSequence, num_seeds: int) -> tuple[int, int]:
    """The least that a run holds at once.

    Args:
      experiment: its static side.
      sequence: the tasks.
      num_seeds: trained in one program.

    Returns:
      Bytes of the state of all seeds, and of the examples that lie on the device.
    """
    state = byte_counts.report(experiment)["training_bytes"] * num_seeds
    most = streaming.most_bytes(experiment.config)
    held = sequence.train.images.nbytes
    examples = (held if most is None or held <= most else most) + sequence.test.images.nbytes
    return state, examples


def available() -> int | None:
    """The memory that arrays of the default device can take.

    Returns:
      Bytes; on a CPU the least of what the system has left and of the limits of this process's
      control group. None where nothing can be known.

    Example:
      >>> from bpnjax.run import memory
      >>> free = memory.available()
      >>> free is None or free > 2**20
      True
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    if device.platform != "cpu":
        return None
    found = [_system(), _limit()]
    known = [number for number in found if number is not None]
    return min(known) if known else None


def _system() -> int | None:
    """What Linux says is available; None elsewhere."""
    try:
        for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    return None


def _limit() -> int | None:
    """What is left of the limit of the control group; None without one."""
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes",
         "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):  # fmt: skip
        try:
            most, taken = (int(pathlib.Path(path).read_text()) for path in (limit, used))
            return max(0, most - taken)
        except (OSError, ValueError):
            continue
    return None


def check(experiment: Experiment, sequence: TaskSequence, num_seeds: int) -> None:
    """Refuses a run that cannot fit.

    Args:
      experiment: its static side.
      sequence: the tasks.
      num_seeds: trained in one program.

    Raises:
      UserError: its state and examples alone are more than there is.
    """
    state, examples = needed(experiment, sequence, num_seeds)
    free = available()
    if free is None or state + examples <= free:
        return
    mend = "lower num_seeds" if num_seeds > 1 and state > examples else (
        "choose a smaller network or fewer tasks" if state > examples
        else "set dataset.device_mb, beyond which examples stream"
    )  # fmt: skip
    raise UserError(
        f"memory: the state of {num_seeds} seed{'s' * (num_seeds > 1)} takes "
        f"{state / 2**30:.1f} GiB and the examples {examples / 2**30:.1f} GiB, and "
        f"{free / 2**30:.1f} GiB are available; {mend}"
    )
