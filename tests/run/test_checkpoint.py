"""Checkpoints: kept, damaged, gone on from; and what ends a run before its time."""

import json
import re

import jax
import numpy as np
import pytest
from command import contents, half, one_line, process
from safetensors.numpy import load_file

from bpnjax.run import checkpoint, train

pytestmark = pytest.mark.usefixtures("compile_once")


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


# What ends a run


def test_loss_that_is_not_finite(run, tiny_flags, tmp_path):
    flags = tiny_flags(
        method="sgd", train__optimizer="sgd", train__learning_rate=1e12, checkpoint__every_steps=1
    )
    code, out, err = run([*flags, "--workdir=bad"])
    assert (code, out) == (1, "")
    # Of this method no other field is a step's length: bd.epsilon is not for it.
    header, message = err.splitlines(keepends=True)
    assert header.startswith("sgd on digits, 3 tasks")
    one_line(message, "the loss is not finite", "; lower train.learning_rate and pass --over")
    task, epoch, step = map(int, re.search(r"task (\d+), epoch (\d+), step (\d+)", err).groups())
    last = losses(tmp_path / "bad")[-1]
    assert last[:3] == (task, epoch, step - 1) and np.isfinite(last[3]).all()
    assert not (tmp_path / "bad" / "result.json").exists()

    # The checkpoint before it is whole: the run goes on from there and meets the same loss.
    kept = contents(tmp_path / "bad" / "checkpoints")
    assert f"{task - 1:05d}-{epoch - 1:05d}-{step - 1:09d}.json" in kept
    code, out, err = run([*flags, "--workdir=bad"])
    assert (code, out) == (1, "")
    assert err.startswith(header)
    assert f"\ngoing on at task {task}, epoch {epoch}, step {step - 1}" in err
    assert err.endswith(message)
    assert contents(tmp_path / "bad" / "checkpoints") == kept
    refused_again, _, err = run([*flags, "--workdir=bad", "--config.train.learning_rate=1e-3"])
    assert refused_again == 2 and "train.learning_rate: 1000000000000.0 -> 0.001" in err


def test_the_message_names_the_steps_of_the_method(run, tiny_flags):
    flags = tiny_flags(method="bd_ewc", bd__epsilon=1e38, train__epochs=1)
    code, out, err = run([*flags, "--workdir=bad"])
    assert (code, out) == (1, "")
    words = "lower train.learning_rate or bd.epsilon or bd.learning_rate and pass --overwrite"
    message = err.splitlines(keepends=True)[-1]
    assert words in one_line(message, "the loss is not finite at task 1, epoch 1, step")


def test_interrupt(run, tiny_flags, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_and_evaluate", interrupted)
    code, out, err = run(tiny_flags())
    assert (code, out) == (1, "")
    one_line(err, "interrupted", "to resume")
