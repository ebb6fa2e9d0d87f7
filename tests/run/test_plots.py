"""Pictures of a run show what its result file says."""

import copy
import json

import numpy as np
import pytest
from matplotlib import pyplot

from bpnjax.run import plots


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn from now on, which are not closed."""
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    yield figures
    monkeypatch.undo()
    for figure in figures:
        pyplot.close(figure)


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
    """The panels by their title: numbers in the picture, and the labels of both axes."""
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


def test_pictures_can_be_drawn_again_from_the_files(finished, tmp_path, drawn):
    """`python -m bpnjax.run.plots` needs the folder of a run and nothing else."""
    content = json.loads((finished.workdir / "result.json").read_text())
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text((finished.workdir / "metrics.jsonl").read_text())
    paths = plots.draw(folder, content)
    assert [path.name for path in paths] == ["accuracy_matrix.png", "learning_curves.png"]
    shown = panels(drawn[0])["task_told"][0]
    np.testing.assert_array_equal(shown, np.array(content["accuracy"]["task_told"][0], float))
