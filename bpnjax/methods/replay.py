"""The replay memory of all replay methods: a reservoir of examples in their stored dtype."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bpnjax.methods.base import Batch, Context

__all__ = ["Reservoir", "add", "draw", "empty", "gradient", "offer"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reservoir:
    """A uniform sample of the stream so far.

    Attributes:
      x: examples in their stored dtype, ``[M, ...]``.
      y: their labels, ``[M, ...]``.
      task: int32 ``[M]``, the task of each example.
      outputs: f32 ``[M, ...]``, the network's outputs when the example was stored; None if unused.
      seen: int32 scalar, number of examples offered so far.
    """

    x: jax.Array
    y: jax.Array
    task: jax.Array
    outputs: Any
    seen: jax.Array


def empty(size: int, x: Any, y: Any, outputs: Any = None) -> Reservoir:
    """A reservoir without examples.

    Args:
      size: M, the capacity.
      x: shape and dtype of one example, `jax.ShapeDtypeStruct` ``[...]``.
      y: shape and dtype of one label.
      outputs: shape of the outputs to store with each example; None for none.

    Returns:
      `Reservoir`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from bpnjax.methods import replay
      >>> image = jax.ShapeDtypeStruct((8, 8), jnp.uint8)
      >>> label = jax.ShapeDtypeStruct((), jnp.int32)
      >>> memory = replay.empty(200, image, label, outputs=(10,))
      >>> memory.x.shape, memory.x.dtype.name, memory.outputs.shape, int(memory.seen)
      ((200, 8, 8), 'uint8', (200, 10), 0)
    """
    return Reservoir(
        jnp.zeros((size, *x.shape), x.dtype),
        jnp.zeros((size, *y.shape), y.dtype),
        jnp.zeros(size, jnp.int32),
        None if outputs is None else jnp.zeros((size, *outputs), jnp.float32),
        jnp.zeros((), jnp.int32),
    )


def offer(memory: Reservoir, key: Any, batch: Batch, outputs: Any = None) -> Reservoir:
    r"""Offers a batch to a reservoir, one example after another.

    .. math:: P(\text{the i-th example of the stream is taken}) = \min(1, M / i)

    An accepted example replaces a random one when the reservoir is full. So the reservoir is a
    uniform sample of the stream at any time.

    Args:
      memory: the reservoir before.
      key: typed PRNG key.
      batch: the examples. Those of weight 0 are not offered.
      outputs: f32 ``[n, ...]`` to store with them, if the reservoir has room for outputs.

    Returns:
      The reservoir afterwards.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from bpnjax.methods import Batch, replay
      >>> number = jax.ShapeDtypeStruct((), jnp.int32)
      >>> x, real = jnp.array([7, 8, 9]), jnp.array([1.0, 1.0, 0.0])
      >>> batch = Batch(x, y=x, weight=real, task=jnp.zeros(3, int))
      >>> memory = replay.offer(replay.empty(3, number, number), jax.random.key(0), batch)
      >>> memory.x.tolist(), int(memory.seen)
      ([7, 8, 0], 2)

    Source: Vitter 1985, algorithm R.
    """
    size, n = memory.task.shape[0], batch.weight.shape[0]
    real = (batch.weight > 0).astype(jnp.int32)
    before = memory.seen + jnp.cumsum(real, dtype=jnp.int32) - real
    order = jnp.arange(n)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(order)
    draws = jax.vmap(lambda k, most: jax.random.randint(k, (), 0, most + 1))(keys, before)
    place = jnp.where(before < size, before, draws)
    place = jnp.where(real > 0, place, size)  # a place beyond the end is dropped
    # Of several examples with the same place the last one stays, as if offered one by one.
    last = jnp.full(size + 1, -1, jnp.int32).at[jnp.minimum(place, size)].max(order)
    place = jnp.where(last[jnp.minimum(place, size)] == order, place, size)

    def put(kept: jax.Array, new: jax.Array) -> jax.Array:
        return kept.at[place].set(new.astype(kept.dtype), mode="drop")

    return Reservoir(
        put(memory.x, batch.x),
        put(memory.y, batch.y),
        put(memory.task, batch.task),
        None if memory.outputs is None else put(memory.outputs, outputs),
        memory.seen + real.sum(dtype=jnp.int32),
    )


def draw(memory: Reservoir, key: Any, size: int) -> tuple[Reservoir, jax.Array]:
    """Draws examples from a reservoir with replacement.

    Args:
      memory: a reservoir.
      key: typed PRNG key.
      size: m, number of examples.

    Returns:
      The examples, leaves ``[m, ...]``, and a scalar: 0.0 while the reservoir is empty, else 1.0.
      Multiply by it, since an empty reservoir holds zeros.
    """
    filled = jnp.minimum(memory.seen, memory.task.shape[0])
    places = jax.random.randint(key, (size,), 0, jnp.maximum(filled, 1))
    kept = memory.outputs
    drawn = Reservoir(
        memory.x[places],
        memory.y[places],
        memory.task[places],
        None if kept is None else kept[places],
        memory.seen,
    )
    return drawn, (filled > 0).astype(jnp.float32)


def gradient(
    params: Any,
    drawn: Reservoir,
    there: jax.Array,
    loss: Callable[[jax.Array], jax.Array],
    ctx: Context,
) -> Any:
    r"""The gradient of a loss on replayed examples, which run through the network as in training.

    .. math:: \nabla_\theta L(z(\theta))

    If all tasks share running statistics of BatchNorm, the replayed examples enter them too.
    Statistics of the batch alone would describe the current task, and earlier tasks would be
    answered wrongly.

    Args:
      params: the shared parameters.
      drawn: the examples.
      there: the scalar of `draw`.
      loss: ``outputs [m, ...] -> scalar``.
      ctx: of the step.

    Returns:
      A tree like ``params``.

    Source: ours. In PyTorch every forward pass updates the running statistics, one after another;
    here the passes of a step are averaged.
    """

    def of(params: Any) -> tuple[jax.Array, Any]:
        outputs, variables = ctx.trained(params, drawn.x, drawn.task)
        return loss(outputs), variables

    grads, variables = jax.grad(of, has_aux=True)(params)
    ctx.observe(variables, there)
    return grads


def add(grads: Any, more: Any, share: Any) -> Any:
    """Adds ``share * more`` to ``grads``.

    Args:
      grads: any tree.
      more: the same tree.
      share: a scalar, may be traced.

    Returns:
      The same tree.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.methods import replay
      >>> float(replay.add({"w": jnp.array(1.0)}, {"w": jnp.array(4.0)}, 0.5)["w"])
      3.0
    """
    return jax.tree.map(lambda g, m: g + share * m, grads, more)
