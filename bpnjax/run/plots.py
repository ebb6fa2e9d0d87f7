"""Figures of a run, drawn from its result files and nothing else.

bpnjax plots WORKDIR ...
"""

import json
import pathlib
import sys
from typing import Any

import numpy as np

from bpnjax.run.writers import plain_nan
from bpnjax.utils.errors import UserError

USAGE = """usage: bpnjax plots DIR ...

Draws accuracy_matrix.png and learning_curves.png of complete runs again, from
the result.json and metrics.jsonl of each folder."""


def new_figure(
    rows: int, columns: int, size: tuple[float, float], layout: Any = None, **options: Any
) -> tuple[Any, Any]:
    """A figure for a file. It is none of pyplot's, whose backend and figures are the user's.

    Args:
      rows: of panels.
      columns: of panels.
      size: width and height in inches.
      layout: "constrained", or None.
      **options: of ``Figure.subplots``.

    Returns:
      A ``matplotlib.figure.Figure`` and its axes, as ``Figure.subplots`` gives them.
    """
    from matplotlib.figure import Figure  # late: nothing but figures needs it

    figure = Figure(figsize=size, layout=layout)
    return figure, figure.subplots(rows, columns, **options)


def accuracy_matrix(workdir: pathlib.Path, result: dict[str, Any]) -> pathlib.Path:
    """Draws the accuracy matrices of a run, mean over seeds, one panel for each accuracy.

    Rows that were never tested are left out; up to ten tasks the cells are labelled.

    Args:
      workdir: where ``accuracy_matrix.png`` goes, over an earlier one.
      result: the content of ``result.json``, null where not tested.

    Returns:
      The path of the figure.
    """
    kinds = {k: np.asarray(plain_nan(m), float).mean(0) for k, m in result["accuracy"].items()}
    tasks = len(next(iter(kinds.values())))
    side = 3.4 if tasks <= 20 else 4.2
    figure, axes = new_figure(1, len(kinds), (side * 3 + 1, side + 0.6), "constrained")
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
    from matplotlib import colormaps

    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    tests = [line for line in lines if line["kind"] == "evaluate"]
    figure, (top, bottom) = new_figure(2, 1, (8, 6), sharex=True)
    top.plot(
        [l["total_steps"] for l in train], [np.nanmean(plain_nan(l["loss"])) for l in train], lw=1
    )
    top.set_yscale("log")
    top.set_ylabel("training loss")
    tasks = len(result["accuracy"]["task_told"][0])
    colors = colormaps["viridis"](np.linspace(0, 0.95, tasks))
    for task in range(tasks):
        points = [
            (l["total_steps"], np.nanmean(tested))
            for l in tests
            if not np.isnan(tested := plain_nan([row[task] for row in l["task_told"]])).all()
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
    return path


def comparison(path: pathlib.Path, results: list[dict[str, Any]]) -> pathlib.Path:
    """Draws several methods side by side: accuracies and forgetting with sd, bytes, time.

    Args:
      path: of the figure.
      results: the contents of their ``result.json``, at least one; title and seeds are the first's.

    Returns:
      ``path``.
    """
    kinds = list(results[0]["summary"])
    size = (11, 1.2 + 0.42 * len(results))
    figure, axes = new_figure(1, 4, size, sharey=True, width_ratios=(4, 1.3, 1.3, 1.3))
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
