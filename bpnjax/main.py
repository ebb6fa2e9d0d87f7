"""The command: flags in, a run, an exit code out.

python -m bpnjax.main --config=configs/digits.py [--config.FIELD=VALUE ...] [--workdir=DIR]
"""

import os
import pathlib
import re
import sys
import textwrap
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from bpnjax import config as configuration
from bpnjax.utils.errors import UserError

if TYPE_CHECKING:  # at run time later: it imports JAX
    from bpnjax.config.fields import Entry

USAGE = """usage: python -m bpnjax.main --config=FILE [--config.FIELD=VALUE ...]
                             [--workdir=DIR] [--overwrite] [--dry_run] [--distributed]
                             [--resume_from=DIR]

  --config=FILE          a Python file with get_config(), as configs/digits.py
  --config.FIELD=VALUE   changes a field of it, as --config.train.epochs=3
  --workdir=DIR          where results go (default: runs/<name>/<method>)
  --overwrite            start afresh in a folder that holds a run
  --resume_from=DIR      learn later tasks: the first tasks of this sequence are those of the run in
                         DIR (or of a model.safetensors) and are not trained again
  --dry_run              say what the run would be (settings, tasks, network, memory, time) and end
  --distributed          one run on several hosts: the same command on each; where they do not
                         find each other, also --coordinator=HOST:PORT --hosts=N --host=0..N-1
  --help                 this text, configs, methods, and the fields with their meanings; beside
                         --config=FILE with the values of that file, its method's fields first"""
_FLAGS: dict[str, str | bool] = {
    "dry_run": False, "distributed": False, "coordinator": "", "hosts": "", "host": "",
    "resume_from": "",
}  # fmt: skip


def asks_for_help(arguments: list[str]) -> bool:
    """Is there a ``--help`` among the arguments?

    Args:
      arguments: without the program's name.

    Returns:
      True for ``--help``, ``-h`` and ``--helpfull``.
    """
    return bool({"--help", "-h", "--helpfull"} & set(arguments))


def print_help(usage: str, arguments: Sequence[str] = ()) -> None:
    """Prints a usage, the configurations at hand, the methods, and all fields.

    Each field is shown with its value, its meaning and its range: first those of every run, then
    those of the methods, the chosen method's before the others. With a config file among the
    arguments values and method are those of that file, and a method that it registers is shown too.

    Args:
      usage: the text to begin with.
      arguments: of the command, ``--help`` among them.
    """
    config, note = configuration.default(), ""
    given = [a for a in arguments if a.lstrip("-").split("=", 1)[0].split(".")[0] == "config"]
    if given:
        try:
            config, _ = parse_flags(_with_values(arguments), None)
        except UserError as error:
            note = f"bpnjax: {error}"
    print(usage)
    files = sorted(pathlib.Path("configs").rglob("*.py"))
    if files:
        print("\nconfigs:\n  " + "\n  ".join(map(str, files)))
    from bpnjax.config.fields import entries
    from bpnjax.methods import REGISTRY

    print("\nmethods:")
    print(textwrap.fill(", ".join(REGISTRY), 98, initial_indent="  ", subsequent_indent="  "))
    values, found = configuration.flatten(config), entries()
    common = [field for field, entry in found.items() if not entry.methods]
    chosen = [field for field, entry in found.items() if config.method in entry.methods]
    others = [field for field in found if field not in {*common, *chosen}]
    for title, fields in (
        ("fields of every run", common),
        (f"fields of {config.method}, the chosen method", chosen),
        ("fields of other methods", others),
    ):
        if fields:
            print(f"\n{title}:")
        for field in fields:
            print(_described(field, values.get(field, found[field].default), found[field]))
    if note:
        print(note, file=sys.stderr)


def _with_values(arguments: Sequence[str]) -> list[str]:
    """The config file and the fields among the arguments; the flags of other commands left out."""
    kept = []
    for i, argument in enumerate(arguments):
        name, equals, _ = argument.lstrip("-").partition("=")
        if not argument.startswith("-") or name.split(".")[0] != "config":
            continue
        follows = [] if equals else list(arguments[i + 1 : i + 2])
        kept += [argument, *(a for a in follows if not a.startswith("-"))]
    return kept


_COLUMN = 40  # of the meanings


def _described(field: str, value: Any, entry: "Entry") -> str:
    setting = entry.setting
    hidden = [c for c in setting.choices if str(c) not in setting.meaning]
    notes = [setting.limits, f"one of {', '.join(map(str, setting.choices))}" if hidden else ""]
    if setting.pattern:
        notes.append("a regular expression")
    text = " ".join([setting.meaning, *(f"[{note}]" for note in notes if note)])
    left = f"  {field} = {value!r}"
    indent = " " * _COLUMN
    lines = textwrap.wrap(text, 100, initial_indent=indent, subsequent_indent=indent)
    if len(left) < _COLUMN - 1:
        lines[0] = left + lines[0][len(left) :]
    else:
        lines.insert(0, left)
    return "\n".join(lines)


def parse(arguments: list[str]) -> tuple[ConfigDict, pathlib.Path, Any]:
    """Reads the command line of `bpnjax.main`.

    Args:
      arguments: without the program's name.

    Returns:
      The configuration, the workdir and the flags' values.

    Raises:
      UserError: anything that cannot be understood.
    """
    config, values = parse_flags(arguments, _FLAGS)
    if values.resume_from:
        config.resume_from = values.resume_from
    configuration.validate(config)
    for name in ("hosts", "host"):
        if values[name].value and not values[name].value.isdecimal():
            raise UserError(f"--{name}: {values[name].value!r} is no number; give one from 0")
    if not values.distributed and (values.coordinator or values.hosts or values.host):
        raise UserError("--coordinator, --hosts, --host: they go with --distributed; add it")
    workdir = values.workdir or os.path.join("runs", config.name, config.method)
    return config, pathlib.Path(workdir), values


