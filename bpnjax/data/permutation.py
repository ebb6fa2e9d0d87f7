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
    """The pixel order of a task: int32[size], drawn from the key; identity first if so chosen."""
    order = jax.random.permutation(jax.random.fold_in(key, task), size)
    if first_identity:
        order = jnp.where(task == 0, jnp.arange(size), order)
    return order


@jax.custom_vjp
def move_rows(kernel, order, inverse):
    """``kernel[inverse]``; its gradient moves back by ``[order]``, a gather and not a scatter."""
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
      The parameters with that kernel's rows moved.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    name = f"{input_layer}/kernel"
    flat[name] = move_rows(flat[name], pixels.order, pixels.inverse)
    return traverse_util.unflatten_dict(flat, sep="/")


def permute_key(mode, input_layer: str, pixels: PixelOrder):
    """The mode to go with `permute_input`: the key of the first layer moves with the pixels."""
    if "key" not in mode.get(input_layer, {}):
        return mode
    layer = mode[input_layer]
    return {**mode, input_layer: {**layer, "key": layer["key"][pixels.inverse]}}


def restore_rows(tree, input_layer: str, pixels: PixelOrder):
    """Takes a tree like the parameters (say, a Fisher) from moved rows back to their places."""
    flat = traverse_util.flatten_dict(tree, sep="/")
    name = f"{input_layer}/kernel"
    flat[name] = flat[name][pixels.order]
    return traverse_util.unflatten_dict(flat, sep="/")
