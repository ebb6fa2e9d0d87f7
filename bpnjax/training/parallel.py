"""Runs many seeds (by vmap or in turn) and many devices (by pmap).

No other module names seeds or devices.

A program is written for one seed and one device. It receives the name of the device axis and sums
over this axis itself.

The layout of seeds and devices changes results by rounding only. A seed that runs in turn with
others, or on one of several devices, has the same bits as the seed alone if XLA compiles the same
code for both (measured: JAX 0.10 on a CPU); otherwise they agree to about 1e-6 in a short run.
Batches that several devices share, and seeds that run at once (vmap), are summed in another order.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from bpnjax.training.compilation import compile_lowered
from bpnjax.utils import prng
from bpnjax.utils.errors import UserError

AXIS = "devices"


class Layout(NamedTuple):
    """How a run uses its devices."""

    number: int = 1  # of devices, those of all hosts
    axis: str = "batch"  # what they share: batch or seeds
    backend: str = "pmap"  # or "shard_map"
    seeds: str = "vmap"  # how a device runs its seeds: vmap (at once) or map (in turn)


def choose_layout(config: ConfigDict) -> Layout:
    """Decides how many devices a run uses, and for what.

    Args:
      config: a run configuration; `devices` is "all" or a number.

    Returns:
      `Layout`. "all" takes as many as have something to do: at most as many as a batch has
      examples, or, to share seeds, the largest number that divides `num_seeds`. Seeds "auto" are
      one after another on a CPU, at once elsewhere.

    Raises:
      UserError: there are fewer devices, some would have nothing to do, none is asked for, or
        several hosts cannot have this layout.

    Example:
      >>> from bpnjax import config
      >>> from bpnjax.training import parallel
      >>> settings = config.default()
      >>> settings.devices = "1"
      >>> parallel.choose_layout(settings).number
      1
    """
    have, axis = jax.device_count(), config.parallel.axis
    hosts, batch = jax.process_count(), config.train.batch_size
    if config.devices == "all":
        most = min(have, config.num_seeds if axis == "seeds" else batch)
        even = axis == "batch"
        number = max(n for n in range(1, most + 1) if even or config.num_seeds % n == 0)
    else:
        number = int(config.devices)
        if not 1 <= number <= have:
            raise UserError(f"devices: {number} asked for, {have} there; give 'all' or 1 to {have}")
    if axis == "seeds" and config.num_seeds % number:
        raise UserError(
            f"devices: {number} devices cannot share {config.num_seeds} seeds evenly; make "
            "num_seeds a multiple, or set --config.parallel.axis=batch"
        )
    if axis == "batch" and number > batch:
        raise UserError(
            f"devices: {number} devices share a batch of {batch}; use at most {batch} or raise "
            "train.batch_size"
        )
    if hosts > 1 and axis == "seeds":
        raise UserError(
            "parallel.axis: 'seeds' works on one host; start one run per host instead, each with a "
            "--config.seed of its own, or use batch"
        )
    if hosts > 1 and number < have:
        raise UserError(
            f"devices: {hosts} hosts share the work of all their {have} devices, {number} would "
            "leave some out; give 'all', and a train.batch_size of at least as many"
        )
    seeds = config.parallel.seeds
    if seeds == "auto":  # measured: a core gains nothing from a batch of small products
        seeds = "map" if jax.default_backend() == "cpu" else "vmap"
    return Layout(number, axis, config.parallel.backend, seeds)


def place(tree: Any, layout: Layout) -> Any:
    """Copies a tree once to every device of a layout, so that later calls need no copy.

    Args:
      tree: arrays, the same on all hosts.
      layout: the layout of the devices.

    Returns:
      The tree on the devices; as it was where the layout has one device.
    """
    if layout.number == 1:
        return tree
    return _put(tree, NamedSharding(_mesh(layout), PartitionSpec()))


def _mesh(layout: Layout) -> Mesh:
    return Mesh(np.array(jax.devices()[: layout.number]), (AXIS,))


def _put(tree: Any, sharding: NamedSharding) -> Any:
    """`jax.device_put`, also to a sharding over several hosts (then every host has the whole)."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def one(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return leaf  # there already
        copies = [jax.device_put(leaf, device) for device in sharding.addressable_devices]
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, copies)

    return prng.from_numbers(jax.tree.map(one, prng.to_numbers(tree)), tree)


