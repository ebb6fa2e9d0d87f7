"""A run that was cut and started again equals one that was never cut, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import jax
import numpy as np
import pytest
from command import ROOT
from safetensors.numpy import load_file
from support import whole_registry

from bpnjax import main, methods
from bpnjax.data import load_sequence
from bpnjax.run import checkpoint, plots, train
from bpnjax.run.checkpoint import Position
from bpnjax.training import epochs
from bpnjax.training.experiment import make_experiment

# Two tasks of two epochs of 9 steps. Checkpoints after 13 steps of a task, so in mid-epoch, and
# at its end: (0, 1, 4), (1, 0, 0), (1, 1, 4), (2, 0, 0) as (task, epoch, step) counted from 0.
CHANGES = {
    "sequence__num_tasks": 2, "model__hidden": "(16,)", "checkpoint__every_steps": 13,
    "evaluate__rule": "statistics", "evaluate__statistics": 8,
}  # fmt: skip
# Smaller than a task, so that what is kept of it was chosen.
SMALL_MEMORIES = {"replay__memory_size": 50, "replay__batch_size": 16, "gem__memories": 30}
BETWEEN_TASKS, IN_A_TASK, AT_THE_END = (1, 0, 0), (1, 1, 4), (2, 0, 0)

pytestmark = pytest.mark.usefixtures("compile_once")


class Cut(Exception):
    """Stands for whatever ends a process."""


def checkpoints(workdir):
    """The positions of the finished checkpoints."""
    names = [path.stem for path in (workdir / "checkpoints").glob("*.json")]
    return sorted(tuple(map(int, name.split("-"))) for name in names)


def left(workdir):
    """All that a run computed: accuracies, metrics without times, arrays of every seed."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    for line in lines:
        line.pop("examples_per_second", None)
    return (
        [json.loads((workdir / "result.json").read_text())[part]
         for part in ("accuracy", "inference")],
        lines,
        {
            path.name: {
                name: (array.dtype.str, array.shape, array.tobytes())
                for name, array in load_file(path).items()
            }
            for path in workdir.glob("*.safetensors")
        },
    )  # fmt: skip


def assert_same(workdir, reference, same_lines=True):
    accuracy, lines, models = left(workdir)
    old_accuracy, old_lines, old_models = left(reference)
    assert accuracy == old_accuracy
    assert models == old_models and models
    assert lines == old_lines or not same_lines


@pytest.fixture(scope="module")
def uncut(tmp_path_factory, tiny_flags, compile_once):
    """Runs of this module that nothing cuts, each done once."""
    done = {}

    def run(**changes):
        flags = tiny_flags(**CHANGES, **changes)
        if str(flags) not in done:
            workdir = tmp_path_factory.mktemp("uncut")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(plots, "draw", lambda workdir, result: [])
                assert main.run([*flags, f"--workdir={workdir}"]) == 0
            done[str(flags)] = workdir
        return flags, done[str(flags)]

    return run


@pytest.fixture
def cut(monkeypatch):
    """Cuts the run in this process at its k-th save from now on, after or instead of it."""
    monkeypatch.setattr(plots, "draw", lambda workdir, result: [])
    save = train._Run.save

    def run_until(flags, workdir, k, instead=False):
        count = iter(range(1, k + 1))

        def cutting(run):
            last = next(count) == k
            if not (last and instead):
                save(run)
            if last:
                raise Cut

        with monkeypatch.context() as patch, pytest.raises(Cut):
            patch.setattr(train._Run, "save", cutting)
            main.run([*flags, f"--workdir={workdir}"])
        found = checkpoints(workdir)
        return found[-1] if found else None

    return run_until


def go(flags, workdir, capsys):
    """Runs to the end; returns what stderr says first, after the line of what the run is."""
    capsys.readouterr()
    assert main.run([*flags, f"--workdir={workdir}"]) == 0
    return capsys.readouterr().err.splitlines()[1]


def going_on(position):
    task, epoch, step = position
    return f"going on at task {task + 1}, epoch {epoch + 1}, step {step} "


# In processes that are killed


def kill_when_there(flags, workdir, position):
    """Starts the command and kills it when it has written a checkpoint of that position."""
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
        while process.poll() is None and position not in checkpoints(workdir):
            assert time.monotonic() < deadline, "no such checkpoint"
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        _, err = process.communicate()
    finally:
        process.kill()
    assert process.returncode == -signal.SIGKILL, err
    assert not (workdir / "result.json").exists()
    return err


