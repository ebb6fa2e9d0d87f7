r"""XdG, context-dependent gating: a random part of the hidden units is silent in each task.

.. math:: y = W (x \odot gate_t) + b, \quad gate_t \in \{0, 1\}^{inputs}, \quad
          P(gate = 0) = \text{xdg.gated}

A fair peer of PSP and BD: it knows the task as they do, and stores a seed. A gate sits on the
input of every layer but the first, that is on the hidden units.

Source: Masse et al. 2018 (arXiv 1802.01569). Variant: without rescaling of the units that are left.
`xdg` is gating alone, `xdg_ewc` with EWC, the paper's combination.
"""

from bpnjax.methods.base import Method
from bpnjax.modes import keys
from bpnjax.networks import linen


def init(key, core, spec):
    """The hook `init` of `Method`: a seed for each layer but the first."""
    del core
    first, *_ = spec.layers
    hidden = {path: layer for path, layer in spec.layers.items() if path != first}
    return keys.gate_bank(key, hidden, spec.config.xdg.gated)


XDG = Method(
    name="xdg",
    paper="Masse et al. 2018, arXiv 1802.01569",
    told_task=True,
    init=init,
    mode=linen.select,
    stored=lambda state: {"bank": state},
)
