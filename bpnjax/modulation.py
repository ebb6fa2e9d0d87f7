"""Modes: one network, switched from task to task by a key and a bias per layer.

A **mode** is a dict keyed by layer path that holds at most two vectors a layer::

    mode = {"hidden_0": {"key": f32[inputs], "bias": f32[outputs]}, ...}

    y = W (x * key) + b + bias

``key`` is the context of PSP (parameter superposition), ``bias`` the beneficial perturbation of
BPN. A **bank** is the same tree with a leading task axis, ``[T, ...]``; `select` indexes it with
one task or with one task id per example. The network itself is an ordinary Linen module that
knows nothing of this: `flax.linen.intercept_methods` adds the two vectors while JAX traces.
"""

import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from bpnjax.keys import is_seed

__all__ = [
    "Layer",
    "apply_from",
    "find_layers",
    "layer_inputs",
    "matching",
    "merge",
    "modulated_apply",
    "select",
    "tapped_apply",
]


class Layer(NamedTuple):
    """What modes need to know of one Dense or Conv layer of a network."""

    kind: str  # "dense" or "conv"
    inputs: int  # width of the last axis of the layer's input
    outputs: int  # width of the last axis of the layer's output
    calls: int  # how often one forward pass calls it
    rank: int  # axes of its input, the batch axis included
    output_shape: tuple  # of one call, the batch axis included


_KINDS = {nn.Dense: "dense", nn.Conv: "conv"}


def _layer_of(context) -> tuple[str, str] | None:
    """The path and kind of the layer an intercepted call belongs to; None for other calls."""
    kind = _KINDS.get(type(context.module))
    if kind is None or context.method_name != "__call__":
        return None
    return "/".join(context.module.path), kind


def _align(vector, array):
    """Shapes a mode's vector so that it broadcasts against a layer's input or output.

    ``[K]`` serves the whole batch; ``[n, K]`` (one task id per example) gets unit axes for the
    spatial axes between the batch and the channels.
    """
    if vector.ndim == 2:
        vector = vector.reshape(vector.shape[:1] + (1,) * (array.ndim - 2) + vector.shape[1:])
    else:
        vector = vector.reshape((1,) * (array.ndim - 1) + vector.shape)
    return vector.astype(array.dtype)


def _variables(params):
    return params if "params" in params else {"params": params}


def _run(model, params, mode, args, kwargs, probes=None, record=None, replaced=None):
    unused = set(mode)

    def intercept(next_call, call_args, call_kwargs, context):
        found = _layer_of(context)
        if found is None or not call_args:
            return next_call(*call_args, **call_kwargs)
        path, kind = found
        layer_mode = mode.get(path, {})
        unused.discard(path)
        x, *rest = call_args
        if "key" in layer_mode:
            x = x * _align(layer_mode["key"], x)
        if replaced is not None and path in replaced:
            x = replaced[path].reshape(x.shape).astype(x.dtype)
        y = next_call(x, *rest, **call_kwargs)
        if "bias" in layer_mode:
            y = y + _align(layer_mode["bias"], y)
        if probes is not None and path in probes:
            y = y + probes[path].astype(y.dtype)
        if record is not None:
            record(path, kind, x, y)
        return y

    with nn.intercept_methods(intercept):
        out = model.apply(_variables(params), *args, **kwargs)
    if unused:
        raise ValueError(
            f"the mode names layers that the network did not call: {', '.join(sorted(unused))}; "
            "find_layers(model, params, x) lists those it has"
        )
    return out


def modulated_apply(model: nn.Module, params, mode, x, *args, **kwargs):
    r"""Runs a Linen network in a mode.

    For every Dense or Conv layer that the mode names,

    .. math:: y = W (x \odot key) + b + bias

    and for every other layer the ordinary forward pass. The empty mode ``{}`` is the plain
    network. A layer that is called several times gets its vectors at each call.

    Args:
      model: any Linen module; its Dense and Conv layers are found by path at trace time.
      params: its parameter collection, or a dict of collections with a ``"params"`` entry.
      mode: ``{path: {"key": [inputs] or [n, inputs], "bias": [outputs] or [n, outputs]}}``; both
        entries optional, any float dtype (cast to that of the layer). With a leading axis ``n``
        each example of the batch has a mode of its own.
      x: the batch, ``[n, ...]``.
      *args: further arguments of the module's call.
      **kwargs: further keyword arguments of ``model.apply``.

    Returns:
      What ``model.apply`` returns.

    Raises:
      ValueError: the mode names a layer that the network did not call.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn
      >>> import bpnjax
      >>> net = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)])
      >>> x = jnp.ones((3, 5))
      >>> params = net.init(jax.random.key(0), x)["params"]
      >>> mode = {"layers_2": {"bias": jnp.array([0.0, 10.0])}}
      >>> plain = net.apply({"params": params}, x)
      >>> (bpnjax.modulated_apply(net, params, mode, x) - plain).round(3).tolist()[0]
      [0.0, 10.0]

    Source: Wen et al. 2020 (arXiv 2009.13954), Eq. 1-4 (bias) and Alg. 3 (key); Cheung et al.
    2019 (PSP) for the key on the input of every linear layer.
    """
    return _run(model, params, mode, (x, *args), kwargs)


