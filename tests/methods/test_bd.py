"""BD, GD and PSP: the factors, their steps, the bank, and the keys."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import Jitted, digits_config

import bpnjax
from bpnjax import methods, modes, networks
from bpnjax.methods.bd import init_factors, product
from bpnjax.models import MLP
from bpnjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_once")
FACTORED = ["bd", "bd_ewc", "bd_psp", "gd", "gd_ewc", "gd_matched"]


def factors_of(state):
    """``{layer: {"M", "W"}}`` of the biases of the task in training."""
    own = state.learner.task_params
    return {
        path: layer["bias"] for path, layer in (own if isinstance(own, dict) else own[0]).items()
    }


def biases_for(factors):
    """The mode that such factors stand for."""
    return product({path: {"bias": own} for path, own in factors.items()})


def biases_of(state):
    """The bank ``{layer: {"bias": [T, K]}}``."""
    kept = state.learner.method
    return kept if isinstance(kept, dict) else kept[0]


def output_sizes(network, params, mode, x):
    """The root mean square of each dense layer's outputs, before the bias of the mode is added."""
    sizes = {}
    for path, inputs in network.features(params, mode, x, list(network.layers)).items():
        outputs = inputs @ params[path]["kernel"] + params[path]["bias"]
        sizes[path] = np.sqrt(np.mean(np.square(np.asarray(outputs, np.float64))))
    return sizes


