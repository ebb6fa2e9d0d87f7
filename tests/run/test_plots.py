"""Figures of a run show what its result file says, and leave the user's own alone."""

import copy
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from command import one_line

from bpnjax.run import plots


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
    assert list(found) == ["task_told", "task_masked", "task_inferred"]
    for kind, (shown, labels, columns, visible) in found.items():
        rows = list(inferred if kind == "task_inferred" else range(tasks))
        assert labels == [(y, str(row + 1)) for y, row in enumerate(rows)]
        assert all(visible)
        expected = np.array(content["accuracy"][kind][0], float)[rows]
        np.testing.assert_array_equal(shown, expected)
        assert columns[0] == "1" and columns[1] == ("2" if tasks <= 20 else "11")


def test_numbers_in_the_cells_are_those_of_the_matrix(drawn, tmp_path):
    content = result(3, task_inferred=[2])
    plots.accuracy_matrix(tmp_path, content)
    texts = {
        axis.get_title(): [(t.get_position(), t.get_text()) for t in axis.texts]
        for axis in drawn[0].axes
        if axis.get_title()
    }
    for kind, cells in texts.items():
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
    shown = panels(drawn[0])["task_told"][0]
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
    shown = panels(drawn[0])["task_told"][0]
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
plots.comparison(pathlib.Path("c.png"), [result])
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
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("c.png", "p.png"))
