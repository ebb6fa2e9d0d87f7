r"""IMM, incremental moment matching: the networks after each task are merged into one.

- `imm_mean`: :math:`\theta = \sum_k \alpha_k \theta_k`.
- `imm_mode`: :math:`\theta = \sum_k \alpha_k F_k \theta_k \big/ \sum_k \alpha_k F_k`, elementwise,
  with 1e-8 added to each Fisher.

All tasks learned so far have the same weight. Each task starts from the parameters of the last one
(weight-transfer). Two options keep it near them:

- a penalty :math:`\lambda |\theta - \theta_{k-1}|^2` (L2-transfer, ``l2``),
- in each step a random share ``drop`` of the hidden units uses the last task's weights
  (drop-transfer, see `drop_transfer`).

Training continues from the unmerged network; the merged one answers. ``columns="all"`` merges the
whole network, as the authors do. ``columns="own"`` merges the output column of a class only over
the tasks that have the class. The default is "own" for one head per task, since other tasks never
trained it, and "all" for one shared output layer.

Source: Lee et al. 2017 (arXiv 1703.08475), Eq. 3, 4, 6 and Sec. 3.2. Variant: the Fisher of
`imm_mode` is exact per example, with one sampled label each, where the authors' code squares means
over 1,000 examples. The units to drop are drawn once per step, where the code draws them per
example.
"""

from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from bpnjax import optim
from bpnjax.methods.base import Batch, Context, Method, Setup, TaskData, output_leaves
from bpnjax.methods.ewc import Form
from bpnjax.methods.settings import Range, Setting, register

L2 = Annotated[
    float,
    Setting(
        "lambda of the penalty lambda |theta - theta of the last task|^2; 0: weight-transfer only",
        at_least=0,
        search=(Range(1e-6, 1.0),),
    ),
]
Drop = Annotated[
    float,
    Setting(
        "share of hidden units that use the last task's weights in a step (drop-transfer)",
        at_least=0, below=1, search=(Range(0.0, 0.8, "linear", own_program=True),),
    ),
]  # fmt: skip
Columns = Annotated[
    str,
    Setting(
        "output columns: all are merged over all tasks, own over their own tasks; auto: by heads",
        choices=("auto", "all", "own"),
    ),
]


class ImmState(NamedTuple):
    """The state of IMM: the network of each task, and the merged network."""

    thetas: Any  # like the shared parameters, with a leading axis [T]
    fishers: Any  # the same, or None for the mean
    done: jax.Array  # f32 [T], 1 for learned tasks
    merged: Any  # like the shared parameters; it gives the answers
    strength: jax.Array  # lambda of the L2-transfer, shape=()
    drop: jax.Array  # rate of the drop-transfer, shape=()


def merge(theta: Any, share: Any) -> jax.Array:
    r"""Weighted mean over the leading axis; the plain mean where all weights are 0.

    .. math:: \theta = \sum_k s_k \theta_k \Big/ \sum_k s_k

    Args:
      theta: ``[T, ...]``.
      share: s, not negative, which broadcasts against it: ``[T, 1, ...]`` for IMM's mean, Fishers
        for its mode.

    Returns:
      ``[...]``, in the dtype of ``theta``.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.methods.imm import merge
      >>> theta, share = jnp.array([[0.0, 2.0], [4.0, 6.0]]), jnp.array([[3.0, 0.0], [1.0, 0.0]])
      >>> merge(theta, share).tolist()
      [1.0, 4.0]

    Source: Lee et al. 2017 (arXiv 1703.08475), Eq. 3 and 6.
    """
    share = jnp.broadcast_to(share, theta.shape)
    total = share.sum(0)
    return jnp.where(
        total > 0, (share * theta).sum(0) / jnp.where(total > 0, total, 1.0), theta.mean(0)
    ).astype(theta.dtype)


def drop_transfer(params: Any, previous: Any, is_head: Any, rate: Any, key: Any) -> Any:
    r"""Gives a random part of the hidden units their weights after the last task.

    .. math:: \hat\theta_i = \theta'_i + \frac{m_i}{1 - p} (\theta_i - \theta'_i)

    where :math:`m_i` is 0 with probability p, else 1, for all weights and the bias of unit i. The
    expectation is :math:`\theta`.

    Args:
      params: a dict tree of parameters, leaves ``[..., units]``. Those of one layer have the same
        units.
      previous: the parameters after the last task, the same tree.
      is_head: the same tree, 1.0 for the output layer, which drops nothing.
      rate: p, scalar in [0, 1).
      key: typed PRNG key.

    Returns:
      Parameters, with the same tree and dtypes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from bpnjax.methods.imm import drop_transfer
      >>> trees = ({"out": {"bias": jnp.full(8, value)}} for value in (3.0, 2.0, 0.0))
      >>> mixed = drop_transfer(*trees, rate=0.5, key=jax.random.key(0))
      >>> sorted(set(mixed["out"]["bias"].tolist()))  # 2 put back, 2 + (3 - 2) / 0.5 kept
      [2.0, 4.0]

    Source: Lee et al. 2017 (arXiv 1703.08475), Eq. 8. Variant: one draw per step for the whole
    batch; the authors' code draws for each example, and drops inputs too, at half the rate.
    """
    layers: dict[str, jax.Array] = {}

    def one(path: Any, new: Any, old: Any, head: Any) -> jax.Array:
        layer = jax.tree_util.keystr(path[:-1], simple=True, separator="/")
        if layer not in layers:
            own = jax.random.fold_in(key, len(layers))
            # `jax.random.bernoulli` would draw other numbers if 64-bit floats are on.
            draws = jax.random.uniform(own, new.shape[-1:], jnp.float32)
            layers[layer] = (draws < jnp.float32(1.0 - rate)) / jnp.float32(1.0 - rate)
        mixed = old + layers[layer] * (new - old)
        return jnp.where(head > 0, new, mixed).astype(new.dtype)

    return jax.tree_util.tree_map_with_path(one, params, previous, is_head)


