"""Convolutions that XLA computes quickly on a CPU: depthwise ones, and gradients in a loop."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

Pads = Sequence[tuple[int, int]]  # (before, after) for each dimension

_LABELS = ("NHWC", "HWIO", "NHWC")
_TRANSPOSED = ("NHWC", "HWOI", "NHWC")
_NONE = ((0, 0), (0, 0))
_VECTOR = 4  # XLA's CPU code is slow where channels are no multiple of it
_IN_CACHE = 3 << 18  # elements of a chunk's shifted inputs

__all__ = ["conv"]


def conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    r"""A replacement for `jax.lax.conv_general_dilated`, for Linen's ``conv_general_dilated=``.

    .. math:: y_{nijo} = \sum_{uvc} x_{n, s i + u - p, s j + v - p, c} k_{uvco}

    JAX's own gradients are convolutions with permuted dimensions. XLA's CPU compiler reorders those
    in the main computation of a program only. Inside a loop, where training runs, they take twenty
    times as long. Here the gradient of the inputs is written in the right order, and that of the
    kernel as a matrix product that sums over positions, a few examples at a time,

    .. math:: \bar x = \mathrm{conv}(\bar y, \mathrm{flip}(k)^T), \quad
              \bar k_{uvco} = \sum_{nij} x_{n, s i + u - p, s j + v - p, c} \bar y_{nijo}

    Both follow from tangents, so forward mode and second derivatives work as well.

    On a CPU a depthwise convolution, one group per channel, is computed as a sum of shifted
    products,

    .. math:: y_{nijc} = \sum_{uv} x_{n, s i + u - p, s j + v - p, c} k_{uvc}

    which is many times faster there than XLA's loop over groups. A 1x1 convolution is a matrix
    product. Only two spatial dimensions without dilation are covered; JAX computes all others.

    Args:
      x: ``[n, h, w, c]``.
      kernel: ``[u, v, c, o]``, or ``[u, v, 1, c]`` if depthwise, of the dtype of ``x``.
      strides: two integers.
      padding: (before, after) for each of the two dimensions, or "SAME", "VALID".
      **options: further arguments from Linen.

    Returns:
      ``[n, i, j, o]``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from bpnjax.models.convolution import conv
      >>> x = jnp.arange(9.0).reshape(1, 3, 3, 1)
      >>> jax.grad(lambda k: conv(x, k, (1, 1), "VALID").sum())(jnp.ones((2, 2, 1, 1))).ravel()
      Array([ 8., 12., 20., 24.], dtype=float32)

    Source: ours for the gradients; the slow loop is https://github.com/jax-ml/jax/issues/12868.
    """
    dilated = any(
        d not in (None, 1, (1, 1), [1, 1])
        for d in (options.get("lhs_dilation"), options.get("rhs_dilation"))
    )
    groups = options.get("feature_group_count", 1)
    depthwise = groups > 1 and kernel.shape[2:] == (1, groups)  # one group per channel
    if x.ndim != 4 or dilated or not (groups == 1 or depthwise):
        return lax.conv_general_dilated(x, kernel, strides, padding, **options)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    pads = tuple((int(before), int(after)) for before, after in padding)
    strides, precision = tuple(strides), options.get("precision")
    if depthwise:
        return _depthwise(x, kernel, strides, pads, precision)
    if kernel.shape[:2] == (1, 1) and not np.any(pads):
        x = x[:, :: strides[0], :: strides[1]]
        return lax.dot_general(x, kernel[0, 0], (((3,), (0,)), ((), ())), precision)
    return _conv(x, kernel, strides, pads, precision)


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


@partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _conv(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], pads: Pads, precision: Any
) -> jax.Array:
    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x, kernel, strides, pads, dimension_numbers=_LABELS, precision=precision
        )

    def filled(x: jax.Array, kernel: jax.Array) -> jax.Array:
        more = (0, -x.shape[-1] % _VECTOR)
        none = (0, 0)
        return plain(
            jnp.pad(x, (none, none, none, more)), jnp.pad(kernel, (none, none, more, none))
        )

    if x.shape[-1] % _VECTOR > 1:
        return lax.platform_dependent(x, kernel, cpu=filled, default=plain)
    return plain(x, kernel)


@partial(_conv.defjvp, symbolic_zeros=True)
def _conv_jvp(
    strides: tuple[int, ...],
    pads: Pads,
    precision: Any,
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
) -> tuple[jax.Array, jax.Array]:
    """Tangents in a form that is quick when it is transposed, into gradients."""
    (x, kernel), (x_dot, kernel_dot) = primals, tangents
    y = _conv(x, kernel, strides, pads, precision)
    y_dot = jnp.zeros_like(y)
    if not isinstance(x_dot, SymbolicZero):
        # The kernel's dimensions are permuted here so that they are in order when transposed.
        y_dot += lax.conv_general_dilated(
            x_dot, kernel.swapaxes(2, 3), strides, pads, dimension_numbers=_TRANSPOSED,
            precision=precision,
        )  # fmt: skip
    if not isinstance(kernel_dot, SymbolicZero):
        theirs = partial(_conv, strides=strides, pads=pads, precision=precision)
        ours = partial(_by_chunks, strides, pads, precision)
        y_dot += lax.platform_dependent(x, kernel_dot, cpu=ours, default=theirs)
    return y, y_dot


def _by_chunks(
    strides: tuple[int, ...], pads: Pads, precision: Any, x: jax.Array, kernel: jax.Array
) -> jax.Array:
    """The convolution as matrix products, a chunk of examples after another.

    Transposed, they are products of shifted inputs that stay in the processor's cache.
    """
    n, (h, w) = len(x), _size(x, kernel.shape, strides, pads)
    most = _IN_CACHE // (h * w * kernel[..., 0].size)
    chunk = next((q for q in range(min(most, n), 1, -1) if n % q == 0), 1)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    # Transposed, the product is computed in order only if the kernel is [o, ...] here.
    matrix = kernel.reshape(-1, kernel.shape[-1]).T

    @partial(jax.checkpoint, prevent_cse=False)
    def one(x: jax.Array, matrix: jax.Array) -> jax.Array:
        shifted = jnp.concatenate(_slices(x, kernel.shape, strides, _NONE), -1)
        return jnp.matmul(
            shifted, matrix.T, precision=precision, preferred_element_type=jnp.float32
        ).astype(x.dtype)

    y = lax.map(lambda x: one(x, matrix), x.reshape(-1, chunk, *x.shape[1:]))
    return y.reshape(n, h, w, -1)


def _depthwise(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], pads: Pads, precision: Any
) -> jax.Array:
    def theirs(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x, kernel, strides, pads, dimension_numbers=_LABELS, precision=precision,
            feature_group_count=x.shape[-1],
        )  # fmt: skip

    # The gradient keeps x and the kernel only: slices are cheaper to repeat than to store.
    @partial(jax.checkpoint, prevent_cse=False)
    def run(x: jax.Array, kernel: jax.Array) -> jax.Array:
        ours = partial(_shifted, strides, pads)
        return lax.platform_dependent(x, kernel, cpu=ours, default=theirs)

    return run(x, kernel)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _shifted(strides: tuple[int, ...], pads: Pads, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The depthwise convolution as a sum of shifted products."""
    parts = _slices(x, kernel.shape, strides, pads)
    total: Any = 0
    for part, weight in zip(parts, _weights(kernel), strict=True):
        total = total + part * weight  # bfloat16 times float32 gives float32
    return total.astype(x.dtype)


