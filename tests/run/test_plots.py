"""Figures of a run show what its result file says, and leave the user's own alone."""

import copy
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from command import one_line

from bpnjax.methods import REGISTRY
from bpnjax.paper import drawing
from bpnjax.run import plots, style


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn from now on."""
    figures, real = [], plots.new_figure

    def new_figure(*args, **kwargs):
        figure, axes = real(*args, **kwargs)
        figures.append(figure)
        return figure, axes

    monkeypatch.setattr(plots, "new_figure", new_figure)
    return figures


def matrix(tasks, rows):
    """An accuracy matrix of one seed as in ``result.json``; only some rows were tested."""
    return [
        [
            [(10 * i + j) / 200 if i in rows and j <= i else None for j in range(tasks)]
            for i in range(tasks)
        ]
    ]


def result(tasks, **rows):
    every = range(tasks)
    return {
        "name": "mine", "method": "bd_ewc", "num_seeds": 1,
        "accuracy": {
            kind: matrix(tasks, rows.get(kind, every))
            for kind in ("task_told", "task_masked", "task_inferred")
        },
    }  # fmt: skip


TITLES = {kind: title for kind, (title, _) in style.KINDS.items()}


def panels(figure):
    """The panels by their title: numbers in the image, and the labels of both axes."""
    found = {}
    for axis in figure.axes:
        if axis.get_title():
            shown = np.ma.filled(axis.images[0].get_array().astype(float), np.nan)
            below, above = sorted(axis.get_ylim())
            at = zip(axis.get_yticks(), axis.get_yticklabels(), strict=True)
            labels = [(y, label.get_text()) for y, label in at if below <= y <= above]
            visible = [label.get_visible() for label in axis.get_yticklabels()]
            columns = [label.get_text() for label in axis.get_xticklabels()]
            found[axis.get_title()] = (shown, labels, columns, visible)
    return found


@pytest.mark.parametrize(
    ("tasks", "inferred"),
    [
        (4, range(4)),  # all rows are tested
        (4, [3]),  # evaluate.inferred_rows=last
        (4, [1, 3]),
        (30, [9, 29]),
    ],
)
def test_each_panel_of_the_accuracies_has_its_own_rows(drawn, tmp_path, tasks, inferred):
    """What is drawn in a row is what was measured after the task that the row is labelled with."""
    content = result(tasks, task_inferred=inferred)
    path = plots.accuracy_matrix(tmp_path, content)
    assert path.read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    found = panels(figure)
    assert list(found) == list(TITLES.values())
    for kind, title in TITLES.items():
        shown, labels, columns, visible = found[title]
        rows = list(inferred if kind == "task_inferred" else range(tasks))
        every = 2 if len(rows) > 20 else 1
        assert labels == [(y, str(row + 1)) for y, row in enumerate(rows)][::every]
        assert all(visible)
        expected = np.array(content["accuracy"][kind][0], float)[rows]
        np.testing.assert_array_equal(shown, expected)
        assert columns[0] == "1" and columns[1] == ("2" if tasks <= 20 else "3")


def test_numbers_in_the_cells_are_those_of_the_matrix(drawn, tmp_path):
    content = result(3, task_inferred=[2])
    plots.accuracy_matrix(tmp_path, content)
    texts = {
        axis.get_title(): [(t.get_position(), t.get_text()) for t in axis.texts]
        for axis in drawn[0].axes
        if axis.get_title()
    }
    for kind, title in TITLES.items():
        cells = texts[title]
        values = np.array(content["accuracy"][kind][0], float)
        rows = [2] if kind == "task_inferred" else [0, 1, 2]
        assert cells == [
            ((j, y), f"{values[row, j]:.2f}") for y, row in enumerate(rows) for j in range(row + 1)
        ]


def test_means_over_seeds_are_drawn(drawn, tmp_path):
    content = result(3)
    for kind, one in content["accuracy"].items():
        other = copy.deepcopy(one[0])
        other[2][0] = 0.9
        content["accuracy"][kind] = [one[0], other]
    content["num_seeds"] = 2
    plots.accuracy_matrix(tmp_path, content)
    shown = panels(drawn[0])[TITLES["task_told"]][0]
    assert shown[2, 0] == pytest.approx((0.1 + 0.9) / 2)
    assert "mean of 2 seeds" in drawn[0].get_suptitle()


def test_figures_can_be_drawn_again_from_the_files(finished, tmp_path, drawn):
    """`bpnjax plots` needs the folder of a run and nothing else."""
    content = json.loads((finished.workdir / "result.json").read_text())
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text((finished.workdir / "metrics.jsonl").read_text())
    paths = plots.draw(folder, content)
    assert [path.name for path in paths] == ["accuracy_matrix.png", "learning_curves.png"]
    shown = panels(drawn[0])[TITLES["task_told"]][0]
    np.testing.assert_array_equal(shown, np.array(content["accuracy"]["task_told"][0], float))


def test_the_command_draws_them(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("result.json", "metrics.jsonl"):
        (folder / name).write_bytes((finished.workdir / name).read_bytes())
    assert plots.run([str(folder)]) == 0
    made = [folder / "accuracy_matrix.png", folder / "learning_curves.png"]
    assert capsys.readouterr().out.split() == [str(path) for path in made]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)
    (folder / "result.json").unlink()
    assert plots.run([str(folder)]) == 2
    one_line(capsys.readouterr().err, "run: no result.json in it; name the folder of a complete")
    assert plots.run(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: bpnjax plots DIR")


def test_seeds_that_a_line_lacks_are_left_out_of_the_mean(drawn, tmp_path):
    """As of seeds that were added later with other checkpoints (`bpnjax.run.more_seeds`)."""
    lines = [
        {"kind": "train", "total_steps": step, "loss": loss}
        for step, loss in ((1, [3.0, None]), (2, [1.0, 2.0]))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plots.learning_curves(tmp_path, result(12))
    assert drawn[0].axes[0].lines[0].get_ydata().tolist() == [3.0, 1.5]


@pytest.mark.parametrize(("tasks", "numbers"), [(12, 12 * 13 // 2), (13, 0)])
def test_numbers_only_where_they_can_be_read(drawn, tmp_path, tasks, numbers):
    plots.accuracy_matrix(tmp_path, result(tasks))
    assert {len(axis.texts) for axis in drawn[0].axes if axis.get_title()} == {numbers}


def test_a_hundred_tasks_have_few_ticks(drawn, tmp_path):
    plots.accuracy_matrix(tmp_path, result(100))
    for _, labels, columns, _ in panels(drawn[0]).values():
        assert len(labels) == len(columns) == 20 and labels[1] == (5, "6")


def compared(method, average, *, seeds=2, replay=0):
    """A result of three tasks of which the second was not tested."""
    found = {"mean": average, "sd": 0.01 if seeds > 1 else None}
    accuracy = [[[0.9, None, None], [None] * 3, [0.1 * s, 0.5, 0.6]] for s in range(seeds)]
    return {
        "name": "mine", "method": method, "num_seeds": seeds, "class_names": [["a"]] * 3,
        "accuracy": {"task_told": accuracy},
        "summary": {k: {"average_accuracy": found, "forgetting": found} for k in style.KINDS},
        "memory": {"core_parameters": 10, "bytes_per_task": 4, "replay_bytes": replay},
        "time": {"train_seconds": 2.0},
    }  # fmt: skip


def test_forgetting_curve_bytes_and_time(drawn, tmp_path):
    """The curves are the matrix's first column and the means of its rows; bands are one sd."""
    results = [compared("bd_ewc", 0.8), compared("mine", 0.4, replay=1000)]
    paths = plots.comparison(tmp_path, results)
    assert [path.name for path in paths] == [
        "compare.png", "forgetting.png", "bytes.png", "time.png"
    ]  # fmt: skip
    for path in paths:
        assert path.with_suffix(".svg").read_text().startswith("<?xml")
        assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    left, right = drawn[1].axes
    line = left.lines[0]
    assert (line.get_label(), line.get_color()) == ("BD+EWC", style.METHODS["bd_ewc"].color)
    np.testing.assert_allclose(line.get_xydata(), [[1, 0.9], [3, 0.05]])
    np.testing.assert_allclose(right.lines[0].get_xydata(), [[1, 0.9], [3, (1.1 + 0.05) / 3]])
    edge = left.collections[0].get_paths()[0].vertices[:, 1]
    assert edge.min() == pytest.approx(0.05 - 0.1 / np.sqrt(2))
    points = [line.get_xydata()[0].tolist() for line in drawn[2].axes[0].lines[::2]]
    assert points[0] == [4 * 10 + 3 * 4, 0.8]
    legend = [text.get_text() for text in drawn[3].legends[0].get_texts()]
    assert legend == ["BD+EWC", "mine"]


