"""The small vision transformer against one written with NumPy, and in training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import Jitted, digits_config

from bpnjax import config as configuration
from bpnjax import importance, models, networks
from bpnjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_once")

SMALL = {"patch": 4, "depth": 2, "dim": 12, "heads": 3, "mlp": 2.5}


def norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def gelu(x):
    erf = np.vectorize(__import__("math").erf)
    return x * (1 + erf(x / np.sqrt(2))) / 2


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def attention(x, p):
    """Head by head and example by example."""
    out = np.zeros_like(x)
    for n in range(len(x)):
        for h in range(p["query"]["kernel"].shape[1]):
            q, k, v = (
                x[n] @ p[name]["kernel"][:, h] + p[name]["bias"][h]
                for name in ("query", "key", "value")
            )
            scores = np.exp(q @ k.T / np.sqrt(q.shape[-1]))
            out[n] += scores / scores.sum(-1, keepdims=True) @ v @ p["out"]["kernel"][h]
    return out + p["out"]["bias"]


def by_numpy(params, x, patch, pool):
    rows = [
        [np.einsum("nuvc,uvco->no", x[:, i : i + patch, j : j + patch], params["embed"]["kernel"])
         for j in range(0, x.shape[2], patch)]
        for i in range(0, x.shape[1], patch)
    ]  # fmt: skip
    x = np.stack([cell for row in rows for cell in row], 1) + params["embed"]["bias"]
    if pool == "token":
        x = np.concatenate([np.repeat(params["token"], len(x), 0), x], 1)
    x = x + params["positions"]
    for i in range(SMALL["depth"]):
        p = params[f"block_{i}"]
        x = x + attention(norm(x, p["norm_0"]), p["attention"])
        x = x + dense(gelu(dense(norm(x, p["norm_1"]), p["mlp_0"])), p["mlp_1"])
    x = norm(x, params["norm"])
    return dense(x.mean(1) if pool == "mean" else x[:, 0], params["output"])


@pytest.mark.parametrize("pool", ["mean", "token"])
def test_equal_to_numpy(pool):
    net = models.ViT(5, pool=pool, **SMALL)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 8, 12, 3))
    shapes = jax.eval_shape(net.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda p: 0.3 * rng.normal(size=p.shape), shapes)  # biases as well
    assert params["block_1"]["mlp_0"]["kernel"].shape == (12, 30)
    wanted = by_numpy(params, x, SMALL["patch"], pool)
    np.testing.assert_allclose(net.apply({"params": params}, x), wanted, atol=2e-5)
    assert np.abs(wanted).max() > 0.1


def test_layers_and_dropout():
    net = models.ViT(5, dropout=0.3, **SMALL)
    x = jnp.ones((40, 8, 8, 1))
    network = networks.from_linen(net, x)
    block = [*(f"attention/{name}" for name in ("query", "key", "value", "out")), "mlp_0", "mlp_1"]
    paths = [f"block_{i}/{name}" for i in range(2) for name in block]
    assert list(network.layers) == ["embed", *paths, "output"]
    params, variables = network.init(jax.random.key(0))
    assert variables == {}
    plain, _ = network.apply(params, {}, x)
    np.testing.assert_array_equal(plain[0], plain[1])
    dropped, _ = network.apply(params, {}, x, train=True, key=jax.random.key(1))
    assert np.asarray(dropped).std(0).min() > 0


def test_importance_is_the_mean_of_squared_gradients():
    x = np.random.default_rng(0).normal(size=(6, 8, 8, 1)).astype(np.float32)
    labels = np.arange(6) % 5
    network = networks.from_linen(models.ViT(5, **SMALL), x)
    params, _ = network.init(jax.random.key(0))
    found = importance.fisher(network, params, {}, x, labels)

    def loss(params, x, label):
        return -jax.nn.log_softmax(network.apply(params, {}, x[None])[0])[0, label]

    grads = jax.vmap(jax.grad(loss), (None, 0, 0))(params, x, labels)
    wanted = jax.tree.map(lambda g: (g**2).mean(0), grads)
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-7, err_msg=str(path))


@pytest.mark.parametrize("method", ["ewc", "bd_ewc"])
def test_learns_tasks(method):
    config = digits_config(
        method, model__name="vit", train__epochs=8, sequence__num_tasks=2,
        train__learning_rate=1e-2,
        model__options="patch=2, depth=1, dim=16, heads=2, mlp=2.0",
    )  # fmt: skip
    run = Jitted(config)
    state, sums = run.train(jax.random.key(0))
    assert int(sums.bad_step) == -1 and run.traces == 1
    assert float(sums.correct / sums.examples) > 0.8
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.learner.params))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("patch=3", r"model.name: vit: .*multiples of patch=3, not \(8, 8, 1\)"),
        ("patch=2, heads=5", "heads=5 has to divide dim=192"),
        ("patch=2, pool='max'", "pool='max' to be 'mean' or 'token'"),
        ("patch=2, dropout=1.0", "dropout=1.0 to be below 1"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(UserError, match=message):
        Jitted(digits_config("sgd", model__name="vit", model__options=options))


def test_the_default_trains_32_x_32():
    model = configuration.default().model
    model.name = "vit"
    net = models.build(model, 100)
    shape = jax.eval_shape(
        lambda key, x: net.init_with_output(key, x)[0], jax.random.key(0), jnp.zeros((2, 32, 32, 3))
    )
    assert shape.shape == (2, 100)
