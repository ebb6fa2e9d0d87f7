"""Fisher information against enumeration, finite differences and vmap of grad."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bpnjax import importance
from bpnjax.models import MLP, ConvNet
from bpnjax.networks.linen import modulated_apply


def reference(model, params, mode, x, labels, kind, key=None):
    """The definition, one example and one label at a time."""

    def log_p(params, x_i, y):
        return jax.nn.log_softmax(modulated_apply(model, params, mode, x_i[None])[0])[y]

    total = jax.tree.map(jnp.zeros_like, params)
    for x_i, y_i in zip(x, labels, strict=True):
        p = jax.nn.softmax(modulated_apply(model, params, mode, x_i[None])[0])
        shares = p if kind == "true" else jax.nn.one_hot(y_i, p.shape[0])
        for y, share in enumerate(shares):
            g = jax.grad(log_p)(params, x_i, y)
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
    params = model.init(jax.random.key(1), x)["params"]
    mode = {"out" if name == "mixed" else "output": {"bias": jnp.array([0.3, -0.2, 0.1])}}
    if name == "mlp":
        mode["hidden_0"] = {"key": jnp.array([1.0, -1, -1, 1, 1]), "bias": jnp.full(8, 0.3)}
    got = importance.fisher(model, params, mode, x, labels, kind=kind, batch_size=3, chunk=2)
    expected = reference(model, params, mode, x, labels, kind)
    assert jax.tree.structure(got) == jax.tree.structure(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-7), got, expected)


@pytest.mark.parametrize("name", MODELS)
def test_sensitivity_equals_the_definition(name):
    model, shape = MODELS[name]
    x = jax.random.normal(jax.random.key(0), shape)
    params = model.init(jax.random.key(1), x)["params"]

    def squared_norm(params, x_i):
        return jnp.sum(model.apply({"params": params}, x_i[None]) ** 2)

    each = [jax.grad(squared_norm)(params, x_i) for x_i in x]
    expected = jax.tree.map(lambda *g: sum(abs(v) for v in g) / len(x), *each)
    got = importance.sensitivity(model, params, {}, x, batch_size=3, chunk=2)
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
    model = nn.Dense(2, use_bias=False)
    got = importance.sensitivity(model, params, {}, jnp.asarray(x, jnp.float32))
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
    got = importance.fisher(nn.Dense(3, use_bias=False), params, {},
                            jnp.asarray(x, jnp.float32), jnp.asarray(y))  # fmt: skip
    np.testing.assert_allclose(got["kernel"], fisher, rtol=1e-4)


def test_is_not_the_square_of_a_batch_mean():
    model, _ = MODELS["mlp"]
    x = jax.random.normal(jax.random.key(0), (64, 5))
    labels = jnp.arange(64) % 3
    params = model.init(jax.random.key(1), x)["params"]

    def mean_loss(params):
        log_p = jax.nn.log_softmax(model.apply({"params": params}, x))
        return -jnp.mean(log_p[jnp.arange(64), labels])

    wrong = sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(mean_loss)(params)))
    right = sum(
        jnp.sum(f) for f in jax.tree.leaves(importance.fisher(model, params, {}, x, labels))
    )
    assert right > 5 * wrong


def test_sampled_labels_average_to_the_true_fisher():
    model, _ = MODELS["mlp"]
    x = jax.random.normal(jax.random.key(0), (6, 5))
    params = model.init(jax.random.key(1), x)["params"]
    labels = jnp.zeros(6, jnp.int32)
    sample = jax.jit(lambda key: importance.fisher(
        model, params, {}, x, labels, kind="sampled", key=key))  # fmt: skip
    draws = [sample(jax.random.key(s)) for s in range(400)]
    mean = jax.tree.map(lambda *leaves: jnp.mean(jnp.stack(leaves), 0), *draws)
    true = importance.fisher(model, params, {}, x, labels, kind="true")
    for a, b in zip(jax.tree.leaves(mean), jax.tree.leaves(true), strict=True):
        np.testing.assert_allclose(a.sum(), b.sum(), rtol=0.1)


def test_weights_leave_padding_out():
    model, _ = MODELS["mlp"]
    x = jax.random.normal(jax.random.key(0), (6, 5))
    labels = jnp.arange(6) % 3
    params = model.init(jax.random.key(1), x)["params"]
    whole = importance.fisher_sum(model, params, {}, x[:4], labels[:4])
    weights = jnp.array([1.0, 1, 1, 1, 0, 0])
    padded = importance.fisher_sum(model, params, {}, x, labels, weights=weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), padded, whole)


def test_errors_name_the_choice():
    x = jnp.ones((2, 5))
    model, _ = MODELS["mlp"]
    params = model.init(jax.random.key(1), x)["params"]
    with pytest.raises(ValueError, match="unknown Fisher kind 'batch'; use one of empirical"):
        importance.fisher_sum(model, params, {}, x, jnp.zeros(2, jnp.int32), kind="batch")
    with pytest.raises(ValueError, match="pass key="):
        importance.fisher_sum(model, params, {}, x, jnp.zeros(2, jnp.int32), kind="sampled")


def test_no_array_of_examples_times_parameters():
    """The one-pass identity's point: memory does not grow with n x parameters."""
    model = MLP((64, 64), 10)
    x = jnp.ones((256, 50))
    params = model.init(jax.random.key(0), x)["params"]
    labels = jnp.zeros(256, jnp.int32)
    compiled = (
        jax.jit(lambda p: importance.fisher_sum(model, p, {}, x, labels)).lower(params).compile()
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert compiled.memory_analysis().temp_size_in_bytes < 256 * count * 4 / 10
