"""Networks by name, and your own networks: what the fields of a configuration build.

    @models.register("mine")
    def mine(num_classes, width=32):
        return MyNetwork(num_classes, width)

A factory is a function or class that takes ``num_classes`` and the options of ``model.options``.
It returns a Linen module, an NNX module or a `bpnjax.networks.Network`.
"""

import ast
import contextlib
import dataclasses
import importlib
import inspect
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax.numpy as jnp

from bpnjax.utils.errors import UserError, suggest

__all__ = ["REGISTRY", "Factory", "build", "find", "load_function", "parse_options", "register"]

F = TypeVar("F", bound=Callable[..., Any])
_RANDOM = ("rngs", "key")  # arguments of an NNX network
_OF_IMAGES = (
    "convnet", "alexnet", "small_alexnet", "resnet18", "vit", "efficientnet_lite0",
)  # fmt: skip
_GIVEN = ("num_classes", "input_shape", *_RANDOM)
# Fields of config.model that a factory may ask for, as values of its arguments.
_FIELDS: dict[str, Callable[[Any], Any]] = {
    "hidden": tuple,
    "channels": tuple,
    "dropout": float,
    "dtype": jnp.dtype,
    "kernel_init": lambda name: getattr(nn.initializers, name)(),
}


@dataclasses.dataclass(frozen=True)
class Factory:
    """A function or class that makes networks.

    Attributes:
      name: in the registry, or ``"module:function"``.
      make: ``(num_classes, **options) -> network``.
      fields: of ``config.model`` that are also arguments of ``make``.
      field: the field of the configuration that names it.
    """

    name: str
    make: Callable[..., Any]
    fields: tuple[str, ...] = ()
    field: str = "model.name"

    @property
    def ours(self) -> bool:
        """Whether it is part of bpnjax."""
        return self.make.__module__.startswith("bpnjax.")

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The arguments of ``make`` by name."""
        try:
            if isinstance(self.make, type):  # NNX's metaclass hides the arguments of a class
                _, *own = inspect.signature(self.make.__init__).parameters.values()  # type: ignore[misc]
            else:
                own = list(inspect.signature(self.make).parameters.values())
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{self.field}: {self.name} does not show its arguments ({error}); wrap it in a "
                "function"
            ) from error
        found = {parameter.name: parameter for parameter in own}
        if isinstance(self.make, type) and issubclass(self.make, nn.Module):
            del found["parent"], found["name"]  # fields of every Linen module
        return found

    def check(self, options: Mapping[str, Any]) -> None:
        """Checks that ``make`` can be called with ``num_classes`` and some options.

        Args:
          options: from `parse_options`.

        Raises:
          UserError: ``make`` takes no ``num_classes``, or an option is unknown, missing or of a
            wrong type.

        Example:
          >>> from bpnjax import models
          >>> models.REGISTRY["resnet18"].check({"widht": 20})
          Traceback (most recent call last):
          ...
          bpnjax.utils.errors.UserError: model.options: resnet18 has no 'widht'; did you mean width?
        """
        found = self.parameters
        anything = any(p.kind is p.VAR_KEYWORD for p in found.values())
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        named = {n: p for n, p in found.items() if p.kind in kinds}
        if "num_classes" not in named and not anything:
            raise UserError(
                f"{self.field}: {self.name} takes no num_classes; define it as "
                f"{self.name.rpartition(':')[2]}(num_classes, ...)"
            )
        own = [n for n in named if n not in (*_GIVEN, *self.fields)]
        for name, value in options.items():
            if name in self.fields:
                raise UserError(
                    f"model.options: {name} of {self.name} is a field; set --config.model.{name}"
                )
            if name in _GIVEN or (name not in own and not anything):
                has = suggest(name, own) if own else "it takes none"
                raise UserError(f"model.options: {self.name} has no {name!r}; {has}")
            if self.ours and (complaint := _complaint(value, named[name].default)):
                raise UserError(f"model.options: {name}={value!r} {complaint}")
        for name, parameter in named.items():
            if name in own and name not in options and parameter.default is parameter.empty:
                raise UserError(f"model.options: {self.name} needs {name}; give it, as {name}=...")

    def __call__(
        self,
        model: Mapping[str, Any],
        num_classes: int,
        input_shape: tuple[int, ...] = (),
        of_features: bool = False,
    ) -> Any:
        """Makes the network; see `build`. Features may have any shape."""
        others = self.name not in _OF_IMAGES or of_features
        if self.ours and not others and input_shape and len(input_shape) != 3:
            raise UserError(
                f"{self.field}: {self.name} is for images, not for examples of shape "
                f"{tuple(input_shape)}; take mlp, or a network of your own (model.factory)"
            )
        options = parse_options(model["options"])
        self.check(options)
        found = self.parameters
        given: dict[str, Any] = {"num_classes": num_classes, **options}
        given |= {name: _FIELDS[name](model[name]) for name in self.fields}
        if "input_shape" in found:
            given["input_shape"] = tuple(input_shape)

        def make(**random: Any) -> Any:
            with _current_folder():  # for imports within the factory
                return self.make(**given, **random)

        if "rngs" in found:
            return lambda rngs: make(rngs=rngs)
        if "key" in found:
            return lambda rngs: make(key=rngs.params())
        return make()

    def described(self, model: Mapping[str, Any]) -> str:
        """The network as a line of text, such as ``"resnet18(width=20)"``."""
        return self.name + (f"({model['options'].strip()})" if model["options"].strip() else "")


def _complaint(value: Any, default: Any) -> str:
    """What is wrong with an option of a network of bpnjax, whose numbers are sizes or shares."""
    kinds = (int, float) if isinstance(default, float) else type(default)
    if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool):
        return f"is of type {type(value).__name__}; give one of type {type(default).__name__}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ""
    if not value >= (1 if isinstance(default, int) else 0):  # also True for NaN
        return "is too small; give a positive number"
    return ""


REGISTRY: dict[str, Factory] = {}


def register(name: str, *, fields: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Registers a factory of networks under a name, for ``model.name``.

    Args:
      name: of the network. Names of this package cannot be replaced.
      fields: of ``config.model`` that are passed as arguments of these names: hidden, channels,
        dropout, dtype, kernel_init.

    Returns:
      A decorator for a function or class, which it returns unchanged. The function is called with
      ``num_classes``, those fields and the options of ``model.options``. If it has such arguments,
      it also gets ``input_shape``, the shape of one example, and, for an NNX network, ``rngs`` (an
      ``nnx.Rngs``) or ``key``.

    Raises:
      ValueError: the name is taken, or there is no such field.

    Example:
      >>> import flax.linen as nn
      >>> from bpnjax import config, models
      >>> @models.register("one_layer")
      ... def one_layer(num_classes, bias=True):
      ...     return nn.Dense(num_classes, use_bias=bias)
      >>> settings = config.default().model
      >>> settings.name, settings.options = "one_layer", "bias=False"
      >>> models.build(settings, num_classes=10).use_bias
      False
      >>> del models.REGISTRY["one_layer"]
    """
    if name in REGISTRY and REGISTRY[name].ours:
        raise ValueError(f"the network {name!r} is one of bpnjax; choose another name")
    if unknown := set(fields) - set(_FIELDS):
        raise ValueError(f"no field {unknown.pop()!r}; choose from: {', '.join(_FIELDS)}")

    def decorate(make: F) -> F:
        REGISTRY[name] = Factory(name, make, fields)
        return make

    return decorate


