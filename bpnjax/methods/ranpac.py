r"""RanPAC: ridge regression on random features; `joint_ridge` does it on all tasks at once.

.. math:: h = \max(0, P^T z), \quad G = \sum_i h_i h_i^T, \quad Q = \sum_i h_i e_{y_i}^T, \quad
          W = (G + \lambda g I)^{-1} Q, \quad g = \mathrm{tr}\, G / M

with the features z of a frozen network (`bpnjax.methods.analytic`), a Gaussian :math:`P \in R^{d
\times M}` that is drawn from the seed and never stored, and one-hot labels e. The logits are
:math:`W^T h`.

The strength lambda has no unit. Of each task every fifth example is held out, and its sums are kept
apart: lambda is the one of `RIDGES` with which the other examples of all tasks so far predict the
held-out ones best (least squared error); the head is then solved from all examples. All of this is
sums, so that the order of tasks does not matter. Nothing but two M x M matrices is large.

Source: McDonnell et al. 2023 (RanPAC, arXiv 2307.02251), Eq. 5-6 and Algorithm 1, without its first
phase (no part of the network is trained). Variant: the authors choose lambda, in absolute units,
by the last fifth of the last task alone, and so depend on the order. Their M is 10,000.
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from bpnjax.methods.analytic import (
    AnalyticState,
    analytic,
    apply_linear,
    empty_linear,
    linear_head,
    product,
)
from bpnjax.methods.base import Method
from bpnjax.methods.settings import Setting, register

# From the strongest to the weakest, so that the strongest wins among equal errors.
RIDGES = (100.0, 10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4)
_EVERY = 5

Features = Annotated[
    int,
    Setting(
        "M, number of random features (10,000 in the paper); 0: none, the network's features",
        at_least=0,
    ),
]
Ridge = Annotated[
    float | None,
    Setting(
        "lambda relative to the mean of G's diagonal; None: chosen on held-out examples",
        above=0,
    ),
]


class RidgeSums(NamedTuple):
    """Sums over examples."""

    gram: jax.Array  # G, f32 [M, M]
    targets: jax.Array  # Q, f32 [M, C]
    examples: jax.Array  # examples of each class, f32 [C]

    @staticmethod
    def of(features: jax.Array, classes: jax.Array) -> "RidgeSums":
        """Those of random features f32 ``[n, M]`` with one-hot labels f32 ``[n, C]``."""
        return RidgeSums(
            product(features.T, features), product(features.T, classes), classes.sum(0)
        )


def draw_projection(key: Any, inputs: int, number: int) -> jax.Array:
    r"""Draws the projection of `random_features`.

    .. math:: P_{ij} \sim N(0, 1 / d)

    Args:
      key: typed PRNG key.
      inputs: d.
      number: M.

    Returns:
      f32 ``[d, M]``.
    """
    return jax.random.normal(key, (inputs, number), jnp.float32) * jnp.float32(inputs**-0.5)


def random_features(seed: Any, features: jax.Array, number: int) -> jax.Array:
    r"""Random features of the network's features.

    .. math:: h = \max(0, P^T z)

    Args:
      seed: typed PRNG key, or P itself, drawn from it by `draw_projection`.
      features: z, f32 ``[n, d]``.
      number: M; 0 returns ``features`` unchanged.

    Returns:
      f32 ``[n, M]``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from bpnjax.methods.ranpac import random_features
      >>> h = random_features(jax.random.key(0), jnp.ones((1, 100)), 2000)
      >>> h.shape, bool((h >= 0).all()), round(float((h**2).mean()), 1)  # half of 1
      ((1, 2000), True, 0.5)

    Source: McDonnell et al. 2023 (arXiv 2307.02251), Sec. 4.1. Variant: divided by the root of d,
    which does not matter for a ridge in units of G.
    """
    if not number:
        return features
    drawn = not jnp.issubdtype(seed.dtype, jax.dtypes.prng_key)
    projection = seed if drawn else draw_projection(seed, features.shape[1], number)
    return jax.nn.relu(product(features, projection))


def solve_ridge(gram: jax.Array, targets: jax.Array, ridge: jax.Array | float) -> jax.Array:
    r"""Solves ridge regression from its sums.

    .. math:: W = (G + \lambda g I)^{-1} Q, \quad g = \mathrm{tr}\, G / M

    Args:
      gram: G, f32 ``[M, M]``.
      targets: Q, f32 ``[M, C]``.
      ridge: lambda, above 0.

    Returns:
      f32 ``[M, C]``; NaN if lambda is too small for f32.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.methods.ranpac import solve_ridge
      >>> w = solve_ridge(2.0 * jnp.eye(2), jnp.array([[4.0], [6.0]]), ridge=1.0)
      >>> [round(float(value), 4) for value in w[:, 0]]
      [1.0, 1.5]

    Source: McDonnell et al. 2023 (arXiv 2307.02251), Eq. 6.
    """
    size = gram.shape[0]
    unit = jnp.maximum(jnp.trace(gram) / size, 1e-30)
    factor = jax.scipy.linalg.cho_factor(gram / unit + ridge * jnp.eye(size, dtype=jnp.float32))
    return jax.scipy.linalg.cho_solve(factor, targets / unit)


def held_out_errors(everything: RidgeSums, held: RidgeSums) -> jax.Array:
    r"""Squared errors on held-out examples of a fit to the others, with each of `RIDGES`.

    .. math:: E_\lambda = \sum_i |W_\lambda^T h_i - e_i|^2
              = \mathrm{tr}\, W_\lambda^T G' W_\lambda - 2\, \mathrm{tr}\, W_\lambda^T Q' + n'

    Args:
      everything: sums over all examples, the held-out ones included.
      held: those of the n' held-out ones, G' and Q'.

    Returns:
      f32 ``[ridges]``; infinite if lambda is too small for f32.
    """
    gram, targets = everything.gram - held.gram, everything.targets - held.targets

    def one(ridge: jax.Array) -> jax.Array:
        w = solve_ridge(gram, targets, ridge)
        return jnp.sum(w * (product(held.gram, w) - 2.0 * held.targets)) + held.examples.sum()

    errors = jax.lax.map(one, jnp.array(RIDGES, jnp.float32))
    return jnp.where(jnp.isfinite(errors), errors, jnp.inf)


def _ridge(name: str, features: int, ridge: float | None, trains: str) -> Method:
    def prepare(state: AnalyticState, inputs: int) -> AnalyticState:
        if not features:
            return state
        return state._replace(settings=draw_projection(state.settings, inputs, features))

    def init(key: Any, inputs: int, classes: int) -> AnalyticState:
        size = features or inputs
        none = RidgeSums(
            jnp.zeros((size, size), jnp.float32),
            jnp.zeros((size, classes), jnp.float32),
            jnp.zeros(classes, jnp.float32),
        )
        sums = (none, none) if ridge is None else (none,)  # of all examples, of those held out
        return AnalyticState(sums, empty_linear(size, classes), key)

    def learn(
        state: AnalyticState, sums: Callable[..., Any], first: Callable[[], Any]
    ) -> AnalyticState:
        seed = prepare(state, first()[0].shape[1]).settings

        def add(total: Any, places: jax.Array, z: jax.Array, classes: jax.Array) -> Any:
            h = random_features(seed, z, features)
            # Of consecutive places every fifth; the last of these rows may not be there.
            rows = (-1 - places[0]) % _EVERY + jnp.arange(0, len(places), _EVERY)
            held = [part.at[rows].get(mode="fill", fill_value=0.0) for part in (h, classes)]
            parts = ((h, classes), held)[: len(total)]
            return jax.tree.map(jnp.add, total, tuple(RidgeSums.of(*part) for part in parts))

        both = jax.tree.map(jnp.add, state.sums, sums(add, state.sums))
        chosen: Any = ridge
        if ridge is None:
            chosen = jnp.array(RIDGES, jnp.float32)[jnp.argmin(held_out_errors(*both))]
        kernel = solve_ridge(both[0].gram, both[0].targets, chosen)
        head = linear_head(kernel, jnp.zeros(kernel.shape[1], jnp.float32), both[0].examples)
        return state._replace(sums=both, head=head)

    def outputs(state: AnalyticState, z: jax.Array) -> jax.Array:
        return apply_linear(state.head, random_features(state.settings, z, features))

    return analytic(name, init, learn, outputs, trains, prepare)


@register("ranpac", paper="McDonnell et al. 2023, arXiv 2307.02251")
def ranpac(features: Features = 2000, ridge: Ridge = None) -> Method:
    """RanPAC without its first phase; see the top of this file for the formula."""
    return _ridge("ranpac", features, ridge, "in turn")


@register("joint_ridge", group="ranpac", paper="the upper bound of analytic heads")
def joint_ridge(features: Features = 2000, ridge: Ridge = None) -> Method:
    """RanPAC's solution on the examples of all tasks together, which also choose lambda."""
    return _ridge("joint_ridge", features, ridge, "jointly")