def tapped_apply(model: nn.Module, params, mode, x, probes):
    """Runs a network in a mode, adds probes to layer outputs and returns the layer inputs.

    The gradient with respect to a zero probe is the gradient with respect to the layer's output
    of each example; with the layer's input it gives per-example gradients of a Dense kernel
    without ever forming them (see `bpnjax.importance`).

    Args:
      model: any Linen module.
      params: its parameter collection.
      mode: as in `modulated_apply`.
      x: the batch, ``[n, ...]``.
      probes: ``{path: array}``, each of the shape of that layer's output; added to it.

    Returns:
      The network's output, and ``{path: [input of each call]}`` for the probed layers: what
      multiplies the kernel, hence after the key.
    """
    inputs = {}

    def record(path, kind, layer_input, _):
        del kind
        if path in probes:
            inputs.setdefault(path, []).append(layer_input)

    out = _run(model, params, mode, (x,), {}, probes, record)
    return out, inputs


def layer_inputs(model: nn.Module, params, mode, x, paths) -> dict[str, jax.Array]:
    """Runs a network in a mode up to some layers and returns what goes into them.

    Args:
      model: any Linen module.
      params: its parameter collection.
      mode: as in `modulated_apply`.
      x: the batch, ``[n, ...]``.
      paths: of Dense or Conv layers.

    Returns:
      ``{path: input of the layer's last call}``, what multiplies the kernel, hence after the key.

    Raises:
      ValueError: the network did not call such a layer.
    """
    inputs = {}

    def record(path, kind, layer_input, _):
        del kind
        if path in paths:
            inputs[path] = layer_input

    _run(model, params, mode, (x,), {}, None, record)
    missing = [path for path in paths if path not in inputs]
    if missing:
        raise ValueError(f"the network did not call {', '.join(missing)}; see find_layers")
    return inputs


def apply_from(model: nn.Module, params, mode, x, path, layer_input):
    """Runs a network in a mode with the input of one layer replaced, as `layer_inputs` gives it.

    What comes before that layer and is not used otherwise costs nothing once compiled.

    Args:
      model: any Linen module.
      params: its parameter collection.
      mode: as in `modulated_apply`.
      x: the batch, ``[n, ...]``; only its shape matters where all goes through that layer.
      path: of a Dense or Conv layer.
      layer_input: what multiplies its kernel; reshaped to the layer's input.

    Returns:
      What ``model.apply`` returns.
    """
    return _run(model, params, mode, (x,), {}, replaced={path: layer_input})


def find_layers(model: nn.Module, params, x) -> dict[str, Layer]:
    """Lists the Dense and Conv layers of a network in the order of their first call.

    Args:
      model: any Linen module.
      params: its parameters, or their shapes (`jax.eval_shape`).
      x: a batch or its shape, ``[n, ...]``; nothing is computed.

    Returns:
      ``{path: Layer}``.
    """
    layers = {}

    def record(path, kind, layer_input, output):
        calls = layers[path].calls + 1 if path in layers else 1
        layers[path] = Layer(
            kind, layer_input.shape[-1], output.shape[-1], calls, layer_input.ndim, output.shape
        )

    jax.eval_shape(lambda p, b: _run(model, p, {}, (b,), {}, None, record), params, x)
    return layers


def matching(layers: dict[str, Layer], pattern: str) -> dict[str, Layer]:
    """The layers whose whole path matches a regular expression, in their order.

    Args:
      layers: as `find_layers` returns them.
      pattern: matched against the whole path; ``"(?!output$).*"`` leaves one layer out.

    Returns:
      The part of ``layers`` that matches.

    Raises:
      ValueError: none does; lists those there are.
    """
    found = {path: layer for path, layer in layers.items() if re.fullmatch(pattern, path)}
    if not found:
        raise ValueError(f"{pattern!r} matches no layer; there are: {', '.join(layers)}")
    return found


def select(bank, task) -> dict[str, Any]:
    """Takes the mode of a task out of a bank.

    Args:
      bank: a tree like a mode with a leading task axis, leaves ``[T, width]`` or seeds.
      task: int scalar, or int ``[n]`` with one task id per example; may be traced.

    Returns:
      A mode with leaves ``[width]``, or ``[n, width]`` for task ids. A task beyond ``T`` gives
      NaN biases instead of silently those of the last task.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.modulation import select
      >>> bank = {"out": {"bias": jnp.array([[0.0, 1.0], [2.0, 3.0]])}}
      >>> select(bank, 1)["out"]["bias"].tolist()
      [2.0, 3.0]
      >>> select(bank, jnp.array([1, 0, 1]))["out"]["bias"].tolist()
      [[2.0, 3.0], [0.0, 1.0], [2.0, 3.0]]
    """
    task = jnp.asarray(task)

    def take(leaf):
        if is_seed(leaf):
            return leaf.row(task) if task.ndim == 0 else jax.vmap(leaf.row)(task)
        return leaf.at[task].get(mode="fill", fill_value=jnp.nan)

    return jax.tree.map(take, bank, is_leaf=is_seed)


def merge(*modes) -> dict[str, Any]:
    """Joins modes: biases of one layer add up, keys of one layer multiply.

    Args:
      *modes: modes as in `modulated_apply`.

    Returns:
      One mode.
    """
    merged: dict[str, Any] = {}
    for mode in modes:
        for path, vectors in mode.items():
            layer = merged.setdefault(path, {})
            for name, vector in vectors.items():
                if name not in layer:
                    layer[name] = vector
                else:
                    layer[name] = layer[name] + vector if name == "bias" else layer[name] * vector
    return merged
