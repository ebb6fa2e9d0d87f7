"""Tools for a per-device function: its share of a loop, and sums over devices.

``axis`` is the name of the mapped device axis, or None on one device. The functions work within
`jax.pmap` and `jax.shard_map` alike.
"""

from collections.abc import Callable
from typing import Any

import jax


def devices(axis: str | None) -> tuple[int, int | jax.Array]:
    """The number of devices that share the work, and the number of this one.

    Args:
      axis: name of the device axis, or None.

    Returns:
      The number of devices, an int, and this device's number from 0, an int32 scalar; (1, 0) for
      None.
    """
    return (1, 0) if axis is None else (jax.lax.axis_size(axis), jax.lax.axis_index(axis))


def total(tree: Any, axis: str | None) -> Any:
    """Sums over devices, leaf by leaf.

    Args:
      tree: of arrays, those of this device.
      axis: name of the device axis, or None.

    Returns:
      The sums, the same on all devices; ``tree`` itself for None.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from bpnjax.utils import collectives
      >>> summed = jax.vmap(lambda x: collectives.total(x, "devices"), axis_name="devices")
      >>> summed(jnp.arange(3)).tolist()
      [3, 3, 3]
    """
    return tree if axis is None else jax.lax.psum(tree, axis)


def mean(tree: Any, axis: str | None) -> Any:
    """Averages over devices, leaf by leaf.

    Args:
      tree: of floating arrays, those of this device.
      axis: name of the device axis, or None.

    Returns:
      The means, the same on all devices; ``tree`` itself for None.
    """
    return tree if axis is None or not jax.tree.leaves(tree) else jax.lax.pmean(tree, axis)


def gather(tree: Any, axis: str | None) -> Any:
    """Joins the shares of all devices along the first axis, in the order of the devices.

    Args:
      tree: of arrays ``[n, ...]``, those of this device.
      axis: name of the device axis, or None.

    Returns:
      Arrays ``[devices * n, ...]``, the same on all devices; ``tree`` itself for None.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from bpnjax.utils import collectives
      >>> joined = jax.vmap(lambda x: collectives.gather(x, "devices"), axis_name="devices")
      >>> joined(jnp.array([[1, 2], [3, 4]]))[0].tolist()
      [1, 2, 3, 4]
    """
    if axis is None:
        return tree
    return jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, axis, tiled=True), tree)


def sum_loop(axis: str | None, count: Any, body: Callable[[Any, Any], Any], zeros: Any) -> Any:
    """Sums ``body(i, sums)`` over i from 0 to ``count - 1``, with the i divided among devices.

    Device d of n takes the i for which ``i % n`` is d.

    Args:
      axis: name of the device axis, or None.
      count: int scalar, may be traced.
      body: (i, sums) -> sums. It must add nothing where i is ``count`` or more, since all devices
        take the same number of turns.
      zeros: the sums to start with. They must be zero, since each device starts with them.

    Returns:
      The sums, the same on all devices.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from bpnjax.utils import collectives
      >>> def squares(axis, count=5):
      ...     return collectives.sum_loop(axis, count, lambda i, s: s + (i < count) * i**2, 0)
      >>> devices = jax.vmap(lambda _: squares("devices"), axis_name="devices")
      >>> int(squares(None)), devices(jnp.arange(2)).tolist()
      (30, [30, 30])
    """
    number, me = devices(axis)

    def turn(i: Any, sums: Any) -> Any:
        return body(i * number + me, sums)

    return total(jax.lax.fori_loop(0, -(-count // number), turn, zeros), axis)
