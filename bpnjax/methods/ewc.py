r"""EWC: a quadratic anchor at earlier tasks' parameters, weighted by the Fisher information.

.. math:: L_t(\theta) + \frac{\lambda}{2} \sum_{k<t} \sum_j F_{k,j} (\theta_j - \theta^*_{k,j})^2

The sum over tasks of such penalties is again one penalty, with importance :math:`\sum_k F_k` and
as anchor the mean of the anchors weighted by the Fishers, plus a constant. So every variant needs
two arrays like the parameters, however many tasks there are. They differ in the anchor
(`ewc.anchors`):

- ``"latest"`` (default): the parameters after the last task, with the Fishers summed; what most
  codes do and what the paper's setting needs (methods differ: the official code was never
  released).
- ``"per_task"``: each Fisher keeps its own anchor, as in Kirkpatrick et al. 2017, exactly.

`ewc_online` forgets old Fishers: F = decay * F + F_new, anchor latest (Schwarz et al. 2018).

`ewc.form` is ``"proximal"`` by default: same fixed points as the gradient of the penalty
(``"gradient"``) and it cannot diverge; see `bpnjax.optim.anchor_gradient`. All shared parameters
are anchored, biases and output layer included; a task's own biases never are.

Source: Kirkpatrick et al. 2017 (arXiv 1612.00796); strength 2000 without the 1/2 in Wen et al.
2020, Suppl. C.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bpnjax import optim
from bpnjax.methods.base import Method


class EwcState(NamedTuple):
    """What EWC keeps, however many tasks there were."""

    importance: Any  # like the shared parameters, f32; zeros before the first task ends
    anchor: Any  # like the shared parameters
    strength: jax.Array  # lambda, shape=(); an array so that sweeps can vmap over it


def accumulate(state: EwcState, core, new, decay=1.0, anchors="latest") -> EwcState:
    r"""Adds a task to what EWC keeps.

    .. math:: F \leftarrow \gamma F + F_{new}, \quad
              \theta^* \leftarrow \theta \text{ (latest)} \quad \text{or} \quad
              \theta^* \leftarrow \theta^* + (F_{new} / F) (\theta - \theta^*) \text{ (per task)}

    with the new F on the right; where it is 0 the anchor is the latest parameters.

    Args:
      state: before.
      core: the shared parameters after the task.
      new: the task's Fisher, same tree, f32, not negative.
      decay: gamma, factor on the earlier importance.
      anchors: ``"latest"`` or ``"per_task"``.

    Returns:
      The state after the task.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.methods import ewc
      >>> state = ewc.EwcState(jnp.array([1.0]), jnp.array([0.0]), jnp.float32(1))
      >>> after = ewc.accumulate(state, jnp.array([4.0]), jnp.array([3.0]), anchors="per_task")
      >>> after.importance.tolist(), after.anchor.tolist()  # 1/2 (x - 0)^2 + 3/2 (x - 4)^2
      ([4.0], [3.0])

    Source: Kirkpatrick et al. 2017 (arXiv 1612.00796) for ``"per_task"``; Schwarz et al. 2018
    (arXiv 1805.06370), Sec. 4, for a decay, with ``"latest"``.
    """
    total = jax.tree.map(lambda old, f: decay * old + f, state.importance, new)
    if anchors == "latest":
        return state._replace(importance=total, anchor=core)

    def weighted_mean(f, both, anchor, p):
        share = jnp.where(both > 0, f / jnp.where(both > 0, both, 1.0), 1.0)
        return (anchor + share * (p - anchor)).astype(p.dtype)

    anchor = jax.tree.map(weighted_mean, new, total, state.anchor, core)
    return state._replace(importance=total, anchor=anchor)


def _make(name, paper, online):
    def init(key, core, spec):
        del key
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), core)
        return EwcState(zeros, core, jnp.float32(spec.config.ewc.strength))

    def gradient(grads, core, state, step):
        return optim.anchor_gradient(
            grads, core, state.anchor, state.importance, state.strength, step.size
        )

    def consolidate(core, state, task, ended, spec):
        del task
        options = spec.config.ewc
        decay = options.decay if online else 1.0
        anchors = "latest" if online else options.anchors
        new = ended.fisher(options.fisher, options.examples)
        return accumulate(state, core, new, decay, anchors)

    return Method(name=name, paper=paper, init=init, gradient=gradient, consolidate=consolidate)


EWC = _make("ewc", "Kirkpatrick et al. 2017, arXiv 1612.00796", online=False)
EWC_ONLINE = _make("ewc_online", "Schwarz et al. 2018, arXiv 1805.06370", online=True)
