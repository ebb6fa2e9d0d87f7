"""Seeds that are added to a complete run: what is left is what one run of all seeds leaves."""

import json
import shutil

import numpy as np
import pytest
from command import FILES, contents
from safetensors.numpy import load_file

import bpnjax
from bpnjax import compare, main
from bpnjax.run import more_seeds, train, workdir

pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture(scope="module")
def flags(tiny_flags):
    return tiny_flags(
        method="bd_psp", sequence__num_tasks=2, model__hidden="(8,)", log="csv",
        evaluate__every_epochs=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(flags, tmp_path_factory):
    """One seed, and three at once."""
    folder = tmp_path_factory.mktemp("seeds")
    for n in (1, 3):
        assert main.run([*flags, f"--config.num_seeds={n}", f"--workdir={folder / str(n)}"]) == 0
    return folder


@pytest.fixture
def one(runs, tmp_path):
    """A copy of the run of one seed."""
    return shutil.copytree(runs / "1", tmp_path / "run")


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def assert_equal_runs(found, expected):
    """The same files with the same content, but for times; arrays to the rounding of XLA."""
    assert sorted(p.name for p in found.iterdir()) == sorted(p.name for p in expected.iterdir())
    for name in ("config.json", "model.json"):
        assert json.loads((found / name).read_text()) == json.loads((expected / name).read_text())
    ours, theirs = result_of(found), result_of(expected)
    timed = ("time", "accuracy", "summary", "inference")
    assert {k: v for k, v in ours.items() if k not in timed} == {
        k: v for k, v in theirs.items() if k not in timed
    }
    # As of one seed in a program and three (tests/run/test_resume.py).
    for kind, matrix in theirs["accuracy"].items():
        a, b = (np.array(m, float) for m in (ours["accuracy"][kind], matrix))
        np.testing.assert_allclose(a, b, atol=0.03)
        for name, entry in theirs["summary"][kind].items():
            assert ours["summary"][kind][name] == pytest.approx(entry, abs=0.03)
    for path in expected.glob("model*.safetensors"):
        a, b = load_file(found / path.name), load_file(path)
        assert set(a) == set(b)
        for name, array in b.items():
            np.testing.assert_allclose(
                a[name].astype(float), array.astype(float), atol=1e-4, err_msg=name
            )
        assert bpnjax.load(found / path.name).metadata == bpnjax.load(path).metadata
    logs = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (found, expected)
    ]
    for a, b in zip(*logs, strict=True):
        assert set(a) == set(b) and a["total_steps"] == b["total_steps"]
        for name in ("loss", "task_told"):
            assert np.shape(a.get(name)) == np.shape(b.get(name))
    tables = [(folder / "metrics.csv").read_text().splitlines() for folder in (found, expected)]
    assert len(tables[0]) == len(tables[1])


def test_only_the_missing_seeds_are_run(flags, runs, one, capsys):
    before = result_of(one)
    seconds = before["time"]["train_seconds"]
    capsys.readouterr()
    command = [*flags, "--config.num_seeds=3", f"--workdir={one}"]
    assert main.run(command) == 0
    out, err = capsys.readouterr()
    assert "seeds 1 to 2; " in err.splitlines()[0]
    assert_equal_runs(one, runs / "3")
    after = result_of(one)
    for kind, matrix in before["accuracy"].items():
        assert after["accuracy"][kind][0] == matrix[0]
    assert after["time"]["train_seconds"] > seconds
    assert f"results in {one}\n" in out and "±" in out
    # It is complete, and may be raised again.
    left = contents(one)
    assert main.run(command) == 0 and "complete" in capsys.readouterr().out
    assert contents(one) == left
    assert main.run([*flags, "--config.num_seeds=4", f"--workdir={one}"]) == 0
    assert np.shape(result_of(one)["accuracy"]["task_told"]) == (4, 2, 2)
    assert bpnjax.load(one, seed=3).num_tasks == 2
    assert not (one / workdir.MORE_SEEDS).exists()


def test_later_tasks_go_on_from_all_seeds(runs, tiny_flags, tmp_path):
    """The joined checkpoint holds what a method keeps of each seed."""
    small = tiny_flags(method="ewc", sequence__num_tasks=2, model__hidden="(8,)", train__epochs=1)
    first = f"--workdir={tmp_path / 'first'}"
    for n in (1, 2):
        assert main.run([*small, f"--config.num_seeds={n}", first]) == 0
    longer = [*small, "--config.sequence.num_tasks=3", "--config.num_seeds=2"]
    source = f"--resume_from={tmp_path / 'first'}"
    assert main.run([*longer, source, f"--workdir={tmp_path / 'later'}"]) == 0
    assert np.shape(result_of(tmp_path / "later")["accuracy"]["task_told"]) == (2, 3, 3)


