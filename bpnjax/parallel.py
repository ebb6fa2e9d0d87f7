"""Many seeds by vmap, many devices by pmap: the only place that names either.

The programs themselves are per seed and per device; they receive the name of the device axis and
sum what must be summed.
"""

import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bpnjax.errors import UserError

AXIS = "devices"


def choose_devices(wanted: str, batch_size: int) -> int:
    """How many devices a run uses.

    Args:
      wanted: `config.devices`, "all" or a number.
      batch_size: examples in a batch; more devices than that would stand idle.

    Returns:
      The number.

    Raises:
      UserError: more than there are, or none.
    """
    have = jax.local_device_count()
    if wanted == "all":
        return min(have, batch_size)
    number = int(wanted)
    if not 1 <= number <= have:
        raise UserError(f"devices: {number} asked for, {have} there; give 'all' or 1 to {have}")
    if number > batch_size:
        raise UserError(
            f"devices: {number} devices share a batch of {batch_size}; use at most {batch_size} "
            "or raise train.batch_size"
        )
    return number


class Clock:
    """Seconds spent compiling, summed over the programs that share it."""

    def __init__(self):
        self.compile_seconds = 0.0


def program(
    function: Callable,
    clock: Clock,
    num_seeds: int,
    num_devices: int = 1,
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
      num_devices: with more than 1 arguments and results are replicated on that many.
      split: whether the function divides its work over the devices and sums over the axis by
        itself; then it runs under `jax.pmap`. Else each device does all of it.
      over_seeds: positions of the arguments with a seed axis.
      donate: positions of the arguments whose buffers may be reused.

    Returns:
      The compiled callable.
    """
    split = split and num_devices > 1
    if split:
        function = partial(function, axis=AXIS)
    devices = jax.local_devices()[:num_devices]
    everywhere = NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec())
    compiled = None

    def call(*args):
        nonlocal compiled
        if num_devices > 1:  # moves only what is not there yet
            args = jax.device_put(args, everywhere)
        if compiled is None:
            mapped = function
            if num_seeds > 1:
                axes = tuple(0 if i in over_seeds else None for i in range(len(args)))
                mapped = jax.vmap(function, in_axes=axes)
            if split:
                # pmap wants one mapped argument; the programs themselves share everything.
                on_devices = jax.pmap(
                    lambda _, *shared: mapped(*shared),
                    axis_name=AXIS,
                    devices=devices,
                    in_axes=(0, *(None for _ in args)),
                    out_axes=None,
                    donate_argnums=tuple(i + 1 for i in donate),
                )
                compiled = partial(on_devices, jnp.arange(num_devices))
                return compiled(*args)
            started = time.perf_counter()
            compiled = jax.jit(mapped, donate_argnums=donate).lower(*args).compile()
            clock.compile_seconds += time.perf_counter() - started
        return compiled(*args)

    return call
