"""Networks written with `flax.linen`: the adapter that runs them in a mode.

The network is an ordinary Linen module that knows nothing of modes. While JAX traces it,
`flax.linen.intercept_methods` multiplies the input of a layer by its key and adds the bias to its
output. A layer is a module of one of the classes `KINDS`, which multiply their input by a kernel.
"""

import dataclasses
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.tracers import current_trace
from flax.errors import (
    InvalidRngError,
    ModifyScopeVariableError,
    ScopeCollectionNotFound,
    ScopeVariableNotFoundError,
)

from bpnjax.networks.base import (
    Network,
    Outputs,
    abstract,
    align,
    batch_axis,
    check_mode,
    one_example,
)
from bpnjax.networks.layers import KERNELS, Layer, Layers, Other
from bpnjax.utils import prng

__all__ = ["KINDS", "find_layers", "from_linen", "modulated_apply"]

KINDS: dict[Any, str] = {
    nn.Dense: "dense",
    nn.DenseGeneral: "dense_general",
    nn.Conv: "conv",
    nn.ConvLocal: "conv",
    nn.ConvTranspose: "conv",
}
_TRAIN = {  # arguments that tell a module that it trains, and their values in training
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}


class Call(NamedTuple):
    """One call of a layer: where it is and on which axes its key and bias lie."""

    path: str
    kind: str
    contracted: tuple[int, ...]  # axes of the input that the kernel contracts, ascending
    features: int  # how many of the output's last axes are features


def layer_call(context: Any, x: Any) -> Call | None:
    """Describes an intercepted call of `flax.linen` if it is a call of a layer of `KINDS`.

    Args:
      context: `flax.linen.module.InterceptorContext`.
      x: the call's input.

    Returns:
      `Call`. None for any other module, for a DenseGeneral with batch dimensions, and for a
      subclass that does not call its base's ``__call__``.
    """
    module = context.module
    base = next((base for base in KINDS if isinstance(module, base)), None)
    # A subclass with its own __call__ is intercepted at super().__call__, or not at all.
    if base is None or context.orig_method.func is not base.__call__.__wrapped__:
        return None
    path = "/".join(module.path)
    if base is not nn.DenseGeneral:
        return Call(path, KINDS[base], (x.ndim - 1,), 1)
    if _as_tuple(module.batch_dims):
        return None  # each row of the batch has a kernel of its own
    contracted = tuple(sorted(axis % x.ndim for axis in _as_tuple(module.axis)))
    return Call(path, KINDS[base], contracted, len(_as_tuple(module.features)))


