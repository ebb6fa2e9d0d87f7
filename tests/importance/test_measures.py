"""Fisher information against enumeration, finite differences and vmap of grad."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bpnjax import importance, networks
from bpnjax.importance import kronecker
from bpnjax.models import MLP, ConvNet
from bpnjax.networks import modulated_apply

pytestmark = pytest.mark.usefixtures("compile_once")


def reference(model, params, mode, x, labels, kind, key=None):
    """The definition, one example and one label at a time."""

    def log_p(params, x_i, y):
        return jax.nn.log_softmax(modulated_apply(model, params, mode, x_i[None])[0])[y]

    answer = jax.jit(lambda x_i: modulated_apply(model, params, mode, x_i[None])[0])
    gradient = jax.jit(jax.grad(log_p))
    total = jax.tree.map(jnp.zeros_like, params)
    for x_i, y_i in zip(x, labels, strict=True):
        p = jax.nn.softmax(answer(x_i))
        shares = p if kind == "true" else jax.nn.one_hot(y_i, p.shape[0])
        for y, share in enumerate(shares):
            g = gradient(params, x_i, y)
            total = jax.tree.map(lambda t, g, s=share: t + s * g**2 / len(x), total, g)
    return total


class Mixed(nn.Module):
    """A layer norm, a Dense called twice, one without bias, one on [n, l, d]."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, use_bias=False, name="plain")(x)
        twice = nn.Dense(4, name="twice")
        x = nn.LayerNorm()(nn.tanh(twice(nn.tanh(twice(x)))))
        x = nn.Dense(2, name="on_sequence")(x.reshape(x.shape[0], 2, 2)).reshape(x.shape[0], -1)
        return nn.Dense(3, name="out")(x)


def built(model, x):
    """The network and its parameters."""
    network = networks.from_linen(model, x)
    return network, jax.jit(network.init)(jax.random.key(1))[0]


MODELS = {
    "mlp": (MLP((8, 8), 3), (7, 5)),
    "convnet": (ConvNet((2,), (4,), 3), (7, 6, 6, 1)),
    "mixed": (Mixed(), (7, 5)),
}


@pytest.mark.parametrize("kind", ["empirical", "true"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_definition(name, kind):
    model, shape = MODELS[name]
    x = jax.random.normal(jax.random.key(0), shape)
    labels = jnp.arange(shape[0]) % 3
    network, params = built(model, x)
    mode = {"out" if name == "mixed" else "output": {"bias": jnp.array([0.3, -0.2, 0.1])}}
    if name == "mlp":
        mode["hidden_0"] = {"key": jnp.array([1.0, -1, -1, 1, 1]), "bias": jnp.full(8, 0.3)}
    measure = functools.partial(importance.fisher, network, kind=kind, batch_size=3, chunk=2)
    got = jax.jit(measure)(params, mode, x, labels)
    expected = reference(model, params, mode, x, labels, kind)
    assert jax.tree.structure(got) == jax.tree.structure(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-7), got, expected)


@pytest.mark.parametrize("name", MODELS)
def test_sensitivity_equals_the_definition(name):
    model, shape = MODELS[name]
    x = jax.random.normal(jax.random.key(0), shape)
    network, params = built(model, x)

    def squared_norm(params, x_i):
        return jnp.sum(model.apply({"params": params}, x_i[None]) ** 2)

    gradient = jax.jit(jax.grad(squared_norm))
    each = [gradient(params, x_i) for x_i in x]
    expected = jax.tree.map(lambda *g: sum(abs(v) for v in g) / len(x), *each)
    measure = functools.partial(importance.sensitivity, network, batch_size=3, chunk=2)
    got = jax.jit(measure)(params, {}, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), got, expected)


def test_sensitivity_by_finite_differences():
    rng = np.random.default_rng(1)
    w, x = rng.normal(size=(3, 2)), rng.normal(size=(5, 3))
    expected = np.zeros_like(w)
    for x_i in x:
        for j in np.ndindex(w.shape):
            step = np.zeros_like(w)
            step[j] = 1e-5
            rise = ((x_i @ (w + step)) ** 2).sum() - ((x_i @ (w - step)) ** 2).sum()
            expected[j] += abs(rise / 2e-5) / 5
    params = {"kernel": jnp.asarray(w, jnp.float32)}
    x = jnp.asarray(x, jnp.float32)
    network = networks.from_linen(nn.Dense(2, use_bias=False), x)
    got = importance.sensitivity(network, params, {}, x)
    np.testing.assert_allclose(got["kernel"], expected, rtol=1e-4)


