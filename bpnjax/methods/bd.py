"""BD, the beneficial perturbation: a bias per task and layer, learned as a product of factors.

    y = W_shared x + b + M W,   M [1, H], W [H, K]

While the task is learned, W follows its gradient and M takes steps of -epsilon * sign(gradient)
(`bpnjax.optim.beneficial_sign`). Afterwards the product is frozen in a bank ``[T, K]`` and the
factors are dropped. M starts at zero, so the network starts as it was; W starts uniform in
+-1/sqrt(H), since both at zero would never move.

GD is the same with M following its true gradient, the paper's control; GD_MATCHED follows the
gradient's direction with steps of the length of BD's, epsilon * sqrt(H).

Source: Wen et al. 2020 (arXiv 2009.13954), Sec. V, Alg. 1 and 2. The initial values are those of
the lab's prototype of a later paper; this paper does not say.
"""

import jax
import jax.numpy as jnp

from bpnjax import modulation, optim
from bpnjax.methods.base import Method

GROUP = "bd"


def init(key, core, spec):
    del key, core
    layers = modulation.matching(spec.layers, spec.config.bd.layers)
    return {
        path: {"bias": jnp.zeros((spec.num_tasks, layer.outputs))} for path, layer in layers.items()
    }


def fresh(key, spec):
    hidden = spec.config.bd.hidden_dim
    bound = hidden**-0.5
    layers = modulation.matching(spec.layers, spec.config.bd.layers)
    factors = {}
    keys = jax.random.split(key, len(layers))
    for layer_key, (path, layer) in zip(keys, layers.items(), strict=True):
        factors[path] = {
            "M": jnp.zeros((1, hidden)),
            "W": jax.random.uniform(
                layer_key, (hidden, layer.outputs), minval=-bound, maxval=bound
            ),
        }
    return {GROUP: factors}


def product(factors):
    """The biases that factors stand for: ``{path: {"bias": (M @ W)[0]}}``, ``[K]`` each."""
    return {path: {"bias": (f["M"] @ f["W"])[0]} for path, f in factors.items()}


def train_mode(learned, mode):
    return modulation.merge(mode, product(learned[GROUP]))


def store(core, learned, state, task):
    del core
    biases = product(learned[GROUP])
    return {
        path: {"bias": kept["bias"].at[task].set(biases[path]["bias"])}
        for path, kept in state.items()
    }


def _make(name, rules):
    return Method(
        name=name,
        paper="Wen et al. 2020, arXiv 2009.13954",
        told_task=True,
        layer_fields=("bd",),
        init=init,
        fresh=fresh,
        rules=rules,
        mode=modulation.select,
        train_mode=train_mode,
        store=store,
        stored=lambda state: {"bank": state},
    )


def _bd_rules(config, optimizer):
    return (
        (f"^{GROUP}/.*/M$", optim.beneficial_sign(config.bd.epsilon)),
        (f"^{GROUP}/.*/W$", optimizer(config.bd.learning_rate)),
    )


def _gd_rules(config, optimizer):
    return ((f"^{GROUP}/.*/[MW]$", optimizer(config.bd.learning_rate)),)


def _gd_matched_rules(config, optimizer):
    return (
        (f"^{GROUP}/.*/M$", optim.matched_step(config.bd.epsilon)),
        (f"^{GROUP}/.*/W$", optimizer(config.bd.learning_rate)),
    )


BD = _make("bd", _bd_rules)
GD = _make("gd", _gd_rules)
GD_MATCHED = _make("gd_matched", _gd_matched_rules)
