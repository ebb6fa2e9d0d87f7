"""The style of all figures: fonts, lines, and one colour, marker and name per method.

The methods that are compared most have colours of Okabe and Ito and of Tol, which people with the
common forms of colour blindness can distinguish. Variants have shades of them and other markers.
Nothing here changes the settings of the user's matplotlib.
"""

import contextlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

__all__ = ["KINDS", "Look", "applied", "display", "legend", "look", "new_figure", "save"]


class Look(NamedTuple):
    """How a method is drawn."""

    display: str  # its name in figures and tables
    color: str
    mark: str = "o"  # marker of matplotlib


METHODS = {
    # Bounds.
    "sgd": Look("SGD", "#B4B4B4", "x"),
    "stl": Look("STL", "#222222", "s"),
    "joint": Look("joint", "#555555", "D"),
    "joint_ridge": Look("joint ridge", "#6E6E6E", "D"),
    # Penalties on change and distillation.
    "ewc": Look("EWC", "#009E73", "^"),
    "ewc_online": Look("online EWC", "#44AA99", "^"),
    "ewc_kfac": Look("K-FAC EWC", "#117733", "^"),
    "ewc_masked": Look("EWC, masked", "#6B8E23", "^"),
    "si": Look("SI", "#999933", "v"),
    "mas": Look("MAS", "#B2A429", "v"),
    "slnid": Look("SLNID", "#7F7A1E", "v"),
    "imm_mean": Look("mean-IMM", "#A6761D", "<"),
    "imm_mode": Look("mode-IMM", "#7A5410", "<"),
    "lwf": Look("LwF", "#C9A66B", ">"),
    "ebll": Look("EBLL", "#9C8054", ">"),
    # Stored examples.
    "gem": Look("GEM", "#7B3F00", "P"),
    "agem": Look("A-GEM", "#A65E2E", "P"),
    "er": Look("ER", "#56B4E9", "P"),
    "der": Look("DER", "#3A8FB7", "P"),
    "derpp": Look("DER++", "#1D6A8C", "P"),
    # Analytic heads.
    "ncm": Look("NCM", "#DDCC77", "h"),
    "slda": Look("SLDA", "#C2B04E", "h"),
    "fecam": Look("FeCAM", "#A3923B", "h"),
    "ranpac": Look("RanPAC", "#857628", "h"),
    # One mode per task.
    "psp": Look("PSP", "#E69F00", "o"),
    "xdg": Look("XdG", "#AA4499", "X"),
    "xdg_ewc": Look("XdG+EWC", "#7E2F71", "X"),
    "bd": Look("BD", "#77AADD", "o"),
    "bd_ewc": Look("BD+EWC", "#0072B2", "o"),
    "bd_psp": Look("BD+PSP", "#D55E00", "o"),
    "bd_psp_ewc": Look("BD+PSP+EWC", "#332288", "o"),
    "bd_ewc_kfac": Look("BD+K-FAC EWC", "#4477AA", "s"),
    "bd_psp_ewc_kfac": Look("BD+PSP+K-FAC EWC", "#882255", "s"),
    "frozen": Look("frozen", "#C8C0B0", "d"),
    "bd_frozen": Look("BD, frozen", "#114477", "d"),
    "bias_frozen": Look("plain bias, frozen", "#771155", "d"),
    # Controls.
    "gd": Look("GD", "#EE99AA", "*"),
    "gd_ewc": Look("GD+EWC", "#AA3377", "*"),
    "gd_matched": Look("GD, matched", "#DD7788", "*"),
    "gd_matched_ewc": Look("GD+EWC, matched", "#994455", "*"),
    "plain_bias": Look("plain bias", "#BB88CC", "p"),
    "bias_ewc": Look("plain bias+EWC", "#774499", "p"),
    "random_bias": Look("random bias", "#CCBB99", "8"),
    "random_bias_ewc": Look("random bias+EWC", "#B8956A", "8"),
}
_BY_DISPLAY = {found.display: found for found in METHODS.values()}
_BY_DISPLAY |= {"fine-tuning": METHODS["sgd"], "IMM (mean)": METHODS["imm_mean"]}
_BY_DISPLAY |= {"IMM (mode)": METHODS["imm_mode"], "plain SGD": METHODS["sgd"]}

