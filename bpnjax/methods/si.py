r"""SI, synaptic intelligence: an anchor weighted by each parameter's share of the loss's fall.

While a task is trained,

.. math:: w_j \leftarrow w_j - g_j \, \Delta\theta_j

with g the gradient of the task's own loss (the anchor's pull left out) and :math:`\Delta\theta` the
step that the optimizer really made. After the task

.. math:: \Omega_j \leftarrow \max\Big(0, \Omega_j +
          \frac{w_j}{(\theta_j - \theta^*_j)^2 + \xi}\Big), \quad \theta^* \leftarrow \theta

and the penalty is :math:`c \sum_j \Omega_j (\theta_j - \theta^*_j)^2`, without 1/2.

Source: Zenke et al. 2017 (arXiv 1703.04200), Eq. 3-5. Variant: `si.clamp`: ``"sum"`` clamps the
running sum as the authors' code does (default), ``"increment"`` each task's addition, ``"none"``
neither.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bpnjax import optim
from bpnjax.methods.base import Method

CLAMPS = ("sum", "increment", "none")


class SiState(NamedTuple):
    """What SI keeps, however many tasks there were."""

    path: Any  # w, like the shared parameters
    importance: Any  # Omega, like the shared parameters
    anchor: Any  # theta at the end of the last task; before the first, its start
    strength: jax.Array  # c, shape=()


def init(key, core, spec):
    """The hook `init` of `Method`; the anchor starts where the parameters do."""
    del key
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), core)
    return SiState(zeros, zeros, core, jnp.float32(spec.config.si.strength))


def gradient(grads, core, state, step):
    """The hook `gradient` of `Method`; c without 1/2 is 2c of `anchor_gradient`."""
    # c without 1/2 is a strength of 2c in lambda/2.
    strength = 2.0 * state.strength
    return optim.anchor_gradient(grads, core, state.anchor, state.importance, strength, step.size)


def after_step(state, old, new, grads, step):
    """The hook `after_step` of `Method`: the path integral, with the step that was really made."""
    del step
    path = jax.tree.map(lambda w, g, a, b: w - g * (b - a), state.path, grads, old, new)
    return state._replace(path=path)


def fold(state: SiState, core, damping, clamp="sum") -> SiState:
    r"""Turns the path integral of a task into importance and moves the anchor.

    .. math:: \Omega_j \leftarrow \max\Big(0, \Omega_j +
              \frac{w_j}{(\theta_j - \theta^*_j)^2 + \xi}\Big), \quad
              \theta^* \leftarrow \theta, \quad w \leftarrow 0

    Args:
      state: at the end of the task.
      core: theta, the shared parameters.
      damping: xi, in the unit of a parameter's square; a parameter that hardly moved gets little.
      clamp: ``"sum"``, ``"increment"`` or ``"none"``.

    Returns:
      The state for the next task; its path integral is zero.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.methods import si
      >>> state = si.SiState(*(jnp.array([x]) for x in (2.0, 1.0, 0.0)), jnp.float32(1))
      >>> state = si.fold(state, jnp.array([1.0]), damping=1.0)  # 1 + 2 / (1 + 1)
      >>> state.importance.tolist(), state.anchor.tolist(), state.path.tolist()
      ([2.0], [1.0], [0.0])

    Source: Zenke et al. 2017 (arXiv 1703.04200), Eq. 5. Variant: ``"sum"`` as the authors' code;
    other codes clamp ``"increment"`` or ``"none"``, which differ where a path integral is negative.
    """

    def one(omega, w, p, a):
        new = w / (jnp.square(p - a) + damping)
        if clamp == "increment":
            new = jnp.maximum(new, 0.0)
        total = omega + new
        return jnp.maximum(total, 0.0) if clamp == "sum" else total

    importance = jax.tree.map(one, state.importance, state.path, core, state.anchor)
    return state._replace(
        path=jax.tree.map(jnp.zeros_like, state.path), importance=importance, anchor=core
    )


def consolidate(core, state, task, ended, spec):
    """The hook `consolidate` of `Method`: `fold` with the configuration's damping and clamp."""
    del task, ended
    return fold(state, core, spec.config.si.damping, spec.config.si.clamp)


SI = Method(
    name="si",
    paper="Zenke et al. 2017, arXiv 1703.04200",
    init=init,
    gradient=gradient,
    after_step=after_step,
    consolidate=consolidate,
)
