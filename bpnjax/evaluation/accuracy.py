"""The three accuracies: told the task, told and masked, not told.

- ``task_told``: the task's mode is active, the argmax runs over all classes.
- ``task_masked``: the same, restricted to the task's own classes.
- ``task_inferred``: nobody tells the task. Of the modes learned so far the one with the highest
  score is taken, by default the one with the lowest predictive entropy
  (`bpnjax.evaluation.task_inference`), per example or per batch. Then it is the same as task_told.
"""

from typing import Any, NamedTuple

import jax
import numpy as np


class Correct(NamedTuple):
    """How many test examples of each task were answered rightly, int32 ``[T]``; -1 if not tested.

    These are counts and not shares, so that the host can divide once in double precision.
    """

    task_told: jax.Array
    task_masked: jax.Array
    task_inferred: jax.Array
    task_guess: jax.Array  # of those of task_inferred, how many were taken for their own task


KINDS = ("task_told", "task_masked", "task_inferred")


def accuracies(correct: Correct, count: Any, inferred_examples: int = 0) -> dict[str, np.ndarray]:
    """Turns counts into accuracies.

    Args:
      correct: counts, int ``[..., T]``.
      count: int ``[T]``, test examples of each task.
      inferred_examples: how many of them task_inferred was measured on; 0 for all.

    Returns:
      ``{"task_told": float64 [..., T], ...}``, shares from 0 to 1, NaN where not tested, and as
      ``"task_guess"`` the share of examples whose task was inferred rightly.

    Example:
      >>> import numpy as np
      >>> from bpnjax.evaluation.accuracy import Correct, accuracies
      >>> accuracies(Correct(*np.array([[3, -1]] * 4)), count=[4, 4])["task_told"].tolist()
      [0.75, nan]
    """
    count = np.asarray(count, np.float64)
    limit = np.minimum(count, inferred_examples or np.inf)
    found = {}
    for name, hits in correct._asdict().items():
        hits = np.asarray(hits)
        of = limit if name in ("task_inferred", "task_guess") else count
        found[name] = np.where(hits < 0, np.nan, hits / of)
    return found
