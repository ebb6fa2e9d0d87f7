"""The paper's network: fully connected, ReLU."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp


class MLP(nn.Module):
    """Flattens its input, then Dense and ReLU layers, then a Dense output.

    Layers are named ``hidden_0 ... hidden_{n-1}`` and ``output``. ``dot_general`` is that of all
    but the first; None is JAX's own, `build` gives `bpnjax.models.product.dot_general`.
    """

    hidden: tuple[int, ...]
    num_classes: int
    dtype: jnp.dtype = jnp.float32
    kernel_init: Callable = nn.initializers.lecun_normal()
    dot_general: Callable | None = None
    input_layer = "hidden_0"  # its kernel's rows are the input's elements, in order

    @nn.compact
    def __call__(self, x):
        options = {"dtype": self.dtype, "kernel_init": self.kernel_init}
        dense = partial(nn.Dense, **options)
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.hidden):
            x = nn.relu(dense(width, name=f"hidden_{i}")(x))
            dense = partial(nn.Dense, dot_general=self.dot_general, **options)
        return dense(self.num_classes, name="output")(x)