@pytest.mark.parametrize("method", FACTORED)
def test_dropping_the_factors_leaves_answers_unchanged(method):
    jitted = Jitted(digits_config(method))
    learner = jitted.learner
    state = jitted.begin_task(jitted.init(jax.random.key(0)), 1)
    state, _ = jitted.run_steps(state, jitted.data, 1, 0, 0, 5)
    x = jnp.asarray(jitted.sequence.test.images[:50])
    before = biases_for(factors_of(state))
    assert all(np.abs(layer["bias"]).max() > 0 for layer in before.values())
    ended = jitted.end_task(state, jitted.data, 1)
    after = modes.select(biases_of(ended), 1)
    # Equal up to the rounding of M W, which is compiled in two programs.
    for path, layer in before.items():
        np.testing.assert_allclose(after[path]["bias"], layer["bias"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(
        learner.apply(state.learner, x, 1), learner.apply(ended.learner, x, 1), rtol=1e-5, atol=1e-5
    )
    assert all(not leaf.any() for leaf in jax.tree.leaves(ended.learner.task_params))
    # Nothing is written of the factors, and other tasks' biases are what they were.
    names = jax.tree.leaves(learner.answering().task_params)
    assert not any(names)
    for other in (0, 2):
        untouched = modes.select(biases_of(ended), other)
        assert not any(layer["bias"].any() for layer in untouched.values())


@pytest.mark.parametrize("step", ["absolute", "relative"])
def test_bd_starts_as_the_plain_network_and_moves_by_epsilon(step):
    """Or by epsilon times the size of the layer's outputs on the batch."""
    jitted = Jitted(digits_config("bd_ewc", bd__epsilon=0.25, bd__step=step))
    state = jitted.begin_task(jitted.init(jax.random.key(0)), 0)
    start = factors_of(state)
    for factors in start.values():
        assert not factors["M"].any()
        bound = 8**-0.5
        assert 0.9 * bound < np.abs(factors["W"]).max() <= bound
        assert factors["M"].shape == (1, 8)
    x = jnp.asarray(jitted.sequence.test.images[:20])
    plain, _ = jitted.learner.network.apply(state.learner.params, {}, x)
    np.testing.assert_allclose(jitted.learner.apply(state.learner, x, 0), plain, rtol=1e-5)
    moved, _ = jitted.run_steps(state, jitted.data, 0, 0, 0, 1)
    batch, _ = jitted.epoch(jax.random.key(0), 0, 0)[0]
    sizes = output_sizes(jitted.learner.network, state.learner.params, {}, batch)
    for path, factors in factors_of(moved).items():
        if step == "absolute":
            np.testing.assert_allclose(np.abs(factors["M"]), 0.25)
            assert set(factors) == {"M", "W"}
        else:
            np.testing.assert_allclose(np.abs(factors["M"]), 0.25 * sizes[path], rtol=1e-5)
            np.testing.assert_array_equal(factors["measure"], [0.0, 0.0])
        # While M is zero the gradient of W, M^T g, is zero: W has not moved yet.
        np.testing.assert_array_equal(factors["W"], start[path]["W"])


def test_every_task_seed_and_layer_has_fresh_factors_of_its_own():
    jitted = Jitted(digits_config("bd", model__hidden=(16, 16)))
    found = []
    for seed in (0, 1):
        state = jitted.init(jax.random.key(seed))
        for task in range(3):
            own = factors_of(jitted.begin_task(state, task))
            found += [np.asarray(own[path]["W"]) for path in ("hidden_0", "hidden_1")]
    for i, one in enumerate(found):
        for other in found[:i]:
            assert (one != other).mean() > 0.99
    again = jitted.begin_task(jitted.init(jax.random.key(1)), 2)
    np.testing.assert_array_equal(factors_of(again)["hidden_1"]["W"], found[-1])


@pytest.mark.parametrize("kind", ["absolute", "relative"])
def test_bd_factor_gradients_by_hand(kind):
    """dL/dW = M^T g and M moves against sign(g W^T), with g summed over the batch."""
    jitted = Jitted(digits_config("bd_psp", train__optimizer="sgd", bd__epsilon=0.5, bd__step=kind))
    key = jax.random.key(0)
    state = jitted.begin_task(jitted.init(key), 0)
    state, _ = jitted.run_steps(state, jitted.data, 0, 0, 0, 1)
    moved, _ = jitted.run_steps(state, jitted.data, 0, 0, 1, 2)
    x, y = jitted.epoch(key, 0, 0)[1]
    old, new = factors_of(state), factors_of(moved)
    mode = modes.merge(biases_for(old), modes.select(state.learner.method[1], 0))

    def loss(shift):
        shifted = {p: {**v, "bias": v["bias"] + shift[p]} for p, v in mode.items()}
        logits, _ = jitted.learner.network.apply(state.learner.params, shifted, x)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(48), y])

    g = jax.grad(loss)({p: jnp.zeros_like(v["bias"]) for p, v in mode.items()})
    sizes = output_sizes(jitted.learner.network, state.learner.params, mode, x)
    for path, factors in old.items():
        step = np.sign(g[path] @ factors["W"].T)
        length = 0.5 if kind == "absolute" else 0.5 / 2**0.5 * sizes[path]  # the second step
        rtol = 1e-6 if kind == "absolute" else 1e-5
        expected = factors["M"][0] - length * step
        np.testing.assert_allclose(new[path]["M"][0], expected, rtol=rtol, atol=0.1 * rtol)
        expected = factors["W"] - 3e-3 * jnp.outer(factors["M"][0], g[path])
        np.testing.assert_allclose(new[path]["W"], expected, rtol=1e-4, atol=1e-7)


def steps_of_m(method, **changes):
    """By how much each layer's M moves in its first step."""
    jitted = Jitted(digits_config(method, **changes))
    state = jitted.begin_task(jitted.init(jax.random.key(0)), 0)
    moved, _ = jitted.run_steps(state, jitted.data, 0, 0, 0, 1)
    return {path: np.asarray(f["M"]) for path, f in factors_of(moved).items()}


@pytest.mark.parametrize("method", ["gd", "gd_ewc"])
def test_gd_moves_m_by_its_gradient(method):
    sizes = np.abs(np.concatenate([m.ravel() for m in steps_of_m(
        method, train__optimizer="sgd").values()]))  # fmt: skip
    assert len(np.unique(sizes.round(9))) > 8 and 0 < sizes.max() < 0.01


