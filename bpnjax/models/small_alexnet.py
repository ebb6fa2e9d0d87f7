"""A small AlexNet for images of 32 x 32 pixels."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bpnjax.models.convolution import conv
from bpnjax.models.pooling import max_pool

CHANNELS = (32, 64, 96, 64, 64)
HIDDEN = (512, 512)
SMALLEST = 8  # pixels per side; three poolings leave one
_POOLED = (0, 1, 4)  # convolutions that max pooling follows


class SmallAlexNet(nn.Module):
    """Five 3 x 3 convolutions, two Dense layers with dropout, the output.

    As in AlexNet, max pooling (here 2 x 2) follows the first, second and fifth convolution, and the
    layers are named ``conv_0 ... conv_4``, ``fc6``, ``fc7`` and ``output``. Dropout acts on the
    inputs of ``fc6`` and ``fc7`` if the call gets ``rngs={"dropout": key}``.

    The features behind the convolutions may be computed once (``features=True``, f32 [n, d]) and be
    the input later. An input of two dimensions counts as features, and the convolutions then have
    no parameters.
    """

    num_classes: int
    channels: tuple[int, ...] = CHANNELS
    hidden: tuple[int, ...] = HIDDEN
    dropout: float = 0.5
    dtype: Any = jnp.float32
    kernel_init: Callable[..., Any] = nn.initializers.he_normal()

    @nn.compact
    def __call__(self, x: jax.Array, features: bool = False) -> jax.Array:
        options: dict[str, Any] = {"dtype": self.dtype, "kernel_init": self.kernel_init}
        if x.ndim > 2:
            if min(x.shape[1:3]) < SMALLEST:
                raise ValueError(
                    f"it needs images of at least {SMALLEST} x {SMALLEST} pixels, not "
                    f"{x.shape[1]} x {x.shape[2]}; enlarge them (dataset.resize)"
                )
            for i, width in enumerate(self.channels):
                x = nn.relu(
                    nn.Conv(width, (3, 3), name=f"conv_{i}", conv_general_dilated=conv, **options)(
                        x
                    )
                )
                if i in _POOLED:
                    x = max_pool(x, (2, 2))
            x = x.reshape(x.shape[0], -1)
        if features:
            return x
        dense: Callable[..., Any] = partial(nn.Dense, **options)
        drop = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))
        for name, width in zip(("fc6", "fc7"), self.hidden, strict=True):
            x = nn.relu(dense(width, name=name)(drop(x)))
        return dense(self.num_classes, name="output")(x)