def find(model: Mapping[str, Any]) -> Factory:
    """Finds the factory that a configuration names.

    Args:
      model: the group `config.model`.

    Returns:
      The factory of ``model.factory``, whose module is imported, or else of ``model.name``.

    Raises:
      UserError: there is no such factory, or its module cannot be imported.
    """
    if model["factory"]:
        make = load_function(model["factory"], "model.factory")
        return Factory(model["factory"], make, field="model.factory")
    name = model["name"]
    if name not in REGISTRY:
        raise UserError(f"model.name: unknown value {name!r}; {suggest(name, REGISTRY)}")
    return REGISTRY[name]


def build(model: Mapping[str, Any], num_classes: int, input_shape: tuple[int, ...] = ()) -> Any:
    """Builds the network that a configuration names.

    Args:
      model: the group `config.model`.
      num_classes: number of outputs.
      input_shape: shape of one example, for a factory that asks for it.

    Returns:
      The return value of the factory, a Linen module for the networks of this package. For a
      factory with an argument ``rngs`` or ``key`` a function from ``nnx.Rngs`` to it.

    Raises:
      UserError: there is no such network, or it does not have these options.

    Example:
      >>> from bpnjax import config, models
      >>> settings = config.default().model
      >>> settings.hidden = (64, 32)
      >>> models.build(settings, num_classes=10).hidden
      (64, 32)
    """
    return find(model)(model, num_classes, input_shape)


