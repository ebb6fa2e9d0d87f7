"""What a folder, a checkpoint and a model say they are of, and what is refused or made again."""

import errno
import importlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import ROOT, contents, one_line
from safetensors import safe_open
from safetensors.numpy import save_file
from support import Jitted

import bpnjax
from bpnjax import config as configuration
from bpnjax.data import load_sequence
from bpnjax.run import checkpoint, export, train, writers
from bpnjax.run import memory as of_run
from bpnjax.training import epochs
from bpnjax.training.experiment import make_experiment
from bpnjax.utils import locks, memory, prng
from bpnjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_once")


def accuracy(folder):
    return json.loads((folder / "result.json").read_text())["accuracy"]


def manifests(folder):
    return sorted((folder / "checkpoints").glob("*.json"))


def test_hashes_stand_in_result_and_manifests(finished):
    config = configuration.fingerprint(json.loads((finished.workdir / "config.json").read_text()))
    result = json.loads((finished.workdir / "result.json").read_text())
    assert result["config_hash"] == config and result["draws"] == prng.fingerprint()
    for path in manifests(finished.workdir):
        assert json.loads(path.read_text())["record"]["config_hash"] == config
    assert list(result["models"]) == ["model.safetensors"]


def test_a_fingerprint_is_of_what_is_computed():
    config = configuration.default()
    first = configuration.fingerprint(config)
    assert first == configuration.fingerprint(json.loads(json.dumps(config.to_dict())))
    config.num_seeds, config.log, config.dataset.data_dir = 3, "csv", "x"
    assert configuration.fingerprint(config) == first
    config.seed = 1
    assert configuration.fingerprint(config) != first


def test_checkpoints_of_another_seed_are_refused(run, copied, tmp_path):
    """Their arrays would fit, and the result would say a seed that it is not of."""
    folder, flags = copied
    other = tmp_path / "other"
    shutil.copytree(folder / "checkpoints", other / "checkpoints")
    config = json.loads((folder / "config.json").read_text()) | {"seed": 1}
    (other / "config.json").write_text(json.dumps(config))
    flags = [*flags[:-1], f"--workdir={other}", "--config.seed=1"]
    before = contents(other / "checkpoints")
    code, _, error = run(flags)
    assert code == 2
    one_line(error, "holds a run of the configuration", "another folder", "--overwrite")
    assert configuration.fingerprint(config) in error and contents(other / "checkpoints") == before


def test_a_result_of_another_configuration_is_refused(refused, copied):
    folder, flags = copied
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {"config_hash": "0" * 16}))
    refused(flags, f"result.json in {folder} is of the configuration {'0' * 16}", "--overwrite")


def test_an_edited_manifest_is_damaged(copied):
    folder, _ = copied
    (folder / "result.json").unlink()
    newest = manifests(folder)[-1]
    text = newest.read_text()
    edits = (('"task": 3', '"task": 2'), ('"total_steps": ', '"total_steps": 1'),
             ('"task_told": [[[0.', '"task_told": [[[0.0'))  # fmt: skip
    for old, new in edits:
        assert old in text
        newest.write_text(text.replace(old, new, 1))
        with pytest.warns(UserWarning, match="its manifest is not what was written"):
            assert checkpoint.restore_latest(folder / "checkpoints", _abstract(folder)) is not None


def _abstract(folder):
    config = configuration.default()
    stored = configuration.flatten(json.loads((folder / "config.json").read_text()))
    config.update_from_flattened_dict(
        {f: tuple(v) if isinstance(v, list) else v for f, v in stored.items() if v is not None}
    )
    experiment = make_experiment(config, load_sequence(config))
    return jax.eval_shape(partial(epochs.init_state, experiment), prng.key(0))


@pytest.mark.parametrize("damage", ["empty", "no JSON", "null", "model gone", "model flipped"])
def test_a_complete_run_that_lost_something_is_made_whole(damage, finished, run, copied):
    folder, flags = copied
    model = folder / "model.safetensors"
    if damage == "model gone":
        model.unlink()
    elif damage == "model flipped":
        data = bytearray(model.read_bytes())
        data[-9] ^= 4
        model.write_bytes(bytes(data))
    else:
        text = {"empty": "", "no JSON": '{"summary": ', "null": "null"}[damage]
        (folder / "result.json").write_text(text)
    code, _, said = run(flags)
    assert code == 0 and "made again from the checkpoint" in said
    assert accuracy(folder) == accuracy(finished.workdir)
    assert model.read_bytes() == (finished.workdir / "model.safetensors").read_bytes()


