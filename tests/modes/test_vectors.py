"""What a mode may hold for a layer, beside the key and the bias, in every kind of network."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.ndimage
from flax import nnx

import bpnjax
from bpnjax import methods, modes, networks
from bpnjax.methods.bd import init_factors, product
from bpnjax.modes.vectors import MARGIN, depthwise
from bpnjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_once")
X = np.random.default_rng(0).normal(size=(6, 5, 5, 2)).astype(np.float32)
Y = np.arange(6) % 3
KINDS = list(modes.MODULATIONS)
DENSE = [kind for kind in KINDS if kind != "depthwise"]


class Small(nn.Module):
    """A convolution and an output layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="conv")(x))
        return nn.Dense(3, name="output")(x.mean((1, 2)))


@functools.cache
def small():
    return networks.from_linen(Small(), X)


def learner_of(method, network=None, num_tasks=2):
    return bpnjax.learner(network or small(), method, optax.sgd(0.1), num_tasks)


def trained(method, steps=3, network=None):
    """State after the first task, and the learner."""
    learner = learner_of(method, network)
    state = learner.begin_task(learner.init(jax.random.key(0)), 0)
    for _ in range(steps):
        state, _ = learner.step(state, (X, Y))
    return learner, state


def test_the_table_by_hand():
    """Each entry of a mode, alone and together, as in the formula."""
    network = networks.from_linen(nn.Dense(3), X.reshape(6, -1))
    x, rng = X.reshape(6, -1), np.random.default_rng(1)
    params, _ = network.init(jax.random.key(0))
    own = {n: rng.normal(size=w).astype("f4") for n, w in (("key", 50), ("gain", 3), ("bias", 3))}
    found, _ = network.apply(params, {"": own}, x)
    expected = (x * own["key"]) @ params["kernel"] + params["bias"]
    np.testing.assert_allclose(found, expected * own["gain"] + own["bias"], rtol=1e-4, atol=1e-5)


def test_depthwise_is_scipys_correlation_of_each_channel():
    kernel = np.random.default_rng(1).normal(size=(3, 3, 2)).astype(np.float32)
    found = depthwise(jnp.asarray(X), jnp.asarray(kernel))
    for channel in range(2):
        expected = scipy.ndimage.correlate(
            X[..., channel], kernel[None, ..., channel], mode="constant"
        )
        np.testing.assert_allclose(found[..., channel], expected, rtol=1e-4, atol=1e-5)


def test_outputs_pass_the_kernel_then_the_gain_then_the_bias():
    rng = np.random.default_rng(1)
    gain, bias, kernel = (rng.normal(size=s).astype("f4") for s in (4, 4, (3, 3, 4)))
    y = rng.normal(size=(2, 5, 5, 4)).astype("f4")
    own = {"bias": bias, "gain": gain, "depthwise": kernel}
    expected = depthwise(jnp.asarray(y), jnp.asarray(kernel)) * gain + bias
    np.testing.assert_allclose(networks.modulate(jnp.asarray(y), own), expected, rtol=1e-5)