def parse_options(text: str) -> dict[str, Any]:
    """Parses Python keyword arguments with literal values; nothing is executed.

    Args:
      text: such as ``"width=20, pool='mean'"``, or empty.

    Returns:
      ``{name: value}``.

    Raises:
      UserError: the text has another form.

    Example:
      >>> from bpnjax.models.registry import parse_options
      >>> parse_options("width=20, sizes=(3, 5), pool='mean'")
      {'width': 20, 'sizes': (3, 5), 'pool': 'mean'}
    """
    try:
        call = ast.parse(f"f({text}\n)", mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)) or call.args:
            raise ValueError
        found: dict[str, Any] = {}
        for keyword in call.keywords:
            if keyword.arg is None or keyword.arg in found:
                raise ValueError
            found[keyword.arg] = ast.literal_eval(keyword.value)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise UserError(
            f"model.options: {text!r} is not a list of keyword arguments with literal values, each "
            "once; write it as width=20, depth=3"
        ) from error
    return found


def load_function(path: str, field: str) -> Callable[..., Any]:
    """Imports the function that a field of the configuration names.

    Args:
      path: ``"package.module:function"``. Modules in the current folder are found too.
      field: the name of the field, for messages.

    Returns:
      The function or class.

    Raises:
      UserError: the module does not exist, raises while it is imported, or has no such function.

    Example:
      >>> from bpnjax.models.registry import load_function
      >>> load_function("bpnjax.models:MLP", "model.factory").__name__
      'MLP'
    """
    module_name, colon, names = path.partition(":")
    if not (colon and module_name and names):
        raise UserError(f"{field}: {path!r} is not MODULE:FUNCTION; write it as my_module:make")
    try:
        with _current_folder():
            importlib.invalidate_caches()
            found: Any = importlib.import_module(module_name)
    except BaseException as error:  # a user's module may raise anything, even SystemExit
        if isinstance(error, KeyboardInterrupt):
            raise
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module_name}.".startswith(f"{missing}."):
            raise UserError(
                f"{field}: no module {missing!r}; it is looked for in the current folder and among "
                "the installed packages"
            ) from error
        raise UserError(f"{field}: importing {module_name} raises {said(error)}; fix it") from error
    for name in names.split("."):
        if not hasattr(found, name):
            members = getattr(found, "__dict__", {}).items()
            own = [n for n, v in members if callable(v) and not n.startswith("_")]
            has = suggest(name, own) if own else "it defines none"
            raise UserError(f"{field}: {module_name} has no function {name!r}; {has}")
        found = getattr(found, name)
    if not callable(found):
        raise UserError(f"{field}: {path} is a {type(found).__name__}; name a function or a class")
    made: Callable[..., Any] = found
    return made


def said(error: BaseException) -> str:
    """An exception as one short line; the class comes first unless it is a ValueError."""
    kind = "" if isinstance(error, ValueError) and str(error) else f"{type(error).__name__}: "
    return textwrap.shorten(f"{kind}{error}", 400, placeholder=" ...").rstrip(": ")


@contextlib.contextmanager
def _current_folder() -> Iterator[None]:
    """Lets imports find the modules of the current folder first, as with ``python -m``."""
    folder = os.getcwd()
    if folder in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