@pytest.mark.parametrize("step", ["absolute", "relative"])
def test_matched_gd_moves_along_the_gradient_as_far_as_bd(step):
    """The same direction as GD, the same length as BD, in every layer."""
    changes = dict(train__optimizer="sgd", bd__epsilon=0.25, bd__step=step)
    along, matched, signs = (steps_of_m(m, **changes) for m in ("gd", "gd_matched", "bd"))
    for path, m in matched.items():
        length = np.linalg.norm
        np.testing.assert_allclose(length(m), length(signs[path]), rtol=1e-5)
        cosine = np.sum(m * along[path]) / length(m) / length(along[path])
        np.testing.assert_allclose(cosine, 1.0, rtol=1e-5)


DATA = jnp.eye(6, 4), jnp.array([0, 1, 0, 1, 0, 1])


@pytest.mark.parametrize(
    "optimizer", [optax.sgd(0.1), optax.sgd(0.1, 0.9), optax.adam(0.1), optax.rmsprop(0.1)],
    ids=["sgd", "momentum", "adam", "rmsprop"],
)  # fmt: skip
def test_in_a_loop_bd_is_bd_under_any_optimizer(optimizer):
    """M takes steps of epsilon against the sign; only W is the optimizer's."""
    x, y = DATA
    network = networks.from_linen(nn.Dense(2), x)
    method = methods.bd(epsilon=0.25, hidden_dim=8, step="absolute")
    learner = bpnjax.learner(network, method, optimizer, 2)
    state = learner.begin_task(learner.init(jax.random.key(0)), 0)
    for step in range(1, 3):
        before = np.array(state.task_params[""]["bias"]["W"])
        state, _ = learner.step(state, (x, y))
        sizes = np.abs(state.task_params[""]["bias"]["M"])
        # After one step all are epsilon; after two 0 or twice that.
        np.testing.assert_allclose(np.minimum(sizes, np.abs(0.25 * step - sizes)), 0, atol=1e-6)
    assert (before != state.task_params[""]["bias"]["W"]).any()


def test_factors_have_a_measure_where_a_step_asks_for_it():
    network = networks.from_linen(MLP((6,), 2), jnp.ones((1, 4)))
    plain, measured = (
        init_factors(jax.random.key(0), network.layers, 8, **more)
        for more in ({}, {"measure": True})
    )
    for path, vectors in measured.items():
        factors, own = vectors["bias"], plain[path]["bias"]
        assert (factors["measure"].shape, factors["measure"].dtype) == ((2,), jnp.float32)
        assert set(own) == {"M", "W"}
        for name, leaf in own.items():
            np.testing.assert_array_equal(factors[name], leaf)
    jax.tree.map(np.testing.assert_array_equal, product(measured), product(plain))


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1), optax.adam(0.1)], ids=["sgd", "adam"])
def test_in_a_loop_relative_steps_fall_within_a_task_and_start_anew_with_the_next(optimizer):
    """epsilon / sqrt(1 + t) times the size of the outputs, t from 0 in each task."""
    x, y = DATA
    network = networks.from_linen(nn.Dense(2), x)
    learner = bpnjax.learner(network, methods.bd(epsilon=0.5, hidden_dim=8), optimizer, 2)
    state = learner.init(jax.random.key(0))
    for task in range(2):
        state = learner.begin_task(state, task)
        for t in range(4):
            before = np.array(state.task_params[""]["bias"]["M"])
            outputs = np.asarray(network.apply(state.params, {}, x)[0], np.float64)
            state, _ = learner.step(state, (x, y))
            moved = np.abs(state.task_params[""]["bias"]["M"] - before)
            expected = 0.5 / (1 + t) ** 0.5 * np.sqrt(np.mean(outputs**2))
            np.testing.assert_allclose(moved, expected, rtol=1e-4)
        state = learner.end_task(state, (x, y))


