"""What the replay methods share: a reservoir of examples, named by slots.

An example is kept as the number of its slot in the sequence, whose pictures are on the device
anyway, so that a memory costs a few integers in training and a checkpoint holds no pictures.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bpnjax.methods.base import Step


class Reservoir(NamedTuple):
    """A uniform sample of the stream so far."""

    slots: jax.Array  # int32 [M]
    logits: jax.Array | None  # f32 [M, C], the network's answer when the example came, if kept
    seen: jax.Array  # int32 scalar, examples offered so far


def empty(size: int, num_logits: int = 0) -> Reservoir:
    """A reservoir without examples.

    Args:
      size: M, examples it has room for.
      num_logits: logits to keep beside each; 0 for none.

    Returns:
      `Reservoir`.

    Example:
      >>> from bpnjax.methods import replay
      >>> memory = replay.empty(200, num_logits=10)
      >>> memory.slots.shape, memory.logits.shape, int(memory.seen)
      ((200,), (200, 10), 0)
    """
    logits = jnp.zeros((size, num_logits)) if num_logits else None
    return Reservoir(jnp.zeros(size, jnp.int32), logits, jnp.zeros((), jnp.int32))


def offer(memory: Reservoir, key, slots, weight, logits=None) -> Reservoir:
    r"""Offers a batch to a reservoir, one example after another.

    .. math:: P(\text{the i-th example of the stream is taken}) = \min(1, M / i)

    and one that is taken replaces a random one when the reservoir is full, so that at any time it
    is a uniform sample of the stream.

    Args:
      memory: before.
      key: typed PRNG key.
      slots: int32 ``[n]``.
      weight: f32 ``[n]``, 0 for padding, which is not offered.
      logits: f32 ``[n, C]`` to be kept beside, if the reservoir has room for them.

    Returns:
      The reservoir after.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from bpnjax.methods import replay
      >>> batch = jnp.array([7, 8, 9]), jnp.array([1.0, 1.0, 0.0])
      >>> memory = replay.offer(replay.empty(3), jax.random.key(0), *batch)
      >>> memory.slots.tolist(), int(memory.seen)
      ([7, 8, 0], 2)

    Source: Vitter 1985, algorithm R.
    """
    size = memory.slots.shape[0]

    def one(i, memory):
        real = weight[i] > 0
        draw = jax.random.randint(jax.random.fold_in(key, i), (), 0, memory.seen + 1)
        place = jnp.where(memory.seen < size, memory.seen, draw)
        place = jnp.where(real, place, size)  # beyond the end: dropped
        return Reservoir(
            memory.slots.at[place].set(slots[i], mode="drop"),
            None if logits is None else memory.logits.at[place].set(logits[i], mode="drop"),
            memory.seen + real.astype(jnp.int32),
        )

    return jax.lax.fori_loop(0, slots.shape[0], one, memory)


def draw(memory: Reservoir, key, size: int):
    """Draws from a reservoir with replacement.

    Args:
      memory: a reservoir.
      key: typed PRNG key.
      size: how many.

    Returns:
      Slots int32 ``[size]``, logits f32 ``[size, C]`` (None if not kept), and a scalar that is 0.0
      while the reservoir is empty, else 1.0. Multiply what the slots give by it: of an empty
      reservoir they are 0, a real example.
    """
    filled = jnp.minimum(memory.seen, memory.slots.shape[0])
    places = jax.random.randint(key, (size,), 0, jnp.maximum(filled, 1))
    logits = None if memory.logits is None else memory.logits[places]
    return memory.slots[places], logits, (filled > 0).astype(jnp.float32)


def cross_entropy(core, step: Step, slots) -> jax.Array:
    """Mean cross-entropy of some examples of earlier tasks, each within its head.

    Args:
      core: the shared parameters; differentiable for them.
      step: `Step`, whose ``examples`` answer.
      slots: int32 ``[m]``.

    Returns:
      f32 scalar.
    """
    return step.examples.losses(core, slots).mean()


def add(grads: Any, more: Any, share) -> Any:
    """``grads + share * more``, tree by tree.

    Args:
      grads: any tree.
      more: same tree.
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
