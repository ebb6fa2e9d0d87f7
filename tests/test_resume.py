"""A run that was cut and started again equals one that was never cut, bit for bit."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from bpnjax import main, methods, plots, train

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = 7  # between checkpoints: divides neither an epoch's 9 steps nor a task's 18

pytestmark = pytest.mark.usefixtures("compile_once")


class Cut(Exception):
    """Stands for whatever ends a process."""


def checkpoints(workdir):
    """The positions of the finished checkpoints, (task, epoch, step) counted from 0."""
    names = [path.stem for path in (workdir / "checkpoints").glob("*.json")]
    return sorted(tuple(map(int, name.split("-"))) for name in names)


def left(workdir):
    """All that a run computed: accuracies, metrics without times, arrays of every seed."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    for line in lines:
        line.pop("examples_per_second", None)
    return (
        json.loads((workdir / "result.json").read_text())["accuracy"],
        lines,
        {
            path.name: {
                name: (array.dtype.str, array.shape, array.tobytes())
                for name, array in load_file(path).items()
            }
            for path in workdir.glob("*.safetensors")
        },
    )


def assert_same(workdir, reference):
    accuracy, lines, models = left(workdir)
    old_accuracy, old_lines, old_models = left(reference)
    assert accuracy == old_accuracy
    assert lines == old_lines
    assert models == old_models and models


@pytest.fixture(scope="module")
def uncut(tmp_path_factory, tiny_flags, compile_once):
    """Runs of this module that nothing cuts, each done once."""
    done = {}

    def run(**changes):
        flags = tiny_flags(checkpoint__every_steps=STEPS, **changes)
        if str(flags) not in done:
            workdir = tmp_path_factory.mktemp("uncut")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(plots, "draw", lambda workdir: [])
                assert main.run([*flags, f"--workdir={workdir}"]) == 0
            done[str(flags)] = workdir
        return flags, done[str(flags)]

    return run


@pytest.fixture
def cut(monkeypatch):
    """Cuts the run in this process at its k-th save from now on, after or instead of it."""
    monkeypatch.setattr(plots, "draw", lambda workdir: [])
    save = train._Run.save

    def cut_at(k, instead=False):
        left = iter(range(k - 1, -1, -1))

        def cutting(run):
            last = next(left) == 0
            if not (last and instead):
                save(run)
            if last:
                raise Cut

        monkeypatch.setattr(train._Run, "save", cutting)

    yield cut_at


def go(flags, workdir, capsys):
    """Runs to the end; returns what stderr says first."""
    capsys.readouterr()
    assert main.run([*flags, f"--workdir={workdir}"]) == 0
    return capsys.readouterr().err.splitlines()[0]


# In processes that are killed


def kill_when(flags, workdir, appeared):
    """Starts the command and kills it when ``appeared(positions)``; fails if it ends before."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bpnjax.main", *flags, f"--workdir={workdir}"],
        cwd=workdir.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 200
        while process.poll() is None and not appeared(checkpoints(workdir)):
            assert time.monotonic() < deadline, "no such checkpoint"
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        _, err = process.communicate()
    finally:
        process.kill()
    assert process.returncode == -signal.SIGKILL, err
    assert not (workdir / "result.json").exists()
    return err


@pytest.mark.parametrize("num_seeds", [1, 3])
@pytest.mark.parametrize("method", ["bd_ewc", "bd_psp"])
def test_killed_in_a_task_and_again_between_tasks(
    uncut, tmp_path, capsys, monkeypatch, method, num_seeds
):
    flags, reference = uncut(method=method, num_seeds=num_seeds)
    workdir = tmp_path / "run"

    kill_when(flags, workdir, lambda found: any(p[0] == 1 and p[1:] != (0, 0) for p in found))
    task, epoch, step = checkpoints(workdir)[-1]
    assert task == 1 and (epoch, step) != (0, 0)

    err = kill_when(flags, workdir, lambda found: (2, 0, 0) in found)
    assert f"going on at task {task + 1}, epoch {epoch + 1}, step {step} " in err
    assert checkpoints(workdir)[-1][0] == 2

    monkeypatch.setattr(plots, "draw", lambda workdir: [])
    assert "going on at task 3, epoch" in go(flags, workdir, capsys)
    assert_same(workdir, reference)


# In this process


@pytest.mark.parametrize("method", methods.REGISTRY)
def test_every_method_goes_on(uncut, cut, tmp_path, capsys, method):
    """Cut in mid-task after a checkpoint, then before the next but one could be written."""
    flags, reference = uncut(method=method)
    workdir = tmp_path / "run"
    arguments = [*flags, f"--workdir={workdir}"]

    cut(4)
    with pytest.raises(Cut):
        main.run(arguments)
    first = checkpoints(workdir)[-1]
    assert first[1:] != (0, 0) and first[0] == (2 if methods.REGISTRY[method].joint else 1)

    cut(2, instead=True)
    with pytest.raises(Cut):
        main.run(arguments)
    second = checkpoints(workdir)[-1]
    assert second > first
    # What was logged after that checkpoint will be logged again, and must not stay twice.
    manifest = "-".join(f"{n:0{w}d}" for n, w in zip(second, (5, 5, 9), strict=True)) + ".json"
    record = json.loads((workdir / "checkpoints" / manifest).read_text())["record"]
    assert (workdir / "metrics.jsonl").stat().st_size > record["metrics_length"] > 0

    cut(99)
    task, epoch, step = second
    assert go(flags, workdir, capsys).startswith(
        f"going on at task {task + 1}, epoch {epoch + 1}, step {step} "
    )
    assert_same(workdir, reference)


def test_cut_at_the_end_of_a_task(uncut, cut, tmp_path, capsys):
    """The checkpoint of step 18 of 18 is of the task's end, before its mode is frozen."""
    flags, _ = uncut(method="bd_ewc")
    flags = [*flags, "--config.checkpoint.every_steps=9"]
    cut(99)
    whole = tmp_path / "whole"
    go(flags, whole, capsys)
    cut(5)  # after 9 steps, 18, the task; 9, 18
    with pytest.raises(Cut):
        main.run([*flags, f"--workdir={tmp_path / 'run'}"])
    assert checkpoints(tmp_path / "run")[-1] == (1, 2, 0)
    cut(99)
    go(flags, tmp_path / "run", capsys)
    assert_same(tmp_path / "run", whole)


