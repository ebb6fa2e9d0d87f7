"""BD+EWC in a training loop of your own: what to do before, in and after each task.

    memory = loop.start(model, params, x, num_tasks=2)
    step = loop.make_step(model, loss, tx, strength=2000.0, step_size=1e-3)
    for task, (x, y) in enumerate(tasks):
        params, state = loop.begin_task(key, memory, tx)
        for ...:  # batches are yours
            params, state, value = step(params, state, memory, x[rows], y[rows])
        memory = loop.end_task(model, params, memory, task, x, y)

A handful of lines over `bpnjax.methods.bd`, `bpnjax.optim` and `bpnjax.importance`; a loop that
needs anything else uses these.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bpnjax import importance, optim
from bpnjax.methods import bd
from bpnjax.networks import linen

__all__ = ["Memory", "begin_task", "end_task", "make_step", "start"]


class Memory(NamedTuple):
    """What is kept from task to task."""

    core: Any  # the shared parameters after the last task: what answers, and EWC's anchor
    bank: dict[str, dict[str, jax.Array]]  # {path: {"bias": f32 [T, K]}}, zero for tasks to come
    importance: Any  # like core, the sum of the tasks' Fishers


def start(model, params, x, num_tasks: int, pattern: str = ".*") -> Memory:
    """The memory before the first task.

    Args:
      model: a Linen module, or `bpnjax.networks.linen.fixed`.
      params: its parameter collection.
      x: a batch or its shape, ``[n, ...]``.
      num_tasks: T.
      pattern: which layers get a bias a task, as in `bpnjax.networks.linen.matching`.

    Returns:
      A `Memory` of zeros around ``params``.
    """
    layers = linen.matching(linen.find_layers(model, params, x), pattern)
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    return Memory(params, bd.empty_bank(layers, num_tasks), zeros)


def begin_task(key, memory: Memory, tx, hidden_dim: int = 100):
    """Fresh factors beside the shared parameters, and the optimizer's state for both.

    Args:
      key: typed PRNG key, one per task.
      memory: so far.
      tx: an optax optimizer, such as `bpnjax.optim.beneficial_perturbation`.
      hidden_dim: H.

    Returns:
      ``{"core": shared parameters, "bd": factors}`` and ``tx.init`` of that.
    """
    factors = bd.init_factors(key, _widths(memory.bank), hidden_dim)
    params = {"core": memory.core, "bd": factors}
    return params, tx.init(params)


class _Width(NamedTuple):
    outputs: int


def _widths(bank):
    return {path: _Width(vectors["bias"].shape[-1]) for path, vectors in bank.items()}


def make_step(model, loss, tx, strength, step_size=0.0):
    """A jitted training step of the shared parameters and of the task's factors.

    Args:
      model: as in `start`.
      loss: ``(logits, *targets) -> losses of the examples``, or their mean, such as
        `optax.softmax_cross_entropy_with_integer_labels`.
      tx: as in `begin_task`.
      strength: EWC's lambda; 0 for none.
      step_size: as in `bpnjax.optim.anchor_gradient`.

    Returns:
      ``(params, state, memory, x, *targets) -> params, state, mean loss``.
    """

    @jax.jit
    def step(params, state, memory, x, *targets):
        def mean_loss(params):
            mode = bd.product(params["bd"])
            logits = linen.modulated_apply(model, params["core"], mode, x)
            return jnp.mean(loss(logits, *targets))

        value, grads = jax.value_and_grad(mean_loss)(params)
        core = optim.anchor_gradient(
            grads["core"], params["core"], memory.core, memory.importance, strength, step_size
        )
        updates, state = tx.update({"core": core, "bd": grads["bd"]}, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def end_task(model, params, memory: Memory, task, x, labels, kind: str = "empirical") -> Memory:
    """Freezes the task's biases, moves the anchor and adds the task's Fisher information.

    Args:
      model: as in `start`.
      params: as the last step returned them.
      memory: before.
      task: int.
      x: examples for the Fisher, ``[n, ...]``; some hundreds do.
      labels: int ``[n]``.
      kind: as in `bpnjax.importance.fisher`, ``"empirical"`` or ``"true"``.

    Returns:
      The memory after the task.
    """
    biases = bd.product(params["bd"])
    new = importance.fisher(model, params["core"], biases, x, labels, kind=kind)
    return Memory(
        params["core"],
        bd.freeze(memory.bank, biases, task),
        jax.tree.map(jnp.add, memory.importance, new),
    )
