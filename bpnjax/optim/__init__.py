"""Gradient transformations for anyone's JAX code; all are plain optax transformations.

They may be chained, partitioned, vmapped and jitted as any other transformation of optax.
"""

from bpnjax.optim.anchor import add_quadratic_anchor, anchor_gradient, anchor_penalty
from bpnjax.optim.beneficial import (
    OPTIMIZERS,
    beneficial_perturbation,
    beneficial_sign,
    matched_step,
)
from bpnjax.optim.partition import layer_rates, parse_rates, partition_by_path

__all__ = [
    "OPTIMIZERS",
    "add_quadratic_anchor",
    "anchor_gradient",
    "anchor_penalty",
    "beneficial_perturbation",
    "beneficial_sign",
    "layer_rates",
    "matched_step",
    "parse_rates",
    "partition_by_path",
]
