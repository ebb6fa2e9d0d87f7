"""What a per-device function needs to do its share of a loop and to sum over the devices.

``axis`` is the name of the mapped device axis, None on one device. Nothing here knows whether
`jax.pmap` or `jax.shard_map` maps it.
"""

import jax


def devices(axis: str | None):
    """How many devices share the work, and the number of this one."""
    return (1, 0) if axis is None else (jax.lax.axis_size(axis), jax.lax.axis_index(axis))


def total(tree, axis: str | None):
    """The sum over devices, leaf by leaf."""
    return tree if axis is None else jax.lax.psum(tree, axis)


def sum_loop(axis: str | None, count, body, zeros):
    """Adds up ``body(i, sums)`` for i from 0 to ``count - 1``, each device its share of the i.

    Args:
      axis: name of the device axis, or None.
      count: int scalar, may be traced.
      body: (i, sums) -> sums; must add nothing for an i of ``count`` or more, since all devices
        take the same number of turns.
      zeros: the sums to start with, all zero.

    Returns:
      The sums, the same on all devices.
    """
    number, me = devices(axis)

    def turn(i, sums):
        return body(i * number + me, sums)

    return total(jax.lax.fori_loop(0, -(-count // number), turn, zeros), axis)
