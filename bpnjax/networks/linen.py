"""Modes: one network, switched from task to task by a key and a bias per layer.

A **mode** is a dict keyed by layer path that holds at most two vectors a layer::

    mode = {"hidden_0": {"key": f32[inputs], "bias": f32[outputs]}, ...}

    y = W (x * key) + b + bias

``key`` is the context of PSP (parameter superposition), ``bias`` the beneficial perturbation of
BPN. A **bank** is the same tree with a leading task axis, ``[T, ...]``; `select` indexes it with
one task or with one task id per example. The network itself is an ordinary Linen module that
knows nothing of this: `flax.linen.intercept_methods` adds the two vectors while JAX traces.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.tracers import current_trace

from bpnjax.modes.keys import is_seed
from bpnjax.networks.fixed import Fixed, fixed, split
from bpnjax.networks.layers import (
    Layer,
    Layers,
    bias_for,
    describe,
    inside_nn_jit,
    key_for,
    layer_call,
    matching,
    others_of,
    own_kernel,
)

__all__ = [
    "Fixed",
    "Layer",
    "apply_from",
    "find_layers",
    "fixed",
    "layer_inputs",
    "matching",
    "merge",
    "modulated_apply",
    "select",
    "split",
    "tapped_apply",
]


def _variables(params):
    return params if "params" in params else {"params": params}


def _check(model, mode):
    """Refuses what could not be run in a mode, by name and with what to do instead."""
    while isinstance(model, Fixed):
        model = model.module
    if not isinstance(model, nn.Module):
        if isinstance(model, type):
            raise ValueError(f"model is the class {model.__name__}; pass an instance of it")
        name = type(model).__name__
        bases = [base.__module__ for base in type(model).__mro__]
        nnx = any(base.startswith("flax.nnx") for base in bases)
        raise ValueError(
            f"model must be a flax.linen Module, not {'the NNX module ' if nnx else ''}{name}: "
            "modes are added by intercepting the calls of Linen layers"
            + ("; write the network with flax.linen (its layers in nnx.bridge.ToLinen stay NNX)"
               if nnx else "")
        )  # fmt: skip
    for path, vectors in mode.items():
        if wrong := set(vectors) - {"key", "bias"}:
            raise ValueError(
                f"the mode of layer {path!r} has {sorted(wrong)}; a layer has a 'key' and a 'bias'"
            )


def _run(model, params, mode, args, kwargs, probes=None, record=None, replaced=None, seen=None):
    _check(model, mode)
    classes = {} if seen is None else seen
    collections = _variables(params)
    unused = set(mode)
    outside = current_trace()

    def intercept(next_call, call_args, call_kwargs, context):
        if context.module.scope is None:  # unbound: without parameters, as some identities are
            return next_call(*call_args, **call_kwargs)
        classes["/".join(context.module.path)] = type(context.module).__name__
        if context.method_name != "__call__" or not (call_args or "inputs" in call_kwargs):
            return next_call(*call_args, **call_kwargs)
        x, *rest = call_args or (call_kwargs["inputs"],)
        call = layer_call(context, x)
        if call is None:
            return next_call(*call_args, **call_kwargs)
        call_kwargs = {name: value for name, value in call_kwargs.items() if name != "inputs"}
        path, layer_mode = call.path, mode.get(call.path, {})
        unused.discard(path)
        inside = current_trace() != outside
        if layer_mode and inside and inside_nn_jit():
            raise ValueError(
                f"layer {path!r} lies within nn.jit, which would keep this mode for later calls: "
                "drop nn.jit and jit the whole call with jax.jit"
            )
        if "key" in layer_mode:
            x = x * key_for(call, layer_mode["key"], x)
        if replaced is not None and path in replaced:
            x = replaced[path].reshape(x.shape).astype(x.dtype)
        y = next_call(x, *rest, **call_kwargs)
        if "bias" in layer_mode:
            y = y + bias_for(call, layer_mode["bias"], y)
        if probes is not None and path in probes:
            y = y + probes[path].astype(y.dtype)
        if record is not None:
            kernel = context.module.get_variable("params", "kernel")
            plain = not inside and kernel is own_kernel(collections["params"], path)
            record(path, describe(call, x, y, plain), x)
        return y

    with nn.intercept_methods(intercept):
        out = model.apply(collections, *args, **kwargs)
    if unused:
        known = [f"{path!r} is a {classes[path]}" for path in sorted(unused) if path in classes]
        raise ValueError(
            f"the mode names layers that the network did not call: {', '.join(sorted(unused))}"
            + (f" ({', '.join(known)}, which takes neither key nor bias)" if known else "")
            + "; find_layers(model, params, x) lists those it has"
        )
    return out


def modulated_apply(model: nn.Module, params, mode, x, *args, **kwargs):
    r"""Runs a Linen network in a mode.

    For every layer that the mode names, of the classes `bpnjax.networks.layers.KINDS` (Dense, DenseGeneral,
    Conv, ConvLocal, ConvTranspose),

    .. math:: y = W (x \odot key) + b + bias

    and for every other layer the ordinary forward pass. The empty mode ``{}`` is the plain
    network. A layer that is called several times gets its vectors at each call, and so does one
    within `flax.linen.scan`, whose iterations share the vectors as they share the path. For
    DenseGeneral, as in the attention of `flax.linen`, the key lies on all axes that its kernel
    contracts and the bias on all axes of its features, both as one flat vector.

    Args:
      model: any Linen module, or `fixed`; its layers are found by path at trace time.
      params: its parameter collection, or a dict of collections with a ``"params"`` entry.
      mode: ``{path: {"key": [inputs] or [n, inputs], "bias": [outputs] or [n, outputs]}}``; both
        entries optional, any float dtype (cast to that of the layer). With a leading axis ``n``
        each example of the batch has a mode of its own.
      x: the batch, ``[n, ...]``.
      *args: further arguments of the module's call.
      **kwargs: further keyword arguments of ``model.apply``: ``train=True``, ``rngs``,
        ``mutable=["batch_stats"]``, ...

    Returns:
      What ``model.apply`` returns.

    Raises:
      ValueError: the model is not a Linen module; or the mode names a layer that the network did
        not call, has entries of wrong width or other names, or names a layer within
        `flax.linen.jit`, whose cache would keep the mode.

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
      probes: ``{path: array}``, each of the shape of that layer's output; added to it. Of layers
        that `find_layers` calls ``plain``.

    Returns:
      The network's output, and ``{path: [input of each call]}`` for the probed layers: what
      multiplies the kernel, hence after the key.
    """
    inputs = {}

    def record(path, layer, layer_input):
        del layer
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
      paths: of layers that `find_layers` calls ``plain``.

    Returns:
      ``{path: input of the layer's last call}``, what multiplies the kernel, hence after the key.

    Raises:
      ValueError: the network did not call such a layer, or calls it within nn.scan or the like.

    Example:
      >>> import jax.numpy as jnp, flax.linen as nn
      >>> from bpnjax.networks import linen
      >>> net = nn.Sequential([nn.Dense(2), nn.relu, nn.Dense(1)])
      >>> params = {"layers_0": {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}}
      >>> params["layers_2"] = {"kernel": jnp.ones((2, 1)), "bias": jnp.zeros(1)}
      >>> x = jnp.array([[-3.0, 5.0]])
      >>> features = linen.layer_inputs(net, params, {}, x, ("layers_2",))["layers_2"]
      >>> features.tolist()
      [[0.0, 5.0]]
      >>> linen.apply_from(net, params, {}, x, "layers_2", features + 1.0).tolist()
      [[7.0]]
    """
    inputs = {}

    def record(path, layer, layer_input):
        if path in paths:
            if not layer.plain:
                raise ValueError(
                    f"layer {path!r} lies within nn.scan, nn.remat, nn.vmap or the like, or its "
                    "kernel is not the one in params (nn.WeightNorm); its input has no meaning here"
                )
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
      path: of a layer, as in `layer_inputs`.
      layer_input: what multiplies its kernel; reshaped to the layer's input.

    Returns:
      What ``model.apply`` returns.
    """
    return _run(model, params, mode, (x,), {}, replaced={path: layer_input})


def find_layers(model: nn.Module, params, x, *args, **kwargs) -> Layers:
    """Lists the layers of a network that take a key and a bias, in the order of their first call.

    Args:
      model: any Linen module, or `fixed`.
      params: its parameters or collections, or their shapes (`jax.eval_shape`).
      x: a batch or its shape, ``[n, ...]``; nothing is computed.
      *args: further arguments of the module's call.
      **kwargs: further keyword arguments of ``model.apply``.

    Returns:
      ``{path: Layer}``, a dict whose ``others`` are the modules beside them that have parameters:
      norms, embeddings and whatever `matching` will refuse.

    Raises:
      ValueError: the model is not a Linen module.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn
      >>> from bpnjax.networks.linen import find_layers
      >>> net, tokens = nn.MultiHeadDotProductAttention(num_heads=2), jnp.ones((1, 5, 8))
      >>> params = net.init(jax.random.key(0), tokens)["params"]
      >>> layers = find_layers(net, params, tokens)
      >>> list(layers), layers["query"].inputs, layers["query"].outputs
      (['query', 'key', 'value', 'out'], 8, 8)
    """
    found, classes = Layers(), {}

    def record(path, layer, _):
        calls = found[path].calls if path in found else 0
        found[path] = layer._replace(calls=calls + 1)

    def run(params, x):
        _run(model, params, {}, (x, *args), kwargs, record=record, seen=classes)

    jax.eval_shape(run, params, x)
    found.others = others_of(_variables(params)["params"], found, classes)
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
      >>> from bpnjax.networks.linen import select
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
    r"""Joins modes: biases of one layer add up, keys of one layer multiply.

    .. math:: key = \prod_i key_i, \quad bias = \sum_i bias_i

    Args:
      *modes: modes as in `modulated_apply`.

    Returns:
      One mode, of all layers that one of them names.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.networks.linen import merge
      >>> one, other = ({"out": {"bias": jnp.array([value])}} for value in (1.0, 2.0))
      >>> merge(one, other)["out"]["bias"].tolist()
      [3.0]
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
