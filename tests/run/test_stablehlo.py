"""Exported programs: run where bpnjax is not, they answer as the model that they come from."""

import json
import os
import subprocess
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest
from support import digits_config

import bpnjax
from bpnjax import deploy, models
from bpnjax.data import load_sequence
from bpnjax.models.registry import Factory
from bpnjax.run import stablehlo, train
from bpnjax.run.export import save_models
from bpnjax.training import epochs
from bpnjax.training.experiment import make_experiment
from bpnjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_once")

SCRIPT = """
import sys
import jax, numpy as np
from jax import export
for name in sys.argv[1:]:
    with open(name, "rb") as file:
        program = export.deserialize(file.read())
    given = np.load(name + ".npz")
    found = {n: np.asarray(program.call(given["x"][:n], given["task"][:n])) for n in (40, 1)}
    for n, logits in found.items():
        np.testing.assert_allclose(logits, given["logits"][:n], rtol=1e-5, atol=1e-5)
    assert logits.dtype == np.float32
    wrong = np.array([0, 3, -1], np.int32)
    logits = np.asarray(program.call(given["x"][:3], wrong))
    assert np.isnan(logits).all(1).tolist() == [False, True, True]
    print(name)
assert not [m for m in sys.modules if m.startswith(("bpnjax", "flax", "optax"))], "more than jax"
"""
CASES = {
    "bd_ewc": {},
    "bd_psp": {},
    "er": {},
    "bd_psp_ewc": {"sequence__heads": "multi"},
    "psp": {"sequence__kind": "permuted"},
    "stl": {},
    "imm_mean": {"model__name": "convnet", "model__channels": (4,), "model__hidden": (8,)},
    "sgd": {"model__name": "normed", "model__batch_statistics": "task"},
    "xdg": {},
}


class Normed(nn.Module):
    """A hidden layer with BatchNorm."""

    num_classes: int

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(16, name="hidden")(x.reshape(x.shape[0], -1))
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(self.num_classes, name="output")(x)


class Odd(nn.Module):
    """A network that looks at how many examples there are."""

    num_classes: int

    @nn.compact
    def __call__(self, x):
        if x.shape[0] > 100:
            x = x + 1
        return nn.Dense(self.num_classes, name="output")(x.reshape(x.shape[0], -1))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for name, make in (("normed", Normed), ("odd", Odd)):
        monkeypatch.setitem(models.REGISTRY, name, Factory(name, make))


@pytest.fixture
def make_model(tmp_path):
    """The folder of a model of three tasks, without training: all that floats is random."""

    def make(method, **fields):
        config = digits_config(method, **fields)
        sequence = load_sequence(config)
        experiment = make_experiment(config, sequence)
        state = epochs.init_state(experiment, jax.random.key(0))
        rng = np.random.default_rng(0)

        def moved(leaf):
            if not jax.dtypes.issubdtype(leaf.dtype, jax.numpy.floating):
                return leaf
            return leaf + rng.uniform(0, 0.5, leaf.shape).astype(leaf.dtype)

        folder = tmp_path / method
        folder.mkdir()
        save_models(folder, experiment, jax.tree.map(moved, state), 1, sequence)
        return folder, sequence

    return make


def test_a_script_with_jax_alone_gives_the_same_logits(make_model, tmp_path):
    """A batch that mixes all tasks, of any size, for each kind of method."""
    names = []
    for method, fields in CASES.items():
        folder, sequence = make_model(method, **fields)
        predictor = bpnjax.load(folder)
        x = sequence.test.images[:40]
        task = np.arange(40, dtype=np.int32) % 3
        logits = predictor.logits(predictor.permuted(x, task), task)
        assert len({row.tobytes() for row in logits}) > 20
        file = tmp_path / f"{method}.stablehlo"
        assert bpnjax.export(folder, file) == file
        np.savez(f"{file}.npz", x=predictor.permuted(x, task), task=task, logits=logits)
        names.append(str(file))
        # About as large as the model that it comes from; a fixed part of a few KB.
        assert file.stat().st_size < (folder / "model.safetensors").stat().st_size + 20_000
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *names], cwd=tmp_path, capture_output=True, text=True,
        env={n: v for n, v in os.environ.items() if n != "PYTHONPATH"}, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(CASES)


def test_what_stands_beside_the_program(make_model, tmp_path):
    folder, _ = make_model("bd_psp", sequence__heads="multi")
    bpnjax.export(folder, tmp_path / "a.stablehlo", platforms=["cpu"], batch=2)
    said = json.loads((tmp_path / "a.stablehlo.json").read_text())
    assert said["inputs"] == [
        {"name": "x", "dtype": "uint8", "shape": [2, 8, 8, 1]},
        {"name": "task", "dtype": "int32", "shape": [2], "tasks": 3},
    ]
    assert said["outputs"] == [{"name": "logits", "dtype": "float32", "shape": [2, 6]}]
    assert said["class_names"] == list("012345") and said["tasks"] == [[0, 1], [2, 3], [4, 5]]
    assert said["platforms"] == ["cpu"] and said["own_outputs_only"] is True
    program = jax.export.deserialize((tmp_path / "a.stablehlo").read_bytes())
    assert program.platforms == ("cpu",)
    x, task = np.zeros((2, 8, 8, 1), np.uint8), np.array([0, 2], np.int32)
    logits = np.asarray(program.call(x, task))
    assert (logits[0, 2:] == -1e9).all() and (logits[1, :4] == -1e9).all()
    with pytest.raises(ValueError):
        program.call(np.zeros((3, 8, 8, 1), np.uint8), np.zeros(3, np.int32))


