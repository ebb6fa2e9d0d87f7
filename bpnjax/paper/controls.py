"""Is it the direction, the step, the extra dimensions or being told the task?"""

from typing import Any

import numpy as np
from safetensors.numpy import load_file

from bpnjax.evaluation.metrics import mean_and_sd
from bpnjax.paper import drawing, runs
from bpnjax.paper.report import Report
from bpnjax.run import style
from bpnjax.run.writers import number

SEQUENCES: tuple[tuple[str, str, int, dict[str, Any]], ...] = (
    ("MNIST", "mnist.py", 5, {}),
    ("CIFAR-10", "cifar10.py", 3, {}),
    ("CIFAR-100", "cifar100.py", 3, {}),
    ("20 permuted MNIST", "permuted_mnist.py", 3,
     {"sequence__num_tasks": 20, "train__learning_rate": 3e-4, "train__optimizer": "adam",
      "ewc__examples": 0, "ewc__strength": 100.0, "model__kernel_init": "lecun_normal"}),
)  # fmt: skip
METHODS = (
    ("bd_ewc", "the paper's: sign of M's gradient"),
    ("gd_ewc", "M follows its gradient"),
    ("gd_matched_ewc", "M's gradient, steps as long as BD's"),
    ("bias_ewc", "a plain bias, trained by its gradient"),
    ("random_bias_ewc", "a random bias, never trained"),
    ("ewc_masked", "no bias; the task is told by a mask on the outputs"),
    ("ewc", "no bias, not told the task"),
)
# Learning rates of GD+EWC's factors: does their size explain the paper's 0 on task 1?
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
_TEXT = """EWC with every kind of task bias, on the same networks with the same learning rates.
Average over tasks after the last one, all classes competing (task_told), and the length of the
stored bias vectors, averaged over layers, tasks and seeds. The second table is GD+EWC at several
learning rates of its factors: task 1 after all tasks, beside the length of its biases."""


def bias_length(run: runs.Run) -> float:
    r"""Mean length of a run's stored task biases.

    .. math:: \frac{1}{S L T} \sum_{s, l, t} |bias_{s,l,t}|_2

    over seeds, layers and tasks. It makes controls with other steps comparable to BD.

    Args:
      run: a complete run.

    Returns:
      A float; NaN if the run stores no biases.

    Source: ours.
    """
    lengths = [
        np.linalg.norm(array, axis=-1).mean()
        for path in sorted(run.folder.glob("model*.safetensors"))
        for name, array in load_file(path).items()
        if name.startswith("method/") and name.endswith("/bias")
    ]
    return float(np.mean(lengths)) if lengths else float("nan")


def by_rate(runner: runs.Runner) -> tuple[tuple[list[str], list[list[str]]], list[runs.Run]]:
    """GD+EWC at several learning rates of its factors: does their size explain the paper's 0?

    Args:
      runner: where runs go.

    Returns:
      A table (header and rows of text), and its runs.
    """
    sets = [s for s in SEQUENCES if s[0] in ("MNIST", "CIFAR-10")]
    rows, done = [], []
    for rate in RATES:
        row = [f"{rate:g}"]
        for _, config_file, *_ in sets:
            run = runs.complete(
                runner, "GD+EWC", config_file, "gd_ewc", 3,
                bd__learning_rate=rate, evaluate__inferred_rows="last",
            )  # fmt: skip
            found = mean_and_sd(runs.matrix(run)[:, -1, 0])
            row += [number(found["mean"], found["sd"]), f"{bias_length(run):.1f}"]
            done.append(run)
        rows.append(row)
    header = ["rate of GD's factors"]
    for name, *_ in sets:
        header += [f"{name}, task 1", "length"]
    return (header, rows), done


def controls(runner: runs.Runner) -> Report:
    """The control methods beside BD+EWC.

    Args:
      runner: where runs go.

    Returns:
      `Report`.

    Source: ours; the paper compares BD with GD+EWC only (Wen et al. 2020, Sec. VI-D 13).
    """
    done: list[runs.Run] = []
    averages: dict[tuple[str, str], runs.Run] = {}
    for sequence, config_file, seeds, fields in SEQUENCES:
        more: dict[str, Any] = {"evaluate__inferred_rows": "last"}
        if config_file in ("mnist.py", "cifar10.py"):
            more["evaluate__every_epochs"] = 1  # the runs of fig. 6 are the same
        for method, _ in METHODS:
            run = runs.complete(runner, method, config_file, method, seeds, **fields, **more)
            averages[sequence, method] = run
            done.append(run)
    rows = []
    for method, what in METHODS:
        row = [f"`{method}`", what]
        for sequence, *_ in SEQUENCES:
            run = averages[sequence, method]
            found = mean_and_sd(runs.matrix(run)[:, -1].mean(1))
            length = bias_length(run)
            row.append(number(found["mean"], found["sd"]))
            row.append("-" if np.isnan(length) else f"{length:.1f}")
        rows.append(row)
    header = ["method", "its bias"]
    for sequence, *_ in SEQUENCES:
        header += [sequence, "length"]
    rates, more_runs = by_rate(runner)
    done += more_runs
    path = drawing.figure_path(runner.folder, "controls")
    with drawing.panels(path, 1, 1, (9, 4.5)) as (axis,):
        width = 0.8 / len(METHODS)
        for k, (method, _) in enumerate(METHODS):
            of_seeds = [runs.matrix(averages[s, method])[:, -1].mean(1) for s, *_ in SEQUENCES]
            means = [f.mean() for f in of_seeds]
            sds = [f.std(ddof=1) if len(f) > 1 else 0.0 for f in of_seeds]
            x = np.arange(len(SEQUENCES)) + (k - (len(METHODS) - 1) / 2) * width
            color = drawing.color(method)
            axis.bar(x, means, width, yerr=sds, label=style.display(method), color=color)
        axis.set_xticks(range(len(SEQUENCES)), [s for s, *_ in SEQUENCES])
        axis.set_ylabel("average accuracy, told the task")
        drawing.legend(axis)
    return Report(
        "controls", "Controls: what is it that helps?", _TEXT, [(header, rows), rates], [path],
        "python -m bpnjax.paper --artefact=controls", [run.command for run in done],
        runs.seconds(done),
    )  # fmt: skip
