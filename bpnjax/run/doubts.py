"""Finds reasons to doubt a finished run: tasks that were not learned, parts without effect.

A run may end without an error and still be meaningless: with chance accuracy, modes that are the
same for all tasks, or an importance that is zero everywhere. The reader of its table should know.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bpnjax import modes
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
    masked = accuracy["task_masked"]
    seeds, tasks, _ = masked.shape
    return [*_not_learned(masked, sequence), *_without_effect(state, told_task, seeds, tasks)]


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


def _without_effect(state: RunState, told_task: bool, seeds: int, tasks: int) -> list[str]:
    """Modes that are the same for all tasks, and an importance that is zero everywhere."""
    kept = state.learner.method
    names = jax.tree.leaves(arrays.names_of(kept))
    named = dict(zip(names, jax.tree.leaves(kept), strict=True))
    axis = int(seeds > 1)

    def is_of_bank(name: str, leaf: Any) -> bool:
        vector = name.rpartition("/")[2]
        rank = axis + (4 if vector == "depthwise" else 2)
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return vector in modes.VECTORS and leaf.ndim == rank and not is_key

    def effects(banks: dict[str, Any], importance: dict[str, Any]) -> Any:
        first = jnp.array([0])
        differs = {name: (leaf != leaf.take(first, axis)).any() for name, leaf in banks.items()}
        return differs, {name: (leaf != 0).any() for name, leaf in importance.items()}

    banks = {name: leaf for name, leaf in named.items() if is_of_bank(name, leaf)}
    importance = {name: leaf for name, leaf in named.items() if "importance" in name}
    differs, matters = jax.device_get(jax.jit(effects)(banks, importance))
    doubts = []
    if told_task and tasks > 1 and differs and not any(differs.values()):
        vectors = " and ".join(sorted({name.rpartition("/")[2] for name in differs}))
        doubts.append(
            f"all tasks have the same {vectors} in every layer, so they share one mode; raise the "
            "step (bd.epsilon, or plain_bias.learning_rate)"
        )
    if matters and not any(matters.values()):
        doubts.append(
            "the importance of every parameter is zero, so the anchor never acted; the gradients "
            "after each task were exactly zero"
        )
    return doubts
