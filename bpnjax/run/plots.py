"""Figures of a run, drawn from its result files only.

bpnjax plots WORKDIR ...
"""

import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bpnjax.run import style
from bpnjax.run.style import new_figure
from bpnjax.run.writers import plain_nan
from bpnjax.utils.errors import UserError

USAGE = """usage: bpnjax plots DIR ...

Draws accuracy_matrix.png and learning_curves.png of complete runs again, from
the result.json and metrics.jsonl of each folder."""


MOST_NUMBERS = 12  # largest number of tasks for which the cells of a matrix are labelled


def _ticks(count: int, most: int = 20) -> list[int]:
    """At most ``most`` of the places 0, ..., count - 1, evenly spaced and including 0."""
    steps = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
    step = next((s for s in steps if count <= s * most), -(-count // most))
    return list(range(0, count, step))


@style.applied()
def accuracy_matrix(workdir: pathlib.Path, result: dict[str, Any]) -> pathlib.Path:
    """Draws the accuracy matrices of a run, mean over seeds, one panel per kind of accuracy.

    Rows that were never tested are left out. For up to twelve tasks the cells are labelled.

    Args:
      workdir: the folder of ``accuracy_matrix.png``, which is replaced.
      result: the content of ``result.json``, null where not tested.

    Returns:
      The path of the figure.
    """
    kinds = {k: np.asarray(plain_nan(m), float).mean(0) for k, m in result["accuracy"].items()}
    tasks = len(next(iter(kinds.values())))
    side = 3.0 if tasks <= MOST_NUMBERS else 3.6
    figure, axes = new_figure(1, len(kinds), (side * 3 + 1, side + 0.6))
    for axis, (name, matrix) in zip(axes, kinds.items(), strict=True):
        # Rows that were not tested are left out, so that long sequences fit. Panels differ in these
        # rows (evaluate.inferred_rows), so each has its own vertical axis.
        rows = [i for i in range(tasks) if not np.isnan(matrix[i]).all()]
        image = axis.imshow(matrix[rows], vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_title(style.KINDS[name][0])
        axis.set_xlabel("tested on task")
        shown = _ticks(len(rows))
        axis.set_yticks(shown, [str(rows[y] + 1) for y in shown])
        axis.set_xticks(_ticks(tasks), [str(t + 1) for t in _ticks(tasks)])
        if tasks <= MOST_NUMBERS:
            for y, i in enumerate(rows):
                for j in range(i + 1):
                    if not np.isnan(matrix[i, j]):
                        color = "black" if matrix[i, j] > 0.6 else "white"
                        text = f"{matrix[i, j]:.2f}" if tasks <= 8 else f"{matrix[i, j]:.1f}"
                        axis.text(j, y, text, ha="center", va="center", color=color, fontsize=7)
    axes[0].set_ylabel("after training task")
    figure.colorbar(image, ax=axes, label="accuracy", shrink=0.9)
    figure.suptitle(_title(result))
    return style.save(figure, workdir / "accuracy_matrix.png", (".png",))


def _title(result: dict[str, Any]) -> str:
    """The name of a run above its figures."""
    seeds = f", mean of {result['num_seeds']} seeds" if result["num_seeds"] > 1 else ""
    return f"{result['name']}, {style.display(result['method'])}{seeds}"


def _over_seeds(values: Any) -> tuple[float, float]:
    """Mean and standard deviation (n - 1; 0 for one seed), ignoring NaN."""
    found = np.asarray(plain_nan(values), float)
    found = found[~np.isnan(found)]
    if not len(found):
        return np.nan, 0.0
    return found.mean(), found.std(ddof=1) if len(found) > 1 else 0.0


def _band(axis: Any, x: Any, values: Any, color: Any, **options: Any) -> None:
    """Draws the mean over seeds as a line, with a band of one standard deviation on each side."""
    mean, sd = np.array([_over_seeds(each) for each in values]).T
    axis.plot(x, mean, color=color, **options)
    axis.fill_between(x, mean - sd, mean + sd, color=color, alpha=0.18, lw=0)


@style.applied()
def learning_curves(workdir: pathlib.Path, result: dict[str, Any]) -> pathlib.Path:
    """Draws the training loss, and the told accuracy of each task, against training steps.

    Lines are means over seeds with a band of one standard deviation. Thin lines mark ends of tasks.

    Args:
      workdir: the folder of ``metrics.jsonl`` and of ``learning_curves.png``, which is replaced.
      result: the content of ``result.json``.

    Returns:
      The path of the figure.
    """
    from matplotlib import colormaps

    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    tests = [line for line in lines if line["kind"] == "evaluate"]
    figure, (top, bottom) = new_figure(2, 1, (7, 5), sharex=True)
    _band(top, [l["total_steps"] for l in train], [l["loss"] for l in train], "0.35", lw=1)
    top.set_yscale("log")
    top.set_ylabel("training loss")
    tasks = len(result["accuracy"]["task_told"][0])
    colors = colormaps["viridis"](np.linspace(0, 0.95, tasks))
    for task in range(tasks):
        points = [
            (l["total_steps"], tested)
            for l in tests
            if not np.isnan(tested := plain_nan([row[task] for row in l["task_told"]])).all()
        ]
        if points:
            label = f"task {task + 1}" if task in _ticks(tasks, 12) else None
            x, values = zip(*points, strict=True)
            _band(bottom, x, values, colors[task], label=label, marker="o", ms=3, lw=1)
    bottom.set_ylim(-0.02, 1.02)
    bottom.set_xlabel("training steps")
    bottom.set_ylabel("accuracy, told the task")
    ends = [l["total_steps"] for l in tests if l["task_finished"]]
    for end in ends if len(ends) <= 50 else ():
        for axis in (top, bottom):
            axis.axvline(end, color="0.85", lw=0.6, zorder=0)
    style.legend(figure, 6, "outside lower center")
    figure.suptitle(_title(result))
    return style.save(figure, workdir / "learning_curves.png", (".png",))


def comparison(folder: pathlib.Path, results: Sequence[dict[str, Any]]) -> list[pathlib.Path]:
    """Draws a comparison of methods: four figures, each as PNG, SVG and PDF.

    `compare.png` has accuracies and forgetting with their standard deviation over seeds, bytes per
    task, and seconds. `forgetting.png` has the accuracy of task 1, and of all tasks so far, after
    each task. `bytes.png` and `time.png` have the average accuracy against the stored bytes and
    against the training time.

    Args:
      folder: the folder of the figures, which are replaced.
      results: the contents of their ``result.json``, at least one. The first gives title and seeds.

    Returns:
      The paths of the four PNG files.
    """
    return [
        bars(folder / "compare.png", results),
        forgetting(folder / "forgetting.png", results),
        trade_off(folder / "bytes.png", results, stored_bytes, "bytes stored after all tasks"),
        trade_off(folder / "time.png", results, _seconds, "training time, s"),
    ]


def _titled(results: Sequence[dict[str, Any]]) -> str:
    """The title of a comparison."""
    seeds = results[0]["num_seeds"]
    spread = f"{seeds} seeds, mean ± standard deviation" if seeds > 1 else "1 seed"
    return f"{results[0]['name']}, {spread}"


@style.applied()
def bars(path: pathlib.Path, results: Sequence[dict[str, Any]]) -> pathlib.Path:
    """Draws accuracies and forgetting with their spread over seeds, bytes per task, and seconds.

    Args:
      path: of the PNG file; SVG and PDF are written beside it.
      results: the contents of ``result.json`` of each method, at least one.

    Returns:
      ``path``.
    """
    size = (9.5, 1.4 + 0.36 * len(results))
    figure, axes = new_figure(1, 4, size, sharey=True, width_ratios=(4, 1.4, 1.4, 1.4))
    rows = np.arange(len(results))[::-1]

    def horizontal(
        axis: Any,
        summaries: list[dict[str, Any]],
        offset: float = 0.0,
        height: float = 0.6,
        **options: Any,
    ) -> None:
        means = [np.nan if s["mean"] is None else s["mean"] for s in summaries]
        sds = [s["sd"] or 0.0 for s in summaries]
        axis.barh(rows + offset, means, height, xerr=sds, error_kw={"lw": 0.8}, **options)

    for i, kind in enumerate(results[0]["summary"]):
        averages = [r["summary"][kind]["average_accuracy"] for r in results]
        label, color = style.KINDS[kind]
        horizontal(axes[0], averages, 0.26 * (1 - i), 0.24, label=label, color=color)
    lost = [r["summary"]["task_told"]["forgetting"] for r in results]
    horizontal(axes[1], lost, color="0.6")
    axes[2].barh(rows, [r["memory"]["bytes_per_task"] for r in results], 0.6, color="0.6")
    axes[3].barh(rows, [_seconds(r) for r in results], 0.6, color="0.6")
    axes[0].set_yticks(rows, [style.display(r["method"]) for r in results])
    axes[0].set_ylim(-0.6, len(results) - 0.4)
    axes[0].set_xlim(0, 1.03)
    axes[2].set_xscale("symlog", linthresh=1000)
    axes[2].set_xticks([0, 1e3, 1e5])
    labels = (
        "average accuracy after all tasks",
        "forgetting, told",
        "bytes per task",
        "training, s",
    )
    for axis, label in zip(axes, labels, strict=True):
        axis.set_xlabel(label)
        axis.grid(axis="x")
    style.legend(figure, 3, "outside lower center")
    figure.suptitle(_titled(results))
    return style.save(figure, path)


@style.applied()
def forgetting(path: pathlib.Path, results: Sequence[dict[str, Any]]) -> pathlib.Path:
    """Draws the forgetting curves: accuracy, told the task, after each learned task.

    The left panel has the accuracy of task 1, the right one the mean over all tasks so far. Bands
    are one standard deviation over seeds. Points that were not tested are left out.

    Args:
      path: of the PNG file; SVG and PDF are written beside it.
      results: the contents of ``result.json`` of each method, at least one.

    Returns:
      ``path``.
    """
    figure, (left, right) = new_figure(1, 2, (9, 3.6 + 0.05 * len(results)), sharey=True)
    for result in results:
        matrix = np.asarray(plain_nan(result["accuracy"]["task_told"]), float)  # [seeds, T, T]
        tasks = matrix.shape[1]
        first = matrix[:, :, 0]
        # A row was tested on all its tasks or on none; a sequence may leave rows out.
        so_far = np.stack([matrix[:, i, : i + 1].mean(1) for i in range(tasks)], 1)
        name, color, mark = _look(result["method"])
        for axis, values in ((left, first), (right, so_far)):
            tested = np.flatnonzero(~np.isnan(values).all(0))
            every = max(1, len(tested) // 20)
            _band(
                axis, tested + 1, values.T[tested], color, label=name, marker=mark, markevery=every
            )
    for axis, title in ((left, "task 1"), (right, "all tasks so far")):
        axis.set_title(title)
        axis.set_xlabel("number of tasks learned")
        axis.set_ylim(-0.03, 1.03)
        axis.grid(axis="y")
        axis.locator_params(axis="x", integer=True)
    left.set_ylabel("accuracy, told the task")
    style.legend(figure, 6, "outside lower center")
    figure.suptitle(_titled(results))
    return style.save(figure, path)


def _look(method: str) -> style.Look:
    """The look of a method; black for one that is not part of bpnjax."""
    return style.look(method) or style.Look(method, "black")


def _seconds(result: dict[str, Any]) -> float:
    """Training time of one run with all its seeds."""
    return result["time"]["train_seconds"]


def stored_bytes(result: dict[str, Any]) -> float:
    """Everything that a run stores to answer every task and to learn on, with replayed examples.

    Args:
      result: the content of ``result.json``.

    Returns:
      Bytes. For results of earlier versions: the network, the bytes per task and the examples.

    Example:
      >>> from bpnjax.run.plots import stored_bytes
      >>> stored_bytes({"memory": {"answering_bytes": 100, "replay_bytes": 20}})
      120
    """
    memory = result["memory"]
    answering = memory.get("answering_bytes")
    if answering is None:
        tasks = len(result["class_names"])
        answering = 4 * memory["core_parameters"] + tasks * memory["bytes_per_task"]
    return answering + memory["replay_bytes"]


@style.applied()
def trade_off(
    path: pathlib.Path,
    results: Sequence[dict[str, Any]],
    cost: Callable[[dict[str, Any]], float],
    label: str,
) -> pathlib.Path:
    """Draws the average accuracy after all tasks against a cost, with and without the task told.

    Args:
      path: of the PNG file; SVG and PDF are written beside it.
      results: the contents of ``result.json`` of each method, at least one.
      cost: function of a result, above 0.
      label: name of the cost, with its unit.

    Returns:
      ``path``.
    """
    figure, axes = new_figure(1, 2, (9, 3.6 + 0.05 * len(results)), sharey=True)
    costs = [cost(result) for result in results]
    for axis, kind in zip(axes, ("task_told", "task_inferred"), strict=True):
        for result, x in zip(results, costs, strict=True):
            average = result["summary"][kind]["average_accuracy"]
            if average["mean"] is None:
                continue
            name, color, mark = _look(result["method"])
            axis.errorbar(
                x, average["mean"], average["sd"] or None, color=color, marker=mark, ms=6, ls="",
                label=name, elinewidth=0.8, alpha=0.9,
            )  # fmt: skip
        axis.set_title(style.KINDS[kind][0])
        axis.set_ylim(-0.03, 1.03)
        if max(costs) > 5 * min(costs) > 0:
            axis.set_xscale("log")
        else:
            axis.locator_params(axis="x", nbins=5)
            axis.xaxis.set_major_formatter("{x:,g}")
        axis.set_xlabel(label)
        axis.grid()
    axes[0].set_ylabel("average accuracy after all tasks")
    style.legend(figure, 6, "outside lower center")
    figure.suptitle(_titled(results))
    return style.save(figure, path)


def draw(workdir: pathlib.Path, result: dict[str, Any]) -> list[pathlib.Path]:
    """Draws every figure of a run; see `accuracy_matrix` and `learning_curves`.

    Args:
      workdir: the run's folder.
      result: the content of its ``result.json``.

    Returns:
      The paths of the figures.
    """
    return [accuracy_matrix(workdir, result), learning_curves(workdir, result)]


def run(arguments: list[str]) -> int:
    """Runs the command `bpnjax plots`.

    Args:
      arguments: folders of complete runs.

    Returns:
      The exit code: 0, 2 for a folder that holds no complete run.
    """
    if not arguments or {"--help", "-h"} & set(arguments):
        print(USAGE)
        return 0 if arguments else 2
    try:
        for folder in map(pathlib.Path, arguments):
            for name in ("result.json", "metrics.jsonl"):
                if not (folder / name).is_file():
                    raise UserError(f"{folder}: no {name} in it; name the folder of a complete run")
            for path in draw(folder, json.loads((folder / "result.json").read_text())):
                print(path)
    except UserError as error:
        print(f"bpnjax: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
