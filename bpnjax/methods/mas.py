r"""MAS, memory aware synapses: an anchor weighted by the output's sensitivity.

.. math:: L_t(\theta) + \lambda \sum_j \Omega_j (\theta_j - \theta^*_j)^2

with :math:`\Omega` of `bpnjax.importance.sensitivity`, summed over tasks, and the anchor at the
parameters after the last task; without 1/2.

Source: Aljundi et al. 2018 (arXiv 1711.09601), Eq. 2-4; importance per example, as defined there.
"""

import jax.numpy as jnp

from bpnjax import optim
from bpnjax.methods import ewc
from bpnjax.methods.base import Method


def init(key, core, spec):
    """The hook `init` of `Method`: EWC's state, with the strength of MAS (without 1/2)."""
    return ewc.EWC.init(key, core, spec)._replace(strength=jnp.float32(spec.config.mas.strength))


def gradient(grads, core, state, step):
    """The hook `gradient` of `Method`; lambda without 1/2 is 2 lambda of `anchor_gradient`."""
    strength = 2.0 * state.strength
    return optim.anchor_gradient(grads, core, state.anchor, state.importance, strength, step.size)


def consolidate(core, state, task, ended, spec):
    """The hook `consolidate` of `Method`: adds the task's sensitivity, moves the anchor."""
    del task, spec
    return ewc.accumulate(state, core, ended.sensitivity())


MAS = Method(
    name="mas",
    paper="Aljundi et al. 2018, arXiv 1711.09601",
    init=init,
    gradient=gradient,
    consolidate=consolidate,
)
