"""The command that trains: it reads flags, does a run and returns an exit code.

bpnjax run --config=digits [--config.FIELD=VALUE ...] [--workdir=DIR]

It is the same as `python -m bpnjax.main`.
"""

import hashlib
import os
import pathlib
import re
import signal
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from bpnjax import config as configuration
from bpnjax.utils.errors import UserError

if TYPE_CHECKING:  # not at run time, because it imports JAX
    from bpnjax.config.fields import Entry

USAGE = """usage: bpnjax run --config=NAME [--config.FIELD=VALUE ...]
                  [--workdir=DIR] [--overwrite] [--dry_run] [--distributed]
                  [--resume_from=DIR]

  --config=NAME          a Python file with get_config(), as configs/digits.py,
                         or a configuration of the package, as digits
  --config.FIELD=VALUE   changes a field of it, as --config.train.epochs=3
  --workdir=DIR          for the results (default: runs/<name>/<method>, and
                         the fields that were changed)
  --overwrite            start again in a folder that holds a run
  --resume_from=DIR      learn later tasks: the first tasks of this sequence are
                         those of the run in DIR (or of a model.safetensors) and
                         are not trained again
  --dry_run              print what the run would be (settings, tasks, network,
                         memory, time) and stop
  --distributed          one run on several hosts: the same command on each;
                         if they do not find each other, add
                         --coordinator=HOST:PORT --hosts=N --host=0..N-1
  --help                 this text, configurations, methods, and all fields with
                         their meanings; with --config=NAME its values, and the
                         fields of its method first"""
_FLAGS: dict[str, str | bool] = {
    "dry_run": False, "distributed": False, "coordinator": "", "hosts": "", "host": "",
    "resume_from": "",
}  # fmt: skip


def asks_for_help(arguments: list[str]) -> bool:
    """Whether the arguments ask for help.

    Args:
      arguments: without the program's name.

    Returns:
      True for ``--help``, ``-h`` and ``--helpfull``.
    """
    return bool({"--help", "-h", "--helpfull"} & set(arguments))


def print_help(usage: str, arguments: Sequence[str] = ()) -> None:
    """Prints the usage, the configurations, the methods and all fields.

    Each field is shown with its value, meaning and range: first those of the chosen method, then
    those of every run by groups, then those of other methods. If the arguments name a config file,
    values and method are those of the file, and methods that it registers are included.

    Args:
      usage: the text at the beginning.
      arguments: of the command, including ``--help``.
    """
    config, note = configuration.default(), ""
    given = [a for a in arguments if a.lstrip("-").split("=", 1)[0].split(".")[0] == "config"]
    if given:
        try:
            config = parse_flags(_with_values(arguments), None).config
        except UserError as error:
            note = f"bpnjax: {error}"
    print(usage)
    from bpnjax.config.fields import entries
    from bpnjax.methods import REGISTRY

    for title, names in (
        ("configurations of the package", ["default", *configuration.packaged()]),
        ("methods", REGISTRY),
    ):
        print(f"\n{title}:")
        print(textwrap.fill(", ".join(names), _WIDTH, initial_indent="  ", subsequent_indent="  "))
    sections: dict[str, list[str]] = {f"fields of {config.method}, the chosen method": []}
    values = configuration.flatten(config)
    for field, entry in sorted(entries().items(), key=lambda item: bool(item[1].methods)):
        title = f"fields of {field.rpartition('.')[0] or 'the run'}"
        if config.method in entry.methods:
            title = next(iter(sections))
        text = _described(field, values.get(field, entry.default), entry)
        sections.setdefault(title, []).append(text)
    for title, fields in sections.items():
        if fields:
            print(f"\n{title}:", *fields, sep="\n")
    if note:
        print(note, file=sys.stderr)


def _with_values(arguments: Sequence[str]) -> list[str]:
    """The config file and the fields among the arguments, without flags of other commands."""
    kept = []
    for i, argument in enumerate(arguments):
        name, equals, _ = argument.lstrip("-").partition("=")
        if not argument.startswith("-") or name.split(".")[0] != "config":
            continue
        follows = [] if equals else list(arguments[i + 1 : i + 2])
        kept += [argument, *(a for a in follows if not a.startswith("-"))]
    return kept


_WIDTH, _COLUMN = 80, 34  # of the help text, and the column where meanings begin


