"""Single-task learning: a fresh network for every task, all of them kept.

Upper bound of the paper's Fig. 6. It costs a whole network a task and must be told the task. It
bounds no later task for certain: nothing is transferred to it.

Source: Wen et al. 2020 (arXiv 2009.13954), Sec. VI-D 1.
"""

import jax
import jax.numpy as jnp

from bpnjax.methods.base import Method


def init(key, core, spec):
    """The hook `init` of `Method`: room for a network a task, leaves ``[T, ...]``."""
    del key
    return jax.tree.map(lambda p: jnp.zeros((spec.num_tasks, *p.shape), p.dtype), core)


def store(core, learned, state, task):
    """The hook `store` of `Method`: keeps the task's whole network."""
    del learned
    return jax.tree.map(lambda kept, p: kept.at[task].set(p), state, core)


def for_eval(core, state, task):
    """The hook `for_eval` of `Method`: the network of the task, as it was stored."""
    del core
    return jax.tree.map(lambda kept: kept[task], state)


STL = Method(
    name="stl",
    paper="Wen et al. 2020, Sec. VI-D 1",
    told_task=True,
    init=init,
    restarts=True,
    store=store,
    for_eval=for_eval,
    stored=lambda state: {"cores": state},
)