def test_a_flipped_bit_of_a_model_is_seen(copied):
    path = copied[0] / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"not what was written \(checksum"):
        bpnjax.load(path)
    with safe_open(copied[0].parent / "run" / "model.safetensors", "np") as tensors:
        metadata = tensors.metadata()
        found = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    metadata["class_names"] = metadata["class_names"].replace('"0"', '"x"')
    save_file(found, path, metadata)
    with pytest.raises(UserError, match="not what was written"):
        bpnjax.load(path)


FLAGS = """
import sys, numpy as np, bpnjax
x = np.load(sys.argv[2])
p = bpnjax.load(sys.argv[1])
print([p.logits(x, task).tobytes().hex()[:4000] for task in range(3)])
"""


def in_process(folder, x, **environment):
    np.save(folder / "x.npy", x)
    return subprocess.run(
        [sys.executable, "-c", FLAGS, str(folder), str(folder / "x.npy")], capture_output=True,
        text=True, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )  # fmt: skip


def test_keys_are_the_same_bits_under_every_flag(run, tiny_flags, tmp_path):
    """64-bit floats and another default generator change nothing; another way to draw is seen."""
    folder = tmp_path / "psp"
    assert run([*tiny_flags(method="bd_psp"), f"--workdir={folder}"])[0] == 0
    x = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1) % 17
    usual = in_process(folder, x)
    assert usual.returncode == 0, usual.stderr
    for flag in ({"JAX_ENABLE_X64": "1"}, {"JAX_DEFAULT_PRNG_IMPL": "rbg"}):
        other = in_process(folder, x, **flag)
        assert other.stdout == usual.stdout, other.stderr
    other = in_process(folder, x, JAX_THREEFRY_PARTITIONABLE="0")
    assert other.returncode == 1 and "JAX draws other random numbers here" in other.stderr


def test_one_process_per_folder(tmp_path):
    path = tmp_path / "lock"
    with locks.held(path, "--workdir: here"):
        assert path.read_text() == locks.me()
        with (
            pytest.raises(locks.Locked, match=f"in use by process {os.getpid()} of .*delete"),
            locks.held(path, "--workdir: here"),
        ):
            pass
    assert not path.exists()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    path.write_text(f"{locks.me().split(':')[0]}:{gone.pid}:1")  # left by a process that was killed
    with locks.held(path, "--workdir: here"):
        assert path.read_text() == locks.me()
    path.write_text("")  # of nobody
    with locks.held(path, "--workdir: here"):
        pass
    host, pid, _ = locks.me().split(":")
    assert not locks.is_alive(f"{host}:{pid}:1")  # a later process of the same number
    path.write_text("elsewhere:1:1")
    with pytest.raises(locks.Locked, match="process 1 of elsewhere"), locks.held(path, "x"):
        pass


def test_a_run_that_does_not_fit_is_refused_before_the_old_one_is_removed(run, copied, monkeypatch):
    folder, flags = copied
    before = contents(folder)
    monkeypatch.setattr(memory, "available", lambda: 10_000)
    code, _, said = run([*flags, "--overwrite", "--config.num_seeds=2"])
    assert code == 2
    one_line(said, "memory: the state of 2 seeds takes", "GiB are available")
    assert contents(folder) == before
    monkeypatch.undo()
    monkeypatch.setattr(train, "claim", None)  # a state that cannot be allocated comes before it

    def fails(*arguments):
        raise MemoryError("out of memory")

    monkeypatch.setattr("bpnjax.training.epochs.init_state", fails)
    with pytest.raises(MemoryError):
        run([*flags, "--overwrite", "--config.num_seeds=2"])
    assert contents(folder) == before


def test_memory_by_hand(tiny):
    sequence = load_sequence(tiny)
    experiment = make_experiment(tiny, sequence)
    one, examples = of_run.needed(experiment, sequence, 1)
    assert of_run.needed(experiment, sequence, 3) == (3 * one, examples)
    assert examples == sequence.train.images.nbytes + sequence.test.images.nbytes
    assert one > 4 * (64 * 16 + 16 * 16 + 16 * 6)
    assert memory.available() > 10 * one


