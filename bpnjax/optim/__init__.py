"""Gradient transformations for any JAX code. All are plain optax transformations.

They may be chained, partitioned, vmapped and jitted as any other transformation of optax.
"""

from bpnjax.optim.anchor import (
    add_quadratic_anchor,
    anchor_gradient,
    anchor_penalty,
    pull_to_anchor,
)
from bpnjax.optim.beneficial import (
    OPTIMIZERS,
    beneficial_perturbation,
    beneficial_sign,
    falling,
    matched_step,
    relative_step,
)
from bpnjax.optim.partition import layer_rates, parse_rates, partition_by_path

__all__ = [
    "OPTIMIZERS",
    "add_quadratic_anchor",
    "anchor_gradient",
    "anchor_penalty",
    "beneficial_perturbation",
    "beneficial_sign",
    "falling",
    "layer_rates",
    "matched_step",
    "parse_rates",
    "partition_by_path",
    "pull_to_anchor",
    "relative_step",
]
