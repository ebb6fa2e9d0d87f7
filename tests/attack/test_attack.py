"""Attacks: drawn at random from fixed seeds, some here, any number with BPNJAX_ATTACKS=200.

What is allowed, whatever comes in: exit 0 with the right result, or one line and exit 2 (1 for a
failure). Never a traceback, another number, or a file outside the folder.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
import zlib

import numpy as np
import pytest
from attacks import NUMBER, ODD_TEXTS, cases, damage, files_of, odd_array, outcome
from command import ROOT, contents
from forks import Forks

from bpnjax import compare, main, packs, predict
from bpnjax import config as configuration
from bpnjax.config.fields import entries
from bpnjax.methods import REGISTRY
from bpnjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_once")

TRY = ["--config=digits", "--config.sequence.num_tasks=2", "--config.model.hidden=(8,)",
       "--config.train.epochs=1", "--dry_run"]  # fmt: skip
# Fields that name a network, data or machines: their values are other tests' business.
APART = ("dataset.data_dir", "dataset.manual_dir", "dataset.cache_dir", "devices")

# A run that takes seconds, of any method.
SHORT = {
    "sequence__num_tasks": 2, "model__hidden": "(8,)", "train__epochs": 1,
    "checkpoint__every_steps": 4, "ebll__code": 8, "ebll__epochs": 1, "gem__memories": 20,
    "ranpac__features": 50, "replay__memory_size": 30, "replay__batch_size": 8,
}  # fmt: skip
KILLS = 3  # of each method


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_flags, compile_once):
    """A complete run, in this process."""
    flags = tiny_flags(method="bd_ewc", checkpoint__every_steps=7)
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert outcome(main.run, [*flags, f"--workdir={workdir}"])[0] == 0
    return types.SimpleNamespace(flags=flags, workdir=workdir)


@pytest.mark.parametrize("seed", cases("fields", 24))
def test_fields(seed, tmp_path, monkeypatch):
    """One or two fields of the configuration, of any method, with odd values."""
    random = np.random.default_rng(seed)
    monkeypatch.chdir(tmp_path)
    known = [field for field in entries() if field not in APART]
    method = random.choice(list(REGISTRY))
    chosen = random.choice(known, random.integers(1, 3), replace=False)
    values = [random.choice([*ODD_TEXTS, "1", "2", "0.5", "1000000"]) for _ in chosen]
    changes = [f"--config.{f}={v}" for f, v in zip(chosen, values, strict=True)]
    code, out, said = outcome(main.run, [*TRY, f"--config.method={method}", *changes])
    assert contents(tmp_path) == {}, said
    assert code in (0, 2) and (code or "steps" in out), said


@pytest.mark.parametrize("seed", cases("data", 24))
def test_data(seed, tmp_path, monkeypatch):
    """Arrays of wrong shapes, dtypes, lengths and ranges, as a file of one's own."""
    random = np.random.default_rng(seed)
    monkeypatch.chdir(tmp_path)
    x = random.integers(0, 255, (40, 4, 4, 1)).astype("u1")
    y = np.arange(40) % 4
    given = {"train_x": x, "train_y": y, "test_x": x[:20], "test_y": y[:20]}
    for name in random.choice(list(given), random.integers(1, 3), replace=False):
        way = random.integers(6)
        old = given[name]
        if way == 0:
            given[name] = odd_array(random, old.shape)
        elif way == 1:
            given[name] = old[: random.integers(len(old))]
        elif way == 2:
            given[name] = old.reshape(-1)[: random.integers(1, 9)]
        elif way == 3:
            del given[name]
        elif way == 4:
            given[name] = old[..., None] if random.random() < 0.5 else old[None]
        else:
            given[name] = np.array([{"a": 1}, None], object)
    np.savez(tmp_path / "own.npz", **given)
    before = contents(tmp_path)
    flags = ["--config=digits", "--config.dataset.path=own.npz", "--config.sequence.num_tasks=2",
             "--config.model.hidden=(4,)", "--config.train.epochs=1", "--config.train.batch_size=4",
             "--config.method=sgd", "--dry_run"]  # fmt: skip
    code, out, said = outcome(main.run, flags)
    assert contents(tmp_path) == before
    assert code in (0, 2) and (code or "steps" in out), said


