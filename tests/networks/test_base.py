"""What all networks have: plain functions as networks, prepared inputs, variables, features."""

import flax.linen as nn
import flax_networks
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bpnjax
from bpnjax import importance, methods, modes, networks
from bpnjax.importance import kronecker
from bpnjax.models import MLP
from bpnjax.networks.base import align, batch_axis, one_example

pytestmark = pytest.mark.usefixtures("compile_once")

X = jax.random.normal(jax.random.key(0), (6, 5))
Y = jnp.array([0, 2, 1, 1, 0, 2])
IMAGES = jax.random.randint(jax.random.key(1), (6, 4, 4, 2), 0, 256).astype(jnp.uint8)
MODE = {"hidden_0": {"key": jnp.array([1.0, -1, 1, 1, -1]), "bias": jnp.full(4, 0.3)},
        "output": {"bias": jnp.array([0.5, -1.0, 0.0])}}  # fmt: skip


def same(a, b, **tolerance):
    tolerance = tolerance or {"rtol": 1e-5, "atol": 1e-6}
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def mlp():
    """A network of Dense layers and its parameters."""
    network = networks.from_linen(MLP((4,), 3), X)
    return network, network.init(jax.random.key(2))[0]


def by_hand(params, mode, x):
    """The same network as a plain function."""
    for path in ("hidden_0", "output"):
        vectors = mode.get(path, {})
        x = (x * vectors.get("key", 1.0)) @ params[path]["kernel"] + params[path]["bias"]
        x = x + vectors.get("bias", 0.0)
        x = jax.nn.relu(x) if path == "hidden_0" else x
    return x


WIDTHS = {"hidden_0": (5, 4), "output": (4, 3)}


def plain(params, layers=WIDTHS, x=X):
    return networks.from_function(by_hand, lambda key: params, layers, x=x)


# A plain function.


def test_a_function_is_a_network():
    _, params = mlp()
    network = plain(params)
    assert network.init(jax.random.key(0)) == (params, {})
    assert [(path, layer.inputs, layer.outputs) for path, layer in network.layers.items()] == [
        ("hidden_0", 5, 4), ("output", 4, 3)
    ]  # fmt: skip
    assert network.tapped is None and network.name == "function"
    assert network.example == jax.ShapeDtypeStruct((1, 5), jnp.float32)
    expected = by_hand(params, MODE, X)
    for options in ({}, {"train": True, "key": jax.random.key(1), "freeze_statistics": True}):
        out, variables = network.apply(params, MODE, X, variables={"a": 1}, **options)
        np.testing.assert_array_equal(out, expected)
        assert variables == {"a": 1}
    assert plain(params, x=None).example is None
    widths = {"hidden_0": np.int64(4), "output": 3}
    assert [layer.outputs for layer in plain(params, widths).layers.values()] == [4, 3]
    assert networks.from_function(by_hand, lambda key: params).layers == {}


@pytest.mark.parametrize("kind", importance.FISHER_KINDS)
def test_its_fisher_is_the_one_of_taps(kind):
    """One gradient per example, by vmap, against one backward pass for all of them."""
    network, params = mlp()
    more = {"kind": kind, "key": jax.random.key(3), "batch_size": 4, "chunk": 3}
    expected = importance.fisher(network, params, MODE, X, Y, **more)
    assert all(leaf.max() > 0 for leaf in jax.tree.leaves(expected))
    same(importance.fisher(plain(params), params, MODE, X, Y, **more), expected, rtol=1e-4)


def test_its_sensitivity_and_padding_are_those_of_taps():
    network, params = mlp()
    weights = jnp.array([1.0, 0, 1, 0, 1, 1])
    for measure in (
        lambda n: importance.sensitivity(n, params, MODE, X, batch_size=4, chunk=3),
        lambda n: importance.sensitivity_sum(n, params, MODE, X, weights=weights, chunk=4),
        lambda n: importance.fisher_sum(n, params, MODE, X, Y, weights=weights, chunk=4),
    ):
        same(measure(plain(params)), measure(network), rtol=1e-4)


