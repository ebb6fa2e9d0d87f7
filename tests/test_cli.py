"""The command: what it refuses and how it says so, and what a run leaves behind.

A refusal is one line on stderr, exit code 2, and nothing written: the fixture `refused` holds
every bad input to that.
"""

import csv
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from bpnjax import checkpoint, main, methods, train
from bpnjax import config as configuration
from bpnjax.data import cache, prepare
from bpnjax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))
FILES = (
    "accuracy.csv", "accuracy_matrix.png", "checkpoints", "config.json", "learning_curves.png",
    "metrics.jsonl", "model.json", "model.safetensors", "result.json",
)  # fmt: skip
KINDS = ("task_masked", "task_told", "task_inferred")

pytestmark = pytest.mark.usefixtures("compile_once")


def contents(folder):
    """Every path below a folder with its bytes, None for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def process(arguments, cwd):
    """Runs the command as a user does, from another folder than the repository's."""
    return subprocess.run(
        [sys.executable, "-m", "bpnjax.main", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def one_line(stderr, *words):
    assert stderr.startswith("bpnjax: ") and stderr.endswith("\n") and stderr.count("\n") == 1
    for word in words:
        assert word in stderr
    return stderr


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the command in an empty folder; returns exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def command(arguments):
        capsys.readouterr()
        code = main.run([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return command


@pytest.fixture
def refused(run, tmp_path):
    """Checks that a command is refused in one line with all the words, and writes nothing."""

    def check(arguments, *words):
        before = contents(tmp_path)
        code, out, err = run(arguments)
        assert code == 2, err
        one_line(err, *words)
        assert out == ""
        assert contents(tmp_path) == before
        return err

    return check


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_flags, compile_once):
    """A run that a real process did, with the default workdir."""
    cwd = tmp_path_factory.mktemp("finished")
    flags = tiny_flags(method="bd_ewc", checkpoint__every_steps=7)
    done = process(flags, cwd)
    assert done.returncode == 0, done.stderr
    return types.SimpleNamespace(
        cwd=cwd, flags=flags, out=done.stdout, err=done.stderr, workdir=cwd / "runs/tiny/bd_ewc"
    )


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of it to damage, and the flags that run it there."""
    workdir = tmp_path / "run"
    shutil.copytree(finished.workdir, workdir)
    return workdir, [*finished.flags, f"--workdir={workdir}"]


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# Fields and flags


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.train.epoch=3", ["train.epoch:", "unknown", "did you mean train.epochs"]),
        ("--config.qqqq=3", ["qqqq:", "unknown", "choose from", "train.epochs"]),
        ("--config.train=3", ["train:", "group", "--config.train."]),
        ("--config.method=bd_ewx", ["method:", "'bd_ewx'", "did you mean bd_ewc"]),
        ("--config.method=", ["method:", "''", "choose from"]),
        ("--config.train.optimizer=adamm", ["train.optimizer:", "'adamm'", "did you mean adam"]),
        ("--config.model.name=mpl", ["model.name:", "'mpl'", "did you mean mlp"]),
        ("--config.train.epochs=abc", ["train.epochs:", "'abc'", "give", "int"]),
        ("--config.train.epochs=1.5", ["train.epochs:", "'1.5'", "give", "int"]),
        ("--config.train.epochs=", ["train.epochs:", "''", "give", "int"]),
        ("--config.train.learning_rate=x", ["train.learning_rate:", "'x'", "give", "float"]),
        ("--config.train.reset_optimizer=maybe", ["train.reset_optimizer:", "'maybe'", "bool"]),
        ("--config.train.epochs", ["train.epochs", "Missing value", "--help"]),
        ("--config.train.epochs=0", ["train.epochs:", "0", "at least 1"]),
        ("--config.train.batch_size=0", ["train.batch_size:", "0", "at least 1"]),
        ("--config.bd.hidden_dim=0", ["bd.hidden_dim:", "0", "at least 1"]),
        ("--config.bd.hidden_dim=-3", ["bd.hidden_dim:", "-3", "at least 1"]),
        ("--config.num_seeds=0", ["num_seeds:", "0", "at least 1"]),
        ("--config.seed=-1", ["seed:", "-1", "at least 0"]),
        ("--config.seed=99999999999999999999", ["seed:", "99999999999999999999", "at most"]),
        ("--config.bd.epsilon=0", ["bd.epsilon:", "0.0", "above 0"]),
        ("--config.bd.epsilon=-0.1", ["bd.epsilon:", "-0.1", "above 0"]),
        ("--config.bd.epsilon=nan", ["bd.epsilon:", "nan", "above 0"]),
        ("--config.train.learning_rate=inf", ["train.learning_rate:", "inf", "above 0"]),
        ("--config.ewc.strength=-1", ["ewc.strength:", "-1.0", "0 or more"]),
        ("--config.dataset.validation=1", ["dataset.validation:", "1", "below 1"]),
        ("--config.model.hidden=(16,0)", ["model.hidden:", "(16, 0)", "positive"]),
        ("--config.model.hidden=wide", ["model.hidden:", "'wide'", "positive"]),
        ("--config.dataset.resize=(8,8)", ["dataset.resize:", "(8, 8)", "height, width"]),
        ("--config.bd.layers=(", ["bd.layers:", "'('", "regular expression", "mend"]),
        ("--config.psp.layers=*", ["psp.layers:", "'*'", "regular expression", "mend"]),
        ("--config.devices=1000", ["devices:", "1000", "give 'all' or"]),
        ("--config.devices=0", ["devices:", "0", "give 'all' or"]),
        ("--config.devices=two", ["devices:", "'two'", "'all'"]),
        ("--config.devices=²", ["devices:", "'²'", "'all'"]),
        ("--bogus=3", ["bogus", "--help"]),
        ("--overwrite=maybe", ["overwrite", "maybe", "--help"]),
        ("stray", ["'stray'", "--config.FIELD=VALUE"]),
        ("--workdir", ["--workdir", "Missing value", "--help"]),
        ("--config=other.py", ["--config:", "more than once", "one"]),
        # These need the data.
        ("--config.sequence.num_tasks=6", ["sequence.num_tasks:", "6", "10", "lower"]),
        ("--config.sequence.classes_per_task=4", ["classes_per_task", "12", "10", "lower"]),
        ("--config.sequence.classes=0,1;77", ["sequence.classes:", "77", "0 to 9"]),
        ("--config.sequence.classes=0,1;x", ["sequence.classes:", "'0,1;x'", "as in"]),
        ("--config.train.batch_size=1000", ["train.batch_size:", "1000", "task 2", "at most"]),
        (
            "--config.evaluate.on=validation",
            ["dataset.validation:", "0.0", "--config.dataset.validation=0.1"],
        ),
        ("--config.dataset.name=digits,gaussians", ["dataset.name:", "'digits,gaussians'", "one"]),
        ("--config.dataset.name=", ["dataset.name:", "''", "one"]),
    ],
)
def test_bad_argument(refused, tiny_flags, argument, words):
    refused([*tiny_flags(), argument], *words)


def test_unknown_dataset(refused, tiny_flags, monkeypatch, tmp_path):
    import socket

    def no_network(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    flags = tiny_flags(dataset__name="mnits", dataset__data_dir=tmp_path / "none")
    refused(flags, "dataset.name", "'mnits'", "unknown", "did you mean mnist")


def test_bad_input_in_a_real_process(tmp_path, tiny_flags):
    done = process([*tiny_flags(), "--config.train.epoch=3"], tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    one_line(done.stderr, "train.epoch:", "did you mean train.epochs")
    assert contents(tmp_path) == {}


def test_last_of_repeated_values_counts(tiny_flags):
    """absl alone would join the tuples."""
    repeated = [*tiny_flags(model__hidden=(4, 4)), "--config.model.hidden=(7,)"]
    config, _, _ = main.parse([*repeated, "--config.train.epochs=5", "--config.train.epochs=6"])
    assert (config.model.hidden, config.train.epochs) == ((7,), 6)


def test_workdir_named_config_is_no_flag(tiny_flags):
    _, workdir, _ = main.parse(["--workdir", "config", *tiny_flags()])
    assert workdir == pathlib.Path("config")


# Config files


@pytest.mark.parametrize("arguments", [[], ["--workdir=x"], ["--config.train.epochs=3"]])
def test_config_missing(refused, arguments):
    refused(arguments, "--config", "missing", "--config=configs/digits.py")


@pytest.mark.parametrize("argument", ["--config=none.py", "--config", "--config=", "--config=."])
def test_config_file_that_does_not_exist(refused, argument):
    refused([argument], "--config: no file", "name a config file")


BEGIN = "from bpnjax.config import default\n\ndef get_config():\n    c = default()\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("raise RuntimeError('first line\\nsecond')", ["RuntimeError: first line", "mend"]),
        ("raise KeyError", ["KeyError", "mend"]),
        ("def get_config(:", ["SyntaxError", "mend"]),
        ("\0", ["raises", "mend"]),
        ("import sys\nsys.exit(0)", ["SystemExit", "mend"]),
        ("import no_such_module", ["ModuleNotFoundError", "no_such_module", "mend"]),
        ("x = 1", ["no get_config()", "add one"]),
        ("get_config = 1", ["TypeError", "mend"]),
        ("def get_config():\n    import sys\n    sys.exit('bye')", ["SystemExit: bye", "mend"]),
        ("def get_config():\n    pass", ["NoneType", "return a ConfigDict"]),
        ("def get_config():\n    return {'seed': 1}", ["dict", "return a ConfigDict"]),
        (
            "import ml_collections\n\ndef get_config():\n    return ml_collections.ConfigDict()",
            ["missing in", "start from bpnjax.config.default()"],
        ),
        (BEGIN + "    c.epochs = 3\n    return c", ["epochs:", "unknown", "train.epochs"]),
        (BEGIN + "    c.train.epoch = 3\n    return c", ["train.epoch:", "mean train.epochs"]),
        (BEGIN + "    c.train.epochs = 'x'\n    return c", ["TypeError", "mend"]),
        (BEGIN + "    c.seed = None\n    return c", ["seed:", "None", "int"]),
        (BEGIN + "    c.train.epochs = 0\n    return c", ["train.epochs:", "0", "at least 1"]),
        (BEGIN + "    c.dataset.resize = (8, 'a', 1)\n    return c", ["dataset.resize:", "'a'"]),
    ],
)
def test_bad_config_file(refused, tmp_path, text, words):
    (tmp_path / "mine.py").write_text(text)
    refused(["--config=mine.py"], *words)


def test_config_file_changed_at_once_is_read_again(tmp_path):
    """Same size, same second: bytecode kept from the first reading would be taken for good."""
    file = tmp_path / "mine.py"
    for epochs in (3, 5):
        file.write_text(BEGIN + f"    c.train.epochs = {epochs}\n    return c")
        assert configuration.load_file(str(file)).train.epochs == epochs
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_and_its_command(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = configuration.load_file(str(path))
    made_first = ["--config.model.pretrained="] if config.model.pretrained else []
    config.model.pretrained = ""
    configuration.validate(config)

    source = path.read_text()
    docstring = compile(source, path.name, "exec").co_consts[0]
    found = re.findall(r"^ *python -m bpnjax\.(?:main|pretrain) (.*)$", docstring, re.MULTILINE)
    command = [line for line in found if f"--config={path.relative_to(ROOT)}" in line]
    assert command, "its docstring says how to run it"
    monkeypatch.chdir(ROOT)
    parsed, workdir, values = main.parse([*command[0].split(), *made_first])
    assert workdir == pathlib.Path("runs", parsed.name, parsed.method) and not values.overwrite


# The workdir


def test_other_configuration_is_refused_with_the_differences(refused, copied):
    _, flags = copied
    changed = [*flags, "--config.train.epochs=3", "--config.model.hidden=(16,)"]
    refused(
        changed,
        "train.epochs: 2 -> 3", "model.hidden: [16, 16] -> [16]", "another folder", "--overwrite",
    )  # fmt: skip
    refused([*flags, "--config.method=sgd"], "method: 'bd_ewc' -> 'sgd'")


def test_fields_that_change_no_result_are_no_other_configuration(run, copied):
    workdir, flags = copied
    before = contents(workdir)
    code, out, err = run([*flags, "--config.checkpoint.keep=9", "--config.dataset.cache_dir=x"])
    assert (code, err) == (0, "") and "complete" in out
    assert contents(workdir) == before


def test_a_field_that_an_earlier_version_did_not_have_counts_as_its_default(copied, tiny):
    from bpnjax import workdir as folders

    workdir, _ = copied
    path = workdir / "config.json"
    saved = json.loads(path.read_text())
    del saved["ewc"]["examples"]
    path.write_text(json.dumps(saved))
    tiny.update_from_flattened_dict(configuration.flatten(saved))
    assert folders.check(workdir, tiny, overwrite=False)
    tiny.ewc.examples = 5
    with pytest.raises(UserError, match=r"ewc.examples: 0 -> 5"):
        folders.check(workdir, tiny, overwrite=False)


def test_workdir_is_a_file(refused, tiny_flags, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused([*tiny_flags(), "--workdir=file"], "--workdir", "file", "name a folder")
    refused([*tiny_flags(), "--workdir=file/below/it"], "--workdir", "file", "name a folder")
    refused([*tiny_flags(), "--workdir=file", "--overwrite"], "--workdir", "name a folder")


def test_workdir_with_a_name_too_long(refused, tiny_flags):
    refused([*tiny_flags(), f"--workdir={'x' * 300}"], "--workdir", "too long", "name another")


def test_workdir_that_cannot_be_written(refused, tiny_flags, monkeypatch):
    """Simulated, since to root everything can be."""
    monkeypatch.setattr(os, "access", lambda *args, **kwargs: False)
    refused([*tiny_flags(), "--workdir=there"], "--workdir", "cannot write", "name another")


def test_workdir_that_turns_out_not_to_be_writable(refused, tiny_flags, monkeypatch, tmp_path):
    (tmp_path / "there").mkdir()

    def fail(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("bpnjax.workdir.write_atomically", fail)
    flags = [*tiny_flags(), "--workdir=there"]
    refused(flags, "--workdir", "Permission denied", "name another")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_workdir_without_permission(refused, tiny_flags, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there").chmod(0o500)
    refused([*tiny_flags(), "--workdir=there/below"], "--workdir", "cannot write", "name another")


@pytest.mark.parametrize("damage", [b"", b'{"name": "ti', b"[]", b"3", b"null", b"\xff\xfe\0"])
def test_damaged_config_json(refused, copied, damage):
    workdir, flags = copied
    (workdir / "config.json").write_bytes(damage)
    refused(flags, "--workdir", "config.json is damaged", "--overwrite")


def test_results_without_config_json(refused, copied):
    """Checkpoints of who knows which configuration are neither taken up nor overwritten."""
    workdir, flags = copied
    (workdir / "config.json").unlink()
    (workdir / "result.json").unlink()
    refused(flags, "--workdir", "no config.json", "--overwrite")


@pytest.mark.parametrize(
    "impossible",
    [
        "--config.train.batch_size=1000",
        "--config.sequence.num_tasks=6",
        "--config.devices=1000",
        "--config.method=none",
        "--config.train.epochs=0",
        "--config.dataset.validation=x",
        "--config.evaluate.on=validation",
    ],
)
def test_overwrite_with_an_impossible_configuration_loses_nothing(refused, copied, impossible):
    _, flags = copied
    refused([*flags, "--overwrite", impossible])


def test_overwrite_replaces_the_run_and_nothing_else(run, copied):
    workdir, flags = copied
    (workdir / "notes.txt").write_text("mine")
    code, out, _ = run([*flags, "--overwrite", "--config.train.epochs=1", "--config.method=sgd"])
    assert code == 0 and "complete" not in out
    assert (workdir / "notes.txt").read_text() == "mine"
    assert sorted(p.name for p in workdir.iterdir()) == sorted([*FILES, "notes.txt"])
    result = json.loads((workdir / "result.json").read_text())
    assert (result["method"], result["config"]["train"]["epochs"]) == ("sgd", 1)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert (
        json.loads(lines[0])["total_steps"] == 7
        and max(json.loads(line).get("epoch", 1) for line in lines) == 1
    )


def test_overwrite_cut_short_leaves_nothing_for_another_configuration(copied, tiny, monkeypatch):
    """Killed while it removes files, the folder is still the old configuration's."""
    from bpnjax import workdir as folders

    workdir, _ = copied
    tiny.train.learning_rate = 0.5

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(folders, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        folders.claim(workdir, tiny, overwrite=True)
    assert not (workdir / "checkpoints").exists()
    with pytest.raises(UserError, match="another configuration"):
        folders.check(workdir, tiny, overwrite=False)


# The cache


class FakeBuilder:
    """What `bpnjax.data.sources` asks of a TFDS builder: random pictures of ten classes."""

    name = "fakeset"

    def __init__(self, folder):
        folder.mkdir(exist_ok=True)
        (folder / "dataset_info.json").write_text("{}")
        self.data_dir = folder
        self.decoded = []
        names = [f"class {i}" for i in range(10)]
        self.info = types.SimpleNamespace(
            features={"image": None, "label": types.SimpleNamespace(names=names)},
            splits={
                "train": types.SimpleNamespace(num_examples=400),
                "test": types.SimpleNamespace(num_examples=100),
            },
            version="1.0.0",
        )

    def as_data_source(self, split):
        self.decoded.append(split)
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (self.info.splits[split].num_examples, 4, 4, 1), np.uint8)

        class Source(list):
            def __getitems__(self, rows):
                return [self[row] for row in rows]

        return Source({"image": image, "label": i % 10} for i, image in enumerate(images))


@pytest.fixture
def cached(tmp_path, monkeypatch, tiny_flags):
    """A decoded set in its cache: the builder, the train split's folder, and flags that use it."""
    builder = FakeBuilder(tmp_path / "prepared")
    monkeypatch.setattr(prepare, "ensure_prepared", lambda *args: builder)
    flags = tiny_flags(dataset__name="fakeset", dataset__cache_dir=tmp_path / "cache")
    config, _, _ = main.parse(flags)
    train.load_sequence(config)
    assert builder.decoded == ["train", "test"]
    train.load_sequence(config)
    assert builder.decoded == ["train", "test"]  # the second time from the cache
    (split,) = (tmp_path / "cache").rglob("train-as-is")
    return builder, split, flags


def test_cache_serves_what_was_decoded(cached):
    builder, split, _ = cached
    arrays = cache.read(split)
    source = builder.as_data_source("train")
    np.testing.assert_array_equal(arrays["images"], [e["image"] for e in source])
    np.testing.assert_array_equal(arrays["labels"], [e["label"] for e in source])
    assert (arrays["images"].dtype, arrays["labels"].dtype) == (np.uint8, np.int32)
    assert not arrays["images"].flags.writeable


def flip_last_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated pictures": lambda split: half(split / "images.npy"),
    "empty pictures": lambda split: (split / "images.npy").write_bytes(b""),
    "one bit of the labels": lambda split: flip_last_byte(split / "labels.npy"),
    "no labels": lambda split: (split / "labels.npy").unlink(),
    "no manifest": lambda split: (split / "manifest.json").unlink(),
    "truncated manifest": lambda split: half(split / "manifest.json"),
    "manifest of another kind": lambda split: (split / "manifest.json").write_text("[1]"),
    "manifest of nothing": lambda split: (split / "manifest.json").write_text("{}"),
    "file for folder": lambda split: (shutil.rmtree(split), split.write_text("x")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cache(refused, cached, damage):
    builder, split, flags = cached
    DAMAGES[damage](split)
    refused(flags, "dataset.cache_dir", str(split), "damaged", "delete")
    assert builder.decoded == ["train", "test"]
    shutil.rmtree(split) if split.is_dir() else split.unlink()  # the mend that it names
    train.load_sequence(main.parse(flags)[0])
    assert builder.decoded == ["train", "test", "train"]


def test_cache_write_is_whole_or_not_at_all(tmp_path, monkeypatch):
    arrays = {"images": np.arange(12, dtype=np.uint8).reshape(3, 4), "labels": np.arange(3)}
    assert cache.read(tmp_path / "set" / "train") is None
    with monkeypatch.context() as patch:

        def full(path, array):
            raise OSError(28, "No space left on device")

        patch.setattr(np, "save", full)
        with pytest.raises(OSError):
            cache.write(tmp_path / "set" / "train", arrays)
    assert list((tmp_path / "set").iterdir()) == []
    cache.write(tmp_path / "set" / "train", arrays)
    cache.write(tmp_path / "set" / "train", arrays)  # as where another run was first
    assert [p.name for p in (tmp_path / "set").iterdir()] == ["train"]
    found = cache.read(tmp_path / "set" / "train")
    assert sorted(found) == ["images", "labels"]
    np.testing.assert_array_equal(found["images"], arrays["images"])


def test_cache_that_cannot_be_written(refused, cached, tmp_path):
    *_, flags = cached
    (tmp_path / "file").write_text("mine")
    cache_dir = f"--config.dataset.cache_dir={tmp_path / 'file'}"
    refused([*flags, cache_dir], "dataset.cache_dir", "file", "--config.dataset.cache_dir=DIR")


# Checkpoints


def manifests(workdir):
    return sorted((workdir / "checkpoints").glob("*.json"))


def damage_checkpoint(manifest):
    """Cuts the largest file of a checkpoint in half."""
    files = [path for path in manifest.with_suffix("").rglob("*") if path.is_file()]
    half(max(files, key=lambda path: path.stat().st_size))


def test_all_checkpoints_damaged(refused, copied):
    workdir, flags = copied
    (workdir / "result.json").unlink()
    damage_checkpoint(manifests(workdir)[0])
    half(manifests(workdir)[1])
    with pytest.warns(UserWarning, match="is damaged"):
        refused(flags, "every checkpoint", "damaged", "delete", "--overwrite")


def losses(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [(k["task"], k["epoch"], k["step"], k["loss"]) for k in lines if k["kind"] == "train"]


def test_newest_checkpoint_damaged(finished, copied):
    """The one before serves, a warning says so, and the result is the same."""
    workdir, flags = copied
    (workdir / "result.json").unlink()
    before, newest = manifests(workdir)
    damage_checkpoint(newest)
    done = process(flags, workdir)
    assert done.returncode == 0, done.stderr
    assert f"checkpoint {newest.stem} is damaged" in done.stderr
    assert "going on at task 3" in done.stderr
    old = json.loads((finished.workdir / "result.json").read_text())
    new = json.loads((workdir / "result.json").read_text())
    assert new["accuracy"] == old["accuracy"]
    assert losses(workdir) == losses(finished.workdir)
    old, new = (load_file(w / "model.safetensors") for w in (finished.workdir, workdir))
    assert {name: a.tobytes() for name, a in new.items()} == {
        name: a.tobytes() for name, a in old.items()
    }
    assert manifests(workdir)[-1].name == newest.name and before.exists()


def test_damaged_checkpoint_does_not_take_the_place_of_a_good_one(tmp_path):
    """With keep=1 a damaged later one must not be what is kept."""
    state = {"x": np.arange(3.0)}
    for step in (1, 5):
        checkpoint.save(tmp_path, checkpoint.Position(0, 0, step), state, {"step": step}, keep=2)
    damage_checkpoint(sorted(tmp_path.glob("*.json"))[-1])
    checkpoint.save(tmp_path, checkpoint.Position(0, 0, 3), state, {"step": 3}, keep=1)
    assert [path.stem[-1] for path in tmp_path.glob("*.json")] == ["3"]
    position, _, record = checkpoint.restore_latest(tmp_path, state)
    assert (position.step, record) == (3, {"step": 3})


def test_checkpoint_holds_prng_keys(tmp_path):
    state = {"keys": jax.random.split(jax.random.key(3), 2), "x": np.arange(3.0)}
    position = checkpoint.Position(1, 0, 0)
    checkpoint.save(tmp_path, position, state, {}, keep=1)
    found = checkpoint.restore_at(tmp_path, position, jax.eval_shape(lambda: state))
    assert found["keys"].dtype == state["keys"].dtype
    np.testing.assert_array_equal(*(jax.random.key_data(s["keys"]) for s in (state, found)))
    np.testing.assert_array_equal(found["x"], state["x"])


# Failures


def test_loss_that_is_not_finite(run, tiny_flags, tmp_path):
    flags = tiny_flags(
        method="sgd", train__optimizer="sgd", train__learning_rate=1e12, checkpoint__every_steps=1
    )
    code, out, err = run([*flags, "--workdir=bad"])
    assert (code, out) == (1, "")
    message = one_line(err, "the loss is not finite", "lower train.learning_rate")
    task, epoch, step = map(int, re.search(r"task (\d+), epoch (\d+), step (\d+)", err).groups())
    last = losses(tmp_path / "bad")[-1]
    assert last[:3] == (task, epoch, step - 1) and np.isfinite(last[3]).all()
    assert not (tmp_path / "bad" / "result.json").exists()

    # The checkpoint before it is whole: the run goes on from there and meets the same loss.
    kept = contents(tmp_path / "bad" / "checkpoints")
    assert f"{task - 1:05d}-{epoch - 1:05d}-{step - 1:09d}.json" in kept
    code, out, err = run([*flags, "--workdir=bad"])
    assert (code, out) == (1, "")
    assert err.startswith(f"going on at task {task}, epoch {epoch}, step {step - 1}")
    assert err.endswith(message)
    assert contents(tmp_path / "bad" / "checkpoints") == kept
    refused_again, _, err = run([*flags, "--workdir=bad", "--config.train.learning_rate=1e-3"])
    assert refused_again == 2 and "train.learning_rate: 1000000000000.0 -> 0.001" in err


def test_interrupt(run, tiny_flags, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_and_evaluate", interrupted)
    code, out, err = run(tiny_flags())
    assert (code, out) == (1, "")
    one_line(err, "interrupted", "goes on")


# What works


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_field(run, flag):
    code, out, err = run([flag])
    assert (code, err) == (0, "")
    assert out.startswith("usage: python -m bpnjax.main --config=FILE")
    for field, value in configuration.flatten(configuration.default()).items():
        assert f"  {field} = {value!r}\n" in out


def test_help_in_a_real_process(tmp_path):
    done = process(["--help"], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--config.FIELD=VALUE" in done.stdout
    assert contents(tmp_path) == {}


def test_default_workdir_and_files(finished):
    assert sorted(p.name for p in finished.workdir.iterdir()) == sorted(FILES)
    assert [p.name for p in finished.cwd.iterdir()] == ["runs"]
    for name in ("accuracy_matrix.png", "learning_curves.png"):
        assert (finished.workdir / name).read_bytes().startswith(b"\x89PNG")


def test_stdout_is_the_table_only(finished):
    lines = finished.out.splitlines()
    assert lines[0].split() == ["task", "classes", "task_told", "task_masked", "task_inferred"]
    assert set(lines[1]) == set(lines[5]) == {"-"}
    assert [line.split()[0] for line in lines[2:5]] == ["1", "2", "3"]
    assert [line.split()[1:3] for line in lines[2:5]] == [["0,", "1"], ["2,", "3"], ["4,", "5"]]
    result = json.loads((finished.workdir / "result.json").read_text())
    for task in range(3):
        shown = dict(zip(lines[0].split()[2:], lines[2 + task].split()[3:], strict=True))
        for kind in KINDS:
            assert shown[kind] == f"{result['accuracy'][kind][0][-1][task]:.4f}"
    shown = dict(zip(lines[0].split()[2:], lines[6].split()[1:], strict=True))
    for kind in KINDS:
        assert shown[kind] == f"{result['summary'][kind]['average_accuracy']['mean']:.4f}"
    assert lines[7:] == ["results in runs/tiny/bd_ewc"]
    assert not set("\r\x1b\b") & set(finished.out)


def test_stderr_is_a_line_a_task(finished):
    """Nothing of JAX, Orbax or absl besides, and no codes of a progress bar."""
    assert [line[:13] for line in finished.err.splitlines()] == [
        "task 1/3 done", "task 2/3 done", "task 3/3 done",
    ]  # fmt: skip
    assert not set("\r\x1b\b") & set(finished.err)


def test_result_json(finished):
    result = json.loads((finished.workdir / "result.json").read_text())
    assert set(result) == {
        "name", "method", "seed", "num_seeds", "config", "versions", "device", "accuracy",
        "summary", "memory", "time",
        # Beyond DESIGN: what the paper reports, names for tables, how often the task was guessed.
        "paper", "class_names", "inference",
    }  # fmt: skip
    assert (result["name"], result["method"]) == ("tiny", "bd_ewc")
    assert (result["seed"], result["num_seeds"]) == (0, 1)
    assert result["config"] == json.loads((finished.workdir / "config.json").read_text())
    assert set(result["config"]) == set(configuration.default())
    assert {"python", "jax", "jaxlib", "flax", "optax", "numpy"} < set(result["versions"])
    assert result["class_names"] == [["0", "1"], ["2", "3"], ["4", "5"]]
    assert isinstance(result["device"], str)

    assert set(result["accuracy"]) == set(KINDS) == set(result["summary"])
    for kind in KINDS:
        matrix = result["accuracy"][kind]
        assert np.shape(matrix) == (1, 3, 3)
        for i in range(3):
            for j in range(3):
                value = matrix[0][i][j]
                assert (value is None) if j > i else 0 <= value <= 1
        summary = result["summary"][kind]
        assert set(summary) == {
            "average_accuracy", "first_task_accuracy", "backward_transfer", "forgetting",
        }  # fmt: skip
        assert all(set(entry) == {"mean", "sd"} for entry in summary.values())
        assert all(entry["sd"] is None for entry in summary.values())  # of one seed
        assert summary["average_accuracy"]["mean"] == pytest.approx(np.mean(matrix[0][2]))
        assert summary["first_task_accuracy"]["mean"] == matrix[0][2][0]

    assert set(result["memory"]) == {
        "core_parameters", "parameters_per_task", "bytes_per_task", "training_bytes",
        "replay_bytes",
    }  # fmt: skip
    assert result["memory"]["core_parameters"] == (64 * 16 + 16) + (16 * 16 + 16) + (16 * 6 + 6)
    assert result["memory"]["parameters_per_task"] == 16 + 16 + 6
    assert result["memory"]["bytes_per_task"] == 4 * (16 + 16 + 6)
    assert set(result["time"]) == {
        "train_seconds", "evaluate_seconds", "compile_seconds", "examples_per_second",
    }  # fmt: skip
    assert all(value >= 0 for value in result["time"].values())


def test_accuracy_csv_agrees_with_result_json(finished):
    accuracy = json.loads((finished.workdir / "result.json").read_text())["accuracy"]
    rows = list(csv.DictReader((finished.workdir / "accuracy.csv").open()))
    cells = [(int(row["after_task"]), int(row["task"])) for row in rows]
    assert cells == [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3)]
    for row, (i, j) in zip(rows, cells, strict=True):
        assert row["seed"] == "0"
        for kind in KINDS:
            assert float(row[kind]) == pytest.approx(accuracy[kind][0][i - 1][j - 1], abs=1e-6)


def test_metrics_jsonl(finished):
    lines = [json.loads(line) for line in (finished.workdir / "metrics.jsonl").open()]
    trained = [line for line in lines if line["kind"] == "train"]
    tested = [line for line in lines if line["kind"] == "evaluate"]
    assert len(trained) + len(tested) == len(lines)
    totals = [line["total_steps"] for line in trained]
    assert totals == sorted(set(totals)) and totals[-1] == 2 * 3 * 9
    assert all(np.isfinite(line["loss"]).all() and len(line["loss"]) == 1 for line in trained)
    assert [line["task"] for line in tested] == [1, 2, 3]
    accuracy = json.loads((finished.workdir / "result.json").read_text())["accuracy"]
    for line in tested:
        for kind in KINDS:
            assert line[kind] == [accuracy[kind][0][line["task"] - 1]]


def test_complete_run_says_so_and_rewrites_nothing(run, finished, monkeypatch):
    monkeypatch.chdir(finished.cwd)
    times = {path: path.stat().st_mtime_ns for path in finished.workdir.rglob("*")}
    code, out, err = run(finished.flags)
    assert (code, err) == (0, "")
    assert out.count("\n") == 1 and "complete" in out and "--overwrite" in out
    assert times == {path: path.stat().st_mtime_ns for path in finished.workdir.rglob("*")}


def test_methods_of_the_command_are_those_of_the_registry(refused, tiny_flags):
    message = refused(tiny_flags(method="?"), "choose from")
    assert message.split("choose from: ")[1].strip().split(", ") == list(methods.REGISTRY)


def test_a_pattern_that_matches_no_layer_is_refused(tiny_flags, tmp_path, capsys):
    """Else BD or PSP would be off without a word."""
    for method, field in (("bd_ewc", "bd.layers"), ("psp", "psp.layers")):
        flags = tiny_flags(method=method, **{field.replace(".", "__"): "nothing"})
        assert main.run([*flags, f"--workdir={tmp_path / 'w'}"]) == 2
        line = capsys.readouterr().err
        assert f"{field}: 'nothing' matches no layer; there are: hidden_0" in line
    assert not (tmp_path / "w").exists()


def test_a_full_disk_is_one_line_and_loses_no_checkpoint(tiny_flags, tmp_path, monkeypatch, capsys):
    from bpnjax import checkpoint

    real, calls = checkpoint.write_atomically, []

    def full(path, text):
        calls.append(path)
        if len(calls) == 2:  # the second checkpoint's manifest
            raise OSError(28, "No space left on device", str(path))
        real(path, text)

    workdir = tmp_path / "w"
    flags = [*tiny_flags(), f"--workdir={workdir}"]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_atomically", full)
        assert main.run(flags) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        error.startswith("bpnjax: [Errno 28] No space left on device") and "goes on at the" in error
    )
    assert main.run(flags) == 0
    assert "going on at task 2" in capsys.readouterr().err
