r"""RanPAC: ridge regression on random features; `joint_ridge` does it on all tasks at once.

.. math:: h = \max(0, P^T z), \quad G = \sum_i h_i h_i^T, \quad Q = \sum_i h_i e_{y_i}^T, \quad
          W = (G + \lambda g I)^{-1} Q, \quad g = \mathrm{tr}\, G / M

with the features z of a frozen network (`bpnjax.methods.analytic`), a Gaussian :math:`P \in R^{d
\times M}` that is drawn from the seed and never stored, and one-hot labels e. The logits are
:math:`W^T h`.

The strength lambda has no unit. In each task every strength of `RIDGES` is fitted to four fifths of
the examples and predicts every fifth one. Squared errors are summed over the tasks so far, and the
lambda with the smallest sum is used. All of these are sums, so the order of tasks does not matter.
Only the M x M matrix G is large.

Source: McDonnell et al. 2023 (RanPAC, arXiv 2307.02251), Eq. 5-6 and Algorithm 1, without its first
phase (no part of the network is trained). Variant: the authors choose lambda, in absolute units, on
the last fifth of the last task only, so their result depends on the order. Their M is 10,000; 2,000
take a hundredth of the time.
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
    """Sums over all tasks so far."""

    gram: jax.Array  # G, f32 [M, M]
    targets: jax.Array  # Q, f32 [M, C]
    examples: jax.Array  # number of examples of each class, f32 [C]
    errors: jax.Array  # squared errors on held-out examples with each of RIDGES, f32 [ridges]


class _Parts(NamedTuple):
    """Sums of one task, over the fitted and over the held-out examples."""

    gram: jax.Array  # f32 [2, M, M]
    targets: jax.Array  # f32 [2, M, C]
    examples: jax.Array  # f32 [C]
    squares: jax.Array  # squared and summed held-out targets, f32 scalar


def random_features(seed: Any, features: jax.Array, number: int) -> jax.Array:
    r"""Random features of the network's features.

    .. math:: h = \max(0, P^T z), \quad P_{ij} \sim N(0, 1 / d)

    Args:
      seed: typed PRNG key.
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
    inputs = features.shape[1]
    projection = jax.random.normal(seed, (inputs, number), jnp.float32) * jnp.float32(inputs**-0.5)
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


def held_out_errors(gram: jax.Array, targets: jax.Array, squares: jax.Array) -> jax.Array:
    r"""Squared errors on held-out examples of the fit to the others, with each of `RIDGES`.

    .. math:: E_\lambda = \sum_i |W_\lambda^T h_i - e_i|^2
              = \mathrm{tr}\, W_\lambda^T G' W_\lambda - 2\, \mathrm{tr}\, W_\lambda^T Q' + E_0

    Args:
      gram: f32 ``[2, M, M]``, over the fitted and over the held-out examples.
      targets: f32 ``[2, M, C]``, likewise.
      squares: E_0, the held-out targets squared and summed, f32 scalar.

    Returns:
      f32 ``[ridges]``; infinite if lambda is too small for f32.
    """

    def one(ridge: jax.Array) -> jax.Array:
        w = solve_ridge(gram[0], targets[0], ridge)
        return jnp.sum(w * (product(gram[1], w) - 2.0 * targets[1])) + squares

    errors = jax.lax.map(one, jnp.array(RIDGES, jnp.float32))
    return jnp.where(jnp.isfinite(errors), errors, jnp.inf)


def _ridge(name: str, features: int, ridge: float | None, trains: str) -> Method:
    def init(key: Any, inputs: int, classes: int) -> AnalyticState:
        size = features or inputs
        sums = RidgeSums(
            jnp.zeros((size, size), jnp.float32),
            jnp.zeros((size, classes), jnp.float32),
            jnp.zeros(classes, jnp.float32),
            jnp.zeros(len(RIDGES), jnp.float32),
        )
        return AnalyticState(sums, empty_linear(size, classes), key)

    def learn(state: AnalyticState, sums: Callable[..., Any], first: Any) -> AnalyticState:
        del first

        def of_batch(places: jax.Array, z: jax.Array, classes: jax.Array) -> _Parts:
            h = random_features(state.settings, z, features)
            held = (places % _EVERY == _EVERY - 1)[:, None]
            parts = [(jnp.where(part, h, 0.0), classes * part) for part in (~held, held)]
            return _Parts(
                jnp.stack([product(h.T, h) for h, _ in parts]),
                jnp.stack([product(h.T, y) for h, y in parts]),
                classes.sum(0),
                jnp.sum(parts[1][1]),
            )

        before = state.sums
        found = sums(of_batch, _Parts(
            jnp.stack([before.gram] * 2), jnp.stack([before.targets] * 2), before.examples,
            jnp.float32(0),
        ))  # fmt: skip
        gram, targets = before.gram + found.gram.sum(0), before.targets + found.targets.sum(0)
        errors = before.errors
        if ridge is None:
            errors = errors + held_out_errors(found.gram, found.targets, found.squares)
            chosen = jnp.array(RIDGES, jnp.float32)[jnp.argmin(errors)]
        else:
            chosen = jnp.float32(ridge)
        both = RidgeSums(gram, targets, before.examples + found.examples, errors)
        kernel = solve_ridge(gram, targets, chosen)
        head = linear_head(kernel, jnp.zeros(kernel.shape[1], jnp.float32), both.examples)
        return state._replace(sums=both, head=head)

    def outputs(state: AnalyticState, z: jax.Array) -> jax.Array:
        return apply_linear(state.head, random_features(state.settings, z, features))

    return analytic(name, init, learn, outputs, trains)


@register("ranpac", paper="McDonnell et al. 2023, arXiv 2307.02251")
def ranpac(features: Features = 2000, ridge: Ridge = None) -> Method:
    """RanPAC without its first phase; see the top of this file for the formula."""
    return _ridge("ranpac", features, ridge, "in turn")


@register("joint_ridge", group="ranpac", paper="the upper bound of analytic heads")
def joint_ridge(features: Features = 2000, ridge: Ridge = None) -> Method:
    """RanPAC's solution on the examples of all tasks together, which also choose lambda."""
    return _ridge("joint_ridge", features, ridge, "jointly")
