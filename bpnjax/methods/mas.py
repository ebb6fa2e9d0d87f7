r"""MAS, memory aware synapses: a penalty weighted by the sensitivity of the outputs.

.. math:: L_t(\theta) + \lambda \sum_j \Omega_j (\theta_j - \theta^*_j)^2

with :math:`\Omega` from `bpnjax.importance.sensitivity`, summed over tasks, and the parameters
after the last task as anchor. There is no factor 1/2.

Source: Aljundi et al. 2018 (arXiv 1711.09601), Eq. 2-4, with importance per example as defined
  there.
"""

from typing import Annotated

from bpnjax.methods.base import Method
from bpnjax.methods.ewc import Form, anchored
from bpnjax.methods.settings import Range, Setting, register


@register("mas", paper="Aljundi et al. 2018, arXiv 1711.09601")
def mas(
    strength: Annotated[
        float,
        Setting(
            "lambda of the penalty lambda sum Omega (theta - anchor)^2",
            at_least=0,
            search=(Range(1e-3, 1e3),),
        ),
    ] = 1.0,
    form: Form = "proximal",
) -> Method:
    """MAS; see the top of this file for the formula."""
    # The anchor's gradient has a factor 1/2, MAS has none.
    return anchored(2.0 * strength, form, lambda data: data.sensitivity())
