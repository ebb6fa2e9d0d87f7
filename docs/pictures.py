"""The drawings of the site, and the comparison on the digits with its result file.

python docs/pictures.py             draws step.svg, protection.svg and accuracies.svg
python docs/pictures.py --digits    runs four methods first, about a minute; writes
                                    docs/results/digits.json, its page and its figure
"""

import json
import pathlib
import sys

import numpy as np

from bpnjax import compare
from bpnjax import config as configuration
from bpnjax.paper import pages
from bpnjax.paper.report import Report
from bpnjax.run import plots, style

DOCS = pathlib.Path(__file__).resolve().parent
BLUE, _, WINE = (color for _, color in style.KINDS.values())
GREEN = style.METHODS["ewc"].color
METHODS = ("sgd", "ewc", "bd_ewc", "bd_psp")
COMMAND = "bpnjax compare --config=digits --methods=" + ",".join(METHODS) + " --num_seeds=5"


def arrow(axis, start, end, color, **options):
    """An arrow from one point to another."""
    look = {"arrowstyle": "-|>", "color": color, "lw": 1.6, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", end, start, arrowprops=look | options)


@style.applied()
def step():
    """BD's step: the signs of the gradient, in a length that falls with the steps of the task."""
    figure, (left, right) = style.new_figure(1, 2, (9, 3.4))
    side = np.linspace(-1, 3, 60)
    x, y = np.meshgrid(side, side)
    levels = [0.1, 0.5, 1.2, 2.5, 4.5, 7]
    left.contour(x, y, (x - 1.6) ** 2 + 3 * (y - 1.2) ** 2, levels, colors="0.75", linewidths=0.8)
    gradient = np.array([2 * (0 - 1.6), 6 * (0 - 1.2)])
    sign, plain = -0.8 * np.sign(gradient), -0.8 * np.sqrt(2) * gradient / np.linalg.norm(gradient)
    arrow(left, (0, 0), sign, BLUE)
    arrow(left, (0, 0), plain, "0.45")
    left.text(sign[0] + 0.06, sign[1] - 0.16, "BD: - sign(gradient)", color=BLUE)
    left.text(plain[0] - 0.08, plain[1] + 0.06, "- gradient", color="0.35", ha="right")
    left.plot(1.6, 1.2, "*", color=WINE, ms=10)
    left.text(1.7, 1.28, "smallest loss", color=WINE)
    left.set(xlabel="first entry of M", ylabel="second entry of M", xlim=(-1, 3), ylim=(-0.8, 2.6))
    left.set_title("direction: every entry moves by the same length")
    count = np.arange(200)
    right.plot(count, 0.2 / np.sqrt(1 + count), color=BLUE)
    right.set(xlabel="steps of the task so far, t", ylabel="length of the step / r", ylim=(0, 0.21))
    right.text(40, 0.1, "epsilon / sqrt(1 + t)\nwith epsilon = 0.2", color=BLUE)
    right.set_title("length: no learning rate scales it")
    style.save(figure, DOCS / "step.svg", (".svg",))


@style.applied()
def protection():
    """EWC's penalty in the plane of two weights, and two keys before one layer."""
    figure, (left, right) = style.new_figure(1, 2, (9, 3.4))
    x, y = np.meshgrid(np.linspace(-2.2, 3.2, 200), np.linspace(-1.6, 2.6, 200))
    first, second = 0.25 * x**2 + 4 * y**2, (x - 2) ** 2 + (y - 1.6) ** 2
    left.contourf(x, y, first, [0, 1], colors=["#CFE3F1"])
    left.contourf(x, y, second, [0, 0.9], colors=["#FBE6BC"], alpha=0.8)
    left.plot(0, 0, "o", color=BLUE)
    left.text(-2.1, -0.75, "task 1 answers well", color=BLUE)
    left.text(1.25, 2.25, "task 2 answers well", color="#9A6A00")
    arrow(left, (0, 0), (2, 1.6), "0.5")
    left.text(0.2, 1.1, "SGD: task 1\nis forgotten", color="0.35", ha="right")
    arrow(left, (0, 0), (1.75, 0.52), GREEN)
    left.text(1.9, 0.05, "EWC: stiff where\ntask 1 needs it", color=GREEN)
    left.set(xlabel="a weight task 1 does not need", ylabel="a weight task 1 needs",
             xticks=[], yticks=[])  # fmt: skip
    left.set_title("EWC: one set of weights, pulled back")
    keys = {"key of task 1": ([1, -1, 1, 1, -1], BLUE), "key of task 2": ([-1, -1, 1, -1, 1], WINE)}
    for row, (name, (signs, color)) in enumerate(keys.items()):
        base = 2.0 - 1.7 * row
        right.text(-0.1, base + 0.25, f"image x\ntimes {name}", ha="right", va="center")
        for place, s in enumerate(signs):
            box = {"facecolor": color if s > 0 else "white", "edgecolor": color}
            right.add_patch(rectangle((place * 0.55, base), 0.5, 0.5, **box))
            right.text(place * 0.55 + 0.25, base + 0.25, "+" if s > 0 else "-", ha="center",
                       va="center", color="white" if s > 0 else color, fontsize=11)  # fmt: skip
        arrow(right, (2.95, base + 0.25), (3.75, 1.45 if row == 0 else 1.05), color)
    right.add_patch(rectangle((3.85, 0.75), 1.5, 1.0, facecolor="#EEEEEE", edgecolor="0.4"))
    right.text(4.6, 1.25, "the same\nweights W", ha="center", va="center")
    right.set(xlim=(-2.3, 5.6), ylim=(-0.3, 3.1))
    right.axis("off")
    right.set_title("PSP: each task multiplies its inputs by a key")
    style.save(figure, DOCS / "protection.svg", (".svg",))


def rectangle(corner, width, height, **look):
    """A filled rectangle."""
    from matplotlib.patches import Rectangle

    return Rectangle(corner, width, height, **look)


@style.applied()
def accuracies():
    """An image of a 2, of task 2: which classes take part, and which mode is active."""
    figure, axes = style.new_figure(1, 4, (9.4, 3.0), sharey=True)
    in_mode_2 = [0.08, 0.05, 0.36, 0.09, 0.42]
    in_mode_1 = [0.62, 0.29, 0.04, 0.02, 0.03]
    panels = [
        ("told\nmode 2, all classes", in_mode_2, range(5), "answer 4, wrong"),
        ("told, masked\nmode 2, classes 2 and 3", in_mode_2, (2, 3), "answer 2, right"),
        ("not told (inferred)\nmode 1: entropy 0.97", in_mode_1, range(5), "surest: 0, wrong"),
        ("not told (inferred)\nmode 2: entropy 1.30", in_mode_2, range(5), "not taken"),
    ]  # fmt: skip
    for axis, (title, shares, taking_part, answer) in zip(axes, panels, strict=True):
        best = max(taking_part, key=lambda c: shares[c])
        for c, share in enumerate(shares):
            color = BLUE if c == best and answer != "not taken" else "0.7"
            hidden = c not in taking_part
            axis.bar(c, share, color="white" if hidden else color, edgecolor="0.7")
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(5), ["0", "1", "2", "3", "4"])
        axis.set_xlabel(f"class\n{answer}")
        axis.set_ylim(0, 0.75)
        axis.text(0.5, 0.68, "task 1", ha="center", color="0.4", fontsize=8)
        axis.text(2.5, 0.68, "task 2", ha="center", color="0.4", fontsize=8)
        axis.axvline(1.5, color="0.85", lw=0.8, zorder=0)
        axis.axvline(3.5, color="0.85", lw=0.8, zorder=0)
    axes[0].set_ylabel("probability of each class")
    style.save(figure, DOCS / "accuracies.svg", (".svg",))


def digits():
    """Four methods on the digits, 5 seeds: the result file, the page and the forgetting curve."""
    config = configuration.load_file("digits")
    config.num_seeds = 5
    rows = compare.run_all(config, METHODS, DOCS.parent / "runs" / "digits-pictures", False)
    results = [row.result for row in rows]
    home = DOCS / "compare" / "digits"
    home.mkdir(exist_ok=True)
    figure = plots.forgetting(home / "forgetting.png", results)
    for suffix in (".svg", ".pdf"):  # the pages show the other
        figure.with_suffix(suffix).unlink()
    text = f"{compare.LEGEND}\n\nMade by `python docs/pictures.py --digits`."
    table = (list(compare.HEADER), compare.cells(rows))
    made = Report("digits", "digits, 5 seeds", text, [table], [figure], COMMAND, [], 0.0)
    found = pages.record(made) | {"page": "docs/compare/digits/compare.md"}
    file = DOCS / "results" / "digits.json"
    file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    step()
    protection()
    accuracies()
    if "--digits" in sys.argv[1:]:
        digits()
        pages.render(DOCS.parent, check=False)
