r"""NCM, nearest class mean: an example belongs to the class whose mean features are nearest.

.. math:: \hat y = \arg\min_c |z - \mu_c|^2 = \arg\max_c \; z^T \mu_c - \tfrac12 |\mu_c|^2

with the features z of a frozen network (`bpnjax.methods.analytic`). The second form is linear and
gives the logits. They differ from :math:`-|z - \mu_c|^2 / 2` by a number that is the same for all
classes.

Source: Mensink et al. 2013 (TPAMI 35, 2624), Sec. 3; on pretrained features Janson et al. 2022
(arXiv 2210.04428). Variant: Euclidean distance, where SimpleCIL (Zhou et al. 2023, arXiv
2303.07338) uses the cosine.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bpnjax.methods.analytic import (
    AnalyticState,
    ClassSums,
    LinearHead,
    analytic,
    apply_linear,
    class_sums,
    empty_linear,
    linear_head,
)
from bpnjax.methods.base import Method
from bpnjax.methods.settings import register


def nearest_mean(sums: ClassSums) -> LinearHead:
    r"""The linear layer whose largest output is the class of the nearest mean.

    .. math:: W = \mu^T, \quad b_c = -\tfrac12 |\mu_c|^2

    Args:
      sums: over all examples.

    Returns:
      `LinearHead`.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.methods.analytic import ClassSums, apply_linear
      >>> from bpnjax.methods.ncm import nearest_mean
      >>> sums = ClassSums(jnp.array([1.0, 2.0]), jnp.array([[1.0], [8.0]]))  # means 1 and 4
      >>> apply_linear(nearest_mean(sums), jnp.array([[2.0]])).tolist()  # 2 - 1/2, 8 - 16/2
      [[1.5, 0.0]]

    Source: Mensink et al. 2013 (TPAMI 35, 2624), Eq. 1.
    """
    means = sums.means
    return linear_head(means.T, -0.5 * jnp.sum(means**2, 1), sums.examples)


@register("ncm", paper="Mensink et al. 2013, TPAMI 35")
def ncm() -> Method:
    """NCM; see the top of this file for the formula."""

    def init(key: Any, inputs: int, classes: int) -> AnalyticState:
        del key
        return AnalyticState(ClassSums.empty(classes, inputs), empty_linear(inputs, classes), ())

    def learn(state: AnalyticState, sums: Callable[..., Any], first: Any) -> AnalyticState:
        del first

        def add(total: ClassSums, places: Any, z: jax.Array, classes: jax.Array) -> ClassSums:
            del places
            return jax.tree.map(jnp.add, total, class_sums(z, classes))

        both = jax.tree.map(jnp.add, state.sums, sums(add, state.sums))
        return state._replace(sums=both, head=nearest_mean(both))

    return analytic("ncm", init, learn, lambda state, z: apply_linear(state.head, z))
