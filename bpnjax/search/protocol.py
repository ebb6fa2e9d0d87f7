"""Two phases: settings are chosen on one sequence and reported on another.

Settings that are chosen on the sequence they are reported on, be it on a part held out, are chosen
with knowledge of later tasks, which a learner that meets them one after another does not have (Cha
and Cho 2024, arXiv 2403.09066). With ``search.protocol=two_phase`` the trials learn other classes
per task, or other permutations, from other seeds.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from bpnjax.config import differences, flatten, validate, with_changes
from bpnjax.utils.errors import UserError

__all__ = ["Protocol", "protocol"]

VALIDATION = 0.1  # share of the training examples that trials are judged on
_APART = 1000  # between the seeds of both phases


class Protocol(NamedTuple):
    """The configurations of both phases."""

    tune: ConfigDict
    report: ConfigDict
    name: str  # of the protocol, for results

    @property
    def changes(self) -> list[str]:
        """What the trials have otherwise than the runs that are reported."""
        same = {"num_seeds": 1}
        return differences(flatten(self.report) | same, flatten(self.tune) | same)


def protocol(config: ConfigDict) -> Protocol:
    """The configurations that trials and reported runs start from.

    Trials are run with one seed and judged on a part of the training examples that is held out.

    Args:
      config: a configuration; its ``search`` says what both phases change.

    Returns:
      `Protocol`.

    Raises:
      UserError: another sequence is asked for and none can be drawn, or a change is wrong.

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
    tune.evaluate.every_tasks = 1_000_000  # after the last
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
    """Draws the tasks of the trials; returns what that is called."""
    sequence = tune.sequence
    if sequence.kind == "permuted":
        return "two_phase"  # the permutations are those of the seed
    if sequence.kind == "datasets" or len(tune.dataset.path.split(",")) > 1:
        return "two_phase, same tasks"  # each set is a task: there are no others
    if sequence.classes:
        raise UserError(
            "search.protocol: two_phase draws other classes per task, and sequence.classes spells "
            "them out; say the trials' own as --config.search.tune='sequence.classes=...', or set "
            "one_phase"
        )
    sequence.order_seed = sequence.order_seed + _APART if sequence.order_seed >= 0 else _APART
    return "two_phase"