def _here(tree: Any) -> Any:
    """Arrays of several hosts, each the same everywhere, as arrays of this host."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


class Clock:
    """Seconds spent compiling, summed over the programs that share it."""

    def __init__(self) -> None:
        self.compile_seconds = 0.0


def program(
    function: Callable[..., Any],
    clock: Clock,
    num_seeds: int,
    layout: Layout = Layout(),  # noqa: B008  immutable
    split: bool = False,
    over_seeds: tuple[int, ...] = (0,),
    donate: tuple[int, ...] = (),
) -> Callable[..., Any]:
    """Compiles a function of one seed for all seeds and devices, once, at its first call.

    Args:
      function: ``f(key or state, ...)``; if it splits its work it is called with ``axis=``, a name
        for `jax.lax.psum`.
      clock: counts the compile time.
      num_seeds: with 1 the arguments have no seed axis, else those in ``over_seeds`` and the
        results have a leading axis ``[num_seeds]``.
      layout: the layout of the devices. With the axis "seeds" each device runs its seeds by itself.
      split: whether the function can divide its work over the devices and sums over the axis by
        itself. Else, with the axis "batch", each device (and each host) does all of it.
      over_seeds: positions of the arguments with a seed axis.
      donate: positions of the arguments whose buffers may be reused.

    Returns:
      The compiled callable. It serves the shapes of its first call only.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from bpnjax.training import parallel
      >>> draw = lambda key, scale: scale * jax.random.normal(key, (3,))
      >>> draws = parallel.program(draw, parallel.Clock(), num_seeds=2)
      >>> draws(jax.random.split(jax.random.key(0), 2), jnp.float32(2)).shape
      (2, 3)
    """
    mesh = _mesh(layout)
    by_seeds = layout.number > 1 and layout.axis == "seeds"
    by_batch = layout.number > 1 and layout.axis == "batch" and split
    # Programs that are not split run on every device of a single host, or on one device per host.
    together = layout.number > 1 and (split or not mesh.is_multi_process)
    compiled = None

    def spec(i: int) -> PartitionSpec:
        return PartitionSpec(AXIS) if by_seeds and i in over_seeds else PartitionSpec()

    def build(args: Any) -> Callable[..., Any]:
        mapped = partial(function, axis=AXIS) if by_batch else function
        if num_seeds > 1:
            mapped = _OVER_SEEDS[layout.seeds](mapped, over_seeds)
        if not (by_seeds or by_batch):
            return _compile(jax.jit(mapped, donate_argnums=donate), args, clock)
        specs = tuple(spec(i) for i in range(len(args)))
        if layout.backend == "pmap":
            return _pmap(mapped, list(mesh.devices), specs, by_seeds, donate, args, clock)
        on_devices = jax.shard_map(
            mapped,
            mesh=mesh,
            in_specs=specs,
            out_specs=PartitionSpec(AXIS) if by_seeds else PartitionSpec(),
            check_vma=False,  # with it the gradient of what is shared would be summed twice
        )
        return _compile(jax.jit(on_devices, donate_argnums=donate), args, clock)

    def call(*args: Any) -> Any:
        nonlocal compiled
        if together:  # moves only what is not there yet
            args = tuple(_put(arg, NamedSharding(mesh, spec(i))) for i, arg in enumerate(args))
        if compiled is None:
            compiled = build(args)
        out = compiled(*args)
        return _here(out) if mesh.is_multi_process else out

    return call


def _at_once(function: Callable[..., Any], over_seeds: tuple[int, ...]) -> Callable[..., Any]:
    def mapped(*args: Any) -> Any:
        axes = tuple(0 if i in over_seeds else None for i in range(len(args)))
        return jax.vmap(function, axes)(*args)

    return mapped


def _in_turn(function: Callable[..., Any], over_seeds: tuple[int, ...]) -> Callable[..., Any]:
    """One seed after another, each by the program of a single seed.

    The result of a seed is the one it has alone: bit for bit where XLA makes the same machine code
    of the program alone and within this loop, as in JAX 0.10 on a CPU, otherwise up to rounding.
    """

    def mapped(*args: Any) -> Any:
        def one(of_seed: tuple[Any, ...]) -> Any:
            its = dict(zip(over_seeds, of_seed, strict=True))
            return function(*(its.get(i, arg) for i, arg in enumerate(args)))

        return jax.lax.map(one, tuple(args[i] for i in over_seeds))

    return mapped


_OVER_SEEDS = {"vmap": _at_once, "map": _in_turn}


def _compile(function: Any, args: Any, clock: Clock) -> Callable[..., Any]:
    started = time.perf_counter()
    compiled = compile_lowered(function.lower(*args))
    clock.compile_seconds += time.perf_counter() - started
    return compiled


def _pmap(
    mapped: Callable[..., Any],
    devices: list[jax.Device],
    specs: tuple[PartitionSpec, ...],
    by_seeds: bool,
    donate: tuple[int, ...],
    args: Any,
    clock: Clock,
) -> Callable[..., Any]:
    """`jax.pmap` with shared arguments, and arguments whose seeds are dealt out to the devices."""
    over = [spec != PartitionSpec() for spec in specs]
    # pmap wants at least one mapped argument: the number of the device, which nothing reads.
    here = jnp.arange(sum(d.process_index == jax.process_index() for d in devices))

    def deal(args: Any) -> list[Any]:
        def one(leaf: Any) -> Any:
            return leaf.reshape(len(devices), -1, *leaf.shape[1:])

        return [jax.tree.map(one, arg) if of else arg for arg, of in zip(args, over, strict=True)]

    on_devices = jax.pmap(
        lambda _, *shared: mapped(*shared),
        axis_name=AXIS,
        devices=devices,
        in_axes=(0, *(0 if of else None for of in over)),
        out_axes=0 if by_seeds else None,
        donate_argnums=() if by_seeds else tuple(i + 1 for i in donate),
    )
    # Compiled beforehand it would want the arguments of all hosts from each; called, its own.
    several = len(here) < len(devices)
    compiled = on_devices if several else _compile(on_devices, (here, *deal(args)), clock)

    def call(*args: Any) -> Any:
        out = compiled(here, *deal(args))
        if by_seeds:
            out = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), out)
        return out

    return call
