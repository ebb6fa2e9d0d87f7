"""AlexNet in one tower, as in torchvision."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bpnjax.models.convolution import conv

CHANNELS = (64, 192, 384, 256, 256)
HIDDEN = (4096, 4096)
SMALLEST = 63  # pixels per side; a smaller image leaves nothing for the last pooling
_GRID = 6  # cells per side, over which the features are averaged
# For each convolution: kernel size, stride, padding, and whether max pooling follows.
_CONVS = ((11, 4, 2, True), (5, 1, 2, True), (3, 1, 1, False), (3, 1, 1, False), (3, 1, 1, True))


def adaptive_average_pool(x: jax.Array, cells: int) -> jax.Array:
    r"""Averages an image of any size into a square of cells.

    .. math:: y_{ij} = \mathrm{mean}\{x_{uv} : \lfloor i h / c \rfloor \le u < \lceil (i + 1) h / c
              \rceil, \lfloor j w / c \rfloor \le v < \lceil (j + 1) w / c \rceil\}

    Args:
      x: ``[n, h, w, channels]``.
      cells: c, the number of cells per side. Neighbouring cells overlap if it does not divide h or
        w.

    Returns:
      ``[n, cells, cells, channels]``, in the dtype of ``x``.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.models.alexnet import adaptive_average_pool
      >>> x = jnp.array([0.0, 1.0, 5.0]).reshape(1, 1, 3, 1)
      >>> adaptive_average_pool(x, 2)[0, 0, :, 0].tolist()
      [0.5, 3.0]

    Source: ``AdaptiveAvgPool2d`` of PyTorch.
    """
    if x.shape[1:3] == (cells, cells):
        return x
    rows, columns = (jnp.asarray(_averages(length, cells), x.dtype) for length in x.shape[1:3])
    return jnp.einsum("ih,nhwc,jw->nijc", rows, x, columns)


def _averages(length: int, cells: int) -> np.ndarray:
    """The matrix ``[cells, length]`` whose rows average over one cell."""
    matrix = np.zeros((cells, length))
    for i, row in enumerate(matrix):
        start, stop = i * length // cells, -(-(i + 1) * length // cells)
        row[start:stop] = 1 / (stop - start)
    return matrix


class AlexNet(nn.Module):
    """Five convolutions, an average over 6 x 6 cells, two Dense layers with dropout, the output.

    Layers are named ``conv_0 ... conv_4``, ``fc6``, ``fc7`` and ``output``. Dropout acts on the
    inputs of ``fc6`` and ``fc7`` if the call gets a PRNG key for it, ``rngs={"dropout": key}``.
    Without a key the network is deterministic.

    The features behind the convolutions may be computed once (``features=True``, [n, d]) and be the
    input later.

    With the default widths it equals torchvision's network, for weights that
    `bpnjax.models.torch_weights.alexnet_params` converts.
    """

    num_classes: int
    channels: tuple[int, ...] = CHANNELS
    hidden: tuple[int, ...] = HIDDEN
    dropout: float = 0.5
    dtype: Any = jnp.float32
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array, features: bool = False) -> jax.Array:
        of_images = x.ndim > 2
        if of_images and min(x.shape[1:3]) < SMALLEST:
            raise ValueError(
                f"AlexNet needs images of at least {SMALLEST} x {SMALLEST} pixels, not "
                f"{x.shape[1]} x {x.shape[2]}; enlarge them (dataset.resize)"
            )
        options: dict[str, Any] = {"dtype": self.dtype, "kernel_init": self.kernel_init}
        convolution: Callable[..., Any] = partial(nn.Conv, conv_general_dilated=conv, **options)
        dense: Callable[..., Any] = partial(nn.Dense, **options)
        drop = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))
        for i, (width, (size, stride, pad, pooled)) in enumerate(
            zip(self.channels, _CONVS, strict=True) if of_images else ()
        ):
            layer = convolution(width, (size, size), stride, [(pad, pad)] * 2, name=f"conv_{i}")
            x = nn.relu(layer(x))
            if pooled:
                x = nn.max_pool(x, (3, 3), (2, 2), padding="VALID")
        if of_images:
            x = adaptive_average_pool(x, _GRID).reshape(x.shape[0], -1)
        if features:
            return x
        for name, width in zip(("fc6", "fc7"), self.hidden, strict=True):
            x = nn.relu(dense(width, name=name)(drop(x)))
        return dense(self.num_classes, name="output")(x)