def _described(field: str, value: Any, entry: "Entry") -> str:
    """A field with its value, meaning and range, as lines of text."""
    setting = entry.setting
    hidden = [c for c in setting.choices if str(c) not in setting.meaning]
    notes = [setting.limits, f"one of {', '.join(map(str, setting.choices))}" if hidden else ""]
    if setting.pattern:
        notes.append("a regular expression")
    text = " ".join([setting.meaning, *(f"[{note}]" for note in notes if note)])
    left = f"  {field} = {value!r}"
    indent = " " * _COLUMN
    lines = textwrap.wrap(
        text, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
    if len(left) < _COLUMN - 1:
        lines[0] = left + lines[0][len(left) :]
    else:
        lines.insert(0, left)
    return "\n".join(lines)


class Request(NamedTuple):
    """The content of a command line."""

    config: ConfigDict  # with its changes
    values: Any  # other flags, as attributes
    changed: dict[str, Any]  # {field: value} of fields that differ from the config file


def parse(arguments: list[str]) -> tuple[ConfigDict, pathlib.Path, Any]:
    """Parses the command line of `bpnjax.main`.

    Args:
      arguments: without the program's name.

    Returns:
      The configuration, the workdir and the flags' values.

    Raises:
      UserError: an argument is invalid.
    """
    config, values, changed = parse_flags(arguments, _FLAGS)
    if values.resume_from:
        config.resume_from = changed["resume_from"] = values.resume_from
    config = configuration.with_tuned(config, changed)
    configuration.validate(config)
    for name in ("hosts", "host"):
        if values[name].value and not values[name].value.isdecimal():
            raise UserError(f"--{name}: {values[name].value!r} is not a number; give one from 0")
    if not values.distributed and (values.coordinator or values.hosts or values.host):
        raise UserError("--coordinator, --hosts, --host: they go with --distributed; add it")
    workdir = values.workdir or os.path.join("runs", config.name, config.method + suffix(changed))
    return config, pathlib.Path(workdir), values


def suffix(changed: Mapping[str, Any]) -> str:
    """The part of a default folder's name that describes changed fields.

    Different settings have different folders.

    Args:
      changed: ``{field: value}`` of fields that differ from the config file.

    Returns:
      ``-field=value`` for each, in the order of their names. If that is too long or has characters
      that do not belong in a path, it is ``-`` and 8 hexadecimal digits of its SHA-256. Fields that
      change no result, the name, the method and the number of seeds are left out.

    Example:
      >>> from bpnjax.main import suffix
      >>> suffix({"train.epochs": 3, "bd.epsilon": 0.1, "num_seeds": 5})
      '-bd.epsilon=0.1-train.epochs=3'
      >>> suffix({"dataset.name": "mnist,kmnist"}), suffix({"method": "sgd"})
      ('-9f9ed4eb', '')
    """
    shown = [
        f"-{field}={'x'.join(map(str, v)) if isinstance(v, tuple) else v}"
        for field, v in sorted(changed.items())
        if field not in ("name", "method", "num_seeds") and not configuration.is_free(field)
    ]
    text = "".join(shown)
    if len(text) > 60 or not re.fullmatch(r"[\w.=+-]*", text, re.ASCII):
        return f"-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return text


def parse_flags(arguments: list[str], more: Mapping[str, str | bool] | None = None) -> Request:
    """Parses ``--config``, its overrides, ``--workdir``, ``--overwrite`` and further flags.

    Args:
      arguments: without the program's name.
      more: names and defaults of further flags, each a text or a boolean.

    Returns:
      `Request`. Its configuration is not validated yet.

    Raises:
      UserError: an argument is invalid.
    """
    names = [a.lstrip("-").split("=", 1)[0] if a.startswith("-") else "" for a in arguments]
    if "config" not in names:
        raise UserError(
            "--config: missing; name a config file or a packaged one, as --config=digits"
        )
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
) -> Request:
    """Parses ``--config.FIELD=VALUE``, ``--workdir``, ``--overwrite`` and further flags.

    Args:
      config: the configuration that the fields change.
      rest: the arguments, without the program's name and ``--config``.
      more: names and defaults of further flags, each a text or a boolean.

    Returns:
      `Request`. Its configuration is not validated yet.

    Raises:
      UserError: an argument is invalid.
    """
    before = configuration.flatten(config)
    names = [a.lstrip("-").split("=", 1)[0] if a.startswith("-") else "" for a in rest]
    for name in names:
        if name.startswith("config."):
            configuration.check_field(config, name.removeprefix("config."))
    # The last value of a repeated field counts, where absl would join tuples.
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
                f"{field}: {value!r} is not of type {type(default).__name__}; give one, as "
                f"--config.{field}={default}"
            ) from error
        raise UserError(f"{text}; see --help") from error
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"--config: {' '.join(str(error).split())}; see --help") from error
    if left[1:]:
        raise UserError(f"{left[1]!r} is not a flag; write --config.FIELD=VALUE, or see --help")
    after = configuration.flatten(values.config)
    changed = {f: v for f, v in after.items() if f not in before or before[f] != v}
    return Request(values.config, values, changed)


