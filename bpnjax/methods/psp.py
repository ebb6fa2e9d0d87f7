r"""PSP, parameter superposition: a fixed random +-1 key per task on the input of every layer.

.. math:: y = W (x \odot key_t) + b, \quad key_t \in \{-1, +1\}^{inputs}

Networks of different tasks lie in one set of weights; read out with its own key each task sees
the others as noise that grows with their number and shrinks with the layer's width.

Source: Cheung et al. 2019 (arXiv 1902.05522), binary variant, with the layer's bias (the released
code creates one and never adds it) and fixed keys (the released configurations train them); Wen et
al. 2020, Alg. 3. Keys sit on pixels, every hidden layer and the last layer's input (`psp.layers`
chooses), are drawn independently per layer and task, and are derived from one seed.
"""

from bpnjax.methods.base import Method
from bpnjax.modes import keys
from bpnjax.networks import linen


def init(key, core, spec):
    """The hook `init` of `Method`: a seed for each layer that `psp.layers` names."""
    del core
    layers = linen.matching(spec.layers, spec.config.psp.layers)
    return keys.key_bank(key, layers)


PSP = Method(
    name="psp",
    paper="Cheung et al. 2019, arXiv 1902.05522",
    told_task=True,
    layer_fields=("psp",),
    init=init,
    mode=linen.select,
    stored=lambda state: {"bank": state},
)
