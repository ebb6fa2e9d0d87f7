"""Finds reasons to doubt a finished run: tasks that were not learned, parts without effect.

A run may end without an error and still be meaningless: with chance accuracy, biases that never
changed, or an importance that is zero everywhere. The reader of its table should know.
"""

from typing import Any

import jax
import numpy as np

from bpnjax.data import TaskSequence
from bpnjax.training.epochs import RunState
from bpnjax.utils import arrays

__all__ = ["found"]

_SIGMAS = 3.0  # standard deviations of the binomial distribution above chance


def found(
    accuracy: dict[str, np.ndarray], sequence: TaskSequence, state: RunState, told_task: bool
) -> list[str]:
    """Lists reasons to doubt a run, in whole sentences.

    Args:
      accuracy: of each kind, float ``[seeds, T, T]``, NaN where not tested.
      sequence: the tasks of the run.
      state: after the last task, with a leading axis of seeds if there are several.
      told_task: whether the method has modes.

    Returns:
      Sentences; [] if there is no doubt.
    """
    return [*_not_learned(accuracy["task_masked"], sequence), *_without_effect(state, told_task)]


def _not_learned(masked: np.ndarray, sequence: TaskSequence) -> list[str]:
    """Tasks whose own classes were not distinguished better than by chance after training."""
    count = np.asarray(sequence.test.count, float)
    chance = 1.0 / np.maximum(1, np.asarray(sequence.classes).sum(1))
    spread = np.sqrt(chance * (1 - chance) / np.maximum(1, count))
    learned = np.diagonal(masked, axis1=1, axis2=2)  # [seeds, T]
    at_chance = (learned <= chance + _SIGMAS * spread) & (chance < 1)
    tasks = np.flatnonzero(at_chance.any(0))
    if not len(tasks):
        return []
    first = int(tasks[0])
    value = float(np.nanmin(learned[:, first]))
    which = f"task {first + 1}" + (f" and {len(tasks) - 1} more" if len(tasks) > 1 else "")
    return [
        f"{which} of {len(chance)} not learned: right after training the accuracy among its own "
        f"classes is {value:.2f}, and chance is {chance[first]:.2f}; change train.learning_rate or "
        "train.epochs"
    ]


def _without_effect(state: RunState, told_task: bool) -> list[str]:
    """Biases that never moved, and an importance of nothing."""
    flags = jax.device_get(jax.jit(_any_nonzero)(state.learner.method))
    named = arrays.flatten(flags)
    biases = [bool(some) for name, some in named.items() if name.endswith("/bias")
              and "importance" not in name and "anchor" not in name]  # fmt: skip
    doubts = []
    if told_task and biases and not any(biases):
        doubts.append(
            "no bias of any task ever moved, so all tasks share one mode; raise the step of the "
            "biases (bd.epsilon, or plain_bias.learning_rate)"
        )
    importance = [bool(some) for name, some in named.items() if "importance" in name]
    if importance and not any(importance):
        doubts.append(
            "the importance of every parameter is zero, so the anchor never acted; the gradients "
            "after each task were exactly zero"
        )
    return doubts


def _any_nonzero(tree: Any) -> Any:
    def one(leaf: Any) -> Any:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return np.True_
        return (leaf != 0).any()

    return jax.tree.map(one, tree)