def run(arguments: list[str]) -> int:
    """Runs the command.

    Args:
      arguments: without the program's name.

    Returns:
      The exit code: 0, 1 if the run stopped (a loss that is not finite, a full disk, an interrupt),
      2 for an invalid argument or configuration.
    """
    return guarded(lambda: _trained(arguments))


def _trained(arguments: list[str]) -> int:
    """Runs the command on its arguments; returns the exit code."""
    if asks_for_help(arguments):
        print_help(USAGE, arguments)
        return 0
    config, folder, values = parse(arguments)
    # Imported here, so that a wrong flag is reported without delay.
    from bpnjax.run import dry_run, train, workdir, writers
    from bpnjax.training import hosts

    if values.distributed:
        numbers = [int(text) if text else None for text in (values.hosts, values.host)]
        hosts.join(values.coordinator, *numbers)
    if values.dry_run:
        print(dry_run.describe(config))
        return 0
    try:
        complete = hosts.first_asks(lambda: workdir.check(folder, config, values.overwrite))
    except UserError:
        dry_run.check(config)  # an error in the request is reported before one in the folder
        raise
    if complete:
        print(f"{folder} holds this run, complete; pass --overwrite to run it again")
        return 0
    try:
        result = train.train_and_evaluate(config, folder, values.overwrite)
    except train.LossNotFinite as error:
        print(f"bpnjax: {error}", file=sys.stderr)
        return 1
    if hosts.is_first():
        print(writers.table(result, result["class_names"]))
        print(f"results in {folder}")
    return 0


def guarded(work: Callable[[], int]) -> int:
    """Runs the work of a command, and prints one line if an expected error ends it.

    Args:
      work: a function that returns the exit code.

    Returns:
      The exit code: that of ``work``, 2 for an invalid request, 1 for an interrupt or disk error.

    Example:
      >>> from bpnjax.main import guarded
      >>> guarded(lambda: 0)
      0
    """
    try:
        return work()
    except UserError as error:
        print(f"bpnjax: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # for example, a full disk
        why = " ".join(str(error).split())
    except KeyboardInterrupt as interrupt:
        why = ", ".join(["interrupted", *map(str, interrupt.args)])
    print(f"bpnjax: {why}; run the same command again to resume", file=sys.stderr)
    return 1


def leave(run: Callable[[list[str]], int]) -> NoReturn:
    """Runs a command on the arguments of the process and exits with its code.

    SIGTERM ends it like Ctrl-C. Once the command has returned, either ends the process at once.

    Args:
      run: a function from the arguments without the program's name to the exit code.
    """

    def terminated(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    def dropped(what: Any) -> None:
        # Python ignores exceptions in some places, such as callbacks of the garbage collector. An
        # interrupt is raised again outside of them.
        if issubclass(what.exc_type, KeyboardInterrupt):
            main = threading.main_thread().ident
            threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT)).start()
        else:
            sys.__unraisablehook__(what)

    sys.unraisablehook = dropped
    signal.signal(signal.SIGTERM, terminated)
    try:
        code = guarded(lambda: run(sys.argv[1:]))  # an interrupt may come during imports
    except Exception:
        traceback.print_exc()
        code = 1
    # An interrupt while Python shuts down would print a traceback.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    jax = sys.modules.get("jax")
    if code and jax and jax.distributed.is_initialized():
        # In a normal exit this host would wait for the others, and they for its part of the work.
        sys.stdout.flush()
        sys.stderr.flush()
        if jax.process_index() == 0:
            # This process keeps the hosts together. Without it, hosts that know of the error too
            # would be aborted before they end by themselves, which takes longer on a busy machine.
            time.sleep(8 if code == 2 else 2)
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    leave(run)
