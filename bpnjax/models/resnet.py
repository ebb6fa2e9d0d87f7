"""ResNet-18 in its usual form for small images."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bpnjax.models.convolution import conv

_STAGES = 4  # each but the first halves rows and columns and doubles the channels
_BLOCKS = 2  # blocks per stage


class _Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and the input added before the last ReLU."""

    channels: int
    stride: int
    layer: Callable[..., Any]
    norm: Callable[..., Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.layer(self.channels, (3, 3), self.stride, 1, name="conv_0")(x)
        y = nn.relu(self.norm(name="norm_0")(y))
        y = self.norm(name="norm_1")(self.layer(self.channels, (3, 3), 1, 1, name="conv_1")(y))
        if self.stride > 1 or x.shape[-1] != self.channels:
            x = self.layer(self.channels, (1, 1), self.stride, 0, name="shortcut")(x)
            x = self.norm(name="shortcut_norm")(x)
        return nn.relu(x + y)


class ResNet18(nn.Module):
    r"""ResNet-18 for images of about 32 x 32 pixels, with stride 1 and no pooling at the start.

    .. math:: x \leftarrow \mathrm{relu}(s(x) + \mathrm{norm}(W_1\,\mathrm{relu}(\mathrm{norm}(W_0
              x))))

    in eight blocks, two per stage, with 1, 2, 4 and 8 times ``width`` channels. s is a 1x1
    convolution with BatchNorm where shapes differ, else the identity. The mean over rows and
    columns and the output follow. Convolutions have no bias. Layers are named ``conv_0``,
    ``block_<stage>_<i>/conv_0``, ``.../conv_1``, ``.../shortcut`` and ``output``. The input of the
    output layer may be computed once (``features=True``, [n, 8 width]) and be the input later.

    Args:
      num_classes: number of outputs.
      width: channels of the first stage; 64 is the full network (11.2 million parameters), 20 the
        reduced one of the online setting (1.1 million).
      dtype: of the computation.
      kernel_init: initializer of kernels.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from bpnjax.models.resnet import ResNet18
      >>> x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
      >>> made = jax.eval_shape(ResNet18(num_classes=10, width=20).init, jax.random.key(0), x)
      >>> sum(leaf.size for leaf in jax.tree.leaves(made["params"]))
      1094750

    Source: He et al. 2016 (arXiv 1512.03385); the form for CIFAR as in GEM (Lopez-Paz and Ranzato
    2017, width 20) and Mammoth (width 64).
    """

    num_classes: int
    width: int = 64
    dtype: Any = jnp.float32
    kernel_init: Callable[..., Any] = nn.initializers.he_normal()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, features: bool = False) -> jax.Array:
        options: dict[str, Any] = {"dtype": self.dtype, "kernel_init": self.kernel_init}
        layer: Callable[..., Any] = partial(_conv, **options)
        # PyTorch's momentum 0.1 is Flax's 0.9.
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
        if x.ndim > 2:
            x = nn.relu(norm(name="norm_0")(layer(self.width, (3, 3), 1, 1, name="conv_0")(x)))
            for stage in range(_STAGES):
                for i in range(_BLOCKS):
                    stride = 2 if stage and not i else 1
                    channels = self.width << stage
                    x = _Block(channels, stride, layer, norm, name=f"block_{stage}_{i}")(x)
            x = x.mean((1, 2))
        if features:
            return x
        return nn.Dense(self.num_classes, name="output", **options)(x)


def _conv(
    channels: int, size: tuple[int, int], stride: int, padding: int, **options: Any
) -> nn.Conv:
    """A convolution without bias, padded equally on all sides as in PyTorch."""
    pads = [(padding, padding)] * 2
    return nn.Conv(
        channels, size, stride, pads, use_bias=False, conv_general_dilated=conv, **options
    )
