r"""IMM, incremental moment matching: the networks after each task are merged into one.

- `imm_mean`: :math:`\theta = \sum_k \alpha_k \theta_k`.
- `imm_mode`: :math:`\theta = \sum_k \alpha_k F_k \theta_k \big/ \sum_k \alpha_k F_k`, elementwise,
  with 1e-8 added to each Fisher.

All tasks learned so far weigh the same. Each task starts from the last one's parameters
(weight-transfer), on request with

- a pull towards them, :math:`\lambda |\theta - \theta_{k-1}|^2` (L2-transfer, `imm.l2`),
- a random part of the hidden units put back to them in each step (drop-transfer, `imm.drop`, the
  share of those units; see `drop_transfer`).

Training goes on from the unmerged network; what answers is the merged one. A class's column of the
output layer is merged over the tasks that have the class, so that heads of different tasks are
never mixed.

Source: Lee et al. 2017 (arXiv 1703.08475), Eq. 3, 4, 6 and Sec. 3.2. Variant: the Fisher of
`imm_mode` is exact per example, with one sampled label each (the authors' code squares means of
1,000); the units to drop are drawn once a step, where the code draws them for each example.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bpnjax import optim
from bpnjax.methods.base import Method, head_mask


class ImmState(NamedTuple):
    """What IMM keeps: the network of each task, to be merged for a test."""

    thetas: Any  # like the shared parameters with a leading axis [T]
    fishers: Any  # the same, or None for the mean
    done: jax.Array  # f32 [T], 1 for tasks learned
    classes: jax.Array  # bool [T, C]
    is_head: Any  # like the shared parameters, 1.0 for the output layer's, else 0.0
    strength: jax.Array  # lambda of the L2-transfer, shape=()
    drop: jax.Array  # rate of the drop-transfer, shape=()


def merge(theta, share):
    r"""Weighted mean over the leading axis; where all shares are 0, the plain mean.

    .. math:: \theta = \sum_k s_k \theta_k \Big/ \sum_k s_k

    Args:
      theta: ``[T, ...]``.
      share: s, not negative, broadcasts against it: ``[T, 1, ...]`` for IMM's mean, Fishers for its
        mode.

    Returns:
      ``[...]``, in the dtype of ``theta``.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.methods import imm
      >>> theta, share = jnp.array([[0.0, 2.0], [4.0, 6.0]]), jnp.array([[3.0, 0.0], [1.0, 0.0]])
      >>> imm.merge(theta, share).tolist()
      [1.0, 4.0]

    Source: Lee et al. 2017 (arXiv 1703.08475), Eq. 3 and 6.
    """
    share = jnp.broadcast_to(share, theta.shape)
    total = share.sum(0)
    return jnp.where(
        total > 0, (share * theta).sum(0) / jnp.where(total > 0, total, 1.0), theta.mean(0)
    ).astype(theta.dtype)


def drop_transfer(core, previous, is_head, rate, key):
    r"""Replaces a random part of the hidden units by what they were after the last task.

    .. math:: \hat\theta_i = \theta'_i + \frac{m_i}{1 - p} (\theta_i - \theta'_i)

    with :math:`m_i` 0 with probability p, else 1, one for all weights and the bias of unit i; its
    expectation is :math:`\theta`.

    Args:
      core: parameters, a dict of layers, each a dict of leaves ``[..., units]``.
      previous: those after the last task, same tree.
      is_head: same tree, 1.0 for the output layer, which drops nothing.
      rate: p, scalar in [0, 1).
      key: typed PRNG key.

    Returns:
      Parameters, same tree and dtypes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from bpnjax.methods import imm
      >>> trees = ({"out": {"bias": jnp.full(8, value)}} for value in (3.0, 2.0, 0.0))
      >>> mixed = imm.drop_transfer(*trees, rate=0.5, key=jax.random.key(0))
      >>> sorted(set(mixed["out"]["bias"].tolist()))  # 2 put back, 2 + (3 - 2) / 0.5 kept
      [2.0, 4.0]

    Source: Lee et al. 2017 (arXiv 1703.08475), Eq. 8. Variant: one draw a step for the whole batch;
    the authors' code draws for each example, and drops inputs too, at half the rate.
    """
    mixed = {}
    for i, (layer, leaves) in enumerate(core.items()):
        width = next(iter(leaves.values())).shape[-1]
        kept = jax.random.bernoulli(jax.random.fold_in(key, i), 1.0 - rate, (width,))
        scale = kept / (1.0 - rate)

        def one(new, old, head, scale=scale):
            return jnp.where(head > 0, new, old + scale * (new - old)).astype(new.dtype)

        mixed[layer] = jax.tree.map(one, leaves, previous[layer], is_head[layer])
    return mixed


def _make(name, mode):
    def init(key, core, spec):
        del key
        slots = jax.tree.map(lambda p: jnp.zeros((spec.num_tasks, *p.shape), p.dtype), core)
        return ImmState(
            thetas=slots,
            fishers=slots if mode else None,
            done=jnp.zeros(spec.num_tasks),
            classes=jnp.asarray(spec.classes),
            is_head=head_mask(core, spec),
            strength=jnp.float32(spec.config.imm.l2),
            drop=jnp.float32(spec.config.imm.drop),
        )

    def train_core(core, state, task, key):
        last = jnp.maximum(task - 1, 0)
        previous = jax.tree.map(lambda t: t[last], state.thetas)
        rate = jnp.where(task > 0, state.drop, 0.0)
        return drop_transfer(core, previous, state.is_head, rate, key)

    def gradient(grads, core, state, step):
        last = jnp.maximum(step.task - 1, 0)
        anchor = jax.tree.map(lambda t: t[last], state.thetas)
        there = jnp.asarray(step.task > 0, jnp.float32)
        ones = jax.tree.map(lambda p: there * jnp.ones_like(p), core)
        return optim.anchor_gradient(grads, core, anchor, ones, 2.0 * state.strength, step.size)

    def consolidate(core, state, task, ended, spec):
        del spec

        def put(slots, leaf):
            return slots.at[task].set(leaf)

        state = state._replace(
            thetas=jax.tree.map(put, state.thetas, core), done=state.done.at[task].set(1.0)
        )
        if mode:
            fisher = jax.tree.map(lambda f: f + 1e-8, ended.fisher("sampled"))
            state = state._replace(fishers=jax.tree.map(put, state.fishers, fisher))
        return state

    def for_eval(core, state, task):
        del core, task
        owned = state.done[:, None] * state.classes  # [T, C]
        fishers = state.fishers if mode else jax.tree.map(jnp.ones_like, state.thetas)

        def one(theta, fisher, is_head):
            every = state.done.reshape((-1,) + (1,) * (theta.ndim - 1))
            share = every
            if theta.shape[-1] == owned.shape[1]:
                column = owned.reshape(owned.shape[:1] + (1,) * (theta.ndim - 2) + owned.shape[1:])
                # A class that no task so far has: merged like everything else.
                column = jnp.where(column.sum(0, keepdims=True) > 0, column, every)
                share = jnp.where(is_head > 0, column, every)
            return merge(theta, share * fisher)

        return jax.tree.map(one, state.thetas, fishers, state.is_head)

    return Method(
        name=name,
        paper="Lee et al. 2017, arXiv 1703.08475",
        init=init,
        train_core=train_core,
        gradient=gradient,
        consolidate=consolidate,
        for_eval=for_eval,
    )


MEAN = _make("imm_mean", mode=False)
MODE = _make("imm_mode", mode=True)
