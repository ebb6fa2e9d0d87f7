"""The configuration of a run: its fields, the files that set them, and checks of their values."""

import ast
import hashlib
import json
import pathlib
import sys
import types
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from bpnjax.config import checks
from bpnjax.utils.errors import UserError, suggest


def default() -> ConfigDict:
    """Returns the default configuration. Files in ``configs/`` change some of its fields.

    Returns:
      A `ConfigDict` of all fields, with those of the registered methods. It is locked: fields that
      are not there cannot be set.

    Example:
      >>> from bpnjax import config
      >>> settings = config.default()
      >>> settings.method, settings.bd.epsilon
      ('bd_ewc', 0.2)
    """
    from bpnjax.config.fields import entries  # late: it imports JAX

    c = ConfigDict()
    for field, entry in entries().items():
        group, _, name = field.rpartition(".")
        if group and group not in c:
            c[group] = ConfigDict()
        value = placeholder(float) if entry.default is None else entry.default
        (c[group] if group else c)[name] = value
    c.paper = ConfigDict()  # {method: {...}}: figures that the paper reports for this experiment
    c.tuned = ConfigDict()  # {method: {group: {name: value}}}: see with_tuned
    return c


# Groups with one entry per method, which holds names of fields.
_BY_METHOD = ("paper.", "tuned.")

# Fields that do not change results: a run may be resumed with other values.
FREE_FIELDS = (
    "compilation_cache", "log", "dataset.data_dir", "dataset.manual_dir", "dataset.cache_dir",
    "dataset.device_mb", "dataset.workers", "checkpoint", "paper", "search", "tuned",
)  # fmt: skip


# The behaviour of versions that did not have these fields, for configurations stored by them.
BEFORE: dict[str, Any] = {"bd.step": "absolute", "ewc.form": "proximal"}


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turns a configuration into one flat dict.

    Args:
      config: a `ConfigDict`, or its nested dict.
      prefix: put before each name.

    Returns:
      ``{"a.b": value}``.

    Example:
      >>> from bpnjax.config import flatten
      >>> flatten({"seed": 0, "train": {"epochs": 3}})
      {'seed': 0, 'train.epochs': 3}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, (ConfigDict, dict)):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def fingerprint(config: Mapping[str, Any]) -> str:
    """A short hash of the fields that determine results.

    Fields with their default values do not count, so the hash stays the same when a later version
    adds fields. The number of seeds and fields that change no result do not count either.

    Args:
      config: a `ConfigDict`, or its nested dict.

    Returns:
      16 hexadecimal digits.

    Example:
      >>> from bpnjax import config
      >>> settings = config.default()
      >>> first = config.fingerprint(settings)
      >>> settings.seed = 1
      >>> len(first), first == config.fingerprint(settings)
      (16, False)
    """
    usual = flatten(default())
    own = {
        field: list(value) if isinstance(value, tuple) else value
        for field, value in flatten(config).items()
        if field != "num_seeds" and not is_free(field)
    }
    own = {
        field: value
        for field, value in own.items()
        if value != (list(u) if isinstance(u := usual.get(field), tuple) else u)
    }
    return hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode()).hexdigest()[:16]


def is_free(field: str) -> bool:
    """Whether a field has no effect on results; see `FREE_FIELDS`.

    Args:
      field: its name, such as ``"dataset.data_dir"``.

    Returns:
      True for the fields, and fields of the groups, listed there.

    Example:
      >>> from bpnjax import config
      >>> config.is_free("checkpoint.keep"), config.is_free("train.epochs")
      (True, False)
    """
    return any(field == free or field.startswith(f"{free}.") for free in FREE_FIELDS)


def check_field(config: ConfigDict, field: str) -> None:
    """Checks that a configuration has a field.

    Args:
      config: a `ConfigDict`.
      field: its name, such as ``"train.epochs"``.

    Raises:
      UserError: there is no such field (the message lists similar names), or it is a group.
    """
    fields = flatten(config)
    groups = {f.rsplit(".", 1)[0] for f in fields if "." in f}
    if field in fields:
        return
    if field in groups:
        raise UserError(f"{field}: is a group of fields; set one of them, as --config.{field}.x=y")
    raise UserError(f"{field}: unknown config field; {suggest(field, fields)}")


