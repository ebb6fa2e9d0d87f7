"""Fig. 7: a hundred permuted MNIST tasks on a small network."""

import itertools

import numpy as np
from scipy import stats

from bpnjax.metrics import mean_and_sd
from bpnjax.paper import drawing, runs
from bpnjax.paper.report import Cell, Report, beside_paper

GROUP = 10  # tasks
# Label, method, what differs from configs/permuted_mnist.py (first values, not searched yet), the
# paper's average over all tasks.
METHODS = (
    ("BD+PSP", "bd_psp", {"train__learning_rate": 3e-5}, 0.626),
    ("PSP", "psp", {"train__learning_rate": 3e-5}, 0.481),
    ("BD+EWC", "bd_ewc", {"train__learning_rate": 3e-4}, 0.466),
    ("EWC", "ewc", {"train__learning_rate": 3e-5}, 0.344),
)
_TEXT = """(a) Average accuracy over all tasks learned so far. (b) After all tasks, groups of ten;
stars: Welch's t-test between two methods on the tasks of a group (each task's accuracy is its mean
over seeds), two-sided, Holm's correction for the six comparisons of a group: *** p < 0.001,
** p < 0.01, * p < 0.05."""


def holm(p_values) -> np.ndarray:
    """Holm's correction: p-values that may be compared with the level of all tests together.

    Args:
      p_values: float ``[m]``.

    Returns:
      float ``[m]``, at most 1.

    Example:
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
    """The paper's marks."""
    return "***" if p < 0.001 else "**" if p < 0.01 else "*" if p < 0.05 else "n.s."


def so_far(run) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of tasks learned at which a run was tested, and the averages ``[n, seeds]``."""
    found = runs.matrix(run)
    rows = [i for i in range(found.shape[1]) if not np.isnan(found[:, i]).all()]
    averages = np.array([found[:, i, : i + 1].mean(1) for i in rows])
    return np.array(rows) + 1, averages


def fig7(runner) -> Report:
    """Averages by the number of tasks, and groups of tasks at the end."""
    done = [
        runs.complete(runner, label, "permuted_mnist.py", method, 5, **fields)
        for label, method, fields, _ in METHODS
    ]
    path = drawing.picture_path(runner.folder, "fig7")
    last = {run.label: runs.matrix(run)[:, -1].mean(0) for run in done}  # [T]
    tasks = len(next(iter(last.values())))
    groups = [slice(start, min(start + GROUP, tasks)) for start in range(0, tasks, GROUP)]
    with drawing.panels(path, 2, 1, (9, 8), sharex=False) as (top, bottom):
        for run in done:
            count, averages = so_far(run)
            drawing.band(top, count, averages, run.label)
        for label, *_, paper in METHODS:
            top.axhline(paper, color=drawing.color(label), ls=":", lw=0.9)
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
    cells = []
    for run, (*_, paper) in zip(done, METHODS, strict=True):
        found = mean_and_sd(runs.matrix(run)[:, -1].mean(1))
        cells.append(Cell(run.label, found["mean"], found["sd"], paper))
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
        [beside_paper(cells, "average over all tasks"), (header, rows)], [path],
        "python -m bpnjax.paper --artefact=fig7", [run.command for run in done],
        runs.seconds(done),
    )  # fmt: skip
