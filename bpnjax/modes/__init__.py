"""What a mode is: the vectors of a task for each layer, and banks of them for all tasks."""

from bpnjax.modes.bank import merge, select, store
from bpnjax.modes.keys import GateSeeds, KeySeeds, drawn, gate_bank, is_seed, key_bank
from bpnjax.modes.vectors import MODULATIONS, VECTORS, Modulation

__all__ = [
    "MODULATIONS",
    "VECTORS",
    "GateSeeds",
    "KeySeeds",
    "Modulation",
    "drawn",
    "gate_bank",
    "is_seed",
    "key_bank",
    "merge",
    "select",
    "store",
]
