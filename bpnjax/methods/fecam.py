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


def distances(means: jax.Array, precision: jax.Array, vectors: jax.Array) -> jax.Array:
    r"""Squared Mahalanobis distances.

    .. math:: D_{ic} = (u_i - m_c)^T \Lambda_c (u_i - m_c)

    Args:
      means: m, f32 ``[C, d]``.
      precision: Lambda, f32 ``[C, d, d]``.
      vectors: u, f32 ``[n, d]``.

    Returns:
      f32 ``[n, C]``.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.methods.fecam import distances
      >>> distances(jnp.array([[1.0]]), jnp.array([[[2.0]]]), jnp.array([[4.0]])).tolist()
      [[18.0]]
    """

    def one(of_class: tuple[jax.Array, jax.Array]) -> jax.Array:
        away = vectors - of_class[0]
        return jnp.sum(product(away, of_class[1]) * away, 1)

    return jax.lax.map(one, (means, precision)).T


def _outer(weight: jax.Array, vectors: jax.Array) -> jax.Array:
    """Weighted outer products of vectors with themselves, ``[C, d, d]``."""
    return weight[:, None, None] * vectors[:, :, None] * vectors[:, None, :]


def _unit(vectors: jax.Array) -> jax.Array:
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _solved(sums: FecamSums, shrinkage: jax.Array) -> FecamHead:
    means = sums.classes.means

    def one(of_class: tuple[jax.Array, ...]) -> jax.Array:
        scatter, count = of_class
        covariance = scatter / jnp.maximum(count, 1.0)
        return jnp.linalg.inv(normalised_covariance(covariance, shrinkage))

    precision = jax.lax.map(one, (sums.scatter, sums.classes.examples))
    return FecamHead(_unit(means), precision, jnp.asarray(sums.classes.examples > 0, jnp.float32))


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

        def of_batch(places: Any, z: jax.Array, classes: jax.Array) -> FecamSums:
            del places
            away = transformed(z, state.settings.power) - product(classes, guess)

            def of_class(own: jax.Array) -> jax.Array:
                # Most classes have no example in a batch.
                return jax.lax.cond(
                    own.sum() > 0,
                    lambda: product(away.T, away * own[:, None]),
                    lambda: jnp.zeros((away.shape[1], away.shape[1]), jnp.float32),
                )

            return FecamSums(class_sums(away, classes), jax.lax.map(of_class, classes.T))

        away, products = sums(of_batch, state.sums)
        found = ClassSums(away.examples, away.total + away.examples[:, None] * guess)
        weight, delta = apart(state.sums.classes, found)
        both = FecamSums(
            jax.tree.map(jnp.add, state.sums.classes, found),
            state.sums.scatter
            + products
            - _outer(away.examples, away.means)
            + _outer(weight, delta),
        )
        return state._replace(sums=both, head=_solved(both, state.settings.shrinkage))

    def outputs(state: AnalyticState, z: jax.Array) -> jax.Array:
        head = state.head
        away = distances(head.means, head.precision, _unit(transformed(z, state.settings.power)))
        return jnp.where(head.seen > 0, -away, FAR_BELOW)

    return analytic("fecam", init, learn, outputs)
