"""Flags of the small commands: how they are read and how messages name them."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

from bpnjax.utils.errors import UserError

__all__ = ["named", "parse", "run"]


def run(usage: str, arguments: list[str], answer: Callable[[list[str]], str]) -> int:
    """Runs a small command. It prints its help, its answer, or one line of error.

    Args:
      usage: printed for ``--help``.
      arguments: without the program's name.
      answer: maps the arguments to the text that is printed.

    Returns:
      The exit code: 0, 1 if a file could not be written, 2 for a wrong argument or file.

    Example:
      >>> from bpnjax.utils import flags
      >>> flags.run("usage: ...", ["a", "b"], lambda words: f"{len(words)} words")
      2 words
      0
    """
    if {"--help", "-h", "--helpfull"} & set(arguments):
        print(usage)
        return 0
    try:
        print(answer(arguments))
    except UserError as error:
        print(f"bpnjax: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"bpnjax: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def parse(
    arguments: Sequence[str],
    texts: Sequence[str] = (),
    numbers: Sequence[str] = (),
    choices: Mapping[str, tuple[Any, Sequence[str]]] | None = None,
    booleans: Mapping[str, bool] | None = None,
) -> tuple[Any, list[str]]:
    """Reads ``--NAME=VALUE`` and ``--NAME VALUE``.

    Args:
      arguments: without the program's name.
      texts: names of text flags, "" by default.
      numbers: names of integer flags, None by default.
      choices: ``{name: (default, values)}`` of flags with a fixed set of values.
      booleans: ``{name: default}`` of switches.

    Returns:
      The values as attributes, and the arguments that are not flags.

    Raises:
      UserError: a flag is unknown or has a value that is not allowed.

    Example:
      >>> from bpnjax.utils import flags
      >>> values, rest = flags.parse(["--model=runs/a", "b"], texts=["model"], numbers=["seed"])
      >>> values.model, values.seed, rest
      ('runs/a', None, ['b'])
    """
    values = flags.FlagValues()
    for name in texts:
        flags.DEFINE_string(name, "", "", flag_values=values)
    for name in numbers:
        flags.DEFINE_integer(name, None, "", flag_values=values)
    for name, (first, allowed) in (choices or {}).items():
        flags.DEFINE_enum(name, first, allowed, "", flag_values=values)
    for name, on in (booleans or {}).items():
        flags.DEFINE_boolean(name, on, "", flag_values=values)
    try:
        left = values(["bpnjax", *arguments])
    except flags.Error as error:
        raise UserError(f"{' '.join(str(error).split())}; see --help") from error
    return values, left[1:]


def named(call: Callable[[], Any], **names: str) -> Any:
    """Calls a function, and replaces argument names in its error messages by flag names.

    Args:
      call: a function without arguments.
      **names: ``argument=flag``.

    Returns:
      What the function returns.

    Raises:
      UserError: as the function raises it, with ``--flag: ...`` in place of ``argument: ...``.
    """
    try:
        return call()
    except UserError as error:
        name, colon, rest = str(error).partition(":")
        if name in names:
            raise UserError(f"--{names[name]}{colon}{rest}") from error
        raise
