"""Compares several methods on one configuration.

    bpnjax compare --config=mnist --methods=bd_ewc,bd_psp,psp --num_seeds=5

Each method runs in its own folder, unless it is complete there. `compare.md`, `compare.csv`,
`compare.html` and four figures are made from their result files. No method is run unless all
folders can be used. If a method fails, its row has the error, the others continue, and the exit
code is 1.
"""

import copy
import csv
import io
import os
import pathlib
import sys
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from bpnjax import config as configuration
from bpnjax import main as command
from bpnjax.utils.errors import UserError

USAGE = """usage: bpnjax compare --config=NAME --methods=A,B,... [--num_seeds=N]
                      [--config.FIELD=VALUE ...] [--workdir=DIR] [--overwrite]
                      [--latex]

  --methods=A,B,...   names of methods; or all, which leaves out bare parts of
                      others: bd, gd, gd_matched, plain_bias, random_bias
  --num_seeds=N       short for --config.num_seeds=N
  --workdir=DIR       folder of the table, with a subfolder per method
                      (default: runs/<name>, and the fields that were changed)
  --latex             also writes compare.tex, the table for \\input"""

# Left out of "all": without protection of the shared parameters they are only parts of others.
PARTS = ("bd", "gd", "gd_matched", "plain_bias", "random_bias")
ACCURACIES = ("task_told", "task_masked", "task_inferred")


class Row(NamedTuple):
    """The result file of a method, or the reason why there is none."""

    method: str
    result: dict[str, Any] | None
    error: str = ""


def run_all(
    config: ConfigDict,
    names: Sequence[str],
    folder: pathlib.Path,
    overwrite: bool,
    given: Collection[str] = (),
) -> list[Row]:
    """Runs each method, unless it is complete.

    Args:
      config: a configuration. Its method is replaced by each name.
      names: of methods.
      folder: each method gets a subfolder.
      overwrite: whether to run complete ones again.
      given: fields that keep their values, whatever the configuration has under ``tuned``.

    Returns:
      One row per method, in the order of ``names``.

    Raises:
      UserError: a configuration is invalid, or a folder holds another run. Then nothing is run.
    """
    from bpnjax.run import results, train

    configs = {}
    for name in names:
        one = copy.deepcopy(config)
        one.method = name
        configs[name] = configuration.with_tuned(one, given)
        configuration.validate(configs[name])
    complete = _check_folders(configs, folder, overwrite)
    rows = []
    for i, (name, one) in enumerate(configs.items()):
        place = folder / name
        print(f"[{i + 1}/{len(names)}] {name}", file=sys.stderr, flush=True)
        try:
            if not complete[name]:
                train.train_and_evaluate(one, place, overwrite)
            rows.append(Row(name, results.read(place)))
        except Exception as error:  # an error in one method must not stop the others
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"bpnjax: {name} failed: {text}", file=sys.stderr, flush=True)
            rows.append(Row(name, None, text))
    return rows


def _check_folders(
    configs: dict[str, ConfigDict], folder: pathlib.Path, overwrite: bool
) -> dict[str, bool]:
    """Finds the complete runs; `UserError` with all folders that cannot be used, if any."""
    from bpnjax.run import dry_run, workdir

    complete, refused = {}, {}
    for name, one in configs.items():
        try:
            complete[name] = workdir.check(folder / name, one, overwrite)
        except UserError as error:
            refused[name] = error
    for name in refused:
        dry_run.check(configs[name])  # an error in the request is reported before one in the folder
    different = {str(error): name for name, error in refused.items()}
    if len(different) > 1:
        texts = "; ".join(f"{name}: {text}" for text, name in different.items())
        raise UserError(f"{len(refused)} of {len(configs)} folders cannot be used: {texts}")
    for text in different:
        raise UserError(text)
    return complete


HEADER = (
    "method", "average told", "average masked", "average inferred", "task 1 told", "forgetting",
    "last inferred", "anytime inferred", "bytes per task", "bytes to answer",
    "examples kept, bytes", "training s",
)  # fmt: skip


def _bytes_to_answer(result: dict[str, Any]) -> str:
    """The bytes that are needed to answer all tasks; results of earlier versions lack them."""
    found = result["memory"].get("answering_bytes")
    return "-" if found is None else f"{found:,}"


