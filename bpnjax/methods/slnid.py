r"""SLNID, selfless sequential learning: units that few others fire with, but for what is needed.

To the loss of every task comes, for each hidden layer of width K,

.. math:: \lambda \sum_{i \ne j} d_{ij} \, e^{-(i - j)^2 / 2 \sigma^2} \,
          \frac{1}{n} \sum_b |h_i^b h_j^b|, \quad \sigma = K / scale

with h the units after their nonlinearity, so that a task is coded by few units and leaves others
to later tasks. The discount d spares the units that earlier tasks need, with the importance a of
`bpnjax.importance.neurons` summed over tasks: :math:`e^{-(a_i + a_j)}` (`slnid.discount` ``"sum"``)
or :math:`e^{-\max(a_i, a_j)}` (``"max"``). The weights are protected by MAS or by EWC
(`slnid.on`), whose fields apply.

Source: Aljundi et al. 2019 (arXiv 1806.05421), Eq. 5-7. Variant: the discount of the paper is
``"sum"``; the authors' code takes the maximum unless told otherwise. Their code's locality has
``scale`` 6, and 0 switches it off, as here.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bpnjax.methods import ewc, mas, replay
from bpnjax.methods.base import Method
from bpnjax.utils.errors import UserError

_ANCHORS = {"mas": (mas.MAS, "output_norm"), "ewc": (ewc.EWC, "loss")}


class SlnidState(NamedTuple):
    """What SLNID keeps beside the anchor it is combined with."""

    anchored: Any  # the state of MAS or EWC
    importance: dict[str, jax.Array]  # {hidden layer: f32 [K]}, summed over tasks
    strength: jax.Array  # lambda, shape=()


def hidden_layers(layers) -> dict[str, str]:
    """The Dense layers whose units go into another Dense layer.

    Args:
      layers: ``{path: Layer}`` as `bpnjax.networks.linen.find_layers` gives.

    Returns:
      ``{layer: the next one}``; the output layer is none of the former.

    Example:
      >>> from bpnjax.networks.layers import Layer
      >>> from bpnjax.methods import slnid
      >>> layers = {"hidden_0": Layer("dense", 4, 3, 1, 2, (1, 3))}
      >>> layers["output"] = Layer("dense", 3, 2, 1, 2, (1, 2))
      >>> slnid.hidden_layers(layers)
      {'hidden_0': 'output'}
    """
    return {
        path: after
        for path, after in itertools.pairwise(layers)
        if all(layers[p].kind == "dense" and layers[p].rank == 2 for p in (path, after))
        and layers[after].inputs == layers[path].outputs
    }


def check(spec):
    """The hook `check` of `Method`.

    Args:
      spec: of the run.

    Raises:
      UserError: the network has no hidden Dense layer.
    """
    if not hidden_layers(spec.layers):
        raise UserError(
            "method: slnid inhibits the units of hidden Dense layers, and this network has none "
            "before its output; set --config.model.hidden='(300,)'"
        )


def init(key, core, spec):
    """The hook `init` of `Method`: the anchor's state and zero importance of the hidden units."""
    anchor, _ = _ANCHORS[spec.config.slnid.on]
    return SlnidState(
        anchor.init(key, core, spec),
        {path: jnp.zeros(spec.layers[path].outputs) for path in hidden_layers(spec.layers)},
        jnp.float32(spec.config.slnid.strength),
    )


def inhibition(units, importance, weight, scale: float, discount="sum") -> jax.Array:
    r"""How much the units of a layer fire together.

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
      The sum over ordered pairs (each pair counts twice), f32 scalar; not divided by K.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.methods import slnid
      >>> units = jnp.array([[1.0, 3.0], [0.0, 5.0]])
      >>> # Twice the mean of 1 x 3 and 0 x 5.
      >>> float(slnid.inhibition(units, jnp.zeros(2), jnp.ones(2), scale=0.0))
      3.0

    Source: Aljundi et al. 2019 (arXiv 1806.05421), Eq. 5-7. Variant: the paper's discount is
    ``"sum"``, the authors' code takes ``"max"`` unless told otherwise.
    """
    width = units.shape[1]
    both = jnp.add.outer if discount == "sum" else jnp.maximum.outer
    factor = jnp.exp(-both(importance, importance)) * (1.0 - jnp.eye(width))
    if scale:
        place = jnp.arange(width)
        apart = jnp.subtract.outer(place, place) * (scale / width)
        factor = factor * jnp.exp(-0.5 * jnp.square(apart))
    together = (jnp.abs(units) * weight[:, None]).T @ jnp.abs(units) / jnp.sum(weight)
    return jnp.sum(factor * together)


def gradient(grads, core, state, step):
    """The hook `gradient` of `Method`: lambda times that of `inhibition`, then the anchor's."""
    options = step.spec.config.slnid
    pairs = hidden_layers(step.spec.layers)

    def loss(core):
        inputs = step.examples.features(core, step.slots, tuple(pairs.values()))
        return sum(
            inhibition(
                inputs[after],
                state.importance[path],
                step.weight,
                options.scale,
                options.discount,
            )
            for path, after in pairs.items()
        )

    grads = replay.add(grads, jax.grad(loss)(core), state.strength)
    anchor, _ = _ANCHORS[options.on]
    return anchor.gradient(grads, core, state.anchored, step)


def consolidate(core, state, task, ended, spec):
    """The hook `consolidate` of `Method`: the anchor's, and the importance of the units."""
    anchor, of = _ANCHORS[spec.config.slnid.on]
    found = ended.neurons(of)
    return state._replace(
        anchored=anchor.consolidate(core, state.anchored, task, ended, spec),
        importance={path: a + found[path] for path, a in state.importance.items()},
    )


SLNID = Method(
    name="slnid",
    paper="Aljundi et al. 2019, arXiv 1806.05421",
    check=check,
    init=init,
    gradient=gradient,
    consolidate=consolidate,
)
