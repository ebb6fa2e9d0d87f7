"""Settings of methods. A method's signature holds their meaning, default and range.

    @register("mine")
    def mine(
        strength: Annotated[float, Setting("weight of the penalty", at_least=0)] = 1.0,
    ) -> Method:
        ...

`register` makes a `Factory` of such a function: `bpnjax.methods.mine(strength=2.0)` checks its
arguments, and the command gets the field ``mine.strength`` with its meaning, default and check.
"""

import dataclasses
import functools
import inspect
import math
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, ParamSpec

from bpnjax.methods.base import Method, chain
from bpnjax.utils.errors import UserError, suggest

__all__ = ["REGISTRY", "Factory", "Field", "Range", "Setting", "compose", "register"]

P = ParamSpec("P")


@dataclasses.dataclass(frozen=True)
class Range:
    """The range in which `bpnjax.search` looks for a number.

    Attributes:
      low: the smallest value.
      high: the largest value.
      scale: ``"log"`` (each factor is as likely) or ``"linear"``.
      when: ``(field, value)`` of another setting, if the range holds only for this value of it.
      default: the value that None stands for, where a setting may be None.
      own_program: whether the program depends on the value, so that each value is compiled anew.
    """

    low: float
    high: float
    scale: str = "log"
    when: tuple[str, Any] | None = None
    default: float | None = None
    own_program: bool = False


@dataclasses.dataclass(frozen=True)
class Setting:
    """Describes one argument of a method, for ``typing.Annotated``.

    Attributes:
      meaning: one line, shown by ``--help`` and on the settings page.
      at_least: smallest value allowed.
      above: values must be larger than this.
      below: values must be smaller than this.
      choices: the allowed values, if they can be listed.
      pattern: whether it is a regular expression for paths of layers.
      field: the field of the command's configuration; by default GROUP.NAME, with the group of the
        method and the name of the argument.
      search: the ranges in which `bpnjax.search` looks for it. The first one whose condition is met
        counts. Without a range the search does not change the setting.
    """

    meaning: str
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] = ()
    pattern: bool = False
    field: str = ""
    search: tuple[Range, ...] = ()

    def complaint(self, value: Any, default: Any) -> str | None:
        """Says what is wrong with a value, and what to give instead.

        Args:
          value: the value that was given. Arrays of JAX are not checked, as they may be traced.
          default: the default of the argument. The value must have the same type.

        Returns:
          A text such as ``"-1 is below 0; give at least 0"``; None if the value is allowed.

        Example:
          >>> from bpnjax.methods import Setting
          >>> Setting("a share", at_least=0, below=1).complaint(1.5, 0.5)
          '1.5 is not below 1; give a smaller number'
        """
        if hasattr(value, "aval"):
            return None
        optional = default is None
        if not (optional and value is None):
            expected = (float, int) if optional or isinstance(default, float) else type(default)
            fits = isinstance(value, expected)
            if not fits or (isinstance(value, bool) and not isinstance(default, bool)):
                wanted = "float" if optional else type(default).__name__
                return f"{value!r} is of type {type(value).__name__}; give one of type {wanted}"
        if self.choices and value not in self.choices:
            choices = [str(choice) for choice in self.choices]
            return f"unknown value {value!r}; {suggest(str(value), choices)}"
        if self.pattern:
            try:
                re.compile(value)
            except re.error as error:
                return f"{value!r} is not a regular expression ({error}); fix it"
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return self._range(value)
        return None

    @property
    def limits(self) -> str:
        """The range in words, such as ``"at least 0, below 1"``; empty without limits.

        Example:
          >>> from bpnjax.methods import Setting
          >>> Setting("a share", at_least=0, below=1).limits
          'at least 0, below 1'
        """
        named = (("at least", self.at_least), ("above", self.above), ("below", self.below))
        return ", ".join(f"{word} {_exactly(x)}" for word, x in named if x is not None)

    def _range(self, value: float) -> str | None:
        if isinstance(value, float) and not math.isfinite(value):
            return f"{value} is not finite; give a number"
        if self.at_least is not None and value < self.at_least:
            least = _exactly(self.at_least)
            return f"{value} is below {least}; give at least {least}"
        if self.above is not None and value <= self.above:
            return f"{value} is not above {_exactly(self.above)}; give a larger number"
        if self.below is not None and value >= self.below:
            return f"{value} is not below {_exactly(self.below)}; give a smaller number"
        if isinstance(value, int) and not -(2**31) <= value < 2**31:
            return f"{value} is beyond 32 bits; give a smaller number"
        return None


