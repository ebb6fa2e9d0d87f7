"""The command: what it refuses and how it says so, and what a run leaves behind.

A refusal is one line on stderr, exit code 2, and nothing written: the fixture `refused` holds
every bad input to that.
"""

import csv
import dataclasses
import itertools
import json
import math
import pathlib
import re

import numpy as np
import pytest
from command import FILES, ROOT, contents, one_line, process

from bpnjax import config as configuration
from bpnjax import main, methods
from bpnjax.config.fields import entries
from bpnjax.run import checkpoint
from bpnjax.utils.errors import UserError

CONFIGS = sorted((ROOT / "configs").rglob("*.py"))
KINDS = ("task_masked", "task_told", "task_inferred")

pytestmark = pytest.mark.usefixtures("compile_once")


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
        ("--config.seed=9999999999999999999", ["seed:", "9999999999999999999", "below 2147483648"]),
        ("--config.bd.epsilon=0", ["bd.epsilon:", "0.0", "above 0"]),
        ("--config.bd.epsilon=-0.1", ["bd.epsilon:", "-0.1", "above 0"]),
        ("--config.bd.epsilon=nan", ["bd.epsilon:", "nan", "not finite"]),
        ("--config.train.learning_rate=inf", ["train.learning_rate:", "inf", "not finite"]),
        ("--config.ewc.strength=-1", ["ewc.strength:", "-1.0", "at least 0"]),
        ("--config.dataset.validation=1", ["dataset.validation:", "1", "below 1"]),
        ("--config.model.hidden=(16,0)", ["model.hidden:", "(16, 0)", "positive"]),
        ("--config.model.hidden=wide", ["model.hidden:", "'wide'", "positive"]),
        ("--config.dataset.resize=(8,8)", ["dataset.resize:", "(8, 8)", "height, width"]),
        ("--config.bd.layers=(", ["bd.layers:", "'('", "regular expression", "fix"]),
        ("--config.psp.layers=*", ["psp.layers:", "'*'", "regular expression", "fix"]),
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
        (
            "--config.sequence.classes=0,1;x",
            ["sequence.classes:", "'0,1;x'", "class x does not exist"],
        ),
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


def test_seeds_beyond_the_largest_are_refused(refused, tiny_flags):
    """Each seed is below it, but not the last of them all."""
    flags = tiny_flags(seed=2**31 - 1)
    main.parse(flags)
    refused([*flags, "--config.num_seeds=2"], "num_seeds: 2 from seed 2147483647 on end at")


def wrong_values(setting, default):
    """What a setting does not allow, and what the message then says."""
    yield [1], f"give one of type {'float' if default is None else type(default).__name__}"
    if setting.choices:
        yield "none of them", "unknown value 'none of them'"
    if setting.pattern:
        yield "(", "is not a regular expression"
    if isinstance(default, str):
        return
    yield "text", "'text' is of type str; give one of type"
    kind = type(default) if isinstance(default, int) else float
    if kind is float:
        yield math.nan, "nan is not finite; give a number"
        yield -math.inf, "-inf is not finite; give a number"
    if setting.at_least is not None:
        yield kind(setting.at_least - 1), f"give at least {setting.at_least:g}"
    if setting.above is not None:
        yield kind(setting.above), f"is not above {setting.above:g}; give a larger number"
    if setting.below is not None:
        yield kind(setting.below), f"is not below {setting.below:g}; give a smaller number"


@pytest.mark.parametrize("name", sorted(methods.REGISTRY))
def test_settings_of_methods_are_fields_with_their_limits(name):
    """Default, type, range, choices and patterns stand in the signature of the method only."""
    found = entries()
    for field, own in methods.REGISTRY[name].fields.items():
        entry = found[field]
        assert (entry.default, name in entry.methods) == (own.default, True)
        assert dataclasses.replace(entry.setting, field="") == dataclasses.replace(
            own.setting, field=""
        )
        for value, said in wrong_values(own.setting, own.default):
            config = configuration.default()
            config.method = name
            group, last = field.split(".")
            with config[group].ignore_type():
                config[group][last] = value
            with pytest.raises(UserError) as error:
                configuration.validate(config)
            message = str(error.value)
            assert message.startswith(f"{field}: ") and said in message, message
            assert "\n" not in message


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
    refused(arguments, "--config", "missing", "--config=digits")


