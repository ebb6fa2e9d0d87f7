"""Which layers of a Linen network take a key and a bias, and on which axes of their arrays.

The layers are those of `flax.linen` that multiply their input by a kernel: `KINDS`. Whatever else a
network has (norms, embeddings, parameters of its own) is left alone, and `matching` refuses a
pattern that asks for a layer with a kernel of which nothing is known.
"""

import math
import re
import sys
from typing import Any, NamedTuple

import flax.linen as nn
import jax

__all__ = ["KINDS", "Layer", "Layers", "Other", "matching"]

KINDS = {
    nn.Dense: "dense",
    nn.DenseGeneral: "dense_general",
    nn.Conv: "conv",
    nn.ConvLocal: "conv",
    nn.ConvTranspose: "conv",
}
_KERNELS = ("kernel", "weight", "weights", "w")  # what a parameter that multiplies is called


class Layer(NamedTuple):
    """What modes need to know of one layer of a network."""

    kind: str  # "dense", "dense_general" or "conv"
    inputs: int  # length of its key: what the kernel contracts, the last axis but for dense_general
    outputs: int  # length of its bias: its features, multiplied out for dense_general
    calls: int  # how often one forward pass calls it; within nn.scan, how often it is traced
    rank: int  # axes of its input, the batch axis included
    output_shape: tuple  # of one call, the batch axis included
    plain: bool = (
        True  # called outside nn.scan, nn.remat ... and with the kernel as it is in params
    )


class Other(NamedTuple):
    """A module with parameters of its own that takes neither key nor bias."""

    kind: str  # the name of its class
    multiplies: bool  # has a kernel, hence would be a layer if it were known


class Layers(dict):
    """``{path: Layer}``, in the order of first calls, and beside it what else has parameters."""

    others: dict[str, Other]


class Call(NamedTuple):
    """One call of a layer: where it is and on which axes its key and bias lie."""

    path: str
    kind: str
    contracted: tuple[int, ...]  # axes of the input, ascending, as the kernel has them
    features: int  # how many of the output's last axes


def layer_call(context, x) -> Call | None:
    """What an intercepted call of `flax.linen` is, if it is one of a layer of `KINDS`.

    Args:
      context: `flax.linen.module.InterceptorContext`.
      x: the call's input.

    Returns:
      `Call`; None for any other module, for a subclass that does not reach its base's ``__call__``
      and for a DenseGeneral with batch dimensions.
    """
    module = context.module
    base = next((base for base in KINDS if isinstance(module, base)), None)
    # A subclass with a __call__ of its own is met where that calls super().__call__, or not at all.
    if base is None or context.orig_method.func is not base.__call__.__wrapped__:
        return None
    path = "/".join(module.path)
    if base is not nn.DenseGeneral:
        return Call(path, KINDS[base], (x.ndim - 1,), 1)
    if _as_tuple(module.batch_dims):
        return None  # each row of the batch has a kernel of its own
    contracted = tuple(sorted(axis % x.ndim for axis in _as_tuple(module.axis)))
    return Call(path, KINDS[base], contracted, len(_as_tuple(module.features)))


def _as_tuple(value):
    return (value,) if isinstance(value, int) else tuple(value)


def describe(call: Call, x, y, plain: bool) -> Layer:
    """The `Layer` of a call.

    Args:
      call: of a layer.
      x: its input, or the shape.
      y: its output, or the shape.
      plain: see `Layer`.

    Returns:
      `Layer`, called once.
    """
    inputs = math.prod(x.shape[axis] for axis in call.contracted)
    outputs = math.prod(y.shape[y.ndim - call.features :])
    return Layer(call.kind, inputs, outputs, 1, x.ndim, y.shape, plain)


def key_for(call: Call, key, x):
    """A mode's key in the shape in which it multiplies the input.

    Args:
      call: of a layer.
      key: ``[inputs]``, or ``[n, inputs]`` for one mode per example.
      x: the call's input.

    Returns:
      An array of the input's dtype that broadcasts against it.

    Raises:
      ValueError: another shape, or the input's first axis is not the batch.
    """
    return _align(call, "key", key, x, call.contracted)


def bias_for(call: Call, bias, y):
    """A mode's bias in the shape in which it adds to the output.

    Args:
      call: of a layer.
      bias: ``[outputs]``, or ``[n, outputs]`` for one mode per example.
      y: the call's output.

    Returns:
      An array of the output's dtype that broadcasts against it.

    Raises:
      ValueError: another shape, or the output's first axis is not the batch.
    """
    return _align(call, "bias", bias, y, tuple(range(y.ndim - call.features, y.ndim)))


