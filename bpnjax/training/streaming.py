"""Feeds training images to a range of steps: the whole set, or chunks that are fetched ahead.

A chunk is a `Data` whose training split holds only the images of its steps, with an index table of
their positions. The program that runs the steps is the same in both cases.
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from bpnjax.data import crops
from bpnjax.data.sequence import Split, TaskSequence
from bpnjax.training import epochs, parallel
from bpnjax.training.experiment import Experiment
from bpnjax.training.task_data import Data, HostImages
from bpnjax.utils.errors import UserError

Range = tuple[int, int, int]  # epoch, first step, the step after the last
Feed = Callable[[int, Sequence[Range]], Iterator[Data]]

_CROPPED = 2**29  # bytes: more than that of images cropped at random is not read ahead
_SHARE = 4  # of the memory for images, a chunk's part: one at work, one ahead, one not yet freed


def most_bytes(config: ConfigDict) -> int | None:
    """The number of bytes that the images of a split may take on the device.

    Args:
      config: a run configuration; `dataset.device_mb` in MiB, 0 for half the device's memory.

    Returns:
      Bytes; None if the device has no known limit, as a CPU.
    """
    if config.dataset.device_mb:
        return int(config.dataset.device_mb * 2**20)
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats["bytes_limit"] // 2 if "bytes_limit" in stats else None


def make_feed(
    experiment: Experiment,
    key: jax.Array,
    sequence: TaskSequence,
    data: Data,
    layout: parallel.Layout,
    most_steps: int,
) -> tuple[int | None, Feed]:
    """Prepares the feed of a run.

    Args:
      experiment: what does not change during the run.
      key: the PRNG key of its seed, or those of all.
      sequence: the sets on the host.
      data: the sets as the programs see them.
      layout: the `bpnjax.training.parallel.Layout` of the devices that need the chunks.
      most_steps: of an epoch.

    Returns:
      How many steps a chunk serves, None where each serves any number; and a function of a task
      and its ranges of steps, ``(epoch, start, stop)`` each, that gives an iterator of the `Data`
      of each range, and fetches the next while one is used.

    Raises:
      UserError: not even one batch fits, or the batches are too large.
    """
    steps = _steps_per_chunk(experiment, data, sequence.files is not None)
    if steps is None:
        return None, lambda task, ranges: itertools.repeat(data, len(ranges))
    steps = min(steps, most_steps)
    return steps, _chunks(experiment, key, sequence, data, layout, steps)


def _steps_per_chunk(experiment: Experiment, data: Data, cropped: bool) -> int | None:
    config, images = experiment.config, data.train.images
    # Seeds draw orders of their own: such runs ask for each batch where they need it.
    if not cropped and (not isinstance(images, HostImages) or config.num_seeds > 1):
        return None
    batch = config.train.batch_size * math.prod(images.shape[1:]) * images.dtype.itemsize
    most = most_bytes(config) or math.inf
    if cropped:  # the first chunk has to be decoded before the first step
        most = min(most, max(_CROPPED, _SHARE * batch))
    steps = int(most // _SHARE // batch)
    if steps == 0:
        least = batch * _SHARE / 2**20
        raise UserError(
            f"dataset.device_mb: {config.dataset.device_mb} MB cannot hold {_SHARE} batches of "
            f"{config.train.batch_size} examples; give {least:.3g} or more, or smaller batches"
        )
    return steps


def _chunks(
    experiment: Experiment,
    key: jax.Array,
    sequence: TaskSequence,
    data: Data,
    layout: parallel.Layout,
    steps: int,
) -> Feed:
    split, batch = sequence.train, experiment.config.train.batch_size
    table = np.asarray(split.index).reshape(-1)
    size = batch * steps  # all chunks have one shape
    key = jax.device_put(key, _processor())
    host_split = dataclasses.replace(split, images=None, labels=None)
    draw = jax.jit(lambda key, *at: epochs.epoch_order(experiment, key, host_split, *at))

    @lru_cache(maxsize=1)  # the chunks of an epoch come one after another
    def order(task: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        return jax.tree.map(np.asarray, draw(key, task, epoch))

    def rows_of(task: int, epoch: int) -> np.ndarray:
        slots, count = order(task, epoch)
        return table[slots[: int(count)]]

    def fetch(
        decoded: Iterator[dict[str, Any]] | None, task: int, epoch: int, start: int, stop: int
    ) -> Data:
        slots, count = order(task, epoch)
        slots = slots[start * batch : min(stop * batch, int(count))]
        rows = table[slots]
        images = np.zeros((size, *split.images.shape[1:]), split.images.dtype)
        labels = np.zeros(size, split.labels.dtype)
        if decoded is None:
            images[: rows.size] = split.images[rows]
        else:
            for i in range(stop - start):
                images[i * batch : (i + 1) * batch] = next(decoded)["image"]
        labels[: rows.size] = split.labels[rows]
        places = np.zeros(table.shape, np.int32)
        places[slots] = np.arange(rows.size)
        part = Split(images, labels, places.reshape(split.index.shape), data.train.count)
        chunk = dataclasses.replace(data, train=part)
        return parallel.place(jax.tree.map(jnp.asarray, chunk), layout)

    def chunks(task: int, ranges: Sequence[Range]) -> Iterator[Data]:
        reading: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if sequence.files is not None and ranges:
            reading = _read_crops(experiment.config, sequence.files, rows_of, task, ranges)
        with reading as decoded, ThreadPoolExecutor(1) as ahead:
            futures = (ahead.submit(fetch, decoded, task, *one) for one in ranges)
            now = next(futures, None)
            while now is not None:
                following = next(futures, None)
                yield now.result()
                now = following

    return chunks


def _read_crops(
    config: ConfigDict,
    files: crops.Files,
    rows_of: Callable[[int, int], np.ndarray],
    task: int,
    ranges: Sequence[Range],
) -> contextlib.AbstractContextManager[Iterator[dict[str, Any]]]:
    """Batches of images cropped at random: all steps of some ranges, which follow each other."""
    batch = config.train.batch_size
    first, start, _ = ranges[0]
    epochs = [rows_of(task, epoch) for epoch in range(first, ranges[-1][0] + 1)]
    places = -(-epochs[0].size // batch) * batch  # an epoch's last batch may not be full
    plan = np.full((len(epochs), places), -1, np.int32)
    for row, rows in zip(plan, epochs, strict=True):
        row[: rows.size] = rows
    draws = crops.Draws(config.seed, task, first, places)
    return crops.batches(files, plan.ravel(), batch, draws, start, config.dataset.workers)


def _processor() -> jax.Device:
    """The host's own processor: asked of the device, an order would wait for the steps at work."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # the user let JAX see the accelerator only
        return jax.local_devices()[0]