@pytest.mark.parametrize("seed", cases("folder", 4))
def test_a_damaged_folder(seed, finished, copied):
    """A file of a complete run: the run is whole again, with the same numbers, or it is refused."""
    random = np.random.default_rng(seed)
    folder, flags = copied
    truth = json.loads((finished.workdir / "result.json").read_text())["accuracy"]
    if random.random() < 0.5:
        (folder / "result.json").unlink()  # it was not complete yet
    files = files_of(folder)
    path = files[random.integers(len(files))]
    way = damage(path, random)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *a, **k: None)
        code, _, said = outcome(main.run, flags)
    if code == 0:
        found = json.loads((folder / "result.json").read_text())["accuracy"]
        assert found == truth, f"{path.name} {way}: {said}"


@pytest.mark.parametrize("seed", cases("model", 20))
def test_a_damaged_model(seed, finished, tmp_path, monkeypatch):
    """The model's file before predict and packs: the same answers, or a refusal."""
    random = np.random.default_rng(seed)
    monkeypatch.chdir(tmp_path)
    shutil.copy(finished.workdir / "model.safetensors", "model.safetensors")
    np.savez("x.npz", x=np.arange(192, dtype="u1").reshape(3, 8, 8, 1) % 17)
    whole = ["--model=model.safetensors", "--input=x.npz", "--output=whole.csv", "--task=2"]
    assert outcome(predict.run, whole)[0] == 0
    way = damage(tmp_path / "model.safetensors", random)
    flags = [*whole[:2], "--output=y.csv", "--task=2"]
    code, _, said = outcome(predict.run, flags)
    if code == 0:
        same = (tmp_path / "y.csv").read_text() == (tmp_path / "whole.csv").read_text()
        assert same, f"{way}: {said}"
    else:
        assert not (tmp_path / "y.csv").exists()
    outcome(packs.run, ["pack", "--model=model.safetensors", "--tasks=1", "--output=p.safetensors"])


@pytest.mark.parametrize("seed", cases("inputs", 20))
def test_odd_inputs_of_predict(seed, finished, tmp_path, monkeypatch):
    """Examples and tasks of odd dtypes, shapes and values before predict."""
    random = np.random.default_rng(seed)
    monkeypatch.chdir(tmp_path)
    x = np.arange(192, dtype="u1").reshape(3, 8, 8, 1) % 17
    given = {"x": x, "task": np.array([1, 2, 3])}
    name = random.choice(["x", "task"])
    if random.random() < 0.7:
        given[name] = odd_array(random, given[name].shape)
    else:
        given[name] = given[name][..., None][: random.integers(4)]
    np.savez("x.npz", **given)
    if random.random() < 0.3:
        damage(tmp_path / "x.npz", random)
    before = contents(tmp_path)
    flags = [f"--model={finished.workdir}", "--input=x.npz", "--output=y.csv"]
    code, _, _ = outcome(predict.run, flags)
    after = contents(tmp_path)
    after.pop("y.csv", None)
    assert after == before and (code == 0) == (tmp_path / "y.csv").exists()


@pytest.mark.parametrize("seed", cases("texts", 12))
def test_odd_arguments(seed, finished, tmp_path, monkeypatch):
    """Texts where a command wants numbers, names and files."""
    random = np.random.default_rng(seed)
    monkeypatch.chdir(tmp_path)
    odd = str(random.choice(ODD_TEXTS))
    runs = [
        (predict.run, [f"--model={finished.workdir}", f"--input={odd}", "--output=y.csv"]),
        (predict.run, [f"--model={odd}", "--input=x.npz", "--output=y.csv"]),
        (predict.run, [f"--model={finished.workdir}", "--input=x", "--output=y", f"--task={odd}"]),
        (compare.run, ["--config=digits", f"--methods={odd}"]),
        (compare.run, ["--config=digits", "--methods=sgd", f"--num_seeds={odd or 'x'}x"]),
        (packs.run, ["pack", f"--model={finished.workdir}", f"--tasks={odd}", "--output=p"]),
        (main.run, [f"--config={odd}"]),
    ]
    for command, arguments in runs:
        code, _, said = outcome(command, arguments)
        assert code == 2 or (tmp_path / "p").exists(), said


SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
ENDED = (0, 1, *(-number for number in SIGNALS))


def told(folder):
    """What a complete run found: its accuracies and the bytes of its models."""
    found = json.loads((folder / "result.json").read_text())["accuracy"]
    return found, {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.slow  # of a method and a signal each there is one in tests/run that is quicker
@pytest.mark.parametrize("seed", cases("kills", 2))
def test_kills(seed, finished, tmp_path):
    """A signal at a random moment; the same command then gives the same numbers, bit for bit."""
    random = np.random.default_rng(seed)
    folder = tmp_path / "run"
    line = [sys.executable, "-m", "bpnjax.main", *finished.flags, f"--workdir={folder}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for _ in range(2):
        running = subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True,
                                   stdout=subprocess.DEVNULL)  # fmt: skip
        time.sleep(random.uniform(0.5, 9.0))
        running.send_signal(int(random.choice(SIGNALS)))
        _, said = running.communicate(timeout=120)
        assert running.returncode in ENDED, said
        assert "Traceback" not in said, said
    last = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
    assert last.returncode == 0, last.stderr
    assert told(folder) == told(finished.workdir)
    assert not (folder / "run.lock").exists()


@pytest.fixture(scope="module")
def forks(compile_once):
    started = Forks()
    yield started
    started.close()


@pytest.fixture(scope="module")
def uncut(forks, tmp_path_factory, tiny_flags):
    """Of a method the flags of a small run, what it finds, and how many seconds it takes."""
    known = {}

    def run(method):
        if method not in known:
            flags = tiny_flags(method=method, **SHORT)
            folder = tmp_path_factory.mktemp(method) / "run"
            for _ in range(2):  # the first time it compiles
                started = time.perf_counter()
                forks.start(
                    folder.with_name("said"), [*flags, f"--workdir={folder}", "--overwrite"]
                )
                assert forks.wait() == 0, folder.with_name("said").read_text()
            known[method] = flags, told(folder), time.perf_counter() - started, names(folder)
        return known[method]

    return run


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("method", REGISTRY)
def test_kills_of_every_method(method, uncut, forks, tmp_path, record_property):
    """Signals at random moments of a run of each method, from its first file to its last."""
    record_property("cases", KILLS)
    flags, truth, seconds, files = uncut(method)
    folder, said = tmp_path / "run", tmp_path / "said"
    random = np.random.default_rng(zlib.crc32(method.encode()))
    for _ in range(KILLS):
        child = forks.start(said, [*flags, f"--workdir={folder}"])
        time.sleep(random.uniform(0, seconds))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, int(random.choice(SIGNALS)))
        code = forks.wait()
        assert code in ENDED and "Traceback" not in said.read_text(), said.read_text()
    forks.start(said, [*flags, f"--workdir={folder}"])
    assert forks.wait() == 0, said.read_text()
    assert told(folder) == truth and names(folder) == files


_HOLDS = """
import pathlib, sys
from bpnjax.utils import locks
with locks.held(pathlib.Path(sys.argv[1]), "--workdir: it"):
    print("held", flush=True)
    input()
"""


def test_two_processes_in_one_folder(finished, tmp_path):
    """The second is told who works there, and touches nothing."""
    folder = tmp_path / "run"
    line = [*finished.flags, f"--workdir={folder}"]
    holds = subprocess.Popen(
        [sys.executable, "-c", _HOLDS, str(folder / "run.lock")], text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holds.stdout.readline() == "held\n"
    before = contents(tmp_path)
    for more in ([], ["--overwrite"]):
        code, _, said = outcome(main.run, [*line, *more])
        assert code == 2 and f"is in use by process {holds.pid} of" in said
        assert contents(tmp_path) == before
    holds.communicate("\n")
    assert not (folder / "run.lock").exists()


def test_all_settings_are_attacked():
    """No field is passed over: those that are stand in APART, with a reason."""
    assert set(APART) <= set(entries())
    assert NUMBER >= 0
    config = configuration.default()
    with pytest.raises(UserError):
        configuration.with_changes(config, "bd.epsilon=9e999999x", "x")