@pytest.mark.parametrize("place", ["training", "joining", "moving"])
def test_an_addition_that_was_cut_goes_on(flags, runs, one, monkeypatch, place, capsys):
    command = [*flags, "--config.num_seeds=3", f"--workdir={one}"]
    before = contents(one)
    calls = []

    def cut(real, at):
        def counted(*args, **kwargs):
            calls.append(0)
            if len(calls) == at:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return counted

    with monkeypatch.context() as patch:
        if place == "training":
            patch.setattr(train._Run, "test", cut(train._Run.test, 4))  # in the second task
        elif place == "joining":
            patch.setattr(more_seeds.results, "write_all", cut(train.results.write_all, 2))
        else:
            patch.setattr(workdir.pathlib.Path, "replace", cut_of_moves(one, calls))
        assert main.run(command) == 1
    if place != "moving":  # nothing but the added seeds was touched
        kept = {n: c for n, c in contents(one).items() if not n.startswith(workdir.MORE_SEEDS)}
        assert kept == before
        capsys.readouterr()
        assert main.run([*flags, "--config.num_seeds=1", f"--workdir={one}"]) == 0
        assert "complete" in capsys.readouterr().out
        assert main.run([*flags, "--config.num_seeds=2", f"--workdir={one}"]) == 2
        assert "is being extended to 3; end that with" in capsys.readouterr().err
    capsys.readouterr()
    assert main.run(command) == 0
    if place == "training":
        assert "going on at task 2" in capsys.readouterr().err
    assert_equal_runs(one, runs / "3")


def cut_of_moves(folder, calls):
    """`pathlib.Path.replace` that is interrupted at the fourth move out of the joined run."""
    real = workdir.pathlib.Path.replace

    def replace(path, target):
        if path.parent == folder / workdir.MORE_SEEDS / "joined" and not path.name.startswith("."):
            calls.append(path)
            if len(calls) == 4:
                raise KeyboardInterrupt
        return real(path, target)

    return replace


def test_fewer_seeds_are_refused(flags, runs, tmp_path, refused):
    shutil.copytree(runs / "3", tmp_path / "run")
    refused(
        [*flags, "--config.num_seeds=2", "--workdir=run"],
        "num_seeds: 2 asked for, and run holds 3; seeds are added", "ask for 3 or more", "--over",
    )  # fmt: skip


def test_a_run_that_is_not_complete_is_ended_first(flags, one, refused):
    (one / "result.json").unlink()
    refused(
        [*flags, "--config.num_seeds=2", f"--workdir={one}"],
        "num_seeds: 2 asked for", "a run of 1 that is not complete", "--config.num_seeds=1",
    )  # fmt: skip


def test_without_its_checkpoint_a_run_gets_no_seeds(flags, one, refused):
    """Said before anything is trained."""
    shutil.rmtree(one / "checkpoints")
    refused(
        [*flags, "--config.num_seeds=2", f"--workdir={one}"],
        "num_seeds: seeds are added to the last checkpoint", "has none that is whole",
    )  # fmt: skip


def test_other_changes_are_another_configuration(flags, one, refused):
    refused(
        [*flags, "--config.num_seeds=2", "--config.seed=1", f"--workdir={one}"],
        "another configuration (num_seeds: 1 -> 2; seed: 0 -> 1)",
    )


def test_overwrite_takes_no_seed_over(flags, one, tmp_path):
    (one / workdir.MORE_SEEDS).mkdir()
    (one / workdir.MORE_SEEDS / "config.json").write_text('{"seed": 1, "num_seeds": 7}')
    command = [*flags, "--config.num_seeds=2", "--config.train.epochs=1", f"--workdir={one}"]
    assert main.run([*command, "--overwrite"]) == 0
    left = {path.name for path in one.iterdir()}
    assert left == {*FILES, "metrics.csv", "model_seed_1.safetensors"}


def test_compare_raises_the_seeds_of_what_is_complete(flags, one, tmp_path):
    one.rename(tmp_path / "bd_psp")
    command = [*flags, "--methods=bd_psp", f"--workdir={tmp_path}", "--num_seeds=3"]
    assert compare.run(command) == 0
    assert result_of(tmp_path / "bd_psp")["num_seeds"] == 3


def test_lines_of_other_stretches_have_none_for_the_other_seeds():
    first = [
        {"kind": "train", "total_steps": 4, "loss": [1.0], "examples_per_second": 30.0},
        {"kind": "train", "total_steps": 8, "loss": [0.5], "examples_per_second": 30.0},
        {"kind": "evaluate", "total_steps": 8, "task_finished": True, "task_told": [[0.9]]},
    ]
    second = [
        {"kind": "train", "total_steps": 8, "loss": [0.4, 0.3], "examples_per_second": 20.0},
        {"kind": "evaluate", "total_steps": 8, "task_finished": True, "task_told": [[1], [0]]},
    ]
    joined = more_seeds.join_lines(first, second)
    assert [line.get("loss") for line in joined] == [[1.0, None, None], [0.5, 0.4, 0.3], None]
    assert joined[2]["task_told"] == [[0.9], [1], [0]]
    # Three seeds in the time of one at 30 and two at 20.
    assert joined[1]["examples_per_second"] == pytest.approx(3 / (1 / 30 + 2 / 20))
    assert joined[0]["examples_per_second"] == 30.0
