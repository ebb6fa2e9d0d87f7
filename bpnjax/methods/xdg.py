r"""XdG, context-dependent gating: a random part of the hidden units is silent in each task.

.. math:: y = W (x \odot gate_t) + b, \quad gate_t \in \{0, 1\}^{inputs}, \quad
          P(gate = 0) = gated

A fair peer of PSP and BD: it knows the task as they do, and stores a seed. A gate sits on the
input of every layer but the first, that is on the hidden units.

Source: Masse et al. 2018 (arXiv 1802.01569). Variant: without rescaling of the units that are left.
`xdg` is gating alone, `xdg_ewc` with EWC, the paper's combination.
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
    """XdG; its state is a bank of gate seeds, for each layer but the first."""

    def init(key: Any, params: Any, setup: Setup) -> Any:
        del params
        first, *_ = setup.network.layers
        hidden = {path: layer for path, layer in setup.network.layers.items() if path != first}
        return modes.gate_bank(key, hidden, gated)

    return Method(told_task=True, check=checks_layers("xdg", ".*"), init=init, forward=from_bank)