def test_a_figure_has_the_same_bytes_each_time(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        plots.forgetting(tmp_path / folder / "f.png", [compared("psp", 0.5)])
    for suffix in ("png", "svg", "pdf"):
        one, other = ((tmp_path / f / f"f.{suffix}").read_bytes() for f in ("a", "b"))
        assert one == other


def test_each_method_has_a_name_a_colour_and_a_place():
    assert set(style.METHODS) == set(REGISTRY)
    looks = list(style.METHODS.values())
    assert (
        len({look.display for look in looks}) == len({look.color for look in looks}) == len(looks)
    )
    assert drawing.color("GEM(256)") == drawing.color("gem") and drawing.color("mine") is None


# Machado, Oliveira and Fernandes 2009: what people without one kind of cone see, in linear RGB.
BLIND = {
    "to nothing": np.eye(3),
    "to green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                 [-0.011820, 0.042940, 0.968881]],
    "to red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
               [-0.003882, -0.048116, 1.051998]],
}  # fmt: skip


def lab(color, matrix):
    """CIE Lab of a colour as it is seen."""
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(matrix) @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(np.array(to_xyz) @ linear / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("kind", BLIND)
def test_the_methods_of_the_paper_differ_for_colour_blind_readers(kind):
    """15 is about six times the smallest difference that is seen side by side."""
    names = ("stl", "sgd", "ewc", "psp", "bd_ewc", "bd_psp", "gd_ewc", "gem", "er")
    seen = {name: lab(style.METHODS[name].color, BLIND[kind]) for name in names}
    for one, other in itertools.combinations(names, 2):
        assert np.linalg.norm(seen[one] - seen[other]) > 15, (one, other)
    kinds = [lab(color, BLIND[kind]) for _, color in style.KINDS.values()]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(kinds, 2)) > 25


def test_the_users_matplotlib_is_left_alone(finished, tmp_path):
    """Backend and settings are the user's, in a notebook say; pyplot is not even imported."""
    program = f"""
import json, pathlib, sys
import matplotlib
matplotlib.rcParams["lines.linewidth"] = 7.0
settings = dict(matplotlib.rcParams)
from bpnjax.run import plots
from bpnjax.paper import drawing
source = pathlib.Path({str(finished.workdir)!r})
result = json.loads((source / "result.json").read_text())
(pathlib.Path("metrics.jsonl")).write_bytes((source / "metrics.jsonl").read_bytes())
plots.draw(pathlib.Path("."), result)
plots.comparison(pathlib.Path("."), [result])
with drawing.panels(pathlib.Path("p.png"), 1, 1, (2, 2)) as axes:
    axes[0].plot([0, 1])
assert "matplotlib.pyplot" not in sys.modules
assert dict(matplotlib.rcParams) == settings
assert matplotlib.get_backend().lower() == "svg"
"""
    env = os.environ | {"MPLBACKEND": "svg"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert all(
        (tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("compare.png", "p.png")
    )
