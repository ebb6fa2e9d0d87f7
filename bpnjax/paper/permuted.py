"""Fig. 7: a hundred permuted MNIST tasks on a small network."""

import itertools
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from bpnjax.evaluation.metrics import mean_and_sd
from bpnjax.paper import drawing, runs
from bpnjax.paper.report import Cell, Report, beside_paper
from bpnjax.run.writers import number

GROUP = 10  # number of tasks


class Line(NamedTuple):
    """A method of the figure and the paper's result."""

    label: str
    method: str  # its settings are under ``tuned`` in configs/permuted_mnist.py
    paper: float | None = None  # average accuracy over all tasks
    seeds: int = 5


# docs/REPRODUCTION.md says how the settings were found.
METHODS = (
    Line("BD+PSP", "bd_psp", 0.626), Line("PSP", "psp", 0.481), Line("BD+EWC", "bd_ewc", 0.466),
    Line("EWC", "ewc", 0.344),
)  # fmt: skip
# Not in the paper: the best composition that stores no more per task than BD+PSP, and a network
# per task, the ceiling.
BEYOND = (
    Line("BD+PSP+K-FAC EWC", "bd_psp_ewc_kfac", seeds=3),
    Line("STL", "stl"),
)  # fmt: skip
_TEXT = """(a) Average accuracy over all tasks learned so far. (b) After all tasks, groups of ten;
stars: Welch's t-test between two methods on the tasks of a group (each task's accuracy is its mean
over seeds), two-sided, Holm's correction for the six comparisons of a group: *** p < 0.001,
** p < 0.01, * p < 0.05. Second figure: the average after all tasks against everything that is
stored to answer them, the network included. STL, a network per task, is the upper bound."""


def holm(p_values: ArrayLike) -> np.ndarray:
    r"""Holm's correction of p-values for several tests.

    .. math:: \tilde p_{(i)} = \min\big(1, \max_{j \le i} (m - j + 1) \, p_{(j)}\big)

    with :math:`p_{(j)}` the j-th smallest of the m. The results may be compared with the level of
    all tests together.

    Args:
      p_values: float ``[m]``.

    Returns:
      float ``[m]`` in the given order, at most 1.

    Example:
      >>> from bpnjax.paper.permuted import holm
      >>> holm([0.01, 0.04, 0.03]).round(2).tolist()
      [0.03, 0.06, 0.06]

    Source: Holm 1979.
    """
    p_values = np.asarray(p_values, float)
    order = np.argsort(p_values)
    scaled = (len(order) - np.arange(len(order))) * p_values[order]
    corrected = np.empty_like(p_values)
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return corrected


def stars(p: float) -> str:
    """The paper's marks for a p-value.

    Args:
      p: a p-value.

    Returns:
      ``"***"``, ``"**"``, ``"*"`` or ``"n.s."``.

    Example:
      >>> from bpnjax.paper.permuted import stars
      >>> stars(0.0005), stars(0.005), stars(0.05)
      ('***', '**', 'n.s.')

    Source: Wen et al. 2020 (arXiv 2009.13954), Fig. 7b.
    """
    return "***" if p < 0.001 else "**" if p < 0.01 else "*" if p < 0.05 else "n.s."


def so_far(run: runs.Run) -> tuple[np.ndarray, np.ndarray]:
    r"""The average over all tasks learned so far, by the number of tasks.

    .. math:: A_n = \frac{1}{n} \sum_{j \le n} R_{n,j}

    Args:
      run: a complete run.

    Returns:
      The numbers of tasks after which the run was tested, int ``[rows]``, and the averages of
      task_told, float ``[rows, seeds]``.

    Source: Wen et al. 2020 (arXiv 2009.13954), Fig. 7a.
    """
    found = runs.matrix(run)
    rows = [i for i in range(found.shape[1]) if not np.isnan(found[:, i]).all()]
    averages = np.array([found[:, i, : i + 1].mean(1) for i in rows])
    return np.array(rows) + 1, averages


def margins(done: Sequence[runs.Run]) -> tuple[list[str], list[list[str]]]:
    """A table of the averages by the number of tasks, and what the biases add.

    Args:
      done: complete runs. Pairs with and without BD are compared seed by seed.

    Returns:
      Header and rows of text.
    """
    by_label = {run.label: so_far(run) for run in done}
    counts = next(iter(by_label.values()))[0]
    rows = []
    for i, count in enumerate(counts):
        row = [str(count)]
        for one, other in (("BD+PSP", "PSP"), ("BD+EWC", "EWC")):
            if one in by_label and other in by_label:
                a, b = by_label[one][1][i], by_label[other][1][i]
                difference = mean_and_sd(a - b)
                row += [f"{a.mean():.3f}", f"{b.mean():.3f}"]
                row.append(number(difference["mean"], difference["sd"]))
        rows.append(row)
    header = ["tasks so far"]
    for one, other in (("BD+PSP", "PSP"), ("BD+EWC", "EWC")):
        if one in by_label and other in by_label:
            header += [one, other, "margin"]
    return header, rows


