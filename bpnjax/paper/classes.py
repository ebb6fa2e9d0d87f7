"""Nobody tells the task: CIFAR-100 in ten steps on pretrained features, one table of all kinds.

Not of the paper. What the class-incremental literature calls B0 Inc10; see the configuration.
"""

from typing import Any, NamedTuple

import numpy as np

from bpnjax.paper import drawing, runs
from bpnjax.paper.report import Report
from bpnjax.run.writers import number

CONFIG = "cifar100_b0_inc10.py"
KIND = "task_inferred"
TRIAL_SEED = 100  # which is not reported
Settings = dict[str, Any]


class Line(NamedTuple):
    """A row of the table."""

    label: str
    method: str
    trials: tuple[Settings, ...] = ({},)  # one of them is chosen, unless there is only one
    seeds: int = 3  # 1 where nothing is drawn
    rule: str = ""  # of BD's modes


def _rates(*values: float) -> tuple[Settings, ...]:
    return tuple({"train__learning_rate": value} for value in values)


_ANALYTIC = {"train__epochs": 1}  # further ones add nothing
_BD = tuple(
    {"sequence__heads": "multi", "train__learning_rate": rate, "bd__epsilon": epsilon}
    for rate in (3e-4, 1e-3) for epsilon in (0.02, 0.2)
)  # fmt: skip
LINES: tuple[Line, ...] = (
    Line("NCM", "ncm", (_ANALYTIC,), seeds=1),
    Line("SLDA", "slda", tuple(
        _ANALYTIC | {"slda__shrinkage": value} for value in (1e-4, 1e-2, 0.1, 0.5)
    ), seeds=1),
    Line("FeCAM", "fecam", tuple(
        _ANALYTIC | {"fecam__shrinkage": shrinkage, "fecam__power": power}
        for shrinkage, power in ((1.0, 0.5), (0.1, 0.5), (10.0, 0.5), (1.0, 1.0))
    ), seeds=1),
    Line("RanPAC, 2,000 features", "ranpac", (_ANALYTIC | {"ranpac__features": 2000},)),
    Line("RanPAC, 5,000 features", "ranpac", (_ANALYTIC | {"ranpac__features": 5000},), seeds=1),
    Line("ER", "er", _rates(1e-4, 3e-4, 1e-3, 3e-3)),
    Line("DER++", "derpp", tuple(
        {"train__learning_rate": rate, "replay__alpha": alpha, "replay__beta": 0.5}
        for rate in (3e-4, 1e-3) for alpha in (0.1, 0.5)
    )),
    Line("BD, frozen: entropy", "bd_frozen", _BD, rule="entropy"),
    Line("BD, frozen: statistics", "bd_frozen", _BD, rule="statistics"),
    Line("BD, frozen: gmm", "bd_frozen", _BD, rule="gmm"),
    Line("BD, frozen: mahalanobis", "bd_frozen", _BD, rule="mahalanobis"),
    Line("joint ridge, 2,000 features", "joint_ridge", (_ANALYTIC | {"ranpac__features": 2000},)),
    Line("joint", "joint", _rates(1e-4, 3e-4, 1e-3, 3e-3)),
)  # fmt: skip
_TEXT = """CIFAR-100 in ten steps of ten classes, in one order for all. EfficientNet-Lite0 with its
ImageNet weights turns each image, at 96 x 96, into 1,280 features once and never learns; what is
compared learns on them. Nobody tells the task at test time, and the answer is one of all classes so
far. After the last step: share of right answers, on the test images of all 100 classes. Average
incremental: the mean of that share after each of the ten steps. Told: somebody says the task after
all, and the answer is one of its ten classes.

Bytes to answer and bytes while learning do not count the backbone, which is the same for all (13.5
MB). ER and DER++ store 2,000 examples of 1,280 float32. BD, frozen: the columns of the output layer
of a task's classes and a bias per task learn; the task is guessed by the rule that is named, and
the answer is one of its classes. The upper bounds, the last two rows, see all classes at once.

Settings: four trials of each method that has any, one seed that is not reported (100), on a tenth
of the training set that is held out; the highest accuracy after the last step is taken (*). BD was
chosen once, with the task guessed by `mahalanobis`. RanPAC finds its ridge by itself. Mean ± sd of
3 seeds; NCM, SLDA and FeCAM draw no random numbers, and one run says all. RanPAC with 5,000
features is one seed."""