FIGURES = {
    "compare": "Accuracies and forgetting with their standard deviation over seeds, bytes and time",
    "forgetting": "Accuracy of task 1, and of all tasks so far, after each task",
    "bytes": "Average accuracy after all tasks against all bytes that are stored",
    "time": "Average accuracy after all tasks against training time",
}
LEGEND = """Accuracies after the last task, averaged over tasks, as mean ± sd over seeds.
Told: the mode of the task is active. Masked: the same, restricted to the classes of the task.
Inferred: nobody tells the task. Last: accuracy on all test examples together. Anytime: mean
over steps of the accuracy on all classes seen so far. Bytes per task: what each task adds to
the model. Bytes to answer: everything that answers all tasks, including the network. Examples
kept: what a replay memory needs to go on learning."""


def cells(rows: list[Row], displayed: bool = False) -> list[list[str]]:
    """The rows of the table below `HEADER`: means ± standard deviations over seeds.

    Args:
      rows: of all methods.
      displayed: whether methods have their names in figures, such as ``"BD+EWC"``.

    Returns:
      Texts. The row of a method that failed has its error in the second column.
    """
    from bpnjax.run import style
    from bpnjax.run.writers import mean_and_sd

    lines = []
    for row in rows:
        name = style.display(row.method) if displayed else f"`{row.method}`"
        if row.result is None:
            failed = [name, f"failed: {row.error}".replace("|", "/")]
            lines.append(failed + [""] * (len(HEADER) - len(failed)))
            continue
        summary = row.result["summary"]
        lines.append([
            name,
            *(mean_and_sd(summary[kind]["average_accuracy"]) for kind in ACCURACIES),
            mean_and_sd(summary["task_told"]["first_task_accuracy"]),
            mean_and_sd(summary["task_told"]["forgetting"]),
            # Results of earlier versions lack these two.
            mean_and_sd(summary["task_inferred"].get("last_accuracy")),
            mean_and_sd(summary["task_inferred"].get("average_incremental_accuracy")),
            f"{row.result['memory']['bytes_per_task']:,}",
            _bytes_to_answer(row.result),
            f"{row.result['memory']['replay_bytes']:,}",
            f"{row.result['time']['train_seconds']:.0f}",
        ])  # fmt: skip
    return lines


def markdown(rows: list[Row]) -> str:
    """Formats the table as Markdown.

    Args:
      rows: of all methods.

    Returns:
      Lines of text; see `cells`.
    """
    from bpnjax.run.writers import markdown_table

    return markdown_table(HEADER, cells(rows))


def printed(rows: list[Row]) -> str:
    """Formats the table for a terminal of 80 characters; its last columns may be left out.

    Args:
      rows: of all methods.

    Returns:
      Lines of text without a final line feed.
    """
    from bpnjax.run.writers import WIDTH, aligned, mean_and_sd

    header = (
        "method", "told", "masked", "inferred", "forgetting", "bytes/task", "anytime",
        "training s", "task 1",
    )  # fmt: skip
    table = []
    for row in rows:
        if row.result is None:
            table.append([row.method, "failed", *"-" * (len(header) - 2)])
            continue
        told = row.result["summary"]["task_told"]
        averages = [row.result["summary"][kind]["average_accuracy"] for kind in ACCURACIES]
        digits = 4 if told["average_accuracy"]["sd"] is None else 3
        table.append([
            row.method,
            *(mean_and_sd(summary, digits) for summary in (*averages, told["forgetting"])),
            f"{row.result['memory']['bytes_per_task']:,}",
            mean_and_sd(
                row.result["summary"]["task_inferred"].get("average_incremental_accuracy"), digits
            ),
            f"{row.result['time']['train_seconds']:.0f}",
            mean_and_sd(told["first_task_accuracy"], digits),
        ])  # fmt: skip
    for n in range(len(header), 1, -1):
        lines = aligned(header[:n], [cells[:n] for cells in table])
        if len(lines[1]) <= WIDTH:
            break
    return "\n".join(lines)


