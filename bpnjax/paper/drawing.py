"""Common parts of the paper's figures: panels, colours of methods, bands of mean ± sd."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from bpnjax.run import style


def color(label: str) -> str | None:
    """The colour of a method, the same in every figure.

    Args:
      label: its name in figures, such as ``"BD+EWC"``, or in the registry.

    Returns:
      A colour of matplotlib; None (matplotlib chooses) for a method without one.
    """
    found = style.look(label)
    return found.color if found else None


def figure_path(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The path of an artefact's figure. Makes its folder.

    Args:
      folder: for all artefacts.
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
    """Yields the axes of a figure; saves it at the end as PNG, SVG and PDF.

    Args:
      path: of the figure.
      rows: number of rows of panels.
      columns: number of columns of panels.
      size: width and height in inches.
      **options: of ``Figure.subplots``.

    Yields:
      The axes as a flat list, row by row.
    """
    options = {"sharex": rows > 1, "squeeze": False} | options
    with style.applied():
        figure, axes = style.new_figure(rows, columns, size, **options)
        yield list(axes.ravel())
        style.save(figure, path)


def band(axis: Any, x: np.ndarray, values: np.ndarray, label: str) -> None:
    """Draws a line of means with a band of ± one sd (n - 1).

    Args:
      axis: to draw on.
      x: ``[points]``.
      values: float ``[points, seeds]``; points with a NaN are left out.
      label: of the method.
    """
    shown = ~np.isnan(values).any(1)
    x, mean, sd = x[shown], values[shown].mean(1), values[shown].std(1, ddof=values.shape[1] > 1)
    found = style.look(label)
    # Several lines of one method, such as GEM with 10 and with 256 examples, differ in their
    # dashes.
    variant = found is not None and label not in (found.display, *style.METHODS)
    drawn = len([line for line in axis.lines if found and line.get_color() == found.color])
    (line,) = axis.plot(
        x, mean, ls=("-", "--", ":", "-.")[drawn % 4] if variant else "-", label=label,
        color=color(label), marker=found.mark if found else "o",
    )  # fmt: skip
    axis.fill_between(x, mean - sd, mean + sd, color=line.get_color(), alpha=0.18, lw=0)


def legend(axis: Any) -> None:
    """Draws one legend above all panels of a figure.

    Args:
      axis: of the figure.
    """
    style.legend(axis.figure)
