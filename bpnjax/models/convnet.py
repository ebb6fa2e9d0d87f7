"""A small convolutional network."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bpnjax.models.convolution import conv
from bpnjax.models.pooling import max_pool


class ConvNet(nn.Module):
    """Blocks of 3x3 Conv, ReLU and 2x2 max pooling; then Dense and ReLU layers; then the output.

    Layers are named ``conv_0 ...``, ``hidden_0 ...`` and ``output``. The features behind the
    convolutions may be computed once (``features=True``, [n, d]) and be the input later.
    """

    channels: tuple[int, ...]
    hidden: tuple[int, ...]
    num_classes: int
    dtype: Any = jnp.float32
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array, features: bool = False) -> jax.Array:
        options: dict[str, Any] = {"dtype": self.dtype, "kernel_init": self.kernel_init}
        layer: Callable[..., Any] = partial(nn.Conv, conv_general_dilated=conv, **options)
        dense: Callable[..., Any] = partial(nn.Dense, **options)
        for i, width in enumerate(self.channels if x.ndim > 2 else ()):
            x = nn.relu(layer(width, (3, 3), name=f"conv_{i}")(x))
            x = max_pool(x, (2, 2), "SAME")
        x = x.reshape(x.shape[0], -1)
        if features:
            return x
        for i, width in enumerate(self.hidden):
            x = nn.relu(dense(width, name=f"hidden_{i}")(x))
        return dense(self.num_classes, name="output")(x)
