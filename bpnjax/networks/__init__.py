"""Networks as bpnjax sees them: one adapter file per framework."""

from bpnjax.networks.base import Network, add_bias, from_function, measured
from bpnjax.networks.layers import Layer, Layers, matching
from bpnjax.networks.linen import find_layers, from_linen, modulated_apply
from bpnjax.networks.nnx import from_nnx

__all__ = [
    "Layer",
    "Layers",
    "Network",
    "add_bias",
    "find_layers",
    "from_function",
    "from_linen",
    "from_nnx",
    "matching",
    "measured",
    "modulated_apply",
]
