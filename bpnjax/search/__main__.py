"""The command that searches the best settings of several methods with a number of trials.

bpnjax search --config=mnist --methods=bd_ewc,ewc,psp --trials=32 --workdir=runs/search
"""

import os
import shlex
from collections.abc import Sequence

from bpnjax import main as command
from bpnjax.utils.errors import UserError

USAGE = """usage: bpnjax search --config=NAME --methods=A,B,... [--trials=N]
                     [--workdir=DIR] [--storage=ADDRESS] [--at_once=N] [--prune]
                     [--space.FIELD=RANGE ...] [--num_seeds=N] [--noreport]
                     [--dry_run] [--config.FIELD=VALUE ...]

  --methods=A,B,...    names of methods
  --trials=N           trials per method, beginning with the settings of the
                       configuration (default: 32)
  --workdir=DIR        folder (default: runs/<name>/search); the same
                       command in another process, or on another machine that
                       sees the folder, joins the search
  --storage=ADDRESS    address of a database, as postgresql://user@host/name, or
                       journal for a log file (default: SQLite in the workdir)
  --at_once=N          trials in one vmapped program: faster on accelerators
  --prune              stop trials early that are not in the better half
  --space.FIELD=RANGE  search a field over low:high:log, low:high:linear, or a
                       list a,b,c; or keep its value: fixed
  --num_seeds=N        seeds of the reported runs with the best settings
  --noreport           skip these runs
  --dry_run            print what would be searched and how long it would take

Writes search.json, search.md, figures, report/<method>, and tuned.py: a
configuration with the settings of each method for --config of run, compare and
paper."""
_FLAGS: dict[str, str | bool] = {
    "methods": "", "trials": "32", "storage": "", "at_once": "1", "prune": False,
    "num_seeds": "", "report": True, "dry_run": False,
}  # fmt: skip


def run(arguments: list[str]) -> int:
    """Runs the command.

    Args:
      arguments: without the program's name.

    Returns:
      The exit code: 0, 1 if it was interrupted or a disk is full, 2 for a wrong argument.
    """
    if command.asks_for_help(arguments):
        command.print_help(USAGE, arguments)
        return 0
    return command.guarded(lambda: _searched(arguments))


def _searched(arguments: list[str]) -> int:
    """Runs the command on its arguments; returns the exit code."""
    space, rest = _space(arguments)
    config, values, _ = command.parse_flags(rest, _FLAGS)
    numbers = {}
    for name in ("trials", "at_once", "num_seeds"):
        text = values[name].value
        if text and not (text.isdecimal() and int(text) > 0):
            raise UserError(f"--{name}: {text!r} is not a number above 0; give one")
        numbers[name] = int(text or 0)
    if numbers["num_seeds"]:
        config.num_seeds = numbers["num_seeds"]
    names = list(dict.fromkeys(n.strip() for n in values.methods.split(",") if n.strip()))
    if not names:
        raise UserError("--methods: missing; name some, as --methods=bd_ewc,ewc")
    if values.overwrite:
        raise UserError("--overwrite: a search is never overwritten; name another --workdir")
    # Imported here, so that a wrong flag is reported without delay.
    from bpnjax.search import outcome, study

    if values.dry_run:
        print(_described(study.plan(config, names, numbers["trials"], space), values.report))
        return 0
    folder = values.workdir or os.path.join("runs", config.name, "search")
    result = study.search(
        config, names, folder, numbers["trials"], space, values.storage, numbers["at_once"],
        values.prune, values.report,
        shlex.join(["python", "-m", "bpnjax.search", *_without_folders(arguments, outcome.HERE)]),
    )  # fmt: skip
    print(outcome.printed(result))
    print(f"results in {folder}")
    return 0


def _without_folders(arguments: Sequence[str], fields: Sequence[str]) -> list[str]:
    """The arguments without those that name folders or databases of this machine."""
    flags = {"workdir", "storage", *(f"config.{field}" for field in fields)}
    kept, value_follows = [], False
    for argument in arguments:
        name, equals, _ = argument.lstrip("-").partition("=")
        left_out = not value_follows and argument.startswith("-") and name in flags
        if not (left_out or value_follows):
            kept.append(argument)
        value_follows = left_out and not equals
    return kept


def _space(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """The flags ``--space.FIELD=RANGE``, and the other arguments."""
    space, rest, following = {}, [], ""
    for argument in arguments:
        name, equals, value = argument.lstrip("-").partition("=")
        if following:
            space[following], following = argument, ""
        elif argument.startswith("-") and name.startswith("space."):
            if equals:
                space[name.removeprefix("space.")] = value
            else:
                following = name.removeprefix("space.")
        else:
            rest.append(argument)
    if following:
        raise UserError(f"--space.{following}: no range; write low:high:log")
    return space, rest


def _described(made: object, report: bool) -> str:
    """Describes what a search would do."""
    from bpnjax.run import dry_run
    from bpnjax.search.study import Plan

    assert isinstance(made, Plan)
    first = next(iter(made.protocols.values()))
    lines = [f"protocol  {first.name}", "trials differ from the runs that are reported by"]
    lines += [f"  {change}" for change in first.changes]
    seconds, runs = 0.0, 0
    for name, own in made.protocols.items():
        steps, each = dry_run.cost(own.tune)
        seconds += made.trials[name] * each
        runs += made.trials[name]
        lines.append(f"{name}: {made.trials[name]} trials of {steps:,} steps")
        lines += [f"  {axis.described()}" for axis in made.axes[name]]
        if not made.axes[name]:
            lines.append("  nothing to search: one trial")
        if report:
            seconds += dry_run.cost(own.report)[1]
            runs += 1
    lines.append(
        f"{runs} runs, about {dry_run.duration(seconds)} on one such device, by its rate of matrix "
        "products; rough, compiling not counted"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    command.leave(run)
