"""Keys and gates of tasks, derived from a seed and never stored element by element.

A node of a bank that is `KeySeeds` or `GateSeeds` stands for an array ``[T, width]``;
`bpnjax.modes.select` draws the row of a task when it is asked for.
"""

import zlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from bpnjax.modes.vectors import VECTORS

__all__ = ["GateSeeds", "KeySeeds", "drawn", "gate_bank", "is_seed", "key_bank", "key_of_task"]


def key_of_task(seed: jax.Array, task: Any) -> jax.Array:
    """The PRNG key from which the row of a task is drawn.

    Args:
      seed: typed PRNG key of all tasks, shape ``()``; or one for each, shape ``[T]``, as in a model
        merged of tasks that were learned apart.
      task: int scalar, may be traced.

    Returns:
      A typed PRNG key.

    Example:
      >>> import jax
      >>> from bpnjax.modes.keys import KeySeeds, key_of_task
      >>> seed = jax.random.key(0)
      >>> own = jax.numpy.stack([key_of_task(seed, task) for task in (5, 7)])
      >>> rows = KeySeeds(seed, width=9).row(7), KeySeeds(own, width=9).row(1)
      >>> rows[0].tolist() == rows[1].tolist()
      True
    """
    return seed[task] if seed.ndim else jax.random.fold_in(seed, task)


@struct.dataclass
class KeySeeds:
    """The +-1 keys of one layer for any number of tasks, stored as one PRNG key.

    It takes the place of an array ``[T, width]`` in a bank. `select` draws the row of a task when
    it is needed, so a thousand tasks take no more memory than one.

    Example:
      >>> import jax
      >>> from bpnjax.modes.keys import KeySeeds
      >>> keys = KeySeeds(jax.random.key(0), width=50)
      >>> row = keys.row(999)
      >>> row.shape, sorted(set(row.tolist()))
      ((50,), [-1.0, 1.0])
    """

    seed: jax.Array  # typed PRNG key, shape () or [T]; see `key_of_task`
    width: int = struct.field(pytree_node=False)

    def row(self, task: Any) -> jax.Array:
        """The key of one task.

        Args:
          task: int scalar, may be traced.

        Returns:
          f32 ``[width]``, each element +1 or -1 with probability 1/2.
        """
        seed = key_of_task(self.seed, task)
        words = jax.random.bits(seed, ((self.width + 31) // 32,), jnp.uint32)
        bits = (words[:, None] >> jnp.arange(32, dtype=words.dtype)) & 1
        return 1.0 - 2.0 * bits.reshape(-1)[: self.width].astype(jnp.float32)


@struct.dataclass
class GateSeeds:
    """The 0/1 gates of one layer for any number of tasks, stored as one PRNG key.

    Example:
      >>> import jax
      >>> from bpnjax.modes.keys import GateSeeds
      >>> row = GateSeeds(jax.random.key(0), width=1000, gated=0.8).row(3)
      >>> sorted(set(row.tolist())), round(float(row.mean()), 1)
      ([0.0, 1.0], 0.2)
    """

    seed: jax.Array  # typed PRNG key, shape () or [T]; see `key_of_task`
    width: int = struct.field(pytree_node=False)
    gated: float = struct.field(pytree_node=False)  # probability of 0

    def row(self, task: Any) -> jax.Array:
        """The gate of one task.

        Args:
          task: int scalar, may be traced.

        Returns:
          f32 ``[width]``, each element 0 with probability ``gated``, else 1.
        """
        # Not `jax.random.bernoulli`, which draws other numbers where 64-bit floats are on.
        draws = jax.random.uniform(key_of_task(self.seed, task), (self.width,), dtype=jnp.float32)
        return (draws < jnp.float32(1.0 - self.gated)).astype(jnp.float32)


def is_seed(node: Any) -> bool:
    """Says whether a node of a bank is drawn from a seed instead of stored.

    Args:
      node: any node; the function is meant for ``is_leaf`` of `jax.tree.map` over a bank.

    Returns:
      True for `KeySeeds` and `GateSeeds`.
    """
    return isinstance(node, (KeySeeds, GateSeeds))


def drawn(bank: Any, num_tasks: int) -> Any:
    """Draws the rows of all tasks, so that a bank holds them instead of seeds.

    This takes more memory and less time.

    Args:
      bank: any tree; its nodes that are seeds are drawn.
      num_tasks: T.

    Returns:
      The tree with f32 ``[T, width]`` for each seed; the other leaves are the same objects.

    Example:
      >>> import jax
      >>> from bpnjax import modes
      >>> bank = {"out": {"key": modes.KeySeeds(jax.random.key(0), width=3)}}
      >>> modes.drawn(bank, 4)["out"]["key"].shape
      (4, 3)
    """

    return jax.tree.map(
        lambda node: _rows(node, num_tasks) if is_seed(node) else node, bank, is_leaf=is_seed
    )


@partial(jax.jit, static_argnums=1)
def _rows(seeds: Any, num_tasks: int) -> jax.Array:
    return jax.vmap(seeds.row)(jnp.arange(num_tasks))


def _inputs(path: str, layer: Any) -> int:
    (width,) = VECTORS["key"].shape(path, layer)
    return width


def _layer_seed(seed: jax.Array, path: str) -> jax.Array:
    return jax.random.fold_in(seed, zlib.crc32(path.encode()))


def key_bank(seed: jax.Array, layers: Mapping[str, Any]) -> dict[str, dict[str, KeySeeds]]:
    r"""PSP keys for the given layers, independent per layer and task, from one seed.

    .. math:: key_{l,t} \in \{-1, +1\}^{inputs_l}, \quad y = W (x \odot key_{l,t}) + b

    Args:
      seed: a typed PRNG key.
      layers: as `find_layers` returns them; each gets a key on its input.

    Returns:
      A bank ``{path: {"key": KeySeeds}}``. The layer's path is folded into the seed, so adding a
      layer to a network does not change the keys of the others.

    Raises:
      ValueError: the number of a layer's inputs is not known.

    Example:
      >>> import jax
      >>> from bpnjax import modes
      >>> from bpnjax.modes import keys
      >>> from bpnjax.networks.layers import Layer
      >>> layers = {"out": Layer("dense", 4, 3, 1, 2, (1, 3))}
      >>> bank = keys.key_bank(jax.random.key(0), layers)
      >>> modes.select(bank, 7)["out"]["key"].shape
      (4,)

    Source: Cheung et al. 2019 (arXiv 1902.05522), binary superposition. Variant: keys fixed (the
    released code trains them).
    """
    return {
        path: {"key": KeySeeds(_layer_seed(seed, path), _inputs(path, layer))}
        for path, layer in layers.items()
    }


def gate_bank(
    seed: jax.Array, layers: Mapping[str, Any], gated: float
) -> dict[str, dict[str, GateSeeds]]:
    r"""Like `key_bank`, with gates in {0, 1} instead of signs.

    .. math:: gate_{l,t} \in \{0, 1\}^{inputs_l}, \quad P(gate = 0) = gated

    Args:
      seed: a typed PRNG key.
      layers: as `find_layers` returns them; each gets a gate on its input.
      gated: probability of 0.

    Returns:
      A bank ``{path: {"key": GateSeeds}}``; a gate multiplies the input as a key does.

    Raises:
      ValueError: the number of a layer's inputs is not known.

    Source: Masse et al. 2018 (arXiv 1802.01569, XdG). Variant: the units that are left are not
    rescaled.
    """
    return {
        path: {"key": GateSeeds(_layer_seed(seed, path), _inputs(path, layer), gated)}
        for path, layer in layers.items()
    }
