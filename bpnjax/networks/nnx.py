"""Networks written with `flax.nnx`: the adapter that runs them in a mode.

The network is an ordinary NNX module that knows nothing of modes. Every forward pass builds a copy
of it from the arrays that it is given. In this copy each layer of `KINDS` gets a subclass that
multiplies the input by the key and adds the bias to the output. Neither the user's module nor a
class of Flax is changed, so passes may run in several threads and be nested.
"""

import contextlib
import dataclasses
import functools
import inspect
import math
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from flax.core.tracers import current_trace
from flax.nnx.statelib import FlatState

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

__all__ = ["KINDS", "TRAIN_FLAGS", "from_nnx"]

KINDS: dict[type[nnx.Module], str] = {
    nnx.Linear: "dense",
    nnx.LinearGeneral: "dense_general",
    nnx.Conv: "conv",
    nnx.ConvTranspose: "conv",
    nnx.Einsum: "dense_general",
}
TRAIN_FLAGS: Mapping[str, bool] = types.MappingProxyType(
    {  # names of the flags that tell modules that they train, and their values in training
        "deterministic": False,
        "use_running_average": False,
        "train": True,
        "training": True,
        "is_training": True,
    }
)
_COLLECTIONS: dict[Any, str] = {nnx.BatchStat: "batch_stats", nnx.Cache: "cache"}
# Groups of values that are neither parameters nor variables.
_KEY, _COUNT, _KEPT = "key of a random stream", "count of a random stream", "kept as it is"
_ARRAYS = (jax.Array, np.ndarray, np.generic, complex, float, int)  # what JAX takes as an array
_SITE = "_bpnjax_site"  # attribute of a copied layer: its place and its forward pass
_LIFTED = (
    "layer {path!r} lies within a lifted transformation (nnx.scan, nnx.remat, nnx.vmap, nnx.jit); "
    "its input has no meaning here"
)

Params = Any
Variables = dict[str, Any]
Mode = Mapping[str, Mapping[str, Any]]