def test_a_state_that_is_not_finite_is_never_a_checkpoint(run, tiny_flags, tmp_path, monkeypatch):
    """The loss was finite, and the importance of the parameters is not."""
    ewc = importlib.import_module("bpnjax.methods.ewc")  # of the package it is the method
    monkeypatch.setattr(ewc, "relative_importance", lambda f: jax.tree.map(lambda x: x / 0.0, f))
    folder = tmp_path / "broken"
    code, _, said = run([*tiny_flags(method="ewc"), f"--workdir={folder}"])
    assert code == 1
    assert "the state is not finite after task 1 (" in said and "importance" in said
    assert not manifests(folder)


def test_a_log_that_was_cut_in_a_line_loses_that_line_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\n{"b": 2}\n{"c"')
    log = writers.MetricsLog(path, 1000)
    log.write(d=4)
    log.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"a": 1}, {"b": 2}, {"d": 4},
    ]  # fmt: skip


def test_a_run_whose_log_was_cut_in_a_line_ends(run, finished, copied):
    """The figures are drawn from it, at each repeat of the command."""
    folder, flags = copied
    (folder / "result.json").unlink()
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    code, _, said = run(flags)
    assert code == 0, said
    assert accuracy(folder) == accuracy(finished.workdir) and "no figures" not in said