def test_a_bias_beside_a_gain_steps_in_units_of_what_it_is_added_to():
    """epsilon / sqrt(2) times the size of the outputs after the gain, in the second step."""
    x = X.reshape(6, -1)
    network = networks.from_linen(nn.Dense(3), x)
    method = methods.bd(modulation="bias+gain", epsilon=0.2, hidden_dim=8)
    learner = bpnjax.learner(network, method, optax.sgd(0.1), 2)
    state = learner.begin_task(learner.init(jax.random.key(0)), 0)
    for _ in range(2):
        before = jax.tree.map(np.array, (state.params, state.task_params))
        state, _ = learner.step(state, (x, Y))
    params, factors = before
    gain = np.asarray(product(factors, "bias+gain")[""]["gain"])
    assert np.abs(gain - 1).max() > 0.05
    size = np.sqrt(np.mean(np.square((x @ params["kernel"] + params["bias"]) * gain)))
    moved = np.abs(state.task_params[""]["bias"]["M"] - factors[""]["bias"]["M"])
    np.testing.assert_allclose(moved, 0.2 / 2**0.5 * size, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bank_at_its_start_is_the_plain_network(kind):
    network = small()
    chosen = {p: l for p, l in network.layers.items() if modes.MODULATIONS[kind].acts_on(l)}
    learner, state = trained(methods.plain_bias(modulation=kind), steps=0)
    params = state.params
    plain, _ = network.apply(params, {}, X)
    np.testing.assert_allclose(learner.apply(state, X, 1), plain, rtol=1e-6)
    shapes = modes.MODULATIONS[kind].shapes(chosen)
    assert set(shapes["conv"]) == set(modes.MODULATIONS[kind].names)
    mode = product(init_factors(jax.random.key(0), chosen, 4, modulation=kind), kind)
    np.testing.assert_allclose(network.apply(params, mode, X)[0], plain, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["bd", "plain_bias", "gd", "gd_matched"])
def test_what_is_learned_is_what_answers(kind, name):
    """After the end of the task, by one task id and by one per example; other tasks stay."""
    learner, state = trained(getattr(methods, name)(modulation=kind))
    during = learner.apply(state, X, 0)
    ended = learner.end_task(state, (X, Y))
    np.testing.assert_allclose(learner.apply(ended, X, 0), during, rtol=1e-4, atol=1e-5)
    plain = learner.network.apply(ended.params, {}, X)[0]
    assert np.abs(during - plain).max() > 1e-4 or kind == "mask"
    mixed = learner.apply(ended, X, jnp.array([0, 1] * 3))
    np.testing.assert_allclose(mixed[::2], during[::2], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mixed[1::2], plain[1::2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_vector_moves_and_by_the_rule(kind):
    """BD's relative step: of a bias in units of the outputs, of all others epsilon."""
    _, state = trained(methods.bd(modulation=kind, epsilon=0.2, hidden_dim=8), steps=1)
    for path, vectors in state.task_params.items():
        for name, own in vectors.items():
            moved = np.unique(np.abs(own["M"]).round(6))
            assert len(moved) == 1 and moved[0] > 0, (path, name)
            assert name == "bias" or moved[0] == pytest.approx(0.2), (path, name)
            assert not own["measure"].any()
    _, state = trained(methods.plain_bias(modulation=kind), steps=1)
    for vectors in state.task_params.values():
        assert all(np.any(own["change"]) for own in vectors.values())


def test_a_gain_follows_its_gradient():
    learner = learner_of(methods.plain_bias(modulation="gain", learning_rate=0.5))
    state = learner.begin_task(learner.init(jax.random.key(0)), 0)
    params = jax.tree.map(np.array, state.params)

    def loss(gain):
        logits, _ = small().apply(params, {path: {"gain": g} for path, g in gain.items()}, X)
        return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()

    g = jax.grad(loss)({"conv": jnp.ones(4), "output": jnp.ones(3)})
    state, _ = learner.step(state, (X, Y))
    for path, own in state.task_params.items():
        np.testing.assert_allclose(own["gain"]["change"], -0.5 * g[path], rtol=1e-4, atol=1e-7)


def test_a_mask_is_one_bit_per_unit_and_its_gradient_passes():
    """Straight through the threshold; a score that falls below it closes its unit."""
    kind = modes.MODULATIONS["mask"]
    scores = jnp.array([0.0, -0.5 * MARGIN, -2 * MARGIN, 3.0])
    found = kind.values({"conv": {"gain": scores}})["conv"]["gain"]
    np.testing.assert_allclose(found, [1.0, 1.0, 0.0, 1.0])
    slope = jax.grad(lambda s: kind.values({"c": {"gain": s}})["c"]["gain"] @ jnp.arange(4.0))
    np.testing.assert_array_equal(slope(scores), np.arange(4.0))
    learner, state = trained(methods.plain_bias(modulation="mask", learning_rate=1.0), steps=4)
    changes = jax.tree.map(np.array, state.task_params)
    ended = learner.end_task(state, (X, Y))
    assert {path: (own["gain"].shape, own["gain"].dtype) for path, own in ended.method.items()} == {
        "conv": ((2, 1), np.uint8), "output": ((2, 1), np.uint8),
    }  # fmt: skip
    closed = [changes[path]["gain"]["change"] + MARGIN <= 0 for path in ended.method]
    bits = [np.unpackbits(np.asarray(ended.method[p]["gain"][0])) for p in ended.method]
    assert any(c.any() for c in closed)
    for gone, kept in zip(closed, bits, strict=True):
        np.testing.assert_array_equal(kept[: len(gone)], ~np.asarray(gone))
    assert np.isnan(jax.jit(learner.apply)(ended, X, jnp.int32(5))).all()


def test_behind_a_batch_norm_a_gain_still_acts():
    """In front of it the norm would divide it away."""

    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.Conv(4, (3, 3), name="conv")(x)
            return nn.BatchNorm(use_running_average=not train, name="norm")(x).mean((1, 2))

    network = networks.from_linen(Normed(), X)
    params, variables = network.init(jax.random.key(0))

    def out(mode):
        return network.apply(params, mode, X, variables=variables, train=True)[0]

    gain = jnp.array([2.0, 0.5, -1.0, 0.0])
    np.testing.assert_allclose(out({"conv": {"gain": gain}}), gain * out({}), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_nnx_is_as_linen(kind):
    class Same(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
            self.output = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.output(nnx.relu(self.conv(x)).mean((1, 2)))

    network = networks.from_nnx(lambda rngs: Same(rngs), X)
    chosen = {p: l for p, l in network.layers.items() if modes.MODULATIONS[kind].acts_on(l)}
    factors = init_factors(jax.random.key(1), chosen, 4, modulation=kind)
    factors = jax.tree.map(lambda leaf: leaf + 0.1, factors)
    mode = product(factors, kind)
    params, _ = small().init(jax.random.key(0))
    own, _ = network.init(jax.random.key(0))
    own = jax.tree.unflatten(jax.tree.structure(own), jax.tree.leaves(params))
    expected, _ = small().apply(params, mode, X)
    found, _ = network.apply(own, mode, X)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gain", "rank1"])
def test_gains_multiply_where_modes_are_joined(kind):
    """Of two methods in a composition, as keys do."""
    learner, state = trained(methods.chain(methods.psp(), methods.bd(modulation=kind)))
    ended = learner.end_task(state, (X, Y))
    both = modes.merge(*(modes.select(bank, 0) for bank in ended.method))
    found, _ = small().apply(ended.params, both, X)
    np.testing.assert_allclose(learner.apply(ended, X, 0), found, rtol=1e-4, atol=1e-5)
    two, three = ({"out": {"gain": jnp.array([g]), "key": jnp.array([-g])}} for g in (2.0, 3.0))
    joined = modes.merge(two, three)["out"]
    assert (joined["gain"].tolist(), joined["key"].tolist()) == ([6.0], [6.0])
    kernel = {"conv": {"depthwise": jnp.zeros((3, 3, 4))}}
    with pytest.raises(ValueError, match="two modes have a depthwise kernel for layer 'conv'"):
        modes.merge(kernel, kernel)


def test_what_does_not_fit_is_refused():
    network = networks.from_linen(nn.Dense(3), X.reshape(6, -1))
    with pytest.raises(UserError, match=r"bd\.modulation: depthwise acts on the outputs of conv"):
        learner_of(methods.bd(modulation="depthwise"), network)
    with pytest.raises(
        ValueError, match=r"the depthwise kernel of layer 'conv' has shape \(3, 3\)"
    ):
        small().apply(
            small().init(jax.random.key(0))[0], {"conv": {"depthwise": np.ones((3, 3))}}, X
        )
    with pytest.raises(
        ValueError, match="has \\['gian'\\]; a layer has key, depthwise, gain, bias"
    ):
        small().apply(small().init(jax.random.key(0))[0], {"conv": {"gian": np.ones(4)}}, X)
    plain = networks.from_function(
        lambda p, mode, x: x.reshape(len(x), -1) @ p + mode.get("out", {}).get("bias", 0.0),
        lambda key: jnp.ones((50, 3)), {"out": 3}, x=X,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"does not read all of gain of out; pass them through"):
        learner_of(methods.bd(modulation="gain"), plain)
    with pytest.raises(
        UserError, match=r"bd\.modulation: rank1: a key lies on the inputs of layer"
    ):
        learner_of(methods.bd(modulation="rank1"), plain)