def _merging(by_mode: bool, l2: float, drop: float, columns: str, form: str) -> Method:
    def check(setup: Setup) -> None:
        if by_mode:
            setup.need_cross_entropy("the sampled Fisher of imm_mode")
        if columns == "own":
            setup.known_classes("imm.columns=own")

    def init(key: Any, params: Any, setup: Setup) -> ImmState:
        del key
        room = jax.tree.map(lambda p: jnp.zeros((setup.num_tasks, *p.shape), p.dtype), params)
        return ImmState(
            thetas=room,
            fishers=jax.tree.map(lambda p: p.astype(jnp.float32), room) if by_mode else None,
            done=jnp.zeros(setup.num_tasks, jnp.float32),
            merged=params,
            strength=jnp.float32(l2),
            drop=jnp.float32(drop),
        )

    def forward(params: Any, task_params: Any, state: ImmState, ctx: Context) -> tuple[Any, Any]:
        del task_params
        if ctx.training:
            if not drop:
                return params, {}
            previous, rate = _last(state, ctx), jnp.where(ctx.current > 0, state.drop, 0.0)
            is_head = output_leaves(params, ctx.setup)
            return drop_transfer(params, previous, is_head, rate, ctx.key), {}
        if ctx.current is None:
            return state.merged, {}
        # In training the network answers unmerged.
        in_training = ctx.current >= 0
        return jax.tree.map(lambda p, m: jnp.where(in_training, p, m), params, state.merged), {}

    def gradient(grads: Any, params: Any, state: ImmState, batch: Batch, ctx: Context) -> Any:
        del batch
        there = jnp.asarray(ctx.current > 0, jnp.float32)
        ones = jax.tree.map(lambda p: there * jnp.ones_like(p), params)
        size = ctx.step_size if form == "proximal" else 0.0
        anchor, strength = _last(state, ctx), 2.0 * state.strength
        return optim.anchor_gradient(grads, params, anchor, ones, strength, size)

    def end_task(
        params: Any, task_params: Any, state: ImmState, data: TaskData, ctx: Context
    ) -> tuple[Any, ImmState]:
        del task_params

        def put(room: jax.Array, leaf: jax.Array) -> jax.Array:
            return room.at[ctx.current].set(leaf)

        state = state._replace(
            thetas=jax.tree.map(put, state.thetas, params),
            done=state.done.at[ctx.current].set(1.0),
        )
        if by_mode:
            fisher = jax.tree.map(lambda f: f + 1e-8, data.fisher("sampled"))
            state = state._replace(fishers=jax.tree.map(put, state.fishers, fisher))
        return params, state._replace(merged=_merged(state, ctx.setup))

    def _merged(state: ImmState, setup: Setup) -> Any:
        fishers = state.fishers if by_mode else jax.tree.map(jnp.ones_like, state.thetas)
        own = columns == "own" or (columns == "auto" and setup.multi_head)
        is_head = output_leaves(state.merged, setup) if own else state.merged

        def one(theta: jax.Array, fisher: jax.Array, head: Any) -> jax.Array:
            every = state.done.reshape((-1,) + (1,) * (theta.ndim - 1))
            share = every
            if own and theta.shape[-1] == setup.num_outputs:
                classes = jnp.asarray(setup.known_classes("imm"))
                owned = state.done[:, None] * classes  # [T, C]
                column = owned.reshape(owned.shape[:1] + (1,) * (theta.ndim - 2) + owned.shape[1:])
                # A class that no task has so far is merged like everything else.
                column = jnp.where(column.sum(0, keepdims=True) > 0, column, every)
                share = jnp.where(head > 0, column, every)
            return merge(theta, share * fisher)

        return jax.tree.map(one, state.thetas, fishers, is_head)

    return Method(check=check, init=init, forward=forward, gradient=gradient, end_task=end_task)


def _last(state: ImmState, ctx: Context) -> Any:
    """The parameters after the last task."""
    last = jnp.maximum(ctx.current - 1, 0)
    return jax.tree.map(lambda theta: theta[last], state.thetas)


@register("imm_mean", group="imm", paper="Lee et al. 2017, arXiv 1703.08475")
def imm_mean(
    l2: L2 = 1e-4, drop: Drop = 0.0, columns: Columns = "auto", form: Form = "proximal"
) -> Method:
    """IMM by the mean of the networks; see the top of this file for the formula."""
    return _merging(False, l2, drop, columns, form)


@register("imm_mode", group="imm", paper="Lee et al. 2017, arXiv 1703.08475")
def imm_mode(
    l2: L2 = 1e-4, drop: Drop = 0.0, columns: Columns = "auto", form: Form = "proximal"
) -> Method:
    """IMM by the mode, weighted by Fishers; see the top of this file for the formula."""
    return _merging(True, l2, drop, columns, form)