def parse_flags(
    arguments: list[str], more: Mapping[str, str | bool] | None = None
) -> tuple[ConfigDict, Any]:
    """Reads ``--config``, its overrides, ``--workdir``, ``--overwrite`` and further flags.

    Args:
      arguments: without the program's name.
      more: names and defaults of further flags, a text or a boolean each.

    Returns:
      The configuration, not validated yet, and the flags' values as attributes.

    Raises:
      UserError: anything that cannot be understood.
    """
    names = [a.lstrip("-").split("=", 1)[0] if a.startswith("-") else "" for a in arguments]
    if "config" not in names:
        raise UserError("--config: missing; name a config file, as --config=configs/digits.py")
    if names.count("config") > 1:
        raise UserError("--config: given more than once; name one config file")
    at = names.index("config")
    path = (
        arguments[at].split("=", 1)[1]
        if "=" in arguments[at]
        else "".join(arguments[at + 1 : at + 2])
    )
    rest = [a for i, a in enumerate(arguments) if i != at and ("=" in arguments[at] or i != at + 1)]
    return parse_fields(configuration.load_file(path), rest, more)


def parse_fields(
    config: ConfigDict, rest: list[str], more: Mapping[str, str | bool] | None = None
) -> tuple[ConfigDict, Any]:
    """Reads ``--config.FIELD=VALUE``, ``--workdir``, ``--overwrite`` and further flags.

    Args:
      config: the configuration that the fields change.
      rest: the arguments, without the program's name and ``--config``.
      more: names and defaults of further flags, a text or a boolean each.

    Returns:
      The configuration, not validated yet, and the flags' values as attributes.

    Raises:
      UserError: anything that cannot be understood.
    """
    names = [a.lstrip("-").split("=", 1)[0] if a.startswith("-") else "" for a in rest]
    for name in names:
        if name.startswith("config."):
            configuration.check_field(config, name.removeprefix("config."))
    # Of a field that is given again the last value counts; absl would join tuples.
    last = {a.split("=", 1)[0]: i for i, a in enumerate(rest)}
    rest = [a for i, a in enumerate(rest) if "=" not in a or last[a.split("=", 1)[0]] == i]

    values = flags.FlagValues()
    argv = ["bpnjax", *rest]
    flags.DEFINE_string("workdir", "", "", flag_values=values)
    flags.DEFINE_boolean("overwrite", False, "", flag_values=values)
    for name, value in (more or {}).items():
        define: Any = flags.DEFINE_boolean if isinstance(value, bool) else flags.DEFINE_string
        define(name, value, "", flag_values=values)
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    try:
        left = values(argv)
    except flags.Error as error:
        text = " ".join(str(error).split())
        wrong = re.match(r"flag --config\.([\w.]+)=(.*?): ", text)
        if wrong:
            field, value = wrong.groups()
            default = configuration.flatten(config)[field]
            raise UserError(
                f"{field}: {value!r} is no {type(default).__name__}; give one, as "
                f"--config.{field}={default}"
            ) from error
        raise UserError(f"{text}; see --help") from error
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"--config: {' '.join(str(error).split())}; see --help") from error
    if left[1:]:
        raise UserError(f"{left[1]!r} is no flag; write --config.FIELD=VALUE, or see --help")
    return values.config, values


def run(arguments: list[str]) -> int:
    """Runs the command.

    Args:
      arguments: without the program's name.

    Returns:
      The exit code: 0, 1 if the run stopped (a loss that is not finite, a full disk, an interrupt),
      2 for a wrong argument or configuration.
    """
    try:
        if asks_for_help(arguments):
            print_help(USAGE, arguments)
            return 0
        config, folder, values = parse(arguments)
        # Imported late: --help and a wrong flag need not wait for JAX.
        from bpnjax.run import train, workdir, writers
        from bpnjax.training import hosts

        if values.distributed:
            numbers = [int(text) if text else None for text in (values.hosts, values.host)]
            hosts.join(values.coordinator, *numbers)
        if values.dry_run:
            from bpnjax.run import dry_run

            print(dry_run.describe(config))
            return 0
        if hosts.first_asks(lambda: workdir.check(folder, config, values.overwrite)):
            print(f"{folder} holds this run, complete; pass --overwrite to run it again")
            return 0
        try:
            result = train.train_and_evaluate(config, folder, values.overwrite)
        except train.LossNotFinite as error:
            print(f"bpnjax: {error}", file=sys.stderr)
            return 1
    except UserError as error:
        print(f"bpnjax: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a disk that is full or gone, say
        print(
            f"bpnjax: {' '.join(str(error).split())}; when that is mended, the same command goes "
            "on at the last checkpoint",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt as interrupt:
        where = (
            f", {interrupt}; the same command goes on there"
            if str(interrupt)
            else ("; the same command goes on at the last checkpoint")
        )
        print(f"bpnjax: interrupted{where}", file=sys.stderr)
        return 1
    if hosts.is_first():
        print(writers.table(result, result["class_names"]))
        print(f"results in {folder}")
    return 0


def main() -> None:
    """Runs the command on the arguments of the process and exits with its code."""
    try:
        code = run(sys.argv[1:])
    except Exception:
        traceback.print_exc()
        code = 1
    jax = sys.modules.get("jax")
    if code and jax and jax.distributed.is_initialized():
        # At a usual exit this host would wait for the others, and they for its part of the work.
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(2)  # those that know of it too end by themselves
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
