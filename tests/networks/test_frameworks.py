"""The same network in Linen, in NNX and as a plain function: the same answers and training."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bpnjax
from bpnjax import importance, methods, networks

pytestmark = pytest.mark.usefixtures("compile_once")
RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 6, 6, 2)).astype(np.float32)
Y = (X.mean((1, 2, 3)) > 0).astype(np.int32)


class Linen(nn.Module):
    """A convolution, a hidden layer, an output layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(3, (3, 3), name="conv")(x))
        x = nn.relu(nn.Dense(5, name="hidden")(x.reshape(x.shape[0], -1)))
        return nn.Dense(2, name="output")(x)


class Nnx(nnx.Module):
    """The same."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 3, (3, 3), rngs=rngs)
        self.hidden = nnx.Linear(108, 5, rngs=rngs)
        self.output = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv(x))
        x = nnx.relu(self.hidden(x.reshape(x.shape[0], -1)))
        return self.output(x)


def function(params, mode, x):
    """The same, by hand."""

    def biased(path, y):
        return networks.modulate(y + params[path]["bias"], mode.get(path, {}))

    def key(path):
        return mode.get(path, {}).get("key", 1.0)

    x = jax.lax.conv_general_dilated(
        x * key("conv"), params["conv"]["kernel"], (1, 1), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    x = nn.relu(biased("conv", x))
    for path in ("hidden", "output"):
        x = x.reshape(x.shape[0], -1)
        x = biased(path, (x * key(path)) @ params[path]["kernel"])
        x = nn.relu(x) if path == "hidden" else x
    return x


@pytest.fixture(scope="module")
def three():
    """The network three times, all starting from the same parameters."""
    linen = networks.from_linen(Linen(), X[:1])
    params, _ = linen.init(jax.random.key(0))
    by_nnx = networks.from_nnx(lambda rngs: Nnx(rngs), X[:1])
    layers = {"conv": (2, 3), "hidden": (108, 5), "output": (5, 2)}
    plain = networks.from_function(function, lambda key: params, layers, x=X[:1])

    def started(network):
        return dataclasses.replace(network, init=lambda key: (params, {}))

    return {"linen": linen, "nnx": by_nnx, "function": plain}, params, started


@pytest.mark.parametrize("framework", ["nnx", "function"])
def test_the_same_layers_and_answers(three, framework):
    found, params, _ = three
    linen, other = found["linen"], found[framework]
    assert list(linen.layers) == list(other.layers)
    mode = {"conv": {"bias": jnp.ones(3), "key": jnp.array([1.0, -1.0])},
            "output": {"bias": jnp.array([0.5, -2.0])}}  # fmt: skip
    for m in ({}, mode):
        one, _ = linen.apply(params, m, X)
        two, _ = other.apply(params, m, X)
        np.testing.assert_allclose(one, two, atol=1e-5)


@pytest.mark.parametrize("framework", ["nnx", "function"])
@pytest.mark.parametrize("kind", ["empirical", "true"])
def test_the_same_fisher(three, framework, kind):
    found, params, _ = three
    mode = {"hidden": {"bias": jnp.ones(5)}}
    one, two = (
        importance.fisher(found[name], params, mode, X, Y, kind=kind)
        for name in ("linen", framework)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-8), one, two)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("framework", ["nnx", "function"])
def test_the_same_sizes_of_outputs(three, framework, padded):
    """What a relative step asks for, with keys and biases in the layers."""
    rows = len(X) // 2 if padded else len(X)
    found, params, _ = three
    mode = {path: {"bias": jnp.full(layer.outputs, 0.3), "measure": jnp.zeros(2)}
            for path, layer in found["linen"].layers.items()}  # fmt: skip
    mode["conv"]["key"] = jnp.array([1.0, -1.0])
    if padded:
        weight = jnp.asarray(np.arange(len(X)) < rows, jnp.float32)
        mode = {path: {**vectors, "weight": weight} for path, vectors in mode.items()}

    def sizes(network):
        def loss(mode):
            outputs, _ = network.apply(params, mode, X)
            return optax.softmax_cross_entropy_with_integer_labels(outputs, Y).mean()

        return {path: v["measure"] for path, v in jax.grad(loss)(mode).items()}

    one, two = sizes(found["linen"]), sizes(found[framework])
    assert one["conv"][1] == X[:rows].size / 2 * 3 and one["output"][1] == 2 * rows
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one, two)


@pytest.mark.parametrize("framework", ["nnx", "function"])
@pytest.mark.parametrize("name", ["bd_ewc", "bd_psp", "er"])
def test_the_same_training(three, framework, name):
    found, _, started = three
    settings = {"er": {"memory_size": 10, "batch_size": 4}}.get(name, {"hidden_dim": 4})

    def trained(network):
        method = methods.REGISTRY[name](**settings)
        learner = bpnjax.learner(started(network), method, optax.sgd(0.05), num_tasks=2)
        state = learner.init(jax.random.key(1))
        for task in range(2):
            state = learner.begin_task(state, task)
            for start in (0, 8, 16):
                rows = slice(start, start + 8)
                state, _ = learner.step(state, (X[rows] + task, Y[rows]))
            state = learner.end_task(state, (X + task, Y))
        return state.params, learner.apply(state, X, np.arange(24) % 2)

    one, two = trained(found["linen"]), trained(found[framework])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one, two)


class NormedLinen(nn.Module):
    """A BatchNorm right behind a layer, and one behind a ReLU."""

    @nn.compact
    def __call__(self, x, train=False):
        norm = nn.BatchNorm(use_running_average=not train, name="norm")
        x = nn.relu(norm(nn.Conv(3, (3, 3), name="conv")(x))).mean((1, 2))
        x = nn.relu(nn.Dense(5, name="hidden")(x))
        x = nn.BatchNorm(use_running_average=not train, name="later_norm")(x)
        return nn.Dense(2, name="output")(x)


class NormedNnx(nnx.Module):
    """The same."""

    def __init__(self, rngs):
        self.conv, self.norm = nnx.Conv(2, 3, (3, 3), rngs=rngs), nnx.BatchNorm(3, rngs=rngs)
        self.hidden = nnx.Linear(3, 5, rngs=rngs)
        self.later_norm = nnx.BatchNorm(5, rngs=rngs)
        self.output = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x))).mean((1, 2))
        x = self.later_norm(nnx.relu(self.hidden(x)))
        return self.output(x)


def normed(framework):
    if framework == "linen":
        return networks.from_linen(NormedLinen(), X[:1])
    return networks.from_nnx(lambda rngs: NormedNnx(rngs), X[:1])


@pytest.mark.parametrize("framework", ["linen", "nnx"])
@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_bias_goes_behind_the_norm_that_would_subtract_it(framework, per_example, train):
    """By hand: norm(conv(x)) + bias; behind a ReLU the norm gets the bias as any other input."""
    network = normed(framework)
    params, variables = network.init(jax.random.key(0))
    shape = (len(X),) if per_example else ()
    mode = {
        path: {"bias": RNG.normal(size=(*shape, width)).astype(np.float32)}
        for path, width in (("conv", 3), ("hidden", 5), ("output", 2))
    }
    found, _ = network.apply(params, mode, X, variables=variables, train=train)

    def norm(x):
        if not train:
            return x / np.sqrt(1 + 1e-5)  # running mean 0 and variance 1
        axes = tuple(range(x.ndim - 1))
        return (x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-5)

    x = jax.lax.conv_general_dilated(
        X, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    bias = mode["conv"]["bias"].reshape(*shape, *((1, 1) if per_example else ()), 3)
    x = jnp.maximum(norm(np.asarray(x)) + bias, 0).mean((1, 2))
    x = x @ params["hidden"]["kernel"] + mode["hidden"]["bias"]
    x = norm(np.maximum(np.asarray(x), 0))
    expected = x @ params["output"]["kernel"] + mode["output"]["bias"]
    # Flax computes the variance as a difference of means: 1e-3 where a unit is rarely active.
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_gradient_of_a_bias_before_a_norm_is_not_the_rounding_error(framework):
    network = normed(framework)
    params, variables = network.init(jax.random.key(0))

    def loss(bias):
        mode = {"conv": {"bias": bias}}
        outputs, _ = network.apply(params, mode, X, variables=variables, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(outputs, Y).mean()

    assert np.abs(jax.jit(jax.grad(loss))(jnp.zeros(3))).min() > 1e-4


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_importance_of_a_layer_with_a_norm_behind_its_bias(framework):
    """One pass with probes against one gradient per example, in a mode that moves the bias."""
    network = normed(framework)
    params, variables = network.init(jax.random.key(0))
    bound = network.bind(variables)
    mode = {"conv": {"bias": np.float32([0.3, -0.2, 0.5])}}
    one_pass = importance.fisher(bound, params, mode, X, Y)
    each = importance.fisher(dataclasses.replace(bound, tapped=None), params, mode, X, Y)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-8), one_pass, each
    )
