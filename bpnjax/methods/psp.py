r"""PSP, parameter superposition: a fixed random +-1 key per task on the input of every layer.

.. math:: y = W (x \odot key_t) + b, \quad key_t \in \{-1, +1\}^{inputs}

Networks of different tasks lie in one set of weights; read out with its own key each task sees
the others as noise that grows with their number and shrinks with the layer's width.

Source: Cheung et al. 2019 (arXiv 1902.05522), binary variant, with the layer's bias (the released
code creates one and never adds it) and fixed keys (the released configurations train them); Wen et
al. 2020, Alg. 3. Keys sit on pixels, every hidden layer and the last layer's input (``layers``
chooses), are drawn independently per layer and task, and are derived from one seed.
"""

from typing import Annotated, Any

from bpnjax import modes
from bpnjax.methods.base import Context, Method, Setup
from bpnjax.methods.settings import Setting, register
from bpnjax.networks import matching
from bpnjax.utils.errors import UserError


@register("psp", paper="Cheung et al. 2019, arXiv 1902.05522")
def psp(
    layers: Annotated[
        str, Setting("layers whose inputs get a key, as a pattern for their paths", pattern=True)
    ] = ".*",
) -> Method:
    """PSP; its state is a bank of key seeds, one per layer."""

    def init(key: Any, params: Any, setup: Setup) -> Any:
        del params
        return modes.key_bank(key, matching(setup.network.layers, layers))

    return Method(told_task=True, check=checks_layers("psp", layers), init=init, forward=from_bank)


def from_bank(params: Any, task_params: Any, state: Any, ctx: Context) -> tuple[Any, Any]:
    """The hook `forward` of a method whose state is a bank of modes that never change."""
    del task_params
    return params, modes.select(state, ctx.task)


def checks_layers(group: str, pattern: str) -> Any:
    """The hook `check` of a method that acts on layers: their pattern must match some."""

    def check(setup: Setup) -> None:
        try:
            matching(setup.network.layers, pattern)
        except ValueError as error:
            raise UserError(f"{group}.layers: {error}; fix the pattern") from error

    return check