def test_finite_differences_on_a_softmax():
    """An independent reference: three classes, one weight matrix, central differences in f64."""
    rng = np.random.default_rng(0)
    w, x, y = rng.normal(size=(2, 3)), rng.normal(size=(4, 2)), np.array([0, 2, 1, 1])

    def log_p(w, i):
        z = x[i] @ w
        return z[y[i]] - np.log(np.exp(z).sum())

    fisher = np.zeros_like(w)
    for i in range(4):
        for j in np.ndindex(w.shape):
            step = np.zeros_like(w)
            step[j] = 1e-5
            fisher[j] += ((log_p(w + step, i) - log_p(w - step, i)) / 2e-5) ** 2 / 4
    params = {"kernel": jnp.asarray(w, jnp.float32)}
    x = jnp.asarray(x, jnp.float32)
    network = networks.from_linen(nn.Dense(3, use_bias=False), x)
    got = importance.fisher(network, params, {}, x, jnp.asarray(y))
    np.testing.assert_allclose(got["kernel"], fisher, rtol=1e-4)


def test_is_not_the_square_of_a_batch_mean():
    model, _ = MODELS["mlp"]
    x = jax.random.normal(jax.random.key(0), (64, 5))
    labels = jnp.arange(64) % 3
    network, params = built(model, x)

    def mean_loss(params):
        log_p = jax.nn.log_softmax(model.apply({"params": params}, x))
        return -jnp.mean(log_p[jnp.arange(64), labels])

    wrong = sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(mean_loss)(params)))
    found = importance.fisher(network, params, {}, x, labels)
    right = sum(jnp.sum(f) for f in jax.tree.leaves(found))
    assert right > 5 * wrong


def test_sampled_labels_average_to_the_true_fisher():
    model, _ = MODELS["mlp"]
    x = jax.random.normal(jax.random.key(0), (6, 5))
    network, params = built(model, x)
    labels = jnp.zeros(6, jnp.int32)

    def sample(key):
        return importance.fisher(network, params, {}, x, labels, kind="sampled", key=key)

    draws = jax.jit(jax.vmap(sample))(jax.random.split(jax.random.key(0), 400))
    mean = jax.tree.map(lambda leaf: leaf.mean(0), draws)
    true = importance.fisher(network, params, {}, x, labels, kind="true")
    for a, b in zip(jax.tree.leaves(mean), jax.tree.leaves(true), strict=True):
        np.testing.assert_allclose(a.sum(), b.sum(), rtol=0.1)


def test_weights_leave_padding_out():
    model, _ = MODELS["mlp"]
    x = jax.random.normal(jax.random.key(0), (6, 5))
    labels = jnp.arange(6) % 3
    network, params = built(model, x)
    weights = jnp.array([1.0, 1, 1, 1, 0, 0])
    for measure in SUMS.values():
        whole = measure(network, params, {}, x[:4], labels[:4])
        padded = measure(network, params, {}, x, labels, weights=weights)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), padded, whole)


SUMS = {
    "fisher": importance.fisher_sum,
    "sensitivity": lambda network, params, mode, x, _, **more: importance.sensitivity_sum(
        network, params, mode, x, **more
    ),
    "neurons of the output": importance.neurons_sum,
    "neurons of the loss": lambda *args, **more: importance.neurons_sum(*args, of="loss", **more),
    "factors": kronecker.factors_sum,
}