def layered(x, y, method, c=1.0, optimizer=None, steps=5):
    """A linear network without biases on inputs times c, trained as on these; its end state.

    The loss is that of the outputs over c, so nothing but the size of the outputs differs.
    """

    def loss(outputs, labels):
        return optax.softmax_cross_entropy_with_integer_labels(outputs / c, labels)

    module = nn.Sequential([nn.Dense(5, use_bias=False), nn.Dense(3, use_bias=False)])
    network = networks.from_linen(module, x)
    learner = bpnjax.learner(network, method, optimizer or optax.sgd(0.1), 2, loss=loss)
    state = learner.init(jax.random.key(0))
    for task in range(2):
        state = learner.begin_task(state, task)
        for _ in range(steps):
            state, _ = learner.step(state, (c * x, y))
        state = learner.end_task(state, (c * x, y))
    return state


@pytest.mark.parametrize("c", [1e-3, 50.0])
@pytest.mark.parametrize(
    "method",
    [
        methods.bd(hidden_dim=8),
        methods.gd_matched(hidden_dim=8),
        methods.plain_bias(step="relative"),
        methods.bd_ewc(hidden_dim=8),
    ],
    ids=["bd", "gd_matched", "plain_bias", "bd_ewc"],
)
def test_outputs_multiplied_by_a_number_multiply_the_biases_by_it(method, c):
    """So no size has to be found for each network: the step has the unit of the layer."""
    x = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    y = np.arange(12) % 3
    plain, larger = (layered(x, y, method, c=c) for c in (1.0, c))
    banks = [kept if isinstance(kept, dict) else kept[0] for kept in (plain.method, larger.method)]
    for path, layer in banks[0].items():
        assert np.abs(layer["bias"]).max() > 0.05
        scaled = banks[1][path]["bias"] / c
        np.testing.assert_allclose(scaled, layer["bias"], rtol=1e-3, atol=1e-5)
    # The shared parameters have no such unit here: their gradients are the same.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        larger.params, plain.params,
    )  # fmt: skip


def test_absolute_steps_do_not_follow_the_size_of_the_outputs():
    """So the test above tells the two steps apart."""
    x = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    method = methods.bd(hidden_dim=8, step="absolute", epsilon=0.02)
    plain, larger = (layered(x, np.arange(12) % 3, method, c=c).method for c in (1.0, 50.0))
    for path, layer in plain.items():
        assert np.abs(larger[path]["bias"] / 50.0).max() < 0.1 * np.abs(layer["bias"]).max()


@pytest.mark.parametrize("method", ["bd", "gd_matched", "plain_bias"])
def test_the_size_of_the_outputs_does_not_depend_on_padding(method):
    """Padding holds other examples, or zeros, or nothing at all: the same steps."""
    x, y = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32), np.arange(9) % 2
    network = networks.from_linen(MLP((6,), 2), x)
    settings = {"step": "relative"} if method == "plain_bias" else {"hidden_dim": 8}
    learner = bpnjax.learner(network, methods.REGISTRY[method](**settings), optax.sgd(0.1), 1)
    weight = (np.arange(9) < 5).astype(np.float32)
    found = {}
    for name, batch in {
        "none": (x[:5], y[:5]),
        "others": (x, y, weight),
        "zeros": (x * weight[:, None], y, weight),
        "large": (np.where(weight[:, None] > 0, x, 1e3), y, weight),
    }.items():
        state = learner.begin_task(learner.init(jax.random.key(0)), 0)
        for _ in range(2):
            state, _ = learner.step(state, batch)
        found[name] = state.task_params
    for name in ("others", "zeros", "large"):
        jax.tree.map(
            lambda a, b, name=name: np.testing.assert_allclose(
                a, b, rtol=1e-4, atol=1e-6, err_msg=name
            ),
            found[name], found["none"],
        )  # fmt: skip


