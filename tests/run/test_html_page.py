"""The HTML report loads nothing; in a real browser its tables sort and nothing is cut."""

import html
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from command import ROOT
from PIL import Image

from bpnjax.paper import pages
from bpnjax.paper.__main__ import artefacts
from bpnjax.run import html_page, plots
from bpnjax.run.html_page import Section

WIDTHS = (1280, 390)  # a laptop and a phone
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
needs_browser = pytest.mark.skipif(
    not BROWSER, reason="no Chromium on this machine; install the package chromium"
)

# The page in a frame of the width that is asked for, since a window cannot be as narrow as a phone.
FRAME = """<!doctype html><body style="margin:0"><iframe src="page.html" width="{width}"
height="2000" style="border:0;display:block"></iframe><pre></pre><script>
onload = () => {{
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  const column = n => [...page.querySelectorAll("tbody tr")].map(r => r.cells[n].textContent);
  const found = {{wide: root.scrollWidth, orders: [column(0)]}};
  const inside = e => e.closest(".wide") || e.closest("pre");
  found.cut = [...page.querySelectorAll("main *, nav *")]
    .filter(e => !inside(e) && e.getBoundingClientRect().right > {width} + 1).map(e => e.tagName);
  if ({clicks}) for (const n of [1, 1, 0]) {{
    page.querySelectorAll("th button")[n].click();
    found.orders.push(column(0));
  }}
  document.querySelector("pre").textContent = JSON.stringify(found);
}};
</script>"""


def chromium(folder, *options):
    """What headless Chromium prints for the frame of a folder."""
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--allow-file-access-from-files", "--virtual-time-budget=5000",
        f"--user-data-dir={folder / 'profile'}", *options, f"file://{folder / 'frame.html'}",
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def shown(folder, page, width, clicks=False):
    """Measures of the page in the browser, and its screenshot as an array."""
    (folder / "page.html").write_text(page)
    frame = FRAME.format(width=width, clicks=str(clicks).lower())
    (folder / "frame.html").write_text(frame)
    found = re.search(r"<pre>(.*?)</pre>", chromium(folder, "--dump-dom"), re.DOTALL)[1]
    picture = folder / f"{width}.png"
    chromium(folder, f"--screenshot={picture}", f"--window-size={max(width, 500)},2000")
    kept = os.environ.get("BPNJAX_SCREENSHOTS")
    if kept:
        shutil.copy(picture, os.path.join(kept, f"report_{width}.png"))
    return json.loads(html.unescape(found)), np.asarray(Image.open(picture).convert("L"))


@pytest.fixture
def small(tmp_path):
    """A page of one table and one figure."""
    figure, axis = plots.new_figure(1, 1, (12, 3))
    axis.plot([0, 1])
    figure.savefig(tmp_path / "f.png")
    rows = [["b", "10 ± 1"], ["c", "-"], ["a", "9.5 ± 20"], ["`d`", "1,000"]]
    section = Section(
        "one", "A & B", "Some `code` and [words](elsewhere.md).", [(["name", "value"], rows)],
        [(tmp_path / "f.png", "A caption")], ["bpnjax run"], "The end.",
    )  # fmt: skip
    return html_page.page("Title <1>", [section], ("index.html", "back"))


def test_the_page_has_everything_in_it(small):
    """No address but the link back, no mark-up from texts, a menu entry for each section."""
    addresses = re.findall(r'(?:src|href)="([^"]+)"', small)
    assert [a for a in addresses if not a.startswith(("#", "data:"))] == ["index.html"]
    assert '<a href="#one">A &amp; B</a>' in small and '<section id="one">' in small
    assert "<h1>Title &lt;1&gt;</h1>" in small and "<code>code</code> and words." in small
    assert "url(" not in small and "@import" not in small


@needs_browser
@pytest.mark.parametrize("width", WIDTHS)
def test_tables_sort_and_nothing_is_cut(small, tmp_path, width):
    found, picture = shown(tmp_path, small, width, clicks=True)
    assert found["wide"] <= width and found["cut"] == []
    orders = ["".join(order) for order in found["orders"]]
    # By value up, down (what has no value last), and then by name.
    assert orders == ["bcad", "abdc", "dbac", "abcd"]
    assert picture.shape[0] == 2000 and picture[:, : width // 2].std() > 5


@needs_browser
@pytest.mark.parametrize("width", WIDTHS)
def test_the_report_of_the_site_fits(tmp_path, width):
    page = pages.report_page(ROOT, list(artefacts()))
    found, picture = shown(tmp_path, page, width)
    assert found["wide"] <= width and found["cut"] == []
    assert picture[:, :width].std() > 5
