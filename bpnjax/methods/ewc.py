r"""EWC: a quadratic penalty on the distance to earlier parameters, weighted by the Fisher.

.. math:: L_t(\theta) + \frac{\lambda}{2} \sum_{k<t} \sum_j F_{k,j} (\theta_j - \theta^*_{k,j})^2

The sum of such penalties over tasks is again one penalty plus a constant. Its importance is
:math:`\sum_k F_k`, and its anchor is the mean of the anchors weighted by the Fishers. So every
variant needs two arrays like the parameters, however many tasks there are. The variants differ in
the anchor (``anchors``):

- ``"latest"`` (default): the parameters after the last task, with the Fishers summed. Most codes do
  this, and the paper's setting needs it (the official code was never released).
- ``"per_task"``: each Fisher has its own anchor, exactly as in Kirkpatrick et al. 2017.

`ewc_online` forgets old Fishers: F = decay * F + F_new, with the latest anchor (Schwarz et al.
2018). A decay of 1 gives EWC.

``form`` chooses how the penalty acts:

- ``"proximal"`` and ``"gradient"`` follow the gradient of the penalty. The proximal form does so
  implicitly, with the same fixed points, and cannot diverge; see `bpnjax.optim.anchor_gradient`.
  Their strength lambda depends on the unit of the loss. A Fisher is a square of gradients: a
  network that learned its task twice as well has a quarter of it, and networks differ by orders of
  magnitude.
- ``"relative"`` (default): the importance of a task is the root of its Fisher, divided by the mean
  of these roots in the same array of parameters. After the optimizer's step the parameters move
  back to the anchor by a share of the distance:

.. math:: G = \sum_k \frac{\sqrt{F_k}}{\mathrm{mean}(\sqrt{F_k})}, \quad
          \theta \leftarrow \theta - \frac{\kappa G}{1 + \kappa G} (\theta - \theta^*)

The strength kappa has no unit. A constant factor on the loss changes nothing, and all tasks count
equally. This is the proximal step of the penalty in Adam's metric: there the step size of a
parameter is :math:`\eta / \sqrt{v}`, so the product of step size and curvature is
:math:`\lambda \eta F / \sqrt{v}`, which is proportional to the root of F if v is proportional to F.

All shared parameters are anchored, biases and output layer included. A task's own biases never are.

Source: Kirkpatrick et al. 2017 (arXiv 1612.00796). Variant: lambda/2 as there. Wen et al. 2020
(Suppl. C) write lambda without the 1/2 and use 2,000, which is a strength of 4,000 here. The
relative form is ours.
"""

import dataclasses
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from bpnjax import optim
from bpnjax.importance import FISHER_KINDS
from bpnjax.methods.base import Batch, Context, Method, Setup, TaskData
from bpnjax.methods.settings import Range, Setting, register
from bpnjax.utils.errors import UserError

FORMS = ("proximal", "gradient")
EWC_FORMS = ("relative", *FORMS)
MOST_KAPPA = 100.0  # leaves 1% of a step to an average parameter
DEFAULT_STRENGTH = {"relative": 0.02, "proximal": 2000.0, "gradient": 2000.0}
ANCHORS = ("latest", "per_task")
Strength = Annotated[
    float | None,
    Setting(
        "strength of the penalty, kappa or lambda (see ewc.form); None: 0.02 for relative, else "
        "2000",
        at_least=0,
        search=(
            Range(1e-3, 1.0, when=("ewc.form", "relative"), default=0.02),
            Range(1.0, 1e6, default=2000.0),
        ),
    ),
]
Fisher = Annotated[
    str,
    Setting(
        "labels of the Fisher: empirical (of the data), true (all, weighted), or sampled",
        choices=FISHER_KINDS,
    ),
]
Examples = Annotated[
    int, Setting("number of examples per task for the Fisher, drawn once; 0: all", at_least=0)
]
Form = Annotated[
    str, Setting("how the penalty acts: proximal (cannot diverge) or gradient", choices=FORMS)
]


EwcForm = Annotated[
    str,
    Setting(
        "how the penalty acts: relative (by kappa, without unit), or by lambda: proximal (cannot "
        "diverge) or gradient",
        choices=EWC_FORMS,
    ),
]


class EwcState(NamedTuple):
    """The state of EWC, whose size does not depend on the number of tasks."""

    importance: Any  # like the shared parameters, f32; zeros before the first task ends
    anchor: Any  # like the shared parameters
    strength: jax.Array  # lambda or kappa, shape=(); an array so that sweeps can vmap over it


def relative_importance(fisher: Any) -> Any:
    r"""The importance of a task without a unit.

    .. math:: G_j = \frac{\sqrt{F_j}}{\mathrm{mean}_{i \in a(j)} \sqrt{F_i}}

    where a(j) is the array that holds parameter j, such as the kernel of a layer. It is 0 if F is 0
    in the whole array. So each array counts equally, even in layers with much smaller gradients.

    Args:
      fisher: F, a tree, f32, not negative.

    Returns:
      The same tree, f32. The mean of each leaf is 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.methods.ewc import relative_importance
      >>> relative_importance({"a": jnp.array([4.0, 0.0]), "b": jnp.array([16.0])})["a"].tolist()
      [2.0, 0.0]

    Source: ours.
    """

    def one(f: jax.Array) -> jax.Array:
        root = jnp.sqrt(f)
        mean = jnp.sum(root) / max(1, root.size)
        return root / jnp.where(mean > 0, mean, 1.0)

    return jax.tree.map(one, fisher)