def test_plain_biases_with_relative_steps_move_against_the_sign():
    """bias_t+1 = bias_t - epsilon / sqrt(1 + t) r_l sign(g), by hand."""
    x, y = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32), np.arange(9) % 2
    network = networks.from_linen(MLP((6,), 2), x)
    method = methods.plain_bias(step="relative", epsilon=0.3)
    learner = bpnjax.learner(network, method, optax.adam(0.05), 1)
    state = learner.begin_task(learner.init(jax.random.key(0)), 0)
    by_hand = {path: np.zeros(layer.outputs) for path, layer in network.layers.items()}

    def loss(biases, params):
        mode = {path: {"bias": bias} for path, bias in biases.items()}
        logits, _ = network.apply(params, mode, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    for t in range(4):
        biases = {path: jnp.asarray(bias, jnp.float32) for path, bias in by_hand.items()}
        g = jax.grad(loss)(biases, state.params)
        mode = {path: {"bias": bias} for path, bias in biases.items()}
        for path, size in output_sizes(network, state.params, mode, x).items():
            by_hand[path] = by_hand[path] - 0.3 / (1 + t) ** 0.5 * size * np.sign(g[path])
        state, _ = learner.step(state, (x, y))
        for path, bias in by_hand.items():
            own = state.task_params[path]["bias"]
            np.testing.assert_allclose(own["change"], bias, rtol=1e-4, atol=1e-6)
            np.testing.assert_array_equal(own["measure"], [0.0, 0.0])
    state = learner.end_task(state, (x, y))
    for path, bias in by_hand.items():
        assert set(state.method[path]) == {"bias"}
        np.testing.assert_allclose(state.method[path]["bias"][0], bias, rtol=1e-4, atol=1e-6)


def test_plain_biases_follow_the_optimizer_by_default():
    """At their own rate, and nothing is measured."""
    x, y = DATA
    network = networks.from_linen(nn.Dense(2), x)
    learner = bpnjax.learner(network, methods.plain_bias(learning_rate=0.5), optax.sgd(0.1), 1)
    state = learner.begin_task(learner.init(jax.random.key(0)), 0)
    assert set(state.task_params[""]["bias"]) == {"change"}
    logits, _ = network.apply(state.params, {}, x)
    g = (jax.nn.softmax(logits) - jax.nn.one_hot(y, 2)).mean(0)
    state, _ = learner.step(state, (x, y))
    np.testing.assert_allclose(state.task_params[""]["bias"]["change"], -0.5 * g, rtol=1e-5)


def test_two_parts_that_measure_a_layer_see_the_same_outputs():
    """Those before the biases of both; each takes its own steps."""
    x, y = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32), np.arange(9) % 2
    network = networks.from_linen(MLP((6,), 2), x)
    method = methods.chain(
        methods.plain_bias(step="relative", epsilon=0.3), methods.bd(hidden_dim=8, epsilon=0.2)
    )
    learner = bpnjax.learner(network, method, optax.sgd(0.1), 1)
    state = learner.begin_task(learner.init(jax.random.key(0)), 0)
    for t in range(2):
        before = jax.tree.map(np.array, state.task_params)
        plain = {path: {"bias": own["bias"]["change"]} for path, own in before[0].items()}
        both = modes.merge(plain, product(before[1]))
        sizes = output_sizes(network, state.params, both, x)
        state, _ = learner.step(state, (x, y))
        for path, size in sizes.items():
            for part, leaf, epsilon in ((0, "change", 0.3), (1, "M", 0.2)):
                now, then = (each[part][path]["bias"][leaf] for each in (state.task_params, before))
                moved = np.abs(now - then)
                expected = epsilon / (1 + t) ** 0.5 * size
                np.testing.assert_allclose(moved, expected, rtol=1e-4, err_msg=f"{path} {leaf}")


