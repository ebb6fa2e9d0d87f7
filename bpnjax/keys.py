"""Keys and gates of tasks, derived from a seed and never stored element by element.

A node of a bank that is `KeySeeds` or `GateSeeds` stands for an array ``[T, width]``;
`bpnjax.modulation.select` draws the row of a task when it is asked for.
"""

import zlib

import jax
import jax.numpy as jnp
from flax import struct

__all__ = ["GateSeeds", "KeySeeds", "gate_bank", "is_seed", "key_bank"]


@struct.dataclass
class KeySeeds:
    """The +-1 keys of one layer for any number of tasks, stored as one PRNG key.

    A drop-in for an array ``[T, width]`` in a bank: `select` draws the row of a task when it is
    asked for, so a thousand tasks cost no more memory than one.
    """

    seed: jax.Array  # typed PRNG key, shape ()
    width: int = struct.field(pytree_node=False)

    def row(self, task) -> jax.Array:
        """The key of one task.

        Args:
          task: int scalar, may be traced.

        Returns:
          f32 ``[width]``, each element +1 or -1 with probability 1/2.
        """
        words = jax.random.bits(jax.random.fold_in(self.seed, task), ((self.width + 31) // 32,))
        bits = (words[:, None] >> jnp.arange(32, dtype=words.dtype)) & 1
        return 1.0 - 2.0 * bits.reshape(-1)[: self.width].astype(jnp.float32)


@struct.dataclass
class GateSeeds:
    """The 0/1 gates of one layer for any number of tasks, stored as one PRNG key."""

    seed: jax.Array  # typed PRNG key, shape ()
    width: int = struct.field(pytree_node=False)
    gated: float = struct.field(pytree_node=False)  # probability of 0

    def row(self, task) -> jax.Array:
        """The gate of one task.

        Args:
          task: int scalar, may be traced.

        Returns:
          f32 ``[width]``, each element 0 with probability ``gated``, else 1.
        """
        open_ = jax.random.bernoulli(
            jax.random.fold_in(self.seed, task), 1.0 - self.gated, (self.width,)
        )
        return open_.astype(jnp.float32)


def is_seed(node) -> bool:
    """Is this node of a bank drawn from a seed instead of stored?"""
    return isinstance(node, (KeySeeds, GateSeeds))


def _layer_seed(seed, path):
    return jax.random.fold_in(seed, zlib.crc32(path.encode()))


def key_bank(seed: jax.Array, layers) -> dict[str, dict[str, KeySeeds]]:
    """PSP keys for the given layers, independent per layer and task, from one seed.

    Args:
      seed: a typed PRNG key.
      layers: as `find_layers` returns them; each gets a key on its input.

    Returns:
      A bank ``{path: {"key": KeySeeds}}``. The layer's path is folded into the seed, so adding a
      layer to a network does not change the keys of the others.

    Source: Cheung et al. 2019, binary superposition; keys fixed (the released code trains them).
    """
    return {
        path: {"key": KeySeeds(_layer_seed(seed, path), layer.inputs)}
        for path, layer in layers.items()
    }


def gate_bank(seed: jax.Array, layers, gated: float):
    """Like `key_bank`, with gates in {0, 1} instead of signs.

    Args:
      seed: a typed PRNG key.
      layers: as `find_layers` returns them; each gets a gate on its input.
      gated: probability of 0.

    Returns:
      A bank ``{path: {"key": GateSeeds}}``.

    Source: Masse et al. 2018 (XdG).
    """
    return {
        path: {"key": GateSeeds(_layer_seed(seed, path), layer.inputs, gated)}
        for path, layer in layers.items()
    }
