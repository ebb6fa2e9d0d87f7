r"""FeCAM: the nearest class mean in the Mahalanobis distance of each class.

.. math:: \hat y = \arg\min_c (u - m_c)^T \hat\Sigma_c^{-1} (u - m_c), \quad
          \tilde z = z^\beta, \quad u = \tilde z / |\tilde z|, \quad m_c = \mu_c / |\mu_c|

with the features z of a frozen network (`bpnjax.methods.analytic`), the mean :math:`\mu_c` and the
covariance of :math:`\tilde z` within class c. The covariance is shrunk and then scaled to
correlations (`normalised_covariance`), so that classes with large and small variance can be
compared. The logits are minus the distances.

The state has one d x d matrix per class, and training needs a second one.

Source: Goswami et al. 2023 (FeCAM, arXiv 2309.14062), Eq. 4-9; their code scales features and means
to length 1. Variant: shrunk once, as in the paper; their code does it twice. Negative features,
which only networks without a last ReLU have, keep their sign under the power.
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from bpnjax.methods.analytic import (
    AnalyticState,
    ClassSums,
    analytic,
    apart,
    class_sums,
    guessed_means,
    product,
)
from bpnjax.methods.base import Method
from bpnjax.methods.settings import Range, Setting, register
from bpnjax.utils.heads import FAR_BELOW

_BLOCK = 256  # of `quadratic`


class FecamSums(NamedTuple):
    """Sums per class, and the scatter of each class around its mean."""

    classes: ClassSums
    scatter: jax.Array  # f32 [C, d, d]


class FecamHead(NamedTuple):
    """The head: means and inverse covariances of the classes."""

    means: jax.Array  # of length 1, f32 [C, d]
    precision: jax.Array  # f32 [C, d, d]
    seen: jax.Array  # 1 for classes with examples, else 0: f32 [C]


class _Settings(NamedTuple):
    shrinkage: jax.Array  # gamma, shape=()
    power: jax.Array  # beta, shape=()


def transformed(features: jax.Array, power: jax.Array | float) -> jax.Array:
    r"""Tukey's transformation, which makes the skewed distributions of ReLUs more Gaussian.

    .. math:: \tilde z = \mathrm{sign}(z) |z|^\beta

    Args:
      features: f32 ``[n, d]``.
      power: beta, above 0; 1 changes nothing.

    Returns:
      f32 ``[n, d]``.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.methods.fecam import transformed
      >>> transformed(jnp.array([0.0, 4.0, -9.0]), 0.5).tolist()
      [0.0, 2.0, -3.0]

    Source: Goswami et al. 2023 (arXiv 2309.14062), Eq. 9.
    """
    return jnp.sign(features) * jnp.abs(features) ** power


def normalised_covariance(covariance: jax.Array, shrinkage: jax.Array | float) -> jax.Array:
    r"""Shrinks a covariance and scales it to a diagonal of ones.

    .. math:: \Sigma' = \Sigma + \gamma V_1 I + \gamma V_2 (1 - I), \quad
              \hat\Sigma_{ij} = \Sigma'_{ij} \Big/ \sqrt{\Sigma'_{ii} \Sigma'_{jj}}

    with the means :math:`V_1` of the diagonal and :math:`V_2` of the other elements.

    Args:
      covariance: f32 ``[d, d]``.
      shrinkage: gamma, above 0.

    Returns:
      f32 ``[d, d]``; the identity if the covariance is 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.methods.fecam import normalised_covariance
      >>> covariance = jnp.array([[1.0, 1.0], [1.0, 3.0]])  # V1 = 2, V2 = 1
      >>> found = normalised_covariance(covariance, 3.0)
      >>> round(float(found[0, 0]), 4), round(float(found[0, 1]), 4)  # 4 / sqrt(7 x 9)
      (1.0, 0.504)

    Source: Goswami et al. 2023 (arXiv 2309.14062), Eq. 6 and 8, with gamma_1 = gamma_2.
    """
    d = covariance.shape[0]
    eye = jnp.eye(d, dtype=jnp.float32)
    variance = jnp.maximum(jnp.trace(covariance) / d, 1e-12)
    others = jnp.sum(covariance * (1.0 - eye)) / max(d * (d - 1), 1)
    shrunk = covariance + shrinkage * (variance * eye + others * (1.0 - eye))
    deviation = jnp.sqrt(jnp.diag(shrunk))
    return shrunk / jnp.outer(deviation, deviation)


def quadratic(vectors: jax.Array, matrix: jax.Array) -> jax.Array:
    r"""Quadratic forms of a symmetric matrix, of which the part below the diagonal is not read.

    .. math:: q_i = v_i^T \Lambda v_i
              = \sum_b v_{ib}^T (\Lambda_{bb} v_{ib} + 2 \sum_{b' > b} \Lambda_{bb'} v_{ib'})

    with the vectors cut into blocks b of 256 numbers.

    Args:
      vectors: f32 ``[n, d]``.
      matrix: f32 ``[d, d]``.

    Returns:
      f32 ``[n]``.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.methods.fecam import quadratic
      >>> quadratic(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 1.0], [1.0, 0.0]])).tolist()
      [7.0]
    """
    total = jnp.zeros(vectors.shape[0], jnp.float32)
    for start in range(0, vectors.shape[1], _BLOCK):
        stop = min(start + _BLOCK, vectors.shape[1])
        own = vectors[:, start:stop]
        found = product(own, matrix[start:stop, start:])
        twice = jnp.sum(found[:, stop - start :] * vectors[:, stop:], 1)
        total += jnp.sum(found[:, : stop - start] * own, 1) + 2.0 * twice
    return total


def distances(head: FecamHead, vectors: jax.Array) -> jax.Array:
    r"""Mahalanobis distances, squared.

    .. math:: D_{ic} = (u_i - m_c)^T \Lambda_c (u_i - m_c)

    Args:
      head: with the means m and the inverse covariances Lambda.
      vectors: u, f32 ``[n, d]``.

    Returns:
      f32 ``[n, C]``, infinite for classes that were never seen; these take no time.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.methods.fecam import FecamHead, distances
      >>> seen = jnp.array([1.0, 0.0])
      >>> head = FecamHead(jnp.array([[1.0], [4.0]]), jnp.array([[[2.0]], [[2.0]]]), seen)
      >>> distances(head, jnp.array([[4.0]])).tolist()
      [[18.0, inf]]
    """

    def one(c: jax.Array) -> jax.Array:
        return jax.lax.cond(
            head.seen[c] > 0,
            lambda: quadratic(vectors - head.means[c], head.precision[c]),
            lambda: jnp.full(vectors.shape[0], jnp.inf, jnp.float32),
        )

    return jax.lax.map(one, jnp.arange(head.seen.shape[0])).T


def _for_each(examples: jax.Array, body: Callable[[Any, Any], Any], start: Any) -> Any:
    """``carry = body(c, carry)`` for the classes c with examples f32 ``[C]``, and no others."""
    order = jnp.argsort(examples <= 0)  # those with examples first
    number = jnp.sum(examples > 0)
    return jax.lax.fori_loop(0, number, lambda i, carry: body(order[i], carry), start)


def _unit(vectors: jax.Array) -> jax.Array:
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


@register("fecam", paper="Goswami et al. 2023, arXiv 2309.14062")
def fecam(
    shrinkage: Annotated[
        float,
        Setting(
            "gamma, weight of the mean elements that are added to the covariance", above=0,
            search=(Range(0.01, 100.0),),
        ),
    ] = 1.0,
    power: Annotated[
        float,
        Setting(
            "beta, the power to which features are raised; 1: no change", above=0,
            search=(Range(0.2, 1.0, "linear"),),
        ),
    ] = 0.5,
) -> Method:  # fmt: skip
    """FeCAM; see the top of this file for the formula."""

    def init(key: Any, inputs: int, classes: int) -> AnalyticState:
        del key
        square = jnp.zeros((classes, inputs, inputs), jnp.float32)
        sums = FecamSums(ClassSums.empty(classes, inputs), square)
        head = FecamHead(
            jnp.zeros((classes, inputs), jnp.float32), square, jnp.zeros(classes, jnp.float32)
        )
        return AnalyticState(sums, head, _Settings(jnp.float32(shrinkage), jnp.float32(power)))

    def learn(
        state: AnalyticState, sums: Callable[..., Any], first: Callable[[], Any]
    ) -> AnalyticState:
        features, own = first()
        guess = guessed_means(transformed(features, state.settings.power), own)

        # The matrices of all classes together are large: those of the classes at hand are changed
        # in their place.
        def add(total: FecamSums, places: Any, z: jax.Array, classes: jax.Array) -> FecamSums:
            del places
            away = transformed(z, state.settings.power) - product(classes, guess)

            def one(c: jax.Array, scatter: jax.Array) -> jax.Array:
                return scatter.at[c].add(product(away.T, away * classes[:, c, None]))

            found = class_sums(away, classes)
            return FecamSums(
                jax.tree.map(jnp.add, total.classes, found),
                _for_each(found.examples, one, total.scatter),
            )

        away, products = sums(add, state.sums)
        found = ClassSums(away.examples, away.total + away.examples[:, None] * guess)
        weight, delta = apart(state.sums.classes, found)
        both = jax.tree.map(jnp.add, state.sums.classes, found)

        def solve(c: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            scatter, precision = carry
            own = scatter[c] + products[c] + weight[c] * jnp.outer(delta[c], delta[c])
            own -= away.examples[c] * jnp.outer(away.means[c], away.means[c])
            covariance = normalised_covariance(own / both.examples[c], state.settings.shrinkage)
            return scatter.at[c].set(own), precision.at[c].set(jnp.linalg.inv(covariance))

        before = (state.sums.scatter, state.head.precision)
        scatter, precision = _for_each(found.examples, solve, before)
        seen = jnp.asarray(both.examples > 0, jnp.float32)
        return state._replace(
            sums=FecamSums(both, scatter), head=FecamHead(_unit(both.means), precision, seen)
        )

    def outputs(state: AnalyticState, z: jax.Array) -> jax.Array:
        away = distances(state.head, _unit(transformed(z, state.settings.power)))
        return jnp.where(state.head.seen > 0, -away, FAR_BELOW)

    return analytic("fecam", init, learn, outputs)
