"""The comparison command: a row for each method, also for one that fails."""

import csv
import json
import re

import pytest
from command import ROOT, contents, one_line

from bpnjax import compare
from bpnjax.methods import REGISTRY
from bpnjax.run import train

pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture
def flags(tiny_flags):
    return [*tiny_flags(model__hidden="(8,)", train__epochs=1), "--num_seeds=2"]


def test_table_figure_and_files(flags, tmp_path, capsys):
    folder = tmp_path / "out"
    assert compare.run([*flags, "--methods=sgd, psp", "--latex", f"--workdir={folder}"]) == 0
    out = capsys.readouterr().out
    rows = list(csv.DictReader((folder / "compare.csv").open()))
    assert [row["method"] for row in rows] == ["sgd", "psp"]
    result = json.loads((folder / "psp" / "result.json").read_text())
    told = result["summary"]["task_told"]["average_accuracy"]
    assert float(rows[1]["task_told_average_accuracy_mean"]) == pytest.approx(
        told["mean"], abs=1e-6
    )
    assert float(rows[1]["task_told_average_accuracy_sd"]) == pytest.approx(told["sd"], abs=1e-6)
    anytime = result["summary"]["task_inferred"]["average_incremental_accuracy"]
    column = "task_inferred_average_incremental_accuracy_mean"
    assert float(rows[1][column]) == pytest.approx(anytime["mean"], abs=1e-6)
    assert f"{told['mean']:.3f} ± {told['sd']:.3f}" in out
    table = out.splitlines()[:-1]
    assert table[0].split()[:5] == ["method", "told", "masked", "inferred", "forgetting"]
    assert max(map(len, table)) <= 80
    text = (folder / "compare.md").read_text()
    assert f"{told['mean']:.4f} ± {told['sd']:.4f}" in text and "bytes per task" in text
    assert "| `sgd` |" in text and "--methods=sgd, psp" in text and str(tmp_path) not in text
    for name in compare.FIGURES:
        assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG" and f"({name}.png)" in text
    page = (folder / "compare.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and "<td><code>psp</code></td>" in page
    assert "http" not in page and page.count("<th>") == len(compare.HEADER)
    latex = (folder / "compare.tex").read_text()
    assert f"\nPSP & {told['mean']:.4f} $\\pm$ {told['sd']:.4f} & " in latex


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
    out, err = capsys.readouterr()
    assert re.search(r"^sgd +failed +- ", out, re.MULTILINE)
    assert "bpnjax: sgd failed: RuntimeError: out of | luck\n" in err
    assert "failed: RuntimeError: out of / luck |" in (folder / "compare.md").read_text()
    rows = list(csv.DictReader((folder / "compare.csv").open()))
    assert rows[0]["error"] == "RuntimeError: out of | luck" and rows[1]["error"] == ""


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--methods=bd_ewcc"], "did you mean bd_ewc"),
        ([], f"--methods: missing; name some of: all, {', '.join(REGISTRY)}\n"),
        (["--methods=sgd", "--num_seeds=x"], "--num_seeds: 'x' is not a number"),
        (["--methods=sgd", "--config.train.epochs=0"], "train.epochs: 0 is below 1"),
        (["--methods=sgd", "--config.ewc.strength=-1"], "ewc.strength: -1.0 is below 0"),
    ],
)
def test_bad_input(tiny_flags, tmp_path, capsys, arguments, message):
    assert compare.run([*tiny_flags(), *arguments, f"--workdir={tmp_path / 'w'}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_no_method_is_run_unless_all_folders_can_be_used(flags, tmp_path, monkeypatch, capsys):
    """All conflicts are said at once; a mistake in the request comes before them."""
    folder = tmp_path / "out"
    assert compare.run([*flags, "--methods=sgd,psp", f"--workdir={folder}"]) == 0
    before = contents(folder)
    monkeypatch.setattr(train, "train_and_evaluate", None)
    changed = [*flags, "--methods=er,sgd,psp", f"--workdir={folder}", "--config.train.epochs=2"]
    capsys.readouterr()
    assert compare.run(changed) == 2
    error = capsys.readouterr().err
    one_line(error, "2 of 3 folders cannot be used: ", "train.epochs: 1 -> 2")
    for name in ("sgd", "psp"):
        assert f"{name}: --workdir: {folder / name} holds a run of another configuration" in error
    assert compare.run([*changed, "--config.train.batch_size=1000"]) == 2
    one_line(capsys.readouterr().err, "train.batch_size: 1000", "at most")
    assert contents(folder) == before


def test_all_is_every_method_of_the_table(tiny_flags, tmp_path, monkeypatch):
    """Bare parts, which protect nothing and are in no table, are run by name only."""
    asked = []
    monkeypatch.setattr(compare, "run_all", lambda c, names, *_: asked.append(names) or [])
    monkeypatch.setattr(compare, "write", lambda *_: None)
    monkeypatch.setattr(compare, "printed", lambda *_: "")
    assert compare.run([*tiny_flags(), "--methods=all", f"--workdir={tmp_path}"]) == 0
    table = (ROOT / "docs" / "methods.md").read_text().partition("\nEWC's")[0]
    first = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    listed = {name for cell in first for name in re.findall(r"`(\w+)`", cell)} & set(REGISTRY)
    assert set(asked[0]) == listed == set(REGISTRY) - set(compare.PARTS)
    for page in ("README.md", "docs/index.md"):
        assert f"compared with, {len(listed)} in all" in (ROOT / page).read_text()


def row(method, sd):
    entry = {"mean": 0.98769, "sd": sd}
    names = (
        "average_accuracy", "first_task_accuracy", "backward_transfer", "forgetting",
        "average_incremental_accuracy", "last_accuracy",
    )  # fmt: skip
    return compare.Row(
        method,
        {
            "summary": {kind: dict.fromkeys(names, entry) for kind in compare.ACCURACIES},
            "memory": {"bytes_per_task": 1234567, "replay_bytes": 7},
            "time": {"train_seconds": 1234.5},
        },
    )


@pytest.mark.parametrize(
    ("method", "sd", "last"),
    [
        ("psp", None, "training s"),
        ("psp", 0.01, "bytes/task"),
        ("bd_psp_ewc_kfac", 0.01, "forgetting"),
    ],
)
def test_the_printed_table_fits_80_columns(method, sd, last):
    """Columns at its end are left out; compare.md has them."""
    lines = compare.printed([row(method, sd), compare.Row("er", None, "x" * 200)]).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].endswith(f"  {last}")
    assert lines[2].split()[1] == ("0.9877" if sd is None else "0.988")
    assert set(lines[3].split()[2:]) == {"-"}


def test_a_full_disk_leaves_the_earlier_table(flags, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "out"
    command = [*flags, "--methods=sgd", f"--workdir={folder}"]
    assert compare.run(command) == 0
    before = (folder / "compare.md").read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bpnjax.run.plots.comparison", full)
    capsys.readouterr()
    assert compare.run([*command[:-2], "--methods=sgd,psp", command[-1]]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("bpnjax: [Errno 28] No space left") and "to resume" in error
    assert (folder / "compare.md").read_text() == before


def test_results_of_earlier_versions_have_no_anytime_accuracy():
    old = row("psp", 0.01)
    for summary in old.result["summary"].values():
        del summary["average_incremental_accuracy"], summary["last_accuracy"]
    cells = dict(
        zip(compare.HEADER, compare.markdown([old]).splitlines()[2].split("|")[1:-1], strict=True)
    )
    assert cells["anytime inferred"].strip() == cells["last inferred"].strip() == "-"
    table = list(csv.DictReader(compare.comma_separated([old]).splitlines()))
    assert table[0]["task_inferred_last_accuracy_mean"] == ""
    assert table[0]["task_inferred_average_accuracy_mean"] == "0.987690"