def fig7(runner: runs.Runner) -> Report:
    """Averages by the number of tasks, and groups of tasks at the end.

    Args:
      runner: where runs go.

    Returns:
      `Report`.

    Source: Wen et al. 2020 (arXiv 2009.13954), Fig. 7. Variant: the paper does not say which t-test
    it uses; ours is Welch's on the tasks of a group, with Holm's correction.
    """
    lines = (*METHODS, *BEYOND)
    everything = [
        runs.complete(runner, line.label, "permuted_mnist.py", line.method, line.seeds)
        for line in lines
    ]
    done = everything[: len(METHODS)]
    path = drawing.figure_path(runner.folder, "fig7")
    last = {run.label: runs.matrix(run)[:, -1].mean(0) for run in done}  # [T]
    tasks = len(next(iter(last.values())))
    groups = [slice(start, min(start + GROUP, tasks)) for start in range(0, tasks, GROUP)]
    with drawing.panels(path, 2, 1, (9, 8), sharex=False) as (top, bottom):
        for run in everything:
            count, averages = so_far(run)
            drawing.band(top, count, averages, run.label)
        for line in METHODS:
            top.axhline(line.paper, color=drawing.color(line.label), ls=":", lw=0.9)
        top.set_xlabel("number of tasks (dotted: the paper's averages after 100)")
        top.set_ylabel("average accuracy of all tasks so far")
        drawing.legend(top)
        width = 0.8 / len(done)
        for k, run in enumerate(done):
            heights = [last[run.label][g].mean() for g in groups]
            errors = [last[run.label][g].std(ddof=1) for g in groups]
            x = np.arange(len(groups)) + (k - 1.5) * width
            bottom.bar(x, heights, width, yerr=errors, capsize=1.5, color=drawing.color(run.label))
        names = [f"{g.start + 1} - {g.stop}" for g in groups]
        bottom.set_xticks(range(len(groups)), names, fontsize=7)
        bottom.set_xlabel("tasks, after all were learned")
        bottom.set_ylabel("average accuracy of a group")
    cells, kept = [], []
    for run, line in zip(everything, lines, strict=True):
        found = mean_and_sd(runs.matrix(run)[:, -1].mean(1))
        cells.append(Cell(run.label, found["mean"], found["sd"], line.paper))
        kept.append(f"{run.result['memory']['bytes_per_task']:,}")
    averages_header, averages_rows = beside_paper(cells, "average over all tasks")
    averages_header.append("bytes per task")
    for row, count_of in zip(averages_rows, kept, strict=True):
        row.append(count_of)
    ledger = [
        [f"`{line.method}`", str(run.result["num_seeds"]), *runs.averages(run), count_of,
         "-" if line.paper is None else f"{line.paper:g}", row[-2]]
        for line, run, row, count_of in zip(
            lines, everything, averages_rows, kept, strict=True
        )
    ]  # fmt: skip
    pairs = list(itertools.combinations([run.label for run in done], 2))
    rows = []
    for name, group in zip(names, groups, strict=True):
        tests = [
            stats.ttest_ind(last[a][group], last[b][group], equal_var=False).pvalue
            for a, b in pairs
        ]
        means = [f"{last[run.label][group].mean():.3f}" for run in done]
        rows.append([name, *means, *(stars(p) for p in holm(tests))])
    header = ["tasks", *(run.label for run in done), *(f"{a} / {b}" for a, b in pairs)]
    return Report(
        "fig7", f"Fig. 7: {tasks} permuted MNIST tasks", _TEXT,
        [(averages_header, averages_rows), margins(done), (header, rows)],
        [path, _against_bytes(runner, everything)],
        "python -m bpnjax.paper --artefact=fig7", [run.command for run in everything],
        runs.seconds(everything),
        ledger={"averages": (
            ["method", "seeds", "task 1", "average", "masked average", "inferred average",
             "bytes per task", "paper, average", "state"], ledger,
        )},
    )  # fmt: skip


def _against_bytes(runner: runs.Runner, done: Sequence[runs.Run]) -> pathlib.Path:
    """Draws the average accuracy against all bytes that are stored to answer after all tasks."""
    path = drawing.figure_path(runner.folder, "fig7").with_name("fig7_bytes.png")
    with drawing.panels(path, 1, 1, (7, 4.5)) as (axis,):
        for run in done:
            found = mean_and_sd(runs.matrix(run)[:, -1].mean(1))
            axis.errorbar(
                run.result["memory"]["answering_bytes"] / 1e6, found["mean"], found["sd"] or 0,
                fmt="o", color=drawing.color(run.label), label=run.label,
            )  # fmt: skip
        axis.set_xscale("log")
        axis.set_xlabel("MB stored to answer all tasks: the network, and what is kept per task")
        axis.set_ylabel("average accuracy of all tasks")
        drawing.legend(axis)
    return path
