"""One pass over the stream with ResNet-18, beside published results of the same protocol."""

import itertools
from typing import Any

import numpy as np

from bpnjax.evaluation.metrics import mean_and_sd
from bpnjax.paper import drawing, runs
from bpnjax.paper.report import Report
from bpnjax.run import style
from bpnjax.run.writers import number

SETS = (
    ("CIFAR-10, 5 x 2", "online_cifar10.py"),
    ("CIFAR-100, 10 x 10", "online_cifar100.py"),
)
KINDS = (
    ("task_inferred", "nobody tells the task"),
    ("task_told", "told, all classes"),
    ("task_masked", "told, own classes"),
)
# Label, method and the settings found for batches of 10 and of 64; see `_TEXT`.
Settings = dict[str, Any]
METHODS: tuple[tuple[str, str, dict[int, Settings]], ...] = (
    ("SGD", "sgd", {10: {"train__learning_rate": 0.03}, 64: {"train__learning_rate": 0.03}}),
    ("EWC", "ewc",
     {10: {"train__learning_rate": 0.03, "ewc__strength": 100.0},
      64: {"train__learning_rate": 0.1, "ewc__strength": 100.0}}),
    ("LwF", "lwf",
     {10: {"train__learning_rate": 0.03, "lwf__strength": 1.0},
      64: {"train__learning_rate": 0.03, "lwf__strength": 1.0}}),
    ("ER", "er", {10: {"train__learning_rate": 0.2}, 64: {"train__learning_rate": 0.2}}),
    ("DER++", "derpp",
     {10: {"train__learning_rate": 0.03, "replay__alpha": 0.3, "replay__beta": 0.5},
      64: {"train__learning_rate": 0.1, "replay__alpha": 0.1, "replay__beta": 0.5}}),
    ("BD+EWC", "bd_ewc",
     {10: {"train__learning_rate": 0.03, "bd__epsilon": 0.02, "ewc__strength": 100.0,
           "model__batch_statistics": "task"},
      64: {"train__learning_rate": 0.1, "bd__epsilon": 0.06, "ewc__strength": 100.0,
           "model__batch_statistics": "task"}}),
    ("BD+PSP", "bd_psp",
     {10: {"train__learning_rate": 0.03, "bd__epsilon": 0.003, "model__batch_statistics": "task"},
      64: {"train__learning_rate": 0.1, "bd__epsilon": 0.02, "model__batch_statistics": "task"}}),
)  # fmt: skip
BATCHES = (10, 64)
PUBLISHED = (
    ("CIFAR-10", "ER", "0.387 ± 0.008", "ER-ACE, arXiv 2104.05025v3, Table 1, 100 per class"),
    ("CIFAR-100", "ER", "0.112 ± 0.006", "SCR, arXiv 2103.13885v3, Table 1, 1,000 examples"),
)
_TEXT = """Each example is seen once, in batches of 10 or 64, by a ResNet-18 of width 8 (176,402
parameters for 10 classes) with plain SGD and no augmentation; the replay methods keep 1,000
examples and draw as many for each batch as it has. BatchNorm's running statistics are shared by
all tasks, but for BD, where they were chosen to belong to the modes.

Settings: four trials of each method on CIFAR-10 ([trials](trials.md)), 3,000 training examples of
each task, one seed that is not reported, chosen by the mean of the three accuracies on a tenth of
the training set held out. CIFAR-100 takes the same settings. Average accuracy after
the last task on the test sets, mean ± sd of 3 seeds.

What holds: without the task replay is far ahead, as published, and which task an image is of can
hardly be read off BD's modes here (by entropy). Told the task, BD's modes choose among all classes,
which no method without modes can; restricted to the task's own classes replay is ahead, at the
price of 1,000 images. With batches of 64 there are a sixth of the steps, and every network learns
less: without the task ER is still ahead on both sets and DER++ no longer is; on CIFAR-100 BD's
modes reach little more than a tenth, whether or not they are restricted to the task's classes.
Running statistics of each task do not help by themselves (trials: SGD with them is below SGD).

The published figures are of the same protocol with width 20. None were found in papers for
fine-tuning, EWC and LwF without the task."""


def online(runner: runs.Runner) -> Report:
    """The online setting on Split CIFAR-10 and CIFAR-100.

    Args:
      runner: where runs go.

    Returns:
      `Report`.

    Source: the protocol of Chaudhry et al. 2019 (arXiv 1902.10486) and Caccia et al. 2022 (arXiv
    2104.05025), without augmentation. Variant: width 8.
    """
    done: list[runs.Run] = []
    tables, drawn = [], []
    for batch, (set_name, config_file) in itertools.product(BATCHES, SETS):
        rows, name = [], f"{set_name}, batches of {batch}"
        for label, method, settings in METHODS:
            run = complete(runner, config_file, label, method, settings[batch], batch)
            row = [label]
            for kind, _ in KINDS:
                found = mean_and_sd(runs.matrix(run, kind)[:, -1].mean(1))
                row.append(number(found["mean"], found["sd"]))
            rows.append(row)
            drawn.append((name, run))
            done.append(run)
        tables.append(([name, *(head for _, head in KINDS)], rows))
    header = ["published, width 20", "method", "nobody tells the task", "source"]
    tables.append((header, [list(row) for row in PUBLISHED]))
    path = drawing.figure_path(runner.folder, "online")
    cells = list(dict.fromkeys(cell for cell, _ in drawn))
    with drawing.panels(path, 2, len(cells) // 2, (8, 7.5), sharex=False) as axes:
        for axis, cell in zip(axes, cells, strict=True):
            of_cell = [run for where, run in drawn if where == cell]
            y = np.arange(len(of_cell))[::-1]
            for shift, (kind, head) in zip((0.25, 0.0, -0.25), KINDS, strict=True):
                values = [runs.matrix(run, kind)[:, -1].mean(1) for run in of_cell]
                spread = [v.std(ddof=1) if len(v) > 1 else 0.0 for v in values]
                means = [v.mean() for v in values]
                color = style.KINDS[kind][1]
                axis.barh(y + shift, means, 0.25, xerr=spread, label=head, color=color)
            axis.set_yticks(y, [run.label for run in of_cell])
            axis.set_xlim(0, 1)
            axis.set_title(cell)
            axis.set_xlabel("average accuracy after all tasks")
        drawing.legend(axes[0])
    return Report(
        "online", "Online: one pass over the stream with ResNet-18", _TEXT, tables, [path],
        "python -m bpnjax.paper --artefact=online", [run.command for run in done],
        runs.seconds(done),
    )  # fmt: skip


def complete(
    runner: runs.Runner, config_file: str, label: str, method: str, settings: Settings, batch: int
) -> runs.Run:
    """One row of a table. It is run unless it is complete.

    Args:
      runner: where runs go.
      config_file: from `SETS`.
      label: from `METHODS`.
      method: from `METHODS`.
      settings: from `METHODS`.
      batch: number of examples in a step, and of replayed examples beside them.

    Returns:
      `Run`.
    """
    if batch != 10:  # the configurations have 10
        settings = settings | {"train__batch_size": batch, "replay__batch_size": batch}
    return runs.complete(
        runner, label, config_file, method, 3, **settings,
        evaluate__inferred_rows="last", evaluate__every_tasks=10,
    )  # fmt: skip
