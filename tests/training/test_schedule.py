"""Epochs of each task and drops of the learning rate within one."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from support import Jitted, changed, digits_config

from bpnjax import main
from bpnjax.data import load_sequence
from bpnjax.run import plots, train
from bpnjax.training import schedule
from bpnjax.training.experiment import make_experiment
from bpnjax.utils import errors

pytestmark = pytest.mark.usefixtures("compile_once")
DROPS = {"train.epochs_per_task": "(1, 3, 2)", "train.rate_drops": "(0.5,)"}


def moves(epochs, **fields):
    """What a step of task 2 changes in shared parameters, W and M, in each of some epochs."""
    jitted = Jitted(digits_config("bd_ewc", train__optimizer="sgd", train__epochs=4, **fields))
    key = jax.random.key(0)
    state = jitted.begin_task(jitted.init(key), 1)
    # M is zero at the start, and with it the gradient of W.
    state, _ = jitted.run_steps(state, jitted.data, 1, 0, 0, 1)
    for epoch in epochs:
        after, _ = jitted.run_steps(state, jitted.data, 1, epoch, 1, 2)
        yield jax.tree.map(
            lambda new, old: np.asarray(new - old),
            (after.learner.params, after.learner.task_params[0]),
            (state.learner.params, state.learner.task_params[0]),
        )


@pytest.mark.parametrize("step", ["absolute", "relative"])
def test_drops_divide_the_rates_but_not_epsilon(step):
    drops = {"train__rate_drops": (0.5, 0.75), "train__rate_drop_factor": 4.0}
    epochs, kind = (1, 2, 3), {"bd__step": step}
    for plain, dropped, divided_by in zip(
        moves(epochs, **kind), moves(epochs, **kind, **drops), (1, 4, 16), strict=True
    ):
        for name, vectors in dropped[1].items():
            own, of = vectors["bias"], plain[1][name]["bias"]
            assert np.abs(of["W"]).max() > 0 and np.abs(of["M"]).max() > 0
            np.testing.assert_allclose(own["W"], of["W"] / divided_by, rtol=2e-2, atol=1e-7)
            np.testing.assert_array_equal(own["M"], of["M"])
        for name, own in dropped[0].items():
            expected = plain[0][name]["kernel"] / divided_by
            np.testing.assert_allclose(own["kernel"], expected, rtol=1e-2, atol=1e-6)


def test_the_decay_from_task_to_task_is_of_the_shared_parameters_only():
    absolute = {"bd__step": "absolute", "bd__epsilon": 0.02}
    (plain,), (decayed,) = moves([1], **absolute), moves([1], **absolute, train__rate_decay=3.0)
    for name, vectors in decayed[1].items():
        own, of = vectors["bias"], plain[1][name]["bias"]
        # The step before left the shared parameters elsewhere.
        np.testing.assert_allclose(own["W"], of["W"], rtol=5e-2, atol=2e-7)
        np.testing.assert_array_equal(own["M"], of["M"])
        expected = plain[0][name]["kernel"] / 4
        np.testing.assert_allclose(decayed[0][name]["kernel"], expected, rtol=5e-2, atol=2e-6)


def test_the_proximal_pull_has_the_rate_that_is_left():
    """With a huge strength a proximal step lands on the anchor, at whatever rate.

    It would land a factor short if the pull kept the whole rate.
    """
    jitted = Jitted(
        digits_config(
            "ewc", train__optimizer="sgd", train__epochs=2, train__rate_drops=(0.5,),
            ewc__strength=1e12, ewc__form="proximal",
        )
    )  # fmt: skip
    state = jitted.begin_task(jitted.init(jax.random.key(0)), 1)
    params, kept = state.learner.params, state.learner.method
    kept = kept._replace(importance=jax.tree.map(np.ones_like, params))
    away = changed(state, params=jax.tree.map(lambda p: p + 0.5, params), method=kept)
    after, _ = jitted.run_steps(away, jitted.data, 1, 1, 0, 1)
    jax.tree.map(
        lambda p, anchor: np.testing.assert_allclose(p, anchor, atol=1e-5),
        after.learner.params, kept.anchor,
    )  # fmt: skip


def test_the_rate_falls_from_task_to_task():
    """A step of task 2 (t = 1) is that without decay, divided by 1 + d."""
    moves = []
    for decay in (0.0, 0.5):
        jitted = Jitted(digits_config("sgd", train__optimizer="sgd", train__rate_decay=decay))
        state = jitted.begin_task(jitted.init(jax.random.key(0)), 1)
        moved, _ = jitted.run_steps(state, jitted.data, 1, 0, 0, 1)
        before, after = (s.learner.params["output"]["kernel"] for s in (state, moved))
        moves.append(after - before)
    np.testing.assert_allclose(moves[0] / 1.5, moves[1], rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("method", ["stl", "joint"])
def test_the_rate_of_networks_that_are_trained_afresh_does_not_fall(method):
    """These are upper bounds: a later task's network starts as the first one did."""
    found = []
    for decay in (0.0, 5.0):
        jitted = Jitted(digits_config(method, train__rate_decay=decay))
        state = jitted.begin_task(jitted.init(jax.random.key(0)), 2)
        state, _ = jitted.run_steps(state, jitted.data, 2, 0, 0, 3)
        found.append(state.learner.params)
        assert schedule.rates(jitted.experiment, 2, 0) == (1.0, 1.0)
    jax.tree.map(np.testing.assert_array_equal, *found)
    # Drops within a task they have like everyone.
    drops = digits_config(method, train__rate_drops=(0.5,), train__rate_decay=5.0)
    rates = schedule.rates(Jitted(drops).experiment, 2, 15)
    np.testing.assert_allclose(rates, 0.1, rtol=1e-6)


