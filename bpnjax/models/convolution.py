"""Convolution whose gradients XLA computes quickly inside a loop on a CPU."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Pads = Sequence[tuple[int, int]]  # before and after, of each dimension

_LABELS = ("NHWC", "HWIO", "NHWC")

__all__ = ["conv"]


def conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    r"""`jax.lax.conv_general_dilated` for Linen's ``Conv(..., conv_general_dilated=conv)``.

    .. math:: y_{nijo} = \sum_{uvc} x_{n, s i + u - p, s j + v - p, c} k_{uvco}

    The gradients of JAX's own are convolutions of permuted dimensions. XLA's CPU compiler puts
    those in order in a program's main computation only, and inside a loop, where training runs,
    takes twenty times as long for them. Here the gradients are written in order:

    .. math:: \bar x = \mathrm{conv}(\bar y, \mathrm{flip}(k)^T), \quad
              \bar k = \mathrm{conv}(x^T, \bar y^T)^T

    Two spatial dimensions, one group and no dilation are covered; all else goes to JAX's own.

    Args:
      x: ``[n, h, w, c]``.
      kernel: ``[u, v, c, o]``, of the dtype of ``x``.
      strides: two integers.
      padding: pairs (before, after) of the two dimensions, or "SAME", "VALID".
      **options: what Linen passes on besides.

    Returns:
      ``[n, i, j, o]``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from bpnjax.models.convolution import conv
      >>> x = jnp.arange(9.0).reshape(1, 3, 3, 1)
      >>> jax.grad(lambda k: conv(x, k, (1, 1), "VALID").sum())(jnp.ones((2, 2, 1, 1))).ravel()
      Array([ 8., 12., 20., 24.], dtype=float32)

    Source: gradients by hand; the slow loop is https://github.com/jax-ml/jax/issues/12868.
    """
    dilated = any(
        d not in (None, 1, (1, 1), [1, 1])
        for d in (options.get("lhs_dilation"), options.get("rhs_dilation"))
    )
    if x.ndim != 4 or dilated or options.get("feature_group_count", 1) != 1:
        return lax.conv_general_dilated(x, kernel, strides, padding, **options)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    pads = tuple((int(before), int(after)) for before, after in padding)
    return _conv(x, kernel, tuple(strides), pads, options.get("precision"))


def _plain(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, ...],
    pads: Pads,
    precision: Any,
    lhs_dilation: tuple[int, ...] = (1, 1),
    rhs_dilation: tuple[int, ...] = (1, 1),
) -> jax.Array:
    return lax.conv_general_dilated(
        x, kernel, strides, pads, lhs_dilation, rhs_dilation, _LABELS, precision=precision
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], pads: Pads, precision: Any
) -> jax.Array:
    return _plain(x, kernel, strides, pads, precision)


def _forward(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], pads: Pads, precision: Any
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _conv(x, kernel, strides, pads, precision), (x, kernel)


def _backward(
    strides: tuple[int, ...],
    pads: Pads,
    precision: Any,
    kept: tuple[jax.Array, jax.Array],
    g: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    to_x: list[tuple[int, int]] = []
    to_kernel: list[tuple[int, int]] = []
    for size, width, out, s, (before, _) in zip(
        x.shape[1:3], kernel.shape[:2], g.shape[1:3], strides, pads, strict=True
    ):
        reach = (out - 1) * s + 1  # of g, its elements s apart
        left = width - 1 - before
        to_x.append((left, size + width - 1 - reach - left))
        to_kernel.append((before, width - 1 + reach - size - before))
    flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    x_bar = _plain(g, flipped, (1, 1), to_x, precision, lhs_dilation=strides)
    lhs, rhs = x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)
    k_bar = _plain(lhs, rhs, (1, 1), to_kernel, precision, rhs_dilation=strides)
    return x_bar, k_bar.transpose(1, 2, 0, 3)


_conv.defvjp(_forward, _backward)
