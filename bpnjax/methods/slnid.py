r"""SLNID, selfless sequential learning: few units fire at the same time; earlier units are spared.

The loss of every task gets an additional term for each hidden layer of width K,

.. math:: \lambda \sum_{i \ne j} d_{ij} \, e^{-(i - j)^2 / 2 \sigma^2} \,
          \frac{1}{n} \sum_b |h_i^b h_j^b|, \quad \sigma = K / scale

with h the units after their nonlinearity. So a task uses few units and leaves others to later
tasks. The discount d spares the units that earlier tasks need. With the importance a of
`bpnjax.importance.neurons`, summed over tasks, it is :math:`e^{-(a_i + a_j)}` (``discount="sum"``)
or :math:`e^{-\max(a_i, a_j)}` (``"max"``). MAS or EWC (``on``) protects the weights, with the
strength ``anchor_strength``.

Source: Aljundi et al. 2019 (arXiv 1806.05421), Eq. 5-7. Variant: ``"sum"`` is the paper's discount;
the authors' code uses the maximum by default. The ``scale`` of their code is 6, and 0 switches
locality off, as here.
"""

import itertools
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from bpnjax.methods import replay
from bpnjax.methods.base import Batch, Context, Method, Setup, TaskData
from bpnjax.methods.ewc import EwcState, Form, anchored
from bpnjax.methods.settings import Range, Setting, register
from bpnjax.networks import Layer
from bpnjax.utils.errors import UserError


class SlnidState(NamedTuple):
    """The state of SLNID together with the anchor it is combined with."""

    anchored: EwcState  # of MAS or EWC
    importance: dict[str, jax.Array]  # {hidden layer: f32 [K]}, summed over tasks
    strength: jax.Array  # lambda, shape=()


def hidden_layers(layers: Mapping[str, Layer]) -> dict[str, str]:
    """The Dense layers whose units are the input of another Dense layer.

    Args:
      layers: ``{path: Layer}`` as in `bpnjax.networks.Network.layers`.

    Returns:
      ``{layer: next layer}``, without the output layer as a key.

    Example:
      >>> from bpnjax.networks.layers import Layer
      >>> from bpnjax.methods.slnid import hidden_layers
      >>> layers = {"hidden_0": Layer("dense", 4, 3, 1, 2, (1, 3))}
      >>> layers["output"] = Layer("dense", 3, 2, 1, 2, (1, 2))
      >>> hidden_layers(layers)
      {'hidden_0': 'output'}
    """
    return {
        path: after
        for path, after in itertools.pairwise(layers)
        if all(layers[p].kind == "dense" and layers[p].rank == 2 for p in (path, after))
        and layers[after].inputs == layers[path].outputs
    }


def inhibition(
    units: Any, importance: Any, weight: Any, scale: float, discount: str = "sum"
) -> jax.Array:
    r"""How much the units of a layer fire at the same time.

    .. math:: \sum_{i \ne j} d_{ij} \, e^{-(i - j)^2 s^2 / 2 K^2} \,
              \frac{1}{\sum_b w_b} \sum_b w_b |h_i^b h_j^b|, \quad
              d_{ij} = e^{-(a_i + a_j)} \text{ or } e^{-\max(a_i, a_j)}

    Args:
      units: h, f32 ``[n, K]``, after their nonlinearity.
      importance: a, f32 ``[K]``, not negative.
      weight: w, f32 ``[n]``, 0 for padding; not all 0.
      scale: s = K / sigma; 0 for no locality.
      discount: ``"sum"`` or ``"max"``.

    Returns:
      The sum over ordered pairs (each pair counts twice), f32 scalar, not divided by K.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.methods.slnid import inhibition
      >>> units = jnp.array([[1.0, 3.0], [0.0, 5.0]])
      >>> # Twice the mean of 1 x 3 and 0 x 5.
      >>> float(inhibition(units, jnp.zeros(2), jnp.ones(2), scale=0.0))
      3.0

    Source: Aljundi et al. 2019 (arXiv 1806.05421), Eq. 5-7. Variant: the paper's discount is
    ``"sum"``; the authors' code uses ``"max"`` by default.
    """
    width = units.shape[1]
    both = jnp.add.outer if discount == "sum" else jnp.maximum.outer
    factor = jnp.exp(-both(importance, importance)) * (1.0 - jnp.eye(width, dtype=jnp.float32))
    if scale:
        place = jnp.arange(width)
        apart = jnp.subtract.outer(place, place) * (scale / width)
        factor = factor * jnp.exp(-0.5 * jnp.square(apart))
    together = (jnp.abs(units) * weight[:, None]).T @ jnp.abs(units) / jnp.sum(weight)
    return jnp.sum(factor * together)


