"""Figures of a run, drawn from its result files and nothing else.

python -m bpnjax.run.plots WORKDIR ...
"""

import json
import pathlib
import sys
from typing import Any

import numpy as np

from bpnjax.run.writers import plain_nan


def headless_pyplot() -> Any:
    """matplotlib's pyplot for files; imported when the first figure is drawn.

    Returns:
      The module ``matplotlib.pyplot``. Its backend is Agg from then on, in the whole process.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def accuracy_matrix(workdir: pathlib.Path, result: dict[str, Any]) -> pathlib.Path:
    """Draws the accuracy matrices of a run, mean over seeds, one panel for each accuracy.

    Rows that were never tested are left out; up to ten tasks the cells are labelled.

    Args:
      workdir: where ``accuracy_matrix.png`` goes, over an earlier one.
      result: the content of ``result.json``, null where not tested.

    Returns:
      The path of the figure.
    """
    pyplot = headless_pyplot()
    kinds = {k: np.asarray(plain_nan(m), float).mean(0) for k, m in result["accuracy"].items()}
    tasks = len(next(iter(kinds.values())))
    side = 3.4 if tasks <= 20 else 4.2
    figure, axes = pyplot.subplots(
        1, len(kinds), figsize=(side * 3 + 1, side + 0.6), layout="constrained"
    )
    for axis, (name, matrix) in zip(axes, kinds.items(), strict=True):
        # Rows that were not tested are left out, so that long sequences fit. Which ones differs
        # from panel to panel (evaluate.inferred_rows): each has a vertical axis of its own.
        rows = [i for i in range(tasks) if not np.isnan(matrix[i]).all()]
        image = axis.imshow(matrix[rows], vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_title(name)
        axis.set_xlabel("tested on task")
        axis.set_yticks(range(len(rows)), [str(i + 1) for i in rows])
        axis.set_xticks(range(tasks) if tasks <= 20 else range(0, tasks, 10))
        axis.set_xticklabels([str(t + 1) for t in axis.get_xticks()])
        if tasks <= 10:
            for y, i in enumerate(rows):
                for j in range(i + 1):
                    if not np.isnan(matrix[i, j]):
                        color = "black" if matrix[i, j] > 0.6 else "white"
                        axis.text(j, y, f"{matrix[i, j]:.2f}", ha="center", va="center",
                                  color=color, fontsize=7)  # fmt: skip
    axes[0].set_ylabel("after training task")
    figure.colorbar(image, ax=axes, label="accuracy", shrink=0.9)
    seeds = f", mean of {result['num_seeds']} seeds" if result["num_seeds"] > 1 else ""
    figure.suptitle(f"{result['name']}, {result['method']}{seeds}")
    path = workdir / "accuracy_matrix.png"
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return path


def learning_curves(workdir: pathlib.Path, result: dict[str, Any]) -> pathlib.Path:
    """Draws the training loss, and the told accuracy of each task, against the steps trained.

    Means over seeds; thin lines are the ends of tasks.

    Args:
      workdir: where ``metrics.jsonl`` is and ``learning_curves.png`` goes, over an earlier one.
      result: the content of ``result.json``.

    Returns:
      The path of the figure.
    """
    pyplot = headless_pyplot()
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    tests = [line for line in lines if line["kind"] == "evaluate"]
    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True)
    top.plot([l["total_steps"] for l in train], [np.mean(l["loss"]) for l in train], lw=1)
    top.set_yscale("log")
    top.set_ylabel("training loss")
    tasks = len(result["accuracy"]["task_told"][0])
    colors = pyplot.get_cmap("viridis")(np.linspace(0, 0.95, tasks))
    for task in range(tasks):
        points = [
            (l["total_steps"], np.mean([row[task] for row in l["task_told"]]))
            for l in tests
            if l["task_told"][0][task] is not None
        ]
        if points:
            label = f"task {task + 1}" if tasks <= 10 else None
            bottom.plot(
                *zip(*points, strict=True), "o-", ms=3, lw=1, color=colors[task], label=label
            )
    bottom.set_ylim(-0.02, 1.02)
    bottom.set_xlabel("steps")
    bottom.set_ylabel("task_told accuracy")
    if tasks <= 10:
        bottom.legend(fontsize=7, ncols=2)
    for start in [l["total_steps"] for l in tests if l["task_finished"]]:
        for axis in (top, bottom):
            axis.axvline(start, color="0.85", lw=0.6, zorder=0)
    figure.suptitle(f"{result['name']}, {result['method']}")
    path = workdir / "learning_curves.png"
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return path


def comparison(path: pathlib.Path, results: list[dict[str, Any]]) -> pathlib.Path:
    """Draws several methods side by side: accuracies and forgetting with sd, bytes, time.

    Args:
      path: of the figure.
      results: the contents of their ``result.json``, at least one; title and seeds are the first's.

    Returns:
      ``path``.
    """
    pyplot = headless_pyplot()
    kinds = list(results[0]["summary"])
    figure, axes = pyplot.subplots(
        1, 4, figsize=(11, 1.2 + 0.42 * len(results)), sharey=True, width_ratios=(4, 1.3, 1.3, 1.3)
    )
    rows = np.arange(len(results))[::-1]

    def bars(
        axis: Any,
        summaries: list[dict[str, Any]],
        offset: float = 0.0,
        height: float = 0.6,
        **options: Any,
    ) -> None:
        means = [np.nan if s["mean"] is None else s["mean"] for s in summaries]
        sds = [s["sd"] or 0.0 for s in summaries]
        axis.barh(rows + offset, means, height, xerr=sds, capsize=2, **options)

    for i, kind in enumerate(kinds):
        averages = [r["summary"][kind]["average_accuracy"] for r in results]
        bars(axes[0], averages, 0.26 * (1 - i), 0.24, label=kind)
    bars(axes[1], [r["summary"]["task_told"]["forgetting"] for r in results], color="0.5")
    axes[2].barh(rows, [r["memory"]["bytes_per_task"] for r in results], 0.6, color="0.5")
    axes[3].barh(rows, [r["time"]["train_seconds"] for r in results], 0.6, color="0.5")
    axes[0].set_yticks(rows, [r["method"] for r in results])
    axes[0].set_ylim(-0.6, len(results) - 0.4)
    axes[0].set_xlim(0, 1)
    axes[2].set_xscale("symlog", linthresh=1000)
    axes[2].set_xticks([0, 1e3, 1e5])
    for axis, label in zip(
        axes,
        ("average accuracy after all tasks", "forgetting (told)", "bytes per task", "training, s"),
        strict=True,
    ):
        axis.set_xlabel(label)
        axis.grid(axis="x", alpha=0.3)
    axes[0].legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    seeds = results[0]["num_seeds"]
    title = f"{results[0]['name']}, {seeds} seed{'s' if seeds > 1 else ''}"
    axes[0].set_title(title, pad=28)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
    return path


def draw(workdir: pathlib.Path, result: dict[str, Any]) -> list[pathlib.Path]:
    """Draws every figure of a run; see `accuracy_matrix` and `learning_curves`.

    Args:
      workdir: the run's folder.
      result: the content of its ``result.json``.

    Returns:
      The paths of the figures.
    """
    return [accuracy_matrix(workdir, result), learning_curves(workdir, result)]


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        folder = pathlib.Path(argument)
        for drawn in draw(folder, json.loads((folder / "result.json").read_text())):
            print(drawn)