# The three kinds of accuracy: name and colour.
KINDS = {
    "task_told": ("told the task", "#0072B2"),
    "task_masked": ("told, own classes", "#E69F00"),
    "task_inferred": ("not told", "#882255"),
}

SETTINGS = {
    "font.family": "sans-serif",
    # Alternatives that a reader of an SVG file may have installed.
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "Helvetica"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.prop_cycle": "cycler('color', ['0072B2', 'E69F00', '882255', '009E73', '56B4E9', "
    "'CC79A7', '555555', 'D55E00'])",
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.5,
    "errorbar.capsize": 2,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "savefig.dpi": 144,
    "savefig.bbox": "tight",
    "svg.fonttype": "none",  # text stays text: smaller files, and searchable
    "svg.hashsalt": "bpnjax",  # the same figure gives the same bytes
    "pdf.fonttype": 42,  # journals do not accept the default, type 3
}
_METADATA: dict[str, dict[str, Any]] = {
    ".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}
}  # fmt: skip


def look(method: str) -> Look | None:
    """The colour, marker and name of a method, the same in every figure.

    Args:
      method: its name in the registry or in figures. Text from ``(`` on is ignored.

    Returns:
      `Look`; None for a method that is not part of bpnjax.

    Example:
      >>> from bpnjax.run import style
      >>> style.look("bd_ewc") == style.look("BD+EWC"), style.look("GEM(256)").display
      (True, 'GEM')
      >>> style.look("mine") is None
      True
    """
    for name in (method, method.partition("(")[0], method.partition(", ")[0]):
        found = METHODS.get(name) or _BY_DISPLAY.get(name)
        if found:
            return found
    return None


def display(method: str) -> str:
    """The name of a method in figures.

    Args:
      method: its name in the registry.

    Returns:
      A name such as ``"BD+EWC"``; for a method that is not part of bpnjax its own name.

    Example:
      >>> from bpnjax.run import style
      >>> style.display("bd_ewc"), style.display("mine")
      ('BD+EWC', 'mine')
    """
    found = METHODS.get(method)
    return found.display if found else method


@contextlib.contextmanager
def applied() -> Iterator[None]:
    """Draws in this style, as a context or as a decorator of a function that draws.

    Yields:
      Nothing. The user's settings of matplotlib are restored afterwards.

    Example:
      >>> import matplotlib
      >>> from bpnjax.run import style
      >>> with style.applied():
      ...     matplotlib.rcParams["svg.hashsalt"]
      'bpnjax'
      >>> matplotlib.rcParams["svg.hashsalt"] is None
      True
    """
    from matplotlib import style  # here, because only figures need it

    with style.context(SETTINGS, after_reset=True):
        yield


def new_figure(rows: int, columns: int, size: tuple[float, float], **options: Any) -> Any:
    """Makes a figure for a file, independent of pyplot and its figures.

    Args:
      rows: number of rows of panels.
      columns: number of columns of panels.
      size: width and height in inches.
      **options: of ``Figure.subplots``.

    Returns:
      A ``matplotlib.figure.Figure`` and its axes, as from ``Figure.subplots``.
    """
    from matplotlib.figure import Figure  # here, because only figures need it

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def legend(figure: Any, columns: int = 5, place: str = "outside upper center") -> None:
    """Draws one legend for all panels, outside of them, so that it covers no data.

    Args:
      figure: a figure with labelled lines or bars.
      columns: the largest number of columns.
      place: a location of ``Figure.legend`` that begins with ``outside``.
    """
    handles: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        figure.legend(
            list(handles.values()), list(handles), loc=place, ncols=min(columns, len(handles))
        )


def save(
    figure: Any, path: pathlib.Path, suffixes: Sequence[str] = (".png", ".svg", ".pdf")
) -> pathlib.Path:
    """Writes a figure; the same figure gives the same bytes.

    Args:
      figure: from `new_figure`.
      path: of the first file; the others are written beside it.
      suffixes: one per file.

    Returns:
      ``path``.
    """
    for suffix in suffixes:
        figure.savefig(path.with_suffix(suffix), metadata=_METADATA[suffix])
    return path
