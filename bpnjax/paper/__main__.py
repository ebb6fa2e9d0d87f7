"""The command that makes an artefact: its figure, its table and the runs behind them.

python -m bpnjax.paper --artefact=fig6a --workdir=runs/paper
"""

import os
import pathlib
import sys
from typing import Any

from bpnjax import config as configuration
from bpnjax import main as command
from bpnjax.utils.errors import UserError

USAGE = """usage: bpnjax paper --artefact=NAME[,NAME...] [--workdir=DIR]
                    [--num_seeds=N] [--configs=DIR] [--latex]
                    [--config.FIELD=VALUE ...]
       bpnjax paper --pages [--root=DIR] [--check]

  --artefact=NAME         fig5 fig6a fig6b fig6c table1 table2 fig7 controls
                          hidden_dim strength untold, or all of them, which also
                          makes report/index.html; or online, step, ten_domains
                          or incremental_classes, which are not in the paper
  --sequence=NAME         sets of table2: eight_tasks (many GB; the default) or
                          eight_domains; all includes table2 only with it
  --workdir=DIR           where everything goes (default: runs/paper)
  --num_seeds=N           seeds of each run, instead of the artefact's number
  --latex                 also writes NAME.tex, the tables for \\input
  --configs=DIR           folder of configuration files (default: those of the
                          package)
  --config.FIELD=VALUE    changes a field in all runs, as
                          --config.dataset.data_dir=DIR
  --pages                 writes the pages of the documentation, and the tables
                          in README, from docs/results/*.json: copy NAME.json
                          and figures of an artefact there first
  --check                 writes nothing and lists those that differ
  --root=DIR              folder of the clone (default: here)"""


SEQUENCES = ("eight_tasks", "eight_domains")  # for table2


def artefacts() -> dict[str, Any]:
    """The functions that make artefacts, by name.

    Returns:
      ``{name: (Runner) -> Report}``, in the order of ``all``.
    """
    from bpnjax.paper import (
        classes,
        controls,
        domains,
        eight,
        incremental,
        online,
        permuted,
        regions,
        step,
        sweeps,
        untold,
    )

    return {
        "fig5": regions.fig5,
        "fig6a": incremental.fig6a,
        "fig6b": incremental.fig6b,
        "fig6c": incremental.fig6c,
        "table1": incremental.table1,
        "table2": eight.table2,
        "fig7": permuted.fig7,
        "controls": controls.controls,
        "hidden_dim": sweeps.hidden_dim,
        "strength": sweeps.strength,
        "untold": untold.untold,
        "online": online.online,
        "step": step.step,
        "incremental_classes": classes.incremental_classes,
        "ten_domains": domains.ten_domains,
    }


def _parse(arguments: list[str]) -> tuple[list[str], bool, bool, Any]:
    """The names of artefacts, whether all were requested, whether LaTeX was, and the runner."""
    more: dict[str, str | bool]
    more = {"artefact": "", "num_seeds": "", "configs": "", "sequence": "", "latex": False}
    config, values, _ = command.parse_fields(configuration.default(), arguments, more)
    fields = [a.lstrip("-").split("=", 1)[0] for a in arguments if a.startswith("--config.")]
    flat = configuration.flatten(config)
    given = [f.removeprefix("config.") for f in fields]
    seeds = values.num_seeds
    if seeds and not (seeds.isdecimal() and int(seeds) > 0):
        raise UserError(f"--num_seeds: {seeds!r} is not a number above 0; give one")
    home = pathlib.Path(values.configs or configuration.packaged()["mnist"].parent)
    if not (home / "mnist.py").is_file():
        raise UserError(f"--configs: no mnist.py in {home}; name a folder like the repository's")
    known = artefacts()
    names = [name.strip() for name in values.artefact.split(",") if name.strip()]
    if not names:
        raise UserError(f"--artefact: missing; name one of: {', '.join(known)}, all")
    whole = names == ["all"]
    if whole:
        # The sets of the paper's Table II take many GB, so its small ones must be requested.
        # The other artefacts that are left out are not in the paper.
        left_out = {"online", "step", "incremental_classes", "ten_domains"} | (
            set() if values.sequence else {"table2"}
        )
        names = [name for name in known if name not in left_out]
    for name in names:
        if name not in known:
            raise UserError(
                f"--artefact: unknown artefact {name!r}; choose from: {', '.join(known)}, all"
            )
    folder = pathlib.Path(values.workdir or os.path.join("runs", "paper"))
    if values.sequence not in ("", *SEQUENCES):
        raise UserError(
            f"--sequence: unknown sequence {values.sequence!r}; choose from: {', '.join(SEQUENCES)}"
        )
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise UserError(f"--workdir: {existing} is a file; name a folder")
    overrides = {field: flat[field] for field in given}
    from bpnjax.paper.runs import Runner  # here, because it imports JAX

    runner = Runner(folder, home, int(seeds or 0), overrides, values.sequence)
    return names, whole, values.latex, runner


def _pages(arguments: list[str]) -> int:
    """Writes pages from result files, or lists those that differ; returns the exit code."""
    from bpnjax.paper import pages
    from bpnjax.utils import flags

    values, rest = flags.parse(arguments, ["root"], booleans={"pages": False, "check": False})
    if rest or not values.pages:
        raise UserError("--check: goes with --pages, and with no other argument but --root")
    different = pages.render(pathlib.Path(values.root or "."), values.check)
    for page in different:
        print(f"{'differs from its result file' if values.check else 'written'}: {page}")
    wrong = [page for page in different if values.check or "(not the figure" in page]
    return 1 if wrong else 0


def run(arguments: list[str]) -> int:
    """Runs the command.

    Args:
      arguments: without the program's name.

    Returns:
      The exit code: 0, 1 if it was interrupted or the disk failed, 2 for a wrong argument.
    """
    if command.asks_for_help(arguments):
        print(USAGE)
        return 0
    return command.guarded(lambda: _made(arguments))


def _made(arguments: list[str]) -> int:
    """Runs the command on its arguments; returns the exit code."""
    if {a.lstrip("-") for a in arguments} & {"pages", "check"}:
        return _pages(arguments)
    names, whole, latex, runner = _parse(arguments)
    from bpnjax.paper import pages, report
    from bpnjax.run.checkpoint import write_atomically
    from bpnjax.run.writers import markdown_table

    folder, made = runner.folder, []
    for name in names:
        print(f"[{name}]", file=sys.stderr, flush=True)
        made.append(artefacts()[name](runner))
        path = report.write(folder / name, made[-1])
        pages.save(folder / name / f"{name}.json", made[-1], runner.num_seeds)
        if latex:
            write_atomically(folder / name / f"{name}.tex", report.latex(made[-1]))
        for header, rows in made[-1].tables:
            print(markdown_table(header, rows))
        print(f"{path} and the figure beside it")
    if whole:
        (folder / "report").mkdir(exist_ok=True)
        write_atomically(folder / "report" / "index.html", report.page(made))
        print(folder / "report" / "index.html")
    return 0


if __name__ == "__main__":
    command.leave(run)
