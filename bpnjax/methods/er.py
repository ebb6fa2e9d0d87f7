r"""Experience replay and its dark kin: a reservoir of earlier examples joins each step.

.. math:: L_t(\theta) + \alpha \frac{1}{|B_1| C} \sum_{b \in B_1} |z_b(\theta) - z_b|^2
          + \beta \frac{1}{|B_2|} \sum_{b \in B_2} CE(z_b(\theta), y_b)

with :math:`B_1, B_2` two independent draws from the memory, :math:`z_b` the C logits that the
network gave when the example entered it, and

- `er`: :math:`\alpha = 0, \beta = 1`, no logits kept.
- `der`: :math:`\beta = 0`.
- `derpp`: both.

Examples enter the memory after the step that learned from them, with the logits before it.

Source: Chaudhry et al. 2019 (arXiv 1902.10486) for ER; Buzzega et al. 2020 (arXiv 2004.07211), Eq.
5 and 6, for DER and DER++. Variant: the squared difference is averaged over logits, as in the
authors' code; the paper writes the norm, which sums them, beside alphas found with that code.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from bpnjax.methods import replay
from bpnjax.methods.base import Method


class ReplayState(NamedTuple):
    """What ER, DER and DER++ keep."""

    memory: replay.Reservoir
    alpha: jax.Array  # weight of the logits, shape=()
    beta: jax.Array  # weight of the labels, shape=()


def _make(name, paper, labels, logits):
    def init(key, core, spec):
        del key, core
        options = spec.config.replay
        memory = replay.empty(options.memory_size, spec.classes.shape[1] if logits else 0)
        return ReplayState(
            memory,
            alpha=jnp.float32(options.alpha),
            beta=jnp.float32(options.beta if logits else 1.0),
        )

    def gradient(grads, core, state, step):
        size = step.spec.config.replay.batch_size
        first, second = jax.random.split(jax.random.fold_in(step.key, 0))
        if logits:
            slots, kept, there = replay.draw(state.memory, first, size)

            def distance(core):
                return jnp.mean(jnp.square(step.examples.logits(core, slots) - kept))

            grads = replay.add(grads, jax.grad(distance)(core), state.alpha * there)
        if labels:
            slots, _, there = replay.draw(state.memory, second, size)
            more = jax.grad(replay.cross_entropy)(core, step, slots)
            grads = replay.add(grads, more, state.beta * there)
        return grads

    def after_step(state, old, new, grads, step):
        del new, grads
        answers = step.examples.logits(old, step.slots) if logits else None
        key = jax.random.fold_in(step.key, 1)
        memory = replay.offer(state.memory, key, step.slots, step.weight, answers)
        return state._replace(memory=memory)

    return Method(
        name=name,
        paper=paper,
        init=init,
        gradient=gradient,
        after_step=after_step,
        examples_kept=lambda state: state.memory.slots.size,
        renumber=lambda state, slots: state._replace(
            memory=state.memory._replace(slots=slots(state.memory.slots))
        ),
    )


ER = _make("er", "Chaudhry et al. 2019, arXiv 1902.10486", labels=True, logits=False)
DER = _make("der", "Buzzega et al. 2020, arXiv 2004.07211", labels=False, logits=True)
DERPP = _make("derpp", "Buzzega et al. 2020, arXiv 2004.07211", labels=True, logits=True)