def comma_separated(rows: list[Row]) -> str:
    """Formats the table as CSV, with mean and sd in separate columns.

    Args:
      rows: of all methods.

    Returns:
      Lines of text that end with a line feed. A cell without a number is empty.
    """
    columns = [(kind, "average_accuracy") for kind in ACCURACIES]
    columns += [("task_told", name) for name in ("first_task_accuracy", "backward_transfer")]
    columns += [("task_told", "forgetting")]
    columns += [
        ("task_inferred", name) for name in ("last_accuracy", "average_incremental_accuracy")
    ]
    untold = {"mean": None, "sd": None}  # for numbers that results of earlier versions lack
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [f"{kind}_{name}_{part}" for kind, name in columns for part in ("mean", "sd")]
    writer.writerow(["method", *names, "bytes_per_task", "replay_bytes", "train_seconds", "error"])
    for row in rows:
        if row.result is None:
            writer.writerow([row.method, *("" for _ in names), "", "", "", row.error])
            continue
        values = [
            row.result["summary"][kind].get(name, untold)[part]
            for kind, name in columns
            for part in ("mean", "sd")
        ]
        cells = ["" if v is None else f"{v:.6f}" for v in values]
        memory, time = row.result["memory"], row.result["time"]
        seconds = f"{time['train_seconds']:.3f}"
        writer.writerow(
            [row.method, *cells, memory["bytes_per_task"], memory["replay_bytes"], seconds, ""]
        )
    return text.getvalue()


def write(
    folder: pathlib.Path, config: ConfigDict, rows: list[Row], line: str, latex: bool = False
) -> None:
    """Writes `compare.md`, `compare.csv`, `compare.html` and the figures.

    Args:
      folder: the folder for the files.
      config: the common configuration.
      rows: of all methods.
      line: the command that repeats the comparison.
      latex: whether to write `compare.tex` too.
    """
    from bpnjax.run import html_page, plots
    from bpnjax.run.checkpoint import write_atomically
    from bpnjax.run.writers import latex_table

    seeds = f"{config.num_seeds} seed" + ("s" if config.num_seeds > 1 else "")
    title = f"{config.name}, {seeds}"
    done = [row.result for row in rows if row.result is not None]
    folder.mkdir(parents=True, exist_ok=True)
    figures = plots.comparison(folder, done) if done else []
    shown = [(path, FIGURES[path.stem]) for path in figures]
    images = "".join(f"![{caption}]({path.name})\n\n" for path, caption in shown)
    write_atomically(folder / "compare.csv", comma_separated(rows))
    if latex:
        write_atomically(folder / "compare.tex", latex_table(HEADER, cells(rows, displayed=True)))
    sections = [
        html_page.Section("table", "Table", LEGEND, [(HEADER, cells(rows))], [], [line]),
        html_page.Section("figures", "Figures", "", [], shown, []),
    ]
    write_atomically(folder / "compare.html", html_page.page(title, sections))
    text = f"# {title}\n\n{markdown(rows)}\n\n{LEGEND}\n\n{images}    {line}\n"
    write_atomically(folder / "compare.md", text)


def run(arguments: list[str]) -> int:
    """Runs the command.

    Args:
      arguments: without the program's name.

    Returns:
      The exit code: 0, 1 if a method failed or the run was interrupted, 2 for a wrong argument.
    """
    if command.asks_for_help(arguments):
        command.print_help(USAGE, arguments)
        return 0
    return command.guarded(lambda: _compared(arguments))


def _compared(arguments: list[str]) -> int:
    """Runs the command on its arguments; returns the exit code."""
    from bpnjax.methods import REGISTRY

    more: dict[str, str | bool] = {"methods": "", "num_seeds": "", "latex": False}
    config, values, changed = command.parse_flags(arguments, more)
    if values.num_seeds:
        if not values.num_seeds.isdecimal():
            raise UserError(f"--num_seeds: {values.num_seeds!r} is not a number; give one")
        config.num_seeds = int(values.num_seeds)
    names = [name.strip() for name in values.methods.split(",") if name.strip()]
    every = [name for name in REGISTRY if name not in PARTS]
    names = every if names == ["all"] else list(dict.fromkeys(names))
    if not names:
        raise UserError(f"--methods: missing; name some of: all, {', '.join(REGISTRY)}")
    place = os.path.join("runs", config.name + command.suffix(changed))
    folder = pathlib.Path(values.workdir or place)
    rows = run_all(config, names, folder, values.overwrite, changed)
    line = "python -m bpnjax.compare " + " ".join(
        a for a in arguments if not a.lstrip("-").startswith(("workdir", "config.dataset."))
    )
    write(folder, config, rows, line, values.latex)
    print(printed(rows))
    print(f"results in {folder} (all columns: compare.md, compare.html)")
    return 1 if any(row.result is None for row in rows) else 0


if __name__ == "__main__":
    command.leave(run)
