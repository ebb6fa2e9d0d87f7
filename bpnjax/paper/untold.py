"""Not told the task: how often each rule infers it, and the accuracy of the resulting answers.

This is not in the paper, which always tells the task. All rules use the same trained models.
"""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

import bpnjax
from bpnjax.data import TaskSequence, load_sequence
from bpnjax.evaluation import task_inference
from bpnjax.evaluation.metrics import mean_and_sd
from bpnjax.paper import drawing, runs
from bpnjax.paper.report import Report
from bpnjax.run import style
from bpnjax.run.checkpoint import write_atomically
from bpnjax.run.writers import number

SEQUENCES: tuple[tuple[str, str, dict[str, Any], int], ...] = (
    ("10 permuted MNIST", "permuted_mnist.py", {"sequence__num_tasks": 10}, 500),
    ("MNIST", "mnist.py", {}, 500),
    ("CIFAR-100", "cifar100.py", {}, 200),
    ("100 permuted MNIST", "permuted_mnist.py", {}, 200),
)
METHODS = ("bd_psp", "bd_ewc", "psp")
RULES = (*task_inference.ANSWERS, "statistics")  # rules that one trained model can use
BATCH = 10  # number of examples of one task when it is inferred for all of them together
_TEXT = f"""Which task is it, and what is the answer, if nobody says? Accuracy after all tasks, on
500 test images of each task (200 of CIFAR-100 and where there are 100 tasks). Told: the mode is
that of the task. The rules choose a mode by lowest entropy, by largest logit, or by the Gaussian of
each task's projected inputs, for each image, or for {BATCH} images of one task together. In the
figure: the answers, for each image."""


def shares(predictor: bpnjax.Predictor, sequence: TaskSequence, examples: int) -> dict[str, Any]:
    """What share of the test images of all tasks a model gets right.

    Args:
      predictor: a loaded model that stored statistics.
      sequence: the tasks that it learned.
      examples: largest number of examples per task.

    Returns:
      ``{"told": share, rule: {"example": (guess, answer), "batch": (guess, answer)}}``, each a mean
      over tasks.
    """
    found: dict[str, dict[str, list[Any]]] = {rule: {"example": [], "batch": []} for rule in RULES}
    told = []
    for task in range(predictor.num_tasks):
        rows = sequence.test.index[task, : sequence.test.count[task]][:examples]
        rows = rows[: len(rows) // BATCH * BATCH]
        labels = sequence.columns[task, sequence.test.labels[rows]]
        images = predictor.permuted(sequence.test.images[rows], task)
        told.append(np.mean(predictor(images, task=task) == labels))
        for rule, by in found.items():
            guess = predictor.infer(images, rule)
            by["example"].append(_right(guess.task, task, guess.outputs, labels))
            batches = np.split(guess.scores, len(rows) // BATCH)
            tasks = np.concatenate([task_inference.choose(scores, "batch") for scores in batches])
            by["batch"].append(_right(tasks, task, predictor(images, task=tasks), labels))
    means = {
        rule: {per: np.mean(pairs, 0).tolist() for per, pairs in by.items()}
        for rule, by in found.items()
    }
    return {"told": float(np.mean(told)), **means}


def _right(
    guesses: np.ndarray, task: int, answers: np.ndarray, labels: np.ndarray
) -> tuple[Any, Any]:
    return np.mean(guesses == task), np.mean(answers == labels)


def _measured(run: runs.Run, examples: int) -> tuple[list[dict[str, Any]], float]:
    """`shares` of each seed of a run, computed or read, and the seconds that they took."""
    path = run.folder / "inference.json"
    if path.is_file():
        found = json.loads(path.read_text())
        return found["shares"], found["seconds"]
    started, first = time.perf_counter(), run.result["seed"]
    models = [bpnjax.load(run.folder, first + i) for i in range(run.result["num_seeds"])]
    sequence = load_sequence(ConfigDict(run.result["config"]))
    found = [shares(model, sequence, examples) for model in models]
    seconds = time.perf_counter() - started
    write_atomically(path, json.dumps({"shares": found, "seconds": seconds}) + "\n")
    return found, seconds


def _row(run: runs.Run, found: list[dict[str, Any]], rule: str) -> list[str]:
    cells = [[f["told"] for f in found]]
    cells += [[f[rule][per][i] for f in found] for per in ("example", "batch") for i in (0, 1)]
    both = [mean_and_sd(values) for values in cells]
    told, *rest = (number(of_seeds["mean"], of_seeds["sd"]) for of_seeds in both)
    return [f"`{run.label}`", told, rule, *rest]


def _bars(axis: Any, title: str, measured: dict[str, Any]) -> None:
    """Draws the accuracy told and by each rule, per image, as one group of bars per method."""
    bars: dict[str, Callable[[Any], float]] = {"told": lambda f: f["told"]}
    for rule in RULES:
        bars[rule] = lambda f, rule=rule: f[rule]["example"][1]  # type: ignore[misc]
    for k, (label, value) in enumerate(bars.items()):
        found = [mean_and_sd([value(f) for f in shares]) for shares in measured.values()]
        place = np.arange(len(found)) + (k - 1.5) * 0.2
        errors = [f["sd"] or 0.0 for f in found]
        axis.bar(place, [f["mean"] for f in found], 0.2, yerr=errors, label=label)
    axis.set_xticks(range(len(measured)), list(map(style.display, measured)))
    axis.set_title(title)
    axis.set_ylim(0, 1)


def untold(runner: runs.Runner) -> Report:
    """Rules, methods and sequences: the inferred task and the answer."""
    home = runner.folder
    runner = runner._replace(folder=home / "untold")  # runs of other artefacts lack statistics
    done, tables, seconds = [], [], 0.0
    measured: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for title, file, changes, examples in SEQUENCES:
        header = [
            title,
            "told",
            "rule",
            "guess",
            "answer",
            f"guess of {BATCH}",
            f"answer of {BATCH}",
        ]
        rows, measured[title] = [], {}
        for method in METHODS:
            run = runs.complete(
                runner, method, file, method, 3, **changes, evaluate__rule="statistics",
                evaluate__inferred_rows="last", evaluate__inferred_examples=examples,
            )  # fmt: skip
            found, took = _measured(run, examples)
            rows += [_row(run, found, rule) for rule in RULES]
            measured[title][method] = found
            done.append(run)
            seconds += took
        tables.append((header, rows))
    path = drawing.figure_path(home, "untold")
    columns = -(-len(SEQUENCES) // 2)
    with drawing.panels(path, 2, columns, (9, 6), sharex=False) as axes:
        for axis, (title, by_method) in zip(axes, measured.items(), strict=False):
            _bars(axis, title, by_method)
        axes[0].set_ylabel("accuracy of the answers")
        drawing.legend(axes[0])
    return Report(
        "untold", "Not told the task", _TEXT, tables, [path],
        "python -m bpnjax.paper --artefact=untold", [run.command for run in done],
        seconds + runs.seconds(done), {"bd_psp": _ledger(tables)},
    )  # fmt: skip


def _ledger(
    tables: Sequence[tuple[list[str], list[list[str]]]],
) -> tuple[list[str], list[list[str]]]:
    """The table for README: BD+PSP by rules that store nothing, and by statistics."""
    rows = [
        [header[0], row[1], row[2], *row[3:]]
        for header, its in tables for row in its
        if row[0] == "`bd_psp`" and row[2] in ("entropy", "statistics")
    ]  # fmt: skip
    return ["sequence", *tables[0][0][1:]], rows
