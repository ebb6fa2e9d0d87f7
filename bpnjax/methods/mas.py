r"""MAS, memory aware synapses: an anchor weighted by the output's sensitivity.

.. math:: L_t(\theta) + \lambda \sum_j \Omega_j (\theta_j - \theta^*_j)^2

with :math:`\Omega` of `bpnjax.importance.sensitivity`, summed over tasks, and the anchor at the
parameters after the last task; without 1/2.

Source: Aljundi et al. 2018 (arXiv 1711.09601), Eq. 2-4; importance per example, as defined there.
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
    # Without the 1/2 of the anchor's gradient.
    return anchored(2.0 * strength, form, lambda data: data.sensitivity())
