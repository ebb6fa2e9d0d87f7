"""Fig. 7: a hundred permuted MNIST tasks on a small network."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from bpnjax.evaluation.metrics import mean_and_sd
from bpnjax.paper import drawing, runs
from bpnjax.paper.report import Cell, Report, beside_paper
from bpnjax.run.writers import number

GROUP = 10  # number of tasks


class Line(NamedTuple):
    """A method of the figure: how to run it, and the paper's result."""

    label: str
    method: str
    fields: dict[str, Any]  # changes to configs/permuted_mnist.py
    paper: float | None  # average accuracy over all tasks
    seeds: int = 5


# docs/REPRODUCTION.md says how the values were found.
METHODS = (
    Line("BD+PSP", "bd_psp", {"train__learning_rate": 1e-4, "train__rate_decay": 0.1}, 0.626),
    Line(
        "PSP", "psp",
        {"train__learning_rate": 1e-3, "train__optimizer": "momentum", "train__rate_decay": 0.05},
        0.481,
    ),
    Line(
        "BD+EWC", "bd_ewc",
        {"train__learning_rate": 3e-4, "model__kernel_init": "he_normal", "ewc__strength": 30.0},
        0.466,
    ),
    Line(
        "EWC", "ewc",
        {"train__learning_rate": 3e-4, "train__optimizer": "momentum", "ewc__strength": 10.0},
        0.344,
    ),
)  # fmt: skip
# Not in the paper: the best composition that stores no more per task than BD+PSP.
BEST = Line(
    "BD+PSP+K-FAC EWC", "bd_psp_ewc_kfac",
    {
        "train__learning_rate": 3e-3, "train__optimizer": "momentum", "train__epochs": 4,
        "model__kernel_init": "he_normal", "bd__learning_rate": 3e-3, "bd__epsilon": 0.05,
        "ewc_kfac__strength": 20.0, "ewc_kfac__every": 8,
    },
    None,
    seeds=3,
)  # fmt: skip
_TEXT = """(a) Average accuracy over all tasks learned so far. (b) After all tasks, groups of ten;
stars: Welch's t-test between two methods on the tasks of a group (each task's accuracy is its mean
over seeds), two-sided, Holm's correction for the six comparisons of a group: *** p < 0.001,
** p < 0.01, * p < 0.05."""


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
    lines = (*METHODS, BEST)
    done = [
        runs.complete(
            runner, line.label, "permuted_mnist.py", line.method, line.seeds, **line.fields
        )
        for line in lines
    ]
    beyond = done.pop()
    path = drawing.figure_path(runner.folder, "fig7")
    last = {run.label: runs.matrix(run)[:, -1].mean(0) for run in done}  # [T]
    tasks = len(next(iter(last.values())))
    groups = [slice(start, min(start + GROUP, tasks)) for start in range(0, tasks, GROUP)]
    with drawing.panels(path, 2, 1, (9, 8), sharex=False) as (top, bottom):
        for run in done:
            count, averages = so_far(run)
            drawing.band(top, count, averages, run.label)
        count, averages = so_far(beyond)
        drawing.band(top, count, averages, beyond.label)
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
    for run, line in zip((*done, beyond), lines, strict=True):
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
            lines, (*done, beyond), averages_rows, kept, strict=True
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
        [(averages_header, averages_rows), margins(done), (header, rows)], [path],
        "python -m bpnjax.paper --artefact=fig7", [run.command for run in (*done, beyond)],
        runs.seconds((*done, beyond)),
        ledger={"averages": (
            ["method", "seeds", "task 1", "average", "masked average", "inferred average",
             "bytes per task", "paper, average", "state"], ledger,
        )},
    )  # fmt: skip
