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

from bpnjax.errors import UserError
from bpnjax.methods import ewc, mas, replay
from bpnjax.methods.base import Method

_ANCHORS = {"mas": (mas.MAS, "output_norm"), "ewc": (ewc.EWC, "loss")}


class SlnidState(NamedTuple):
    """What SLNID keeps beside the anchor it is combined with."""

    anchored: Any  # the state of MAS or EWC
    importance: dict[str, jax.Array]  # {hidden layer: f32 [K]}, summed over tasks
    strength: jax.Array  # lambda, shape=()


def hidden_layers(layers) -> dict[str, str]:
    """The Dense layers whose units go into another Dense layer, as ``{layer: the next one}``."""
    return {
        path: after
        for path, after in itertools.pairwise(layers)
        if all(layers[p].kind == "dense" and layers[p].rank == 2 for p in (path, after))
        and layers[after].inputs == layers[path].outputs
    }


def check(spec):
    if not hidden_layers(spec.layers):
        raise UserError(
            "method: slnid inhibits the units of hidden Dense layers, and this network has none "
            "before its output; set --config.model.hidden='(300,)'"
        )


def init(key, core, spec):
    anchor, _ = _ANCHORS[spec.config.slnid.on]
    return SlnidState(
        anchor.init(key, core, spec),
        {path: jnp.zeros(spec.layers[path].outputs) for path in hidden_layers(spec.layers)},
        jnp.float32(spec.config.slnid.strength),
    )


def inhibition(units, importance, weight, scale: float, discount="sum") -> jax.Array:
    """How much the units of a layer fire together, f32 scalar; the formula is above.

    Args:
      units: h, f32 ``[n, K]``.
      importance: a, f32 ``[K]``.
      weight: f32 ``[n]``, 0 for padding.
      scale: K / sigma; 0 for no locality.
      discount: ``"sum"`` or ``"max"``.

    Returns:
      The sum over pairs, f32 scalar.
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