def test_files_that_cannot_be_read_are_not_called_damaged(run, copied, monkeypatch):
    """Nor a folder that cannot be listed empty: the log would begin anew."""
    folder, flags = copied
    (folder / "result.json").unlink()
    before = contents(folder)
    real = pathlib.Path.read_text

    def refuses(path, *more, **options):
        if path.name == "config.json":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *more, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "read_text", refuses)
        code, _, said = run(flags)
    assert code == 2
    one_line(said, "cannot read", "config.json (Permission denied); make it readable")
    listed = os.listdir

    def hidden(path="."):
        if str(path).endswith("checkpoints"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", hidden)
        code, _, said = run(flags)
    assert code == 1 and "Permission denied" in said and "run the same command again" in said
    assert contents(folder) == before


def test_a_model_is_on_the_disk_before_its_result_says_so(tiny, tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, pathlib.Path.replace
    monkeypatch.setattr(os, "fsync", lambda number: (order.append("fsync"), fsync(number)))
    monkeypatch.setattr(
        pathlib.Path, "replace", lambda a, b: (order.append(pathlib.Path(b).name), replace(a, b))
    )
    jitted = Jitted(tiny)
    state = jitted.init(jax.random.key(0))
    export.save_models(tmp_path, jitted.experiment, state, 1, jitted.sequence)
    assert order == ["fsync", "model.safetensors", "fsync", "model.json"]


def test_a_run_that_is_trained_does_not_say_that_it_trains(run, copied):
    folder, flags = copied
    (folder / "result.json").unlink()
    code, _, said = run(flags)
    assert code == 0 and "all tasks are trained; making the results (checkpoint in" in said
    assert "going on at task" not in said


def test_figures_that_cannot_be_drawn_cost_no_result(run, tiny_flags, tmp_path, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("no fonts")

    monkeypatch.setattr("bpnjax.run.plots.draw", fails)
    folder = tmp_path / "run"
    code, _, said = run([*tiny_flags(method="sgd"), f"--workdir={folder}"])
    assert code == 0 and "no figures (RuntimeError: no fonts)" in said
    assert (folder / "result.json").is_file()


def test_folders_of_others_among_checkpoints_stay(tmp_path):
    (tmp_path / "mine").mkdir()
    for task in range(3):
        position = checkpoint.Position(task, 0, 0)
        checkpoint.save(tmp_path, position, {"a": jnp.zeros(1)}, {}, 1)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == [
        "00002-00000-000000000", "mine",
    ]  # fmt: skip


def test_sigterm_saves_and_the_run_goes_on(finished, tmp_path):
    folder = tmp_path / "run"
    line = [sys.executable, "-m", "bpnjax.main", *finished.flags, f"--workdir={folder}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    running = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment)
    for _ in range(600):
        if (folder / "metrics.jsonl").exists():
            break
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=120)
    if running.returncode not in (0, -signal.SIGTERM):  # it was not done before
        assert running.returncode == 1 and "saved at task" in said, said
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert accuracy(folder) == accuracy(finished.workdir)


_WHILE_IMPORTING = """
import os, signal, sys
from bpnjax.main import leave, run

class Finder:
    def find_spec(name, *more):
        if name == module:
            os.kill(os.getpid(), signal.SIGINT)

module = sys.argv.pop(1)
sys.meta_path.insert(0, Finder)
leave(run)
"""
_CALLBACK = """
import gc, os, signal, time
from bpnjax.main import leave

def callback(phase, info):
    gc.callbacks.remove(callback)
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(10):
        pass

def run(arguments):
    gc.callbacks.append(callback)
    gc.collect()
    time.sleep(60)
    return 0

leave(run)
"""


@pytest.mark.parametrize("module", ["jax", "orbax.checkpoint"])
def test_ctrl_c_while_modules_are_imported(module, tmp_path, finished):
    """In the first seconds there is no run yet that could save anything."""
    line = [*finished.flags, f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, "-c", _WHILE_IMPORTING, module, *line], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("bpnjax: interrupted")


def test_an_interrupt_that_python_drops_comes_again():
    """What is raised in a callback of the garbage collector is printed and forgotten else."""
    done = subprocess.run(
        [sys.executable, "-c", _CALLBACK],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=40,
    )
    assert done.returncode == 1
    one_line(done.stderr, "interrupted")


@pytest.mark.parametrize("rule", ["entropy", "statistics"])
def test_answers_that_are_nan_are_never_right(tiny, rule):
    """argmax takes NaN for class 0, which would be right for a half of the first task."""
    tiny.method, tiny.evaluate.rule = "bd_ewc", rule
    jitted = Jitted(tiny)
    state = jitted.init(jax.random.key(0))
    learner = state.learner
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), learner.params)
    state = state.replace(learner=learner.replace(params=broken))
    found = jitted.test(state, 0)
    assert [found[kind][0] for kind in ("task_told", "task_masked", "task_inferred")] == [0, 0, 0]


def test_archives_that_would_not_fit_are_refused(run, tiny_flags, tmp_path, monkeypatch, capsys):
    from bpnjax import predict

    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, x=np.zeros(10**6), train_x=np.zeros((2, 2)), train_y=np.zeros(2))
    assert path.stat().st_size < 10**5 and memory.too_large(path) == ""
    monkeypatch.setattr(memory, "_host", lambda: 10**6)
    assert "unpacked it takes" in memory.too_large(path)
    code, _, said = run([*tiny_flags(method="sgd"), f"--config.dataset.path={path}"])
    assert code == 2 and "is too large (unpacked it takes" in said
    flags = ["--model=x", f"--input={path}", f"--output={tmp_path / 'y.csv'}"]
    assert predict.run(flags) == 2 and "unpacked it takes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("train.epochs=" + "9" * 30, "train.epochs: " + "9" * 30 + " is beyond 32 bits"),
        ("bd.hidden_dim=2147483648", "bd.hidden_dim: 2147483648 is beyond 32 bits"),
    ],
)
def test_numbers_beyond_32_bits_are_refused(refused, tiny_flags, field, message):
    refused([*tiny_flags(method="bd_ewc"), f"--config.{field}"], message)


def test_figures_of_the_paper_that_are_none_are_refused_before_training(tiny):
    tiny.paper.bd_ewc = 0.9
    with pytest.raises(UserError, match=r"paper.bd_ewc: 0.9 is not a group of figures"):
        configuration.validate(tiny)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("RESOURCE_EXHAUSTED: Error writing: No space left on device", errno.ENOSPC),
        ('NOT_FOUND: Error writing "a" in OCDBT database', errno.ENOENT),
        ("PERMISSION_DENIED: Error writing", errno.EACCES),
        ("UNAVAILABLE: Error writing", errno.EIO),
    ],
)
def test_a_full_disk_is_an_error_of_the_system(words, code, tmp_path, monkeypatch):
    class Failing:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def save(self, *arguments, **options):
            raise ValueError(words)

    monkeypatch.setattr(checkpoint, "_checkpointer", Failing)
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        checkpoint.save(tmp_path, checkpoint.Position(0, 0, 1), {"a": jnp.zeros(1)}, {}, 1)
    assert caught.value.errno == code
