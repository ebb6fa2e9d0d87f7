r"""LwF, learning without forgetting: earlier answers to the new task's examples are kept.

.. math:: L_t(\theta) + \lambda \sum_{k<t} H\big(\mathrm{softmax}(z^{old}_k / \tau),
          \mathrm{softmax}(z_k / \tau)\big)

where z are the logits of task k's head on the current batch, H the cross-entropy averaged over the
batch and *old* the network after the last task. Temperature 2, no factor of its square.

Heads (`lwf.heads`): ``"tasks"``, each earlier task's classes are a head of their own, as in the
paper; ``"seen"``, all classes of earlier tasks are one head, for tasks that share their classes
(permuted pixels), where the sum would count the same head again for every task.

With `lwf.warmup_epochs` only the output layer is trained in the first epochs of a later task.

Source: Li and Hoiem 2016 (arXiv 1606.09282), Eq. 2-4. Variant: the old network answers the very
batch that is trained on, rather than from a record made before the task.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bpnjax.methods import replay
from bpnjax.methods.base import Method, head_mask
from bpnjax.utils.heads import within_head


class LwfState(NamedTuple):
    """What LwF keeps: the network after the last task, which teaches."""

    teacher: Any  # the shared parameters after the last task
    classes: jax.Array  # bool [T, C]
    is_head: Any  # like the shared parameters, 1.0 for the output layer's, else 0.0
    strength: jax.Array  # lambda, shape=()


def init(key, core, spec):
    """The hook `init` of `Method`; the teacher is not asked before the second task."""
    del key
    return LwfState(
        core,
        jnp.asarray(spec.classes),
        head_mask(core, spec),
        jnp.float32(spec.config.lwf.strength),
    )


def distillation(new, old, heads, temperature, weight) -> jax.Array:
    r"""Cross-entropy between old and new answers, summed over heads, averaged over examples.

    .. math:: -\sum_h \frac{1}{\sum_b w_b} \sum_b w_b \sum_{c \in h}
              \mathrm{softmax}_h(z^{old}_b / \tau)_c \log \mathrm{softmax}_h(z_b / \tau)_c

    Args:
      new: z, logits f32 ``[n, C]``.
      old: logits f32 ``[n, C]``.
      heads: bool ``[h, C]``, the classes of each head; heads without classes count nothing.
      temperature: tau.
      weight: w, f32 ``[n]``, 0 for padding; not all 0.

    Returns:
      f32 scalar; at ``new = old`` the entropy of the old answers and not 0, with a gradient of 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.methods import lwf
      >>> old, heads = jnp.array([[0.0, 2.0, 9.0]]), jnp.array([[True, True, False]])
      >>> new, weight = jnp.array([[5.0, 5.0, 0.0]]), jnp.ones(1)
      >>> round(float(lwf.distillation(new, old, heads, 2.0, weight)), 4)  # log 2
      0.6931

    Source: Li and Hoiem 2016 (arXiv 1606.09282), Eq. 2-3. Variant: no factor of the temperature's
    square, as in the authors' code: its gradient is ``(q - p) / tau``.
    """

    def head(classes):
        masked = [within_head(z / temperature, classes) for z in (old, new)]
        p, log_q = jax.nn.softmax(masked[0]), jax.nn.log_softmax(masked[1])
        each = -jnp.sum(jnp.where(classes, p * log_q, 0.0), -1)
        return jnp.sum(weight * each) / jnp.sum(weight)

    return jnp.sum(jnp.where(heads.any(1), jax.vmap(head)(heads), 0.0))


def add_distillation(grads, core, state, step):
    """Adds the gradient of `distillation` for the step's batch to a gradient.

    Args:
      grads: like the shared parameters.
      core: the shared parameters.
      state: before; its teacher answers the batch as it is, once a step.
      step: `Step`.

    Returns:
      ``grads`` plus `lwf.strength` times the gradient; unchanged in the first task.
    """
    options = step.spec.config.lwf
    earlier = jnp.arange(state.classes.shape[0]) < step.task
    heads = state.classes & earlier[:, None]
    if options.heads == "seen":
        heads = heads.any(0, keepdims=True)
    old = step.examples.logits(state.teacher, step.slots)

    def loss(core):
        new = step.examples.logits(core, step.slots)
        return distillation(new, old, heads, options.temperature, step.weight)

    return replay.add(grads, jax.grad(loss)(core), state.strength)


def warm_up(grads, state, step):
    """Leaves of a gradient only the output layer's while a later task warms up.

    Args:
      grads: like the shared parameters.
      state: tells which leaves are the output layer's.
      step: `Step`; the first `lwf.warmup_epochs` epochs of a task but the first warm up.

    Returns:
      The gradient, 0 for all other leaves while it warms up. An optimizer with momentum or decay
      may still move them.
    """
    warming = (step.task > 0) & (step.epoch < step.spec.config.lwf.warmup_epochs)
    return jax.tree.map(lambda g, head: jnp.where(warming, head * g, g), grads, state.is_head)


def gradient(grads, core, state, step):
    """The hook `gradient` of `Method`: `add_distillation`, then `warm_up`."""
    return warm_up(add_distillation(grads, core, state, step), state, step)


LWF = Method(
    name="lwf",
    paper="Li and Hoiem 2016, arXiv 1606.09282",
    init=init,
    gradient=gradient,
    consolidate=lambda core, state, task, ended, spec: state._replace(teacher=core),
)
