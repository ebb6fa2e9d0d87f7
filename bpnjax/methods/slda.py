r"""SLDA, streaming linear discriminant analysis: class means under one covariance of all classes.

.. math:: \hat y = \arg\max_c \; z^T \Lambda \mu_c - \tfrac12 \mu_c^T \Lambda \mu_c, \quad
          \Lambda = \big((1 - \varepsilon) \Sigma + \varepsilon I\big)^{-1}, \quad
          \Sigma = \frac1n \sum_i (z_i - \mu_{y_i}) (z_i - \mu_{y_i})^T

with the features z of a frozen network (`bpnjax.methods.analytic`). All classes are assumed to be
equally likely.

Source: Hayes and Kanan 2020 (arXiv 1909.01520), Eq. 1-4. Variant: the paper updates the covariance
example by example with the current mean, so it depends on the order. Here it is the exact
covariance within classes of all examples so far, from running sums.
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from bpnjax.methods.analytic import (
    AnalyticState,
    ClassSums,
    LinearHead,
    analytic,
    apart,
    apply_linear,
    class_sums,
    empty_linear,
    guessed_means,
    linear_head,
    product,
)
from bpnjax.methods.base import Method
from bpnjax.methods.settings import Range, Setting, register


class SldaSums(NamedTuple):
    """Sums per class, and the scatter of all features around the means of their classes."""

    classes: ClassSums
    scatter: jax.Array  # f32 [d, d]


def joined(old: SldaSums, new: SldaSums) -> SldaSums:
    r"""Joins the sums of two sets of examples, which may share classes.

    .. math:: S = S_a + S_b + \sum_c \frac{n_{ac} n_{bc}}{n_{ac} + n_{bc}} \,
              (\mu_{bc} - \mu_{ac}) (\mu_{bc} - \mu_{ac})^T

    Args:
      old: of the first set.
      new: of the second set.

    Returns:
      `SldaSums`.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.methods.analytic import ClassSums
      >>> from bpnjax.methods.slda import SldaSums, joined
      >>> one, other = (
      ...     SldaSums(ClassSums(jnp.ones(1), jnp.array([[z]])), jnp.zeros((1, 1)))
      ...     for z in (1.0, 5.0)
      ... )
      >>> joined(one, other).scatter.tolist()  # 2^2 + 2^2
      [[8.0]]
    """
    weight, delta = apart(old.classes, new.classes)
    between = product((weight[:, None] * delta).T, delta)
    return SldaSums(
        jax.tree.map(jnp.add, old.classes, new.classes), old.scatter + new.scatter + between
    )


def discriminant(sums: SldaSums, shrinkage: jax.Array | float) -> LinearHead:
    r"""Computes the linear discriminant from the sums.

    .. math:: w_c = \Lambda (\mu_c - m), \quad b_c = -\tfrac12 (\mu_c + m)^T w_c, \quad
              \Lambda = \big((1 - \varepsilon) \Sigma + \varepsilon I\big)^{-1}

    with the mean m of all examples, which changes all outputs by the same number.

    Args:
      sums: over all examples.
      shrinkage: epsilon, above 0, at most 1.

    Returns:
      `LinearHead`.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.methods.analytic import ClassSums, apply_linear
      >>> from bpnjax.methods.slda import SldaSums, discriminant
      >>> classes = ClassSums(jnp.array([1.0, 1.0]), jnp.array([[1.0], [3.0]]))
      >>> head = discriminant(SldaSums(classes, jnp.array([[2.0]])), shrinkage=0.5)
      >>> apply_linear(head, jnp.array([[3.0]])).tolist()  # around m = 2: -1 x 1 - 1/2, 1 - 1/2
      [[-1.5, 0.5]]

    Source: Hayes and Kanan 2020 (arXiv 1909.01520), Eq. 2-4.
    """
    # By eigenvalues, since rounding may make some of them negative; they count as 0.
    covariance = sums.scatter / jnp.maximum(sums.classes.examples.sum(), 1.0)
    values, vectors = jnp.linalg.eigh(covariance)
    values = (1.0 - shrinkage) * jnp.maximum(values, 0.0) + shrinkage
    # Centred at the mean of all classes, so that no digits are lost to it.
    middle = sums.classes.total.sum(0) / jnp.maximum(sums.classes.examples.sum(), 1.0)
    means = sums.classes.means - middle
    kernel = product(vectors, product(vectors.T, means.T) / values[:, None])
    bias = -jnp.sum((0.5 * means + middle) * kernel.T, 1)
    return linear_head(kernel, bias, sums.classes.examples)


@register("slda", paper="Hayes and Kanan 2020, arXiv 1909.01520")
def slda(
    shrinkage: Annotated[
        float,
        Setting(
            "epsilon, share of the identity in the shrunken covariance", above=0, below=1,
            search=(Range(1e-6, 0.9),),
        ),
    ] = 1e-4,
) -> Method:  # fmt: skip
    """SLDA; see the top of this file for the formula."""

    def init(key: Any, inputs: int, classes: int) -> AnalyticState:
        del key
        sums = SldaSums(ClassSums.empty(classes, inputs), jnp.zeros((inputs, inputs), jnp.float32))
        return AnalyticState(sums, empty_linear(inputs, classes), jnp.float32(shrinkage))

    def learn(
        state: AnalyticState, sums: Callable[..., Any], first: Callable[[], Any]
    ) -> AnalyticState:
        guess = guessed_means(*first())

        def add(total: SldaSums, places: Any, z: jax.Array, classes: jax.Array) -> SldaSums:
            del places
            away = z - product(classes, guess)
            found = SldaSums(class_sums(away, classes), product(away.T, away))
            return jax.tree.map(jnp.add, total, found)

        away, products = sums(add, state.sums)
        found = SldaSums(
            ClassSums(away.examples, away.total + away.examples[:, None] * guess),
            products - product(away.means.T, away.total),
        )
        both = joined(state.sums, found)
        return state._replace(sums=both, head=discriminant(both, state.settings))

    return analytic("slda", init, learn, lambda state, z: apply_linear(state.head, z))
