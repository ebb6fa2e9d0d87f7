"""Counts what a run stores, from the shapes of its state."""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np

from bpnjax.methods.gem import Memory
from bpnjax.methods.replay import Reservoir
from bpnjax.training import epochs
from bpnjax.training.experiment import Experiment
from bpnjax.utils import prng


def _elements(leaves: Any) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in leaves)


def _bytes(leaves: Any) -> int:
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def report(experiment: Experiment) -> dict[str, int]:
    """Counts parameters and bytes of one seed's state; nothing is allocated.

    Args:
      experiment: the static facts of the run.

    Returns:
      A dict of ints.

      - core_parameters: numbers in the shared parameters.
      - parameters_per_task, bytes_per_task: how much each further task adds to what is needed to
        answer: mode biases, running statistics of BatchNorm, a whole network for stl, the
        statistics that infer the task. Keys come from one seed for all tasks and cost nothing per
        task.
      - answering_bytes: everything that is needed to answer the present tasks, including the shared
        parameters and what analytic heads store per class.
      - training_bytes: everything in memory during training: shared and task parameters, optimizer
        states, importance, anchors, banks, replay memories.
      - replay_bytes: the part of it that belongs to the memories of earlier examples (gem, agem,
        er, der, derpp), including what is stored with the examples.
    """
    state = _shapes(experiment)
    memories = jax.tree.leaves(
        state.learner.method, is_leaf=lambda node: isinstance(node, (Reservoir, Memory))
    )
    kept = [m for m in memories if isinstance(m, (Reservoir, Memory))]
    now, then = (_answering(e) for e in (experiment, _with_one_more_task(experiment)))
    return {
        "core_parameters": _elements(jax.tree.leaves(state.learner.params)),
        "parameters_per_task": _elements(then) - _elements(now),
        "bytes_per_task": _bytes(then) - _bytes(now),
        "answering_bytes": _bytes(now),
        "training_bytes": _bytes(jax.tree.leaves(state)),
        "replay_bytes": _bytes(jax.tree.leaves(kept)),
    }


def _shapes(experiment: Experiment) -> Any:
    return jax.eval_shape(partial(epochs.init_state, experiment), prng.key(0))


def _answering(experiment: Experiment) -> list[Any]:
    """The arrays that are needed to answer tasks."""
    state = _shapes(experiment)
    needed = jax.tree.leaves(experiment.learner.answering(state.learner))
    leaves = jax.tree.leaves(state.learner)
    chosen = [leaf for leaf, n in zip(leaves, needed, strict=True) if n]
    return chosen + jax.tree.leaves(state.statistics)


def _with_one_more_task(experiment: Experiment) -> Experiment:
    setup = experiment.learner.setup
    classes = setup.classes
    if classes is not None:
        classes = np.concatenate([classes, classes[-1:]])
    setup = dataclasses.replace(setup, num_tasks=setup.num_tasks + 1, classes=classes)
    learner = dataclasses.replace(experiment.learner, setup=setup)
    return dataclasses.replace(experiment, learner=learner)
