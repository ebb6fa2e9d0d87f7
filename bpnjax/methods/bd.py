r"""BD, the beneficial perturbation: a bias per task and layer, learned as a product of factors.

.. math:: y = W_{shared} x + b + M W, \quad M \in R^{1 \times H}, \quad W \in R^{H \times K}

While the task is learned, W follows its gradient and M takes steps of -epsilon * sign(gradient)
(`bpnjax.optim.beneficial_sign`). Afterwards the product is frozen in a bank ``[T, K]`` and the
factors are dropped. M starts at zero, so the network starts as it was; W starts uniform in
+-1/sqrt(H), since both at zero would never move.

GD is the same with M following its true gradient, the paper's control; GD_MATCHED follows the
gradient's direction with steps of the length of BD's, epsilon * sqrt(H).

Source: Wen et al. 2020 (arXiv 2009.13954), Sec. V, Alg. 1 and 2. Variant: the step of M is its
whole update, no learning rate multiplies it (the paper does not say what it is handed to); every
layer gets a bias, convolutions too, unless `bd.layers` chooses (the paper: fully connected layers
only, the output layer among them); initial values are those of the lab's prototype of a later
paper.
"""

import jax
import jax.numpy as jnp

from bpnjax import optim
from bpnjax.methods.base import Method
from bpnjax.networks import linen

GROUP = "bd"


def empty_bank(layers, num_tasks: int):
    """A bank of zero biases: every task's mode is the plain network until it is frozen.

    Args:
      layers: ``{path: Layer}`` as `bpnjax.networks.linen.find_layers` gives, or a part of it.
      num_tasks: T.

    Returns:
      ``{path: {"bias": f32 [T, K]}}``, K the outputs of a layer.

    Example:
      >>> from bpnjax.networks.layers import Layer
      >>> from bpnjax.methods import bd
      >>> layers = {"out": Layer("dense", 4, 3, 1, 2, (1, 3))}
      >>> bd.empty_bank(layers, num_tasks=2)["out"]["bias"].shape
      (2, 3)
    """
    return {path: {"bias": jnp.zeros((num_tasks, layer.outputs))} for path, layer in layers.items()}


def init_factors(key, layers, hidden_dim: int):
    r"""Factors for a new task: M zero, W uniform in +-1/sqrt(H).

    .. math:: M = 0, \quad W_{ij} \sim U(-1 / \sqrt{H}, 1 / \sqrt{H})

    Their product is zero, so the network starts as it was. A first step of epsilon on M moves the
    bias by about 0.46 epsilon sqrt(H) against the gradient, whatever the gradient's length, and by
    epsilon sqrt(K / 3) across it: H acts like a step size, and a small H leaves the direction to
    chance.

    Args:
      key: typed PRNG key.
      layers: ``{path: Layer}`` as `bpnjax.networks.linen.find_layers` gives.
      hidden_dim: H.

    Returns:
      ``{path: {"M": f32 [1, H], "W": f32 [H, K]}}``; ``bpnjax.optim.beneficial_perturbation`` is
      the transform that trains them, `product` the biases they stand for.

    Example:
      >>> import jax
      >>> from bpnjax.networks.layers import Layer
      >>> from bpnjax.methods import bd
      >>> layers = {"out": Layer("dense", 4, 3, 1, 2, (1, 3))}
      >>> factors = bd.init_factors(jax.random.key(0), layers, hidden_dim=16)
      >>> factors["out"]["M"].shape, factors["out"]["W"].shape
      ((1, 16), (16, 3))
      >>> bd.product(factors)["out"]["bias"].tolist()
      [0.0, 0.0, 0.0]

    Source: Wen et al. 2020 (arXiv 2009.13954), Sec. V. Variant: the paper does not say how they
    start; these are the values of the lab's prototype of a later paper.
    """
    bound = hidden_dim**-0.5
    factors = {}
    for layer_key, (path, layer) in zip(
        jax.random.split(key, len(layers)), layers.items(), strict=True
    ):
        shape = (hidden_dim, layer.outputs)
        factors[path] = {
            "M": jnp.zeros((1, hidden_dim)),
            "W": jax.random.uniform(layer_key, shape, minval=-bound, maxval=bound),
        }
    return factors


def init(key, core, spec):
    """The hook `init` of `Method`: the `empty_bank` of the layers that `bd.layers` names."""
    del key, core
    return empty_bank(linen.matching(spec.layers, spec.config.bd.layers), spec.num_tasks)


def fresh(key, spec):
    """The hook `fresh` of `Method`: ``{"bd": factors}`` as `init_factors` draws them."""
    layers = linen.matching(spec.layers, spec.config.bd.layers)
    return {GROUP: init_factors(key, layers, spec.config.bd.hidden_dim)}


def product(factors):
    r"""The biases that factors stand for.

    .. math:: bias = M W

    Args:
      factors: ``{path: {"M": [1, H], "W": [H, K]}}`` as `init_factors` gives.

    Returns:
      A mode, ``{path: {"bias": [K]}}``, differentiable for the factors.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.methods import bd
      >>> factors = {"out": {"M": jnp.array([[1.0, -1.0]]), "W": jnp.array([[3.0], [1.0]])}}
      >>> bd.product(factors)["out"]["bias"].tolist()
      [2.0]

    Source: Wen et al. 2020 (arXiv 2009.13954), Sec. V.
    """
    # As a matrix product its gradient for W would be written out before W's optimizer reads it.
    return {path: {"bias": jnp.sum(f["M"].T * f["W"], 0)} for path, f in factors.items()}


def train_mode(learned, mode):
    """The hook `train_mode` of `Method`: the mode with the `product` of the factors added."""
    return linen.merge(mode, product(learned[GROUP]))


def freeze(bank, biases, task):
    """Puts the biases of a task into a bank, where nothing changes them any more.

    Args:
      bank: ``{path: {"bias": [T, K]}}`` as `empty_bank` gives.
      biases: ``{path: {"bias": [K]}}`` as `product` gives.
      task: int scalar, may be traced; one beyond T changes nothing.

    Returns:
      The new bank.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.methods import bd
      >>> bank = {"out": {"bias": jnp.zeros((2, 1))}}
      >>> bd.freeze(bank, {"out": {"bias": jnp.array([2.0])}}, 1)["out"]["bias"].tolist()
      [[0.0], [2.0]]
    """
    return {
        path: {"bias": kept["bias"].at[task].set(biases[path]["bias"])}
        for path, kept in bank.items()
    }


def store(core, learned, state, task):
    """The hook `store` of `Method`: the bank with the task's product frozen in it."""
    del core
    return freeze(state, product(learned[GROUP]), task)


def _make(name, rules):
    return Method(
        name=name,
        paper="Wen et al. 2020, arXiv 2009.13954",
        told_task=True,
        layer_fields=("bd",),
        init=init,
        fresh=fresh,
        rules=rules,
        mode=linen.select,
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
