"""Many seeds by vmap, many devices by pmap: the only place that names either.

The programs themselves are per seed and per device; they receive the name of the device axis and
sum what must be summed.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bpnjax.errors import UserError

AXIS = "devices"


class Layout(NamedTuple):
    """How a run uses devices."""

    number: int = 1
    axis: str = "batch"  # or "seeds"
    backend: str = "pmap"  # or "shard_map"


def choose_layout(config) -> Layout:
    """How many devices a run uses, and for what.

    Args:
      config: a run configuration; `devices` is "all" or a number.

    Returns:
      `Layout`. "all" takes as many as have something to do.

    Raises:
      UserError: more than there are or than have something to do, or none.
    """
    have, axis = jax.local_device_count(), config.parallel.axis
    if config.devices == "all":
        most = min(have, config.num_seeds if axis == "seeds" else config.train.batch_size)
        even = axis == "batch"
        number = max(n for n in range(1, most + 1) if even or config.num_seeds % n == 0)
        return Layout(number, axis, config.parallel.backend)
    number = int(config.devices)
    if not 1 <= number <= have:
        raise UserError(f"devices: {number} asked for, {have} there; give 'all' or 1 to {have}")
    if axis == "seeds" and config.num_seeds % number:
        raise UserError(
            f"devices: {number} devices cannot share {config.num_seeds} seeds evenly; make "
            "num_seeds a multiple, or set --config.parallel.axis=batch"
        )
    if axis == "batch" and number > config.train.batch_size:
        raise UserError(
            f"devices: {number} devices share a batch of {config.train.batch_size}; use at most "
            f"{config.train.batch_size} or raise train.batch_size"
        )
    return Layout(number, axis, config.parallel.backend)


class Clock:
    """Seconds spent compiling, summed over the programs that share it."""

    def __init__(self):
        self.compile_seconds = 0.0


def program(
    function: Callable,
    clock: Clock,
    num_seeds: int,
    layout: Layout = Layout(),  # noqa: B008  immutable
    split: bool = False,
    over_seeds: tuple[int, ...] = (0, 1),
    donate: tuple[int, ...] = (),
) -> Callable:
    """Compiles a per-seed function for seeds and devices; at its first call, once.

    Args:
      function: ``f(key, ...)``; if it splits its work it is called with ``axis=``.
      clock: counts the compile time.
      num_seeds: with 1 the arguments have no seed axis, else those in ``over_seeds`` and the
        results have a leading axis ``[num_seeds]``.
      layout: of the devices. With the axis "seeds" each device runs its seeds by itself.
      split: whether the function can divide its work over the devices and sums over the axis by
        itself. Else, with the axis "batch", each device does all of it.
      over_seeds: positions of the arguments with a seed axis.
      donate: positions of the arguments whose buffers may be reused.

    Returns:
      The compiled callable.
    """
    devices = jax.local_devices()[: layout.number]
    mesh = Mesh(np.array(devices), (AXIS,))
    by_seeds = layout.number > 1 and layout.axis == "seeds"
    by_batch = layout.number > 1 and layout.axis == "batch" and split
    compiled = None

    def spec(i):
        return PartitionSpec(AXIS) if by_seeds and i in over_seeds else PartitionSpec()

    def build(args):
        mapped = partial(function, axis=AXIS) if by_batch else function
        if num_seeds > 1:
            mapped = jax.vmap(mapped, tuple(0 if i in over_seeds else None for i in _range(args)))
        if not (by_seeds or by_batch):
            return jax.jit(mapped, donate_argnums=donate)
        if layout.backend == "pmap":
            return _pmap(mapped, devices, [spec(i) for i in _range(args)], by_seeds, donate)
        return jax.jit(
            jax.shard_map(
                mapped,
                mesh=mesh,
                in_specs=tuple(spec(i) for i in _range(args)),
                out_specs=PartitionSpec(AXIS) if by_seeds else PartitionSpec(),
                check_vma=False,  # with it the gradient of what is shared would be summed twice
            ),
            donate_argnums=donate,
        )

    def call(*args):
        nonlocal compiled
        if layout.number > 1:  # moves only what is not there yet
            args = tuple(
                jax.device_put(arg, NamedSharding(mesh, spec(i))) for i, arg in enumerate(args)
            )
        if compiled is None:
            compiled = build(args)
            if hasattr(compiled, "lower"):
                started = time.perf_counter()
                compiled = compiled.lower(*args).compile()
                clock.compile_seconds += time.perf_counter() - started
        return compiled(*args)

    return call


def _range(args):
    return range(len(args))


def _pmap(mapped, devices, specs, by_seeds: bool, donate):
    """`jax.pmap` with shared arguments, and arguments whose seeds are dealt out to the devices."""
    over = [spec != PartitionSpec() for spec in specs]

    def deal(leaf):
        return leaf.reshape(len(devices), -1, *leaf.shape[1:])

    # pmap wants at least one mapped argument: the number of the device, which nothing reads.
    on_devices = jax.pmap(
        lambda _, *shared: mapped(*shared),
        axis_name=AXIS,
        devices=devices,
        in_axes=(0, *(0 if mine else None for mine in over)),
        out_axes=0 if by_seeds else None,
        donate_argnums=() if by_seeds else tuple(i + 1 for i in donate),
    )

    def call(*args):
        dealt = [
            jax.tree.map(deal, arg) if mine else arg for arg, mine in zip(args, over, strict=True)
        ]
        out = on_devices(jnp.arange(len(devices)), *dealt)
        if by_seeds:
            out = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), out)
        return out

    return call
