"""Training pictures for a range of steps: the whole set, or chunks that are fetched ahead.

A chunk is a `Data` whose training split holds the pictures of its steps only, and an index table
that names their places in it; the program that runs the steps is the same.
"""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from bpnjax import parallel, programs
from bpnjax.data.sequence import Split, TaskSequence
from bpnjax.errors import UserError
from bpnjax.view import Data, HostImages

_SHARE = 4  # of the memory for pictures, a chunk's part: one at work, one ahead, one not yet freed


def most_bytes(config) -> int | None:
    """How many bytes of pictures of a split may lie on the device.

    Args:
      config: a run configuration; `dataset.device_mb` in MiB, 0 for half the device's memory.

    Returns:
      Bytes; None where the device tells no limit, as a CPU.
    """
    if config.dataset.device_mb:
        return int(config.dataset.device_mb * 2**20)
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats["bytes_limit"] // 2 if "bytes_limit" in stats else None


def make_feed(problem, key, sequence: TaskSequence, data: Data, layout, most_steps: int):
    """Prepares the feed of a run.

    Args:
      problem: the static side of the run.
      key: the PRNG key of its seed, or those of all.
      sequence: the sets on the host.
      data: the sets as the programs see them.
      layout: the `bpnjax.parallel.Layout` of the devices that need the chunks.
      most_steps: of an epoch.

    Returns:
      How many steps a chunk serves, None where each serves any number; and a function of a task
      and its ranges of steps, ``(epoch, start, stop)`` each, that gives an iterator of the `Data`
      of each range, and fetches the next while one is used.

    Raises:
      UserError: not even one batch fits.
    """
    steps = _steps_per_chunk(problem, data)
    if steps is None:
        return None, lambda task, ranges: itertools.repeat(data, len(ranges))
    steps = min(steps, most_steps)
    return steps, _chunks(problem, key, sequence, data, layout, steps)


def _steps_per_chunk(problem, data: Data) -> int | None:
    config, images = problem.config, data.train.images
    # Seeds draw orders of their own, and a memory names examples of any task: such runs ask for
    # each batch where they need it.
    if not isinstance(images, HostImages) or config.num_seeds > 1:
        return None
    state = jax.eval_shape(partial(programs.init_state, problem), jax.random.key(0))
    if problem.method.examples_kept(state.method):
        return None
    batch = config.train.batch_size * images.array[0].nbytes
    steps = most_bytes(config) // _SHARE // batch
    if steps == 0:
        least = batch * _SHARE / 2**20
        raise UserError(
            f"dataset.device_mb: {config.dataset.device_mb} MB cannot hold {_SHARE} batches of "
            f"{config.train.batch_size} pictures; give {least:.3g} or more, or smaller batches"
        )
    return steps


def _chunks(problem, key, sequence, data, layout, steps):
    split, batch = sequence.train, problem.config.train.batch_size
    table = np.asarray(split.index).reshape(-1)
    size = batch * steps  # all chunks have one shape
    key = jax.device_put(key, _processor())
    host_split = split._replace(images=None, labels=None)
    draw = jax.jit(lambda key, *at: programs.epoch_order(problem, key, host_split, *at))

    @lru_cache(maxsize=1)  # the chunks of an epoch come one after another
    def order(task, epoch):
        return jax.tree.map(np.asarray, draw(key, task, epoch))

    def fetch(task, epoch, start, stop) -> Data:
        slots, count = order(task, epoch)
        slots = slots[start * batch : min(stop * batch, int(count))]
        rows = table[slots]
        images = np.zeros((size, *split.images.shape[1:]), split.images.dtype)
        labels = np.zeros(size, split.labels.dtype)
        images[: rows.size], labels[: rows.size] = split.images[rows], split.labels[rows]
        places = np.zeros(table.shape, np.int32)
        places[slots] = np.arange(rows.size)
        chunk = Split(images, labels, places.reshape(split.index.shape), data.train.count)
        return parallel.place(jax.tree.map(jnp.asarray, data._replace(train=chunk)), layout)

    def chunks(task: int, ranges: Sequence) -> Iterator[Data]:
        with ThreadPoolExecutor(1) as ahead:
            futures = (ahead.submit(fetch, task, *one) for one in ranges)
            now = next(futures, None)
            while now is not None:
                following = next(futures, None)
                yield now.result()
                now = following

    return chunks


def _processor():
    """The host's own processor: asked of the device, an order would wait for the steps at work."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # the user let JAX see the accelerator only
        return jax.local_devices()[0]
