"""Plain Flax networks; they know nothing of tasks."""

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import ConfigDict

from bpnjax.models.alexnet import AlexNet
from bpnjax.models.convnet import ConvNet
from bpnjax.models.mlp import MLP
from bpnjax.models.pretrained import is_ours
from bpnjax.models.small_alexnet import SmallAlexNet

NAMES = ("mlp", "convnet", "alexnet", "small_alexnet")
DTYPES = ("float32", "bfloat16")

__all__ = ["DTYPES", "MLP", "NAMES", "AlexNet", "ConvNet", "SmallAlexNet", "build"]


def build(config: ConfigDict, num_classes: int) -> nn.Module:
    """The network that a run's configuration names.

    Args:
      config: the group `config.model`.
      num_classes: outputs of the last layer.

    Returns:
      A Linen module, not initialised.

    Example:
      >>> from bpnjax import config, models
      >>> settings = config.default().model
      >>> settings.hidden = (64, 32)
      >>> models.build(settings, num_classes=10).hidden
      (64, 32)
    """
    dtype = jnp.dtype(config.dtype)
    hidden = tuple(config.hidden)
    kernel_init = getattr(nn.initializers, config.kernel_init)()
    if config.name == "mlp":
        return MLP(hidden, num_classes, dtype, kernel_init)
    channels = tuple(config.channels)
    if config.name == "small_alexnet":
        return SmallAlexNet(num_classes, channels, hidden, config.dropout, dtype, kernel_init)
    if config.name == "alexnet":
        theirs = "" if is_ours(config.pretrained) else config.pretrained
        options = {"dtype": dtype, "kernel_init": kernel_init, "pretrained": theirs}
        return AlexNet(num_classes, channels, hidden, config.dropout, **options)
    return ConvNet(channels, hidden, num_classes, dtype, kernel_init)
