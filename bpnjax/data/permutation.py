"""Permuted pixels: the order in which a task gets the elements of its input."""

from typing import Any

import jax
import jax.numpy as jnp


def pixel_order(key: jax.Array, task: Any, size: int, first_identity: bool) -> jax.Array:
    """The permutation of one task's input.

    Element i of the task's input is element ``order[i]`` of the image.

    Args:
      key: typed PRNG key, the same for all tasks.
      task: int scalar, may be traced.
      size: number of elements of a flat input; the colours of a pixel are permuted separately.
      first_identity: whether the images of task 0 are not permuted.

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