def test_w_has_a_learning_rate_of_its_own():
    """None is that of the shared parameters; another one changes W's step only."""
    found = {}
    for rate in (None, 3e-3, 3e-2):
        changes = {} if rate is None else {"bd__learning_rate": rate}
        jitted = Jitted(digits_config("bd_ewc", train__optimizer="sgd", **changes))
        state = jitted.begin_task(jitted.init(jax.random.key(0)), 0)
        state, _ = jitted.run_steps(state, jitted.data, 0, 0, 0, 1)
        after, _ = jitted.run_steps(state, jitted.data, 0, 0, 1, 2)
        moves = [factors_of(s)["output"]["W"] for s in (state, after)]
        found[rate] = moves[1] - moves[0], after.learner.params["output"]["kernel"]
    np.testing.assert_array_equal(found[None][0], found[3e-3][0])
    np.testing.assert_allclose(found[3e-2][0], 10 * found[3e-3][0], rtol=1e-2, atol=1e-6)
    np.testing.assert_allclose(found[3e-2][1], found[None][1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"epsilon": -0.2}, r"bd\.epsilon: -0\.2 is not above 0"),
        ({"epsilon": 0.0}, r"bd\.epsilon: 0\.0 is not above 0"),
        ({"epsilon": float("nan")}, r"bd\.epsilon: nan is not finite"),
        ({"hidden_dim": 0}, r"bd\.hidden_dim: 0 is below 1"),
        ({"hidden_dim": 2.5}, r"bd\.hidden_dim: 2\.5 is of type float; give one of type int"),
        ({"layers": "("}, r"bd\.layers: '\(' is not a regular expression"),
        ({"learning_rate": 0.0}, r"bd\.learning_rate: 0\.0 is not above 0"),
        ({"step": "small"}, r"bd\.step: unknown value 'small'; choose from: relative, absolute"),
        ({"epsilom": 0.2}, r"bd\.epsilom: bd has no such setting; did you mean epsilon"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        methods.bd(**settings)
    with pytest.raises(UserError, match=words.replace(r"bd\.epsilom: bd", "epsilom: bd_ewc")):
        methods.bd_ewc(**settings)


def test_layers_that_do_not_exist_are_refused():
    for method in ("bd", "psp", "plain_bias", "random_bias"):
        group = "psp" if method == "psp" else "bd"
        with pytest.raises(UserError, match=rf"{group}\.layers: .*nope.* fix the pattern"):
            Jitted(digits_config(method, **{f"{group}__layers": "nope"}))


def test_psp_keys_sit_on_every_layer_pixels_included():
    jitted = Jitted(digits_config("bd_psp", psp__layers=".*"))
    bank = jitted.init(jax.random.key(0)).learner.method[1]
    mode = modes.select(bank, 1)
    assert {p: v["key"].shape for p, v in mode.items()} == {
        "hidden_0": (64,), "output": (16,)}  # fmt: skip
    for path, layer in mode.items():
        assert set(np.unique(layer["key"])) == {-1.0, 1.0}
        assert (layer["key"] != modes.select(bank, 0)[path]["key"]).any()
    some = Jitted(digits_config("psp", psp__layers="hidden_.*"))
    mode = modes.select(some.init(jax.random.key(0)).learner.method, 0)
    assert list(mode) == ["hidden_0"]


def test_convolutions_have_modes_too():
    jitted = Jitted(digits_config("bd_psp", model__name="convnet", model__channels=(4,)))
    state, _ = jitted.train(jax.random.key(0), [0, 1], epochs=1)
    bank, keys = state.learner.method
    assert bank["conv_0"]["bias"].shape == (3, 4)
    assert np.abs(bank["conv_0"]["bias"][:2]).min() > 0 and not bank["conv_0"]["bias"][2].any()
    assert modes.select(keys, 0)["conv_0"]["key"].shape == (1,)


class Modern(nn.Module):
    """A network with dropout and normalisation, as users have them."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(8, name="in")(x))
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return nn.Dense(2, name="out")(x)


@pytest.mark.parametrize("method", [methods.bd_ewc(), methods.bd_psp(), methods.stl()],
                         ids=["bd_ewc", "bd_psp", "stl"])  # fmt: skip
def test_in_a_loop_dropout_and_batch_norm_act(method):
    """Dropout is drawn anew for each step; every task keeps its own running statistics."""
    x = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
    y = np.arange(32) % 2
    network = networks.from_linen(Modern(), x)
    learner = bpnjax.learner(network, method, optax.sgd(1e-12), num_tasks=2)
    state, losses, answers = learner.init(jax.random.key(0)), [], []
    for task in range(2):
        state = learner.begin_task(state, task)
        for _ in range(4):
            state, metrics = learner.step(state, (x + 10.0 * task, y))
            losses.append(float(metrics["loss"]))
        state = learner.end_task(state, (x + 10.0 * task, y))
        answers.append([np.array(learner.apply(state, x + 10.0 * t, t)) for t in range(task + 1)])
    assert len(set(np.round(losses, 6))) == 8  # the parameters hardly moved, the masks did
    means = state.task_variables["batch_stats"]["norm"]["mean"]
    assert np.abs(means[0] - means[1]).max() > 0.5
    np.testing.assert_allclose(answers[0][0], answers[1][0], rtol=1e-5, atol=1e-6)


def test_tasks_that_do_not_exist():
    """Refused where they are known; where they are traced the answer is NaN, not another task's."""
    x, _ = DATA
    network = networks.from_linen(nn.Dense(2), x)
    learner = bpnjax.learner(network, methods.bd(hidden_dim=8), optax.sgd(0.1), num_tasks=2)
    state = learner.init(jax.random.key(0))
    for task in (2, -1, 1.0, True, None):
        with pytest.raises(UserError, match="task: .*num_tasks=2, learner.grow makes room"):
            learner.begin_task(state, task)
        with pytest.raises(UserError, match="task: .*num_tasks=2, learner.grow makes room"):
            learner.apply(state, x, task)
    with pytest.raises(UserError, match="task: task 2 is not in the bank; it has tasks 0 to 1"):
        learner.apply(state, x, np.array([0, 1, 2, 0, 0, 0]))
    with pytest.raises(UserError, match=r"task: \(3,\) ids for 6 examples; give one each"):
        learner.apply(state, x, np.array([0, 1, 1]))
    for task in (2, -1, 1.7):
        with pytest.raises(ValueError, match="task"):
            modes.select(state.method, task)
    traced = jax.jit(lambda state, task: learner.apply(state, x, task))
    assert np.isnan(traced(state, 2)).all() and np.isnan(traced(state, -1)).all()
    np.testing.assert_allclose(traced(state, 1), learner.apply(state, x, 1), rtol=1e-6)


def test_a_learner_grows_and_answers_earlier_tasks_as_before():
    x, y = DATA
    network = networks.from_linen(nn.Dense(2), x)
    learner = bpnjax.learner(network, methods.bd_psp(hidden_dim=8), optax.sgd(0.1), num_tasks=2)
    state = learner.init(jax.random.key(0))
    for task in range(2):
        state = learner.begin_task(state, task)
        state, _ = learner.step(state, (x, y))
        state = learner.end_task(state, (x, y))
    before = [np.array(learner.apply(state, x, task)) for task in range(2)]
    grown, state = learner.grow(state, 4)
    for task in range(2):
        np.testing.assert_array_equal(grown.apply(state, x, task), before[task])
    state = grown.begin_task(state, 3)
    state, _ = grown.step(state, (x, y))
    state = grown.end_task(state, (x, y))
    assert np.isfinite(grown.apply(state, x, 3)).all()
    with pytest.raises(UserError, match="num_tasks: 3 is below the 4 there are"):
        grown.grow(state, 3)
