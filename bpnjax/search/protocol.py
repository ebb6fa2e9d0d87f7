"""Two phases: settings are chosen on one sequence and reported on another.

If settings are chosen on the sequence they are reported on, even on a held-out part of it, the
choice uses knowledge of later tasks, which a learner that gets one task after another does not have
(Cha and Cho 2024, arXiv 2403.09066). With ``search.protocol=two_phase`` the trials learn other
classes per task, or other permutations, with other seeds.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from bpnjax.config import differences, flatten, validate, with_changes
from bpnjax.utils.errors import UserError

__all__ = ["Protocol", "protocol"]

VALIDATION = 0.1  # share of the training examples that trials are judged on
_APART = 1000  # difference between the seeds of both phases


class Protocol(NamedTuple):
    """The configurations of both phases."""

    tune: ConfigDict
    report: ConfigDict
    name: str  # of the protocol, for results

    @property
    def changes(self) -> list[str]:
        """How the trials differ from the reported runs."""
        same = {"num_seeds": 1}
        return differences(flatten(self.report) | same, flatten(self.tune) | same)


def protocol(config: ConfigDict) -> Protocol:
    """Makes the configurations that trials and reported runs start from.

    Trials have one seed and are judged on a held-out part of the training examples.

    Args:
      config: a configuration. Its ``search`` fields change both phases.

    Returns:
      `Protocol`.

    Raises:
      UserError: another sequence is needed but cannot be drawn, or a change is invalid.

    Example:
      >>> from bpnjax import config
      >>> from bpnjax.search import protocol
      >>> for change in protocol(config.default()).changes:
      ...     print(change)
      dataset.validation: 0.0 -> 0.1
      evaluate.every_tasks: 1 -> 1000000
      evaluate.inferred_rows: 'all' -> 'last'
      evaluate.on: 'test' -> 'validation'
      seed: 0 -> 1000
      sequence.order_seed: -1 -> 1000
    """
    report = with_changes(config, config.search.report, "search.report")
    tune = config.copy_and_resolve_references()
    tune.seed = config.seed + _APART
    tune.num_seeds = 1
    tune.evaluate.on = "validation"
    tune.evaluate.inferred_rows = "last"
    tune.evaluate.every_tasks = 1_000_000  # only after the last task
    tune.evaluate.every_epochs = 0
    tune.log = ""
    tune.dataset.validation = config.dataset.validation or VALIDATION
    name = config.search.protocol
    if name == "two_phase" and not config.search.tune:
        name = _another_sequence(tune)
    tune = with_changes(tune, config.search.tune, "search.tune")
    for one in (tune, report):
        validate(one)
    return Protocol(tune, report, name)


def _another_sequence(tune: ConfigDict) -> str:
    """Draws the tasks of the trials; returns the name of the protocol."""
    sequence = tune.sequence
    if sequence.kind == "permuted":
        return "two_phase"  # the seed determines the permutations
    if sequence.kind == "datasets" or len(tune.dataset.path.split(",")) > 1:
        return "two_phase, same tasks"  # each set is a task, so there are no others
    if sequence.classes:
        raise UserError(
            "search.protocol: two_phase draws other classes per task, and sequence.classes spells "
            "them out; say the trials' own as --config.search.tune='sequence.classes=...', or set "
            "one_phase"
        )
    sequence.order_seed = sequence.order_seed + _APART if sequence.order_seed >= 0 else _APART
    return "two_phase"
