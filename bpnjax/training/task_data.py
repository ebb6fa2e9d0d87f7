"""A task sequence on the device, and access to the examples of its tasks."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bpnjax.data.permutation import pixel_order
from bpnjax.data.sequence import Split, TaskSequence
from bpnjax.utils import prng

__all__ = ["Data", "HostImages", "Reader", "make_reader", "put_on_device"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Data:
    """A sequence on the device.

    Attributes:
      train: the training examples, as they are stored.
      test: the test examples, or the validation part.
      classes: bool ``[T, C]``, the outputs of each task's classes.
      columns: int32 ``[T, K]``, the output that stands for a class of the sets in a task.
    """

    train: Split
    test: Split
    classes: Any
    columns: Any


@jax.tree_util.register_static
class HostImages:
    """Images that stay on the host. Rows are copied to the device when a program asks for them.

    It replaces the array ``images`` of a `Split`. A program that indexes it waits for the host at
    that point. Training gets its images in chunks instead (see `bpnjax.training.streaming`).
    """

    def __init__(self, array: Any) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __getitem__(self, rows: Any) -> Any:
        wanted = jax.ShapeDtypeStruct((*rows.shape, *self.shape[1:]), self.dtype)
        return jax.pure_callback(
            lambda r: self.array[np.asarray(r)], wanted, rows, vmap_method="expand_dims"
        )


def put_on_device(sequence: TaskSequence, most_bytes: int | None = None) -> Data:
    """Copies a sequence to the default device, images as they are stored.

    Args:
      sequence: what `bpnjax.data.load_sequence` gives.
      most_bytes: images of a split that take more bytes stay on the host, as `HostImages`. With
        None all images go to the device.

    Returns:
      `Data`; images in their own dtype (uint8 takes a quarter of f32), normalised by the network.

    Example:
      >>> from bpnjax import config, data
      >>> from bpnjax.training import task_data
      >>> settings = config.default()
      >>> settings.dataset.name, settings.sequence.classes = "gaussians", "0,1;0,2"
      >>> sequence = data.load_sequence(settings)
      >>> task_data.put_on_device(sequence).train.images.shape
      (1500, 2)
      >>> type(task_data.put_on_device(sequence, most_bytes=0).test.images).__name__
      'HostImages'
    """

    def held(split: Split) -> Split:
        fits = most_bytes is None or split.images.nbytes <= most_bytes
        images = np.asarray(split.images) if fits else HostImages(split.images)
        return dataclasses.replace(split, images=images)

    data = Data(held(sequence.train), held(sequence.test), sequence.classes, sequence.columns)
    return jax.tree.map(jnp.asarray, data)


@dataclasses.dataclass(frozen=True)
class Reader:
    """Takes examples of a sequence as their tasks see them.

    Attributes:
      data: the sequence.
      order: int32 ``[inputs]``, the order of the input's elements in one task; None where they keep
        theirs or tasks are mixed.
      orders: int32 ``[T, inputs]`` of all tasks, where examples of several tasks are taken at once.
    """

    data: Data
    order: jax.Array | None = None
    orders: jax.Array | None = None

    def take(self, split: Split, slots: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Takes the examples and labels of some slots.

        Args:
          split: of the data, training or test.
          slots: int32 ``[n]``, places in the flat index table: task * N + place in the task's row.

        Returns:
          Examples ``[n, ...]`` in their stored dtype, and int32 ``[n]``, the outputs that stand for
          their classes; with a head per task not the numbers of the set's classes.
        """
        rows = split.index.reshape(-1)[slots]
        task = slots // split.index.shape[1]
        x = split.images[rows]
        if self.order is not None:
            flat = x.reshape(x.shape[0], -1)
            x = flat[:, self.order].reshape(x.shape)
        elif self.orders is not None:
            flat = x.reshape(x.shape[0], -1)
            x = jnp.take_along_axis(flat, self.orders[task], axis=1).reshape(x.shape)
        return x, self.data.columns[task, split.labels[rows]]


def make_reader(experiment: Any, key: jax.Array, data: Data, task: Any) -> Reader:
    """Draws the order of the input's elements once, so that it stays out of the loops that use it.

    Args:
      experiment: what does not change during the run.
      key: the seed's typed PRNG key.
      data: the sequence.
      task: int scalar, may be traced: all slots that are taken are of this task. None for slots of
        any tasks.

    Returns:
      `Reader`.
    """
    if not experiment.permuted:
        return Reader(data)
    size = math.prod(data.train.images.shape[1:])
    first_identity = experiment.config.sequence.first_identity

    def order_of(task: Any) -> jax.Array:
        return pixel_order(prng.fold(key, prng.PIXELS), task, size, first_identity)

    if task is None:
        return Reader(data, orders=jax.vmap(order_of)(jnp.arange(experiment.num_tasks)))
    return Reader(data, order=order_of(task))