def assert_memories(flags, workdir, method, num_seeds):
    """The checkpoint holds kept examples themselves, in their stored dtype."""
    config, _, _ = main.parse(flags)
    experiment = make_experiment(config, load_sequence(config))
    shapes = jax.eval_shape(partial(epochs.init_state, experiment), jax.random.key(0))
    if num_seeds > 1:
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((num_seeds, *leaf.shape), leaf.dtype), shapes
        )
    state = checkpoint.restore_at(workdir / "checkpoints", Position(*IN_A_TASK), shapes)
    kept = state.learner.method
    if method == "er":
        kept = kept.memory
        assert kept.x.dtype == np.uint8 and (np.asarray(kept.seen) > 50).all()
        assert set(np.unique(kept.task)) == {0, 1}
    if method == "gem":
        assert kept.x.dtype == np.uint8 and set(np.unique(kept.y[..., 0, :])) == {0, 1}
        assert np.asarray(kept.real)[..., 0, :].all() and not np.asarray(kept.real)[..., 1, :].any()


@pytest.mark.parametrize(
    "method, num_seeds",
    [
        ("bd_ewc", 1),
        ("er", 1),
        ("gem", 1),
        pytest.param("bd_psp", 3, marks=pytest.mark.slow),
        pytest.param("er", 3, marks=pytest.mark.slow),
        pytest.param("gem", 3, marks=pytest.mark.slow),
        pytest.param("bd_ewc", 3, marks=pytest.mark.slow),
        pytest.param("bd_psp", 1, marks=pytest.mark.slow),
    ],
)
def test_killed_between_tasks_and_again_in_a_task(
    uncut, tmp_path, capsys, monkeypatch, method, num_seeds
):
    """Also where examples are kept: they are in the checkpoints, not drawn again."""
    flags, reference = uncut(method=method, num_seeds=num_seeds, **SMALL_MEMORIES)
    workdir = tmp_path / "run"
    kill_when_there(flags, workdir, BETWEEN_TASKS)
    assert checkpoints(workdir)[-1] == BETWEEN_TASKS
    err = kill_when_there(flags, workdir, IN_A_TASK)
    assert err.splitlines()[1].startswith(going_on(BETWEEN_TASKS))
    assert checkpoints(workdir)[-1] == IN_A_TASK
    assert_memories(flags, workdir, method, num_seeds)

    monkeypatch.setattr(plots, "draw", lambda workdir, result: [])
    assert go(flags, workdir, capsys).startswith(going_on(IN_A_TASK))
    assert_same(workdir, reference)


# In this process


@pytest.fixture
def programs_once(monkeypatch):
    """Runs of the same configuration share their programs: tracing takes longer than training."""
    compile_programs, kept = train.compile_programs, {}

    def shared(experiment, clock, *sizes):
        key = (experiment.config.method, *sizes)
        return kept.setdefault(key, compile_programs(experiment, clock, *sizes))

    monkeypatch.setattr(train, "compile_programs", shared)


@pytest.mark.parametrize("method", whole_registry())
def test_every_method_goes_on(programs_once, uncut, cut, tmp_path, capsys, method):
    """Cut right after a checkpoint, and again right before one could be written."""
    flags, reference = uncut(method=method)
    workdir = tmp_path / "run"
    # One stage of 36 steps: checkpoints after 13, 26, 36.
    joint = methods.REGISTRY[method]().trains == "jointly"
    first = cut(flags, workdir, 1 if joint else 2)
    assert first == ((1, 0, 13) if joint else BETWEEN_TASKS)
    second = cut(flags, workdir, 2, instead=True)
    assert second == ((1, 1, 8) if joint else IN_A_TASK)

    # What was logged after that checkpoint will be logged again, and must not stay twice.
    name = "{:05d}-{:05d}-{:09d}.json".format(*second)
    record = json.loads((workdir / "checkpoints" / name).read_text())["record"]
    assert (workdir / "metrics.jsonl").stat().st_size > record["metrics_length"] > 0

    assert go(flags, workdir, capsys).startswith(going_on(second))
    assert_same(workdir, reference)


def test_other_intervals_give_the_same(uncut, cut, tmp_path, capsys):
    """They change what is logged, not what is computed.

    Every 9 steps there is also a checkpoint after the last step of a task, before its mode is
    frozen.
    """
    flags, reference = uncut(method="bd_ewc")
    every_nine = [*flags, "--config.checkpoint.every_steps=9"]
    assert cut(every_nine, tmp_path / "run", 5) == (1, 2, 0)
    go([*flags, "--config.checkpoint.every_steps=0"], tmp_path / "run", capsys)
    assert_same(tmp_path / "run", reference, same_lines=False)


def test_half_written_checkpoint_is_ignored(uncut, cut, tmp_path, capsys, recwarn):
    """A folder without manifest is one that was being written; not worth a warning."""
    flags, reference = uncut(method="bd_ewc")
    workdir = tmp_path / "run"
    assert cut(flags, workdir, 3) == IN_A_TASK
    folder = workdir / "checkpoints"
    whole, next_one, later = (
        folder / "{:05d}-{:05d}-{:09d}".format(*p) for p in (IN_A_TASK, AT_THE_END, (9, 0, 0))
    )
    for half in (next_one, later):
        shutil.copytree(whole, half)
        for path in [path for path in half.rglob("*") if path.is_file()][::2]:
            path.write_bytes(path.read_bytes()[:3])
    recwarn.clear()
    assert go(flags, workdir, capsys).startswith(going_on(IN_A_TASK))
    assert not [w for w in recwarn if "damaged" in str(w.message)]
    assert_same(workdir, reference)
    assert {path for path in folder.iterdir() if path.is_dir()} == {whole, next_one}


