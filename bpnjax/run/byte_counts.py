"""What a run stores, counted from its arrays."""

import jax
import numpy as np

from bpnjax.modes.keys import is_seed
from bpnjax.run.setup import Problem
from bpnjax.training.epochs import TrainState


def _elements(tree) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def _bytes(tree) -> int:
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def report(problem: Problem, state: TrainState, example_bytes: int = 0) -> dict:
    """Counts parameters and bytes of one seed's state.

    Args:
      problem: the static side of a run.
      state: the state of one seed, or its shapes (`jax.eval_shape`): nothing is read.
      example_bytes: of one training example as it is stored.

    Returns:
      A dict of ints.

      - core_parameters: numbers in the shared parameters.
      - parameters_per_task, bytes_per_task: what must be kept on disk for each further task to
        answer it later (mode biases, a whole network for stl; the statistics by which it is told
        from others, where `evaluate.rule` asks for them). Keys come from one seed for all tasks
        and cost nothing a task.
      - training_bytes: everything alive during training: shared and learned parameters, optimizer
        states, importance, anchors, banks.
      - replay_bytes: training examples that a memory keeps (gem, agem, er, der, derpp), as stored;
        the logits that der and derpp keep beside them are in training_bytes only.
    """
    stored = problem.method.stored(state.method), state.statistics
    stored = jax.tree.leaves(stored, is_leaf=is_seed)
    per_task = [
        jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for leaf in stored if not is_seed(leaf)
    ]
    return {
        "core_parameters": _elements(state.core),
        "parameters_per_task": _elements(per_task),
        "bytes_per_task": _bytes(per_task),
        "training_bytes": _bytes(state),
        "replay_bytes": problem.method.examples_kept(state.method) * example_bytes,
    }
