"""Ten sets in sequence on a frozen ImageNet network: told the task, and guessed by each mapper."""

import numpy as np

from bpnjax.evaluation.metrics import mean_and_sd
from bpnjax.paper import drawing, runs
from bpnjax.paper.report import Report
from bpnjax.run import style
from bpnjax.run.writers import number, plain_nan

CONFIG = "ten_domains.py"
METHODS = ("bias_frozen", "bd_frozen")
RULES = ("entropy", "statistics", "gmm", "nearest_mean", "mahalanobis")
# Sets with classes of ImageNet, on which the backbone was trained.
SEEN_BEFORE = ("caltech101_64", "tinyimagenet100")
_TEXT = """EfficientNet-Lite0 with its ImageNet weights turns each image, at 96 x 96, into 1,280
features once and never learns. Of the output layer each task has columns of its own, and a bias:
plain (`bias_frozen`, the rule of SKILL, arXiv 2305.15591) or learned by BD's steps. Told: the
answer is one of the classes of the task. Not told: the task is guessed by the rule that is named
(guess: how often rightly), and the answer is one of its classes.

Averages leave out Caltech-101 and Tiny ImageNet, which share classes with ImageNet. Settings are
those of the configuration, none was searched. Test sets, after the last task, mean ± sd over
seeds. Bytes per task: what one further task adds, of as many outputs as the largest task has, what
the rule keeps included."""


def ten_domains(runner: runs.Runner) -> Report:
    """Accuracy told and by each rule, and bytes per task.

    Args:
      runner: where runs go.

    Returns:
      `Report`.

    Source: the experiment of Ge et al. 2023 (SKILL, arXiv 2305.15591) on 102 tasks. Variant: ten
    small sets.
    """
    home = runner.folder
    done, rows = [], []
    answers: dict[str, np.ndarray] = {}  # of the last method, by rule: float [seeds, T]
    for method in METHODS:
        for rule in RULES:
            # Folders of runs are named without what is only tested.
            own = runner._replace(folder=home / "ten_domains" / rule)
            run = runs.complete(
                own, method, CONFIG, method, 3, evaluate__rule=rule, checkpoint__every_tasks=10
            )
            names = run.result["config"]["dataset"]["name"].split(",")
            kept = [i for i, name in enumerate(names) if name not in SEEN_BEFORE]
            told, answers[rule] = (
                runs.matrix(run, kind)[:, -1] for kind in ("task_masked", "task_inferred")
            )
            guessed = np.asarray(plain_nan(run.result["inference"]["task_accuracy"]), float)[:, -1]
            found = [_average(value[:, kept]) for value in (told, answers[rule], guessed)]
            bytes_per_task = f"{run.result['memory']['bytes_per_task']:,}"
            rows.append([f"`{method}`", rule, *found, bytes_per_task])
            done.append(run)
    by_set = [
        [name, *(_average(value[:, [i]]) for value in (told, *answers.values()))]
        for i, name in enumerate(names)
    ]
    path = drawing.figure_path(home, "ten_domains")
    with drawing.panels(path, 1, 1, (8, 4)) as (axis,):
        bars = {"told": told, **answers}
        for k, (label, value) in enumerate(bars.items()):
            place = np.arange(len(names)) + (k - (len(bars) - 1) / 2) * 0.13
            axis.bar(place, value.mean(0), 0.13, label=label)
        axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axis.set_ylabel(f"accuracy, {style.display(METHODS[-1])}")
        axis.set_ylim(0, 1)
        drawing.legend(axis)
    tables = [
        (["method", "rule", "told", "not told", "guess", "bytes per task"], rows),
        ([f"`{METHODS[-1]}`, set", "told", *RULES], by_set),
    ]
    return Report(
        "ten_domains", "Ten sets on a frozen ImageNet network", _TEXT, tables, [path],
        "python -m bpnjax.paper --artefact=ten_domains", [run.command for run in done],
        runs.seconds(done),
    )  # fmt: skip


def _average(values: np.ndarray) -> str:
    """Mean over tasks, and mean ± sd over seeds, of float ``[seeds, tasks]``."""
    found = mean_and_sd(values.mean(1))
    return number(found["mean"], found["sd"])