def test_its_parameters_are_any_tree():
    network, params = mlp()
    flat, structure = jax.tree.flatten(params)

    def apply(leaves, mode, x):
        return by_hand(jax.tree.unflatten(structure, leaves[::-1]), mode, x)

    listed = networks.from_function(apply, lambda key: tuple(flat[::-1]), WIDTHS, x=X)
    own, _ = listed.init(jax.random.key(0))
    for measure in (
        lambda n, p: importance.fisher(n, p, MODE, X, Y),
        lambda n, p: importance.sensitivity(n, p, MODE, X),
    ):
        found = measure(listed, own)
        assert isinstance(found, tuple)
        same(list(found[::-1]), jax.tree.leaves(measure(network, params)), rtol=1e-4)
    learner = bpnjax.learner(listed, methods.bd_ewc(hidden_dim=4), optax.sgd(0.1), num_tasks=1)
    state = learner.begin_task(learner.init(jax.random.key(0)), 0)
    state, _ = learner.step(state, (X, Y))
    state = learner.end_task(state, (X, Y))
    assert isinstance(state.params, tuple)


def test_what_a_function_does_not_show_is_refused_with_the_remedy():
    _, params = mlp()
    network = plain(params)
    with pytest.raises(ValueError, match=r"names layers that the network does not have: nowhere; "):
        network.apply(params, {"nowhere": {"bias": jnp.ones(1)}}, X)
    remedy = r"build it with networks\.from_linen or networks\.from_nnx"
    with pytest.raises(ValueError, match=f"function does not show what goes into its.*{remedy}"):
        network.features(params, {}, X, ["output"])
    with pytest.raises(ValueError, match=f"the units of function are not known; {remedy}"):
        importance.neurons(network, params, {}, X, Y)
    assert kronecker.empty_factors(network.layers) == {}
    narrow = plain(params, {"hidden_0": 4, "output": 3})
    for bank in (modes.key_bank, lambda *args: modes.gate_bank(*args, 0.5)):
        with pytest.raises(ValueError, match=r"layers=\{'hidden_0': \(inputs, 4\)\}"):
            bank(jax.random.key(0), narrow.layers)

    def learner(method, network, **more):
        return bpnjax.learner(network, method, optax.sgd(0.1), num_tasks=2, **more)

    with pytest.raises(ValueError, match="and their number is not known"):
        learner(methods.bd_psp(), narrow)
    unseen = plain(params, x=None)
    with pytest.raises(
        ValueError, match=r"er must know the shape of an ex.*networks\.from_function\(\.\.\., x="
    ):
        learner(methods.er(), unseen)
    with pytest.raises(ValueError, match="the number of outputs is not known"):
        learner(methods.lwf(), unseen, classes=[[0], [1, 2]])
    with pytest.raises(ValueError, match="learner.answering must know the shape of an example"):
        learner(methods.bd_ewc(), unseen).answering()
    with pytest.raises(ValueError, match="'conv' matches no layer; there are: hidden_0, output"):
        learner(methods.bd(layers="conv"), network)
    with pytest.raises(ValueError, match="Kronecker factors of .* are not known"):
        learner(methods.ewc_kfac(), network)


def test_a_function_without_an_example_is_trained_all_the_same():
    _, params = mlp()
    ends = []
    for network in (plain(params), plain(params, x=None)):
        learner = bpnjax.learner(network, methods.bd_ewc(hidden_dim=4), optax.sgd(0.1), num_tasks=2)
        state = learner.begin_task(learner.init(jax.random.key(0)), 0)
        state, metrics = learner.step(state, (np.asarray(X), np.asarray(Y)))
        state = learner.end_task(state, (np.asarray(X), np.asarray(Y)))
        ends.append((learner.apply(state, X, np.arange(6) % 2), metrics, state.params))
    same(*ends)


# Inputs that are prepared.


def halved(x):
    return x.astype(jnp.float32) / 255.0 - 0.5


