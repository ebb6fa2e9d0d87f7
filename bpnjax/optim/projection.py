r"""Projections of a gradient so that it does not conflict with earlier tasks: GEM and A-GEM.

GEM asks for the gradient nearest to g that makes an angle of at most 90 degrees with each earlier
task's gradient. Its dual is a small quadratic programme with one variable per task. It is solved
exactly on the device by an active-set method, without a call to the host and without double
precision. Tasks that are still to come are masked, so nothing is compiled again.
"""

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["agem", "gem", "nonnegative_quadratic"]


def nonnegative_quadratic(matrix: jax.Array, vector: jax.Array, valid: jax.Array) -> jax.Array:
    r"""Minimises a convex quadratic over the non-negative orthant, exactly.

    .. math:: \min_{u \ge 0} \tfrac{1}{2} u^T A u - b^T u

    Lawson and Hanson's active set on the system scaled to a unit diagonal.

    Args:
      matrix: A, f32 ``[n, n]``, positive definite on the valid part.
      vector: b, f32 ``[n]``.
      valid: bool ``[n]``; where it is False u stays 0 and A and b are not looked at.

    Returns:
      u, f32 ``[n]``.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.optim import projection
      >>> a, b = jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([4.0, -1.0])
      >>> projection.nonnegative_quadratic(a, b, jnp.array([True, True])).tolist()
      [2.0, 0.0]

    Source: Lawson and Hanson 1974, ch. 23 (NNLS).
    """
    n = vector.shape[0]
    diagonal = jnp.where(valid, jnp.diagonal(matrix), 1.0)
    scale = jax.lax.rsqrt(jnp.maximum(diagonal, 1e-30))
    both = valid[:, None] & valid[None, :]
    a = jnp.where(both, matrix * scale[:, None] * scale[None, :], 0.0)
    b = jnp.where(valid, vector * scale, 0.0)
    tolerance = 1e-6 * jnp.maximum(jnp.max(jnp.abs(b)), 1e-30)

    def solve(passive: jax.Array) -> jax.Array:
        inside = passive[:, None] & passive[None, :]
        system = jnp.where(inside, a, 0.0) + jnp.diag(jnp.where(passive, 0.0, 1.0))
        return jnp.linalg.solve(system, jnp.where(passive, b, 0.0))

    def outer(state: tuple[Any, ...]) -> tuple[Any, ...]:
        u, passive, residual, rounds = state
        enters = jnp.argmax(jnp.where(valid & ~passive, residual, -jnp.inf))
        passive = passive.at[enters].set(True)

        def infeasible(inner: tuple[Any, ...]) -> jax.Array:
            _, passive, s, count = inner
            return jnp.any(passive & (s <= 0)) & (count < n)

        def retreat(inner: tuple[Any, ...]) -> tuple[Any, ...]:
            u, passive, s, count = inner
            blocks = passive & (s <= 0)
            ratio = jnp.where(blocks, u / jnp.where(blocks, u - s, 1.0), jnp.inf)
            step = jnp.min(ratio)
            u = jnp.where(passive, u + step * (s - u), 0.0)
            passive = passive & ~(blocks & (ratio <= step)) & (u > 0)
            return jnp.where(passive, u, 0.0), passive, solve(passive), count + 1

        u, passive, s, _ = jax.lax.while_loop(infeasible, retreat, (u, passive, solve(passive), 0))
        u = jnp.where(passive, s, 0.0)
        return u, passive, b - a @ u, rounds + 1

    def unfinished(state: tuple[Any, ...]) -> jax.Array:
        _, passive, residual, rounds = state
        return jnp.any(valid & ~passive & (residual > tolerance)) & (rounds < 3 * n)

    start = (jnp.zeros(n, jnp.float32), jnp.zeros(n, bool), b, 0)
    u, *_ = jax.lax.while_loop(unfinished, outer, start)
    return u * scale


def gem(
    gradient: jax.Array,
    memories: jax.Array,
    valid: jax.Array,
    margin: float | jax.Array = 0.5,
    damping: float | jax.Array = 1e-3,
) -> jax.Array:
    r"""GEM's projection of a gradient.

    If any :math:`\langle g, g_k \rangle < 0`, then :math:`g' = g + G^T v` with

    .. math:: v = \arg\min_{v \ge margin} \tfrac{1}{2} v^T (G G^T + \delta I) v + (G g)^T v

    else g itself.

    Args:
      gradient: g, f32 ``[P]``.
      memories: G, f32 ``[T, P]``, a row for each earlier task.
      valid: bool ``[T]``, which rows count.
      margin: the authors' ``memory_strength``; 0 is the plain projection.
      damping: delta, added to the diagonal as in the authors' code.

    Returns:
      f32 ``[P]``.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.optim import projection
      >>> g, memory = jnp.array([1.0, -1.0]), jnp.array([[0.0, 1.0]])
      >>> projection.gem(g, memory, jnp.array([True]), margin=0.0, damping=0.0).tolist()
      [1.0, 0.0]

    Source: Lopez-Paz and Ranzato 2017, Eq. 11 and Sec. 3; margin and damping from their code.
    """
    memories = jnp.where(valid[:, None], memories, 0.0)
    products = memories @ gradient
    gram = memories @ memories.T + damping * jnp.eye(len(valid), dtype=jnp.float32)
    floor = jnp.where(valid, margin, 0.0)
    # v = floor + u with u >= 0.
    v = floor + nonnegative_quadratic(gram, -(products + gram @ floor), valid)
    conflict = jnp.any(valid & (products < 0))
    return jnp.where(conflict, gradient + jnp.where(valid, v, 0.0) @ memories, gradient)


def agem(gradient: jax.Array, reference: jax.Array) -> jax.Array:
    r"""A-GEM's projection: removes the part along the reference gradient if the two conflict.

    .. math:: g' = g - \frac{g^T g_{ref}}{g_{ref}^T g_{ref}} g_{ref} \quad
              \text{if } g^T g_{ref} < 0

    Args:
      gradient: g, f32 ``[P]``.
      reference: f32 ``[P]``, the gradient on a batch of the memory; zeros while it is empty.

    Returns:
      f32 ``[P]``.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.optim import projection
      >>> projection.agem(jnp.array([1.0, -1.0]), jnp.array([0.0, 2.0])).tolist()
      [1.0, 0.0]

    Source: Chaudhry et al. 2019 (arXiv 1812.00420), Eq. 11.
    """
    product, square = gradient @ reference, reference @ reference
    off = gradient - product / jnp.where(square > 0, square, 1.0) * reference
    return jnp.where(product < 0, off, gradient)
