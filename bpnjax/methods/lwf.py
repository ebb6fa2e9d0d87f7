r"""LwF, learning without forgetting: keeps the earlier answers to the new task's examples.

.. math:: L_t(\theta) + \lambda \sum_{k<t} H\big(\mathrm{softmax}(z^{old}_k / \tau),
          \mathrm{softmax}(z_k / \tau)\big)

where z are the logits of task k's head on the current batch, H is the cross-entropy averaged over
the batch, and *old* is the network after the last task. The default temperature is 2, and its
square is not a factor.

``heads`` chooses the heads: ``"tasks"`` has one head per earlier task, as in the paper. ``"seen"``
has one head of all earlier classes, for tasks that share their classes (permuted pixels), where the
sum would count the same head once per task.

``warmup_steps`` trains only the output layer in the first steps of a later task.

Source: Li and Hoiem 2016 (arXiv 1606.09282), Eq. 2-4. Variant: the old network answers the current
batch itself, instead of from a record made before the task.
"""

from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from bpnjax.methods import replay
from bpnjax.methods.base import Batch, Context, Method, Setup, TaskData, output_leaves
from bpnjax.methods.settings import Range, Setting, register
from bpnjax.utils.errors import UserError
from bpnjax.utils.heads import within_head

Strength = Annotated[
    float,
    Setting(
        "lambda, weight of the distillation loss",
        at_least=0,
        field="lwf.strength",
        search=(Range(0.1, 30.0),),
    ),
]
Temperature = Annotated[
    float,
    Setting(
        "temperature of the softmax in the distillation loss",
        above=0,
        field="lwf.temperature",
        search=(Range(1.0, 8.0),),
    ),
]
Heads = Annotated[
    str,
    Setting(
        "softmax over the classes of each earlier task (tasks) or of all earlier tasks (seen)",
        choices=("tasks", "seen"), field="lwf.heads",
    ),
]  # fmt: skip
WarmUp = Annotated[
    int,
    Setting(
        "steps at the start of a later task that train the output layer only", at_least=0,
        field="lwf.warmup_steps",
    ),
]  # fmt: skip


class LwfState(NamedTuple):
    """The state of LwF: the network after the last task, which teaches."""

    teacher: Any  # the shared parameters after the last task
    strength: jax.Array  # lambda, shape=()


def distillation(new: Any, old: Any, heads: Any, temperature: Any, weight: Any) -> jax.Array:
    r"""Cross-entropy between old and new answers, summed over heads, averaged over examples.

    .. math:: -\sum_h \frac{1}{\sum_b w_b} \sum_b w_b \sum_{c \in h}
              \mathrm{softmax}_h(z^{old}_b / \tau)_c \log \mathrm{softmax}_h(z_b / \tau)_c

    Args:
      new: z, logits f32 ``[n, C]``.
      old: logits f32 ``[n, C]``.
      heads: bool ``[h, C]``, the classes of each head; heads without classes add nothing.
      temperature: tau.
      weight: w, f32 ``[n]``, 0 for padding; not all 0.

    Returns:
      f32 scalar. At ``new = old`` it is the entropy of the old answers, and its gradient is 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.methods.lwf import distillation
      >>> old, heads = jnp.array([[0.0, 2.0, 9.0]]), jnp.array([[True, True, False]])
      >>> new, weight = jnp.array([[5.0, 5.0, 0.0]]), jnp.ones(1)
      >>> round(float(distillation(new, old, heads, 2.0, weight)), 4)  # log 2
      0.6931

    Source: Li and Hoiem 2016 (arXiv 1606.09282), Eq. 2-3. Variant: without a factor of the squared
    temperature, as in the authors' code, so the gradient is ``(q - p) / tau``.
    """

    def head(classes: jax.Array) -> jax.Array:
        masked = [within_head(z / temperature, classes) for z in (old, new)]
        p, log_q = jax.nn.softmax(masked[0]), jax.nn.log_softmax(masked[1])
        each = -jnp.sum(jnp.where(classes, p * log_q, 0.0), -1)
        return jnp.sum(weight * each) / jnp.sum(weight)

    return jnp.sum(jnp.where(heads.any(1), jax.vmap(head)(heads), 0.0))


class Distillation(NamedTuple):
    """The hooks of LwF, for `lwf` and for EBLL, which extends them."""

    check: Any  # (setup) -> None
    start: Any  # (params) -> LwfState
    add: Any  # (grads, params, LwfState, batch, ctx) -> grads, plus that of `distillation`
    warm_up: Any  # (grads, ctx) -> grads of the output layer only, while a later task warms up


def distil(
    who: str, strength: float, temperature: float, heads: str, warmup_steps: int
) -> Distillation:
    """Makes the hooks of a method that distils the answers of the network after the last task.

    Args:
      who: name of the method, for messages.
      strength: lambda.
      temperature: of the softmax.
      heads: ``"tasks"`` or ``"seen"``.
      warmup_steps: number of steps at the start of each later task.

    Returns:
      `Distillation`.
    """

    def check(setup: Setup) -> None:
        setup.need_cross_entropy(who)
        setup.known_classes(who)
        if setup.told_task:
            raise UserError(
                f"method: {who} distils the answers of one network to the batch of a new task, and "
                "with a key or bias per task there is no such network: leave the modes out, or "
                "protect the shared weights by ewc, si, mas or er"
            )

    def start(params: Any) -> LwfState:
        return LwfState(params, jnp.float32(strength))

    def add(grads: Any, params: Any, state: LwfState, batch: Batch, ctx: Context) -> Any:
        classes = jnp.asarray(ctx.setup.known_classes(who))
        kept = classes & (jnp.arange(ctx.setup.num_tasks) < ctx.current)[:, None]
        if heads == "seen":
            kept = kept.any(0, keepdims=True)
        old = ctx.outputs(state.teacher, batch.x, ctx.current)

        def loss(params: Any) -> jax.Array:
            new = ctx.outputs(params, batch.x, ctx.current)
            return distillation(new, old, kept, temperature, batch.weight)

        return replay.add(grads, jax.grad(loss)(params), state.strength)

    def warm_up(grads: Any, ctx: Context) -> Any:
        if not warmup_steps:
            return grads
        warming = (ctx.current > 0) & (ctx.step < warmup_steps)
        is_head = output_leaves(grads, ctx.setup)
        return jax.tree.map(lambda g, head: jnp.where(warming, head * g, g), grads, is_head)

    return Distillation(check, start, add, warm_up)


@register("lwf", paper="Li and Hoiem 2016, arXiv 1606.09282")
def lwf(
    strength: Strength = 1.0,
    temperature: Temperature = 2.0,
    heads: Heads = "tasks",
    warmup_steps: WarmUp = 0,
) -> Method:
    """LwF; see the top of this file for the formula."""
    hooks = distil("lwf", strength, temperature, heads, warmup_steps)

    def gradient(grads: Any, params: Any, state: LwfState, batch: Batch, ctx: Context) -> Any:
        return hooks.warm_up(hooks.add(grads, params, state, batch, ctx), ctx)

    def end_task(
        params: Any, task_params: Any, state: LwfState, data: TaskData, ctx: Context
    ) -> tuple[Any, LwfState]:
        del task_params, data, ctx
        return params, state._replace(teacher=params)

    return Method(
        check=hooks.check,
        # The first task does not use the teacher.
        init=lambda key, params, setup: hooks.start(params),
        gradient=gradient,
        end_task=end_task,
    )
