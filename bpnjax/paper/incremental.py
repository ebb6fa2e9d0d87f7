"""Fig. 6 and Table I: incremental MNIST, CIFAR-10 and CIFAR-100."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bpnjax.evaluation.metrics import mean_and_sd
from bpnjax.paper import drawing, runs
from bpnjax.paper.report import Cell, Report, beside_paper, state


class Line(NamedTuple):
    """One method of a figure: how to run it, and the paper's result."""

    label: str
    method: str
    fields: dict[str, Any]
    paper: float | None  # accuracy of task 1 after all tasks
    paper_bytes: int | None = None
    kind: str = "task_told"


def _gem(n: int, paper: float | None, paper_bytes: int | None = None) -> Line:
    # In the paper GEM is told the task and has one final linear layer per task (Sec. VI-D 3).
    fields = {"gem__memories": n, "gem__per": "class", "sequence__heads": "multi"}
    return Line(f"GEM({n})", "gem", fields, paper, paper_bytes, "task_masked")


Way = tuple[str, str, dict[str, Any]]
STL: Way = ("STL", "stl", {})
BD_EWC: Way = ("BD+EWC", "bd_ewc", {})
BD_PSP: Way = ("BD+PSP", "bd_psp", {})
PSP: Way = ("PSP", "psp", {})
EWC: Way = ("EWC", "ewc", {})
GD_EWC: Way = ("GD+EWC", "gd_ewc", {})

# The paper's bytes for GEM are images x 3 channels x pixels. This counts colours for MNIST and,
# as 32 x 32 x 3 x 3, counts them twice for CIFAR.
MNIST = (
    Line(*STL, 0.99), Line(*BD_EWC, 0.98, 4808), _gem(10, 0.98, 47040), Line(*EWC, 0.0),
    Line(*GD_EWC, 0.0), Line(*BD_PSP, None), Line(*PSP, None),
)  # fmt: skip
CIFAR10 = (
    Line(*STL, 0.83), Line(*BD_EWC, 0.795, 4808), _gem(256, 0.80, 4718592),
    _gem(150, 0.698, 2764800), Line(*EWC, 0.0), Line(*GD_EWC, 0.0), Line(*BD_PSP, None),
    Line(*PSP, None),
)  # fmt: skip
CIFAR100 = (
    Line(*STL, 0.86), Line(*BD_PSP, 0.85, 20776), Line(*BD_EWC, 0.845, 4808),
    Line(*PSP, 0.83, 15968), _gem(256, 0.79, 4718592),
    _gem(10, 0.69), Line(*EWC, 0.0), Line(*GD_EWC, None),
)  # fmt: skip


def _complete(
    runner: runs.Runner, config_file: str, lines: Sequence[Line], seeds: int
) -> list[runs.Run]:
    # Fig. 6a and b show every epoch. Table I uses the same runs.
    every_epoch = {"evaluate__every_epochs": 1} if config_file != "cifar100.py" else {}
    more = {"evaluate__inferred_rows": "last"} | every_epoch
    return [
        runs.complete(
            runner, line.label, config_file, line.method, seeds, **line.fields, **more
        )
        for line in lines
    ]  # fmt: skip


def first_task(run: runs.Run, kind: str) -> tuple[float | None, float | None]:
    """Accuracy of task 1 after all tasks: mean and sd over seeds.

    Args:
      run: a complete run.
      kind: one of the three kinds of accuracy.

    Returns:
      The mean, and the sd (n - 1; None for one seed).

    Source: Wen et al. 2020 (arXiv 2009.13954), Table I.
    """
    found = mean_and_sd(runs.matrix(run, kind)[:, -1, 0])
    return found["mean"], found["sd"]


def _report(
    name: str,
    title: str,
    text: str,
    lines: Sequence[Line],
    done: Sequence[runs.Run],
    figure: pathlib.Path,
) -> Report:
    cells = [
        Cell(line.label, *first_task(run, line.kind), line.paper)
        for line, run in zip(lines, done, strict=True)
    ]
    return Report(
        name=name, title=title, text=text, tables=[beside_paper(cells, "task 1 after all tasks")],
        figures=[figure], command=f"python -m bpnjax.paper --artefact={name}",
        runs=[run.command for run in done], seconds=runs.seconds(done),
        ledger={"averages": _ledger(lines, done)},
    )  # fmt: skip


