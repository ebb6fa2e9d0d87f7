"""The output of an artefact: Markdown with tables, figures and commands; and one page of all."""

import pathlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from bpnjax.run import html_page
from bpnjax.run.checkpoint import write_atomically
from bpnjax.run.writers import latex_table, markdown_table, number

CLOSE = 0.02  # a result within this distance, or above, is reproduced


class Cell(NamedTuple):
    """One result beside the paper's.

    ``mean`` (None if not measured) and ``sd`` (n - 1; None for one seed) are ours. ``paper`` is
    None if the paper has none.
    """

    label: str
    mean: float | None
    sd: float | None
    paper: float | None = None


class Report(NamedTuple):
    """The results of an artefact."""

    name: str
    title: str
    text: str  # description and findings, as Markdown without headings
    tables: list[tuple[list[str], list[list[str]]]]  # (header, rows)
    figures: list[pathlib.Path]
    command: str
    runs: list[str]  # the commands of its runs
    seconds: float
    ledger: Mapping[str, tuple[list[str], list[list[str]]]] = MappingProxyType({})  # for README


def state(mean: float | None, paper: float | None) -> str:
    """Whether a result agrees with the paper's.

    Args:
      mean: ours; None if not measured.
      paper: theirs; None if the paper has none.

    Returns:
      ``"-"``, ``"reproduced"`` (within 0.02), ``"reproduced, higher"`` or ``"differs"``. If the
      paper has 0, which means that a method fails, a higher result differs.

    Example:
      >>> from bpnjax.paper.report import state
      >>> state(0.99, 0.98), state(0.9, 0.8), state(0.7, 0.8), state(0.9, 0.0), state(0.9, None)
      ('reproduced', 'reproduced, higher', 'differs', 'differs', '-')
    """
    if paper is None or mean is None:
        return "-"
    if abs(mean - paper) <= CLOSE:
        return "reproduced"
    return "reproduced, higher" if mean > paper > 0 else "differs"


def beside_paper(cells: list[Cell], what: str) -> tuple[list[str], list[list[str]]]:
    """A table of results with the paper's, the difference and the state.

    Args:
      cells: one per row.
      what: header of the first column.

    Returns:
      Header and rows of text, for `bpnjax.run.writers.markdown_table`.
    """
    rows = []
    for cell in cells:
        paper = "-" if cell.paper is None else f"{cell.paper:.3f}"
        difference = "-"
        if cell.paper is not None and cell.mean is not None:
            difference = f"{cell.mean - cell.paper:+.3f}"
        rows.append(
            [
                cell.label,
                number(cell.mean, cell.sd),
                paper,
                difference,
                state(cell.mean, cell.paper),
            ]
        )
    return [what, "ours", "paper", "difference", "state"], rows


def markdown(report: Report) -> str:
    """Formats a report as Markdown. Figures are beside the file.

    Args:
      report: a report.

    Returns:
      Lines of text that end with a line feed.
    """
    parts = [f"# {report.title}", report.text.strip()]
    parts += [markdown_table(*table) for table in report.tables]
    parts += [f"![{report.title}]({figure.name})" for figure in report.figures]
    if report.command:
        parts.append(f"    {report.command}" + ("\n\nmakes this from" if report.runs else ""))
    if report.runs:
        parts.append("\n".join(f"    {run}" for run in report.runs))
    if report.seconds:
        parts.append(f"in {report.seconds / 60:.1f} minutes of computing.")
    return "\n\n".join(parts) + "\n"


def write(folder: pathlib.Path, report: Report) -> pathlib.Path:
    """Writes ``NAME.md`` beside the figures.

    Args:
      folder: of the artefact; it must exist.
      report: a report.

    Returns:
      The path of the file.
    """
    path = folder / f"{report.name}.md"
    write_atomically(path, markdown(report))
    return path


def latex(report: Report) -> str:
    r"""Formats the tables of a report for ``\input`` in a LaTeX document.

    Args:
      report: a report.

    Returns:
      One ``tabular`` per table; see `bpnjax.run.writers.latex_table`.
    """
    return "\n".join(latex_table(*table) for table in report.tables)


def page(reports: Sequence[Report], back: tuple[str, str] | None = None) -> str:
    """Formats all reports as one HTML page without other files.

    Args:
      reports: in the order of the page; their figures are read from disk.
      back: address and text of a link above the menu.

    Returns:
      The page's text.
    """
    sections = [
        html_page.Section(
            report.name, report.title, report.text, report.tables,
            [(figure, report.title) for figure in report.figures],
            [command for command in (report.command, *report.runs) if command],
            f"{report.seconds / 60:.1f} minutes of computing." if report.seconds else "",
        )
        for report in reports
    ]  # fmt: skip
    title = "The results of the BPN paper (arXiv 2009.13954), run again"
    return html_page.page(title, sections, back)
