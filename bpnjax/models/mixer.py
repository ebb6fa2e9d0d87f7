"""A small MLP-Mixer, written in NNX."""

from collections.abc import Callable

import jax
from flax import nnx

_WIDTH = 32
_PATCH = 4  # pixels per side


class Mixer(nnx.Module):
    """Dense layers over patches, then over the features of each patch, each after a layer norm.

    Args:
      num_classes: number of outputs.
      patches: number of patches of 4 x 4 pixels in an image.
      rngs: for the initial values.
    """

    def __init__(self, num_classes: int, patches: int, rngs: nnx.Rngs) -> None:
        def layer(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, rngs=rngs)

        def norm() -> nnx.LayerNorm:
            return nnx.LayerNorm(_WIDTH, rngs=rngs)

        self.embed, self.norm, self.output = (
            layer(_PATCH**2, _WIDTH),
            norm(),
            layer(_WIDTH, num_classes),
        )
        self.norm_0, self.over_0, self.back_0 = norm(), layer(patches, 64), layer(64, patches)
        self.norm_1, self.over_1, self.back_1 = norm(), layer(_WIDTH, 64), layer(64, _WIDTH)

    def __call__(self, x: jax.Array) -> jax.Array:
        n, height, width, _ = x.shape
        x = x.reshape(n, height // _PATCH, _PATCH, width // _PATCH, _PATCH)
        x = self.embed(x.transpose(0, 1, 3, 2, 4).reshape(n, -1, _PATCH**2))
        y = self.norm_0(x).swapaxes(1, 2)
        x = x + self.back_0(nnx.gelu(self.over_0(y))).swapaxes(1, 2)
        x = x + self.back_1(nnx.gelu(self.over_1(self.norm_1(x))))
        return self.output(self.norm(x).mean(1))


def mixer(num_classes: int, size: int = 28) -> Callable[[nnx.Rngs], Mixer]:
    """One block of an MLP-Mixer for grey images, 32 wide, for ``model.factory``.

    Args:
      num_classes: number of outputs.
      size: pixels per side of the images, a multiple of 4.

    Returns:
      A function from `flax.nnx.Rngs` to a `Mixer`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from bpnjax import networks
      >>> from bpnjax.models.mixer import mixer
      >>> network = networks.from_nnx(mixer(10), jnp.zeros((1, 28, 28, 1)))
      >>> params, variables = network.init(jax.random.key(0))
      >>> network.apply(params, {}, jnp.zeros((2, 28, 28, 1)), variables=variables)[0].shape
      (2, 10)

    Source: Tolstikhin et al. 2021 (arXiv 2105.01601).
    """
    return lambda rngs: Mixer(num_classes, (size // _PATCH) ** 2, rngs)