def _ledger(lines: Sequence[Line], done: Sequence[runs.Run]) -> tuple[list[str], list[list[str]]]:
    """The table for README. GEM with its own heads is another setting and left out."""
    header = [
        "method", "seeds", "task 1", "average", "masked average", "inferred average",
        "paper, task 1", "state",
    ]  # fmt: skip
    rows = [
        [f"`{line.method}`", str(run.result["num_seeds"]), *runs.averages(run),
         "-" if line.paper is None else f"{line.paper:g}",
         state(first_task(run, line.kind)[0], line.paper)]
        for line, run in zip(lines, done, strict=True) if line.method != "gem"
    ]  # fmt: skip
    return header, rows


_COMMON = """All methods have the same network, learning rates, epochs and seeds; GEM has, as in the
paper, an output layer for each task and is told the task (task_masked), the others answer over all
classes with their task's mode (task_told)."""


def by_epoch(
    runner: runs.Runner, name: str, title: str, config_file: str, lines: Sequence[Line], seeds: int
) -> Report:
    """Fig. 6a or b: the accuracy of each task after each epoch.

    Args:
      runner: where runs go.
      name: of the artefact.
      title: of the report.
      config_file: a file in the folder of configurations.
      lines: the methods, one `Line` each.
      seeds: number of seeds, unless the runner has one.

    Returns:
      `Report`.
    """
    done = _complete(runner, config_file, lines, seeds)
    tasks = len(done[0].result["class_names"])
    path = drawing.figure_path(runner.folder, name)
    with drawing.panels(path, tasks, 1, (7, 1.5 * tasks)) as axes:
        for line, run in zip(lines, done, strict=True):
            epochs, values = runs.by_epoch(run, line.kind)
            for task, axis in enumerate(axes):
                started = epochs > task * len(epochs) // tasks
                drawing.band(axis, epochs[started], values[started, :, task], line.label)
        for task, axis in enumerate(axes):
            for start in range(1, tasks):
                axis.axvline(start * len(epochs) / tasks, color="0.6", ls="--", lw=0.8)
            axis.set_ylim(-0.03, 1.03)
            axis.set_ylabel(f"task {task + 1}")
        axes[-1].set_xlabel("epochs")
        drawing.legend(axes[0])
    text = f"Accuracy of each task; a dashed line is the start of a new task. {_COMMON}"
    return _report(name, title, text, lines, done, path)


def fig6a(runner: runs.Runner) -> Report:
    """Incremental MNIST: five tasks of two digits.

    Args:
      runner: where runs go.

    Returns:
      `Report`.

    Source: Wen et al. 2020 (arXiv 2009.13954), Fig. 6a. Variant: GEM(n) stores n examples per
    class, which fits the paper's bytes, and answers with one head per task.
    """
    return by_epoch(runner, "fig6a", "Fig. 6a: incremental MNIST", "mnist.py", MNIST, 5)


def fig6b(runner: runs.Runner) -> Report:
    """Incremental CIFAR-10: five tasks of two classes.

    Args:
      runner: where runs go.

    Returns:
      `Report`.

    Source: Wen et al. 2020 (arXiv 2009.13954), Fig. 6b; GEM as in `fig6a`.
    """
    return by_epoch(runner, "fig6b", "Fig. 6b: incremental CIFAR-10", "cifar10.py", CIFAR10, 3)


