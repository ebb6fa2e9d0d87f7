"""Learning rates: read out of optimizers, changed, and followed from step to step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bpnjax import optim
from bpnjax.optim.rates import at_rate, first_step, following_rate, has_schedule
from bpnjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_once")

PARAMS = {"first": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}, "scale": jnp.float32(1)}
HALVED = optax.exponential_decay(0.3, 1, 0.5)  # 0.3, 0.15, ...
OPTIMIZERS = {
    "sgd": optax.sgd(0.3),
    "momentum": optax.sgd(0.3, momentum=0.9),
    "nesterov": optax.sgd(0.3 / 1.9, momentum=0.9, nesterov=True),
    "adam": optax.adam(0.3),
    "adamw": optax.adamw(0.3),
    "sign": optax.sign_sgd(0.3),
    "lion": optax.lion(0.3),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.3)),
    "decayed": optax.sgd(HALVED),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=0.3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_first_step_is_the_learning_rate(name):
    for find in (first_step, jax.jit(first_step, static_argnums=0)):
        found = find(OPTIMIZERS[name], PARAMS)
        assert jax.tree.structure(found) == jax.tree.structure(PARAMS)
        for rate in jax.tree.leaves(found):
            assert (rate.shape, rate.dtype) == ((), jnp.float32)
            np.testing.assert_allclose(rate, 0.3, rtol=1e-4)


def test_each_leaf_has_its_own_rate():
    tx = optax.chain(optax.sgd(0.5), optim.layer_rates([("first", 0.2), ("", 3.0)]))
    found = first_step(tx, PARAMS)
    np.testing.assert_allclose(jax.tree.leaves(found), [0.1, 0.1, 1.5], rtol=1e-5)
    parts = optim.partition_by_path([("kernel$", optax.sgd(2.0)), ("bias|scale", optax.adam(0.1))])
    np.testing.assert_allclose(
        jax.tree.leaves(first_step(parts, PARAMS)), [0.1, 2.0, 0.1], rtol=1e-3
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_schedule_is_seen_and_read_where_it_is(name):
    tx = OPTIMIZERS[name]
    scheduled = name in ("decayed", "injected")
    assert has_schedule(tx, PARAMS) == has_schedule(following_rate(tx), PARAMS) == scheduled
    if not scheduled:
        return
    state = tx.init(PARAMS)
    for _ in range(2):  # the size of earlier gradients does not matter
        _, state = tx.update(jax.tree.map(lambda p: 7.0 * jnp.ones_like(p), PARAMS), state, PARAMS)
    if name == "injected":
        state.hyperparams["learning_rate"] = jnp.float32(0.075)
    for rate in jax.tree.leaves(first_step(tx, PARAMS, state)):
        np.testing.assert_allclose(rate, 0.075, rtol=1e-4)


@pytest.mark.parametrize("make", [optax.sgd, optax.adam, optax.adamw, optax.lion, optax.sign_sgd])
def test_another_rate_is_the_optimizer_made_with_it(make):
    ours, theirs = at_rate(make(0.3), 0.02), make(0.02)
    states, params = [ours.init(PARAMS), theirs.init(PARAMS)], [PARAMS, PARAMS]
    for step in range(4):
        for i, tx in enumerate((ours, theirs)):
            grads = jax.tree.map(lambda p, step=step: jnp.cos(p + step), PARAMS)
            updates, states[i] = tx.update(grads, states[i], params[i])
            params[i] = optax.apply_updates(params[i], updates)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *params)


def test_rates_that_cannot_be_changed_are_refused_with_the_remedy():
    by_name = optim.partition_by_path([("kernel$", optax.sgd(1.0))])
    with pytest.raises(UserError, match=r"to the method's 0.1 \(ValueError: it acts on named leav"):
        at_rate(by_name, 0.1)
    for still in (optax.sgd(0.0), optax.set_to_zero()):
        with pytest.raises(UserError, match=r"its first step is 0.*task_optimizer=\.\.\."):
            at_rate(still, 0.1)


def test_the_rate_may_change_at_each_step_and_is_handed_through():
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    tx = following_rate(optax.adam(0.1))
    update = jax.jit(lambda g, s, rate: tx.update(g, s, PARAMS, rate=rate))
    state = tx.init(PARAMS)
    plain = optax.adam(0.1)
    expected_state = plain.init(PARAMS)
    for rate in (1.0, 0.5, 0.0):
        updates, state = update(grads, state, rate)
        expected, expected_state = plain.update(grads, expected_state, PARAMS)
        for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, rate * b, rtol=1e-5)
    unchanged, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    first, _ = plain.update(grads, plain.init(PARAMS), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, unchanged, first)
    anchored = following_rate(optax.chain(optim.add_quadratic_anchor(2.0), optax.sgd(1.0)))
    more = {"anchor": jnp.zeros(1), "importance": jnp.ones(1), "rate": 0.5}
    pulled, _ = anchored.update(jnp.zeros(1), anchored.init(jnp.ones(1)), jnp.ones(1), **more)
    assert pulled.tolist() == [-1.0]
    half = following_rate(optax.sgd(1.0)).update(jnp.ones(1, jnp.bfloat16), optax.sgd(1.0).init(()),
                                                 rate=jnp.float32(0.5))[0]  # fmt: skip
    assert half.dtype == jnp.bfloat16 and half.tolist() == [-0.5]
