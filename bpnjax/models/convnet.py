"""A small convolutional network."""

import flax.linen as nn
import jax.numpy as jnp


class ConvNet(nn.Module):
    """Per channel count a 3x3 Conv, ReLU and 2x2 max pooling; then Dense and ReLU; then the output.

    Layers are named ``conv_0 ...``, ``hidden_0 ...`` and ``output``.
    """

    channels: tuple[int, ...]
    hidden: tuple[int, ...]
    num_classes: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        for i, width in enumerate(self.channels):
            x = nn.relu(nn.Conv(width, (3, 3), dtype=self.dtype, name=f"conv_{i}")(x))
            x = nn.max_pool(x, (2, 2), (2, 2), padding="SAME")
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.hidden):
            x = nn.relu(nn.Dense(width, dtype=self.dtype, name=f"hidden_{i}")(x))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="output")(x)
