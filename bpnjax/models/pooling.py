"""Max pooling whose gradient XLA computes quickly on a CPU."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["max_pool"]


def max_pool(x: jax.Array, size: tuple[int, int], padding: str = "VALID") -> jax.Array:
    r"""The largest input of each window; windows do not overlap.

    .. math:: y_{nijc} = \max_{uv} x_{n, a i + u, b j + v, c}

    for windows of a x b. The same as Flax's ``max_pool(x, size, strides=size)``. XLA computes that
    one's gradient, a scatter, many times more slowly on a CPU than the comparison here. Inputs of a
    window that are equally large share its gradient in equal parts.

    Args:
      x: ``[n, h, w, c]``, floats.
      size: rows and columns of a window.
      padding: ``"VALID"`` leaves out what does not fill a window, ``"SAME"`` pads.

    Returns:
      ``[n, i, j, c]``, of the dtype of ``x``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from bpnjax.models.pooling import max_pool
      >>> x = jnp.array([[1.0, 5.0], [3.0, 5.0]]).reshape(1, 2, 2, 1)
      >>> jax.grad(lambda x: max_pool(x, (2, 2)).sum())(x).reshape(2, 2)
      Array([[0. , 0.5],
             [0. , 0.5]], dtype=float32)

    Source: gradient by hand; the slow scatter is XLA's select_and_scatter.
    """
    (a, b), (_, h, w, _) = size, x.shape
    if padding == "VALID":
        x = x[:, : h // a * a, : w // b * b]
    else:
        pads = lax.padtype_to_pads((h, w), size, size, padding)
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=-jnp.inf)
    return _pool(x, size)


def _pool_of_windows(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    return nn.max_pool(x, size, strides=size)


_pool = jax.custom_jvp(_pool_of_windows, nondiff_argnums=(1,))


@_pool.defjvp
def _pool_jvp(
    size: tuple[int, int], primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x,), (x_dot,) = primals, tangents
    y = _pool(x, size)
    (n, i, j, c), (a, b) = y.shape, size
    windows = (n, i, a, j, b, c)
    largest = x.reshape(windows) == y[:, :, None, :, None]
    share = 1 / largest.sum((2, 4), dtype=x.dtype)
    return y, jnp.where(largest, x_dot.reshape(windows), 0).sum((2, 4)) * share