def steps_of(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    trained = [line for line in lines if line["kind"] == "train"]
    return [sum(line["task"] == task for line in trained) for task in (1, 2, 3)], trained


@pytest.fixture(scope="module")
def uncut(tmp_path_factory, tiny_flags, compile_once):
    workdir = tmp_path_factory.mktemp("uncut")
    flags = tiny_flags(method="bd_ewc", model__hidden="(16,)", **DROPS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw", lambda workdir, result: [])
        traces = []
        patch.setattr(train.epochs, "run_steps", count(train.epochs.run_steps, traces))
        assert main.run([*flags, f"--workdir={workdir}"]) == 0
    return flags, workdir, len(traces)


def count(function, calls):
    def counted(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    return counted


def test_each_task_has_its_epochs_and_one_program(uncut):
    _, workdir, traces = uncut
    assert steps_of(workdir)[0] == [1, 3, 2]  # a line an epoch
    assert traces == 1


def test_cut_after_a_drop_it_goes_on_the_same(uncut, tmp_path, monkeypatch):
    flags, reference, _ = uncut
    monkeypatch.setattr(plots, "draw", lambda workdir, result: [])
    every = [*flags, "--config.checkpoint.every_steps=13", "--config.checkpoint.keep=100"]
    assert main.run([*every, f"--workdir={tmp_path / 'run'}"]) == 0
    # Its last epoch and step of a task were (2, 8) of 0..2: the drop is after 1.5 epochs.
    workdir = tmp_path / "run"
    for path in (workdir / "checkpoints").iterdir():
        if path.name.split(".")[0] > "00001-00002-000000008":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert (workdir / "checkpoints" / "00001-00002-000000008.json").exists()
    (workdir / "result.json").unlink()
    assert main.run([*every, f"--workdir={workdir}"]) == 0
    ours, theirs = (load_file(w / "model.safetensors") for w in (workdir, reference))
    for name, array in theirs.items():
        np.testing.assert_array_equal(array, ours[name], err_msg=name)
    results = [json.loads((w / "result.json").read_text()) for w in (workdir, reference)]
    assert results[0]["accuracy"] == results[1]["accuracy"]


@pytest.mark.parametrize(
    "field, value, words",
    [
        (
            "train.epochs_per_task",
            (2, 0, 1),
            "(2, 0, 1) is not positive integers; give one per task",
        ),
        ("train.epochs_per_task", (2, 1), "(2, 1) has 2 numbers for 3 tasks; give one per task"),
        ("train.rate_drops", (0.5, 1.0), "(0.5, 1.0) is not shares of a task's epochs; give"),
        ("train.rate_drop_factor", 0.0, "0.0 is not above 0; give a larger number"),
    ],
)
def test_what_cannot_be_is_refused(field, value, words):
    with pytest.raises(errors.UserError) as refused:
        Jitted(digits_config("sgd", **{field: value}))
    assert str(refused.value).startswith(f"{field}: {words}")


def test_joint_trains_as_long_as_the_longest(tiny):
    tiny.method, tiny.train.epochs_per_task = "joint", (1, 3, 2)
    assert make_experiment(tiny, load_sequence(tiny)).epochs == (3, 3, 3)
