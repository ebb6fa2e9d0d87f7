"""What the paper's figures share: panels, colours of the methods, bands of mean ± sd."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from bpnjax.run.plots import new_figure

COLORS = {
    "STL": "0.35", "BD+PSP": "#d62728", "BD+EWC": "#1f77b4", "PSP": "#ff7f0e", "EWC": "#2ca02c",
    "GD+EWC": "#9467bd", "GEM(256)": "#8c564b", "GEM(209)": "#7f7f7f", "GEM(150)": "#bcbd22",
    "GEM(10)": "#17becf", "SGD": "#e377c2",
}  # fmt: skip


def color(label: str) -> str | None:
    """The colour of a method, the same in every figure.

    Args:
      label: as the figures call it, ``"BD+EWC"``.

    Returns:
      A colour of matplotlib; None, by which matplotlib chooses, for a method without one.
    """
    return COLORS.get(label)


def figure_path(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Where an artefact's figure goes; makes the folder.

    Args:
      folder: of all artefacts.
      name: of the artefact.

    Returns:
      ``folder/name/name.png``.
    """
    (folder / name).mkdir(parents=True, exist_ok=True)
    return folder / name / f"{name}.png"


@contextlib.contextmanager
def panels(
    path: pathlib.Path, rows: int, columns: int, size: tuple[float, float], **options: Any
) -> Iterator[list[Any]]:
    """Axes of a figure; saves it at the end.

    Args:
      path: of the figure.
      rows: of panels.
      columns: of panels.
      size: width and height in inches.
      **options: of ``Figure.subplots``.

    Yields:
      The axes as a flat list, row by row.
    """
    options = {"sharex": rows > 1, "squeeze": False} | options
    figure, axes = new_figure(rows, columns, size, **options)
    yield list(axes.ravel())
    figure.savefig(path, dpi=120, bbox_inches="tight")


def band(axis: Any, x: np.ndarray, values: np.ndarray, label: str) -> None:
    """A line of means with a band of ± one sd (n - 1).

    Args:
      axis: to draw on.
      x: ``[points]``.
      values: float ``[points, seeds]``; points with a NaN are left out.
      label: of the method.
    """
    shown = ~np.isnan(values).any(1)
    x, mean, sd = x[shown], values[shown].mean(1), values[shown].std(1, ddof=values.shape[1] > 1)
    (line,) = axis.plot(x, mean, "o-", ms=2.5, lw=1.3, label=label, color=color(label))
    axis.fill_between(x, mean - sd, mean + sd, color=line.get_color(), alpha=0.18, lw=0)


def legend(axis: Any) -> None:
    """A legend above the axes.

    Args:
      axis: that has the lines.
    """
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5, frameon=False, fontsize=8)