def fig6c(runner: runs.Runner) -> Report:
    """Incremental CIFAR-100: accuracy of the first task by the number of tasks learned.

    Args:
      runner: where runs go.

    Returns:
      `Report`.

    Source: Wen et al. 2020 (arXiv 2009.13954), Fig. 6c; GEM as in `fig6a`.
    """
    done = _complete(runner, "cifar100.py", CIFAR100, 3)
    path = drawing.figure_path(runner.folder, "fig6c")
    with drawing.panels(path, 1, 1, (7, 4.5)) as (axis,):
        for line, run in zip(CIFAR100, done, strict=True):
            first = runs.matrix(run, line.kind)[:, :, 0]
            drawing.band(axis, np.arange(1, first.shape[1] + 1), first.T, line.label)
        axis.set_ylim(-0.03, 1.03)
        axis.set_xlabel("number of tasks")
        axis.set_ylabel("accuracy of task 1")
        drawing.legend(axis)
    text = f"Accuracy of task 1 by the number of tasks learned. {_COMMON}"
    return _report("fig6c", "Fig. 6c: incremental CIFAR-100", text, CIFAR100, done, path)


_TABLE1 = """Accuracy of task 1 after all tasks, and what must be kept on disk for each further
task. Ours is counted from the arrays that a run stores: float32 biases, a key's seed (nothing a
task), images as uint8.

The paper's bytes come from three depths: 4,808 = 4 x (4 x 300 + 2), four hidden layers and two
outputs; 15,968 = 4 x (3,072 + 3 x 300 + 20), keys of the pixels, three hidden layers and 20
outputs as float32; 20,776 is their sum. GEM's count is images x pixels x 3, which gives MNIST
colours and CIFAR twice. Ours has five hidden layers, as the paper's text says, and all outputs."""


def table1(runner: runs.Runner) -> Report:
    """Accuracy of task 1 after all tasks, and bytes per task.

    Args:
      runner: where runs go.

    Returns:
      `Report`. Bytes are counted from the arrays that the runs store. The text explains how the
      paper's numbers differ.

    Source: Wen et al. 2020 (arXiv 2009.13954), Table I.
    """
    header = [
        "sequence",
        "method",
        "task 1",
        "paper",
        "difference",
        "state",
        "bytes",
        "paper bytes",
    ]
    rows, everything = [], []
    for name, config_file, lines, seeds in (
        ("MNIST", "mnist.py", MNIST, 5),
        ("CIFAR-10", "cifar10.py", CIFAR10, 3),
        ("CIFAR-100", "cifar100.py", CIFAR100, 3),
    ):
        done = _complete(runner, config_file, lines, seeds)
        everything += done
        cells = [
            Cell(line.label, *first_task(run, line.kind), line.paper)
            for line, run in zip(lines, done, strict=True)
        ]
        for line, run, row in zip(lines, done, beside_paper(cells, "")[1], strict=True):
            memory = run.result["memory"]
            tasks = len(run.result["class_names"])
            replay = memory["replay_bytes"] // tasks
            kept = memory["bytes_per_task"] + replay
            paper_bytes = "-" if line.paper_bytes is None else f"{line.paper_bytes:,}"
            rows.append([name, *row, f"{kept:,}", paper_bytes])
    path = drawing.figure_path(runner.folder, "table1")
    with drawing.panels(path, 1, 1, (7, 4.5)) as (axis,):
        for sequence, mark in (("MNIST", "o"), ("CIFAR-10", "s"), ("CIFAR-100", "^")):
            for row in rows:
                if row[0] == sequence:
                    x = max(int(row[6].replace(",", "")), 1)
                    y = float(row[2].split(" ")[0])
                    axis.plot(x, y, mark, color=drawing.color(row[1]), ms=7, alpha=0.8)
            axis.plot([], [], mark, color="0.4", label=sequence)
        for label in dict.fromkeys(row[1] for row in rows):
            axis.plot([], [], "D", color=drawing.color(label), label=label)
        axis.set_xscale("log")
        axis.set_xlabel("bytes kept for each further task (1 stands for 0)")
        axis.set_ylabel("accuracy of task 1 after all tasks")
        drawing.legend(axis)
    return Report(
        "table1", "Table I: task 1 after all tasks, and bytes per task", _TABLE1,
        [(header, rows)], [path], "python -m bpnjax.paper --artefact=table1",
        [run.command for run in everything], runs.seconds(everything),
    )  # fmt: skip