def from_nnx(
    module: nnx.Module | Callable[[nnx.Rngs], nnx.Module],
    x: Any,
    *,
    train_flags: Mapping[str, bool] = TRAIN_FLAGS,
    **kwargs: Any,
) -> Network:
    r"""Adapts a network written with `flax.nnx`.

    .. math:: y = (W (x \odot key) + b) \odot gain + bias

    This holds for every layer of the classes `KINDS` that the mode names: Linear, LinearGeneral
    (which includes the projections of MultiHeadAttention), Conv, ConvTranspose, and Einsum if it is
    a linear layer, which means that each axis of its kernel is either contracted with the input or
    one of the last axes of the output. The network may be nested, share layers and parameters, and
    use attention, norms, dropout, embeddings, nnx.scan, nnx.vmap, nnx.remat and nnx.jit. A layer
    that is held by several attributes has the path of the first one in alphabetical order, and
    counts as called several times.

    If a BatchNorm directly follows a layer, gain and bias act behind the norm, because the norm
    would undo them. `bpnjax.modes.VECTORS` lists everything that a mode may hold. A subclass of a
    layer takes the mode at its call of ``super().__call__``. For a layer that contracts several
    axes, the key covers all of them in their order in the input, and gain and bias cover all
    feature axes, each as one flat vector.

    Args:
      module: a module, or a function ``rngs -> module``. With a module, ``init`` returns its
        parameters and ignores the key. With a function, ``init`` builds a new network from
        ``nnx.Rngs(key)``. A module is read once, here. It is never changed, and later changes to it
        have no effect.
      x: a batch or its shape (`jax.ShapeDtypeStruct`), ``[n, ...]``; only its shape and dtype are
        used.
      train_flags: ``{name: value in training}``; in evaluation each has the opposite value. The
        flags are set on every attribute of that name that is a bool or None, as
        ``module.train()`` and ``module.eval()`` do, and on every argument of the network's call.
        By default ``deterministic``, ``use_running_average``, ``train``, ``training`` and
        ``is_training``.
      **kwargs: further keyword arguments of the call, the same in training and evaluation.

    Returns:
      A `Network`. Its parameters are the values of all ``nnx.Param`` as a plain dict tree by
      attribute names, such as ``{"layers": {"0": {"kernel": ...}}}`` for the layer ``"layers/0"``.
      Its variables are the values of all other ``nnx.Variable`` by their type (``"batch_stats"``
      for ``nnx.BatchStat``, ``"cache"`` for ``nnx.Cache``, else the type's name), and
      ``"constants"``, JAX arrays that are attributes without a Variable. Random streams are in
      neither: ``apply`` seeds them, and an argument ``rngs`` of the call, from its ``key``. Without
      a key, evaluation uses a fixed one, and training raises an error when it draws.

    Raises:
      ValueError: ``module`` is something else, a parameter holds no array, ``train_flags`` has a
        name that the network does not know, or the network cannot be run on ``x``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from bpnjax.networks.nnx import from_nnx
      >>> def build(rngs):
      ...     hidden, output = nnx.Linear(5, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)
      ...     return nnx.Sequential(hidden, nnx.relu, output)
      >>> network = from_nnx(build, jnp.ones((1, 5)))
      >>> params, variables = network.init(jax.random.key(0))
      >>> list(network.layers), variables
      (['layers/0', 'layers/2'], {})
      >>> params["layers"]["2"]["kernel"].shape
      (4, 2)
      >>> x = jnp.ones((3, 5))
      >>> plain, _ = network.apply(params, {}, x)
      >>> shifted, _ = network.apply(params, {"layers/2": {"bias": jnp.array([0.0, 10.0])}}, x)
      >>> (shifted - plain).round(3).tolist()[0]
      [0.0, 10.0]

    Source: Wen et al. 2020 (arXiv 2009.13954), Eq. 1-4, for the bias; Cheung et al. 2019 (arXiv
    1902.05522) for the key.
    """
    _check_module(module)
    shape = abstract(x)
    if isinstance(module, nnx.Module):
        adapter = _Adapter.of(module, None, train_flags, kwargs)
    else:
        # Only traced: the structure is kept, and nothing is computed.
        adapters: list[_Adapter] = []

        def trace(key: jax.Array) -> None:
            adapters.append(_Adapter.of(_built(module, key), module, train_flags, kwargs))

        jax.eval_shape(trace, prng.key(0))
        (adapter,) = adapters
    try:
        adapter.discover(shape)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the network {adapter.name} cannot be run on a batch of shape {shape.shape}: "
            f"{' '.join(str(error).split())}"
        ) from error
    return Network(
        adapter.init,
        adapter.apply,
        adapter.layers,
        adapter.tapped,
        name=adapter.name,
        example=one_example(shape),
    )


def _check_module(module: Any) -> None:
    """Raises an error for what is neither a module nor a factory, and says what to do instead."""
    name = getattr(module, "__name__", type(module).__name__)
    kind = module if isinstance(module, type) else type(module)
    if any(base.__module__.startswith("flax.linen") for base in kind.__mro__):
        raise ValueError(f"module is of flax.linen ({name}); use networks.from_linen for it")
    if isinstance(module, type):
        raise ValueError(
            f"module is the class {name}; pass an instance of it, or a function that makes one: "
            f"lambda rngs: {name}(..., rngs=rngs)"
        )
    if not (isinstance(module, nnx.Module) or callable(module)):
        raise ValueError(
            "module must be a flax.nnx Module, or a function from nnx.Rngs to one, not "
            f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
        )


def _built(factory: Callable[[nnx.Rngs], nnx.Module], key: jax.Array) -> nnx.Module:
    """The module that a factory makes from a key."""
    module = factory(nnx.Rngs(key))
    if not isinstance(module, nnx.Module):
        raise ValueError(
            "module must be a function from nnx.Rngs to a flax.nnx Module; this one returns "
            f"{type(module).__name__}"
        )
    _mark_data(module)
    return module


