"""Merging by hand; columns of the output layer; the pull of the L2-transfer; units put back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import Jitted, digits_config

import bpnjax
from bpnjax import importance, methods, networks
from bpnjax.methods import Context
from bpnjax.methods.imm import drop_transfer
from bpnjax.models import MLP
from bpnjax.training.evaluate import evaluate
from bpnjax.utils import prng
from bpnjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_once")
DISJOINT = [[0, 1], [2, 3], [4]]


@functools.cache
def network():
    return networks.from_linen(MLP((3,), 5), jnp.zeros((1, 2)))


def learner_of(method, classes=DISJOINT, heads="single"):
    return bpnjax.learner(
        network(), method, optax.sgd(0.1), num_tasks=3, classes=classes, heads=heads
    )


def trees(seed, draw):
    """Three trees like the parameters of the network, of independent numbers."""
    params, _ = network().init(jax.random.key(0))
    rng = np.random.default_rng(seed)
    return [
        jax.tree.map(lambda p: jnp.asarray(getattr(rng, draw)(size=p.shape), jnp.float32), params)
        for _ in range(3)
    ]


class Found:
    """Of the data of a task only a Fisher, which is asked for with sampled labels."""

    def __init__(self, fisher):
        self.tree = fisher

    def fisher(self, kind):
        assert kind == "sampled"  # neither the labels of the data nor all labels
        return self.tree


def merged(learner, thetas, fishers=(None, None, None)):
    """The network that answers after tasks that ended with the parameters ``thetas``."""
    method, setup = learner.method, learner.setup
    state = method.init(jax.random.key(0), thetas[0], setup)
    for task, (theta, fisher) in enumerate(zip(thetas, fishers, strict=False)):
        ctx = Context(setup, task, task, False)
        theta, state = method.end_task(theta, (), state, Found(fisher), ctx)
    params, mode = method.forward(None, (), state, Context(setup, 0, None, False))
    assert mode == {}
    return params


def stack(trees):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def close(a, b, rtol=1e-4):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6), a, b)


@pytest.mark.parametrize("tasks", [2, 3])
def test_merging_by_hand(tasks):
    thetas, fishers = trees(0, "normal")[:tasks], trees(1, "standard_exponential")[:tasks]
    mean = merged(learner_of(methods.imm_mean()), thetas)
    close(mean, jax.tree.map(lambda t: t.mean(0), stack(thetas)))
    mode = merged(learner_of(methods.imm_mode()), thetas, fishers)
    expected = jax.tree.map(lambda t, f: (f * t).sum(0) / f.sum(0), stack(thetas), stack(fishers))
    close(mode, expected)
    same = merged(learner_of(methods.imm_mode()), thetas, [fishers[0]] * tasks)
    close(same, mean)  # equal Fishers


# One shared output layer is merged whole by default, as the authors do, and a head per task never.
@pytest.mark.parametrize(
    "columns, heads, whole",
    [
        ("auto", "single", True), ("all", "single", True), ("own", "single", False),
        ("auto", "multi", False), ("own", "multi", False), ("all", "multi", True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", [methods.imm_mean, methods.imm_mode])
def test_columns_of_the_output_layer(method, columns, heads, whole):
    thetas, fishers = trees(2, "normal"), trees(3, "standard_exponential")
    learner = learner_of(method(columns=columns), heads=heads)
    found = merged(learner, thetas, fishers)
    if method is methods.imm_mean:
        fishers = [jax.tree.map(jnp.ones_like, thetas[0])] * 3
    of_all = jax.tree.map(lambda t, f: (f * t).sum(0) / f.sum(0), stack(thetas), stack(fishers))
    close(found["hidden_0"], of_all["hidden_0"])
    if whole:
        close(found["output"], of_all["output"])
        return
    for theta, classes in zip(thetas, DISJOINT, strict=True):
        own = jax.tree.map(lambda p, classes=classes: p[..., classes], theta["output"])
        got = jax.tree.map(lambda p, classes=classes: p[..., classes], found["output"])
        close(got, own)


def test_own_columns_are_merged_over_the_tasks_that_have_them():
    """Class 1 is in two tasks, class 4 in none so far."""
    thetas = trees(4, "normal")[:2]
    learner = learner_of(methods.imm_mean(columns="own"), [[0, 1], [1, 2], [3, 4]])
    found = merged(learner, thetas)["output"]["kernel"]
    a, b = (theta["output"]["kernel"] for theta in thetas)
    both = (a + b) / 2
    expected = [a[:, 0], both[:, 1], b[:, 2], both[:, 3], both[:, 4]]
    np.testing.assert_allclose(found, np.stack(expected, 1), rtol=1e-5)


def test_own_columns_need_classes():
    with pytest.raises(UserError, match=r"imm.columns=own needs to know .* classes="):
        learner_of(methods.imm_mean(columns="own"), classes=None)
    learner_of(methods.imm_mean(), classes=None)


def test_one_output_layer_is_merged_better_whole():
    """The columns of one task never competed with the others as they are after later tasks."""
    key, told = jax.random.key(0), {}
    for columns in ("auto", "all", "own"):
        jitted = Jitted(digits_config("imm_mean", imm__columns=columns, sequence__num_tasks=5))
        told[columns] = jitted.test(jitted.train(key)[0], 4)["task_told"].mean()
    assert told["auto"] == told["all"]
    assert told["all"] > told["own"] + 0.1, told


def test_the_fisher_of_the_mode_is_of_sampled_labels():
    """Exactly that of the labels drawn with the key of the task; not those of the data."""
    jitted = Jitted(digits_config("imm_mode", train__epochs=1))
    key = jax.random.key(0)
    state, _ = jitted.train(key, [1])
    x, y = (jnp.concatenate(part) for part in zip(*jitted.epoch(key, 1, 0), strict=True))
    network, params = jitted.learner.network, state.learner.params
    draws = prng.fold(key, prng.FISHER, 1, 0)
    each = {
        kind: importance.fisher_sum(network, params, {}, x, y, kind=kind, key=draws)
        for kind in ("sampled", "empirical")
    }
    each = {kind: jax.tree.map(lambda f: f / len(x) + 1e-8, f) for kind, f in each.items()}
    found = jax.tree.map(lambda f: f[1], state.learner.method.fishers)
    close(found, each["sampled"], rtol=1e-3)
    assert not np.allclose(found["output"]["kernel"], each["empirical"]["output"]["kernel"],
                           rtol=1e-2)  # fmt: skip


@pytest.mark.parametrize("method", ["imm_mean", "imm_mode"])
def test_after_one_task_the_merged_network_is_the_trained_one(method):
    jitted = Jitted(digits_config(method))
    state, _ = jitted.train(jax.random.key(0), [0], epochs=2)
    close(state.learner.method.merged, state.learner.params)
    x = jitted.sequence.test.images[:20]
    answers = jitted.learner.apply(state.learner, x, 0)
    plain, _ = jitted.learner.network.apply(state.learner.params, {}, jnp.asarray(x))
    np.testing.assert_allclose(answers, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["gradient", "proximal"])
def test_l2_transfer_pulls_to_the_last_task_alone(form):
    jitted = Jitted(digits_config("imm_mean", imm__l2=0.5, imm__form=form))
    state = jitted.train(jax.random.key(0), [0], epochs=1)[0].learner
    moved = jax.tree.map(lambda p: p + 0.1, state.params)
    zero = jax.tree.map(jnp.zeros_like, moved)
    size = jax.tree.map(lambda p: jnp.float32(0.25), moved)

    def pull(task):
        ctx = Context(jitted.learner.setup, task, task, True, step_size=size)
        return jitted.learner.method.gradient(zero, moved, state.method, None, ctx)

    # d/dtheta of 0.5 |theta - theta_0|^2 is theta - theta_0; its proximal step goes 1 / (1 + 0.25)
    # of the way that the gradient goes.
    expected = 0.1 if form == "gradient" else 0.1 / 1.25
    jax.tree.map(lambda g: np.testing.assert_allclose(g, expected, rtol=1e-3), pull(1))
    assert all(not g.any() for g in jax.tree.leaves(pull(0)))


def test_dropped_units_are_those_of_the_last_task_and_the_others_move_further():
    params = {"hidden_0": {"kernel": jnp.full((3, 2000), 2.0), "bias": jnp.full(2000, 5.0)},
              "output": {"kernel": jnp.full((2000, 2), 2.0)}}  # fmt: skip
    previous = jax.tree.map(lambda p: p - 1.0, params)
    is_head = {"hidden_0": {"kernel": 0.0, "bias": 0.0}, "output": {"kernel": 1.0}}
    found = drop_transfer(params, previous, is_head, jnp.float32(0.2), jax.random.key(0))
    kernel, bias = found["hidden_0"]["kernel"], found["hidden_0"]["bias"]
    dropped = np.asarray(kernel[0]) == 1.0
    np.testing.assert_allclose(kernel, np.where(dropped, 1.0, 1.0 + 1 / 0.8)[None].repeat(3, 0))
    np.testing.assert_allclose(bias, np.where(dropped, 4.0, 4.0 + 1 / 0.8))
    assert abs(dropped.mean() - 0.2) < 0.04
    np.testing.assert_array_equal(found["output"]["kernel"], params["output"]["kernel"])


def test_drop_transfer_leaves_the_first_task_alone_and_changes_the_second():
    key, found = jax.random.key(0), {}
    for drop in (0.0, 0.5):
        jitted = Jitted(digits_config("imm_mean", imm__drop=drop))
        for tasks in ([0], [0, 1]):
            state, _ = jitted.train(key, tasks, epochs=1)
            found[drop, len(tasks)] = state.learner.params
    close(found[0.0, 1], found[0.5, 1], rtol=1e-5)
    assert not np.allclose(found[0.0, 2]["output"]["kernel"], found[0.5, 2]["output"]["kernel"])


def test_drop_transfer_draws_anew_in_each_step():
    """A unit put back does not move in that step; over two steps others are put back."""
    jitted = Jitted(digits_config("imm_mean", imm__drop=0.5, train__optimizer="sgd"))
    state = jitted.begin_task(jitted.train(jax.random.key(0), [0], epochs=1)[0], 1)

    def still(step):
        moved, _ = jitted.run_steps(state, jitted.data, 1, 0, step, step + 1)
        kernels = (s.learner.params["hidden_0"]["kernel"] for s in (state, moved))
        return np.asarray(jnp.abs(jnp.subtract(*kernels)).max(0) == 0)

    assert any(still(0) != still(1))


def test_a_task_in_training_is_tested_on_the_network_as_it_stands():
    run = Jitted(digits_config("imm_mean"))
    state = run.begin_task(run.init(jax.random.key(0)), 0)
    for epoch in range(8):
        state, _ = run.run_steps(state, run.data, 0, epoch, 0, run.steps(0))
    correct = evaluate(run.experiment, state, run.data, 0, False, in_training=True)
    assert correct.task_told[0] / run.sequence.test.count[0] > 0.9
    x = run.sequence.test.images[:20]
    plain, _ = run.learner.network.apply(state.learner.params, {}, jnp.asarray(x))
    answers = run.learner.apply(state.learner, x, 0)
    np.testing.assert_allclose(answers, plain, rtol=1e-4, atol=1e-5)