def accumulate(
    state: EwcState, params: Any, new: Any, decay: Any = 1.0, anchors: str = "latest"
) -> EwcState:
    r"""Adds a task to the state of EWC.

    .. math:: F \leftarrow \gamma F + F_{new}, \quad
              \theta^* \leftarrow \theta \text{ (latest)} \quad \text{or} \quad
              \theta^* \leftarrow \theta^* + (F_{new} / F) (\theta - \theta^*) \text{ (per task)}

    with the new F on the right. Where it is 0, the anchor is the latest parameters.

    Args:
      state: the state before.
      params: the shared parameters after the task.
      new: the task's Fisher, the same tree, f32, not negative.
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
    (arXiv 1805.06370), Sec. 4, for the decay, with ``"latest"``.
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
    """A tree of zeros like the parameters, f32."""
    return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)


def anchored(strength: Any, form: str, measure: Any, keep: Any = accumulate) -> Method:
    """Makes a method that holds parameters near those after earlier tasks.

    Args:
      strength: lambda, where the penalty is lambda/2 times the sum of importance times squared
        distance; for the relative form kappa.
      form: ``"proximal"`` or ``"gradient"``, see `bpnjax.optim.anchor_gradient`; or ``"relative"``,
        see the top of this file.
      measure: ``TaskData -> tree``, the importance of a task; for the relative form its square.
      keep: ``(state, params, importance) -> state``, adds the importance to the state.

    Returns:
      A `Method` whose state is an `EwcState`.
    """

    relative = form == "relative"

    def init(key: Any, params: Any, setup: Setup) -> EwcState:
        del key, setup
        return EwcState(zeros_like(params), params, jnp.float32(strength))

    def gradient(grads: Any, params: Any, state: EwcState, batch: Batch, ctx: Context) -> Any:
        del batch
        size = ctx.step_size if form == "proximal" else 0.0
        return optim.anchor_gradient(
            grads, params, state.anchor, state.importance, state.strength, size
        )

    def end_step(
        old: Any, new: Any, grads: Any, state: EwcState, batch: Batch, ctx: Context
    ) -> tuple[Any, EwcState]:
        del old, grads, batch, ctx
        return optim.pull_to_anchor(new, state.anchor, state.importance, state.strength), state

    def end_task(
        params: Any, task_params: Any, state: EwcState, data: TaskData, ctx: Context
    ) -> tuple[Any, EwcState]:
        del task_params, ctx
        new = measure(data)
        return params, keep(state, params, relative_importance(new) if relative else new)

    hooks = {"end_step": end_step} if relative else {"gradient": gradient}
    return Method(init=init, end_task=end_task, **hooks)


def _strength(given: Any, form: str) -> Any:
    """The strength for a form; raises an error if it can only be meant for another form."""
    if given is None:
        return DEFAULT_STRENGTH[form]
    if form == "relative" and not hasattr(given, "aval") and given > MOST_KAPPA:
        raise UserError(
            f"ewc.strength: {given} would hold all parameters where they are; ewc.form=relative "
            "takes kappa, about 0.02: leave the strength out, or give ewc.form=proximal with it"
        )
    return given


def _need_softmax(fisher: str) -> Any:
    def check(setup: Setup) -> None:
        if fisher != "empirical":
            setup.need_cross_entropy(f"the {fisher} Fisher")

    return check


@register("ewc", paper="Kirkpatrick et al. 2017, arXiv 1612.00796")
def ewc(
    strength: Strength = None,
    fisher: Fisher = "empirical",
    examples: Examples = 0,
    anchors: Annotated[
        str,
        Setting(
            "parameters that the penalty pulls to: latest (last task) or per_task (every task)",
            choices=ANCHORS,
        ),
    ] = "latest",
    form: EwcForm = "relative",
) -> Method:
    """EWC; see the top of this file for the formula and the variants."""

    def keep(state: EwcState, params: Any, new: Any) -> EwcState:
        return accumulate(state, params, new, 1.0, anchors)

    method = anchored(
        _strength(strength, form), form, lambda data: data.fisher(fisher, examples), keep
    )
    return dataclasses.replace(method, check=_need_softmax(fisher))


@register("ewc_online", group="ewc", paper="Schwarz et al. 2018, arXiv 1805.06370")
def ewc_online(
    strength: Strength = None,
    fisher: Fisher = "empirical",
    examples: Examples = 0,
    decay: Annotated[
        float,
        Setting(
            "ewc_online: factor on the earlier Fisher at each new task",
            at_least=0,
            below=1,
            search=(Range(0.5, 0.99, "linear"),),
        ),
    ] = 0.9,
    form: EwcForm = "relative",
) -> Method:
    """Online EWC; see the top of this file."""

    def keep(state: EwcState, params: Any, new: Any) -> EwcState:
        return accumulate(state, params, new, decay)

    method = anchored(
        _strength(strength, form), form, lambda data: data.fisher(fisher, examples), keep
    )
    return dataclasses.replace(method, check=_need_softmax(fisher))
