"""The paper's network: fully connected, ReLU."""

import flax.linen as nn
import jax.numpy as jnp


class MLP(nn.Module):
    """Flattens its input, then Dense and ReLU layers, then a Dense output.

    Layers are named ``hidden_0 ... hidden_{n-1}`` and ``output``.
    """

    hidden: tuple[int, ...]
    num_classes: int
    dtype: jnp.dtype = jnp.float32
    input_layer = "hidden_0"  # its kernel's rows are the input's elements, in order

    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.hidden):
            x = nn.relu(nn.Dense(width, dtype=self.dtype, name=f"hidden_{i}")(x))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="output")(x)
