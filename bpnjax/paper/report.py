"""What an artefact leaves: Markdown with a table, a figure, the commands; and one page of all."""

import base64
import html
import pathlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from bpnjax.run.checkpoint import write_atomically
from bpnjax.run.writers import markdown_table, number

CLOSE = 0.02  # a figure is reproduced within this, or above


class Cell(NamedTuple):
    """One figure beside the paper's.

    ``mean`` (None where it was not measured) and ``sd`` (n - 1; None for one seed) are ours;
    ``paper`` is None where it has none.
    """

    label: str
    mean: float | None
    sd: float | None
    paper: float | None = None


class Report(NamedTuple):
    """An artefact, made."""

    name: str
    title: str
    text: str  # what it shows and what we found, Markdown without headings
    tables: list[tuple[list[str], list[list[str]]]]  # header and rows
    figures: list[pathlib.Path]
    command: str
    runs: list[str]  # the commands of its runs
    seconds: float
    ledger: Mapping[str, tuple[list[str], list[list[str]]]] = MappingProxyType({})  # for README


def state(mean: float | None, paper: float | None) -> str:
    """Whether a figure agrees with the paper's.

    Args:
      mean: ours, None if it was not measured.
      paper: theirs, None if they give none.

    Returns:
      ``"-"``, ``"reproduced"`` (within 0.02), ``"reproduced, higher"`` or ``"differs"``. Where the
      paper has 0, that a method fails, higher is different.

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
    """A table of figures with the paper's, the difference and the state.

    Args:
      cells: a row each.
      what: the head of the first column.

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
    """A report as Markdown; figures are beside the file.

    Args:
      report: an artefact, made.

    Returns:
      Lines of text, the last with a line feed.
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
      folder: of the artefact; must exist.
      report: an artefact, made.

    Returns:
      The file's path.
    """
    path = folder / f"{report.name}.md"
    write_atomically(path, markdown(report))
    return path


_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;
color:#222}table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #ccc;
padding:.25rem .6rem;text-align:left}img{max-width:100%}pre{background:#f5f5f5;padding:.6rem;
overflow-x:auto}nav a{margin-right:1rem}"""


def page(reports: list[Report]) -> str:
    """All reports as one self-contained HTML page, figures included.

    Args:
      reports: in the order of the page; their figures are read from disk.

    Returns:
      The page's text.
    """
    sections = []
    for report in reports:
        text = "".join(f"<p>{html.escape(p)}</p>" for p in report.text.strip().split("\n\n"))
        tables = "".join(_html_table(*table) for table in report.tables)
        figures = "".join(
            f'<img alt="{html.escape(report.title)}" src="data:image/png;base64,'
            f'{base64.b64encode(figure.read_bytes()).decode()}">'
            for figure in report.figures
        )
        commands = html.escape("\n".join([report.command, "", *report.runs]))
        sections.append(
            f'<section id="{report.name}"><h2>{html.escape(report.title)}</h2>{text}{tables}'
            f"{figures}<pre>{commands}</pre>"
            f"<p>{report.seconds / 60:.1f} minutes of computing.</p></section>"
        )
    links = "".join(f'<a href="#{r.name}">{html.escape(r.name)}</a>' for r in reports)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>bpnjax: the paper's results</title><style>{_STYLE}</style></head><body>"
        "<h1>The results of the BPN paper (arXiv 2009.13954), run again</h1>"
        f"<nav>{links}</nav>{''.join(sections)}</body></html>\n"
    )


def _html_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    def line(cells: Iterable[str], tag: str) -> str:
        inside = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        return f"<tr>{inside}</tr>"

    return f"<table>{line(header, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