def incremental_classes(runner: runs.Runner) -> Report:
    """The table, the trials behind it, and the accuracy after each step.

    Args:
      runner: where runs go.

    Returns:
      `Report`.

    Source: the protocol of class-incremental papers since Rebuffi et al. 2017 (iCaRL, arXiv
    1611.07725); on pretrained features McDonnell et al. 2023 (RanPAC, arXiv 2307.02251).
    """
    home = runner.folder
    runner = runner._replace(folder=home / "incremental_classes")
    chosen: dict[str, Settings] = {}  # by method: rules and sizes share what was found
    trials: list[list[str]] = []
    done, rows, curves = [], [], {}
    for line in LINES:
        settings = line.trials[0]
        if len(line.trials) > 1:
            if line.method not in chosen:
                chosen[line.method], more = _searched(runner, line)
                trials += more
            settings = chosen[line.method]
        run = _complete(runner, line, settings)
        done.append(run)
        summary, memory = run.result["summary"], run.result["memory"]
        cells = [
            number(found["mean"], found["sd"]) if found["mean"] is not None else "-"
            for found in (
                summary[KIND]["last_accuracy"], summary[KIND]["average_incremental_accuracy"],
                summary["task_masked"]["last_accuracy"],
            )
        ]  # fmt: skip
        kept = [f"{memory[name]:,}" for name in ("answering_bytes", "training_bytes")]
        rows.append([line.label, *cells, *kept])
        if summary[KIND]["average_incremental_accuracy"]["mean"] is not None:
            curves[line.label] = _so_far(run)
    path = drawing.figure_path(home, "incremental_classes")
    with drawing.panels(path, 1, 1, (7, 4.5)) as (axis,):
        for k, (label, means) in enumerate(curves.items()):
            classes = 10 * np.arange(1, len(means) + 1)
            axis.plot(classes, means, "-o", ms=3, color=f"C{k}", label=label)
        axis.set_xlabel("classes so far")
        axis.set_ylabel("accuracy on all of them, without the task")
        axis.legend(fontsize=7)
    tables = [
        (["method", "after the last step", "average incremental", "told, own classes",
          "bytes to answer", "bytes while learning"], rows),
        (["method", "trial", "held-out accuracy after the last step"], trials),
    ]  # fmt: skip
    return Report(
        "incremental_classes", "CIFAR-100 in ten steps, nobody tells the task", _TEXT, tables,
        [path], "python -m bpnjax.paper --artefact=incremental_classes",
        [run.command for run in done], runs.seconds(done),
    )  # fmt: skip


def _so_far(run: runs.Run) -> np.ndarray:
    """Accuracy on all classes so far after each step, mean over seeds; tasks are equally large."""
    return np.nanmean(runs.matrix(run, KIND), axis=-1).mean(0)


def _complete(runner: runs.Runner, line: Line, settings: Settings) -> runs.Run:
    # Folders of runs are named without what is only tested.
    own = runner._replace(folder=runner.folder / line.rule) if line.rule else runner
    more = {"evaluate__rule": line.rule} if line.rule else {}
    if line.seeds == 1:
        own = own._replace(num_seeds=1)
    return runs.complete(
        own, line.label, CONFIG, line.method, line.seeds, **settings, **more,
        checkpoint__every_tasks=10,
    )  # fmt: skip


def _searched(runner: runs.Runner, line: Line) -> tuple[Settings, list[list[str]]]:
    """The settings of the best trial, and a row for each."""
    found = []
    for settings in line.trials:
        run = runs.complete(
            runner._replace(folder=runner.folder / "trials", num_seeds=1), line.label, CONFIG,
            line.method, 1, **settings, seed=TRIAL_SEED, dataset__validation=0.1,
            evaluate__on="validation", evaluate__every_tasks=10, checkpoint__every_tasks=10,
        )  # fmt: skip
        found.append(run.result["summary"][KIND]["last_accuracy"]["mean"])
    best = int(np.argmax(found))
    rows = []
    for i, (settings, value) in enumerate(zip(line.trials, found, strict=True)):
        said = ", ".join(
            f"`{name.replace('__', '.')}={its}`" for name, its in settings.items()
            if name not in (*_ANALYTIC, "sequence__heads")
        )  # fmt: skip
        rows.append([f"`{line.method}`", said + (" *" if i == best else ""), f"{value:.3f}"])
    return line.trials[best], rows
