"""What a run writes: a line of metrics per interval, results at the end, and its progress."""

import csv
import io
import json
import math
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from bpnjax.run.checkpoint import write_atomically


def plain(value: Any) -> Any:
    """Converts arrays and floats to JSON data.

    Args:
      value: dicts, lists, tuples, NumPy arrays and scalars, and JSON data.

    Returns:
      JSON data: arrays as lists, keys as text, None for NaN and the infinities.

    Example:
      >>> import numpy as np
      >>> from bpnjax.run.writers import plain
      >>> plain({"R": np.array([[1.0, np.nan]])})
      {'R': [[1.0, None]]}
    """
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class MetricsLog:
    """Writes `metrics.jsonl`, a line per interval; continues where a checkpoint left off.

    ``length`` is the size of the file at the checkpoint, in bytes. Everything after it is cut off.

    ``copies`` (see `bpnjax.run.log_copies`) get all lines, including those that exist already.
    ``on_log`` is called with each new line.
    """

    def __init__(
        self,
        path: pathlib.Path,
        length: int,
        copies: Sequence[Any] = (),
        on_log: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self._path, self._copies, self._on_log = path, copies, on_log
        with path.open("ab+") as f:
            # Lines after the checkpoint will be written again. A file that lost lines (deleted, or
            # cut by a loss of power) stays shorter, since truncate would fill it with null bytes.
            # It may also end in the middle of a line.
            end = min(length, f.tell())
            f.seek(0)
            kept = f.read(end)
            f.truncate(kept.rfind(b"\n") + 1)
        for line in path.read_text().splitlines() if copies else ():
            self._copy(json.loads(line))

    def _copy(self, line: dict[str, Any]) -> None:
        for copy in self._copies:
            copy.write(line)

    def write(self, **values: Any) -> None:
        """Appends a line.

        Args:
          **values: values for `plain`, by name.
        """
        line = plain(values)
        with self._path.open("a") as f:
            f.write(json.dumps(line) + "\n")
        self._copy(line)
        if self._on_log:
            self._on_log(line)

    def close(self) -> None:
        """Closes the copies."""
        for copy in self._copies:
            copy.close()

    @property
    def length(self) -> int:
        """Bytes of the file."""
        return self._path.stat().st_size


def write_result(workdir: pathlib.Path, result: dict[str, Any]) -> None:
    """Writes `accuracy.csv`, then `result.json`, whose existence marks a complete run.

    Args:
      workdir: the run's folder.
      result: ``accuracy`` holds ``{kind: float [seeds, T, T]}``, NaN where not tested, and ``seed``
        the first seed. Everything else that `plain` takes goes into the file unchanged.
    """
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["seed", "after_task", "task", *result["accuracy"]])
    kinds = list(result["accuracy"].values())
    seeds, tasks, _ = kinds[0].shape
    for s in range(seeds):
        for i in range(tasks):
            for j in range(i + 1):
                values = [k[s, i, j] for k in kinds]
                if not all(math.isnan(v) for v in values):
                    cells = ["" if math.isnan(v) else f"{v:.6f}" for v in values]
                    rows.writerow([result["seed"] + s, i + 1, j + 1, *cells])
    write_atomically(workdir / "accuracy.csv", text.getvalue())
    write_atomically(workdir / "result.json", json.dumps(plain(result), indent=1) + "\n")


WIDTH = 80  # characters in tables and lines on a terminal


def listed(names: Sequence[str], width: int) -> str:
    """Joins names by commas, as many as fit.

    Args:
      names: at least one.
      width: number of characters, at least 4.

    Returns:
      A text, with an ellipsis for names that were left out.

    Example:
      >>> from bpnjax.run.writers import listed
      >>> listed(["airplane", "automobile", "bird"], 25), listed(["0", "1"], 25)
      ('airplane, automobile, ...', '0, 1')
    """
    for n in range(len(names), 0, -1):
        text = ", ".join(names[:n]) + (", ..." if n < len(names) else "")
        if len(text) <= width:
            return text
    return f"{names[0][: width - 3]}..."


