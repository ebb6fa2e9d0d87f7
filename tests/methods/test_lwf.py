"""Distillation by hand: heads, temperature, padding; the warm-up of the head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import Jitted, changed, digits_config

from bpnjax.methods.lwf import distillation

pytestmark = pytest.mark.usefixtures("compile_once")


def test_distillation_by_hand():
    rng = np.random.default_rng(0)
    new, old = rng.normal(size=(2, 3, 5))
    heads = np.array([[1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]], bool)
    expected = 0.0
    for head in heads[:2]:
        p = np.exp(old[:2, head] / 3)
        q = np.exp(new[:2, head] / 3)
        p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
        expected += -(p * np.log(q)).sum(1).mean()
    weight = jnp.array([1.0, 1.0, 0.0])  # the third example is padding
    got = distillation(jnp.asarray(new), jnp.asarray(old), jnp.asarray(heads), 3.0, weight)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_gradient_is_zero_where_student_and_teacher_agree():
    z = jax.random.normal(jax.random.key(0), (4, 6))
    heads = jnp.array([[True] * 3 + [False] * 3])
    gradient = jax.grad(distillation)(z, z, heads, 2.0, jnp.ones(4))
    np.testing.assert_allclose(gradient, 0.0, atol=1e-7)
    # Away from it the gradient is (q - p) / temperature / n on the head, 0 elsewhere.
    moved = z.at[:, 0].add(1.0)
    gradient = jax.grad(distillation)(moved, z, heads, 2.0, jnp.ones(4))
    q, p = jax.nn.softmax(moved[:, :3] / 2), jax.nn.softmax(z[:, :3] / 2)
    np.testing.assert_allclose(gradient[:, :3], (q - p) / 2 / 4, atol=1e-6)
    np.testing.assert_array_equal(gradient[:, 3:], 0.0)


def test_first_task_is_plain_training_and_the_teacher_is_its_end():
    key = jax.random.key(0)
    plain, _ = Jitted(digits_config("sgd")).train(key, [0], epochs=2)
    with_lwf, _ = Jitted(digits_config("lwf")).train(key, [0], epochs=2)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        plain.learner.params, with_lwf.learner.params,
    )  # fmt: skip
    learner = with_lwf.learner
    jax.tree.map(np.testing.assert_array_equal, learner.method.teacher, learner.params)


@pytest.mark.parametrize("heads", ["tasks", "seen"])
def test_a_step_adds_the_gradient_of_the_distillation(heads):
    """In the third task: the teacher is the network before it, the heads those of two tasks."""
    key, changes = jax.random.key(0), dict(train__optimizer="sgd", train__learning_rate=0.1)
    jitted = Jitted(
        digits_config("lwf", lwf__strength=3.0, lwf__temperature=1.5, lwf__heads=heads, **changes)
    )
    state, _ = jitted.train(key, [0, 1], epochs=1)
    start = jitted.begin_task(state, 2)
    start, _ = jitted.run_steps(start, jitted.data, 2, 0, 0, 1)
    moved, _ = jitted.run_steps(start, jitted.data, 2, 0, 1, 2)
    plain = Jitted(digits_config("sgd", **changes))
    straight = changed(plain.init(key), params=start.learner.params)
    straight, _ = plain.run_steps(straight, plain.data, 2, 0, 1, 2)
    x, _ = jitted.epoch(key, 2, 0)[1]
    kept = [[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0]] if heads == "tasks" else [[1, 1, 1, 1, 0, 0]]

    def logits(params):
        return jitted.learner.network.apply(params, {}, x)[0]

    def loss(params):
        head = jnp.array(kept, bool)
        old = logits(state.learner.params)
        return 3.0 * distillation(logits(params), old, head, 1.5, jnp.ones(len(x)))

    extra = jax.grad(loss)(start.learner.params)
    assert float(jnp.abs(extra["hidden_0"]["kernel"]).max()) > 1e-4
    jax.tree.map(
        lambda ours, theirs, g: np.testing.assert_allclose(ours, theirs - 0.1 * g, atol=1e-6),
        moved.learner.params, straight.learner.params, extra,
    )  # fmt: skip


@pytest.mark.parametrize("method", ["lwf", "ebll"])
def test_warm_up_trains_the_output_layer_alone(method):
    """Over the first so many steps of a later task, wherever epochs end."""
    jitted = Jitted(digits_config(method, lwf__warmup_steps=3, train__batch_size=150))
    assert jitted.steps(1) == 2
    state = jitted.begin_task(jitted.init(jax.random.key(0)), 0)
    first, _ = jitted.run_steps(state, jitted.data, 0, 0, 0, 1)
    assert moves(state, first) == {"hidden_0", "output"}  # not in the first task
    state = jitted.begin_task(jitted.train(jax.random.key(0), [0], epochs=1)[0], 1)
    warm, _ = jitted.run_steps(state, jitted.data, 1, 0, 0, 2)
    warm, _ = jitted.run_steps(warm, jitted.data, 1, 1, 0, 1)
    assert moves(state, warm) == {"output"}
    after, _ = jitted.run_steps(warm, jitted.data, 1, 1, 1, 2)
    assert moves(warm, after) == {"hidden_0", "output"}


def moves(before, after):
    """Which layers differ between two states."""
    before, after = before.learner.params, after.learner.params
    return {layer for layer in before if (before[layer]["bias"] != after[layer]["bias"]).any()}
