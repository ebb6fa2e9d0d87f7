"""How bpnjax sees a network: one adapter file per framework."""

from bpnjax.networks.base import Network, from_function, in_own_units, measured, modulate
from bpnjax.networks.layers import Layer, Layers, matching
from bpnjax.networks.linen import find_layers, from_linen, modulated_apply
from bpnjax.networks.nnx import from_nnx

__all__ = [
    "Layer",
    "Layers",
    "Network",
    "find_layers",
    "from_function",
    "from_linen",
    "from_nnx",
    "in_own_units",
    "matching",
    "measured",
    "modulate",
    "modulated_apply",
]
