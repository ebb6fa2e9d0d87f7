"""Pages and tables of the documentation, written from result files.

``docs/results/NAME.json`` holds the results of an artefact: its tables as text, the commands of its
runs, the commit, versions, machine and seeds. It gives the page ``docs/paper/NAME/NAME.md`` (or
another one that the file names) and every table in README and docs between the lines

    <!-- results: NAME/TABLE; rows A, B; columns X, Y -->
    <!-- end of results -->

So no result is written by hand. TABLE is a table's name, or its number on the page from 0. Without
rows and columns it is the whole table.

``docs/results/NAME.json`` may also be the ``search.json`` of a search, with its figures beside the
page.

    bpnjax paper --pages            writes them
    bpnjax paper --pages --check    lists those that differ
"""

import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from bpnjax.paper import report
from bpnjax.paper.report import Report, markdown
from bpnjax.run import results
from bpnjax.run.checkpoint import sha256, write_atomically
from bpnjax.run.writers import markdown_table, plain
from bpnjax.search import outcome
from bpnjax.utils.errors import UserError

__all__ = ["record", "render", "report_page", "save"]

_BLOCK = re.compile(
    r"(<!-- results: (?P<name>[\w-]+)/(?P<table>[\w-]+)(?:; rows (?P<rows>[^;>]*))?"
    r"(?:; columns (?P<columns>[^;>]*))? -->\n)(?P<body>.*?)"
    r"<!-- end of results -->", re.DOTALL,
)  # fmt: skip


def record(made: Report, num_seeds: int = 0) -> dict[str, Any]:
    """The content of a report's result file.

    Args:
      made: a report.
      num_seeds: the requested number; 0 for that of the artefact.

    Returns:
      A dict for JSON: the report, the sha256 of its figures, and the versions and machine.
    """
    return plain({
        "name": made.name,
        "page": f"docs/paper/{made.name}/{made.name}.md",
        "made": {
            "commit": results.commit(), "versions": results.versions(),
            "device": results.device_name(),
            "num_seeds": num_seeds or "as the artefact asks for",
        },
        "title": made.title,
        "text": made.text.strip(),
        "tables": [{"header": header, "rows": rows} for header, rows in made.tables],
        "ledger": {
            name: {"header": header, "rows": rows}
            for name, (header, rows) in made.ledger.items()
        },
        "figures": {path.name: sha256(path) for path in made.figures},
        "command": made.command,
        "runs": made.runs,
        "seconds": made.seconds,
    })  # fmt: skip


def save(path: pathlib.Path, made: Report, num_seeds: int = 0) -> None:
    """Writes a report's result file.

    Args:
      path: of the file; its folder must exist.
      made: a report.
      num_seeds: as in `record`.
    """
    text = json.dumps(record(made, num_seeds), indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, text)


def report_page(root: pathlib.Path, order: Sequence[str]) -> str:
    """Makes the report of the paper's artefacts as an HTML page for the site.

    Args:
      root: of the clone.
      order: names of artefacts. Those without a result file are left out.

    Returns:
      HTML; see `bpnjax.run.html_page`. A link above the menu leads to ``figures.html``.
    """
    reports = []
    for name in order:
        path = root / "docs" / "results" / f"{name}.json"
        if path.is_file():
            found = json.loads(path.read_text())
            reports.append(_report(found, (root / found["page"]).parent))
    return report.page(reports, ("../figures.html", "bpnjax: all figures"))


def render(root: pathlib.Path, check: bool) -> list[str]:
    """Writes all pages and tables of a clone from its result files.

    Args:
      root: of the clone.
      check: whether to write nothing.

    Returns:
      The files that differed, relative to the root, with a note if their figure is wrong.

    Raises:
      UserError: there are no result files, or a page asks for a table that no file has.

    Example:
      >>> import json, pathlib, tempfile
      >>> from bpnjax.paper import pages
      >>> root = pathlib.Path(tempfile.mkdtemp())
      >>> (root / "docs" / "results").mkdir(parents=True)
      >>> _ = (root / "docs" / "results" / "a.json").write_text(json.dumps(
      ...     {"ledger": {"best": {"header": ["method"], "rows": [["psp"]]}}}))
      >>> page = "<!-- results: a/best -->" + chr(10) + "<!-- end of results -->" + chr(10)
      >>> _ = (root / "README.md").write_text(page)
      >>> pages.render(root, check=True), pages.render(root, check=False)
      (['README.md'], ['README.md'])
      >>> pages.render(root, check=True)
      []
      >>> print((root / "README.md").read_text())
      <!-- results: a/best -->
      | method |
      |---|
      | psp |
      <!-- end of results -->
    """
    folder = root / "docs" / "results"
    files = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    if not files:
        raise UserError(f"--pages: no result files in {folder}; name the root of a clone")
    different = []
    for found in files.values():
        if "page" not in found:
            continue
        page = root / found["page"]
        search = "trials_differ_by" in found
        text = outcome.markdown(found) if search else markdown(_report(found, page.parent))
        different += _put(root, page, text, check)
        for name, digest in found["figures"].items():
            figure = page.parent / name
            if not figure.is_file() or sha256(figure) != digest:
                different.append(f"{figure.relative_to(root)} (not the figure of its result file)")
    for page in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]:
        if not page.is_file():
            continue
        text = page.read_text()

        def table(match: re.Match[str], page: pathlib.Path = page) -> str:
            name, which = match["name"], match["table"]
            found = files.get(name, {})
            own = found.get("ledger", {}).get(which)
            if which.isdecimal() and int(which) < len(found.get("tables", [])):
                own = found["tables"][int(which)]
            if own is None:
                raise UserError(
                    f"--pages: {page} asks for {name}/{which}, which no result file has; make it "
                    f"with --artefact={name}"
                )
            header, rows = _part(own, match["rows"], match["columns"], page)
            return f"{match[1]}{markdown_table(header, rows)}\n<!-- end of results -->"

        different += _put(root, page, _BLOCK.sub(table, text), check)
    return different


def _part(
    table: dict[str, Any], rows: str | None, columns: str | None, page: pathlib.Path
) -> tuple[list[str], list[list[str]]]:
    """Selects rows, by their first cells, and columns of a table, in the given order."""
    header, found = table["header"], table["rows"]
    if rows is not None:
        by_name = {row[0].strip("`"): row for row in found}
        found = [by_name.get(name.strip()) for name in rows.split(",")]
    wanted = header if columns is None else [name.strip() for name in columns.split(",")]
    if None in found or not set(wanted) <= set(header):
        raise UserError(
            f"--pages: {page} asks for rows {rows} or columns {columns} that are not there"
        )
    places = [header.index(name) for name in wanted]
    return wanted, [[row[place] for place in places] for row in found]


def _put(root: pathlib.Path, page: pathlib.Path, text: str, check: bool) -> list[str]:
    if page.is_file() and page.read_text() == text:
        return []
    if not check:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(page, text)
    return [str(page.relative_to(root))]


def _report(found: dict[str, Any], folder: pathlib.Path) -> Report:
    return Report(
        found["name"], found["title"], found["text"],
        [(table["header"], table["rows"]) for table in found["tables"]],
        [folder / name for name in found["figures"]],
        found["command"], found["runs"], found["seconds"],
    )  # fmt: skip
