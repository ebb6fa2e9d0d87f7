"""Modes: one network, switched from task to task by a few vectors per layer.

A **mode** is a dict keyed by layer path that holds a few vectors per layer, each optional::

    mode = {"hidden_0": {"key": f32[inputs], "gain": f32[outputs], "bias": f32[outputs]}, ...}

    y = (W (x * key) + b) * gain + bias

``key`` is the context of PSP (parameter superposition), ``bias`` the beneficial perturbation of
BPN; `bpnjax.modes.vectors` has the table of all. A **bank** is the same tree with a leading task
axis, ``[T, ...]``; `select` indexes it with one task or with one task id per example. Banks are no
concern of networks: `bpnjax.networks` runs them in a mode.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from bpnjax.modes.keys import is_seed
from bpnjax.modes.vectors import VECTORS

__all__ = ["merge", "select", "store"]


def select(bank: Any, task: Any) -> dict[str, Any]:
    """Takes the mode of a task out of a bank.

    Args:
      bank: a tree like a mode with a leading task axis, leaves ``[T, width]`` or seeds.
      task: int scalar, or int ``[n]`` with one task id per example; may be traced.

    Returns:
      A mode with leaves ``[width]``, or ``[n, width]`` for task ids. A traced task outside the bank
      gives NaN biases (integers: 0) instead of silently those of another task.

    Raises:
      ValueError: the task is concrete and the bank does not have it.
      AssertionError: the ids are neither a scalar nor a vector.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.modes import select
      >>> bank = {"out": {"bias": jnp.array([[0.0, 1.0], [2.0, 3.0]])}}
      >>> select(bank, 1)["out"]["bias"].tolist()
      [2.0, 3.0]
      >>> select(bank, jnp.array([1, 0, 1]))["out"]["bias"].tolist()
      [[2.0, 3.0], [0.0, 1.0], [2.0, 3.0]]
    """
    leaves = [leaf for leaf in jax.tree.leaves(bank, is_leaf=is_seed) if not is_seed(leaf)]
    task = check_task(task, leaves[0].shape[0] if leaves else None)
    chex.assert_rank(task, {0, 1})

    def take(leaf: Any) -> jax.Array:
        if is_seed(leaf):
            return leaf.row(task) if task.ndim == 0 else jax.vmap(leaf.row)(task)
        # Negative numbers would count from the end.
        outside = (task < 0) | (task >= leaf.shape[0])
        missing = jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else 0
        return leaf.at[jnp.where(outside, leaf.shape[0], task)].get(mode="fill", fill_value=missing)

    return jax.tree.map(take, bank, is_leaf=is_seed)


def merge(*modes: Any) -> dict[str, Any]:
    r"""Joins modes: biases of one layer add up, keys and gains of one layer multiply.

    .. math:: key = \prod_i key_i, \quad gain = \prod_i gain_i, \quad bias = \sum_i bias_i

    Args:
      *modes: modes, each ``{path: {"key": ..., "bias": ...}}``.

    Returns:
      One mode, of all layers that one of them names.

    Raises:
      ValueError: two modes have a depthwise kernel for one layer.
      AssertionError: vectors of one layer differ in width.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.modes import merge
      >>> one, other = ({"out": {"bias": jnp.array([value])}} for value in (1.0, 2.0))
      >>> merge(one, other)["out"]["bias"].tolist()
      [3.0]
    """
    merged: dict[str, Any] = {}
    for mode in modes:
        for path, vectors in mode.items():
            layer = merged.setdefault(path, {})
            for name, vector in vectors.items():
                if name not in layer:
                    layer[name] = vector
                else:  # of which one may be for all examples and one per example
                    chex.assert_equal_shape_suffix([layer[name], vector], 1)
                    # A measure is none of the table; the sum lets each mode read it.
                    join = VECTORS[name].join if name in VECTORS else jnp.add
                    if join is None:
                        raise ValueError(
                            f"two modes have a {name} kernel for layer {path!r}, and only one can "
                            "act; leave one out"
                        )
                    layer[name] = join(layer[name], vector)
    return merged


def store(bank: Any, mode: Any, task: Any) -> Any:
    """Stores the vectors of a task in a bank. Learning later tasks does not change them.

    Args:
      bank: ``{path: {"bias": [T, K]}}``, leaves with a leading task axis.
      mode: ``{path: {"bias": [K]}}``, the same tree without the task axis.
      task: int scalar; may be traced, and then one outside the bank changes nothing.

    Returns:
      The new bank.

    Raises:
      ValueError: the task is concrete and outside the bank, or the trees or shapes differ.
      AssertionError: the task is no scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax import modes
      >>> bank = {"out": {"bias": jnp.zeros((2, 1))}}
      >>> modes.store(bank, {"out": {"bias": jnp.array([2.0])}}, 1)["out"]["bias"].tolist()
      [[0.0], [2.0]]
    """

    def one(kept: jax.Array, new: jax.Array) -> jax.Array:
        if kept.shape[1:] != new.shape:
            raise ValueError(f"the bank has room for {kept.shape[1:]} per task, not {new.shape}")
        place = check_task(task, kept.shape[0])
        chex.assert_rank(place, 0)
        place = jnp.where(place < 0, kept.shape[0], place)
        return kept.at[place].set(new, mode="drop")

    return jax.tree.map(one, bank, mode)


def check_task(task: Any, num_tasks: int | None) -> jax.Array:
    """Converts task ids to an array, and checks them if they are concrete.

    Args:
      task: int scalar or int ``[n]``; may be traced, and then its range is not checked.
      num_tasks: T; None where any number from 0 is allowed.

    Returns:
      int32 array.

    Raises:
      ValueError: not integers, or outside 0 to T - 1.

    Example:
      >>> from bpnjax.modes.bank import check_task
      >>> check_task(2, 2)
      Traceback (most recent call last):
      ...
      ValueError: task 2 is not in the bank; it has tasks 0 to 1
    """
    if not isinstance(task, jax.core.Tracer):
        array = np.asarray(task)
        if not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"task {task!r} is not an integer; tasks are numbers from 0")
        least, most = 0, np.inf if num_tasks is None else num_tasks - 1
        if array.size and not (array.min() >= least and array.max() <= most):
            wrong = int(array.min()) if array.min() < least else int(array.max())
            has = f"0 to {num_tasks - 1}" if num_tasks is not None else "from 0"
            raise ValueError(f"task {wrong} is not in the bank; it has tasks {has}")
        return jnp.asarray(array.astype(np.int32))
    if not jnp.issubdtype(task.dtype, jnp.integer):
        raise ValueError(f"task ids have dtype {task.dtype}; give integers")
    return task