def test_other_intervals_give_the_same(uncut, cut, tmp_path, capsys):
    """Going on with another checkpoint interval changes what is logged, not what is computed."""
    flags, reference = uncut(method="bd_psp")
    cut(4)
    with pytest.raises(Cut):
        main.run([*flags, f"--workdir={tmp_path}/run"])
    cut(99)
    go([*flags, "--config.checkpoint.every_steps=0"], tmp_path / "run", capsys)
    accuracy, _, models = left(tmp_path / "run")
    old_accuracy, _, old_models = left(reference)
    assert (accuracy, models) == (old_accuracy, old_models)


def test_half_written_checkpoint_is_ignored(uncut, cut, tmp_path, capsys, recwarn):
    """A folder without manifest is one that was being written; not worth a warning."""
    flags, reference = uncut(method="bd_ewc")
    workdir = tmp_path / "run"
    cut(4)
    with pytest.raises(Cut):
        main.run([*flags, f"--workdir={workdir}"])
    task, epoch, step = newest = checkpoints(workdir)[-1]
    (half,) = (workdir / "checkpoints").glob(f"{task:05d}-{epoch:05d}-{step:09d}")
    # The next position that will be saved, so that the run has to write over it, and a later one.
    for name in (f"{task:05d}-00001-000000005", "00009-00000-000000000"):
        shutil.copytree(half, half.with_name(name))
        for path in list(half.with_name(name).rglob("*"))[::2]:
            if path.is_file():
                path.write_bytes(path.read_bytes()[:3])
    assert checkpoints(workdir)[-1] == newest
    cut(99)
    recwarn.clear()
    said = go(flags, workdir, capsys)
    assert said.startswith(f"going on at task {task + 1}, epoch {epoch + 1}, step {step} ")
    assert not [w for w in recwarn if "damaged" in str(w.message)]
    assert_same(workdir, reference)
    names = {p.name for p in (workdir / "checkpoints").iterdir() if p.is_dir()}
    assert names == {
        "-".join(p) for p in (("00002", "00001", "000000005"), ("00003", "00000", "0" * 9))
    }


def test_cut_before_the_first_checkpoint(uncut, cut, tmp_path, capsys):
    flags, reference = uncut(method="bd_psp")
    cut(1, instead=True)
    with pytest.raises(Cut):
        main.run([*flags, f"--workdir={tmp_path}/run"])
    assert checkpoints(tmp_path / "run") == []
    cut(99)
    assert go(flags, tmp_path / "run", capsys).startswith("task 1/3 done")
    assert_same(tmp_path / "run", reference)


def test_cut_before_the_result_was_written(uncut, cut, tmp_path, capsys):
    flags, reference = uncut(method="bd_ewc", num_seeds=3)
    shutil.copytree(reference, tmp_path / "run")
    for name in ("result.json", "accuracy.csv", "model.safetensors", "model.json"):
        (tmp_path / "run" / name).unlink()
    cut(1, instead=True)  # there is nothing left to train, test or save
    go(flags, tmp_path / "run", capsys)
    assert_same(tmp_path / "run", reference)


def test_metrics_that_were_lost(uncut, cut, tmp_path, capsys):
    """The run goes on all the same, and the file has whole lines only."""
    flags, reference = uncut(method="bd_psp")
    workdir = tmp_path / "run"
    cut(4)
    with pytest.raises(Cut):
        main.run([*flags, f"--workdir={workdir}"])
    (workdir / "metrics.jsonl").unlink()
    cut(99)
    go(flags, workdir, capsys)
    accuracy, lines, models = left(workdir)
    old_accuracy, old_lines, old_models = left(reference)
    assert (accuracy, models) == (old_accuracy, old_models)
    assert lines == old_lines[-len(lines) :]


# Seeds


@pytest.mark.parametrize("method", ["bd_ewc", "bd_psp"])
def test_three_seeds_are_three_runs(uncut, method):
    _, together = uncut(method=method, num_seeds=3)
    accuracy, _, _ = left(together)
    for seed in range(3):
        changes = {"seed": seed, "num_seeds": 1} if seed else {"num_seeds": 1}
        _, alone = uncut(method=method, **changes)
        expected, _, _ = left(alone)
        for kind, matrix in expected.items():
            np.testing.assert_allclose(
                np.array(accuracy[kind][seed], float), np.array(matrix[0], float), atol=0.03
            )
        name = "model.safetensors" if seed == 0 else f"model_seed_{seed}.safetensors"
        one, own = load_file(together / name), load_file(alone / "model.safetensors")
        assert set(one) == set(own)
        for path, array in own.items():
            np.testing.assert_allclose(
                one[path].astype(float), array.astype(float), atol=1e-4, err_msg=path
            )
