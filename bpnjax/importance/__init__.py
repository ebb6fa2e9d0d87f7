"""How much each parameter matters: Fisher information, sensitivity, units, Kronecker factors."""

from bpnjax.importance.measures import (
    FISHER_KINDS,
    NEURON_KINDS,
    fisher,
    fisher_sum,
    neurons,
    neurons_sum,
    sensitivity,
    sensitivity_sum,
)

__all__ = [
    "FISHER_KINDS",
    "NEURON_KINDS",
    "fisher",
    "fisher_sum",
    "neurons",
    "neurons_sum",
    "sensitivity",
    "sensitivity_sum",
]
