"""Whose folder it is: what the command refuses to take up, replaces, or takes for the same run.

A refusal is one line on stderr, exit code 2, and nothing written: the fixture `refused` holds
every bad input to that.
"""

import json
import os
import pathlib

import pytest
from command import FILES, contents

from bpnjax import compare, main
from bpnjax import config as configuration
from bpnjax.run import predictor
from bpnjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_once")


def test_other_configuration_is_refused_with_the_differences(refused, copied):
    _, flags = copied
    changed = [*flags, "--config.train.epochs=3", "--config.model.hidden=(16,)"]
    refused(
        changed,
        "train.epochs: 2 -> 3", "model.hidden: [16, 16] -> [16]", "another folder", "--overwrite",
    )  # fmt: skip
    refused([*flags, "--config.method=sgd"], "method: 'bd_ewc' -> 'sgd'")


def test_a_mistake_in_the_request_is_said_before_one_in_the_folder(refused, copied):
    """Also one that only the data shows: who fixes it would meet the folder's complaint next."""
    _, flags = copied
    error = refused([*flags, "--config.train.batch_size=1000"], "train.batch_size: 1000", "at most")
    assert "another configuration" not in error
    error = refused([*flags, "--config.bd.layers=none"], "bd.layers: 'none' matches no layer")
    assert "another configuration" not in error


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ([], "bd_ewc"),
        (["train.epochs=3"], "bd_ewc-train.epochs=3"),
        (["train.epochs=20"], "bd_ewc"),  # as in the file
        (["method=psp", "num_seeds=5", "checkpoint.keep=9", "dataset.data_dir=x"], "psp"),
        (["seed=1"], "bd_ewc-seed=1"),
        (["train.epochs=3", "bd.epsilon=0.1"], "bd_ewc-bd.epsilon=0.1-train.epochs=3"),
        (["bd.epsilon=0.1", "train.epochs=3"], "bd_ewc-bd.epsilon=0.1-train.epochs=3"),
        (["model.hidden=(16,8)"], "bd_ewc-model.hidden=16x8"),
        (["bd.layers=hidden_[01]"], "bd_ewc-b23cd2a8"),  # not of a path
        ([f"train.rates={'0' * 60}=1"], "bd_ewc-77f2e455"),  # long
    ],
)
def test_settings_have_default_folders_of_their_own(changes, name):
    """Stable: a version that names them otherwise would not find its runs again."""
    flags = ["--config=digits", *(f"--config.{change}" for change in changes)]
    assert main.parse(flags)[1] == pathlib.Path("runs", "digits", name)
    named = [*flags, "--config.name=mine"]
    assert main.parse(named)[1] == pathlib.Path("runs", "mine", name)
    assert main.parse([*flags, "--workdir=there"])[1] == pathlib.Path("there")


def test_compare_has_default_folders_too(tiny_flags, monkeypatch):
    found = []
    monkeypatch.setattr(compare, "run_all", lambda c, n, folder, *_: found.append(folder) or [])
    monkeypatch.setattr(compare, "write", lambda *_: None)
    monkeypatch.setattr(compare, "printed", lambda *_: "")
    for more in ([], ["--config.train.epochs=3"]):
        assert compare.run(["--config=digits", "--methods=sgd", "--num_seeds=2", *more]) == 0
    assert found == [pathlib.Path("runs/digits"), pathlib.Path("runs/digits-train.epochs=3")]


def test_fields_that_change_no_result_are_no_other_configuration(run, copied):
    workdir, flags = copied
    before = contents(workdir)
    code, out, err = run([*flags, "--config.checkpoint.keep=9", "--config.dataset.cache_dir=x"])
    assert (code, err) == (0, "") and "complete" in out
    assert contents(workdir) == before


def test_a_field_that_an_earlier_version_did_not_have_counts_as_its_default(copied, tiny):
    from bpnjax.run import workdir as folders

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


def test_a_run_of_before_the_relative_rules_counts_as_one_of_the_earlier_rules(refused, copied):
    """It would otherwise go on, or be compared, as what it is not."""
    folder, flags = copied
    path = folder / "config.json"
    stored = json.loads(path.read_text())
    del stored["bd"]["step"], stored["ewc"]["form"]
    path.write_text(json.dumps(stored))
    refused(
        flags, "bd.step: 'absolute' -> 'relative'", "ewc.form: 'proximal' -> 'relative'",
        "another folder",
    )  # fmt: skip
    found = predictor.with_all_fields(stored)
    assert (found.bd.step, found.ewc.form) == ("absolute", "proximal")
    assert predictor.with_all_fields({"bd": {"step": "relative"}}).bd.step == "relative"


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

    monkeypatch.setattr("bpnjax.run.workdir.write_atomically", fail)
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
    from bpnjax.run import workdir as folders

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
