"""A report as one HTML file that works offline: a menu, sortable tables, and embedded figures."""

import base64
import html
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = ["Section", "page"]


class Section(NamedTuple):
    """A part of a page with an entry in the menu."""

    name: str  # of its anchor
    title: str
    text: str  # paragraphs of Markdown, limited to code, bold text and links
    tables: Sequence[tuple[Sequence[str], Iterable[Sequence[str]]]]  # (header, rows)
    figures: Sequence[tuple[pathlib.Path, str]]  # (PNG file, caption)
    commands: Sequence[str]
    note: str = ""  # the last line


_STYLE = """
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;margin:0;color:#1c1c1c;background:#fff}
nav{background:#f3f5f7;padding:1rem}
nav ul{list-style:none;margin:0;padding:0}
nav a{display:block;padding:.15rem 0;color:#0b5a8a;text-decoration:none}
nav a:hover,nav a:focus{text-decoration:underline}
nav summary{font-weight:600;cursor:pointer}
main{padding:1rem;max-width:68rem;min-width:0}
h1{font-size:1.6rem;line-height:1.25}
h2{font-size:1.25rem;margin-top:2.5rem;border-top:1px solid #ddd;padding-top:1rem}
p,li{max-width:46rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;margin:1rem 0;font-size:.9rem}
td,th{border-bottom:1px solid #ddd;padding:.3rem .7rem;text-align:left;vertical-align:top}
td{font-variant-numeric:tabular-nums}
th{background:#f3f5f7;padding:0}
th button{font:inherit;font-weight:600;border:0;background:none;padding:.3rem .7rem;width:100%;
text-align:left;cursor:pointer;color:inherit}
th button:hover,th button:focus{background:#e2e8ee}
th[aria-sort=ascending] button::after{content:" \\25B2"}
th[aria-sort=descending] button::after{content:" \\25BC"}
figure{margin:1rem 0}img{max-width:100%;height:auto}
figcaption{color:#555;font-size:.9rem}
pre{background:#f3f5f7;padding:.7rem;overflow-x:auto;font-size:.85rem}
code{background:#f3f5f7;padding:0 .2em;overflow-wrap:anywhere}
@media(min-width:64rem){
body{display:grid;grid-template-columns:15rem minmax(0,1fr)}
nav{position:sticky;top:0;height:100vh;overflow-y:auto;padding:1.5rem 1rem}
main{padding:1rem 2rem}}
@media print{nav{display:none}}
"""

# Numbers sort by value (in "0.9 ± 0.1" by the first one), other cells as text. Empty cells and
# "-" come last. A second click reverses the order.
_SCRIPT = """
const value = cell => {
  const text = cell.textContent.trim().replace(/,/g, "");
  const found = text.match(/^[-+]?\\d*\\.?\\d+(e[-+]?\\d+)?/i);
  return found ? parseFloat(found[0]) : text === "-" || text === "" ? null : text;
};
const order = (a, b) =>
  typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
for (const button of document.querySelectorAll("th button"))
  button.addEventListener("click", () => {
    const head = button.parentNode, column = head.cellIndex;
    const down = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "ascending" : "descending");
    const body = head.closest("table").tBodies[0];
    const rows = [...body.rows].map(row => [value(row.cells[column]), row]);
    rows.sort(([a], [b]) =>
      a === null || b === null ? (a === null) - (b === null) : down ? order(a, b) : order(b, a));
    body.append(...rows.map(([, row]) => row));
  });
if (window.innerWidth < 1024) document.querySelector("nav details").open = false;
"""


def page(title: str, sections: Sequence[Section], back: tuple[str, str] | None = None) -> str:
    """Writes the page.

    Args:
      title: of the page.
      sections: in order; their figures are read from disk.
      back: address and text of a link above the menu.

    Returns:
      HTML that ends with a line feed. Style, script and figures are embedded.

    Raises:
      OSError: a figure cannot be read.

    Example:
      >>> from bpnjax.run.html_page import Section, page
      >>> "<h1>Two</h1>" in page("Two", [Section("one", "One", "A text.", [], [], [])])
      True
    """
    links = "".join(
        f'<li><a href="#{s.name}">{html.escape(s.title)}</a></li>' for s in sections
    )  # fmt: skip
    above = f'<p><a href="{back[0]}">{html.escape(back[1])}</a></p>' if back else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body>"
        f"<nav>{above}<details open><summary>Contents</summary><ul>{links}</ul></details></nav>\n"
        f"<main><h1>{html.escape(title)}</h1>\n{''.join(map(_section, sections))}</main>\n"
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


def _section(section: Section) -> str:
    parts = [f'<section id="{section.name}"><h2>{html.escape(section.title)}</h2>']
    parts += [f"<p>{_inline(p)}</p>" for p in section.text.strip().split("\n\n") if p.strip()]
    parts += [
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for path, caption in section.figures
    ]
    parts += [_table(*table) for table in section.tables]
    if section.commands:
        parts.append(f"<pre>{html.escape(chr(10).join(section.commands))}</pre>")
    if section.note:
        parts.append(f"<p>{html.escape(section.note)}</p>")
    return "\n".join([*parts, "</section>\n"])


def _inline(text: str) -> str:
    """Formats code, bold text and links as HTML."""
    text = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", html.escape(text, quote=False))
    text = text.replace(" ± ", "\u00a0±\u00a0")  # no line break around it
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th><button type="button">{_inline(c)}</button></th>' for c in header)
    body = "".join(f"<tr>{''.join(f'<td>{_inline(c)}</td>' for c in row)}</tr>\n" for row in rows)
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )
