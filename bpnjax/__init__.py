"""bpnjax: continual learning with the Beneficial Perturbation Network, in JAX and Flax.

learner = bpnjax.learner(network, method, optimizer, num_tasks)   # any network, any loop
predictor = bpnjax.load("runs/mnist/bd_ewc")                      # a run of the command
bpnjax.export("runs/mnist/bd_ewc", "mnist.stablehlo")             # a program that needs only JAX
"""

import importlib
import importlib.util
import sys
import types
from typing import TYPE_CHECKING, Any

from bpnjax.version import __version__

if TYPE_CHECKING:
    from bpnjax import importance, methods, modes, networks, optim
    from bpnjax.evaluation import metrics
    from bpnjax.learner import Learner, State, learner
    from bpnjax.methods import Method
    from bpnjax.modes import merge, select
    from bpnjax.networks import Network, modulated_apply
    from bpnjax.run.predictor import Predictor, load
    from bpnjax.run.stablehlo import export
    from bpnjax.run.train import train_and_evaluate as train

# Where each name is. It is imported at its first use, because importing JAX takes a second.
_PLACES = {
    "Learner": "learner:Learner",
    "Method": "methods:Method",
    "Network": "networks:Network",
    "Predictor": "run.predictor:Predictor",
    "State": "learner:State",
    "export": "run.stablehlo:export",
    "learner": "learner:learner",
    "load": "run.predictor:load",
    "merge": "modes:merge",
    "metrics": "evaluation.metrics",
    "modulated_apply": "networks:modulated_apply",
    "select": "modes:select",
    "train": "run.train:train_and_evaluate",
}

__all__ = [
    "Learner",
    "Method",
    "Network",
    "Predictor",
    "State",
    "__version__",
    "export",
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
    "train",
]


class _Package(types.ModuleType):
    """The module bpnjax, whose names are imported at their first use."""

    def __getattr__(self, name: str) -> Any:
        module, _, attribute = _PLACES.get(name, name).partition(":")
        full = f"{__name__}.{module}"
        if name.startswith("__") or (name not in _PLACES and not importlib.util.find_spec(full)):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = importlib.import_module(full)
        found = getattr(found, attribute) if attribute else found
        setattr(self, name, found)
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing the module bpnjax.learner would otherwise replace the function of that name.
        if name == "learner" and isinstance(value, types.ModuleType):
            value = value.learner
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