def packaged() -> dict[str, pathlib.Path]:
    """The configurations that come with bpnjax, by the names that `load_file` takes.

    Returns:
      ``{name: file}``, with names such as ``"digits"`` and ``"published/si"``.

    Example:
      >>> from bpnjax import config
      >>> sorted(config.packaged())[:2]
      ['cifar10', 'cifar100']
    """
    package = pathlib.Path(__file__).resolve().parents[1]
    folder = package / "configs"  # in a wheel; in the repository they lie beside the package
    folder = folder if folder.is_dir() else package.parent / "configs"
    files = sorted(folder.rglob("*.py"))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def load_file(path: str) -> ConfigDict:
    """Runs a config file and returns the result of its ``get_config()``.

    Args:
      path: a Python file, the name of a packaged configuration such as ``"digits"`` (see
        `packaged`), or ``"default"``. A file of that name takes precedence.

    Returns:
      A locked `ConfigDict` with the fields of `default`.

    Raises:
      UserError: the file does not exist, raises an error, or does not return a configuration.
    """
    file = pathlib.Path(path)
    try:
        there = file.is_file()
    except (OSError, ValueError):  # not a possible file name
        there = False
    if not there:
        if path == "default":
            return default().lock()
        names = packaged()
        if path not in names:
            near = path.removeprefix("configs/").removesuffix(".py")
            raise UserError(
                f"--config: no file {path!r} and no packaged configuration of that name; name a "
                f"config file, or a packaged one ({suggest(near, ['default', *names])})"
            )
        file, path = names[path], str(names[path])
    try:
        # Not imported, which would write bytecode beside the file and might use an outdated one.
        module = types.ModuleType("bpnjax_config_file")
        module.__file__ = str(file)
        sys.modules[module.__name__] = module  # dataclasses of the file look up names here
        exec(compile(file.read_bytes(), path, "exec"), module.__dict__)
        get_config = getattr(module, "get_config", None)
        if get_config is None:
            raise UserError(f"--config: {path} defines no get_config(); add one (see configs/)")
        config = get_config()
    except UserError:
        raise
    except BaseException as error:  # a user's file may raise anything, even SystemExit
        if isinstance(error, KeyboardInterrupt):
            raise
        what = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
        raise UserError(f"--config: {path} raises {what}; fix that file") from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"--config: get_config() of {path} returns {type(config).__name__}; return a "
            "ConfigDict, starting from bpnjax.config.default()"
        )
    reference = flatten(default())
    for field in flatten(config):
        if field not in reference and not field.startswith(_BY_METHOD):
            raise UserError(f"{field}: unknown config field in {path}; {suggest(field, reference)}")
    missing = [field for field in reference if field not in flatten(config)]
    if missing:
        raise UserError(
            f"{missing[0]}: missing in {path}; start from bpnjax.config.default() there"
        )
    return config.lock()


def validate(config: ConfigDict) -> None:
    """Checks everything that can be checked without data.

    Args:
      config: a run configuration with the fields of `default`.

    Raises:
      UserError: for the first wrong field, with its value and what to change.
    """
    flat, reference = flatten(config), default()
    for field in flat:
        if not field.startswith(_BY_METHOD):
            check_field(reference, field)
    for complaint in checks.complaints(flat):
        raise UserError(complaint)
    for method, reported in config.paper.items():
        if not isinstance(reported, (ConfigDict, dict)):
            raise UserError(
                f"paper.{method}: {reported!r} is not a group of figures; give one, as "
                f"config.paper.{method} = dict(average_accuracy=0.9)"
            )


def with_changes(config: ConfigDict, text: str, name: str) -> ConfigDict:
    """Copies a configuration and changes some fields.

    Args:
      config: a configuration; it is not changed.
      text: ``"field=value;field=value"``, or empty.
      name: of the text, for messages.

    Returns:
      The copy.

    Raises:
      UserError: there is no such field, or the value does not have its type.

    Example:
      >>> from bpnjax import config
      >>> changed = config.with_changes(config.default(), "train.epochs=2;seed=7", "search.tune")
      >>> changed.train.epochs, changed.seed
      (2, 7)
    """
    copied = config.copy_and_resolve_references()
    for part in filter(None, (part.strip() for part in text.split(";"))):
        field, equals, given = (word.strip() for word in part.partition("="))
        if not equals:
            raise UserError(f"{name}: {part!r} is not a change of a field; write field=value")
        try:
            check_field(copied, field)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        old = flatten(copied)[field]
        try:
            value = given if isinstance(old, str) else ast.literal_eval(given)
            copied.update_from_flattened_dict({field: value})
        except (ValueError, SyntaxError, TypeError) as error:
            kind = "number" if old is None else type(old).__name__
            raise UserError(f"{name}: {field}={given} is not of type {kind}; give one") from error
    return copied


def with_tuned(config: ConfigDict, given: Collection[str] = ()) -> ConfigDict:
    """Copies a configuration and applies the settings under ``tuned`` for its method.

    A file that `bpnjax.search` wrote holds the settings that it found for each method, because
    methods share fields such as the learning rate but need different values.

    Args:
      config: a configuration; it is not changed.
      given: fields that keep their values because the user set them.

    Returns:
      The copy. Its ``tuned`` is empty.

    Raises:
      UserError: ``tuned`` has an unknown field or an invalid value.

    Example:
      >>> from bpnjax import config
      >>> settings = config.default()
      >>> settings.tuned = {"bd_ewc": {"bd": {"epsilon": 0.4}}, "ewc": {"train": {"epochs": 1}}}
      >>> config.with_tuned(settings).bd.epsilon
      0.4
    """
    copied = config.copy_and_resolve_references()
    own = flatten(copied.tuned.get(copied.method, {}))
    with copied.unlocked():
        copied.tuned = ConfigDict()
    for field, value in own.items():
        try:
            check_field(copied, field)
            if field not in given:
                copied.update_from_flattened_dict({field: value})
        except (UserError, TypeError) as error:
            raise UserError(f"tuned.{config.method}: {error}") from error
    return copied


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lists the fields in which two flat configurations differ.

    Args:
      old: from `flatten`.
      new: from `flatten`.

    Returns:
      Texts ``"field: old -> new"``, without the fields that do not change results (`FREE_FIELDS`).

    Example:
      >>> from bpnjax.config import differences
      >>> differences({"seed": 0, "dataset.data_dir": ""}, {"seed": 1, "dataset.data_dir": "sets"})
      ['seed: 0 -> 1']
    """
    found = []
    for field in sorted(set(old) | set(new)):
        if is_free(field):
            continue
        a, b = old.get(field, "absent"), new.get(field, "absent")
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            a, b = list(a), list(b)
        if a != b:
            found.append(f"{field}: {a!r} -> {b!r}")
    return found
