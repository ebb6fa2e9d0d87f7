"""Merging by hand; heads that are never mixed; the pull of the L2-transfer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import Jitted, digits_config

from bpnjax.evaluation.accuracy import evaluate
from bpnjax.methods import imm
from bpnjax.training import epochs

pytestmark = pytest.mark.usefixtures("compile_once")


def state_of(thetas, fishers, done, classes):
    def tree(leaf):
        return {"hidden": jnp.asarray(leaf), "output": jnp.asarray(leaf)}

    heads = {"hidden": jnp.float32(0), "output": jnp.float32(1)}
    return imm.ImmState(tree(thetas), None if fishers is None else tree(fishers),
                        jnp.asarray(done, jnp.float32), jnp.asarray(classes), heads,
                        jnp.float32(0), jnp.float32(0))  # fmt: skip


def test_merging_by_hand():
    rng = np.random.default_rng(0)
    thetas, fishers = rng.normal(size=(3, 2, 4)), rng.gamma(1.0, size=(3, 2, 4))
    every = np.ones((3, 4), bool)
    mean = imm.MEAN.for_eval(None, state_of(thetas, None, [1, 1, 0], every), 0)
    np.testing.assert_allclose(mean["hidden"], thetas[:2].mean(0), rtol=1e-5)
    mode = imm.MODE.for_eval(None, state_of(thetas, fishers, [1, 1, 1], every), 0)
    expected = (fishers * thetas).sum(0) / fishers.sum(0)
    np.testing.assert_allclose(mode["hidden"], expected, rtol=1e-4)
    np.testing.assert_allclose(mode["output"], expected, rtol=1e-4)


def test_equal_fishers_give_the_mean():
    thetas = np.random.default_rng(1).normal(size=(3, 2, 4))
    every = np.ones((3, 4), bool)
    mode = imm.MODE.for_eval(None, state_of(thetas, 0 * thetas + 0.7, [1, 1, 1], every), 0)
    np.testing.assert_allclose(mode["hidden"], thetas.mean(0), rtol=1e-5)


def test_heads_of_different_tasks_are_never_mixed():
    thetas = np.random.default_rng(2).normal(size=(2, 3, 4))
    classes = np.array([[1, 1, 0, 0], [0, 0, 1, 1]], bool)
    merged = imm.MEAN.for_eval(None, state_of(thetas, None, [1, 1], classes), 0)
    np.testing.assert_allclose(merged["output"][:, :2], thetas[0][:, :2], rtol=1e-5)
    np.testing.assert_allclose(merged["output"][:, 2:], thetas[1][:, 2:], rtol=1e-5)
    np.testing.assert_allclose(merged["hidden"], thetas.mean(0), rtol=1e-5)


@pytest.mark.parametrize("method", ["imm_mean", "imm_mode"])
def test_after_one_task_the_merged_network_is_the_trained_one(method):
    jitted = Jitted(digits_config(method))
    key = jax.random.key(0)
    state, _ = jitted.train(key, [0], epochs=2)
    merged = jitted.problem.method.for_eval(state.core, state.method, 0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
                 merged, state.core)  # fmt: skip


def test_l2_transfer_pulls_to_the_last_task_alone():
    jitted = Jitted(digits_config("imm_mean", imm__l2=0.5, ewc__form="gradient"))
    key = jax.random.key(0)
    state, _ = jitted.train(key, [0], epochs=1)
    moved = jax.tree.map(lambda p: p + 0.1, state.core)
    zero = jax.tree.map(jnp.zeros_like, moved)

    class Step:
        task, size = jnp.int32(1), 0.0

    pull = jitted.problem.method.gradient(zero, moved, state.method, Step)
    # d/dtheta of 0.5 |theta - theta_0|^2 is theta - theta_0.
    jax.tree.map(lambda g: np.testing.assert_allclose(g, 0.1, rtol=1e-3), pull)
    Step.task = jnp.int32(0)
    first = jitted.problem.method.gradient(zero, moved, state.method, Step)
    assert all(not g.any() for g in jax.tree.leaves(first))


def test_dropped_units_are_those_of_the_last_task_and_the_others_move_further():
    core = {"hidden_0": {"kernel": jnp.full((3, 2000), 2.0), "bias": jnp.full(2000, 5.0)},
            "output": {"kernel": jnp.full((2000, 2), 2.0)}}  # fmt: skip
    previous = jax.tree.map(lambda p: p - 1.0, core)
    is_head = {"hidden_0": {"kernel": 0.0, "bias": 0.0}, "output": {"kernel": 1.0}}
    found = imm.drop_transfer(core, previous, is_head, jnp.float32(0.2), jax.random.key(0))
    kernel, bias = found["hidden_0"]["kernel"], found["hidden_0"]["bias"]
    dropped = np.asarray(kernel[0]) == 1.0
    np.testing.assert_allclose(kernel, np.where(dropped, 1.0, 1.0 + 1 / 0.8)[None].repeat(3, 0))
    np.testing.assert_allclose(bias, np.where(dropped, 4.0, 4.0 + 1 / 0.8))
    assert abs(dropped.mean() - 0.2) < 0.04
    np.testing.assert_array_equal(found["output"]["kernel"], core["output"]["kernel"])


def test_drop_transfer_leaves_the_first_task_alone_and_changes_the_second():
    key = jax.random.key(0)
    cores = {}
    for drop in (0.0, 0.5):
        jitted = Jitted(digits_config("imm_mean", imm__drop=drop))
        for tasks in ([0], [0, 1]):
            cores[drop, len(tasks)] = jitted.train(key, tasks, epochs=1)[0].core
    jax.tree.map(np.testing.assert_array_equal, cores[0.0, 1], cores[0.5, 1])
    assert not np.allclose(cores[0.0, 2]["output"]["kernel"], cores[0.5, 2]["output"]["kernel"])


def test_a_task_in_training_is_tested_on_the_network_as_it_stands():
    run = Jitted(digits_config("imm_mean"))
    key = jax.random.key(0)
    state = run.begin_task(key, run.init(key), 0)
    steps = epochs.steps_per_epoch(run.problem, run.sequence, 0)
    for epoch in range(8):
        state, _ = run.run_steps(key, state, run.data, 0, epoch, 0, steps)
    correct = evaluate(run.problem, key, state, run.data, 0, False, in_training=True)
    assert correct.task_told[0] / run.sequence.test.count[0] > 0.9