def test_with_input_prepares_what_goes_in_everywhere():
    network = networks.from_linen(flax_networks.ConvLayerNorm(), halved(IMAGES))
    example = one_example(IMAGES)
    stored = network.with_input(halved, example)
    assert stored.example == example and network.example.dtype == jnp.float32
    assert network.with_input(halved).example == network.example
    params, _ = stored.init(jax.random.key(0))
    same(params, network.init(jax.random.key(0))[0])
    mode = {"conv": {"bias": jnp.ones(3)}}
    np.testing.assert_array_equal(
        stored.apply(params, mode, IMAGES)[0], network.apply(params, mode, halved(IMAGES))[0]
    )
    probes = {"head": jnp.ones((6, 3))}
    out, inputs = stored.tapped(params, mode, IMAGES, record=("conv", "head"), probes=probes)
    expected, wanted = network.tapped(
        params, mode, halved(IMAGES), record=("conv", "head"), probes=probes
    )
    same((out, inputs), (expected, wanted))
    np.testing.assert_array_equal(inputs["conv"][0], halved(IMAGES))
    np.testing.assert_array_equal(stored.prepare(IMAGES), halved(IMAGES))
    same(
        importance.fisher(stored, params, {}, IMAGES, Y),
        importance.fisher(network, params, {}, halved(IMAGES), Y),
    )


def test_with_input_twice_runs_from_the_outside_in():
    network, params = mlp()
    once = network.with_input(lambda x: x - 1.0)
    twice = once.with_input(lambda x: 3.0 * x)
    wanted, _ = network.apply(params, {}, 3.0 * X - 1.0)
    np.testing.assert_allclose(twice.apply(params, {}, X)[0], wanted, rtol=1e-5)
    np.testing.assert_allclose(twice.prepare(X), 3.0 * X - 1.0, rtol=1e-6)
    plain_function = plain(params).with_input(lambda x: 2.0 * x)
    assert plain_function.tapped is None
    wanted, _ = network.apply(params, {}, 2.0 * X)
    np.testing.assert_allclose(plain_function.apply(params, {}, X)[0], wanted, rtol=1e-5)


# Variables.


def test_bind_fills_in_variables_unless_others_are_given():
    images = halved(IMAGES)
    network = networks.from_linen(flax_networks.ResNet(), images)
    params, fresh = network.init(jax.random.key(0))
    _, trained = network.apply(params, {}, images, variables=fresh, train=True)
    bound = network.bind(trained)
    expected, _ = network.apply(params, {}, images, variables=trained)
    out, kept = bound.apply(params, {}, images)
    np.testing.assert_array_equal(out, expected)
    same(kept, trained)
    tapped, inputs = bound.tapped(params, {}, images, record=("head",))
    np.testing.assert_array_equal(tapped, expected)
    assert inputs["head"][0].shape == (6, 4)
    other, _ = network.apply(params, {}, images, variables=fresh)
    assert np.abs(other - expected).max() > 1e-2
    np.testing.assert_array_equal(bound.apply(params, {}, images, variables=fresh)[0], other)
    again, _ = bound.tapped(params, {}, images, variables=fresh)
    np.testing.assert_array_equal(again, other)
    features = bound.features(params, {}, images, ["head"])
    same(features, network.features(params, {}, images, ["head"], variables=trained))
    _, params = mlp()
    assert plain(params).bind({}).tapped is None


# Features.


def test_features_are_what_multiplies_the_kernels():
    network, params = mlp()
    found = network.features(params, MODE, X, ["hidden_0", "output"])
    keyed = X * MODE["hidden_0"]["key"]
    np.testing.assert_allclose(found["hidden_0"], keyed, rtol=1e-6)
    hidden = jax.nn.relu(keyed @ params["hidden_0"]["kernel"] + params["hidden_0"]["bias"] + 0.3)
    np.testing.assert_allclose(found["output"], hidden, rtol=1e-5)
    replaced = {"output": jnp.ones((6, 4))}
    np.testing.assert_array_equal(
        network.features(params, {}, X, ["output"], replaced=replaced)["output"], 1.0
    )
    out, _ = network.tapped(params, MODE, X, replaced=replaced)
    last = params["output"]
    expected = jnp.ones((6, 4)) @ last["kernel"] + last["bias"] + MODE["output"]["bias"]
    np.testing.assert_allclose(out, expected, rtol=1e-5)


def test_features_of_a_layer_called_twice_are_those_of_its_last_call():
    network = networks.from_linen(flax_networks.Shared(), X)
    params, _ = network.init(jax.random.key(0))
    layer = params["shared"]
    once = nn.tanh(X @ layer["kernel"] + layer["bias"])
    found = network.features(params, {}, X, ["shared", "head"])
    np.testing.assert_allclose(found["shared"], once, rtol=1e-5)
    _, inputs = network.tapped(params, {}, X, record=("shared",))
    same(inputs["shared"], [X, once])


