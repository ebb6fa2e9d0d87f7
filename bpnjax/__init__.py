"""bpnjax: continual learning with the Beneficial Perturbation Network, in JAX and Flax.

learner = bpnjax.learner(network, method, optimizer, num_tasks)   # any network, any loop
predictor = bpnjax.load("runs/mnist/bd_ewc")                      # a run of the command
"""

from bpnjax import importance, methods, modes, networks, optim
from bpnjax.evaluation import metrics
from bpnjax.learner import Learner, State, learner
from bpnjax.methods import Method
from bpnjax.modes import merge, select
from bpnjax.networks import Network, modulated_apply
from bpnjax.run.predictor import Predictor, load
from bpnjax.version import __version__

__all__ = [
    "Learner",
    "Method",
    "Network",
    "Predictor",
    "State",
    "__version__",
    "importance",
    "learner",
    "load",
    "merge",
    "methods",
    "metrics",
    "modes",
    "modulated_apply",
    "networks",
    "optim",
    "select",
]
