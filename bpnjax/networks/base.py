"""A network as a few pure functions, together with its layers that take a mode.

Nothing outside this folder knows which framework a network was written in. `from_linen` and
`from_nnx` adapt the networks of Flax; `from_function` takes any function of parameters, mode and
input.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bpnjax.modes.vectors import VECTORS
from bpnjax.networks.layers import Layer, Layers

__all__ = [
    "Network",
    "Outputs",
    "align",
    "from_function",
    "in_own_units",
    "measured",
    "modulate",
    "one_example",
]

Params = Any
Variables = dict[str, Any]
Mode = dict[str, dict[str, Any]]


def measured(y: jax.Array, measure: jax.Array, weight: jax.Array | None = None) -> jax.Array:
    r"""Returns an array unchanged, and gives its mean square as a gradient for ``measure``.

    .. math:: \frac{\partial L}{\partial measure} := \Big(\sum_j y_j^2, \; \mathrm{size}(y)\Big)

    for every loss L. Any backward pass then also gives the mean square of a layer's outputs. This
    needs neither another forward pass nor a second return value of the network. The ratio of the
    two numbers stays right when gradients are summed or averaged over micro-batches, over devices
    or over several calls of a layer. `bpnjax.optim.relative_step` reads it.

    Args:
      y: any array.
      measure: f32 ``[2]``. Its values are not used.
      weight: f32 ``[n]``, 0 for examples that are padding. It applies where the first axis of ``y``
        is the batch or a multiple of it. By default, and for other arrays, all elements count.

    Returns:
      ``y``. It can be differentiated in reverse mode only.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from bpnjax.networks import measured
      >>> loss = lambda m: jnp.sum(measured(jnp.array([3.0, 4.0]), m))
      >>> jax.grad(loss)(jnp.zeros(2)).tolist()
      [25.0, 2.0]

    Source: ours. Flax trains in 8 bits with a gradient that carries a statistic in the same way
    (``flax.linen.fp8_ops``).
    """
    square = jnp.square(jax.lax.stop_gradient(y).astype(jnp.float32))
    if weight is None or y.ndim == 0 or y.shape[0] % weight.shape[0]:
        statistic = jnp.stack([jnp.sum(square), jnp.float32(y.size)])
    else:
        of_example = square.reshape(weight.shape[0], -1)
        each, width = jnp.sum(of_example, 1), of_example.shape[1]
        # A product with 0 would be NaN where a padding example is infinite.
        total = jnp.sum(jnp.where(weight > 0, each * weight, 0.0))
        statistic = jnp.stack([total, jnp.sum(weight) * width])
    return _with_statistic(y, measure, statistic)


@jax.custom_vjp
def _with_statistic(y: jax.Array, measure: jax.Array, statistic: jax.Array) -> jax.Array:
    """Returns ``y``; the gradient for ``measure`` is the statistic."""
    del measure, statistic
    return y


_with_statistic.defvjp(
    lambda y, measure, statistic: (y, statistic),
    lambda statistic, gradient: (gradient, statistic, jnp.zeros_like(statistic)),
)


def in_own_units(vector: jax.Array, measure: jax.Array) -> jax.Array:
    """Returns an array unchanged, and counts its mean square as 1 where `measured` measures it.

    Args:
      vector: any array whose unit is 1 instead of the layer's, such as a gain.
      measure: f32 ``[2]``. Its values are not used.

    Returns:
      ``vector``. The gradient for ``measure`` is ``[1, 1]``, in reverse mode only.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from bpnjax.networks import in_own_units
      >>> jax.grad(lambda m: jnp.sum(in_own_units(jnp.array([3.0]), m)))(jnp.zeros(2)).tolist()
      [1.0, 1.0]
    """
    return _with_statistic(vector, measure, jnp.ones(2, jnp.float32))


def modulate(
    y: jax.Array,
    vectors: Mapping[str, jax.Array],
    path: str = "",
    features: int = 1,
    contracts_batch: bool = False,
) -> jax.Array:
    r"""Applies a mode to the output of a layer.

    .. math:: y' = (D * y) \odot gain + bias

    A network that is a plain function calls this for each layer. For networks of Flax the adapters
    do it. `bpnjax.modes.VECTORS` explains each entry.

    Args:
      y: the output, ``[n, ..., K]``.
      vectors: the mode's entries for this layer, ``mode.get(path, {})``. All are optional: a
        ``"depthwise"`` kernel, a ``"gain"``, a ``"bias"``, and a ``"measure"`` of the array that
        the bias is added to (see `measured`). A ``"key"`` is ignored; it belongs to the layer's
        input.
      path: of the layer, for messages.
      features: how many of the last axes of ``y`` are features.
      contracts_batch: whether the layer contracts the first axis of its input.

    Returns:
      An array like ``y``.

    Raises:
      ValueError: a vector has the wrong shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.networks import modulate
      >>> modulate(jnp.ones((1, 2)), {"bias": jnp.array([0.0, 1.0])}).tolist()
      [[1.0, 2.0]]
    """
    axes = tuple(range(y.ndim - features, y.ndim))
    for name, vector in VECTORS.items():
        if vector.on_input:
            continue
        if name == "bias" and "measure" in vectors:
            y = measured(y, vectors["measure"], vectors.get("weight"))
        if name not in vectors:
            continue
        if name == "depthwise":
            own = _kernel_per_channel(path, vectors[name], y)
        else:
            own = align(path, name, vectors[name], y, axes, contracts_batch)
        y = vector.act(y, own)
    return y


def _kernel_per_channel(path: str, kernel: jax.Array, y: jax.Array) -> jax.Array:
    """Checks that the depthwise kernel of a mode fits the output."""
    fits = y.ndim == 4 and kernel.shape[-3:] == (3, 3, y.shape[-1]) and kernel.ndim in (3, 4)
    if not fits or (kernel.ndim == 4 and kernel.shape[0] not in (1, y.shape[0])):
        raise ValueError(
            f"the depthwise kernel of layer {path!r} has shape {kernel.shape}; its outputs "
            f"{y.shape} take [3, 3, channels], or [n, 3, 3, channels] for one mode per example, "
            "and must be images"
        )
    return kernel


def check_mode(mode: Mapping[str, Any]) -> None:
    """Raises an error if a mode has an unknown entry.

    Args:
      mode: ``{path: {name: vector}}``.

    Raises:
      ValueError: names the layer and the entries.

    Example:
      >>> from bpnjax.networks.base import check_mode
      >>> check_mode({"out": {"biases": 0.0}})
      Traceback (most recent call last):
      ...
      ValueError: the mode of layer 'out' has ['biases']; a layer has key, depthwise, gain, bias
    """
    for path, vectors in mode.items():
        if wrong := set(vectors) - {*VECTORS, "measure", "weight"}:
            raise ValueError(
                f"the mode of layer {path!r} has {sorted(wrong)}; a layer has {', '.join(VECTORS)}"
            )


class Outputs:
    r"""The outputs of one forward pass in a mode, moved behind a BatchNorm that follows the layer.

    .. math:: y = \mathrm{norm}(W x + b) \odot gain + bias

    BatchNorm subtracts the mean of each channel and divides by its standard deviation. This undoes
    any bias and gain before it: the network would answer as without them, and the gradient of the
    bias would be rounding error.

    Source: ours; the paper's networks have no BatchNorm.
    """

    def __init__(self) -> None:
        self._acted: dict[int, tuple[jax.Array, jax.Array, Callable[..., jax.Array]]] = {}

    def act(self, y: jax.Array, vectors: Mapping[str, Any], *options: Any) -> jax.Array:
        """Applies the mode to the output of a layer.

        Args:
          y: the layer's output without the mode.
          vectors: as in `modulate`.
          *options: the further arguments of `modulate`.

        Returns:
          An array like ``y``.
        """
        if all(VECTORS[name].on_input for name in vectors if name in VECTORS):
            return y

        def acts(y: jax.Array) -> jax.Array:
            return modulate(y, vectors, *options)

        acted = acts(y)
        # Kept alive, so that no other array gets the same id in this pass.
        self._acted[id(acted)] = (acted, y, acts)
        return acted

    def behind(self, norm: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
        """Returns the output of a BatchNorm, in the mode of the layer that it normalises.

        Args:
          norm: the call of the BatchNorm.
          x: its input.

        Returns:
          The mode applied to ``norm(y)`` where ``x`` is what `act` returned for ``y``, else
          ``norm(x)``.
        """
        if id(x) not in self._acted:
            return norm(x)
        _, y, acts = self._acted[id(x)]
        return acts(norm(y))


@dataclasses.dataclass(frozen=True)
class Network:
    """Pure functions of a network that can run in the mode of a task.

    A mode is ``{layer path: {"key": [inputs], "gain": [outputs], "bias": [outputs]}}``, see
    `bpnjax.modes.VECTORS`. The empty mode ``{}`` is the plain network. In training a layer with a
    bias may also have a ``"measure"`` and a ``"weight"``, see `measured`. Variables are what a
    network keeps beside its parameters, such as the running statistics of BatchNorm. They are a
    dict of collections, ``{}`` for most networks.

    Attributes:
      init: ``key -> (params, variables)``.
      apply: ``(params, mode, x, *, variables={}, train=False, key=None, freeze_statistics=False) ->
        (outputs [n, ...], variables)``. With ``train=True`` dropout is active and drawn from
        ``key``, and normalisation uses the statistics of the batch unless ``freeze_statistics``.
        Otherwise the variables are returned unchanged. A mode may hold one vector per layer, or
        ``[n, width]``, one per example.
      layers: the layers that take a key and a bias, by path, in the order of their first call.
      tapped: ``(params, mode, x, *, variables={}, probes={}, record=(), replaced={}) -> (outputs,
        {path: [inputs of each call]})``, in evaluation. Probes are added to the outputs of layers.
        ``record`` names the layers whose inputs are returned. ``replaced`` gives layers another
        input. It is None where the framework does not allow it; importance then computes one
        gradient per example.
      prepare: turns a stored example into the input that the network expects. ``apply`` and
        ``tapped`` call it themselves.
      name: the name of the network's class, for messages.
      example: shape and dtype of a batch of one example, ``[1, ...]``; None if it is not known.
    """

    init: Callable[[jax.Array], tuple[Params, Variables]]
    apply: Callable[..., tuple[jax.Array, Variables]]
    layers: Layers
    tapped: Callable[..., tuple[jax.Array, dict[str, list[jax.Array]]]] | None = None
    prepare: Callable[[jax.Array], jax.Array] = lambda x: x
    name: str = "network"
    example: jax.ShapeDtypeStruct | None = None

    def with_input(
        self,
        prepare: Callable[[jax.Array], jax.Array],
        example: jax.ShapeDtypeStruct | None = None,
    ) -> "Network":
        """The same network, with a function that prepares its input.

        Args:
          prepare: applied to ``x`` first, for example to normalise uint8 images.
          example: shape and dtype of a batch of one stored example, ``[1, ...]``.

        Returns:
          A `Network` that takes stored examples.

        Example:
          >>> import jax, jax.numpy as jnp, flax.linen as nn
          >>> from bpnjax import networks
          >>> network = networks.from_linen(nn.Dense(1), jnp.ones((1, 2)))
          >>> scaled = network.with_input(lambda x: x / 255.0)
          >>> params, _ = scaled.init(jax.random.key(0))
          >>> images = jnp.full((3, 2), 255, jnp.uint8)
          >>> bool(jnp.allclose(scaled.apply(params, {}, images)[0],
          ...                   network.apply(params, {}, jnp.ones((3, 2)))[0]))
          True
        """

        def apply(params: Params, mode: Mode, x: jax.Array, **options: Any) -> Any:
            return self.apply(params, mode, prepare(x), **options)

        tapped = self.tapped

        def tapped_prepared(params: Params, mode: Mode, x: jax.Array, **options: Any) -> Any:
            assert tapped is not None
            return tapped(params, mode, prepare(x), **options)

        return dataclasses.replace(
            self,
            apply=apply,
            tapped=None if tapped is None else tapped_prepared,
            prepare=lambda x: self.prepare(prepare(x)),
            example=example or self.example,
        )

    def bind(self, variables: Variables) -> "Network":
        """The same network with its variables filled in, so that ``apply`` needs none.

        Args:
          variables: collections beside the parameters, such as ``{"batch_stats": ...}``.

        Returns:
          A `Network` whose ``apply`` and ``tapped`` use these unless they are given others.

        Example:
          >>> import jax, jax.numpy as jnp, flax.linen as nn
          >>> from bpnjax import networks
          >>> norm = nn.BatchNorm(use_running_average=True)
          >>> network = networks.from_linen(norm, jnp.ones((1, 2)))
          >>> params, variables = network.init(jax.random.key(0))
          >>> network.bind(variables).apply(params, {}, jnp.zeros((1, 2)))[0].tolist()
          [[0.0, 0.0]]
        """

        def apply(params: Params, mode: Mode, x: jax.Array, **options: Any) -> Any:
            return self.apply(params, mode, x, **{"variables": variables, **options})

        tapped = self.tapped

        def tapped_bound(params: Params, mode: Mode, x: jax.Array, **options: Any) -> Any:
            assert tapped is not None
            return tapped(params, mode, x, **{"variables": variables, **options})

        return dataclasses.replace(
            self, apply=apply, tapped=None if tapped is None else tapped_bound
        )

    def features(
        self, params: Params, mode: Mode, x: jax.Array, paths: Sequence[str], **options: Any
    ) -> dict[str, jax.Array]:
        """Runs the network in evaluation and returns the inputs of some of its layers.

        Args:
          params: the shared parameters.
          mode: of the task, or ``{}``.
          x: the batch, ``[n, ...]``.
          paths: of layers that are ``plain`` in `layers`.
          **options: ``variables`` and ``replaced``, as of ``tapped``.

        Returns:
          ``{path: input of the layer's last call}``, the array that multiplies the kernel, after
          the key.

        Raises:
          ValueError: the network has no such layer, the input of the layer has no meaning outside
          it, or the framework does not give access to it.
        """
        if self.tapped is None:
            raise ValueError(
                f"{self.name} does not show what goes into its layers; build it with "
                "networks.from_linen or networks.from_nnx"
            )
        missing = [path for path in paths if path not in self.layers]
        if missing:
            known = ", ".join(self.layers)
            raise ValueError(f"the network has no layer {missing[0]!r}; it has {known}")
        for path in paths:
            if not self.layers[path].plain:
                raise ValueError(
                    f"layer {path!r} lies within a lifted transformation (nn.scan, nn.remat, "
                    "nn.vmap), its kernel is not the one in params (nn.WeightNorm), or the network "
                    "reshapes its batch before it; its input has no meaning here"
                )
        _, inputs = self.tapped(params, mode, x, record=tuple(paths), **options)
        return {path: inputs[path][-1] for path in paths}


def from_function(
    apply: Callable[..., jax.Array],
    init: Callable[[jax.Array], Params],
    layers: Mapping[str, int | tuple[int, int]] | None = None,
    x: Any = None,
) -> Network:
    """Makes a `Network` from a plain function, written in any framework or none.

    Args:
      apply: ``(params, mode, x) -> outputs [n, ...]``. For each layer ``path`` it passes the output
        through ``modulate(y, mode.get(path, {}))``, and multiplies the input by
        ``mode[path]["key"]`` if there is one.
      init: ``key -> params``.
      layers: the layers for which ``apply`` reads a mode, as ``{path: outputs}`` or
        ``{path: (inputs, outputs)}``. None by default.
      x: a batch or its shape, ``[n, ...]``. Methods that store examples need it.

    Returns:
      A `Network` without ``tapped``, so importance computes one gradient per example.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from bpnjax import networks
      >>> def apply(params, mode, x):
      ...     return networks.modulate(x @ params["w"], mode.get("out", {}))
      >>> network = networks.from_function(apply, lambda key: {"w": jnp.ones((2, 1))}, {"out": 1})
      >>> params, variables = network.init(jax.random.key(0))
      >>> network.apply(params, {"out": {"bias": jnp.ones(1)}}, jnp.ones((1, 2)))[0].tolist()
      [[3.0]]
    """
    found = Layers()
    for path, widths in (layers or {}).items():
        inputs, outputs = widths if isinstance(widths, (tuple, list)) else (0, widths)
        found[path] = Layer("function", inputs, outputs, 1, 2, (1, outputs), False)

    def run(
        params: Params,
        mode: Mode,
        x: jax.Array,
        *,
        variables: Variables | None = None,
        train: bool = False,
        key: jax.Array | None = None,
        freeze_statistics: bool = False,
    ) -> tuple[jax.Array, Variables]:
        del train, key, freeze_statistics
        if unknown := [path for path in mode if path not in found]:
            raise ValueError(
                f"the mode names layers that the network does not have: {', '.join(unknown)}; name "
                "them in networks.from_function(..., layers=...)"
            )
        return apply(params, mode, x), variables or {}

    return Network(
        init=lambda key: (init(key), {}),
        apply=run,
        layers=found,
        name="function",
        example=None if x is None else one_example(x),
    )


def abstract(x: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a batch in JAX, where 64-bit types become 32-bit ones by default.

    Args:
      x: an array, a list of numbers, or a shape and dtype.

    Returns:
      `jax.ShapeDtypeStruct`.

    Example:
      >>> import numpy as np
      >>> from bpnjax.networks.base import abstract
      >>> abstract(np.zeros((5, 2)))
      ShapeDtypeStruct(shape=(5, 2), dtype=float32)
    """
    if not hasattr(x, "dtype"):
        x = np.asarray(x)
    return jax.ShapeDtypeStruct(jnp.shape(x), jax.dtypes.canonicalize_dtype(x.dtype))


def one_example(x: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a batch of one example.

    Args:
      x: a batch ``[n, ...]``, or its shape.

    Returns:
      `jax.ShapeDtypeStruct` ``[1, ...]``.

    Example:
      >>> import numpy as np
      >>> from bpnjax.networks.base import one_example
      >>> one_example(np.zeros((5, 2), np.uint8))
      ShapeDtypeStruct(shape=(1, 2), dtype=uint8)
    """
    whole = abstract(x)
    return jax.ShapeDtypeStruct((1, *whole.shape[1:]), whole.dtype)


def batch_axis(x: Any) -> tuple[int, ...]:
    """The length of the first axis of a network's input, as ``shape[:1]``.

    Args:
      x: the input: an array, a tree of arrays, or their shapes.

    Returns:
      ``(n,)``, or ``()`` if the input has no such axis.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.networks.base import batch_axis
      >>> batch_axis(jnp.zeros((3, 2)))
      (3,)
    """
    return next((tuple(jnp.shape(leaf)[:1]) for leaf in jax.tree.leaves(x)), ())


def align(
    path: str,
    name: str,
    vector: jax.Array,
    array: Any,
    axes: tuple[int, ...],
    contracts_batch: bool = False,
) -> jax.Array:
    """Reshapes a vector of a mode so that it broadcasts over the other axes of an array.

    Args:
      path: of the layer, for messages.
      name: of the vector, such as ``"key"`` or ``"bias"``.
      vector: ``[width]`` for the whole batch, or ``[n, width]`` for one mode per example.
      array: the layer's input or output, ``[n, ...]``.
      axes: axes of the array along which the vector acts. Their lengths multiply to its width.
      contracts_batch: whether the layer contracts the first axis of its input.

    Returns:
      An array of the dtype of ``array`` that broadcasts against it.

    Raises:
      ValueError: the vector has another shape, or the first axis of the array is not the batch.
    """
    width, rows = math.prod(array.shape[axis] for axis in axes), vector.shape[:-1]
    if vector.ndim not in (1, 2) or vector.shape[-1] != width:
        raise ValueError(
            f"the {name} of layer {path!r} has shape {vector.shape}; it must have [{width}], "
            f"or [n, {width}] for one mode per example"
        )
    if rows and (0 in axes or contracts_batch or rows[0] not in (1, array.shape[0])):
        raise ValueError(
            f"layer {path!r} works on an array {array.shape} whose first axis is not the "
            f"batch of {rows[0]} examples with a mode each (the network reshapes its batch, or "
            "nn.vmap took the axis away); call the network once per task instead"
        )
    shape = [size if axis in axes else 1 for axis, size in enumerate(array.shape)]
    return jnp.reshape(vector, [*rows, *shape[len(rows) :]]).astype(array.dtype)