def test_programs_are_made_for_platforms_that_are_not_here(make_model, tmp_path):
    folder, _ = make_model("bd_psp")
    file = bpnjax.export(bpnjax.load(folder), tmp_path / "a.stablehlo")
    program = jax.export.deserialize(file.read_bytes())
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert "threefry" not in program.mlir_module()  # the keys stand in it, no generator does


def test_layers_computed_once_are_in_the_program(tmp_path):
    """A model whose frozen layers were run once reads images, and so does its program."""
    small = {"model__name": "small_alexnet", "model__channels": (4, 4, 6, 4, 4),
             "model__hidden": (12, 12), "train__epochs": 1, "sequence__num_tasks": 2}  # fmt: skip
    config = digits_config("sgd", **small)
    experiment = make_experiment(config, load_sequence(config))
    state = epochs.init_state(experiment, jax.random.key(0))
    save_models(tmp_path, experiment, state, 1, load_sequence(config))
    (tmp_path / "model.safetensors").rename(tmp_path / "start.safetensors")
    config = digits_config(
        "bd_ewc", model__pretrained=str(tmp_path / "start.safetensors"), train__features_once=True,
        train__rates="conv_.*=0", bd__layers="fc6|fc7|output", **small,
    )  # fmt: skip
    train.train_and_evaluate(config, tmp_path / "run")
    predictor = bpnjax.load(tmp_path / "run")
    assert predictor.extract is not None
    x, task = load_sequence(config).test.images[:6], np.array([0, 1, 1, 0, 1, 0], np.int32)
    file = bpnjax.export(tmp_path / "run", tmp_path / "a.stablehlo", platforms=["cpu"])
    program = jax.export.deserialize(file.read_bytes())
    np.testing.assert_allclose(
        program.call(x, task), predictor.logits(x, task), rtol=1e-5, atol=1e-6
    )


def test_refusals(make_model, tmp_path, monkeypatch):
    folder, _ = make_model("bd_psp")
    model, out = folder / "model.safetensors", tmp_path / "a.stablehlo"
    whole = model.read_bytes()
    for said, arguments in (
        ("no model", (tmp_path / "none", out)), ("out: no folder", (folder, tmp_path / "no" / "a")),
        ("out: .* is not a file that can be replaced", (folder, tmp_path)),
        ("out: .* is what is read", (model, model)),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            bpnjax.export(*arguments)
    for said, options in (
        ("batch: 0 is not a number of examples", {"batch": 0}), ("batch: True", {"batch": True}),
        ("batch: 2.5", {"batch": 2.5}), ("platforms: none given", {"platforms": ()}),
        ("platforms: 'gpu' is not one; .*c", {"platforms": ["gpu"]}), ("no model", {"seed": 5}),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            bpnjax.export(folder, out, **options)
    monkeypatch.setattr(stablehlo, "_MOST", 1000)
    with pytest.raises(UserError, match="out: a program with 0.0 GB of weights does not fit"):
        bpnjax.export(folder, out)
    assert model.read_bytes() == whole and not out.exists()


def test_a_network_for_one_batch_size(make_model, tmp_path):
    """What a network decides by the size of its batch, it can decide for one size only."""
    folder, _ = make_model("sgd", model__name="odd")
    with pytest.raises(UserError, match="batch: .* for batches of any size .*as batch=32") as error:
        bpnjax.export(folder, tmp_path / "a.stablehlo")
    assert "\n" not in str(error.value) and not list(tmp_path.glob("*.stablehlo*"))
    bpnjax.export(folder, tmp_path / "a.stablehlo", batch=32)


def test_command(make_model, tmp_path, capsys):
    folder, _ = make_model("bd_psp")
    out = tmp_path / "a.stablehlo"
    flags = [f"--model={folder}", f"--output={out}"]
    assert deploy.run([*flags, "--platforms=cpu,tpu", "--batch=3", "--seed=0"]) == 0
    size = f"{out.stat().st_size / 1e3:,.0f} KB"
    assert capsys.readouterr().out == f"a program of {size} in {out}, described in {out}.json\n"
    said = json.loads((tmp_path / "a.stablehlo.json").read_text())
    assert said["platforms"] == ["cpu", "tpu"] and said["inputs"][0]["shape"][0] == 3
    for words, more in (
        ("--model: missing", [flags[1]]), ("--output: missing", [flags[0]]),
        ("--batch: 0 is not a number", [*flags, "--batch=0"]),
        ("'more' is not a flag", [*flags, "more"]),
        ("--platforms: 'gpu' is not one", [*flags, "--platforms=gpu"]), ("'none'", ["--none"]),
        ("--output: no folder", [flags[0], f"--output={tmp_path / 'no' / 'a'}"]),
        ("no model", [f"--model={tmp_path}", flags[1]]),
        ("--config: no file 'none.py'", [*flags, "--config=none.py"]),
    ):  # fmt: skip
        assert deploy.run(more) == 2
        err = capsys.readouterr().err
        assert words in err and err.startswith("bpnjax: ") and err.count("\n") == 1
    assert deploy.run(["--help"]) == 0
