"""A method that a user wrote in a config file has all that the methods of the package have."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from command import ROOT, contents, one_line, process
from safetensors.numpy import load_file

import bpnjax
from bpnjax import compare, methods
from bpnjax import config as configuration
from bpnjax.data import load_sequence
from bpnjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_once")

# A bias per task that the method keeps under names of its own, and a pull towards the weights of
# the task before, whose copy serves training only.
FILE = '''
from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from bpnjax import methods, modes
from bpnjax.config import default


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Kept:
    """What the method keeps."""

    own: dict[str, jax.Array]
    anchor: dict
    tasks: jax.Array


@methods.register("mine", paper="nobody")
def mine(
    strength: Annotated[float, methods.Setting("weight of my pull", at_least=0, below=100)] = 1.0,
    units: Annotated[str, methods.Setting("what gets a bias", choices=("output", "all"))] = "all",
    layers: Annotated[str, methods.Setting("the layers it is for", pattern=True)] = ".*",
) -> methods.Method:
    """My method."""

    def biases(network, tasks=()):
        chosen = [p for p in network.layers if units == "all" or p == "output"]
        return {path: jnp.zeros((*tasks, network.layers[path].outputs)) for path in chosen}

    def init(key, params, setup):
        return Kept(biases(setup.network, (setup.num_tasks,)), params, jnp.float32(0))

    def begin_task(key, params, state, ctx):
        return params, state, biases(ctx.setup.network)

    def forward(params, task_params, state, ctx):
        own = ctx.stored_or_current(task_params, modes.select(state.own, ctx.task))
        return params, {path: {"bias": bias} for path, bias in own.items()}

    def gradient(grads, params, state, batch, ctx):
        share = strength * (state.tasks > 0)
        return jax.tree.map(lambda g, p, a: g + share * (p - a), grads, params, state.anchor)

    def end_task(params, task_params, state, data, ctx):
        own = modes.store(state.own, task_params, ctx.current)
        return params, Kept(own, params, state.tasks + 1)

    return methods.Method(
        told_task=True, init=init, begin_task=begin_task, forward=forward, gradient=gradient,
        end_task=end_task,
    )


methods.compose("mine_psp", mine, methods.psp)


def get_config():
    config = default()
    config.name = "tiny"
    config.method = "mine"
    config.dataset.name = "digits"
    config.sequence.num_tasks = 3
    config.model.hidden = (16,)
    config.train.epochs = 2
    config.train.batch_size = 32
    config.train.learning_rate = 3e-3
    return config
'''


@pytest.fixture
def file(tmp_path):
    """The config file; what it registers in this process is forgotten afterwards."""
    before = dict(methods.REGISTRY)
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    yield path
    for name in set(methods.REGISTRY) - set(before):
        del methods.REGISTRY[name]


def told(predictor, sequence):
    """Share of right answers of a loaded model on each task."""
    found = []
    for task in range(predictor.num_tasks):
        rows = sequence.test.index[task, : sequence.test.count[task]]
        labels = sequence.columns[task, sequence.test.labels[rows]]
        found.append(np.mean(predictor(sequence.test.images[rows], task=task) == labels))
    return found


def test_it_is_trained_with_its_settings_and_answers_after_loading(file, tmp_path):
    """In processes that know of the method by the file alone."""
    flags = [f"--config={file}", "--config.mine.strength=3", "--workdir=run"]
    done = process(flags, tmp_path)
    assert done.returncode == 0, done.stderr
    header, *lines = done.stderr.splitlines()
    assert header.startswith("mine on digits, 3 tasks; ")
    assert [line.partition(";")[0] for line in lines] == [
        "task 1/3 (0, 1) done", "task 2/3 (2, 3) done", "task 3/3 (4, 5) done",
    ]  # fmt: skip
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["method"] == "mine"
    assert result["config"]["mine"] == {"strength": 3.0, "units": "all", "layers": ".*"}
    assert result["memory"]["bytes_per_task"] == 4 * (16 + 6)
    # The biases answer; the copy of the weights does not.
    arrays = load_file(tmp_path / "run" / "model.safetensors")
    assert {name for name in arrays if not name.startswith("params/")} == {
        "method/own/hidden_0", "method/own/output",
    }  # fmt: skip
    assert all(arrays[f"method/own/{path}"].any(-1).all() for path in ("hidden_0", "output"))

    again = process(flags, tmp_path)
    assert again.returncode == 0 and "complete" in again.stdout
    other = process([*flags, "--config.mine.strength=2"], tmp_path)
    assert other.returncode == 2
    one_line(other.stderr, "mine.strength: 3.0 -> 2.0")

    images = tmp_path / "in.npz"
    config = configuration.load_file(str(file))
    sequence = load_sequence(config)
    np.savez(images, images=sequence.test.images[:9], task=np.arange(9) % 3 + 1)
    command = [sys.executable, "-m", "bpnjax.predict", "--model=run", "--input=in.npz"]
    command.append("--output=out.csv")

    def predict(*more):
        return subprocess.run(
            [*command, *more], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    unknown = predict()
    assert unknown.returncode == 2
    one_line(unknown.stderr, "by the method 'mine', which is not registered", "--config=FILE")
    known = predict("--config=mine.py")
    assert known.returncode == 0, known.stderr
    predictor = bpnjax.load(tmp_path / "run")
    expected = predictor(sequence.test.images[:9], task=np.arange(9) % 3)
    rows = (tmp_path / "out.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[3]) for row in rows] == expected.tolist()
    assert told(predictor, sequence) == result["accuracy"]["task_told"][0][-1]


def test_strength_is_what_the_command_says(run, file, tmp_path):
    """Strong enough, the pull holds the shared weights where the first task left them."""
    found = {}
    for strength in (0, 3, 30):
        code, _, err = run([f"--config={file}", f"--config.mine.strength={strength}",
                            f"--workdir={tmp_path / str(strength)}"])  # fmt: skip
        assert code == 0, err
        found[strength] = load_file(tmp_path / str(strength) / "model.safetensors")
    kernels = [arrays["params/hidden_0/kernel"] for arrays in found.values()]
    assert not np.array_equal(kernels[0], kernels[1])
    assert not np.array_equal(kernels[1], kernels[2])


def test_it_is_compared_with_others(file, tmp_path, capsys):
    flags = [f"--config={file}", "--methods=mine,sgd", "--config.train.epochs=1"]
    assert compare.run([*flags, "--config.mine.strength=3", f"--workdir={tmp_path / 'out'}"]) == 0
    rows = capsys.readouterr().out.splitlines()[2:4]
    assert [row.split()[0] for row in rows] == ["mine", "sgd"]
    config = json.loads((tmp_path / "out" / "mine" / "config.json").read_text())
    assert config["mine"]["strength"] == 3.0
    assert compare.run([*flags, "--config.mine.strength=-3", f"--workdir={tmp_path / 'two'}"]) == 2
    one_line(capsys.readouterr().err, "mine.strength: -3.0 is below 0")
    assert not (tmp_path / "two").exists()


def test_a_composition_of_it(run, file, tmp_path):
    flags = [f"--config={file}", "--config.method=mine_psp", "--config.mine.units=output"]
    code, _, err = run([*flags, f"--workdir={tmp_path / 'run'}"])
    assert code == 0, err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["config"]["mine"]["units"] == "output"
    arrays = load_file(tmp_path / "run" / "model.safetensors")
    assert {name for name in arrays if not name.startswith("params/")} == {
        "method/0/own/output", "method/1/hidden_0/key/seed", "method/1/output/key/seed",
    }  # fmt: skip
    sequence = load_sequence(configuration.load_file(str(file)))
    assert told(bpnjax.load(tmp_path / "run"), sequence) == result["accuracy"]["task_told"][0][-1]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("strength=-1", ["mine.strength:", "-1.0 is below 0", "give at least 0"]),
        ("strength=100", ["mine.strength:", "100.0 is not below 100", "smaller"]),
        ("strength=much", ["mine.strength:", "'much'", "float"]),
        ("strength=nan", ["mine.strength:", "nan is not finite"]),
        ("units=outputs", ["mine.units:", "unknown value 'outputs'", "did you mean output"]),
        ("layers=(", ["mine.layers:", "'('", "regular expression", "fix"]),
        ("strenth=1", ["mine.strenth:", "unknown config field", "did you mean mine.strength"]),
    ],
)
def test_bad_values_of_its_settings(refused, file, value, words):
    refused([f"--config={file}", f"--config.mine.{value}"], *words)


def test_a_bad_value_in_a_real_process(file, tmp_path):
    before = contents(tmp_path)
    done = process([f"--config={file}", "--config.mine.strength=-1"], tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    one_line(done.stderr, "mine.strength: -1.0 is below 0; give at least 0")
    assert contents(tmp_path) == before


def test_help_with_the_file_shows_its_settings(run, file):
    code, out, err = run(["--help", f"--config={file}"])
    assert (code, err) == (0, "")
    own = out.split("fields of mine, the chosen method:\n")[1].split("\n\n")[0]
    assert [" ".join(line.split()) for line in own.splitlines() if line] == [
        "mine.strength = 1.0 weight of my pull [at least 0, below 100]",
        "mine.units = 'all' what gets a bias [one of output, all]",
        "mine.layers = '.*' the layers it is for [a regular expression]",
    ]
    assert "mine, mine_psp" in " ".join(out.split())


def test_dry_run_and_overrides_know_it(run, file):
    code, out, err = run([f"--config={file}", "--dry_run", "--config.mine.strength=3"])
    assert code == 0, err
    assert "mine.strength = 3.0" in out and "method    mine (nobody)" in out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('methods.register("ewc")(lambda: None)', ["'ewc' is one of bpnjax", "another name"]),
        ('methods.register("mine")(lambda strength: None)', ["strength needs a default and"]),
        (
            'methods.register("mine", group="train")(own)',
            ["train.epochs of the method mine is declared elsewhere", "another name"],
        ),
        (
            'methods.register("mine", group="ewc")(other)',
            ["ewc.strength of the method mine is declared elsewhere", "another default"],
        ),
    ],
)
def test_registrations_that_cannot_be(refused, file, text, words):
    file.write_text(
        "from typing import Annotated\nfrom bpnjax import methods\nfrom bpnjax.config import "
        "default\n\ndef own(epochs: Annotated[int, methods.Setting('x')] = 3):\n    pass\n\n"
        "def other(strength: Annotated[float, methods.Setting('x')] = 3.0):\n    pass\n\n"
        f"{text}\n\ndef get_config():\n    return default()\n"
    )
    refused([f"--config={file}"], *words, "fix that file")


def test_a_model_of_it_needs_its_registration(file, tmp_path, run):
    code, _, err = run([f"--config={file}", "--config.train.epochs=1", "--workdir=run"])
    assert code == 0, err
    del methods.REGISTRY["mine"], methods.REGISTRY["mine_psp"]
    with pytest.raises(UserError, match=r"by the method 'mine', which is not registered; run the"):
        bpnjax.load(tmp_path / "run")