def _exactly(limit: float) -> str:
    """A limit as text, with all digits of a whole number."""
    return str(int(limit)) if float(limit).is_integer() else f"{limit:g}"


@dataclasses.dataclass(frozen=True)
class Field:
    """One setting of a factory: an argument and its field in the configuration."""

    name: str  # of the argument
    setting: Setting
    default: Any
    part: int  # in a composition, the number of the part that takes it


class Factory(Generic[P]):
    """A function that makes a method, with settings that the command knows too.

    Attributes:
      name: of the method, as in ``--config.method=NAME``.
      paper: where it was published.
      group: name of the group of its settings in the configuration.
      parts: the factories of a composition; for other methods the factory itself.
      fields: ``{"group.name": Field}``.
    """

    def __init__(
        self,
        name: str,
        build: Callable[P, Method],
        group: str,
        paper: str = "",
        parts: "tuple[Factory[Any], ...]" = (),
    ) -> None:
        functools.update_wrapper(self, build)
        self.name, self.group, self.paper, self._build = name, group, paper, build
        self.parts = parts or (self,)
        self.fields: dict[str, Field] = {}
        if parts:
            for place, part in enumerate(parts):
                for field, found in part.fields.items():
                    self.fields[field] = dataclasses.replace(found, part=place)
        else:
            self.fields = dict(_fields_of(build, group))

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Method:
        """Makes the method; raises `UserError` for a setting that it does not have or allow."""
        return self._build(*args, **kwargs)

    def checked(self, *args: Any, **kwargs: Any) -> Method:
        """Calls the function after its arguments were checked against their settings."""
        signature = inspect.signature(self._raw)
        known = list(signature.parameters)
        for name in kwargs:
            if name not in known:
                has = f"; {suggest(name, known)}" if known else "; it has none"
                raise UserError(f"{self.group}.{name}: {self.name} has no such setting{has}")
        bound = signature.bind(*args, **kwargs)
        for field, found in self.fields.items():
            value = bound.arguments.get(found.name, found.default)
            if complaint := found.setting.complaint(value, found.default):
                raise UserError(f"{field}: {complaint}")
        return dataclasses.replace(self._raw(*args, **kwargs), name=self.name, paper=self.paper)

    _raw: Callable[..., Method]

    def from_config(self, config: Mapping[str, Any]) -> Method:
        """Makes the method that a configuration describes.

        Args:
          config: a `ConfigDict` with the groups of this method.

        Returns:
          `Method`.

        Example:
          >>> from bpnjax import config, methods
          >>> methods.REGISTRY["bd_ewc"].from_config(config.default()).name
          'bd_ewc'
        """
        values: list[dict[str, Any]] = [{} for _ in self.parts]
        for field, found in self.fields.items():
            group, name = field.split(".")
            values[found.part][found.name] = config[group][name]
        if self.parts == (self,):
            return self(**values[0])  # type: ignore[call-arg]
        made = [part(**value) for part, value in zip(self.parts, values, strict=True)]
        return self.join(made)

    def join(self, made: list[Method]) -> Method:
        """Makes the composition from its parts."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<method {self.name}({', '.join(self.fields)})>"


class _Composition(Factory[Any]):
    """Several methods at once. Settings go by name, or per part if two parts share the name."""

    def __init__(
        self,
        name: str,
        parts: tuple[Factory[Any], ...],
        paper: str,
        join: Callable[..., Method],
    ) -> None:
        self._join = join

        def build(**kwargs: Any) -> Method:
            return self._routed(kwargs)

        build.__doc__ = f"{' + '.join(part.name for part in parts)}; settings are those of each."
        super().__init__(name, build, name, paper, parts)

    def join(self, made: list[Method]) -> Method:
        return dataclasses.replace(self._join(*made), name=self.name, paper=self.paper)

    def _routed(self, kwargs: dict[str, Any]) -> Method:
        values: list[dict[str, Any]] = [{} for _ in self.parts]
        groups = {part.group: place for place, part in enumerate(self.parts)}
        for name, value in kwargs.items():
            if name in groups and isinstance(value, Mapping):
                values[groups[name]].update(value)
                continue
            owners = [f for f in self.fields.values() if f.name == name]
            if len(owners) == 1:
                values[owners[0].part][name] = value
            elif owners:
                which = " and ".join(self.parts[f.part].group for f in owners)
                first = self.parts[owners[0].part].group
                raise UserError(
                    f"{name}: {self.name} has it for {which}; say which, as "
                    f"{first}=dict({name}={value!r})"
                )
            else:
                known = sorted({f.name for f in self.fields.values()} | set(groups))
                raise UserError(f"{name}: {self.name} has no such setting; {suggest(name, known)}")
        return self.join([part(**value) for part, value in zip(self.parts, values, strict=True)])


REGISTRY: dict[str, Factory[Any]] = {}
_BUILT_IN: set[str] = set()


def register(
    name: str, *, group: str = "", paper: str = ""
) -> Callable[[Callable[P, Method]], Factory[P]]:
    """A decorator that registers a function which returns a `Method`.

    Args:
      name: of the method. Names of this package cannot be replaced.
      group: group of its settings in the configuration; by default the name.
      paper: where it was published.

    Returns:
      A decorator that turns the function into a `Factory`. Each of its arguments is annotated with
      a `Setting` and has a default.

    Raises:
      ValueError: the name is taken, or an argument has no `Setting` or no default.

    Example:
      >>> from typing import Annotated
      >>> from bpnjax import methods
      >>> @methods.register("half")
      ... def half(share: Annotated[float, methods.Setting("a share", at_least=0)] = 0.5):
      ...     return methods.Method(
      ...         gradient=lambda grads, params, state, batch, ctx: jax.tree.map(
      ...             lambda g: share * g, grads))
      >>> half(share=0.25).name, list(half.fields)
      ('half', ['half.share'])
      >>> half(share=-1.0)
      Traceback (most recent call last):
      ...
      bpnjax.utils.errors.UserError: half.share: -1.0 is below 0; give at least 0
      >>> del methods.REGISTRY["half"]
    """
    if name in _BUILT_IN:
        raise ValueError(f"the method {name!r} is one of bpnjax; choose another name")

    def decorate(function: Callable[P, Method]) -> Factory[P]:
        @functools.wraps(function)
        def build(*args: P.args, **kwargs: P.kwargs) -> Method:
            return factory.checked(*args, **kwargs)

        factory: Factory[P] = Factory(name, build, group or name, paper)
        factory._raw = function
        REGISTRY[name] = factory
        return factory

    return decorate


def compose(
    name: str,
    *parts: Factory[Any],
    paper: str = "",
    join: Callable[..., Method] = chain,
) -> Factory[Any]:
    """Composes methods and registers the composition under a name.

    Args:
      name: of the composition.
      *parts: factories, in the order of `bpnjax.methods.chain`.
      paper: where it was published.
      join: makes one method from those of the parts; `chain` by default.

    Returns:
      A `Factory` that takes the settings of all parts by name. If two parts share a name, settings
      are given per part, as in ``bd_psp(bd=dict(layers="fc.*"), psp=dict(layers=".*"))``.

    Example:
      >>> from bpnjax import methods
      >>> methods.bd_ewc(epsilon=0.2, strength=0.05).name
      'bd_ewc'
      >>> methods.bd_psp(layers="output")
      Traceback (most recent call last):
      ...
      bpnjax.utils.errors.UserError: layers: bd_psp has it for bd and psp; say which, as \
bd=dict(layers='output')
    """
    if name in _BUILT_IN:
        raise ValueError(f"the method {name!r} is one of bpnjax; choose another name")
    factory = _Composition(name, parts, paper, join)
    REGISTRY[name] = factory
    return factory


def _fields_of(function: Callable[..., Any], group: str) -> Iterator[tuple[str, Field]]:
    hints = typing.get_type_hints(function, include_extras=True)
    for parameter in inspect.signature(function).parameters.values():
        extras = getattr(hints.get(parameter.name), "__metadata__", ())
        setting = next((extra for extra in extras if isinstance(extra, Setting)), None)
        if setting is None or parameter.default is inspect.Parameter.empty:
            raise ValueError(
                f"{function.__name__}: its argument {parameter.name} needs a default and a "
                "Setting, as in strength: Annotated[float, Setting('what it is')] = 1.0"
            )
        field = setting.field or f"{group}.{parameter.name}"
        yield field, Field(parameter.name, setting, parameter.default, 0)
