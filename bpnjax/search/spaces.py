"""The searched settings: an axis for each setting with a range, and changes by the user.

The ranges are declared with the settings (`bpnjax.methods.Range`), so a user's own method is
searched in the same way as those of the package.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from bpnjax.config import check_field, flatten
from bpnjax.config.fields import Entry, entries
from bpnjax.methods import Range
from bpnjax.utils.errors import UserError

__all__ = ["Axis", "space"]

SCALES = ("log", "linear")
FIXED = "fixed"  # in place of a range: the search does not change the setting


class Axis(NamedTuple):
    """A setting and its searched values."""

    field: str
    default: Any  # value of the first trial
    low: float = 0.0
    high: float = 0.0
    scale: str = "linear"
    choices: tuple[Any, ...] = ()  # in place of a range
    traced: bool = False  # whether one compiled program serves all values

    @property
    def whole(self) -> bool:
        """Whether the values are integers."""
        return isinstance(self.default, int) and not isinstance(self.default, bool)

    def suggest(self, trial: Any) -> Any:
        """Proposes a value for a trial.

        Args:
          trial: an ``optuna.Trial``.

        Returns:
          A number, or one of the choices.
        """
        if self.choices:
            return trial.suggest_categorical(self.field, self.choices)
        log = self.scale == "log"
        if self.whole:
            return trial.suggest_int(self.field, int(self.low), int(self.high), log=log)
        return trial.suggest_float(self.field, self.low, self.high, log=log)

    def described(self) -> str:
        """Describes the axis as text.

        Returns:
          A text such as ``"bd.epsilon from 0.02 to 2, log, first 0.2"``.
        """
        if self.choices:
            return f"{self.field} out of {', '.join(map(str, self.choices))}, first {self.default}"
        return (
            f"{self.field} from {self.low:g} to {self.high:g}, {self.scale}, first {self.default:g}"
        )


def space(config: ConfigDict, more: Mapping[str, str] | None = None) -> tuple[Axis, ...]:
    """Lists the settings that are searched for a configuration's method.

    Args:
      config: a configuration. The first trial has its values, and a range that does not include
        them is widened.
      more: ``{field: "low:high:scale"}``, or ``"a,b,c"`` for choices, or ``"fixed"``. They replace
        the method's own range of a field. Fields that only other methods read are ignored.

    Returns:
      An `Axis` for each setting, first those of the method, then those of every run.

    Raises:
      UserError: there is no such field, its value is not a number, or the range is empty or does
        not include the value of the configuration.

    Example:
      >>> from bpnjax import config
      >>> from bpnjax.search import space
      >>> settings = config.default()
      >>> for axis in space(settings, {"train.learning_rate": "1e-5:1e-2:log"}):
      ...     print(axis.described())
      ewc.strength from 0.001 to 1, log, first 0.02
      bd.epsilon from 0.02 to 2, log, first 0.2
      train.learning_rate from 1e-05 to 0.01, log, first 0.0003
    """
    more = dict(more or {})
    for field in more:
        check_field(config, field)
    flat, known = flatten(config), entries()
    own = [field for field, entry in known.items() if config.method in entry.methods]
    common = [field for field, entry in known.items() if not entry.methods]
    axes = []
    for field in (*own, *common):
        if more.get(field) == FIXED:
            continue
        if field in more:
            axes.append(_given(field, more[field], known[field], flat))
            continue
        found = _range(known[field], flat)
        if found is not None:
            axes.append(_built_in(field, found, flat[field], bool(known[field].methods)))
    return tuple(axes)


def _range(entry: Entry, flat: Mapping[str, Any]) -> Range | None:
    """The first range of a setting whose condition is met."""
    for found in entry.setting.search:
        if found.when is None or flat.get(found.when[0]) == found.when[1]:
            return found
    return None


def _built_in(field: str, found: Range, value: Any, of_method: bool) -> Axis:
    default: Any = found.default if value is None else value
    low, high = min(found.low, default), max(found.high, default)
    scale = "linear" if low <= 0 else found.scale
    traced = not found.own_program and (of_method or field == "train.learning_rate")
    return Axis(field, default, low, high, scale, traced=traced)


def _given(field: str, text: str, entry: Entry, flat: Mapping[str, Any]) -> Axis:
    """The axis for a range that a user wrote."""
    name, own, value = f"--space.{field}", _range(entry, flat), flat[field]
    if ":" not in text:
        choices = tuple(_like(word.strip(), value, name) for word in text.split(","))
        if len(set(choices)) < 2:
            raise UserError(
                f"{name}: {text!r} is not a range; write low:high:log, low:high:linear, two or "
                f"more values as a,b, or {FIXED}"
            )
        if value not in choices:
            raise UserError(
                f"{name}: {text!r} does not hold {value!r}, the configuration's value, which the "
                "first trial takes; add it, or change the configuration"
            )
        for choice in choices:
            _check(field, entry, choice)
        return Axis(field, value, choices=choices)
    words = text.split(":")
    scale = words[2] if len(words) > 2 else "linear"
    if len(words) > 3 or scale not in SCALES:
        raise UserError(f"{name}: {text!r}: the scale is log or linear; write low:high:log")
    fallback = own.default if own is not None else None
    default = fallback if value is None else value
    if isinstance(default, bool) or not isinstance(default, (int, float)):
        raise UserError(
            f"{name}: {field} is {value!r}, which is not a number; give it a number in the "
            "configuration, or choices as a,b"
        )
    low, high = (_like(word, default, name) for word in words[:2])
    if not low < high:
        raise UserError(f"{name}: {text!r} is empty; the first number must be below the second")
    if scale == "log" and low <= 0:
        raise UserError(f"{name}: {text!r}: a log scale begins above 0; raise {low:g}")
    if not low <= default <= high:
        raise UserError(
            f"{name}: {text!r} does not hold {default:g}, the configuration's value, which the "
            "first trial takes; widen it, or change the configuration"
        )
    for end in (low, high):
        _check(field, entry, end)
    declared = own is not None and not own.own_program
    traced = declared and (bool(entry.methods) or field == "train.learning_rate")
    return Axis(field, default, low, high, scale, traced=traced and isinstance(default, float))


def _check(field: str, entry: Entry, value: Any) -> None:
    if complaint := entry.setting.complaint(value, entry.default):
        raise UserError(f"--space.{field}: {complaint}")


def _like(word: str, value: Any, name: str) -> Any:
    """Converts a word to the type of a value."""
    if isinstance(value, str):
        return word
    if isinstance(value, bool):
        if word not in ("True", "False"):
            raise UserError(f"{name}: {word!r} is neither True nor False; give one")
        return word == "True"
    try:
        number = float(word)
    except ValueError as error:
        raise UserError(f"{name}: {word!r} is not a number; give one") from error
    if not math.isfinite(number):
        raise UserError(f"{name}: {word!r} is not finite; give a number")
    if isinstance(value, int) and number != int(number):
        raise UserError(f"{name}: {word!r} is not a whole number; give one")
    return int(number) if isinstance(value, int) else number