def _align(call, name, vector, array, axes):
    """Shapes a vector so that it broadcasts over all but some axes of an array.

    ``[K]`` serves the whole batch; ``[n, K]`` (one task id per example) gets unit axes for those
    between the batch and the features.
    """
    width, rows = math.prod(array.shape[axis] for axis in axes), vector.shape[:-1]
    if vector.ndim not in (1, 2) or vector.shape[-1] != width:
        raise ValueError(
            f"the {name} of layer {call.path!r} has shape {vector.shape}; it must have [{width}], "
            f"or [n, {width}] for one mode per example"
        )
    if rows and (0 in axes or 0 in call.contracted or rows[0] not in (1, array.shape[0])):
        raise ValueError(
            f"layer {call.path!r} works on an array {array.shape} whose first axis is not the "
            f"batch of {rows[0]} examples with a mode each (the network reshapes its batch, or "
            "nn.vmap took the axis away); call the network once per task instead"
        )
    shape = [size if axis in axes else 1 for axis, size in enumerate(array.shape)]
    return vector.reshape([*rows, *shape[len(rows) :]]).astype(array.dtype)


def own_kernel(params, path: str):
    """The kernel of a layer as it is in the parameter tree.

    Args:
      params: a parameter collection.
      path: of the layer, names joined by ``/``; "" for the network itself.

    Returns:
      The leaf; None where there is none.
    """
    for name in path.split("/") if path else ():
        params = params.get(name, {})
    return params.get("kernel")


def others_of(params, layers, classes: dict[str, str]) -> dict[str, Other]:
    """What owns parameters and is not a layer, by path; the nearest module called names it.

    Args:
      params: a parameter collection.
      layers: by path.
      classes: ``{path: class name}`` of all modules that were called.

    Returns:
      ``{path: Other}``.
    """
    others: dict[str, Other] = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        names = [str(part.key) for part in path if isinstance(part, jax.tree_util.DictKey)]
        owner = "/".join(names[:-1])
        if owner in layers:
            continue
        called = next(
            ("/".join(names[:depth]) for depth in range(len(names), -1, -1)
             if "/".join(names[:depth]) in classes),
            None,
        )  # fmt: skip
        before = others.get(owner, Other("", False))
        kind = classes.get(called, "?") if called == owner else f"in {classes.get(called, '?')}"
        others[owner] = Other(kind, before.multiplies or names[-1].lower() in _KERNELS)
    return others


def matching(layers: dict[str, Layer], pattern: str) -> dict[str, Layer]:
    """The layers whose whole path matches a regular expression, in their order.

    Args:
      layers: as `find_layers` returns them.
      pattern: matched against the whole path; ``"(?!output$).*"`` leaves one layer out.

    Returns:
      The part of ``layers`` that matches.

    Raises:
      ValueError: none does, and then the message lists those there are; or the pattern matches
        something with a kernel that is not of a known kind, such as `flax.linen.Einsum`.

    Example:
      >>> from bpnjax.networks.layers import Layer, matching
      >>> layers = {name: Layer("dense", 2, 2, 1, 2, (1, 2)) for name in ("hidden_0", "output")}
      >>> list(matching(layers, "hidden_.*"))
      ['hidden_0']
      >>> matching(layers, "hidden")
      Traceback (most recent call last):
      ...
      ValueError: 'hidden' matches no layer; there are: hidden_0, output
    """
    found = {path: layer for path, layer in layers.items() if re.fullmatch(pattern, path)}
    others = {
        path: other
        for path, other in getattr(layers, "others", {}).items()
        if re.fullmatch(pattern, path)
    }
    unknown = [path for path, other in others.items() if other.multiplies]
    if unknown:
        known = ", ".join(kind.__name__ for kind in KINDS)
        raise ValueError(
            f"{pattern!r} matches what takes neither key nor bias: "
            f"{', '.join(f'{path!r} ({others[path].kind})' for path in unknown)}. Modes know "
            f"{known}: build it of these, or leave it out: '(?!{unknown[0]}$).*'"
        )
    if not found:
        listed = ", ".join(f"{path!r} ({other.kind})" for path, other in others.items())
        only = f" but {listed}, which take neither key nor bias" if others else ""
        raise ValueError(f"{pattern!r} matches no layer{only}; there are: {', '.join(layers)}")
    return found


def inside_nn_jit() -> bool:
    """Is this traced within `flax.linen.jit`, which would keep a mode's vectors as constants?

    Returns:
      True or False, by the frames of the Python stack.
    """
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "jitted" and frame.f_globals.get("__name__") == "flax.core.lift":
            return True
        frame = frame.f_back
    return False
