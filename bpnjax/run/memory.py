"""Compares the memory that a run needs with the available memory, before it is allocated."""

from bpnjax.data import TaskSequence
from bpnjax.run import byte_counts
from bpnjax.training import streaming
from bpnjax.training.experiment import Experiment
from bpnjax.utils import memory
from bpnjax.utils.errors import UserError

__all__ = ["check", "needed"]


def needed(experiment: Experiment, sequence: TaskSequence, num_seeds: int) -> tuple[int, int]:
    """The least memory that a run needs at once.

    Args:
      experiment: the static facts of the run.
      sequence: the tasks.
      num_seeds: number of seeds in one program.

    Returns:
      Bytes of the state of all seeds, and of the examples on the device.
    """
    state = byte_counts.report(experiment)["training_bytes"] * num_seeds
    most = streaming.most_bytes(experiment.config)
    held = sequence.train.images.nbytes
    examples = (held if most is None or held <= most else most) + sequence.test.images.nbytes
    return state, examples


def check(experiment: Experiment, sequence: TaskSequence, num_seeds: int) -> None:
    """Raises an error for a run that cannot fit into memory.

    Args:
      experiment: the static facts of the run.
      sequence: the tasks.
      num_seeds: number of seeds in one program.

    Raises:
      UserError: the state and the examples alone need more than the available memory.
    """
    state, examples = needed(experiment, sequence, num_seeds)
    free = memory.available()
    if free is None or state + examples <= free:
        return
    fix = "lower num_seeds" if num_seeds > 1 and state > examples else (
        "choose a smaller network or fewer tasks" if state > examples
        else "set dataset.device_mb, beyond which examples stream"
    )  # fmt: skip
    raise UserError(
        f"memory: the state of {num_seeds} seed{'s' * (num_seeds > 1)} takes "
        f"{state / 2**30:.1f} GiB and the examples {examples / 2**30:.1f} GiB, and "
        f"{free / 2**30:.1f} GiB are available; {fix}"
    )