@pytest.mark.parametrize("name", SUMS)
def test_a_head_is_the_network_without_its_other_outputs(name):
    x = jax.random.normal(jax.random.key(0), (6, 5))
    labels = jnp.array([0, 1, 1, 0, 1, 0])
    network, params = built(MLP((8,), 4), x)
    head, columns = jnp.array([False, True, False, True]), np.array([1, 3])
    small, _ = built(MLP((8,), 2), x)
    own = {"hidden_0": params["hidden_0"],
           "output": jax.tree.map(lambda leaf: leaf[..., columns], params["output"])}  # fmt: skip
    found = SUMS[name](network, params, {}, x, jnp.asarray(columns)[labels], classes=head)
    expected = SUMS[name](small, own, {}, x, labels)

    def part(leaf, other):
        for axis, (length, wanted) in enumerate(zip(leaf.shape, other.shape, strict=True)):
            if length != wanted:
                rest = jnp.delete(leaf, columns, axis)
                np.testing.assert_array_equal(rest, 0.0)  # the other outputs are not measured
                leaf = jnp.take(leaf, columns, axis)
        np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-7)

    jax.tree.map(part, found, expected)


def squared_error(outputs, labels):
    return jnp.square(outputs - labels).reshape(outputs.shape[0], -1).sum(-1)


@pytest.mark.parametrize("name", ["mlp", "mixed"])
def test_fisher_of_another_loss_squares_its_gradients(name):
    model, shape = MODELS[name]
    x = jax.random.normal(jax.random.key(0), shape)
    targets = jax.random.normal(jax.random.key(2), (shape[0], 3))
    network, params = built(model, x)

    def one(params, x_i, target):
        return squared_error(model.apply({"params": params}, x_i[None]), target[None])[0]

    each = jax.jit(jax.vmap(jax.grad(one), (None, 0, 0)))(params, x, targets)
    expected = jax.tree.map(lambda g: jnp.square(g).mean(0), each)
    got = importance.fisher(
        network, params, {}, x, targets, loss=squared_error, batch_size=3, chunk=2
    )
    close(got, expected)


class Tokens(nn.Module):
    """Outputs per token; one layer sees tokens as rows of the batch."""

    @nn.compact
    def __call__(self, x):
        n, l, d = x.shape
        x = nn.tanh(nn.Dense(4, name="rows")(x.reshape(n * l, d)).reshape(n, l, 4))
        return nn.Dense(3, name="out")(x)


def test_labels_per_token():
    x = jax.random.normal(jax.random.key(0), (5, 2, 3))
    labels = jnp.arange(10).reshape(5, 2) % 3
    network, params = built(Tokens(), x)
    assert not network.layers["rows"].plain  # its rows are not the examples

    def loss(outputs, labels):
        log_p = jax.nn.log_softmax(outputs)
        return -jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0].mean(-1)

    def one(params, x_i, y_i):
        return loss(Tokens().apply({"params": params}, x_i[None]), y_i[None])[0]

    each = jax.jit(jax.vmap(jax.grad(one), (None, 0, 0)))(params, x, labels)
    close(
        importance.fisher(network, params, {}, x, labels, loss=loss, batch_size=2, chunk=2),
        jax.tree.map(lambda g: jnp.square(g).mean(0), each),
    )
    with pytest.raises(ValueError, match=r"outputs \(5, 2, 3\) and labels \(5, 2\) .*pass loss="):
        importance.fisher(network, params, {}, x, labels)
    with pytest.raises(ValueError, match="takes its labels from a softmax"):
        importance.fisher(network, params, {}, x, labels, kind="true", loss=loss)


def test_bfloat16_parameters_are_measured_in_f32():
    x = jax.random.normal(jax.random.key(0), (300, 4, 4, 1))
    labels = jnp.arange(300) % 3
    network, params = built(ConvNet((2,), (4,), 3), x)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    got = importance.fisher(network, half, {}, x, labels)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(got))
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    expected = importance.fisher(network, exact, {}, x, labels)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0.03, atol=0.03 * float(b.max()))