def _mark_data(module: nnx.Module) -> None:
    """Marks arrays that are attributes of a new module as data.

    Not every version of Flax does so for traced arrays. As static attributes they would outlive the
    trace.
    """
    for _, node in _nodes(module):
        for name, value in list(vars(node).items()) if isinstance(node, nnx.Pytree) else []:
            # Some versions name the elements of nnx.List by numbers, and treat all of them as data.
            if nnx.is_data(value) or str(name).startswith("_pytree__"):
                continue
            if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value)):
                setattr(node, name, nnx.data(value))


# ------------------------------------------------------------------------------------------
# A module as arrays, and back.
# ------------------------------------------------------------------------------------------


class _Leaf(NamedTuple):
    """The place of one value in a module."""

    path: tuple[Any, ...]  # in the module, in the form of NNX
    group: str  # "params", a collection of the variables, _KEY, _COUNT or _KEPT
    names: tuple[str, ...]  # in the dict tree of its group
    shape: tuple[int, ...]  # of a stream's key or count, which nnx.vmap may have split


def _graph_mode() -> contextlib.AbstractContextManager[Any]:
    """Sets NNX to allow shared modules, whatever the user has set; older versions always do."""
    return nnx.set_graph_mode(True) if hasattr(nnx, "set_graph_mode") else contextlib.nullcontext()


def _nodes(module: nnx.Module | nnx.Rngs) -> list[tuple[str, Any]]:
    """Every object in a module, once each, with the first path that leads to it."""
    with _graph_mode():
        return [("/".join(map(str, path)), node) for path, node in nnx.iter_graph(module)]


def _raw(value: Any) -> Any:
    """The value that a Variable holds; other accessors copy it or run the user's hooks."""
    if not isinstance(value, nnx.Variable):
        return value
    return value.get_raw_value() if hasattr(type(value), "get_raw_value") else value.raw_value


def _take_apart(module: nnx.Module) -> tuple[Any, tuple[_Leaf, ...], list[Any]]:
    """Splits a module into its structure, the places of its values, and the values."""
    with _graph_mode():
        graphdef, state = nnx.split(module)
    leaves, values = [], []
    for path, variable in nnx.to_flat_state(state):
        value = _raw(variable)
        group = _group(path, variable, value)
        if group not in (_KEY, _COUNT, _KEPT):
            value = jax.tree.map(jnp.asarray, value)
        # A dict within the module may have names with a slash, and parameter paths are split there.
        names = tuple("/".join(map(str, path)).split("/"))
        shape = jnp.shape(value) if group in (_KEY, _COUNT) else ()
        leaves.append(_Leaf(path, group, names, shape))
        values.append(value)
    twice = [names for names, count in Counter(leaf.names for leaf in leaves).items() if count > 1]
    if twice:
        raise ValueError(f"two values of the module have the path {'/'.join(twice[0])!r}")
    return graphdef, tuple(leaves), values


def _group(path: tuple[Any, ...], variable: Any, value: Any) -> str:
    """The tree that a value of a module belongs to."""
    if isinstance(variable, nnx.RngKey):
        return _KEY
    if isinstance(variable, nnx.RngCount):
        return _COUNT
    held = jax.tree.leaves(value)
    arrays = all(isinstance(leaf, _ARRAYS) for leaf in held)
    if isinstance(variable, nnx.Param):
        if not arrays:
            raise ValueError(
                f"parameter {'/'.join(map(str, path))!r} holds a {type(held[0]).__name__} instead "
                "of an array; build the module of arrays, not of their shapes or of references"
            )
        return "params"
    if isinstance(variable, nnx.Variable):
        name = _COLLECTIONS.get(type(variable), type(variable).__name__)
        return name if arrays and held else _KEPT
    # A NumPy array may determine shapes, and it cannot depend on a key.
    return "constants" if isinstance(value, jax.Array) else _KEPT


