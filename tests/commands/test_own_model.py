"""Networks in a file beside the data, through the command as a user runs it."""

import json
import sys

import numpy as np
import pytest
from command import contents, one_line, process
from safetensors.numpy import save_file

import bpnjax
from bpnjax import config as configuration
from bpnjax import main, predict
from bpnjax.data import load_sequence
from bpnjax.run import train
from bpnjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_once")

FILE = """
import flax.linen as nn
from flax import nnx


class Linen(nn.Module):
    num_classes: int
    width: int = 8

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), strides=2, name="features")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x))
        x = nn.relu(nn.Dense(self.width, name="hidden")(x.reshape(len(x), -1)))
        return nn.Dense(self.num_classes, name="classes")(x)


class Nnx(nnx.Module):
    def __init__(self, num_classes, input_shape, width=8, *, rngs):
        self.hidden = nnx.Linear(input_shape[0] * input_shape[1], width, rngs=rngs)
        self.classes = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, x):
        return self.classes(nnx.relu(self.hidden(x.reshape(len(x), -1))))


def convert(tensors):
    return {"hidden": {"kernel": tensors["fc1"], "bias": tensors["b"]}}


def fails(num_classes):
    raise RuntimeError("out of ideas")
"""
MODULE = "nets_of_command_test"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The current folder, with a file of networks and one of weights in it."""
    folder = tmp_path_factory.mktemp("own")
    (folder / f"{MODULE}.py").write_text(FILE)
    weights = {"fc1": np.full((64, 12), 0.01, np.float32), "b": np.ones(12, np.float32)}
    save_file(weights, folder / "w.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.mark.parametrize(
    ("network", "method"),
    [
        ("Linen", "bd_ewc"), ("Nnx", "er"),
        pytest.param("Linen", "er", marks=pytest.mark.slow),
        pytest.param("Nnx", "bd_ewc", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_trained_by_the_command_and_loaded(folder, tiny_flags, network, method):
    fields = {"model__factory": f"{MODULE}:{network}", "model__options": "width=12",
              "method": method, "num_seeds": 2 if network == "Nnx" else 1}  # fmt: skip
    workdir = folder / f"{network}_{method}"
    done = process([*tiny_flags(**fields), f"--workdir={workdir}"], folder)
    assert done.returncode == 0, done.stderr
    result = json.loads((workdir / "result.json").read_text())
    predictor = bpnjax.load(workdir)
    assert predictor.learner.network.layers["hidden"].outputs == 12
    config = configuration.default()
    config.update_from_flattened_dict(configuration.flatten(result["config"]))
    sequence = load_sequence(config)
    for task in range(3):
        rows = sequence.test.index[task, : sequence.test.count[task]]
        labels = sequence.columns[task, sequence.test.labels[rows]]
        right = np.mean(predictor(sequence.test.images[rows], task=task) == labels)
        assert right == pytest.approx(result["accuracy"]["task_told"][0][-1][task])


def test_resumed_bit_for_bit(folder, tiny, tmp_path, monkeypatch):
    tiny.model.factory = f"{MODULE}:Nnx"
    tiny.train.epochs = 1
    train.train_and_evaluate(tiny, tmp_path / "whole")

    class Cut(Exception):
        pass

    def cut(self, task):
        if task == 1:
            raise Cut
        return whole(self, task)

    whole = train._Run.train_task
    with monkeypatch.context() as patch:
        patch.setattr(train._Run, "train_task", cut)
        with pytest.raises(Cut):
            train.train_and_evaluate(tiny, tmp_path / "cut")
    train.train_and_evaluate(tiny, tmp_path / "cut")
    one, other = (tmp_path / name / "model.safetensors" for name in ("whole", "cut"))
    assert one.read_bytes() == other.read_bytes()


def test_weights_by_a_mapping_and_what_would_run(folder, tiny_flags, capsys):
    flags = tiny_flags(
        model__factory=f"{MODULE}:Nnx", model__options="width=12", train__epochs=1, method="sgd",
        model__pretrained="w.safetensors", model__mapping=f"{MODULE}:convert",
        train__rates="hidden=0",
    )  # fmt: skip
    assert main.run([*flags, "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert f"network   {MODULE}:Nnx(width=12), input (8, 8, 1)" in shown
    assert "hidden: dense, 64 -> 12" in shown
    assert main.run([*flags, "--workdir=mapped"]) == 0
    # The model needs neither the file of weights nor the mapping, once it is trained.
    (folder / "w.safetensors").unlink()
    kept = bpnjax.load("mapped").state.params["hidden"]["kernel"]
    np.testing.assert_array_equal(kept, np.full((64, 12), 0.01, np.float32))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model__factory": "no_such_file:make"}, ["model.factory:", "'no_such_file'", "current"]),
        ({"model__factory": f"{MODULE}:linen"}, ["has no function 'linen'; did you mean Linen"]),
        ({"model__factory": f"{MODULE}:fails"}, [f"{MODULE}:fails: RuntimeError: out of ideas"]),
        ({"model__factory": f"{MODULE}:Linen", "model__options": "wide=3"}, ["did you mean width"]),
        ({"model__options": "width=3"}, ["model.options: mlp has no 'width'; it takes none"]),
        ({"model__name": "resnet19"}, ["model.name:", "'resnet19'", "did you mean resnet18"]),
        ({"model__name": "vit", "model__options": "patch=3"}, ["model.name: vit:", "patch=3"]),
    ],
)  # fmt: skip
def test_refusals(folder, tiny_flags, capsys, fields, words):
    before = contents(folder)
    assert main.run([*tiny_flags(**fields), "--workdir=refused"]) == 2
    one_line(capsys.readouterr().err, *words)
    assert contents(folder) == before


def test_a_model_whose_network_is_not_there(folder, tiny, tmp_path, monkeypatch):
    (folder / "nets_that_go.py").write_text(FILE)
    tiny.model.factory, tiny.train.epochs = "nets_that_go:Linen", 1
    tiny.method = "sgd"
    train.train_and_evaluate(tiny, tmp_path / "run")
    (folder / "nets_that_go.py").unlink()
    monkeypatch.delitem(sys.modules, "nets_that_go")
    with pytest.raises(UserError, match="model.factory: no module 'nets_that_go'; it is looked"):
        bpnjax.load(tmp_path / "run")


def test_a_network_that_is_not_trusted_is_not_imported(folder, tiny, tmp_path, monkeypatch, capsys):
    (folder / "nets_of_others.py").write_text(FILE)
    tiny.model.factory, tiny.train.epochs, tiny.method = "nets_of_others:Linen", 1, "sgd"
    train.train_and_evaluate(tiny, tmp_path / "run")
    monkeypatch.delitem(sys.modules, "nets_of_others")
    said = "its network is model.factory=nets_of_others:Linen, code that BPNJAX_TRUSTED_FACTORIES="
    for trusted in ("", "nets_of_others", "nets_of_others:Nnx, other:Linen"):
        monkeypatch.setenv("BPNJAX_TRUSTED_FACTORIES", trusted)
        with pytest.raises(UserError, match=f"{said}'{trusted}' does not name"):
            bpnjax.load(tmp_path / "run")
    np.savez(tmp_path / "x.npz", x=np.zeros((1, 8, 8, 1), np.uint8))
    flags = [f"--model={tmp_path / 'run'}", f"--input={tmp_path / 'x.npz'}", "--output=y.csv"]
    capsys.readouterr()
    assert predict.run(flags) == 2
    one_line(capsys.readouterr().err, said)
    assert "nets_of_others" not in sys.modules
    monkeypatch.setenv("BPNJAX_TRUSTED_FACTORIES", "other:Linen, nets_of_others:Linen")
    assert bpnjax.load(tmp_path / "run").num_tasks == 3
