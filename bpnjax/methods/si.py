r"""SI, synaptic intelligence: a penalty weighted by how much each parameter lowered the loss.

While a task is trained, a path integral is updated in each step,

.. math:: w_j \leftarrow w_j - g_j \, \Delta\theta_j

with g the gradient of the task's own loss, without the penalty, and :math:`\Delta\theta` the actual
step of the optimizer. After the task

.. math:: \Omega_j \leftarrow \max\Big(0, \Omega_j +
          \frac{w_j}{(\theta_j - \theta^*_j)^2 + \xi}\Big), \quad \theta^* \leftarrow \theta

and the penalty is :math:`c \sum_j \Omega_j (\theta_j - \theta^*_j)^2`, without a factor 1/2.

Source: Zenke et al. 2017 (arXiv 1703.04200), Eq. 3-5. Variant: ``clamp``. ``"sum"`` (default) keeps
the running sum from becoming negative, as the authors' code does, ``"increment"`` each task's
addition, ``"none"`` neither.
"""

from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from bpnjax import optim
from bpnjax.methods.base import Batch, Context, Method, Setup, TaskData
from bpnjax.methods.ewc import Form, zeros_like
from bpnjax.methods.settings import Range, Setting, register

CLAMPS = ("sum", "increment", "none")


class SiState(NamedTuple):
    """The state of SI, whose size does not depend on the number of tasks."""

    path: Any  # w, like the shared parameters
    importance: Any  # Omega, like the shared parameters
    anchor: Any  # theta at the end of the last task; in the first task its initial value
    strength: jax.Array  # c, shape=()


def fold(state: SiState, params: Any, damping: Any, clamp: str = "sum") -> SiState:
    r"""Turns the path integral of a task into importance, and moves the anchor.

    .. math:: \Omega_j \leftarrow \max\Big(0, \Omega_j +
              \frac{w_j}{(\theta_j - \theta^*_j)^2 + \xi}\Big), \quad
              \theta^* \leftarrow \theta, \quad w \leftarrow 0

    Args:
      state: at the end of the task.
      params: theta, the shared parameters.
      damping: xi, in the unit of a squared parameter. It bounds the importance of parameters that
        hardly moved.
      clamp: ``"sum"``, ``"increment"`` or ``"none"``.

    Returns:
      The state for the next task, with a path integral of zero.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.methods.si import SiState, fold
      >>> state = SiState(*(jnp.array([x]) for x in (2.0, 1.0, 0.0)), jnp.float32(1))
      >>> state = fold(state, jnp.array([1.0]), damping=1.0)  # 1 + 2 / (1 + 1)
      >>> state.importance.tolist(), state.anchor.tolist(), state.path.tolist()
      ([2.0], [1.0], [0.0])

    Source: Zenke et al. 2017 (arXiv 1703.04200), Eq. 5. Variant: ``"sum"`` as in the authors' code.
    Other codes clamp ``"increment"`` or ``"none"``, which differ where a path integral is negative.
    """

    def one(omega: Any, w: Any, p: Any, a: Any) -> Any:
        new = w / (jnp.square(p - a) + damping)
        if clamp == "increment":
            new = jnp.maximum(new, 0.0)
        total = omega + new
        return jnp.maximum(total, 0.0) if clamp == "sum" else total

    importance = jax.tree.map(one, state.importance, state.path, params, state.anchor)
    return state._replace(
        path=jax.tree.map(jnp.zeros_like, state.path), importance=importance, anchor=params
    )


@register("si", paper="Zenke et al. 2017, arXiv 1703.04200")
def si(
    strength: Annotated[
        float,
        Setting(
            "c of the penalty c sum Omega (theta - anchor)^2",
            at_least=0,
            search=(Range(1e-3, 1e3),),
        ),
    ] = 0.1,
    damping: Annotated[
        float, Setting("xi, added to the denominator of Omega", above=0, search=(Range(1e-4, 1.0),))
    ] = 0.1,
    clamp: Annotated[
        str,
        Setting(
            "what must not be negative: the sum (sum), a task's addition (increment), or none",
            choices=CLAMPS,
        ),
    ] = "sum",
    form: Form = "proximal",
) -> Method:
    """SI; see the top of this file for the formula."""

    def init(key: Any, params: Any, setup: Setup) -> SiState:
        del key, setup
        zeros = zeros_like(params)
        return SiState(zeros, zeros, params, jnp.float32(strength))

    def gradient(grads: Any, params: Any, state: SiState, batch: Batch, ctx: Context) -> Any:
        del batch
        size = ctx.step_size if form == "proximal" else 0.0
        # c without 1/2 is a strength of 2c with 1/2.
        return optim.anchor_gradient(
            grads, params, state.anchor, state.importance, 2.0 * state.strength, size
        )

    def end_step(
        old: Any, new: Any, grads: Any, state: SiState, batch: Batch, ctx: Context
    ) -> tuple[Any, SiState]:
        del batch, ctx
        # The step includes everything that changed the parameters, such as the penalty.
        path = jax.tree.map(lambda w, g, a, b: w - g * (b - a), state.path, grads, old, new)
        return new, state._replace(path=path)

    def end_task(
        params: Any, task_params: Any, state: SiState, data: TaskData, ctx: Context
    ) -> tuple[Any, SiState]:
        del task_params, data, ctx
        return params, fold(state, params, damping, clamp)

    return Method(init=init, gradient=gradient, end_step=end_step, end_task=end_task)
