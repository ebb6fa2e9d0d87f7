"""The update rules against closed forms and SciPy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.optimize import minimize

from bpnjax import optim


def random_tree(seed, scale=1.0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {"a": scale * jax.random.normal(keys[0], (3,)),
            "b": {"c": scale * jax.random.normal(keys[1], (2, 2))}}  # fmt: skip


def close(a, b, **kw):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **(kw or {"rtol": 1e-5})), a, b)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_beneficial_sign_is_the_whole_update(dtype):
    g = jnp.array([[5.0, -1e-6, 0.0]], dtype)
    updates, _ = optim.beneficial_sign(0.25).update(g, optim.beneficial_sign(0.25).init(g))
    np.testing.assert_array_equal(updates.astype(jnp.float32), [[-0.25, 0.25, 0.0]])
    assert updates.dtype == dtype


def test_beneficial_sign_follows_a_schedule_and_passes_nan_on():
    tx = optim.beneficial_sign(lambda count: 0.5 / (1 + count))
    state = tx.init(jnp.zeros(2))
    first, state = tx.update(jnp.array([1.0, jnp.nan]), state)
    second, state = tx.update(jnp.array([-1.0, 1.0]), state)
    assert first[0] == -0.5 and np.isnan(first[1]) and second[0] == 0.25
    assert int(state.count) == 2


@pytest.mark.parametrize("epsilon", [-0.1, float("inf"), float("nan"), -1])
def test_a_step_that_is_none_is_refused(epsilon):
    for make in (optim.beneficial_sign, optim.matched_step, of_sgd):
        with pytest.raises(ValueError, match=f"epsilon: {epsilon} is no step length"):
            make(epsilon)


def of_sgd(epsilon):
    return optim.beneficial_perturbation(optax.sgd(1.0), epsilon)


def test_beneficial_sign_is_the_sign_descent_of_optax():
    grads = random_tree(0)
    ours, theirs = (tx.update(grads, tx.init(grads))[0]
                    for tx in (optim.beneficial_sign(0.25), optax.sign_sgd(0.25)))  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


class Factored(nnx.Module):
    def __init__(self):
        self.M, self.W = nnx.Param(jnp.zeros((1, 2))), nnx.Param(jnp.ones((2, 3)))


def test_in_an_nnx_optimizer_the_factors_take_the_beneficial_step():
    model = Factored()
    optimizer = nnx.Optimizer(model, of_sgd(0.25), wrt=nnx.Param)
    grads = nnx.grad(lambda m: jnp.sum((m.M[...] @ m.W[...]) * jnp.array([3.0, -1, 0])))(model)
    optimizer.update(model, grads)
    np.testing.assert_array_equal(model.M[...], [[-0.25, -0.25]])
    np.testing.assert_array_equal(model.W[...], jnp.ones((2, 3)))  # its gradient is 0


def test_the_step_lowers_the_loss_of_the_true_class():
    """The direction is beneficial: adversarial reversed."""
    w = jax.random.normal(jax.random.key(0), (20, 3))

    def loss(m):
        return optax.softmax_cross_entropy_with_integer_labels((m @ w)[0], 1)

    m = jnp.zeros((1, 20))
    tx = optim.beneficial_perturbation(optax.sgd(0.0), 0.01, factor="^$")
    updates, _ = tx.update(jax.grad(loss)(m), tx.init(m), m)
    assert loss(m + updates) < loss(m) - 0.01
    expected = -0.01 * np.sign((jax.nn.softmax(jnp.zeros(3)) - jax.nn.one_hot(1, 3)) @ w.T)
    np.testing.assert_allclose(updates[0], expected, rtol=1e-6)


def test_partition_trains_each_leaf_by_its_one_rule():
    params = {"core": {"kernel": jnp.ones((2, 2))}, "bd": {"l/x": {"M": jnp.ones((1, 2)),
              "W": jnp.ones((2, 2))}}}  # fmt: skip
    tx = optim.partition_by_path([("^core/", optax.sgd(0.5)), ("/M$", optim.beneficial_sign(0.1)),
                                  ("/W$", optax.sgd(2.0))])  # fmt: skip
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert updates["core"]["kernel"][0, 0] == -0.5
    np.testing.assert_allclose(updates["bd"]["l/x"]["M"][0, 0], -0.1)
    assert updates["bd"]["l/x"]["W"][0, 0] == -2.0


@pytest.mark.parametrize(
    "rules, message",
    [
        ([("a", optax.sgd(1.0))], "b/c matches none of 'a'"),
        ([("a|b", optax.sgd(1.0)), ("c$", optax.sgd(1.0))], "b/c matches 'a.b', 'c.'"),
    ],
)
def test_partition_lists_leaves_without_exactly_one_rule(rules, message):
    with pytest.raises(ValueError, match=message):
        optim.partition_by_path(rules).init(random_tree(0))


def test_beneficial_perturbation_without_factors_is_an_error():
    with pytest.raises(ValueError, match="no leaf matches"):
        optim.beneficial_perturbation(optax.sgd(1.0), 0.1).init(random_tree(0))


def test_anchor_gradient_is_the_gradient_of_the_penalty():
    params, anchor, grads = random_tree(0), random_tree(1), random_tree(2)
    importance = jax.tree.map(jnp.square, random_tree(3))
    penalty = jax.grad(optim.anchor_penalty)(params, anchor, importance, 7.0)
    close(optim.anchor_gradient(grads, params, anchor, importance, 7.0),
          jax.tree.map(jnp.add, grads, penalty))  # fmt: skip


def test_anchor_penalty_by_hand():
    got = optim.anchor_penalty(
        jnp.array([3.0, 0.0]), jnp.array([1.0, 1.0]), jnp.array([0.5, 2.0]), 4.0
    )
    assert float(got) == 0.5 * 4 * (0.5 * 4 + 2 * 1)


def test_proximal_form_under_sgd_solves_its_minimisation():
    params, anchor, g, f = (np.array(v, np.float64) for v in
                            ([3.0, -1.0], [1.0, 0.5], [0.3, -2.0], [4.0, 0.01]))  # fmt: skip
    rate, strength = 0.1, 2000.0
    new = optim.anchor_gradient(*(jnp.asarray(v) for v in (g, params, anchor, f)), strength, rate)

    def objective(z):
        return (g @ z + ((z - params) ** 2).sum() / (2 * rate)
                + strength / 2 * (f * (z - anchor) ** 2).sum())  # fmt: skip

    best = minimize(objective, params, tol=1e-14).x
    np.testing.assert_allclose(params - rate * np.asarray(new), best, atol=1e-4)


def test_explicit_form_diverges_where_the_proximal_one_does_not():
    def run(step_size):
        theta = jnp.array([1.0])
        for _ in range(60):
            g = optim.anchor_gradient(
                jnp.array([0.1]), theta, jnp.zeros(1), jnp.ones(1), 2000.0, step_size
            )
            theta = theta - 0.1 * g
        return float(theta[0])

    assert not np.isfinite(run(0.0)) or abs(run(0.0)) > 1e30
    # Both forms have the fixed point g + strength F (theta - anchor) = 0.
    np.testing.assert_allclose(run(0.1), -0.1 / 2000, rtol=1e-3)


@pytest.mark.parametrize("step_size", [0.0, 0.05])
def test_anchor_as_a_transform_equals_the_function(step_size):
    params, anchor, grads = random_tree(0), random_tree(1), random_tree(2)
    importance = jax.tree.map(jnp.square, random_tree(3))
    tx = optax.chain(optim.add_quadratic_anchor(5.0, step_size), optax.sgd(0.05))
    updates, _ = tx.update(grads, tx.init(params), params, anchor=anchor, importance=importance)
    new = optim.anchor_gradient(grads, params, anchor, importance, 5.0, step_size)
    close(updates, jax.tree.map(lambda g: -0.05 * g, new))


def test_anchor_transform_needs_params():
    tx = optim.add_quadratic_anchor(1.0)
    with pytest.raises(ValueError, match="needs params"):
        tx.update(random_tree(0), tx.init(random_tree(0)), anchor=None, importance=None)


def test_layer_rates_after_an_optimizer():
    params = {
        "conv_0": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
        "block": {"fc6": {"kernel": jnp.ones(3)}},
        "output": {"kernel": jnp.ones(2, jnp.bfloat16)},
    }
    grads = jax.tree.map(lambda p: 3 * p, params)
    rules = [("conv_.*", 0.0), ("block/fc6", 0.25), (".*", 2.0)]  # the first that matches counts
    tx = optax.chain(optax.adam(0.1), optim.layer_rates(rules))
    plain = optax.adam(0.1)
    updates, _ = tx.update(grads, tx.init(params), params)
    wanted, _ = plain.update(grads, plain.init(params), params)
    for layer, factor in (("conv_0", 0.0), ("block", 0.25), ("output", 2.0)):
        for got, one in zip(*map(jax.tree.leaves, (updates[layer], wanted[layer])), strict=True):
            np.testing.assert_array_equal(got, (factor * one).astype(one.dtype))
            assert got.dtype == one.dtype
    broken = params | {"conv_0": jax.tree.map(lambda p: p * jnp.nan, params["conv_0"])}
    updates, _ = tx.update(broken, tx.init(params), params)
    assert not np.any(updates["conv_0"]["kernel"])  # frozen whatever the gradient
    kept = optim.layer_rates([("conv_0", 3.0)])
    updates, _ = kept.update(params, kept.init(params))
    np.testing.assert_array_equal(updates["block"]["fc6"]["kernel"], 1)
    with pytest.raises(ValueError, match="'fc6' matches no layer; there are: .*block/fc6"):
        optim.layer_rates([("fc6", 1.0)]).init(params)


@pytest.mark.parametrize("text", ["conv_.*", "=1", "a=-1", "a=inf", "a=nan", "(=1", "a=x"])
def test_rates_that_cannot_be_read(text):
    assert optim.parse_rates("") == [] and optim.parse_rates(" a=b=2 ;") == [("a=b", 2.0)]
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        optim.parse_rates(text)
