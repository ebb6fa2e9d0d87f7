"""All commands behind one name: `bpnjax COMMAND ...`, or `python -m bpnjax COMMAND ...`."""

import importlib
import sys

from bpnjax import main as command
from bpnjax.utils.errors import suggest
from bpnjax.version import __version__

COMMANDS = {  # {name: (module with run(arguments) -> exit code, description)}
    "run": ("bpnjax.main", "train a method on a sequence of tasks"),
    "compare": ("bpnjax.compare", "compare several methods on one configuration"),
    "search": ("bpnjax.search.__main__", "search settings of several methods with equal budgets"),
    "predict": ("bpnjax.predict", "answer examples with a trained model"),
    "export": ("bpnjax.deploy", "write a trained model as a StableHLO program"),
    "packs": ("bpnjax.packs", "merge tasks that were learned separately into one model"),
    "paper": ("bpnjax.paper.__main__", "make the paper's figures and tables, with their runs"),
    "pretrain": ("bpnjax.pretrain", "train a network for other runs to start from"),
    "plots": ("bpnjax.run.plots", "draw the figures of a run again"),
}


def usage() -> str:
    """Lists the commands with a line each.

    Returns:
      Lines of text.

    Example:
      >>> from bpnjax.__main__ import usage
      >>> print(usage().splitlines()[0])
      usage: bpnjax COMMAND ...
    """
    lines = [f"  {name:10}{meaning}" for name, (_, meaning) in COMMANDS.items()]
    return "\n".join(
        ["usage: bpnjax COMMAND ...", "", *lines, "",
         "bpnjax COMMAND --help says more; bpnjax --version is the version. For example:",
         "  bpnjax run --config=digits --config.method=bd_psp"]
    )  # fmt: skip


def run(arguments: list[str]) -> int:
    """Runs the command that the first argument names, with the other arguments.

    Args:
      arguments: without the program's name.

    Returns:
      Its exit code; 2 if there is no such command.
    """
    name = arguments[0] if arguments else ""
    if name in ("--help", "-h", "help"):
        print(usage())
    elif name == "--version":
        print(f"bpnjax {__version__}")
    elif name in COMMANDS:  # imported here, because some modules take a second
        return importlib.import_module(COMMANDS[name][0]).run(arguments[1:])
    else:
        what = f"unknown command {name!r}" if name else "no command"
        print(f"bpnjax: {what}; {suggest(name, COMMANDS)}", file=sys.stderr)
        return 2
    return 0


def main() -> None:
    """Runs the command on the arguments of the process and exits with its code."""
    command.leave(run)


if __name__ == "__main__":
    main()
