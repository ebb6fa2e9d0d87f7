"""A small vision transformer."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bpnjax.models.convolution import conv


class _Block(nn.Module):
    """Attention and two Dense layers, each after a norm and added to its input."""

    heads: int
    hidden: int
    drop: Callable[[jax.Array], jax.Array]
    dtype: Any
    kernel_init: Callable[..., Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        options: dict[str, Any] = {"dtype": self.dtype, "kernel_init": self.kernel_init}
        dense: Callable[..., Any] = partial(nn.Dense, **options)
        y = nn.LayerNorm(dtype=self.dtype, name="norm_0")(x)
        y = nn.MultiHeadDotProductAttention(self.heads, name="attention", **options)(y)
        x = x + self.drop(y)
        y = nn.LayerNorm(dtype=self.dtype, name="norm_1")(x)
        y = self.drop(nn.gelu(dense(self.hidden, name="mlp_0")(y), approximate=False))
        return x + self.drop(dense(x.shape[-1], name="mlp_1")(y))


class ViT(nn.Module):
    r"""A vision transformer with pre-layer norms, for images of about 32 x 32 pixels.

    .. math:: x \leftarrow x + \mathrm{attention}(\mathrm{norm}_0(x)), \quad
              x \leftarrow x + W_1\,\mathrm{gelu}(W_0\,\mathrm{norm}_1(x))

    in each block. x starts as a linear map of each patch plus a learned position. After the blocks
    come a norm, the mean over the patches, and the output. Layers are named ``embed``,
    ``block_<i>/attention/query|key|value|out``, ``block_<i>/mlp_0``, ``.../mlp_1`` and ``output``.
    Dropout acts if the call gets ``rngs={"dropout": key}``. Without dropout the input of the output
    layer may be computed once (``features=True``, [n, dim]) and be the input later.

    Args:
      num_classes: number of outputs.
      patch: pixels per side of a patch; it must divide both sides of the images.
      depth: number of blocks.
      dim: width of a patch's vector.
      heads: number of attention heads; it must divide ``dim``.
      mlp: width between the two Dense layers of a block, as a multiple of ``dim``.
      dropout: share dropped from the sum of patch and position, and from the outputs of attention
        and of each Dense layer in a block.
      pool: ``"mean"``, or ``"token"`` for an output that reads a learned vector put before the
        patches.
      dtype: of the computation.
      kernel_init: initializer of kernels.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from bpnjax.models import ViT
      >>> x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
      >>> made = jax.eval_shape(ViT(num_classes=10).init, jax.random.key(0), x)
      >>> sum(leaf.size for leaf in jax.tree.leaves(made["params"]))
      2693194

    Source: Dosovitskiy et al. 2021 (arXiv 2010.11929), with the mean instead of a token as in Beyer
    et al. 2022 (arXiv 2205.01580). The default has the width and heads of ViT-Ti and half its
    depth.
    """

    num_classes: int
    patch: int = 4
    depth: int = 6
    dim: int = 192
    heads: int = 3
    mlp: float = 4.0
    dropout: float = 0.0
    pool: str = "mean"
    dtype: Any = jnp.float32
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array, features: bool = False) -> jax.Array:
        if features and self.dropout:
            raise ValueError(
                f"with dropout={self.dropout} its features differ from step to step; leave it out "
                "(model.options)"
            )
        options: dict[str, Any] = {"dtype": self.dtype, "kernel_init": self.kernel_init}
        if x.shape[1:] != (self.dim,):
            x = self._features(x, **options)
        return x if features else nn.Dense(self.num_classes, name="output", **options)(x)

    def _features(self, x: jax.Array, **options: Any) -> jax.Array:
        """The input of the output layer, for images."""
        if x.ndim != 4 or x.shape[1] % self.patch or x.shape[2] % self.patch:
            raise ValueError(
                f"it needs images whose sides are multiples of patch={self.patch}, not "
                f"{x.shape[1:]}; change it (model.options) or them (dataset.resize)"
            )
        if self.dim % self.heads or self.pool not in ("mean", "token") or self.dropout >= 1:
            raise ValueError(
                f"heads={self.heads} has to divide dim={self.dim}, pool={self.pool!r} to be 'mean' "
                f"or 'token', and dropout={self.dropout} to be below 1; fix model.options"
            )
        drop = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))
        size = (self.patch, self.patch)
        x = nn.Conv(
            self.dim, size, size, "VALID", name="embed", conv_general_dilated=conv, **options
        )(x)
        x = x.reshape(x.shape[0], -1, self.dim)
        start = nn.initializers.normal(0.02)
        if self.pool == "token":
            token = self.param("token", start, (1, 1, self.dim)).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, self.dim)), x], 1)
        x = drop(x + self.param("positions", start, (1, *x.shape[1:])).astype(x.dtype))
        for i in range(self.depth):
            hidden = round(self.mlp * self.dim)
            x = _Block(self.heads, hidden, drop, name=f"block_{i}", **options)(x)
        x = nn.LayerNorm(dtype=self.dtype, name="norm")(x)
        return x.mean(1) if self.pool == "mean" else x[:, 0]
