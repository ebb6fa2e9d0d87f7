"""Single-task learning: a fresh network for every task, all of which are stored.

This is the upper bound in the paper's Fig. 6. It stores a whole network per task and must be told
the task. Nothing is transferred between tasks, so other methods can be better on later tasks.

Source: Wen et al. 2020 (arXiv 2009.13954), Sec. VI-D 1.
"""

from typing import Any

import jax
import jax.numpy as jnp

from bpnjax import modes
from bpnjax.methods.base import Context, Method, Setup, TaskData
from bpnjax.methods.settings import register


@register("stl", paper="Wen et al. 2020, Sec. VI-D 1")
def stl() -> Method:
    """A network per task. The state holds all of them, leaves ``[T, ...]``."""

    def init(key: Any, params: Any, setup: Setup) -> Any:
        del key
        return jax.tree.map(lambda p: jnp.zeros((setup.num_tasks, *p.shape), p.dtype), params)

    def begin_task(key: Any, params: Any, state: Any, ctx: Context) -> tuple[Any, Any, Any]:
        del params
        fresh, _ = ctx.setup.network.init(key)
        return fresh, state, ()

    def forward(params: Any, task_params: Any, state: Any, ctx: Context) -> tuple[Any, Any]:
        del task_params
        if ctx.training:
            return params, {}
        return ctx.stored_or_current(params, modes.select(state, ctx.task)), {}

    def end_task(
        params: Any, task_params: Any, state: Any, data: TaskData, ctx: Context
    ) -> tuple[Any, Any]:
        del task_params, data
        return params, modes.store(state, params, ctx.current)

    return Method(
        told_task=True,
        trains="afresh",
        init=init,
        begin_task=begin_task,
        forward=forward,
        end_task=end_task,
    )