@pytest.mark.parametrize("argument", ["--config=none.py", "--config", "--config=", "--config=."])
def test_config_file_that_does_not_exist(refused, argument):
    refused([argument], "--config: no file", "name a config file, or a packaged one (")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("digit", "did you mean digits?"),
        ("configs/digits.py", "did you mean digits?"),  # from a folder without configs/
        ("published/sii", "did you mean published/si"),
        ("qqqq", "choose from: default, cifar10, cifar100, cifar100_b0_inc10, digits,"),
    ],
)
def test_packaged_configuration_that_does_not_exist(refused, name, words):
    refused([f"--config={name}"], f"--config: no file '{name}' and no packaged", words)


def test_packaged_configurations_have_names(tmp_path, monkeypatch):
    """Those of the folder configs/, from anywhere, and the defaults; a file comes first."""
    monkeypatch.chdir(tmp_path)
    assert list(configuration.packaged().values()) == CONFIGS
    for name in ("digits", "published/si"):
        file = str(ROOT / "configs" / f"{name}.py")
        assert configuration.load_file(name) == configuration.load_file(file)
    flatten = configuration.flatten
    assert flatten(configuration.load_file("default")) == flatten(configuration.default())
    assert main.parse(["--config", "digits"])[0].name == "digits"
    (tmp_path / "digits").write_text(BEGIN + "    c.name = 'mine'\n    return c")
    assert configuration.load_file("digits").name == "mine"


BEGIN = "from bpnjax.config import default\n\ndef get_config():\n    c = default()\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("raise RuntimeError('first line\\nsecond')", ["RuntimeError: first line", "fix"]),
        ("raise KeyError", ["KeyError", "fix"]),
        ("def get_config(:", ["SyntaxError", "fix"]),
        ("\0", ["raises", "fix"]),
        ("import sys\nsys.exit(0)", ["SystemExit", "fix"]),
        ("import no_such_module", ["ModuleNotFoundError", "no_such_module", "fix"]),
        ("x = 1", ["no get_config()", "add one"]),
        ("get_config = 1", ["TypeError", "fix"]),
        ("def get_config():\n    import sys\n    sys.exit('bye')", ["SystemExit: bye", "fix"]),
        ("def get_config():\n    pass", ["NoneType", "return a ConfigDict"]),
        ("def get_config():\n    return {'seed': 1}", ["dict", "return a ConfigDict"]),
        (
            "import ml_collections\n\ndef get_config():\n    return ml_collections.ConfigDict()",
            ["missing in", "start from bpnjax.config.default()"],
        ),
        (BEGIN + "    c.epochs = 3\n    return c", ["epochs:", "unknown", "train.epochs"]),
        (BEGIN + "    c.train.epoch = 3\n    return c", ["train.epoch:", "mean train.epochs"]),
        (BEGIN + "    c.train.epochs = 'x'\n    return c", ["TypeError", "fix"]),
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
    assert workdir.parent == pathlib.Path("runs", parsed.name) and not values.overwrite
    assert workdir.name.partition("-")[0] == parsed.method


# What works


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_field_with_its_meaning(run, flag):
    code, out, err = run([flag])
    assert (code, err) == (0, "")
    assert out.startswith("usage: bpnjax run --config=NAME")
    assert max(map(len, out.splitlines())) <= 80
    words = " ".join(out.split())
    for field, entry in entries().items():
        assert f"\n  {field} = {entry.default!r}" in out
        assert f"{field} = {entry.default!r} {entry.setting.meaning}" in words
    assert "seed = 0 the first seed [at least 0, below 2147483648]" in words
    assert "initializer of kernels [one of lecun_normal, lecun_uniform" in words


def sections(out):
    """The fields that a help text names under each title, in its order."""
    parts = re.split(r"\n\nfields of ([^:\n]*):\n", out)[1:]
    return {
        title: re.findall(r"^  ([\w.]+) = ", text, re.MULTILINE)
        for title, text in zip(parts[::2], parts[1::2], strict=True)
    }


