"""The paper's network: fully connected with ReLU."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class MLP(nn.Module):
    """Flattens its input, then Dense and ReLU layers, then a Dense output.

    Layers are named ``hidden_0 ... hidden_{n-1}`` and ``output``.
    """

    hidden: tuple[int, ...]
    num_classes: int
    dtype: Any = jnp.float32
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=self.kernel_init)
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.hidden):
            x = nn.relu(dense(width, name=f"hidden_{i}")(x))
        return dense(self.num_classes, name="output")(x)