def aligned(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Formats a table in columns for a terminal.

    Args:
      header: texts.
      rows: rows of as many texts.

    Returns:
      The lines: header, rule, rows.

    Example:
      >>> from bpnjax.run.writers import aligned
      >>> aligned(["method", "told"], [["psp", "0.98"]])
      ['method  told', '------------', 'psp     0.98']
    """
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    ]
    return [text[0], "-" * max(map(len, text)), *text[1:]]


def table(result: dict[str, Any], class_names: list[list[str]]) -> str:
    """Formats the three accuracies per task after the last one, as text.

    Below are their mean over tasks, the accuracy on all test examples (``last``), and the mean over
    steps of the accuracy on all classes seen so far (``anytime``); see
    `bpnjax.evaluation.metrics`.

    Args:
      result: of a complete run, from memory or from ``result.json``.
      class_names: the classes of each task.

    Returns:
      Lines of text without a final line feed; mean ± sd (n - 1) over seeds if there are several.
    """
    kinds = {name: np.asarray(plain_nan(m), float)[:, -1] for name, m in result["accuracy"].items()}
    several = result["num_seeds"] > 1

    def cell(values: np.ndarray) -> str:
        if np.isnan(values).all():
            return "-"
        if not several:
            return f"{values[0]:.4f}"
        return f"{values.mean():.4f} ± {values.std(ddof=1):.4f}"

    cells = [[cell(k[:, t]) for k in kinds.values()] for t in range(len(class_names))]
    means = [cell(k.mean(axis=1)) for k in kinds.values()]
    below = [["mean", "", *means]]
    for name, of in (("last", "last_accuracy"), ("anytime", "average_incremental_accuracy")):
        # Results of earlier versions do not have them.
        found = [result["summary"][kind].get(of) for kind in kinds]
        if any(found):
            below.append([name, "", *(mean_and_sd(entry) for entry in found)])
    widths = [
        max(map(len, column))
        for column in zip(kinds, *(row[2:] for row in below), *cells, strict=True)
    ]
    left = max(12, WIDTH - len("anytime") - 2 * (1 + len(kinds)) - sum(widths))
    rows = []
    for task, names in enumerate(class_names):
        shown = names if len(names) < 5 else [*names[:4], "..."]
        rows.append([str(task + 1), listed(shown, left), *cells[task]])
    text = aligned(["task", "classes", *kinds], [*rows, *below])
    return "\n".join([*text[: -len(below)], text[1], *text[-len(below) :]])


def mean_and_sd(entry: dict[str, Any] | None, digits: int = 4) -> str:
    """Formats an entry of a result's summary.

    Args:
      entry: ``{"mean", "sd"}``, either of which may be None; or None.
      digits: number of digits after the point.

    Returns:
      A text such as ``"0.9800 ± 0.0100"``, or ``"-"`` without a mean.

    Example:
      >>> from bpnjax.run.writers import mean_and_sd
      >>> mean_and_sd({"mean": 0.98, "sd": 0.01}, 2), mean_and_sd(None)
      ('0.98 ± 0.01', '-')
    """
    return "-" if entry is None else number(entry["mean"], entry["sd"], digits)


def number(mean: float | None, sd: float | None = None, digits: int = 3) -> str:
    """Formats a mean over seeds with its standard deviation.

    Args:
      mean: over the seeds; None if it was not measured.
      sd: None for one seed.
      digits: number of digits after the point.

    Returns:
      ``mean ± sd``, or ``-``.

    Example:
      >>> from bpnjax.run.writers import number
      >>> number(0.98, 0.004), number(0.98, None, digits=2)
      ('0.980 ± 0.004', '0.98')
    """
    if mean is None:
        return "-"
    return f"{mean:.{digits}f}" + ("" if sd is None else f" ± {sd:.{digits}f}")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Formats a table as Markdown.

    Args:
      header: texts.
      rows: rows of as many texts, without ``|``, which would be taken for a border.

    Returns:
      Lines of text without a final line feed.

    Example:
      >>> from bpnjax.run.writers import markdown_table
      >>> print(markdown_table(["method", "told"], [["`psp`", "0.98"]]))
      | method | told |
      |---|---|
      | `psp` | 0.98 |
    """
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


_LATEX = {
    "\\": r"\textbackslash{}", "±": r"$\pm$", "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$", "|": r"$|$",
} | {letter: rf"\{letter}" for letter in "&%$#_{}"}  # fmt: skip


def latex_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    r"""Formats a table for ``\input`` in a LaTeX document with ``\usepackage{booktabs}``.

    Args:
      header: texts. Code between backticks is set in typewriter type, also in rows.
      rows: rows of as many texts.

    Returns:
      A ``tabular`` that ends with a line feed.

    Example:
      >>> from bpnjax.run.writers import latex_table
      >>> print(latex_table(["method", "told"], [["`bd_ewc`", "0.98 ± 0.01"]]))
      \begin{tabular}{ll}
      \toprule
      method & told \\
      \midrule
      \texttt{bd\_ewc} & 0.98 $\pm$ 0.01 \\
      \bottomrule
      \end{tabular}
      <BLANKLINE>
    """

    def line(cells: Sequence[str]) -> str:
        return " & ".join(map(_latex, cells)) + r" \\"

    lines = [
        rf"\begin{{tabular}}{{{'l' * len(header)}}}", r"\toprule", line(header), r"\midrule",
        *map(line, rows), r"\bottomrule", r"\end{tabular}",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _latex(text: str) -> str:
    """Converts a cell of Markdown to LaTeX."""
    parts = ["".join(_LATEX.get(letter, letter) for letter in part) for part in text.split("`")]
    return "".join(rf"\texttt{{{p}}}" if i % 2 else p for i, p in enumerate(parts))


def plain_nan(value: Any) -> Any:
    """Reverses `plain` for matrices: null becomes NaN.

    Args:
      value: nested lists of numbers and None, or arrays, which do not change.

    Returns:
      Nested lists of numbers.

    Example:
      >>> from bpnjax.run.writers import plain_nan
      >>> plain_nan([[1.0, None]])
      [[1.0, nan]]
    """
    if isinstance(value, list):
        return [plain_nan(v) for v in value]
    return math.nan if value is None else value


class Progress:
    """Shows progress on stderr: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, total_steps: int, done_steps: int) -> None:
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total_steps, initial=done_steps, leave=False, desc="compiling",
                bar_format="{desc}  {percentage:.0f}%, {remaining} left{postfix}",
            )  # fmt: skip

    def update(self, steps: int, where: str, loss: float, rate: float) -> None:
        """Moves the bar by some steps; does nothing without a bar.

        Args:
          steps: number of steps since the last call.
          where: the task and the epoch.
          loss: mean training loss per example.
          rate: examples per second.
        """
        if self._bar is not None:
            self._bar.set_description_str(where, refresh=False)
            self._bar.set_postfix_str(f"loss {loss:.4f}, {rate:,.0f} examples/s", refresh=False)
            self._bar.update(steps)
            self._bar.refresh()

    def line(self, text: str) -> None:
        """Prints a line, above the bar if there is one.

        Args:
          text: without a line feed.
        """
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.close()
