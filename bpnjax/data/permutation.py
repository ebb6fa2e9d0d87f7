"""Permuted pixels without permuted pictures: the first kernel's rows move instead.

A task whose input is ``x[permutation]`` gives with kernel W the same as the unpermuted ``x`` with
the rows of W moved back. That is one copy of a kernel a step instead of a gather from every
picture, and nothing per task is stored.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util


def pixel_order(key, task, size: int, first_identity: bool):
    """The pixel order of a task.

    Pixel i of what the task sees is pixel ``order[i]`` of the picture.

    Args:
      key: typed PRNG key, the same for all tasks.
      task: int scalar, may be traced.
      size: elements of a flat input; colours of a pixel are permuted on their own.
      first_identity: whether task 0 sees the pictures as they are.

    Returns:
      int32 ``[size]``.

    Example:
      >>> import jax
      >>> from bpnjax.data.permutation import pixel_order
      >>> pixel_order(jax.random.key(0), 0, size=4, first_identity=True).tolist()
      [0, 1, 2, 3]

    Source: Goodfellow et al. 2014 (arXiv 1312.6211), permuted MNIST. Variant: Cheung et al. 2019
    start with the identity, Lopez-Paz and Ranzato 2017 do not.
    """
    order = jax.random.permutation(jax.random.fold_in(key, task), size)
    if first_identity:
        order = jnp.where(task == 0, jnp.arange(size), order)
    return order


@jax.custom_vjp
def move_rows(kernel, order, inverse):
    """The rows of a kernel moved so that it gives for ``x`` what it gave for ``x[order]``.

    .. math:: (x[order])^T W = x^T W[inverse]

    Args:
      kernel: W, ``[inputs, outputs]``.
      order: int32 ``[inputs]``, a permutation.
      inverse: int32 ``[inputs]``, its `jax.numpy.argsort`.

    Returns:
      ``kernel[inverse]``. Its gradient moves back by ``[order]``, a gather and not a scatter.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.data.permutation import move_rows
      >>> x, kernel, order = jnp.array([1.0, 2.0, 3.0]), jnp.eye(3), jnp.array([2, 0, 1])
      >>> (x[order] @ kernel).tolist(), (x @ move_rows(kernel, order, jnp.argsort(order))).tolist()
      ([3.0, 1.0, 2.0], [3.0, 1.0, 2.0])
    """
    del order
    return kernel[inverse]


def _move_forward(kernel, order, inverse):
    return kernel[inverse], (order, inverse)


def _move_backward(residuals, gradient):
    order, _ = residuals
    return gradient[order], None, None


move_rows.defvjp(_move_forward, _move_backward)


class PixelOrder(NamedTuple):
    """A permutation and its inverse; the inverse costs a sort, so it is drawn once a task."""

    order: jax.Array  # int32 [inputs]
    inverse: jax.Array  # int32 [inputs]


def permute_input(params, input_layer: str, pixels: PixelOrder):
    """Parameters that give for ``x`` what ``params`` give for ``x[pixels.order]``.

    Args:
      params: parameters of a network whose first layer is a Dense layer on the flat input.
      input_layer: that layer's path.
      pixels: the task's pixel order.

    Returns:
      The parameters with that kernel's rows moved (see `move_rows`).
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    name = f"{input_layer}/kernel"
    flat[name] = move_rows(flat[name], pixels.order, pixels.inverse)
    return traverse_util.unflatten_dict(flat, sep="/")


def permute_key(mode, input_layer: str, pixels: PixelOrder):
    """The mode to go with `permute_input`: the key of the first layer moves with the pixels.

    Args:
      mode: as in `bpnjax.networks.linen.modulated_apply`, one task's.
      input_layer: the path of the first layer.
      pixels: the task's pixel order.

    Returns:
      The mode; as it was where the first layer has no key.
    """
    if "key" not in mode.get(input_layer, {}):
        return mode
    layer = mode[input_layer]
    return {**mode, input_layer: {**layer, "key": layer["key"][pixels.inverse]}}


def restore_rows(tree, input_layer: str, pixels: PixelOrder):
    """Takes a tree like the parameters (say, a Fisher) from moved rows back to their places.

    Args:
      tree: like the parameters that `permute_input` gave.
      input_layer: the path of the first layer.
      pixels: the task's pixel order.

    Returns:
      Same tree.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.data import permutation
      >>> order = jnp.array([2, 0, 1])
      >>> pixels = permutation.PixelOrder(order, jnp.argsort(order))
      >>> params = {"out": {"kernel": jnp.arange(3.0)[:, None]}}
      >>> moved = permutation.permute_input(params, "out", pixels)
      >>> permutation.restore_rows(moved, "out", pixels)["out"]["kernel"][:, 0].tolist()
      [0.0, 1.0, 2.0]
    """
    flat = traverse_util.flatten_dict(tree, sep="/")
    name = f"{input_layer}/kernel"
    flat[name] = flat[name][pixels.order]
    return traverse_util.unflatten_dict(flat, sep="/")
