r"""What a mode may hold for a layer, and what a task may learn of it.

For a layer :math:`y = W x + b` a mode holds, each of them optional,

.. math:: y = \big(D * (W (x \odot key) + b)\big) \odot gain + bias

with ``*`` the convolution of each channel with its own 3 x 3 kernel. The table `VECTORS` says of
each its shape, the value with which the network is the plain one, how it acts and how two modes
join. The table `MODULATIONS` says which of them a task learns, and how they are kept.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["MODULATIONS", "VECTORS", "Modulation", "Vector", "depthwise"]

Values = dict[str, dict[str, jax.Array]]  # {path: {name: array}}


def depthwise(y: jax.Array, kernel: jax.Array) -> jax.Array:
    r"""Convolves each channel of images with a kernel of 3 x 3 of its own.

    .. math:: y'_{nabc} = \sum_{i,j = 0}^{2} D_{ijc} \, y_{n, a+i-1, b+j-1, c}

    with zeros around the image.

    Args:
      y: ``[n, height, width, K]``.
      kernel: D, ``[3, 3, K]`` for the whole batch or ``[n, 3, 3, K]`` for one per example.

    Returns:
      An array like ``y``.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.modes.vectors import depthwise
      >>> y = jnp.arange(3.0).reshape(1, 1, 3, 1)
      >>> depthwise(y, jnp.zeros((3, 3, 1)).at[1, 2].set(1.0)).ravel().tolist()
      [1.0, 2.0, 0.0]

    Source: Ge et al. 2023 (CLR, arXiv 2307.11386), whose tasks each have such a kernel behind every
    convolution of a frozen network.
    """
    _, height, width, _ = y.shape
    padded = jnp.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = (kernel if kernel.ndim == 3 else kernel[:, None, None]).astype(y.dtype)
    total = jnp.zeros_like(y)
    for i, j in itertools.product(range(3), range(3)):
        total += padded[:, i : i + height, j : j + width] * kernel[..., i, j, :]
    return total


_ones = partial(jnp.ones, dtype=jnp.float32)
_zeros = partial(jnp.zeros, dtype=jnp.float32)


def _identity(shape: tuple[int, ...]) -> jax.Array:
    return jnp.zeros(shape, jnp.float32).at[1, 1].set(1.0)


def _of_inputs(path: str, layer: Any) -> tuple[int, ...]:
    if not layer.inputs:
        raise ValueError(
            f"a key lies on the inputs of layer {path!r}, and their number is not known; pass "
            f"networks.from_function(..., layers={{{path!r}: (inputs, {layer.outputs})}})"
        )
    return (int(layer.inputs),)


@dataclasses.dataclass(frozen=True)
class Vector:
    """One entry of a layer's mode.

    Attributes:
      shape: ``(path, layer) -> shape`` for one task.
      start: ``shape -> f32`` array with which the layer acts as without it.
      act: ``(array, vector) -> array``: on the layer's input or output, the vector shaped so that
        it broadcasts (a ``depthwise`` kernel as it is).
      join: of the vectors of two modes (`bpnjax.modes.merge`); None where they cannot be joined.
      on_input: whether it acts on the input of the layer, else on its output.
    """

    shape: Callable[[str, Any], tuple[int, ...]]
    start: Callable[[tuple[int, ...]], jax.Array]
    act: Callable[[jax.Array, jax.Array], jax.Array]
    join: Callable[[jax.Array, jax.Array], jax.Array] | None
    on_input: bool = False


def _of_outputs(path: str, layer: Any) -> tuple[int, ...]:
    del path
    return (int(layer.outputs),)


# In the order in which they act.
VECTORS: dict[str, Vector] = {
    "key": Vector(_of_inputs, _ones, jnp.multiply, jnp.multiply, on_input=True),
    "depthwise": Vector(
        lambda path, layer: (3, 3, *_of_outputs(path, layer)), _identity, depthwise, None
    ),
    "gain": Vector(_of_outputs, _ones, jnp.multiply, jnp.multiply),
    "bias": Vector(_of_outputs, _zeros, jnp.add, jnp.add),
}


@dataclasses.dataclass(frozen=True)
class Modulation:
    """What each task learns of the layers, and how a bank keeps it.

    Attributes:
      names: of the entries of `VECTORS` that are learned.
      hard: whether they are kept as one bit per element: 1 where the learned score is above 0. The
        gradient passes the threshold as if it were not there (straight-through).
      images: whether it acts on the outputs of convolutions only.
    """

    names: tuple[str, ...]
    hard: bool = False
    images: bool = False

    def acts_on(self, layer: Any) -> bool:
        """Can a layer be modulated so?

        Args:
          layer: `bpnjax.networks.Layer`.

        Returns:
          False for ``depthwise`` and a layer whose outputs are no images.
        """
        return not self.images or (layer.kind == "conv" and len(layer.output_shape) == 4)

    def shapes(self, layers: Mapping[str, Any]) -> dict[str, dict[str, tuple[int, ...]]]:
        """The shapes of what a task learns.

        Args:
          layers: ``{path: Layer}``.

        Returns:
          ``{path: {name: shape}}``.

        Raises:
          ValueError: the number of a layer's inputs is needed and not known.
        """
        return {
            path: {name: VECTORS[name].shape(path, layer) for name in self.names}
            for path, layer in layers.items()
        }

    def values(self, changes: Values) -> Values:
        """The vectors that learned changes stand for.

        Args:
          changes: ``{path: {name: array}}``, what was learned, 0 at first.

        Returns:
          A mode: start + change; of a hard one 1 where ``change + 0.01 > 0`` and else 0, with the
          derivative 1.

        Example:
          >>> import jax.numpy as jnp
          >>> from bpnjax import modes
          >>> change = {"out": {"gain": jnp.array([0.5, -0.5])}}
          >>> modes.MODULATIONS["gain"].values(change)["out"]["gain"].tolist()
          [1.5, 0.5]
          >>> modes.MODULATIONS["mask"].values(change)["out"]["gain"].tolist()
          [1.0, 0.0]

        Source: the threshold of Piggyback (Mallya et al. 2018, arXiv 1801.06519), whose scores
        start at 0.01 and whose threshold is 0.005. Variant: threshold 0, one score per unit.
        """

        def one(name: str, change: jax.Array) -> jax.Array:
            if not self.hard:
                return VECTORS[name].start(change.shape) + change
            open_ = (change + MARGIN > 0).astype(change.dtype)
            return change + jax.lax.stop_gradient(open_ - change)

        return {
            path: {name: one(name, change) for name, change in own.items()}
            for path, own in changes.items()
        }

    def bank(self, layers: Mapping[str, Any], num_tasks: int) -> Values:
        """A bank with which every task's mode is the plain network.

        Args:
          layers: ``{path: Layer}`` that `acts_on` accepts.
          num_tasks: T.

        Returns:
          ``{path: {name: [T, ...]}}`` as `encoded` makes the rows.
        """
        zeros = jax.tree.map(
            lambda shape: jnp.zeros(shape, jnp.float32),
            self.shapes(layers),
            is_leaf=lambda node: isinstance(node, tuple),
        )
        rows = self.encoded(self.values(zeros))
        return jax.tree.map(lambda row: jnp.repeat(row[None], num_tasks, 0), rows)

    def encoded(self, mode: Values) -> Values:
        """The rows of a bank that keep a mode.

        Args:
          mode: ``{path: {name: f32}}``.

        Returns:
          The mode itself; of a hard one uint8, eight elements to a byte, the last axis rounded up.

        Example:
          >>> import jax.numpy as jnp
          >>> from bpnjax import modes
          >>> gate = {"out": {"gain": jnp.array([1.0, 0.0, 1.0])}}
          >>> modes.MODULATIONS["mask"].encoded(gate)["out"]["gain"].tolist()  # 0b10100000
          [160]
        """
        if not self.hard:
            return mode
        return jax.tree.map(lambda value: jnp.packbits(value > 0.5, axis=-1), mode)

    def decoded(self, rows: Values, layers: Mapping[str, Any], known: jax.Array) -> Values:
        """The mode that rows of a bank keep.

        Args:
          rows: as of `bpnjax.modes.select`.
          layers: ``{path: Layer}`` of the bank.
          known: bool ``[]`` or ``[n]``, False for tasks that the bank does not have.

        Returns:
          The rows themselves; of a hard mode its elements 0 and 1, f32, NaN where not known.
        """
        if not self.hard:
            return rows

        def one(shape: tuple[int, ...], row: jax.Array) -> jax.Array:
            bits = jnp.unpackbits(row, axis=-1, count=shape[-1]).astype(jnp.float32)
            return jnp.where(known[(...,) + (None,) * len(shape)], bits, jnp.nan)

        shapes = self.shapes(layers)
        return {
            path: {name: one(shapes[path][name], row) for name, row in own.items()}
            for path, own in rows.items()
        }


MARGIN = 0.01  # how far above its threshold the score of a hard mode starts
MODULATIONS: dict[str, Modulation] = {
    "bias": Modulation(("bias",)),
    "gain": Modulation(("gain",)),
    "bias+gain": Modulation(("bias", "gain")),
    "rank1": Modulation(("key", "gain")),
    "depthwise": Modulation(("depthwise",), images=True),
    "mask": Modulation(("gain",), hard=True),
}