def test_help_shows_the_fields_of_the_chosen_method_first(run):
    """Then those of every run by groups; with the values of the file, where one is named."""
    found = sections(run(["--help"])[1])
    groups = [
        "bd_ewc, the chosen method", "the run", "dataset", "sequence", "model", "train",
        "parallel", "evaluate", "search", "checkpoint",
    ]  # fmt: skip
    assert list(found)[: len(groups)] == groups
    assert sorted(itertools.chain(*found.values())) == sorted(entries())
    assert set(found["bd_ewc, the chosen method"]) == set(methods.bd_ewc.fields)
    for group, fields in list(found.items())[2:]:
        assert {field.partition(".")[0] for field in fields} == {group}
    file = f"--config={ROOT / 'configs' / 'digits.py'}"
    for chosen in (["--help", "--config.method=er"], ["--config.method", "er", "-h"]):
        _, out, err = run([file, *chosen, "--workdir=x", "--config.replay.batch_size=7"])
        found = sections(out)
        assert err == "" and next(iter(found)) == "er, the chosen method"
        assert set(found["er, the chosen method"]) == set(methods.er.fields)
        assert "\n  name = 'digits' " in out and "\n  replay.batch_size = 7 " in out


def test_help_beside_a_wrong_argument_is_help(run):
    code, out, err = run(["--help", "--config=none.py"])
    assert code == 0 and set(itertools.chain(*sections(out).values())) == set(entries())
    one_line(err, "--config: no file 'none.py'")


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
    for line, name in zip(lines[7:9], ("last", "anytime"), strict=True):
        assert line.split()[0] == name
        shown = dict(zip(lines[0].split()[2:], line.split()[1:], strict=True))
        entry = {"last": "last_accuracy", "anytime": "average_incremental_accuracy"}[name]
        for kind in KINDS:
            assert shown[kind] == f"{result['summary'][kind][entry]['mean']:.4f}"
    assert lines[9:] == [f"results in {finished.workdir.relative_to(finished.cwd)}"]
    assert not set("\r\x1b\b") & set(finished.out)


def test_stderr_is_a_line_a_task(finished):
    """Nothing of JAX, Orbax or absl besides, and no codes of a progress bar."""
    header, *lines = finished.err.splitlines()
    size = 64 * 16 + 16 + 16 * 16 + 16 + 16 * 6 + 6
    folder = finished.workdir.relative_to(finished.cwd)
    assert header.startswith(f"bd_ewc on digits, 3 tasks; mlp of {size:,} parameters; ")
    assert header.endswith(f" x cpu; seed 0; {folder}")
    assert [line.partition(";")[0] for line in lines] == [
        "task 1/3 (0, 1) done", "task 2/3 (2, 3) done", "task 3/3 (4, 5) done",
    ]  # fmt: skip
    assert max(map(len, lines)) <= 80
    assert not set("\r\x1b\b") & set(finished.err)


def test_result_json(finished):
    result = json.loads((finished.workdir / "result.json").read_text())
    assert set(result) == {
        "name", "method", "seed", "num_seeds", "config", "versions", "device", "accuracy",
        "summary", "memory", "time",
        # Beyond DESIGN: what the paper reports, names for tables, how often the task was guessed,
        # which data, configuration and random numbers it was, what to doubt, hashes of the models.
        "paper", "class_names", "inference", "data_version", "config_hash", "draws", "doubts",
        "models",
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
            "last_accuracy", "average_incremental_accuracy",
        }  # fmt: skip
        assert all(set(entry) == {"mean", "sd"} for entry in summary.values())
        assert all(entry["sd"] is None for entry in summary.values())  # of one seed
        assert summary["average_accuracy"]["mean"] == pytest.approx(np.mean(matrix[0][2]))
        assert summary["first_task_accuracy"]["mean"] == matrix[0][2][0]

    assert set(result["memory"]) == {
        "core_parameters", "parameters_per_task", "bytes_per_task", "answering_bytes",
        "training_bytes", "replay_bytes",
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
    assert error.startswith("bpnjax: [Errno 28] No space left on device")
    assert error.endswith("; run the same command again to resume")
    assert main.run(flags) == 0
    assert "going on at task 2" in capsys.readouterr().err