@register("slnid", paper="Aljundi et al. 2019, arXiv 1806.05421")
def slnid(
    strength: Annotated[
        float,
        Setting("strength of the inhibition between units", at_least=0, search=(Range(1e-6, 0.1),)),
    ] = 1e-3,
    scale: Annotated[
        float,
        Setting(
            "the inhibition reaches as far as (width of the layer) / scale units; 0: all units",
            at_least=0,
        ),
    ] = 6.0,
    discount: Annotated[
        str,
        Setting(
            "how importance discounts the inhibition: sum (the paper), max (the authors' code)",
            choices=("sum", "max"),
        ),
    ] = "sum",
    on: Annotated[str, Setting("anchor that it is combined with", choices=("mas", "ewc"))] = "mas",
    anchor_strength: Annotated[
        float,
        Setting(
            "strength of that anchor, as mas.strength or ewc.strength",
            at_least=0,
            search=(Range(1e-3, 1e3),),
        ),
    ] = 1.0,
    form: Form = "proximal",
) -> Method:
    """SLNID; see the top of this file for the formula."""
    if on == "mas":
        anchor = anchored(2.0 * anchor_strength, form, lambda data: data.sensitivity())
        of = "output_norm"
    else:
        anchor = anchored(anchor_strength, form, lambda data: data.fisher("empirical", 0))
        of = "loss"

    def check(setup: Setup) -> None:
        if setup.network.tapped is None or not hidden_layers(setup.network.layers):
            raise UserError(
                "method: slnid inhibits the units of hidden Dense layers, and this network has "
                "none before its output; set --config.model.hidden='(300,)'"
            )

    def init(key: Any, params: Any, setup: Setup) -> SlnidState:
        layers = setup.network.layers
        return SlnidState(
            anchor.init(key, params, setup),
            {path: jnp.zeros(layers[path].outputs, jnp.float32) for path in hidden_layers(layers)},
            jnp.float32(strength),
        )

    def gradient(grads: Any, params: Any, state: SlnidState, batch: Batch, ctx: Context) -> Any:
        pairs = hidden_layers(ctx.setup.network.layers)

        def loss(params: Any) -> jax.Array:
            inputs = ctx.features(params, batch.x, ctx.current, tuple(pairs.values()))
            terms = [
                inhibition(inputs[after], state.importance[path], batch.weight, scale, discount)
                for path, after in pairs.items()
            ]
            return sum(terms, jnp.float32(0))

        grads = replay.add(grads, jax.grad(loss)(params), state.strength)
        return anchor.gradient(grads, params, state.anchored, batch, ctx)

    def end_task(
        params: Any, task_params: Any, state: SlnidState, data: TaskData, ctx: Context
    ) -> tuple[Any, SlnidState]:
        found = data.neurons(of)
        params, kept = anchor.end_task(params, task_params, state.anchored, data, ctx)
        importance = {path: a + found[path] for path, a in state.importance.items()}
        return params, state._replace(anchored=kept, importance=importance)

    return Method(check=check, init=init, gradient=gradient, end_task=end_task)
