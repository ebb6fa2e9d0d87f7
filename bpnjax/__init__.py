"""bpnjax: continual learning with the Beneficial Perturbation Network, in JAX and Flax."""

from bpnjax import importance, keys, metrics, modulation, optim
from bpnjax.modulation import modulated_apply, select
from bpnjax.version import __version__

__all__ = [
    "__version__",
    "importance",
    "keys",
    "metrics",
    "modulated_apply",
    "modulation",
    "optim",
    "select",
]
