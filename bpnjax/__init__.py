"""bpnjax: continual learning with the Beneficial Perturbation Network, in JAX and Flax."""

from bpnjax import importance, optim
from bpnjax.evaluation import metrics
from bpnjax.evaluation.predictor import Predictor, load
from bpnjax.modes import keys
from bpnjax.networks import linen
from bpnjax.networks.linen import modulated_apply, select
from bpnjax.training import loop
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