def _as_tuple(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def describe(call: Call, x: Any, y: Any, plain: bool) -> Layer:
    """The `Layer` that a call belongs to.

    Args:
      call: of a layer.
      x: its input, or the input's shape.
      y: its output, or the output's shape.
      plain: see `Layer`.

    Returns:
      `Layer`, with one call counted.
    """
    inputs = math.prod(x.shape[axis] for axis in call.contracted)
    outputs = math.prod(y.shape[y.ndim - call.features :])
    return Layer(call.kind, inputs, outputs, 1, x.ndim, y.shape, plain)


def own_kernel(params: Any, path: str) -> Any:
    """The kernel of a layer as it is in the parameters.

    Args:
      params: a parameter collection.
      path: of the layer, names joined by ``/``; "" for the network itself.

    Returns:
      The array, or None if there is none.
    """
    for name in path.split("/") if path else ():
        params = params.get(name, {})
    return params.get("kernel")


def others_of(
    params: Any, layers: Mapping[str, Layer], classes: dict[str, str]
) -> dict[str, Other]:
    """The modules that have parameters but are not layers, by path.

    Args:
      params: a parameter collection.
      layers: by path.
      classes: ``{path: class name}`` of all modules that were called.

    Returns:
      ``{path: Other}``, named by the nearest module that was called.
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
        kind = "?" if called is None else classes[called]
        kind = kind if called == owner else f"in {kind}"
        others[owner] = Other(kind, before.multiplies or names[-1].lower() in KERNELS)
    return others


def inside_nn_jit() -> bool:
    """Whether the code is traced within `flax.linen.jit`, which would keep a mode as constants.

    Returns:
      True or False, from the frames of the Python stack.
    """
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "jitted" and frame.f_globals.get("__name__") == "flax.core.lift":
            return True
        frame = frame.f_back
    return False


def _variables(params: Any) -> Mapping[str, Any]:
    return params if "params" in params else {"params": params}


def _check(model: Any, mode: Mapping[str, Any]) -> None:
    """Raises an error for a model that cannot run in a mode, and says what to do instead."""
    if not isinstance(model, nn.Module):
        if isinstance(model, type):
            raise ValueError(f"model is the class {model.__name__}; pass an instance of it")
        name = type(model).__name__
        bases = [base.__module__ for base in type(model).__mro__]
        nnx = any(base.startswith("flax.nnx") for base in bases)
        raise ValueError(
            f"model must be a flax.linen Module, not {'the NNX module ' if nnx else ''}{name}: "
            "modes are added by intercepting the calls of Linen layers"
            + ("; use networks.from_nnx" if nnx else "")
        )  # fmt: skip
    check_mode(mode)


def _run(
    model: nn.Module,
    params: Any,
    mode: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    probes: Mapping[str, jax.Array] | None = None,
    record: Callable[[str, Layer, jax.Array], None] | None = None,
    replaced: Mapping[str, jax.Array] | None = None,
    seen: dict[str, str] | None = None,
    freeze_statistics: bool = False,
) -> Any:
    _check(model, mode)
    classes = {} if seen is None else seen
    collections = _variables(params)
    unused = set(mode)
    outside, batch = current_trace(), batch_axis(args[0])
    outputs = Outputs()

    def intercept(
        next_call: Callable[..., Any],
        call_args: tuple[Any, ...],
        call_kwargs: dict[str, Any],
        context: Any,
    ) -> Any:
        if context.module.scope is None:  # unbound, without parameters, like some identities
            return next_call(*call_args, **call_kwargs)
        classes["/".join(context.module.path)] = type(context.module).__name__
        if isinstance(context.module, nn.BatchNorm) and context.method_name == "__call__":
            call_kwargs = dict(call_kwargs)
            x, *rest = call_args or (call_kwargs.pop("x"),)

            def norm(x: jax.Array) -> Any:
                if freeze_statistics:
                    return _on_running_statistics(
                        context.module, next_call, (x, *rest), call_kwargs
                    )
                return next_call(x, *rest, **call_kwargs)

            return outputs.behind(norm, x)
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
            x = x * align(path, "key", layer_mode["key"], x, call.contracted)
        if replaced is not None and path in replaced:
            x = replaced[path].reshape(x.shape).astype(x.dtype)
        y = next_call(x, *rest, **call_kwargs)
        if probes is not None and path in probes:
            y = y + probes[path].astype(y.dtype)
        y = outputs.act(y, layer_mode, path, call.features, 0 in call.contracted)
        if record is not None:
            kernel = context.module.get_variable("params", "kernel")
            own = kernel is own_kernel(collections["params"], path)
            plain = not inside and own and x.shape[:1] == batch
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


def _on_running_statistics(
    norm: Any, next_call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Calls a BatchNorm with its running statistics, whatever the network asked for."""
    told = norm.use_running_average
    if told is None:
        return next_call(*args[:1], **{**kwargs, "use_running_average": True})
    # Set in the constructor. Flax clones modules for each apply, so this changes one call only.
    object.__setattr__(norm, "use_running_average", True)
    try:
        return next_call(*args, **kwargs)
    finally:
        object.__setattr__(norm, "use_running_average", told)


def modulated_apply(
    model: nn.Module, params: Any, mode: Mapping[str, Any], x: Any, *args: Any, **kwargs: Any
) -> Any:
    r"""Runs a Linen network in a mode.

    For every layer that the mode names and that is of a class in `KINDS` (Dense, DenseGeneral,
    Conv, ConvLocal, ConvTranspose),

    .. math:: y = (W (x \odot key) + b) \odot gain + bias

    All other layers do their ordinary forward pass. The empty mode ``{}`` is the plain network. If
    a BatchNorm directly follows a layer, gain and bias act behind the norm, because the norm would
    undo them (`bpnjax.networks.base.Outputs`). A layer that is called several times gets its
    vectors at each call. The iterations of `flax.linen.scan` share the vectors, as they share the
    path. For DenseGeneral, as in the attention of `flax.linen`, the key covers all axes that the
    kernel contracts and the bias covers all feature axes, both as one flat vector.

    Args:
      model: any Linen module; its layers are found by path at trace time.
      params: its parameter collection, or a dict of collections with a ``"params"`` entry.
      mode: ``{path: {"key": [inputs] or [n, inputs], "bias": [outputs] or [n, outputs]}}``, or
        other entries of `bpnjax.modes.VECTORS`. All are optional. Any float dtype is cast to that
        of the layer. With a leading axis ``n`` each example of the batch has its own mode.
      x: the batch, ``[n, ...]``.
      *args: further arguments of the module's call.
      **kwargs: further keyword arguments of ``model.apply``: ``train=True``, ``rngs``,
        ``mutable=["batch_stats"]``, ...

    Returns:
      What ``model.apply`` returns.

    Raises:
      ValueError: the model is not a Linen module; or the mode names a layer that the network did
        not call, has an unknown entry or one of the wrong width, or names a layer within
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


def find_layers(model: nn.Module, params: Any, x: Any, *args: Any, **kwargs: Any) -> Layers:
    """Lists the layers of a network that take a mode, in the order of their first call.

    Args:
      model: any Linen module.
      params: its parameters or collections, or their shapes (`jax.eval_shape`).
      x: a batch or its shape, ``[n, ...]``. The network is traced, not run.
      *args: further arguments of the module's call.
      **kwargs: further keyword arguments of ``model.apply``.

    Returns:
      `Layers`, a dict ``{path: Layer}``. Its ``others`` are the other modules that have parameters,
      such as norms and embeddings.

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
    found = Layers()
    classes: dict[str, str] = {}

    def record(path: str, layer: Layer, _: Any) -> None:
        calls = found[path].calls if path in found else 0
        found[path] = dataclasses.replace(layer, calls=calls + 1)

    def run(params: Any, x: Any) -> None:
        _run(model, params, {}, (x, *args), kwargs, record=record, seen=classes)

    jax.eval_shape(run, params, x)
    found.others = others_of(_variables(params)["params"], found, classes)
    found.known = tuple(kind.__name__ for kind in KINDS)
    return found


def from_linen(module: nn.Module, x: Any, *, train: str | None = "", **kwargs: Any) -> Network:
    r"""Adapts a network written with `flax.linen`.

    .. math:: y = (W (x \odot key) + b) \odot gain + bias

    This holds for every layer of the classes `KINDS` that the mode names. The network may be
    nested, share layers and use attention, norms, dropout and embeddings. See `modulated_apply`.

    Args:
      module: an instance of a Linen module, whose call takes a batch and returns the outputs.
      x: a batch or its shape (`jax.ShapeDtypeStruct`), ``[n, ...]``; only its shape and dtype are
        used.
      train: name of the argument that tells the call that it trains; None if it has none. By
        default it is found among ``train``, ``training``, ``is_training``, ``deterministic`` and
        ``use_running_average``; the last two are passed negated.
      **kwargs: further keyword arguments of the call, the same in training and evaluation.

    Returns:
      A `Network`. Dropout draws from the collection ``"dropout"``, in training only.

    Raises:
      ValueError: the module is not a Linen module, the call has no argument of the name ``train``,
        or it cannot be run on ``x``.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn
      >>> from bpnjax import networks
      >>> net = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)])
      >>> network = networks.from_linen(net, jnp.ones((1, 5)))
      >>> params, variables = network.init(jax.random.key(0))
      >>> list(network.layers), variables
      (['layers_0', 'layers_2'], {})
      >>> outputs, _ = network.apply(params, {"layers_2": {"bias": jnp.ones(2)}}, jnp.ones((3, 5)))
      >>> outputs.shape
      (3, 2)

    Source: Wen et al. 2020 (arXiv 2009.13954), Eq. 1-4, for the bias; Cheung et al. 2019 (arXiv
    1902.05522) for the key.
    """
    _check(module, {})
    argument, when_training = _train_argument(module, train)
    shape = abstract(x)
    evaluation = {**kwargs, **({argument: not when_training} if argument else {})}

    def init(key: jax.Array) -> tuple[Any, dict[str, Any]]:
        collections = dict(module.init(key, jnp.zeros(shape.shape, shape.dtype), **evaluation))
        params = collections.pop("params", {})
        return params, {name: tree for name, tree in collections.items() if not _sown(tree)}

    def apply(
        params: Any,
        mode: Any,
        x: jax.Array,
        *,
        variables: dict[str, Any] | None = None,
        train: bool = False,
        key: jax.Array | None = None,
        freeze_statistics: bool = False,
    ) -> tuple[Any, dict[str, Any]]:
        variables = variables or {}
        collections = {"params": params, **variables}
        if not train:
            return _evaluated(collections, mode, x), variables
        options: dict[str, Any] = {**kwargs, **({argument: when_training} if argument else {})}
        if key is not None:
            options["rngs"] = {"dropout": key}
        if variables:
            options["mutable"] = list(variables)
        try:
            out = _run(
                module, collections, mode, (x,), options, freeze_statistics=freeze_statistics
            )
        except _NO_STATISTICS as error:
            raise ValueError(
                "the network keeps variables beside its parameters, which network.init returns: "
                f"pass apply(..., variables=variables) ({_said(error)})"
            ) from error
        except InvalidRngError as error:
            raise ValueError(
                "the network draws random numbers in training: pass apply(..., "
                f"key=jax.random.key(...)) ({_said(error)})"
            ) from error
        if not variables:
            return out, variables
        out, changed = out
        return out, {**variables, **changed}

    def _evaluated(collections: Any, mode: Any, x: jax.Array, **options: Any) -> Any:
        try:
            return _run(module, collections, mode, (x,), evaluation, **options)
        except _NO_STATISTICS as error:
            raise _without_statistics(error) from error

    def tapped(
        params: Any,
        mode: Any,
        x: jax.Array,
        *,
        variables: dict[str, Any] | None = None,
        probes: dict[str, jax.Array] | None = None,
        record: tuple[str, ...] = (),
        replaced: dict[str, jax.Array] | None = None,
    ) -> tuple[Any, dict[str, list[jax.Array]]]:
        inputs: dict[str, list[jax.Array]] = {}

        def keep(path: str, layer: Layer, layer_input: jax.Array) -> None:
            del layer
            if path in record:
                inputs.setdefault(path, []).append(layer_input)

        collections = {"params": params, **(variables or {})}
        out = _evaluated(collections, mode, x, probes=probes, record=keep, replaced=replaced)
        return out, inputs

    try:
        shapes = jax.eval_shape(init, prng.key(0))
        layers = find_layers(module, {"params": shapes[0], **shapes[1]}, shape, **evaluation)
    except _NO_STATISTICS as error:
        raise _without_statistics(error) from error
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the network {type(module).__name__} cannot be run on a batch of shape {shape.shape}: "
            f"{' '.join(str(error).split())}"
        ) from error
    return Network(
        init, apply, layers, tapped, name=type(module).__name__, example=one_example(shape)
    )