@partial(_shifted.defjvp, symbolic_zeros=True)
def _shifted_jvp(
    strides: tuple[int, ...], pads: Pads, primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    """Tangents in a form that becomes fast gradients when it is transposed."""
    (x, kernel), (x_dot, kernel_dot) = primals, tangents
    y = _shifted(strides, pads, x, kernel)
    y_dot = jnp.zeros_like(y)
    if not isinstance(x_dot, SymbolicZero):
        y_dot += _scattered(x_dot, kernel, strides, pads)
    if not isinstance(kernel_dot, SymbolicZero):
        y_dot += _one_by_one(x, kernel_dot, strides, pads)
    return y, y_dot


def _scattered(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], pads: Pads) -> jax.Array:
    """The same, with each product padded to its place; its transpose is a sum of slices."""
    u, v = kernel.shape[:2]
    total: Any = 0
    for (i, j), weight in zip(np.ndindex(u, v), _weights(kernel), strict=True):
        total += jnp.pad(x * weight, ((0, 0), (u - 1 - i, i), (v - 1 - j, j), (0, 0)))
    # How much the padding of the convolution adds or cuts at each end.
    ends = [
        (before + 1 - n, after + 1 - n) for n, (before, after) in zip((u, v), pads, strict=True)
    ]
    total = lax.pad(
        total, jnp.zeros((), total.dtype), ((0, 0, 0), *((*e, 0) for e in ends), (0, 0, 0))
    )
    return total[:, :: strides[0], :: strides[1]].astype(x.dtype)


def _one_by_one(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], pads: Pads) -> jax.Array:
    """The same, example by example; its transpose sums products over the examples.

    XLA is slow at sums over examples, rows and columns at once.
    """
    h, w = _size(x, kernel.shape, strides, pads)
    weights = [jnp.broadcast_to(weight, (h, w, x.shape[-1])) for weight in _weights(kernel)]

    @jax.checkpoint
    def one(x: jax.Array, weights: list[jax.Array]) -> jax.Array:
        parts = _slices(x[None], kernel.shape, strides, pads)
        total: Any = sum(p[0] * w for p, w in zip(parts, weights, strict=True))
        return total.astype(x.dtype)

    return lax.map(lambda x: one(x, weights), x)


def _weights(kernel: jax.Array) -> list[jax.Array]:
    """The rows of a depthwise kernel, one per shift, in at least float32."""
    kernel = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    return list(kernel.reshape(-1, kernel.shape[-1]))


def _size(x: jax.Array, kernel: Sequence[int], strides: Sequence[int], pads: Pads) -> list[int]:
    """The number of rows and columns of the output."""
    sizes = zip(x.shape[1:3], kernel, strides, pads, strict=False)
    return [(n + sum(pad) - u) // s + 1 for n, u, s, pad in sizes]


def _slices(
    x: jax.Array, kernel: Sequence[int], strides: Sequence[int], pads: Pads
) -> list[jax.Array]:
    """For each element of a kernel the inputs that it multiplies, one per output."""
    size = _size(x, kernel, strides, pads)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    found = []
    for start in np.ndindex(*kernel[:2]):
        ends = [a + (n - 1) * s + 1 for a, n, s in zip(start, size, strides, strict=True)]
        found.append(x[:, start[0] : ends[0] : strides[0], start[1] : ends[1] : strides[1]])
    return found