def test_cut_before_the_first_checkpoint(uncut, cut, tmp_path, capsys):
    flags, reference = uncut(method="bd_psp")
    assert cut(flags, tmp_path / "run", 1, instead=True) is None
    assert go(flags, tmp_path / "run", capsys).startswith("task 1/2 (0, 1) done")
    assert_same(tmp_path / "run", reference)


def test_cut_before_the_result_was_written(uncut, tmp_path, capsys, monkeypatch):
    flags, reference = uncut(method="bd_ewc", num_seeds=3)
    workdir = tmp_path / "run"
    shutil.copytree(reference, workdir)
    for path in [workdir / "result.json", *workdir.glob("*.safetensors")]:
        path.unlink()
    monkeypatch.setattr(plots, "draw", lambda workdir, result: [])
    monkeypatch.setattr(train._Run, "save", None)  # there is nothing left to train, test or save
    go(flags, workdir, capsys)
    assert_same(workdir, reference)


def test_metrics_that_were_lost(uncut, cut, tmp_path, capsys):
    """The run goes on all the same, and what the file has are whole lines."""
    flags, reference = uncut(method="bd_psp")
    workdir = tmp_path / "run"
    assert cut(flags, workdir, 3) == IN_A_TASK
    (workdir / "metrics.jsonl").unlink()
    go(flags, workdir, capsys)
    assert_same(workdir, reference, same_lines=False)
    lines, whole = left(workdir)[1], left(reference)[1]
    assert lines == whole[-len(lines) :] and lines


# Ctrl-C


@pytest.fixture
def interrupting(monkeypatch):
    """Presses Ctrl-C, once or twice, while the run is in its k-th range of steps from now on."""
    monkeypatch.setattr(plots, "draw", lambda workdir, result: [])
    train_range = train._Run.train_range

    def run_until(flags, workdir, k, times=1):
        count = iter(range(1, k + 1))

        def pressed(run, *args):
            for _ in range(times if next(count) == k else 0):
                signal.raise_signal(signal.SIGINT)
            train_range(run, *args)

        before = signal.getsignal(signal.SIGINT)
        with monkeypatch.context() as patch:
            patch.setattr(train._Run, "train_range", pressed)
            assert main.run([*flags, f"--workdir={workdir}"]) == 1
        assert signal.getsignal(signal.SIGINT) is before
        return checkpoints(workdir)[-1]

    return run_until


def test_ctrl_c_saves_and_says_how_to_go_on(programs_once, uncut, interrupting, tmp_path, capfd):
    """An epoch is a range here: pressed in the third, which is ended, with no checkpoint due."""
    flags, reference = uncut(method="bd_ewc")
    flags = [*flags, "--config.checkpoint.every_steps=0", "--config.log=csv"]
    assert interrupting(flags, tmp_path / "run", 3) == (1, 1, 0)
    *_, first, last = capfd.readouterr().err.splitlines()
    assert first.startswith("bpnjax: saving after the current steps")
    where = "saved at task 2, epoch 2, step 0"
    assert last == f"bpnjax: interrupted, {where}; run the same command again to resume"
    assert go(flags, tmp_path / "run", capfd).startswith(going_on((1, 1, 0)))
    assert_same(tmp_path / "run", reference, same_lines=False)
    # The copy of the metrics has each line once, those of before included.
    copied = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[2:6] for row in copied if row.startswith("train")] == [
        ["1", "1", "9", "9"], ["1", "2", "9", "18"], ["2", "1", "9", "27"], ["2", "2", "9", "36"],
    ]  # fmt: skip


def test_ctrl_c_twice_ends_at_once(programs_once, uncut, interrupting, tmp_path, capfd):
    flags, _ = uncut(method="bd_ewc")
    flags = [*flags, "--config.checkpoint.every_steps=0"]
    assert interrupting(flags, tmp_path / "run", 4, times=2) == BETWEEN_TASKS
    last = capfd.readouterr().err.splitlines()[-1]
    assert last == "bpnjax: interrupted; run the same command again to resume"


# Seeds


@pytest.mark.parametrize("method", ["bd_ewc", "bd_psp"])
def test_three_seeds_are_three_runs(uncut, method):
    _, together = uncut(method=method, num_seeds=3)
    (accuracy, _), _, _ = left(together)
    for seed in range(3):
        changes = {"seed": seed, "num_seeds": 1} if seed else {"num_seeds": 1}
        _, alone = uncut(method=method, **changes)
        (expected, _), _, _ = left(alone)
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
