"""The comparison command: a row for each method, also for one that fails."""

import csv
import json

import pytest

from bpnjax import compare
from bpnjax.methods import REGISTRY
from bpnjax.run import train

pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture
def flags(tiny_flags):
    return [*tiny_flags(model__hidden="(8,)", train__epochs=1), "--num_seeds=2"]


def test_table_picture_and_files(flags, tmp_path, capsys):
    folder = tmp_path / "out"
    assert compare.run([*flags, "--methods=sgd, psp", f"--workdir={folder}"]) == 0
    out = capsys.readouterr().out
    rows = list(csv.DictReader((folder / "compare.csv").open()))
    assert [row["method"] for row in rows] == ["sgd", "psp"]
    result = json.loads((folder / "psp" / "result.json").read_text())
    told = result["summary"]["task_told"]["average_accuracy"]
    assert float(rows[1]["task_told_average_accuracy_mean"]) == pytest.approx(
        told["mean"], abs=1e-6
    )
    assert float(rows[1]["task_told_average_accuracy_sd"]) == pytest.approx(told["sd"], abs=1e-6)
    assert f"{told['mean']:.4f} ± {told['sd']:.4f}" in out
    text = (folder / "compare.md").read_text()
    assert "| `sgd` |" in text and "--methods=sgd, psp" in text and str(tmp_path) not in text
    assert (folder / "compare.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_complete_is_not_run_again(flags, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    assert compare.run([*flags, "--methods=sgd", f"--workdir={folder}"]) == 0
    ran = []
    real = train.train_and_evaluate
    monkeypatch.setattr(
        train, "train_and_evaluate", lambda c, *more: ran.append(c.method) or real(c, *more)
    )
    assert compare.run([*flags, "--methods=sgd,ewc", f"--workdir={folder}"]) == 0
    assert ran == ["ewc"]


def test_a_method_that_fails_has_a_row_and_the_others_go_on(flags, tmp_path, monkeypatch, capsys):
    real = train.train_and_evaluate

    def breaks(config, *more):
        if config.method == "sgd":
            raise RuntimeError("out of | luck\nsecond line")
        return real(config, *more)

    monkeypatch.setattr(train, "train_and_evaluate", breaks)
    folder = tmp_path / "out"
    assert compare.run([*flags, "--methods=sgd,psp", f"--workdir={folder}"]) == 1
    assert "failed: RuntimeError: out of / luck |" in capsys.readouterr().out
    rows = list(csv.DictReader((folder / "compare.csv").open()))
    assert rows[0]["error"] == "RuntimeError: out of | luck" and rows[1]["error"] == ""


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--methods=bd_ewcc"], "did you mean bd_ewc"),
        ([], f"--methods: missing; name some of: all, {', '.join(REGISTRY)}\n"),
        (["--methods=sgd", "--num_seeds=x"], "--num_seeds: 'x' is no number"),
        (["--methods=sgd", "--config.train.epochs=0"], "train.epochs: 0 is below 1"),
        (["--methods=sgd", "--config.ewc.strength=-1"], "ewc.strength: -1.0 is below 0"),
    ],
)
def test_bad_input(tiny_flags, tmp_path, capsys, arguments, message):
    assert compare.run([*tiny_flags(), *arguments, f"--workdir={tmp_path / 'w'}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "w").exists()
