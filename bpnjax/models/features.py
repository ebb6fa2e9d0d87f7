"""Networks whose first layers can be computed once for all images.

Such a network is a Linen module whose ``__call__`` takes ``features``. With ``features=True`` it
returns the output of its first layers, ``[n, ...]``. Called with this output instead of images, it
runs the other layers only. Layers that do not run have no parameters.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

__all__ = ["has_features", "make_extractor", "name_in_state"]

_STATISTICS = "batch_stats"


def has_features(network: Any) -> bool:
    """Whether the first layers of a class of networks can run apart from the rest.

    Args:
      network: a class, or anything else that makes networks.

    Returns:
      True for a Linen class whose ``__call__`` has an argument ``features``.

    Example:
      >>> from bpnjax import models
      >>> from bpnjax.models.features import has_features
      >>> has_features(models.ResNet18), has_features(models.MLP)
      (True, False)
    """
    if not (isinstance(network, type) and hasattr(network, "apply")):
        return False
    return "features" in inspect.signature(network.__call__).parameters


def make_extractor(
    network: Any, arrays: Mapping[str, np.ndarray], scale: Any, shift: Any
) -> Callable[[Any], jax.Array]:
    """The first layers of a network as a compiled function.

    Args:
      network: a module that `has_features`.
      arrays: parameters and statistics of those layers by path, such as
        ``{"conv_0/kernel": array, "batch_stats/norm_0/mean": array}``.
      scale: f32 ``[channels]``.
      shift: f32 ``[channels]``; the network's input is ``image * scale + shift``.

    Returns:
      ``images [n, h, w, channels] -> features [n, ...]``, f32.

    Example:
      >>> import numpy as np
      >>> from bpnjax import models
      >>> from bpnjax.models.features import make_extractor
      >>> network = models.ConvNet(channels=(1,), hidden=(), num_classes=2)
      >>> arrays = {"conv_0/kernel": np.ones((3, 3, 1, 1)), "conv_0/bias": np.zeros(1)}
      >>> make_extractor(network, arrays, scale=2.0, shift=1.0)(np.ones((1, 2, 2, 1))).tolist()
      [[12.0]]
    """
    nested = traverse_util.unflatten_dict(dict(arrays), sep="/")
    statistics = nested.pop(_STATISTICS, {})

    @jax.jit
    def extract(images: Any) -> jax.Array:
        x = images.astype(jnp.float32) * scale + shift
        found = network.apply({"params": nested, _STATISTICS: statistics}, x, features=True)
        return found.astype(jnp.float32)

    return extract


def name_in_state(path: str) -> str:
    """The name that an array of the first layers has in the state of a learner.

    Args:
      path: as in `make_extractor`.

    Returns:
      ``"params/..."``, or ``"variables/batch_stats/..."`` for running statistics.

    Example:
      >>> from bpnjax.models.features import name_in_state
      >>> name_in_state("conv_0/kernel"), name_in_state("batch_stats/norm_0/mean")
      ('params/conv_0/kernel', 'variables/batch_stats/norm_0/mean')
    """
    return f"variables/{path}" if path.startswith(f"{_STATISTICS}/") else f"params/{path}"
