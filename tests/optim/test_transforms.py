"""The update rules against closed forms and SciPy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.optimize import minimize

from bpnjax import networks, optim


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
        with pytest.raises(ValueError, match=f"epsilon: {epsilon} is not a step length"):
            make(epsilon)


def of_sgd(epsilon, **options):
    return optim.beneficial_perturbation(optax.sgd(1.0), epsilon, **options)


@pytest.mark.parametrize("size", [-0.1, float("inf"), float("nan"), -1])
def test_a_relative_step_that_is_none_is_refused(size):
    for make in (optim.relative_step, lambda s: of_sgd(s, step="relative")):
        with pytest.raises(ValueError, match=f"{size} is not a step length; give a finite number"):
            make(size)
    assert optim.relative_step(0.0).init(measured_tree())  # a step of 0 is one


def test_steps_and_directions_that_are_none_are_refused():
    words = "direction: unknown value 'along'; use sign or gradient"
    for make in (
        lambda: optim.relative_step(0.1, "along"),
        lambda: of_sgd(0.1, step="relative", direction="along"),
        lambda: of_sgd(0.1, direction="along"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
    with pytest.raises(ValueError, match="step: unknown value 'none'; use relative or absolute"):
        of_sgd(0.1, step="none")


def measured_tree(seed=0, squares=(8.0, 2.25)):
    """Two layers, each with a leaf ``measure`` beside the leaf that moves."""
    first, second = jax.tree.leaves(random_tree(seed))
    measures = [jnp.array([square, size]) for square, size in zip(squares, (2.0, 9.0), strict=True)]
    return {
        "a": {"M": first[None], "measure": measures[0]},
        "b": {"c": {"M": second, "measure": measures[1]}},
    }


RMS = {"a": 2.0, "b": 0.5}  # sqrt(8 / 2) and sqrt(2.25 / 9)


def of_layers(tree):
    """The leaves that move, by layer."""
    return {"a": tree["a"]["M"], "b": tree["b"]["c"]["M"]}


def test_falling_is_a_size_over_the_root_of_the_steps():
    for size in (0.25, jnp.float32(0.25)):
        found = [optim.falling(size)(count) for count in (0, 1, 3, jnp.int32(99))]
        np.testing.assert_allclose(found, [0.25, 0.25 / 2**0.5, 0.125, 0.025], rtol=1e-6)
    counts = jnp.arange(5)
    np.testing.assert_allclose(jax.jit(optim.falling(0.1))(counts), 0.1 / (1 + counts) ** 0.5)
    assert (np.diff(optim.falling(0.1)(jnp.arange(10**6, 10**6 + 9000, 1000))) < 0).all()


@pytest.mark.parametrize("schedule", [False, True])
@pytest.mark.parametrize("direction", ["sign", "gradient"])
def test_a_relative_step_by_hand(direction, schedule):
    """s / sqrt(1 + t), or a schedule, times the size of the layer, along the sign or gradient."""
    size = (lambda count: 0.5 / (1 + count)) if schedule else 0.5
    tx = optim.relative_step(size, direction)
    params = measured_tree()
    state = tx.init(params)
    for t in range(3):
        grads = measured_tree(seed=t)
        updates, state = jax.jit(tx.update)(grads, state)
        now = 0.5 / (1 + t) if schedule else 0.5 / (1 + t) ** 0.5
        for layer, g in of_layers(grads).items():
            g = np.asarray(g, np.float64)
            along = g * g.size**0.5 / np.linalg.norm(g) if direction == "gradient" else np.sign(g)
            expected = -now * RMS[layer] * along
            np.testing.assert_allclose(of_layers(updates)[layer], expected, rtol=1e-5)
        assert not updates["a"]["measure"].any() and not updates["b"]["c"]["measure"].any()
    assert [leaf.tolist() for leaf in jax.tree.leaves(state)] == [3]  # it keeps nothing else


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_relative_step_has_the_dtype_of_its_leaf(dtype):
    grads = {"M": jnp.array([5.0, -1e-6, 0.0], dtype), "measure": jnp.array([8.0, 2.0])}
    tx = optim.relative_step(0.25)
    updates, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_array_equal(updates["M"].astype(jnp.float32), [-0.5, 0.5, 0.0])
    assert (updates["M"].dtype, updates["measure"].dtype) == (dtype, jnp.float32)


def test_a_layer_that_was_not_measured_has_no_relative_step():
    """Its update is NaN, which the command finds, and not a step of some other size."""
    tx = optim.relative_step(0.5)
    grads = measured_tree()
    grads["a"]["measure"] = jnp.zeros(2)
    updates, _ = tx.update(grads, tx.init(grads))
    assert np.isnan(updates["a"]["M"]).all()
    expected = -0.5 * RMS["b"] * np.sign(grads["b"]["c"]["M"])
    np.testing.assert_allclose(updates["b"]["c"]["M"], expected, rtol=1e-6)
    assert not any(leaf.any() for leaf in (updates["a"]["measure"], updates["b"]["c"]["measure"]))
    # Outputs that are all 0 are known to be: their step is 0.
    grads["a"]["measure"] = jnp.array([0.0, 6.0])
    updates, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_array_equal(updates["a"]["M"], 0.0)


def test_only_the_ratio_of_what_was_measured_counts():
    """Sums over micro-batches or devices, and their means, give the same step."""
    tx = optim.relative_step(0.5)
    grads = measured_tree()
    expected, _ = tx.update(grads, tx.init(grads))
    for factor in (1 / 64, 3.0, 1e6):
        scaled = jax.tree.map(lambda g, c=factor: c * g, grads)
        close(tx.update(scaled, tx.init(grads))[0], expected)


@pytest.mark.parametrize("direction", ["sign", "gradient"])
@pytest.mark.parametrize("factor", [1e-3, 7.0])
def test_a_layer_of_larger_outputs_has_larger_steps(direction, factor):
    tx = optim.relative_step(0.5, direction)
    grads = measured_tree()
    larger = measured_tree(squares=(8.0 * factor**2, 2.25))
    one, other = (of_layers(tx.update(g, tx.init(g))[0]) for g in (grads, larger))
    np.testing.assert_allclose(other["a"], factor * one["a"], rtol=1e-5)
    np.testing.assert_array_equal(other["b"], one["b"])


def test_a_relative_step_needs_a_measure_beside_each_leaf():
    words = (
        r"no leaf 'measure' beside b/c/M; add one, jnp\.zeros\(2\), and pass the layer's output "
        r"through bpnjax\.networks\.measured"
    )
    bare = measured_tree()
    del bare["b"]["c"]["measure"]
    for tx in (optim.relative_step(0.5), of_sgd(0.5, step="relative")):
        with pytest.raises(ValueError, match=words):
            tx.init(bare)
    bare["b"]["measure"] = jnp.zeros(2)  # a level above is another layer
    with pytest.raises(ValueError, match=words):
        optim.relative_step(0.5).init(bare)


@pytest.mark.parametrize("direction", ["sign", "gradient"])
def test_with_a_relative_step_only_the_factors_and_their_measures_are_taken(direction):
    """W follows its optimizer; layers of any name are told apart by their path."""
    layers = ("measure", "value", "block/attention/value", "")
    grads = {
        path: {"M": (1.0 + i) * jnp.array([[1.0, -2.0]]), "W": jnp.ones((2, 3)),
               "measure": jnp.array([(1.0 + i) ** 2 * 5.0, 5.0])}
        for i, path in enumerate(layers)
    }  # fmt: skip
    tx = optim.beneficial_perturbation(optax.sgd(2.0), 0.5, step="relative", direction=direction)
    updates, _ = tx.update(grads, tx.init(grads), grads)
    unit = {"sign": np.array([[1.0, -1.0]]), "gradient": np.array([[1.0, -2.0]]) * 0.4**0.5}
    for i, path in enumerate(layers):
        expected = -0.5 * (1 + i) * unit[direction]
        np.testing.assert_allclose(updates[path]["M"], expected, rtol=1e-6)
        np.testing.assert_array_equal(updates[path]["W"], -2.0)
        np.testing.assert_array_equal(updates[path]["measure"], 0.0)


def test_the_value_of_an_nnx_variable_is_no_level_of_its_own():
    """Both names under which a variable may stand in a tree of NNX."""
    grads = {"p": {"M": {"value": jnp.array([3.0, -1.0])},
                   "measure": {"value": jnp.array([8.0, 2.0])}}}  # fmt: skip
    tx = optim.relative_step(0.5)
    updates, _ = tx.update(grads, tx.init(grads))
    assert updates["p"]["M"]["value"].tolist() == [-1.0, 1.0]
    both = of_sgd(0.5, step="relative")
    more = {"p": grads["p"] | {"W": {"value": jnp.ones(2)}}}
    updates, _ = both.update(more, both.init(more), more)
    assert updates["p"]["M"]["value"].tolist() == [-1.0, 1.0]
    assert updates["p"]["W"]["value"].tolist() == [-1.0, -1.0]
    with pytest.raises(ValueError, match="no leaf 'measure' beside q/M/value; add one"):
        tx.init(grads | {"q": {"M": {"value": jnp.zeros(2)}}})


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


class MeasuredFactored(nnx.Module):
    """A layer of fixed weights with the factors of its bias, as its author writes it."""

    def __init__(self):
        self.M, self.W = nnx.Param(jnp.zeros((1, 2))), nnx.Param(jnp.ones((2, 3)))
        self.measure = nnx.Param(jnp.zeros(2))

    def __call__(self, x):
        vectors = {"bias": (self.M[...] @ self.W[...])[0], "measure": self.measure[...]}
        return networks.modulate(x @ jnp.eye(2, 3), vectors)


def test_in_an_nnx_optimizer_the_step_may_be_relative():
    model = nnx.Dict(p=MeasuredFactored())
    optimizer = nnx.Optimizer(model, of_sgd(0.25, step="relative"), wrt=nnx.Param)
    x = jnp.array([[3.0, 0.0], [0.0, 3.0]])  # six outputs with a sum of squares of 18
    weights = jnp.array([3.0, -1, 0])
    grads = nnx.grad(lambda m: jnp.sum(m["p"](x) * weights))(model)
    optimizer.update(model, grads)
    moved = -0.25 * 3**0.5
    np.testing.assert_allclose(model["p"].M[...], [[moved, moved]], rtol=1e-6)
    np.testing.assert_array_equal(model["p"].W[...], jnp.ones((2, 3)))
    np.testing.assert_array_equal(model["p"].measure[...], [0.0, 0.0])


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


def test_a_pull_to_the_anchor_by_hand():
    """kappa G / (1 + kappa G) of the way back: none where kappa or G is 0."""
    theta, anchor = jnp.array([3.0, 3.0, -1.0]), jnp.array([1.0, 1.0, 1.0])
    got = optim.pull_to_anchor(theta, anchor, jnp.array([1.0, 0.0, 6.0]), 0.5)
    np.testing.assert_allclose(got, [3.0 - 2.0 / 3.0, 3.0, -1.0 + 0.75 * 2.0], rtol=1e-6)
    params, other = random_tree(0), random_tree(1)
    importance = jax.tree.map(jnp.square, random_tree(2))
    close(optim.pull_to_anchor(params, other, importance, 0.0), params, rtol=0)
    near = optim.pull_to_anchor(params, other, importance, jnp.float32(1e12))
    close(near, other, atol=1e-4)


def test_a_pull_to_the_anchor_is_a_proximal_step():
    """It minimises |z - theta|^2 / 2 + kappa / 2 sum G (z - anchor)^2."""
    theta, anchor, g = (np.array(v) for v in ([3.0, -1.0], [1.0, 0.5], [4.0, 0.01]))
    got = optim.pull_to_anchor(*(jnp.asarray(v, jnp.float32) for v in (theta, anchor, g)), 0.7)

    def objective(z):
        return ((z - theta) ** 2).sum() / 2 + 0.7 / 2 * (g * (z - anchor) ** 2).sum()

    np.testing.assert_allclose(got, minimize(objective, theta, tol=1e-14).x, atol=1e-4)


@pytest.mark.parametrize("kappa", [1e-2, 0.3, 5.0])
def test_a_parameter_that_is_moved_on_rests_d_over_kappa_from_its_anchor(kappa):
    """Where G is 1: d on and kappa / (1 + kappa) of the way back, at any kappa and d."""
    anchor, d = jnp.array([2.0, 2.0, 2.0]), jnp.array([0.01, -0.5, 0.0])

    def step(_, theta):
        return optim.pull_to_anchor(theta + d, anchor, jnp.ones(3), kappa)

    rest = jax.jit(lambda: jax.lax.fori_loop(0, 4000, step, anchor + 1.0))()
    np.testing.assert_allclose(rest - anchor, d / kappa, rtol=1e-3, atol=1e-4)
    # Where G is another number it is d / (kappa G).
    twice = optim.pull_to_anchor(anchor + d / (2 * kappa) + d, anchor, 2 * jnp.ones(3), kappa)
    np.testing.assert_allclose(twice - anchor, d / (2 * kappa), rtol=1e-3, atol=1e-5)


def test_a_pull_to_the_anchor_keeps_dtypes_and_refuses_other_shapes():
    half = jnp.array([3.0], jnp.bfloat16)
    got = optim.pull_to_anchor({"a": half}, {"a": 0 * half}, {"a": jnp.ones(1)}, jnp.float32(1))
    assert got["a"].dtype == jnp.bfloat16 and float(got["a"][0]) == 1.5
    with pytest.raises(AssertionError, match="shape"):
        optim.pull_to_anchor(jnp.ones(2), jnp.ones(1), jnp.ones(2), 1.0)
    with pytest.raises(AssertionError, match="shape"):
        optim.pull_to_anchor(jnp.ones(2), jnp.ones(2), jnp.ones(()), 1.0)


def test_anchors_of_other_shapes_are_not_broadcast():
    one, two = jnp.ones(1), jnp.ones(2)
    for wrong in ((one, two, two), (two, one, two), (two, two, one), (two, two, jnp.ones(()))):
        with pytest.raises(AssertionError, match="shape"):
            optim.anchor_penalty(*wrong, 1.0)
        with pytest.raises(AssertionError, match="shape"):
            optim.anchor_gradient(two, *wrong, 1.0)
    with pytest.raises(AssertionError, match="rank"):
        optim.anchor_gradient(two, two, two, two, two)


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
