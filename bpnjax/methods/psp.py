r"""PSP, parameter superposition: a fixed random +-1 key per task on the input of every layer.

.. math:: y = W (x \odot key_t) + b, \quad key_t \in \{-1, +1\}^{inputs}

Several networks are superposed in one set of weights. Read out with its own key, a task sees the
others as noise, which grows with their number and falls with the layer's width.

Source: Cheung et al. 2019 (arXiv 1902.05522), binary variant; Wen et al. 2020, Alg. 3. The layer's
bias is added (the released code creates one and never adds it), and keys are fixed (the released
configurations train them). By default the inputs of all layers have keys, the pixels included
(``layers`` chooses). Keys are drawn independently per layer and task from one seed.
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
    """The hook `forward` for a state that is a bank of constant modes."""
    del task_params
    return params, modes.select(state, ctx.task)


def checks_layers(group: str, pattern: str) -> Any:
    """The hook `check` for a pattern that must match at least one layer."""

    def check(setup: Setup) -> None:
        try:
            matching(setup.network.layers, pattern)
        except ValueError as error:
            raise UserError(f"{group}.layers: {error}; fix the pattern") from error

    return check