_NO_STATISTICS = (ModifyScopeVariableError, ScopeCollectionNotFound, ScopeVariableNotFoundError)


def _without_statistics(error: Exception) -> ValueError:
    """The error for an evaluation that uses, or lacks, the statistics of a batch."""
    return ValueError(
        "the network cannot be evaluated example by example: BatchNorm must use its running "
        "statistics there; give its call an argument train (or use_running_average) and pass its "
        "variables, network.bind(variables) or apply(..., variables=...) "
        f"({_said(error)})"
    )


def _sown(collection: Any) -> bool:
    """Whether modules sow into this collection, so that it would grow with each call."""
    nodes = jax.tree.leaves(collection, is_leaf=lambda node: isinstance(node, tuple))
    return any(isinstance(node, tuple) for node in nodes)


def _said(error: Exception) -> str:
    return str(error).splitlines()[0]


def _train_argument(module: nn.Module, name: str | None) -> tuple[str, bool]:
    """The argument that tells the call that it trains, and its value in training; "" for none."""
    if name is None:
        return "", True
    known = inspect.signature(type(module).__call__).parameters
    if name:
        if name not in known:
            raise ValueError(
                f"train: the call of {type(module).__name__} has no argument {name!r}; it has "
                f"{', '.join(list(known)[1:])}"
            )
        return name, _TRAIN.get(name, True)
    return next(
        # A field of the module that is already set must not be given again in the call.
        ((n, v) for n, v in _TRAIN.items() if n in known and getattr(module, n, None) is None),
        ("", True),
    )
