"""The configuration of a run: its fields, files that set them, checks that say what to change."""

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
    """The default configuration; files in ``configs/`` change a few fields of it.

    Returns:
      A `ConfigDict` of all fields, those of the registered methods among them. Those read from
      files are locked: a field that is not here cannot be set.

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
    c.paper = ConfigDict()  # {method: {...}}: what the paper reports for this experiment
    c.tuned = ConfigDict()  # {method: {group: {name: value}}}: see with_tuned
    return c


# Groups of a method each, with names of fields inside.
_BY_METHOD = ("paper.", "tuned.")

# Fields that do not change what a run computes: a workdir may be taken up again with others.
FREE_FIELDS = (
    "compilation_cache", "log", "dataset.data_dir", "dataset.manual_dir", "dataset.cache_dir",
    "dataset.device_mb", "dataset.workers", "checkpoint", "paper", "search", "tuned",
)  # fmt: skip


# What versions without these fields did; a stored configuration that lacks them meant this.
BEFORE: dict[str, Any] = {"bd.step": "absolute", "ewc.form": "proximal"}


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration as one flat dict.

    Args:
      config: a `ConfigDict`, or the nested dict of one.
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
    """A short hash of what a configuration computes.

    Fields that have their defaults do not count, so that it stays the same when a later version
    adds some; nor do the number of seeds and fields that change no result.

    Args:
      config: a `ConfigDict`, or the nested dict of one.

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
    """Says whether a field has no effect on results; see `FREE_FIELDS`.

    Args:
      field: its name, ``"dataset.data_dir"``.

    Returns:
      True for the fields and groups of fields listed there.

    Example:
      >>> from bpnjax import config
      >>> config.is_free("checkpoint.keep"), config.is_free("train.epochs")
      (True, False)
    """
    return any(field == free or field.startswith(f"{free}.") for free in FREE_FIELDS)


def check_field(config: ConfigDict, field: str) -> None:
    """Makes sure that a configuration has a field.

    Args:
      config: a `ConfigDict`.
      field: its name, ``"train.epochs"``.

    Raises:
      UserError: it has none of this name, and the message says which are near; or it is a group.
    """
    fields = flatten(config)
    groups = {f.rsplit(".", 1)[0] for f in fields if "." in f}
    if field in fields:
        return
    if field in groups:
        raise UserError(f"{field}: is a group of fields; set one of them, as --config.{field}.x=y")
    raise UserError(f"{field}: unknown config field; {suggest(field, fields)}")


def packaged() -> dict[str, pathlib.Path]:
    """The configurations that come with bpnjax, as `load_file` takes their names.

    Returns:
      ``{name: file}``, as ``"digits"`` and ``"published/si"``.

    Example:
      >>> from bpnjax import config
      >>> sorted(config.packaged())[:2]
      ['cifar10', 'cifar100']
    """
    package = pathlib.Path(__file__).resolve().parents[1]
    folder = package / "configs"  # so an installed wheel; in the repository they lie beside it
    folder = folder if folder.is_dir() else package.parent / "configs"
    files = sorted(folder.rglob("*.py"))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def load_file(path: str) -> ConfigDict:
    """Runs a config file and returns what its ``get_config()`` gives.

    Args:
      path: a Python file; or the name of a packaged configuration, as ``"digits"``
        (`packaged`), or ``"default"``. A file of that name comes first.

    Returns:
      A locked `ConfigDict` with the fields of `default`.

    Raises:
      UserError: no such file, it raises, or what it returns is not such a configuration.
    """
    file = pathlib.Path(path)
    try:
        there = file.is_file()
    except (OSError, ValueError):  # a name that no file can have
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
        # Not by an import, which would write bytecode beside the file and might trust a stale one.
        module = types.ModuleType("bpnjax_config_file")
        module.__file__ = str(file)
        sys.modules[module.__name__] = module  # where dataclasses of the file look up its names
        exec(compile(file.read_bytes(), path, "exec"), module.__dict__)
        get_config = getattr(module, "get_config", None)
        if get_config is None:
            raise UserError(f"--config: {path} defines no get_config(); add one (see configs/)")
        config = get_config()
    except UserError:
        raise
    except BaseException as error:  # a user's file may raise anything, sys.exit included
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
    """Checks all that can be checked without data.

    Args:
      config: a run configuration with the fields of `default`.

    Raises:
      UserError: the first wrong field, its value, and what to change.
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
                f"paper.{method}: {reported!r} is no group of figures; give one, as "
                f"config.paper.{method} = dict(average_accuracy=0.9)"
            )


def with_changes(config: ConfigDict, text: str, name: str) -> ConfigDict:
    """A copy of a configuration with some fields changed.

    Args:
      config: a configuration; stays as it is.
      text: ``"field=value;field=value"``, may be empty.
      name: of the text, for messages.

    Returns:
      The copy.

    Raises:
      UserError: there is no such field, or the value is not of its type.

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
            raise UserError(f"{name}: {part!r} is no change of a field; write field=value")
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
            raise UserError(f"{name}: {field}={given} is no {kind}; give one") from error
    return copied


def with_tuned(config: ConfigDict, given: Collection[str] = ()) -> ConfigDict:
    """Copies a configuration and applies the settings under ``tuned`` for its method.

    A file that `bpnjax.search` wrote holds the settings found for each method, because
    methods share fields such as the learning rate and need different values of them.

    Args:
      config: a configuration; stays as it is.
      given: fields that keep their values, because the user set them.

    Returns:
      The copy; its ``tuned`` is empty.

    Raises:
      UserError: ``tuned`` has a field that does not exist, or a value that is none.

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
    """The fields in which two flat configurations differ.

    Args:
      old: as `flatten` gives.
      new: the same.

    Returns:
      Texts ``"field: old -> new"``. Fields that do not change results, `FREE_FIELDS`, are passed
      over.

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
