"""bpnjax: continual learning with the Beneficial Perturbation Network, in JAX and Flax."""

from bpnjax import importance, keys, loop, metrics, modulation, optim
from bpnjax.modulation import modulated_apply, select
from bpnjax.predictor import Predictor, load
from bpnjax.version import __version__

__all__ = [
    "Predictor",
    "__version__",
    "importance",
    "keys",
    "load",
    "loop",
    "metrics",
    "modulated_apply",
    "modulation",
    "optim",
    "select",
]