@pytest.mark.parametrize("of", importance.NEURON_KINDS)
def test_neurons_equal_the_definition(of):
    model = MLP((8, 6), 3)
    x = jax.random.normal(jax.random.key(0), (7, 5))
    labels = jnp.arange(7) % 3
    network, params = built(model, x)
    mode = {"hidden_1": {"key": jnp.array([1.0, -1, 1, 1, -1, 1, -1, 1])}}

    def of_example(bias, x_i, y_i):
        vectors = {path: {**mode.get(path, {}), "bias": b} for path, b in bias.items()}
        z = modulated_apply(model, params, vectors, x_i[None])[0]
        return jnp.sum(z**2) if of == "output_norm" else -jax.nn.log_softmax(z)[y_i]

    zeros = {path: jnp.zeros(layer.outputs) for path, layer in network.layers.items()}
    each = jax.jit(jax.vmap(jax.grad(of_example), (None, 0, 0)))(zeros, x, labels)
    found = importance.neurons(network, params, mode, x, labels, of=of)
    close(found, jax.tree.map(lambda g: jnp.abs(g).mean(0), each))


def test_kronecker_factors_equal_the_definition():
    model = MLP((8,), 3)
    x = jax.random.normal(jax.random.key(0), (7, 5))
    labels = jnp.arange(7) % 3
    network, params = built(model, x)
    key = jnp.array([1.0, -1, 1, 1, -1])
    mode = {"hidden_0": {"key": key, "bias": jnp.full(8, 0.3)}}

    def of_example(bias, x_i, y_i):
        vectors = {**mode, "output": {"bias": bias["output"]}}
        vectors["hidden_0"] = {"key": key, "bias": 0.3 + bias["hidden_0"]}
        return -jax.nn.log_softmax(modulated_apply(model, params, vectors, x_i[None])[0])[y_i]

    zeros = {path: jnp.zeros(layer.outputs) for path, layer in network.layers.items()}
    each = jax.vmap(jax.grad(of_example), (None, 0, 0))(zeros, x, labels)
    layer = params["hidden_0"]
    hidden = jax.nn.relu((x * key) @ layer["kernel"] + layer["bias"] + 0.3)
    found = kronecker.factors(network, params, mode, x, labels)
    for path, inputs in {"hidden_0": x * key, "output": hidden}.items():
        inputs = jnp.concatenate([inputs, jnp.ones((7, 1))], 1)
        close(found[path].inputs, inputs.T @ inputs / 7)
        close(found[path].outputs, each[path].T @ each[path] / 7)


def close(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, expected)


def test_errors_name_the_choice():
    x, labels = jnp.ones((2, 5)), jnp.zeros(2, jnp.int32)
    network, params = built(MODELS["mlp"][0], x)
    with pytest.raises(ValueError, match="unknown Fisher kind 'batch'; use one of empirical"):
        importance.fisher_sum(network, params, {}, x, labels, kind="batch")
    with pytest.raises(ValueError, match="pass key="):
        importance.fisher_sum(network, params, {}, x, labels, kind="sampled")
    with pytest.raises(ValueError, match="unknown importance 'mas'; use one of loss, output_norm"):
        importance.neurons(network, params, {}, x, labels, of="mas")


@pytest.mark.parametrize(
    "labels, message",
    [
        (jnp.array([0, 3]), "label 3 is not a class of 3 outputs; labels are 0 to 2"),
        (jnp.array([-1, 0]), "label -1 is not a class of 3 outputs"),
        (jnp.array([0.0, 1.0]), "of float32 have no cross-entropy of classes"),
        (jnp.zeros((2, 3), jnp.int32), r"labels \(2, 3\) of int32 have no cross-entropy"),
        (jnp.zeros(3, jnp.int32), r"labels \(3,\) of int32 have no cross-entropy"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, message):
    x = jnp.ones((2, 5))
    network, params = built(MODELS["mlp"][0], x)
    for measure in (importance.fisher, importance.fisher_sum, kronecker.factors, of_loss):
        with pytest.raises(ValueError, match=message):
            measure(network, params, {}, x, labels)


def of_loss(*args):
    return importance.neurons(*args, of="loss")


def test_no_array_of_examples_times_parameters():
    """The one-pass identity's point: memory does not grow with n x parameters."""
    model = MLP((64, 64), 10)
    x = jnp.ones((256, 50))
    network, params = built(model, x)
    labels = jnp.zeros(256, jnp.int32)
    measure = jax.jit(lambda p: importance.fisher_sum(network, p, {}, x, labels))
    compiled = measure.lower(params).compile()
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert compiled.memory_analysis().temp_size_in_bytes < 256 * count * 4 / 10
