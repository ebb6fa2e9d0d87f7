"""The paper's network: fully connected, ReLU."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp


class MLP(nn.Module):
    """Flattens its input, then Dense and ReLU layers, then a Dense output.

    Layers are named ``hidden_0 ... hidden_{n-1}`` and ``output``.
    """

    hidden: tuple[int, ...]
    num_classes: int
    dtype: jnp.dtype = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x):
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=self.kernel_init)
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.hidden):
            x = nn.relu(dense(width, name=f"hidden_{i}")(x))
        return dense(self.num_classes, name="output")(x)