class Rows(nn.Module):
    """The parts of an example are rows of the batch for its first layer."""

    @nn.compact
    def __call__(self, x):
        rows = nn.Dense(4, name="rows")(x.reshape(-1, x.shape[-1] // 2))
        return nn.Dense(3, name="head")(rows.reshape(x.shape[0], -1))


@pytest.mark.parametrize(
    "model, x, path",
    [
        (flax_networks.Lifted("scan"), X, "lifted/dense"),
        (flax_networks.Lifted("remat"), X, "lifted/dense"),
        (flax_networks.Lifted("vmap"), X, "lifted/dense"),
        (flax_networks.Normed(), X, "inner"),
        (Rows(), jnp.ones((2, 6)), "rows"),
    ],
)
def test_a_layer_that_has_no_input_of_its_own_has_no_features(model, x, path):
    network = networks.from_linen(model, x)
    assert not network.layers[path].plain and network.layers["head"].plain
    params, _ = network.init(jax.random.key(0))
    with pytest.raises(ValueError, match=f"layer '{path}' lies within a lifted transf.*no meaning"):
        network.features(params, {}, x, [path])
    assert set(network.features(params, {}, x, ["head"])) == {"head"}
    with pytest.raises(ValueError, match="the network has no layer 'nowhere'; it has"):
        network.features(params, {}, x, ["nowhere"])


# Vectors in the place where they act.


def test_align_lays_a_vector_on_some_axes():
    array = jnp.zeros((4, 2, 3), jnp.bfloat16)
    for vector, axes, shape in [
        (jnp.arange(3.0), (2,), (1, 1, 3)),
        (jnp.arange(2.0), (1,), (1, 2, 1)),
        (jnp.arange(6.0), (1, 2), (1, 2, 3)),
        (jnp.zeros((4, 3)), (2,), (4, 1, 3)),
        (jnp.zeros((1, 3)), (2,), (1, 1, 3)),
        (jnp.zeros((4, 6)), (1, 2), (4, 2, 3)),
    ]:
        laid = align("l", "key", vector, array, axes)
        assert (laid.shape, laid.dtype) == (shape, jnp.bfloat16)
        np.testing.assert_array_equal(laid.reshape(-1), vector.reshape(-1).astype(jnp.bfloat16))


@pytest.mark.parametrize(
    "shape, axes, contracts_batch, message",
    [
        ((2,), (2,), False, r"key of layer 'l' has shape \(2,\); it must have \[3\], or \[n, 3\]"),
        ((), (2,), False, r"has shape \(\)"),
        ((4, 1, 3), (2,), False, r"has shape \(4, 1, 3\)"),
        (
            (5, 3),
            (2,),
            False,
            r"works on an array \(4, 2, 3\) whose first axis is not the batch",
        ),
        ((4, 3), (2,), True, "of 4 examples with a mode each"),
        ((2, 8), (0, 1), False, "of 2 examples with a mode each"),
    ],
)
def test_vectors_that_cannot_be_laid_are_refused(shape, axes, contracts_batch, message):
    with pytest.raises(ValueError, match=message):
        align("l", "key", jnp.zeros(shape), jnp.zeros((4, 2, 3)), axes, contracts_batch)


@pytest.mark.filterwarnings("error")
def test_shapes_of_examples():
    assert one_example(np.zeros((5, 2), np.uint8)) == jax.ShapeDtypeStruct((1, 2), np.uint8)
    assert one_example(jax.ShapeDtypeStruct((7, 3), jnp.bfloat16)).shape == (1, 3)
    assert one_example([[1, 2]]) == jax.ShapeDtypeStruct((1, 2), jnp.int32)
    assert one_example(np.zeros((3, 2))) == jax.ShapeDtypeStruct((1, 2), jnp.float32)
    for x in (np.zeros((3, 2)), [[0.0, 0.0]]):
        network = networks.from_linen(nn.Dense(1), x)
        assert network.example == jax.ShapeDtypeStruct((1, 2), jnp.float32)
        network.init(jax.random.key(0))  # without the warning that JAX has no 64 bits
    assert batch_axis(jnp.zeros((3, 2))) == (3,) == batch_axis({"a": np.zeros((3, 2))})
    assert batch_axis(1.0) == () == batch_axis({})
