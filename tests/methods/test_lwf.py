"""Distillation by hand: heads, temperature, padding; the warm-up of the head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import Jitted, digits_config

from bpnjax.methods import lwf

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
    got = lwf.distillation(jnp.asarray(new), jnp.asarray(old), jnp.asarray(heads), 3.0, weight)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_gradient_is_zero_where_student_and_teacher_agree():
    z = jax.random.normal(jax.random.key(0), (4, 6))
    heads = jnp.array([[True] * 3 + [False] * 3])
    gradient = jax.grad(lwf.distillation)(z, z, heads, 2.0, jnp.ones(4))
    np.testing.assert_allclose(gradient, 0.0, atol=1e-7)
    # Away from it the gradient is (q - p) / temperature / n on the head, 0 elsewhere.
    moved = z.at[:, 0].add(1.0)
    gradient = jax.grad(lwf.distillation)(moved, z, heads, 2.0, jnp.ones(4))
    q, p = jax.nn.softmax(moved[:, :3] / 2), jax.nn.softmax(z[:, :3] / 2)
    np.testing.assert_allclose(gradient[:, :3], (q - p) / 2 / 4, atol=1e-6)
    np.testing.assert_array_equal(gradient[:, 3:], 0.0)


def test_first_task_is_plain_training_and_the_teacher_is_its_end():
    key = jax.random.key(0)
    plain, _ = Jitted(digits_config("sgd")).train(key, [0], epochs=2)
    with_lwf, _ = Jitted(digits_config("lwf")).train(key, [0], epochs=2)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        plain.core, with_lwf.core,
    )  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, with_lwf.method.teacher, with_lwf.core)


def test_warm_up_trains_the_output_layer_alone():
    jitted = Jitted(digits_config("lwf", lwf__warmup_epochs=1))
    key = jax.random.key(0)
    state, _ = jitted.train(key, [0], epochs=1)
    state = jitted.begin_task(key, state, 1)
    warm, _ = jitted.run_steps(key, state, jitted.data, 1, 0, 0, 3)
    jax.tree.map(np.testing.assert_array_equal, warm.core["hidden_0"], state.core["hidden_0"])
    assert (warm.core["output"]["kernel"] != state.core["output"]["kernel"]).any()
    after, _ = jitted.run_steps(key, warm, jitted.data, 1, 1, 0, 1)
    assert (after.core["hidden_0"]["kernel"] != warm.core["hidden_0"]["kernel"]).any()
