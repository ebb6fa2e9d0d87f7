"""bpnjax: continual learning with the Beneficial Perturbation Network, in JAX and Flax."""

from bpnjax import importance, metrics, modulation, optim
from bpnjax.modulation import modulated_apply, select

__version__ = "0.1.0"
__all__ = ["importance", "metrics", "modulated_apply", "modulation", "optim", "select"]