def _without_intermediates(module: nnx.Module) -> nnx.Module:
    """A copy of a module without the values that earlier calls left by ``sow``."""
    with _graph_mode():
        graphdef, state = nnx.split(module)
        values = [(path, _raw(value)) for path, value in nnx.to_flat_state(state)]
        copy = nnx.merge(graphdef, FlatState(values, sort=True))
        nnx.pop(copy, nnx.Intermediate)
    return copy


def _look_up(tree: Any, names: tuple[str, ...], missing: str) -> Any:
    """A value of a dict tree; raises ValueError(missing) if it is not there."""
    for name in names:
        if not isinstance(tree, Mapping) or name not in tree:
            raise ValueError(missing)
        tree = tree[name]
    return tree


# ------------------------------------------------------------------------------------------
# Layers of the copy.
# ------------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class _Pass:
    """One forward pass: its inputs, and what it records."""

    mode: Mode
    train: bool = False
    frozen: bool = False
    probes: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
    record: tuple[str, ...] = ()
    replaced: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
    own_kernels: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    found: Layers = dataclasses.field(default_factory=Layers)
    inputs: dict[str, list[jax.Array]] = dataclasses.field(default_factory=dict)
    reached: set[str] = dataclasses.field(default_factory=set)
    batch: tuple[int, ...] = ()
    outside: Any = dataclasses.field(default_factory=current_trace)
    outputs: Outputs = dataclasses.field(default_factory=Outputs)

    def layer(
        self,
        path: str,
        module: Any,
        x: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Runs one call of a layer in the mode."""
        self.reached.add(path)
        base = next(base for base in KINDS if isinstance(module, base))
        call = functools.partial(base.__call__, module)
        axes = _axes(module, x, args, kwargs)
        if axes is None:
            return call(x, *args, **kwargs)
        contracted, features = axes
        vectors = self.mode.get(path, {})
        if "key" in vectors:
            x = x * align(path, "key", vectors["key"], x, contracted)
        if path in self.replaced:
            x = jnp.reshape(self.replaced[path], x.shape).astype(x.dtype)
        y = call(x, *args, **kwargs)
        last = tuple(range(y.ndim - features, y.ndim))
        if path in self.probes:
            y = y + self.probes[path].astype(y.dtype)
        inside = current_trace() != self.outside
        if path in self.record:
            if inside:
                raise ValueError(_LIFTED.format(path=path))
            self.inputs.setdefault(path, []).append(x)
        kernel, before = _raw(module.kernel), self.found.get(path)
        own = path in self.own_kernels and kernel is self.own_kernels[path]
        plain = not inside and own and x.shape[:1] == self.batch
        self.found[path] = Layer(
            KINDS[base],
            math.prod(x.shape[axis] for axis in contracted),
            math.prod(y.shape[axis] for axis in last),
            before.calls + 1 if before else 1,
            x.ndim,
            tuple(y.shape),
            plain and (before is None or before.plain),
        )
        return self.outputs.act(y, vectors, path, features, 0 in contracted)


@dataclasses.dataclass(frozen=True, eq=False)
class _Site:
    """A layer's place, kept as a static attribute so that lifted transformations carry it along.

    It is compared and hashed by identity, so nnx.jit traces each pass anew and keeps no mode of an
    earlier pass.
    """

    path: str
    run: _Pass

    def __deepcopy__(self, memo: Any) -> "_Site":
        return self


def _takes_mode(base: type) -> Callable[..., Any]:
    """The call of a layer of the copy."""

    def __call__(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        site = vars(self).get(_SITE)
        if site is None:  # a layer that was made during the pass
            return base.__call__(self, inputs, *args, **kwargs)
        return site.run.layer(site.path, self, inputs, args, kwargs)

    return __call__


def _normalises(base: type) -> Callable[..., Any]:
    """The call of BatchNorm, for networks that choose its statistics by an argument."""

    def __call__(self: Any, x: Any, use_running_average: bool | None = None, **kwargs: Any) -> Any:
        site = vars(self).get(_SITE)
        if site is None:
            return base.__call__(self, x, use_running_average, **kwargs)
        behind = site.run.outputs.behind
        if site.run.frozen:
            return behind(lambda x: base.__call__(self, x, True, **kwargs), x)
        running = self.use_running_average if use_running_average is None else use_running_average
        if not site.run.train and not running:
            raise ValueError(
                "the network cannot be evaluated example by example: BatchNorm must use its "
                f"running statistics there, and {site.path!r} is told not to; give the network's "
                "call an argument train (or use_running_average), or let BatchNorm follow its "
                "attribute use_running_average"
            )
        return behind(lambda x: base.__call__(self, x, use_running_average, **kwargs), x)

    return __call__


_CALLS: dict[type[nnx.Module], Callable[[type], Callable[..., Any]]] = {
    **dict.fromkeys(KINDS, _takes_mode),
    nnx.BatchNorm: _normalises,
}


def _unseeded(base: type) -> Callable[..., Any]:
    """The call of a random stream in training without a key."""

    def __call__(self: Any) -> jax.Array:
        raise ValueError(
            "the network draws random numbers in training (dropout): pass apply(..., train=True, "
            "key=jax.random.key(...))"
        )

    return __call__


@functools.cache
def _with(call: Callable[[type], Callable[..., Any]], base: type, cls: type) -> type:
    """A subclass of ``cls`` in which ``base`` has another call.

    Where ``cls`` is derived from ``base``, the changed subclass of ``base`` stands between the two
    in the order of inheritance, so that ``super().__call__`` finds it.
    """
    bases = (cls,) if cls is base else (cls, _with(call, base, base))
    body = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    if cls is base:
        body["__call__"] = call(base)
    # Each class must declare anew whether it is a pytree.
    options = {"pytree": cls._pytree__is_pytree}  # type: ignore[attr-defined]
    return types.new_class(cls.__name__, bases, options, lambda names: names.update(body))


def _swap(node: Any, call: Callable[[type], Callable[..., Any]], base: type) -> None:
    """Gives an object of the copy the class of `_with`, without its own ``__setattr__``."""
    cls: type = type(node)
    object.__setattr__(node, "__class__", _with(call, base, cls))


def _axes(
    module: Any, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[int, ...], int] | None:
    """The input axes that a call contracts and its number of feature axes; None if not linear."""
    if isinstance(module, nnx.LinearGeneral):
        if module.batch_axis:
            return None  # each row of the batch has its own kernel
        return tuple(sorted(axis % x.ndim for axis in module.axis)), len(module.out_features)
    if isinstance(module, nnx.Einsum):
        given = args[0] if args else kwargs.get("einsum_str")
        equation = module.einsum_str if given is None else given
        return _einsum_axes(equation, x.ndim, len(module.kernel_shape))
    return (x.ndim - 1,), 1


def _einsum_axes(
    equation: str, input_axes: int, kernel_axes: int
) -> tuple[tuple[int, ...], int] | None:
    """`_axes` of an einsum of an input and a kernel.

    It is a linear layer if each axis of the kernel is either contracted with the input or a
    feature, the other axes of the input keep their order, and the features come after them.
    """
    operands, _, result = equation.replace(" ", "").partition("->")
    of_input, _, of_kernel = operands.partition(",")
    unnamed = input_axes - len(of_input.replace("...", ""))
    if kernel_axes != len(of_kernel.replace("...", "")):
        return None  # an ellipsis that stands for axes of the kernel
    dots = [f"...{i}" for i in range(unnamed)]

    def labels(term: str) -> list[str]:
        before, ellipsis, after = term.partition("...")
        return [*before, *(dots if ellipsis else []), *after]

    inputs, kernel, outputs = labels(of_input), [*of_kernel.replace("...", "")], labels(result)
    if any(len(set(term)) < len(term) for term in (inputs, kernel, outputs)):
        return None
    contracted = tuple(axis for axis, label in enumerate(inputs) if label in kernel)
    others = [label for label in inputs if label not in kernel]
    features = [label for label in kernel if label not in inputs]
    if not contracted or not features or outputs[: len(others)] != others:
        return None
    return (contracted, len(features)) if {*outputs[len(others) :]} == {*features} else None


# ------------------------------------------------------------------------------------------
# The network.
# ------------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class _Adapter:
    """The known facts about a network, and the functions of `Network`."""

    name: str
    factory: Callable[[nnx.Rngs], nnx.Module] | None
    graphdef: Any
    leaves: tuple[_Leaf, ...]
    values: list[Any]  # all values of a given module; only those of _KEPT for a factory
    flags: Mapping[str, bool]
    arguments: frozenset[str]  # names of the arguments of the network's call
    kwargs: dict[str, Any]
    classes: dict[str, type]  # of all modules, by path
    shared: frozenset[str]  # modules that share a Variable with another module
    layers: Layers = dataclasses.field(default_factory=Layers)

    @classmethod
    def of(
        cls,
        module: nnx.Module,
        factory: Callable[[nnx.Rngs], nnx.Module] | None,
        flags: Mapping[str, bool],
        kwargs: dict[str, Any],
    ) -> "_Adapter":
        """Reads a module, or the traced result of a factory."""
        graphdef, leaves, values = _take_apart(_without_intermediates(module))
        if factory is not None:
            values = [
                value if leaf.group == _KEPT else None
                for leaf, value in zip(leaves, values, strict=True)
            ]
        modules = {path: node for path, node in _nodes(module) if isinstance(node, nnx.Module)}
        arguments = frozenset(inspect.signature(type(module).__call__).parameters)
        known = arguments.union(*(_flags_of(node, flags) for node in modules.values()))
        if wrong := set(flags) - set(TRAIN_FLAGS) - known:
            raise ValueError(
                f"train_flags: neither the call of {type(module).__name__} has an argument nor one "
                f"of its modules an attribute {sorted(wrong)[0]!r} that is True, False or None"
            )
        owned = {path: set(_variables_of(node)) for path, node in modules.items()}
        owners = Counter(variable for variables in owned.values() for variable in variables)
        shared = frozenset(path for path, own in owned.items() if any(owners[v] > 1 for v in own))
        return cls(
            name=type(module).__name__,
            factory=factory,
            graphdef=graphdef,
            leaves=leaves,
            values=values,
            flags=flags,
            arguments=arguments,
            kwargs=kwargs,
            classes={path: type(node) for path, node in modules.items()},
            shared=shared,
        )

    def discover(self, shape: jax.ShapeDtypeStruct) -> None:
        """Finds the layers by tracing one evaluation."""

        def trace(params: Params, variables: Variables, x: jax.Array) -> None:
            # Where another layer shares the Variable, one call does not give the whole gradient.
            kernels = {
                "/".join(leaf.names[:-1]): _look_up(params, leaf.names, "")
                for leaf in self.leaves
                if leaf.group == "params" and leaf.names[-1] == "kernel"
            }
            own = {path: kernel for path, kernel in kernels.items() if path not in self.shared}
            run = _Pass({}, own_kernels=own)
            self._forward(run, params, variables, x, None)
            self.layers, reached = run.found, run.reached
            self.layers.others = self._others(reached)
            self.layers.known = tuple(kind.__name__ for kind in KINDS)

        jax.eval_shape(trace, *jax.eval_shape(self.init, prng.key(0)), shape)

    def _others(self, reached: set[str]) -> dict[str, Other]:
        """The modules that have parameters but are not layers."""
        others: dict[str, Other] = {}
        for leaf in self.leaves:
            owner = "/".join(leaf.names[:-1])
            if leaf.group != "params" or owner in self.layers:
                continue
            depth = next(
                depth
                for depth in range(len(leaf.names), -1, -1)
                if "/".join(leaf.names[:depth]) in self.classes
            )
            nearest = "/".join(leaf.names[:depth])
            kind = self.classes[nearest].__name__
            if nearest != owner:
                kind = f"in {kind}"
            elif issubclass(self.classes[nearest], tuple(KINDS)) and nearest not in reached:
                kind = f"{kind}, which is not called"
            multiplies = owner in others and others[owner].multiplies
            others[owner] = Other(kind, multiplies or leaf.names[-1].lower() in KERNELS)
        return others

    def init(self, key: jax.Array) -> tuple[Params, Variables]:
        """``key -> (params, variables)``, see `Network`."""
        values = self.values
        if self.factory is not None:
            module = _without_intermediates(_built(self.factory, key))
            _, leaves, values = _take_apart(module)
            if leaves != self.leaves:
                raise ValueError(
                    "the function that builds the network built another one than before; it must "
                    "always build the same from nnx.Rngs"
                )
        trees: dict[str, dict[tuple[str, ...], Any]] = {"params": {}}
        for leaf, value in zip(self.leaves, values, strict=True):
            if leaf.group not in (_KEY, _COUNT, _KEPT):
                # A copy, so that donating a parameter does not delete the module's own array.
                trees.setdefault(leaf.group, {})[leaf.names] = jax.tree.map(jnp.copy, value)
        collections = {name: traverse_util.unflatten_dict(tree) for name, tree in trees.items()}
        return collections.pop("params"), collections

    def apply(
        self,
        params: Params,
        mode: Mode,
        x: jax.Array,
        *,
        variables: Variables | None = None,
        train: bool = False,
        key: jax.Array | None = None,
        freeze_statistics: bool = False,
    ) -> tuple[Any, Variables]:
        """``(params, mode, x, ...) -> (outputs, variables)``, see `Network`."""
        variables = {} if variables is None else variables
        run = _Pass(mode, train, train and freeze_statistics)
        out, module = self._forward(run, params, variables, x, key)
        if not train or not variables:
            return out, variables
        with _graph_mode():
            state = dict(nnx.to_flat_state(nnx.split(module)[1]))
        changed: dict[str, dict[tuple[str, ...], Any]] = {}
        for leaf in self.leaves:
            if leaf.group not in ("params", _KEY, _COUNT, _KEPT):
                changed.setdefault(leaf.group, {})[leaf.names] = _raw(state[leaf.path])
        trees = {name: traverse_util.unflatten_dict(tree) for name, tree in changed.items()}
        return out, {**variables, **trees}

    def tapped(
        self,
        params: Params,
        mode: Mode,
        x: jax.Array,
        *,
        variables: Variables | None = None,
        probes: Mapping[str, jax.Array] | None = None,
        record: tuple[str, ...] = (),
        replaced: Mapping[str, jax.Array] | None = None,
    ) -> tuple[Any, dict[str, list[jax.Array]]]:
        """``(params, mode, x, ...) -> (outputs, {path: inputs})``, see `Network`."""
        run = _Pass(mode, probes=probes or {}, record=tuple(record), replaced=replaced or {})
        for path in (*run.probes, *run.record, *run.replaced):
            if path not in self.layers:
                known = ", ".join(self.layers)
                raise ValueError(f"the network has no layer {path!r}; it has {known}")
        inputs = run.inputs
        out, _ = self._forward(run, params, {} if variables is None else variables, x, None)
        return out, inputs

    def _forward(
        self, run: _Pass, params: Params, variables: Variables, x: Any, key: jax.Array | None
    ) -> tuple[Any, nnx.Module]:
        """Runs one pass of a copy of the network made from the arrays; returns the copy too."""
        check_mode(run.mode)
        run.batch = batch_axis(x)
        seeds = _seeds(key)
        module = self._assembled(params, variables, seeds)
        flags = {name: on if run.train else not on for name, on in self.flags.items()}
        if run.frozen and "use_running_average" in flags:
            flags["use_running_average"] = True
        options: dict[str, Any] = {name: on for name, on in flags.items() if name in self.arguments}
        nodes = _nodes(module)
        if "rngs" in self.arguments:
            options["rngs"] = nnx.Rngs(next(seeds))
            nodes += _nodes(options["rngs"])
        for path, node in nodes:
            if run.train and key is None and isinstance(node, nnx.RngStream):
                _swap(node, _unseeded, nnx.RngStream)
            if not isinstance(node, nnx.Module):
                continue
            for name in _flags_of(node, flags):
                object.__setattr__(node, name, flags[name])
            base = next((base for base in _CALLS if isinstance(node, base)), None)
            if base is not None:
                object.__setattr__(node, _SITE, _Site(path, run))
                _swap(node, _CALLS[base], base)
        try:
            out = module(x, **{**options, **self.kwargs})
            self._check_used(run)
        finally:
            # The caches of nnx.jit keep static parts of a module, but not the arrays of this pass.
            run.mode, run.probes, run.replaced, run.own_kernels, run.inputs = {}, {}, {}, {}, {}
        return out, module

    def _assembled(
        self, params: Params, variables: Variables, seeds: Iterator[jax.Array]
    ) -> nnx.Module:
        """A module made from its arrays, with its random streams seeded anew."""
        values = []
        for leaf, value in zip(self.leaves, self.values, strict=True):
            path = "/".join(leaf.names)
            if leaf.group == _KEY:
                value = next(seeds)
                value = jax.random.split(value, leaf.shape) if leaf.shape else value
            elif leaf.group == _COUNT:
                value = jnp.zeros(leaf.shape, jnp.uint32)
            elif leaf.group == "params":
                value = _look_up(params, leaf.names, f"params has no {path!r}; see network.init")
            elif leaf.group != _KEPT:
                missing = (
                    f"the network keeps {path!r} beside its parameters, in the variables "
                    f"{leaf.group!r} that network.init returns: pass apply(..., "
                    "variables=variables), or use network.bind(variables)"
                )
                value = _look_up(variables, (leaf.group, *leaf.names), missing)
            values.append((leaf.path, value))
        with _graph_mode():
            module: nnx.Module = nnx.merge(self.graphdef, FlatState(values, sort=True))
        return module

    def _check_used(self, run: _Pass) -> None:
        """Raises an error if the mode names layers that this pass did not call."""
        unused = [path for path in run.mode if path not in run.found]
        if not unused:
            return
        known = [
            f"{path!r} is a {self.classes[path].__name__}"
            for path in unused
            if path in self.classes
            and (path in run.reached or not issubclass(self.classes[path], tuple(KINDS)))
        ]
        raise ValueError(
            f"the mode names layers that the network did not call: {', '.join(sorted(unused))}"
            + (f" ({', '.join(known)}, which takes neither key nor bias)" if known else "")
            + f"; it has {', '.join(self.layers)}"
        )


def _seeds(key: jax.Array | None) -> Iterator[jax.Array]:
    """An endless series of keys from one key, or from a fixed one for None."""
    if key is None:
        key = prng.key(0)
    elif not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)  # of the old kind that jax.random.PRNGKey makes
    number = 0
    while True:
        yield jax.random.fold_in(key, number)
        number += 1


def _flags_of(module: Any, flags: Mapping[str, bool]) -> list[str]:
    """The flags that a module has as attributes; a method called ``train`` is not one."""
    return [name for name in flags if isinstance(getattr(module, name, ""), bool | None)]


def _variables_of(module: nnx.Module) -> Iterator[int]:
    """The ids of the Variables that are direct attributes of a module."""
    return (id(value) for value in vars(module).values() if isinstance(value, nnx.Variable))
