r"""EWC: a quadratic anchor at earlier tasks' parameters, weighted by the Fisher information.

.. math:: L_t(\theta) + \frac{\lambda}{2} \sum_{k<t} \sum_j F_{k,j} (\theta_j - \theta^*_{k,j})^2

The sum over tasks of such penalties is again one penalty, with importance :math:`\sum_k F_k` and
as anchor the mean of the anchors weighted by the Fishers, plus a constant. So every variant needs
two arrays like the parameters, however many tasks there are. They differ in the anchor
(``anchors``):

- ``"latest"`` (default): the parameters after the last task, with the Fishers summed; what most
  codes do and what the paper's setting needs (methods differ: the official code was never
  released).
- ``"per_task"``: each Fisher keeps its own anchor, as in Kirkpatrick et al. 2017, exactly.

`ewc_online` forgets old Fishers: F = decay * F + F_new, anchor latest (Schwarz et al. 2018). With a
decay of 1 it would be EWC.

``form`` is ``"proximal"`` by default: same fixed points as the gradient of the penalty
(``"gradient"``) and it cannot diverge; see `bpnjax.optim.anchor_gradient`. All shared parameters
are anchored, biases and output layer included; a task's own biases never are.

Source: Kirkpatrick et al. 2017 (arXiv 1612.00796). Variant: lambda/2 as there; Wen et al. 2020
(Suppl. C) write lambda without the 1/2 and use 2,000, which is a strength of 4,000 here.
"""

import dataclasses
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from bpnjax import optim
from bpnjax.importance import FISHER_KINDS
from bpnjax.methods.base import Batch, Context, Method, Setup, TaskData
from bpnjax.methods.settings import Setting, register

FORMS = ("proximal", "gradient")
ANCHORS = ("latest", "per_task")
Strength = Annotated[float, Setting("lambda, of lambda/2 sum F (theta - anchor)^2", at_least=0)]
Fisher = Annotated[
    str, Setting("labels of the Fisher: those of the data, all, or sampled", choices=FISHER_KINDS)
]
Examples = Annotated[
    int, Setting("of a task, drawn once, that its Fisher is the mean over; 0 is all", at_least=0)
]
Form = Annotated[str, Setting("of the pull: proximal (cannot diverge) or gradient", choices=FORMS)]


class EwcState(NamedTuple):
    """What EWC keeps, however many tasks there were."""

    importance: Any  # like the shared parameters, f32; zeros before the first task ends
    anchor: Any  # like the shared parameters
    strength: jax.Array  # lambda, shape=(); an array so that sweeps can vmap over it


def accumulate(
    state: EwcState, params: Any, new: Any, decay: Any = 1.0, anchors: str = "latest"
) -> EwcState:
    r"""Adds a task to what EWC keeps.

    .. math:: F \leftarrow \gamma F + F_{new}, \quad
              \theta^* \leftarrow \theta \text{ (latest)} \quad \text{or} \quad
              \theta^* \leftarrow \theta^* + (F_{new} / F) (\theta - \theta^*) \text{ (per task)}

    with the new F on the right; where it is 0 the anchor is the latest parameters.

    Args:
      state: before.
      params: the shared parameters after the task.
      new: the task's Fisher, same tree, f32, not negative.
      decay: gamma, factor on the earlier importance.
      anchors: ``"latest"`` or ``"per_task"``.

    Returns:
      The state after the task.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.methods.ewc import EwcState, accumulate
      >>> state = EwcState(jnp.array([1.0]), jnp.array([0.0]), jnp.float32(1))
      >>> after = accumulate(state, jnp.array([4.0]), jnp.array([3.0]), anchors="per_task")
      >>> after.importance.tolist(), after.anchor.tolist()  # 1/2 (x - 0)^2 + 3/2 (x - 4)^2
      ([4.0], [3.0])

    Source: Kirkpatrick et al. 2017 (arXiv 1612.00796) for ``"per_task"``; Schwarz et al. 2018
    (arXiv 1805.06370), Sec. 4, for a decay, with ``"latest"``.
    """
    total = jax.tree.map(lambda old, f: decay * old + f, state.importance, new)
    if anchors == "latest":
        return state._replace(importance=total, anchor=params)

    def weighted_mean(f: jax.Array, both: jax.Array, anchor: jax.Array, p: jax.Array) -> jax.Array:
        share = jnp.where(both > 0, f / jnp.where(both > 0, both, 1.0), 1.0)
        return (anchor + share * (p - anchor)).astype(p.dtype)

    anchor = jax.tree.map(weighted_mean, new, total, state.anchor, params)
    return state._replace(importance=total, anchor=anchor)


def zeros_like(params: Any) -> Any:
    """Zero importance of all parameters, f32."""
    return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)


def anchored(strength: Any, form: str, measure: Any, keep: Any = accumulate) -> Method:
    """A method that holds parameters near those after earlier tasks.

    Args:
      strength: lambda, of lambda/2 times the sum of importance times squared distance.
      form: ``"proximal"`` or ``"gradient"``, see `bpnjax.optim.anchor_gradient`.
      measure: ``TaskData -> tree``, the importance of a task.
      keep: ``(state, params, importance) -> state``, adds it.

    Returns:
      A `Method` whose state is an `EwcState`.
    """

    def init(key: Any, params: Any, setup: Setup) -> EwcState:
        del key, setup
        return EwcState(zeros_like(params), params, jnp.float32(strength))

    def gradient(grads: Any, params: Any, state: EwcState, batch: Batch, ctx: Context) -> Any:
        del batch
        size = ctx.step_size if form == "proximal" else 0.0
        return optim.anchor_gradient(
            grads, params, state.anchor, state.importance, state.strength, size
        )

    def end_task(
        params: Any, task_params: Any, state: EwcState, data: TaskData, ctx: Context
    ) -> tuple[Any, EwcState]:
        del task_params, ctx
        return params, keep(state, params, measure(data))

    return Method(init=init, gradient=gradient, end_task=end_task)


def _need_softmax(fisher: str) -> Any:
    def check(setup: Setup) -> None:
        if fisher != "empirical":
            setup.need_cross_entropy(f"the {fisher} Fisher")

    return check


@register("ewc", paper="Kirkpatrick et al. 2017, arXiv 1612.00796")
def ewc(
    strength: Strength = 2000.0,
    fisher: Fisher = "empirical",
    examples: Examples = 0,
    anchors: Annotated[
        str, Setting("the last task's parameters, or those of each task", choices=ANCHORS)
    ] = "latest",
    form: Form = "proximal",
) -> Method:
    """EWC; see the top of this file for the formula and the variants."""

    def keep(state: EwcState, params: Any, new: Any) -> EwcState:
        return accumulate(state, params, new, 1.0, anchors)

    method = anchored(strength, form, lambda data: data.fisher(fisher, examples), keep)
    return dataclasses.replace(method, check=_need_softmax(fisher))


@register("ewc_online", group="ewc", paper="Schwarz et al. 2018, arXiv 1805.06370")
def ewc_online(
    strength: Strength = 2000.0,
    fisher: Fisher = "empirical",
    examples: Examples = 0,
    decay: Annotated[
        float,
        Setting("ewc_online: factor on earlier Fishers at each new task", at_least=0, below=1),
    ] = 0.9,
    form: Form = "proximal",
) -> Method:
    """Online EWC; see the top of this file."""

    def keep(state: EwcState, params: Any, new: Any) -> EwcState:
        return accumulate(state, params, new, decay)

    method = anchored(strength, form, lambda data: data.fisher(fisher, examples), keep)
    return dataclasses.replace(method, check=_need_softmax(fisher))
