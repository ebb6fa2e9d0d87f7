"""A sequence on the device, and how a task sees its pictures."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bpnjax.data.permutation import (
    PixelOrder,
    permute_input,
    permute_key,
    pixel_order,
    restore_rows,
)
from bpnjax.data.sequence import Split, TaskSequence
from bpnjax.utils import prng
from bpnjax.utils.heads import within_head


class Data(NamedTuple):
    """A sequence on the device."""

    train: Split
    test: Split
    classes: jax.Array  # bool [T, C]
    columns: jax.Array  # int32 [T, K], the output that stands for a class of the sets in a task
    scale: jax.Array  # f32 [channels]
    shift: jax.Array


@jax.tree_util.register_static
class HostImages:
    """Pictures that stay on the host: what the device asks for by row is fetched when it asks.

    Stands in for the array ``images`` of a `Split`. A program that indexes it waits for the host
    at that point; training gets its pictures in chunks instead (see `bpnjax.training.streaming`).
    """

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __getitem__(self, rows):
        wanted = jax.ShapeDtypeStruct((*rows.shape, *self.shape[1:]), self.dtype)
        return jax.pure_callback(
            lambda r: self.array[np.asarray(r)], wanted, rows, vmap_method="expand_dims"
        )


def put_on_device(sequence: TaskSequence, most_bytes: int | None = None) -> Data:
    """Copies a sequence to the default device, pictures as they are stored.

    Args:
      sequence: what `bpnjax.data.load_sequence` gives.
      most_bytes: pictures of a split that take more stay on the host, as `HostImages`; None: all
        go to the device.

    Returns:
      `Data`; pictures in their own dtype (uint8 takes a quarter of f32), normalised when a batch is
      made of them.

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
        return split._replace(images=images)

    return jax.tree.map(
        jnp.asarray,
        Data(
            held(sequence.train),
            held(sequence.test),
            sequence.classes,
            sequence.columns,
            sequence.scale,
            sequence.shift,
        ),
    )


class View(NamedTuple):
    """How a task sees the pictures: normalised, and with permuted pixels where so chosen.

    Where the network starts with a Dense layer on flat pixels the rows of its kernel move instead
    of the pixels: use `params` and `mode` on the way into the network, `restore` and
    `restore_factors` on what was measured there. Where nothing moves they give their argument back.
    """

    data: Data
    pixels: Any  # PixelOrder by which the first kernel's rows move; None where nothing moves
    orders: Any  # int32 [T, inputs], pixels are gathered by it; None where none are
    input_layer: str
    multi_head: bool

    def params(self, core):
        """The shared parameters to run on pixels that stay in place.

        Args:
          core: the shared parameters, rows in the order in which they are kept.

        Returns:
          Parameters, same tree; differentiable, a gradient for ``core`` has its rows.
        """
        return core if self.pixels is None else permute_input(core, self.input_layer, self.pixels)

    def mode(self, mode):
        """A mode to go with `params`: the key of the first layer moves with the pixels.

        Args:
          mode: ``{path: {"key": [inputs], "bias": [outputs]}}``.

        Returns:
          A mode.
        """
        return mode if self.pixels is None else permute_key(mode, self.input_layer, self.pixels)

    def project(self, x, directions):
        """Inputs times `bpnjax.evaluation.task_inference.directions`, f32 [n, r]."""
        if self.pixels is not None:  # what moves the first kernel's rows moves these
            directions = directions[self.pixels.inverse]
        return x.reshape(x.shape[0], -1) @ directions

    def restore(self, tree):
        """Takes what was measured of `params` back to the order of the shared parameters.

        Args:
          tree: like the parameters, such as a Fisher.

        Returns:
          Same tree.
        """
        return tree if self.pixels is None else restore_rows(tree, self.input_layer, self.pixels)

    def restore_factors(self, factors):
        """Kronecker factors of the layers, those of moved inputs back in their places.

        Args:
          factors: ``{path: Factors}``, as `bpnjax.importance.kronecker.factors` gives.

        Returns:
          The same; rows and columns of A of the first layer are moved.
        """
        if self.pixels is None:
            return factors
        moved = factors[self.input_layer]
        places = jnp.append(self.pixels.order, self.pixels.order.size)  # the bias stays last
        back = moved._replace(inputs=moved.inputs[places][:, places])
        return {**factors, self.input_layer: back}

    def examples(self, split: Split, slots):
        r"""Inputs and labels of some slots.

        .. math:: x = image \cdot scale + shift

        Args:
          split: of the data, training or test.
          slots: int32 ``[n]``, places in the flat index table: task * N + place in the task's row.

        Returns:
          f32 ``[n, ...]`` and the `labels`. Pixels are permuted here only where they could not be
          in the parameters; then the slots' tasks may differ.
        """
        rows = split.index.reshape(-1)[slots]
        x = split.images[rows].astype(jnp.float32) * self.data.scale + self.data.shift
        if self.orders is not None:
            flat = x.reshape(x.shape[0], -1)
            tasks = slots // split.index.shape[1]
            x = jnp.take_along_axis(flat, self.orders[tasks], axis=1).reshape(x.shape)
        return x, self.labels(split, slots)

    def labels(self, split: Split, slots):
        """The outputs that stand for the classes of some slots.

        Args:
          split: of the data, training or test.
          slots: int32 ``[n]``.

        Returns:
          int32 ``[n]``, numbers of outputs; with a head a task not those of the set's classes.
        """
        task = slots // split.index.shape[1]
        return self.data.columns[task, split.labels[split.index.reshape(-1)[slots]]]

    def within_head(self, split: Split, slots, logits):
        """Logits, those outside the head of each slot's task far below; as they are with one head.

        Args:
          split: of the data, training or test.
          slots: int32 ``[n]``.
          logits: f32 ``[n, C]``.

        Returns:
          f32 ``[n, C]``.
        """
        if not self.multi_head:
            return logits
        return within_head(logits, self.data.classes[slots // split.index.shape[1]])


def make_view(problem, key, data: Data, task) -> View:
    """Draws the pixel order of a task, once, so that it stays out of the loops that use it.

    Args:
      problem: the static side of a run.
      key: the seed's typed PRNG key.
      data: the sequence.
      task: int scalar, may be traced; None for examples of any task at once.

    Returns:
      `View`. For None, for a joint method and for a network that does not start with a Dense layer
      on flat pixels it holds the orders of all tasks, int32 ``[T, inputs]``, and gathers pixels by
      them.
    """
    multi_head = problem.config.sequence.heads == "multi"
    if not problem.permuted:
        return View(data, None, None, "", multi_head)
    size = math.prod(data.train.images.shape[1:])
    first_identity = problem.config.sequence.first_identity

    def order_of(task):
        return pixel_order(prng.fold(key, prng.PIXELS), task, size, first_identity)

    # A joint batch mixes tasks, and not every network starts with a Dense layer on flat pixels.
    if task is None or problem.method.joint or not problem.input_layer:
        orders = jax.vmap(order_of)(jnp.arange(problem.num_tasks))
        return View(data, None, orders, "", multi_head)
    order = order_of(task)
    pixels = PixelOrder(order, jnp.argsort(order))
    return View(data, pixels, None, problem.input_layer, multi_head)
