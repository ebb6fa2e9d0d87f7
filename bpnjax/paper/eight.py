"""Table II: eight unrelated recognition sets in sequence, with one head each."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from bpnjax.evaluation.metrics import mean_and_sd
from bpnjax.paper import drawing, runs
from bpnjax.paper.report import Report
from bpnjax.run.writers import number

SEEDS = 3
# The settings of the eight small domains are under ``tuned`` in configs/eight_domains.py.
METHODS = {
    "STL": "stl",
    "joint": "joint",
    "fine-tuning": "sgd",
    "IMM (mean)": "imm_mean",
    "IMM (mode)": "imm_mode",
    "LwF": "lwf",
    "EWC": "ewc",
    "EBLL": "ebll",
    "SI": "si",
    "MAS": "mas",
    "SLNID": "slnid",
    "PSP": "psp",
    "BD+EWC": "bd_ewc",
    "BD+PSP": "bd_psp",
    "GD+EWC": "gd_ewc",
    "plain bias+EWC": "bias_ewc",
}
# The paper's averages on its own eight sets. Its table is an image, so they are reconstructed
# from the relative gains in its text and the averages of the paper on MAS.
PAPER = {
    "BD+PSP": 0.5887, "PSP": 0.5475, "SLNID": 0.5450, "BD+EWC": 0.5287, "MAS": 0.5269,
    "SI": 0.5049, "EBLL": 0.5029, "EWC": 0.5000, "LwF": 0.4949, "IMM (mean)": 0.434,
}  # fmt: skip
_TEXT = """Accuracy on each set after all eight were learned, within its own head (task_masked, the
paper's "multi-head"), mean of the seeds; the average with its sd over seeds. The paper's averages
are of its own eight sets, on AlexNet, and reconstructed: its table is an image, they follow from
the relative gains in its text and from the averages of the paper on MAS.

The last two rows are controls with BD+EWC's values: M by its gradient (GD+EWC), and a plain bias
for each set, at the rate of W, instead of the product M W. Fine-tuning has no protection; STL is a
network of its own for each set, which starts like the others from the pretrained one; joint sees
all sets at once."""
_DOMAINS = """Here the sets are eight small domains of 32 x 32 images, at most some 4,000 to train
on, and the network a small AlexNet pretrained on Tiny ImageNet; its convolutions are frozen for
all methods alike, fc6, fc7 and the heads learn."""


def table2(runner: runs.Runner) -> Report:
    """Accuracy of each of the eight sets after all were learned, and the average.

    Args:
      runner: where runs go; its ``sequence`` chooses the sets.

    Returns:
      `Report`.

    Raises:
      UserError: a set cannot be loaded.

    Source: Wen et al. 2020 (arXiv 2009.13954), Table II.
    """
    name = runner.sequence or "eight_tasks"
    small = name == "eight_domains"
    done = [
        runs.complete(runner, label, f"{name}.py", method, SEEDS)
        for label, method in METHODS.items()
    ]
    path = drawing.figure_path(runner.folder, "table2")
    found = [runs.matrix(run, "task_masked")[:, -1] for run in done]  # [seeds, T]
    averages = [mean_and_sd(accuracy.mean(1)) for accuracy in found]
    sets = [names[0].rsplit("/", 1)[0] for names in done[0].result["class_names"]]
    rows = [
        [
            run.label, *(f"{value:.3f}" for value in accuracy.mean(0)),
            number(average["mean"], average["sd"]),
            f"{PAPER[run.label]:.3f}" if run.label in PAPER else "-",
        ]
        for run, accuracy, average in zip(done, found, averages, strict=True)
    ]  # fmt: skip
    kinds = ("task_masked", "task_told", "task_inferred")
    other = []
    for run in done:
        summary = [run.result["summary"][kind] for kind in kinds]
        cells = [s["average_accuracy"] for s in summary]
        forgotten = summary[0]["forgetting"]
        lost = "-"  # joint learns all tasks at once
        if forgotten["mean"] is not None:
            lost = number(forgotten["mean"], forgotten["sd"])
        other.append(
            [run.label, *(number(c["mean"], c["sd"]) for c in cells),
             lost, f"{run.result['memory']['bytes_per_task']:,}"]
        )  # fmt: skip
    _draw(path, sets, done, found, averages)
    command = f"python -m bpnjax.paper --artefact=table2 --sequence={name}"
    return Report(
        "table2", "Table II: eight sets in sequence", f"{_TEXT}\n\n{_DOMAINS}" if small else _TEXT,
        [
            (["method", *sets, "average", "paper's average"], rows),
            (["average", "masked", "told", "inferred", "forgetting (masked)", "bytes per task"],
             other),
        ],
        [path], command, [run.command for run in done], runs.seconds(done),
        ledger={"averages": _ledger(done, other)},
    )  # fmt: skip


def _ledger(
    done: Sequence[runs.Run], other: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """The table for README, best methods first."""
    header = [
        "method", "masked average", "told average", "inferred average", "forgetting (masked)",
        "paper, average",
    ]  # fmt: skip
    rows = [
        [f"`{run.result['method']}`", *row[1:5],
         f"{PAPER[run.label]:.3f}" if run.label in PAPER else "-"]
        for run, row in zip(done, other, strict=True)
    ]  # fmt: skip
    return header, sorted(rows, key=lambda row: row[1], reverse=True)


def _draw(
    path: pathlib.Path,
    sets: Sequence[str],
    done: Sequence[runs.Run],
    found: Sequence[np.ndarray],
    averages: Sequence[dict[str, Any]],
) -> None:
    order = np.argsort([average["mean"] for average in averages])
    with drawing.panels(path, 1, 2, (12, 5), width_ratios=(1, 2)) as (left, right):
        for place, i in enumerate(order):
            color = drawing.color(done[i].label) or "#999999"
            left.barh(place, averages[i]["mean"], xerr=averages[i]["sd"], color=color, capsize=2)
        left.set_yticks(range(len(order)), [done[i].label for i in order])
        left.set_xlabel("average accuracy within the head")
        shown = right.imshow([found[i].mean(0) for i in order[::-1]], aspect="auto", vmin=0)
        right.set_xticks(range(len(sets)), sets, rotation=30, ha="right")
        right.set_yticks(range(len(order)), [done[i].label for i in order[::-1]])
        right.figure.colorbar(shown, ax=right, label="accuracy after all eight")
