r"""XdG, context-dependent gating: each task switches off a random part of the hidden units.

.. math:: y = W (x \odot gate_t) + b, \quad gate_t \in \{0, 1\}^{inputs}, \quad
          P(gate = 0) = gated

A fair peer of PSP and BD: it knows the task as they do, and stores one seed. The gates act on the
inputs of all layers but the first, which are the hidden units.

Source: Masse et al. 2018 (arXiv 1802.01569). Variant: the remaining units are not rescaled. `xdg`
is gating alone; `xdg_ewc` adds EWC, as in the paper.
"""

from typing import Annotated, Any

from bpnjax import modes
from bpnjax.methods.base import Method, Setup
from bpnjax.methods.psp import checks_layers, from_bank
from bpnjax.methods.settings import Range, Setting, register


@register("xdg", paper="Masse et al. 2018, arXiv 1802.01569")
def xdg(
    gated: Annotated[
        float,
        Setting(
            "share of hidden units that are switched off in a task",
            at_least=0,
            below=1,
            search=(Range(0.2, 0.95, "linear", own_program=True),),
        ),
    ] = 0.8,
) -> Method:
    """XdG; its state is a bank of gate seeds for each layer but the first."""

    def init(key: Any, params: Any, setup: Setup) -> Any:
        del params
        first, *_ = setup.network.layers
        hidden = {path: layer for path, layer in setup.network.layers.items() if path != first}
        return modes.gate_bank(key, hidden, gated)

    return Method(told_task=True, check=checks_layers("xdg", ".*"), init=init, forward=from_bank)
