"""The command `bpnjax packs`: what it prints, what it leaves behind, what it refuses."""

import jax
import pytest
from command import contents, one_line
from support import digits_config

import bpnjax
from bpnjax import packs
from bpnjax.data import load_sequence
from bpnjax.run.export import save_models
from bpnjax.training import epochs
from bpnjax.training.experiment import make_experiment


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a model of three tasks, as it is before training."""
    config = digits_config("bd_psp", sequence__heads="multi")
    sequence = load_sequence(config)
    experiment = make_experiment(config, sequence)
    state = epochs.init_state(experiment, jax.random.key(0))
    folder = tmp_path_factory.mktemp("model")
    save_models(folder, experiment, state, 1, sequence)
    return folder


@pytest.fixture
def run(model, tmp_path, monkeypatch, capsys):
    """Runs the command in an empty folder; exit code and the two texts."""
    monkeypatch.chdir(tmp_path)

    def command(*words):
        return packs.run(list(words)), *capsys.readouterr()

    return command


def test_pack_show_and_merge(run, model, tmp_path):
    code, out, _ = run("pack", f"--model={model}", "--tasks=3,1", "--output=a.pack")
    assert code == 0 and out.startswith("a.pack: Pack(bd_psp, network ")
    assert out.endswith("tasks: 0, 1; 4, 5)\n")
    code, out, _ = run("show", "a.pack")
    assert code == 0 and out.startswith("a.pack: Pack(bd_psp, ")
    assert run("pack", f"--model={model}", "--tasks", "2", "--output=b.pack", "--seed=0")[0] == 0
    words = ("merge", f"--model={model}", "--output=all.safetensors", "b.pack", "a.pack")
    code, out, _ = run(*words)
    assert code == 0
    assert out == "task 1: 0, 1\ntask 2: 2, 3\ntask 3: 4, 5\n3 tasks in all.safetensors\n"
    assert bpnjax.load("all.safetensors").num_tasks == 3
    assert run("pack", f"--model={model}", "--output=whole.pack", "--nostatistics")[0] == 0
    assert len(packs.unpack("whole.pack").tasks) == 3
    assert run("--help")[0] == 0


def test_refusals(run, model, tmp_path):
    run("pack", f"--model={model}", "--output=a.pack")
    before = contents(tmp_path)
    flags = (f"--model={model}", "--output=new")
    for words, *arguments in (
        ("no action; choose from: pack, merge, show",), ("unknown action 'mrge'; did", "mrge"),
        ("--model: missing", "pack", "--output=new"), ("--output: missing", "pack", flags[0]),
        ("'a.pack' is not a flag", "pack", *flags, "a.pack"),
        ("'none'", "show", "a.pack", "--none"),
        ("--tasks: 'a' is not a list of numbers", "pack", *flags, "--tasks=a"),
        ("has no task 3, but 0 to 2 (on the command line 1 to 3)", "pack", *flags, "--tasks=4"),
        ("has no task -1", "pack", *flags, "--tasks=0"),
        ("each once", "pack", *flags, "--tasks=1,1"),
        ("no model", "pack", "--model=none", "--output=new"), ("none given", "merge", *flags),
        ("none given", "show"), ("no such file", "show", "no.pack"),
        ("is not a pack but a model", "merge", *flags, f"{model}/model.safetensors"),
        ("is also in a.pack", "merge", *flags, "a.pack", "a.pack"),
        ("--output: no folder", "merge", flags[0], "--output=no/new", "a.pack"),
        ("--output: a.pack is what is read", "merge", flags[0], "--output=a.pack", "a.pack"),
        ("--config: no file 'none.py'", "pack", *flags, "--config=none.py"),
    ):  # fmt: skip
        code, out, err = run(*arguments)
        assert code == 2 and out == "", arguments
        one_line(err, words)
        assert contents(tmp_path) == before
