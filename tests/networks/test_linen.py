"""Networks of any author in modes: against the same change made to their parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import flax_networks
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util

from bpnjax import importance, optim
from bpnjax.methods import bd
from bpnjax.modes import keys
from bpnjax.networks import linen
from bpnjax.networks.linen import find_layers, fixed, matching, modulated_apply

PICTURES = jax.random.normal(jax.random.key(0), (4, 4, 4, 2))
ROWS = jax.random.normal(jax.random.key(1), (4, 5))
TOKENS = jnp.array([[1, 2, 3], [0, 0, 6], [5, 4, 3], [2, 2, 1]])
LABELS = jnp.array([0, 2, 1, 1])

pytestmark = pytest.mark.usefixtures("compile_once")

MODELS = {
    "resnet": (networks.ResNet(), PICTURES, {"train": False}),
    "vit": (networks.ViT(), PICTURES, {}),
    "text": (networks.Text(), TOKENS, {}),
    "shared": (networks.Shared(), ROWS, {}),
    "shapes": (networks.Shapes(), PICTURES, {}),
    "scan": (networks.Lifted("scan"), ROWS, {}),
    "remat": (networks.Lifted("remat"), ROWS, {}),
    "vmap": (networks.Lifted("vmap"), ROWS, {}),
}


def started(name):
    model, x, kwargs = MODELS[name]
    variables = jax.jit(lambda key: model.init(key, x, **kwargs))(jax.random.key(2))
    return model, variables, x, kwargs


def random_mode(layers, seed=3, rows=()):
    """A key and a bias for every layer, none of them trivial."""
    mode = {}
    for i, (path, layer) in enumerate(layers.items()):
        a, b = jax.random.split(jax.random.fold_in(jax.random.key(seed), i))
        mode[path] = {
            "key": 1 + 0.5 * jax.random.normal(a, (*rows, layer.inputs)),
            "bias": 0.5 * jax.random.normal(b, (*rows, layer.outputs)),
        }
    return mode


def absorbed(params, layers, mode):
    """Parameters that make the plain network what a mode makes of it: W diag(key), b + bias."""
    flat = traverse_util.flatten_dict(params, sep="/")
    for path, vectors in mode.items():
        kernel = flat[f"{path}/kernel"]
        as_matrix = kernel
        if layers[path].kind == "dense_general":
            as_matrix = kernel.reshape(layers[path].inputs, layers[path].outputs)
        # ConvLocal has the window's place before its channels, as [patch * in] with in first.
        if kernel.shape[-2] != layers[path].inputs and layers[path].kind == "conv":
            repeats = kernel.shape[-2] // layers[path].inputs
            key = jnp.repeat(vectors["key"], repeats)
        else:
            key = vectors["key"]
        flat[f"{path}/kernel"] = (as_matrix * key[:, None]).reshape(kernel.shape)
        if "bias" in vectors:
            bias = flat[f"{path}/bias"]
            shape = bias.shape if layers[path].kind == "dense_general" else (-1,)
            flat[f"{path}/bias"] = bias + vectors["bias"].reshape(shape)
    return traverse_util.unflatten_dict(flat, sep="/")


def modes_of(variables, layers):
    """A random mode; a bias only where the layer has one, so that parameters can absorb it."""
    flat = traverse_util.flatten_dict(variables["params"], sep="/")
    mode = random_mode(layers)
    for path in mode:
        if f"{path}/bias" not in flat:
            del mode[path]["bias"]
    return mode


@pytest.mark.parametrize("name", MODELS)
def test_a_mode_equals_the_parameters_that_absorb_it(name):
    model, variables, x, kwargs = started(name)
    layers = find_layers(model, variables, x, **kwargs)
    assert layers
    mode = modes_of(variables, layers)
    changed = {**variables, "params": absorbed(variables["params"], layers, mode)}
    apply = jax.jit(lambda v: model.apply(v, x, **kwargs))
    expected = apply(changed)
    run = jax.jit(lambda v, m: modulated_apply(model, v, m, x, **kwargs))
    np.testing.assert_allclose(run(variables, mode), expected, rtol=1e-4, atol=1e-5)
    plain = apply(variables)
    assert np.abs(expected - plain).max() > 1e-2
    np.testing.assert_allclose(run(variables, {}), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet", "vit", "shapes", "text", "scan", "remat"])
def test_a_batch_of_mixed_modes_equals_one_call_per_example(name):
    model, variables, x, kwargs = started(name)
    layers = find_layers(model, variables, x, **kwargs)
    bank = random_mode(layers, rows=(3,))
    tasks = jnp.array([2, 0, 1, 2])
    run = jax.jit(lambda m, x: modulated_apply(model, variables, m, x, **kwargs))
    mixed = run(linen.select(bank, tasks), x)
    each = [run(linen.select(bank, t), x[i : i + 1])[0] for i, t in enumerate(tasks)]
    np.testing.assert_allclose(mixed, jnp.stack(each), rtol=1e-4, atol=1e-5)


def test_attention_gets_flat_vectors_over_heads():
    model, x = networks.ViT(depth=2), PICTURES
    variables = jax.jit(model.init)(jax.random.key(2), x)
    layers = find_layers(model, variables, x)
    at = {path.split("/")[-1]: layer for path, layer in layers.items() if "attention" in path}
    assert {name: layer.kind for name, layer in at.items()} == dict.fromkeys(
        ("query", "key", "value", "out"), "dense_general"
    )
    assert at["query"].output_shape == (4, 5, 2, 3) and at["query"].outputs == 6
    assert at["out"].inputs == 6 and at["out"].rank == 4
    chosen = matching(layers, ".*/attention/(query|value)")
    assert list(chosen) == [f"block_{i}/attention/{n}" for i in (0, 1) for n in ("query", "value")]
    seeds = keys.key_bank(jax.random.key(0), chosen)
    mode = linen.merge(linen.select(seeds, 1),
                            bd.product(bd.init_factors(jax.random.key(1), chosen, 4)))  # fmt: skip
    assert modulated_apply(model, variables, mode, x).shape == (4, 3)


def test_batch_norm_in_training_updates_its_averages():
    model, variables, x, _ = started("resnet")
    layers = find_layers(model, variables, x, train=True, mutable=["batch_stats"])
    mode = modes_of(variables, layers)
    changed = {**variables, "params": absorbed(variables["params"], layers, mode)}
    got, new = modulated_apply(model, variables, mode, x, train=True, mutable=["batch_stats"])
    out, expected = model.apply(changed, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(got, out, rtol=1e-4, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), new, expected)
    assert not np.allclose(jax.tree.leaves(new)[0], jax.tree.leaves(variables["batch_stats"])[0])


def test_dropout_draws_from_the_rngs_it_is_given():
    model, variables, x, _ = started("vit")
    layers = find_layers(model, variables, x)
    mode = modes_of(variables, layers)
    changed = {"params": absorbed(variables["params"], layers, mode)}

    def run(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return modulated_apply(model, variables, mode, x, train=True, rngs=rngs)

    expected = model.apply(changed, x, train=True, rngs={"dropout": jax.random.key(5)})
    np.testing.assert_allclose(run(5), expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(run(5), run(6))


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_learns_a_task_with_factors_and_any_optimizer(name):
    model, variables, x, _ = started(name)
    others = {k: v for k, v in variables.items() if k != "params"}
    layers = matching(find_layers(model, variables, x, train=False), "(?!head$).*")
    assert "head" not in layers
    params = {"core": variables["params"], "bd": bd.init_factors(jax.random.key(3), layers, 8)}
    tx = optim.beneficial_perturbation(optax.adamw(1e-2), 0.02)

    def loss(params, others):
        logits, new = modulated_apply(
            model, {"params": params["core"], **others}, bd.product(params["bd"]), x,
            train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)},
        )  # fmt: skip
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)
        return entropy.mean(), new

    @jax.jit
    def step(params, others, state):
        (value, new), grads = jax.value_and_grad(loss, has_aux=True)(params, others)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), {**others, **new}, state, value

    state, values = tx.init(params), []
    for _ in range(8):
        params, others, state, value = step(params, others, state)
        values.append(float(value))
    assert values[-1] < 0.8 * values[0]
    biases = bd.product(params["bd"])
    assert set(biases) == set(layers)
    assert all(np.abs(vectors["bias"]).max() > 1e-3 for vectors in biases.values())
    bank = bd.freeze(bd.empty_bank(layers, 2), biases, 1)
    core = {"params": params["core"], **others}
    kept = modulated_apply(model, core, linen.select(bank, 1), x, train=False)
    live = modulated_apply(model, core, biases, x, train=False)
    np.testing.assert_array_equal(kept, live)


def test_an_embedding_is_left_alone_and_named_when_asked_for():
    model, variables, x, _ = started("text")
    layers = find_layers(model, variables, x)
    assert "embed" not in layers and layers.others["embed"].kind == "Embed"
    assert {p.split("/")[0] for p in layers} == {"cell", "project"}
    assert list(matching(layers, ".*")) == list(layers)
    with pytest.raises(ValueError, match=r"matches no layer but 'embed' \(Embed\), which take"):
        matching(layers, "embed")
    with pytest.raises(ValueError, match=r"'embed' is a Embed, which takes neither key nor bias"):
        modulated_apply(model, variables, {"embed": {"bias": jnp.zeros(4)}}, x)


def test_a_layer_of_an_unknown_class_is_refused_by_name():
    model = networks.Unknown()
    variables = model.init(jax.random.key(0), ROWS)
    layers = find_layers(model, variables, ROWS)
    assert list(layers) == ["head"] and list(matching(layers, "head")) == ["head"]
    with pytest.raises(ValueError, match=r"'einsum' \(Einsum\).*know Dense, DenseGeneral, Conv"):
        matching(layers, ".*")
    assert list(matching(layers, "(?!einsum$).*")) == ["head"]


class InsideOut(nn.Module):
    """An NNX layer in Linen's clothes."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nnx.bridge.to_linen(nnx.Linear, 5, 4, name="nnx")(x))


def test_nnx_and_what_is_no_module_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="not the NNX module Linear: .*write the network with"):
        modulated_apply(nnx.Linear(5, 4, rngs=nnx.Rngs(0)), {}, {}, ROWS)
    with pytest.raises(ValueError, match="model is the class ResNet; pass an instance"):
        find_layers(networks.ResNet, {}, PICTURES)
    with pytest.raises(ValueError, match="must be a flax.linen Module, not function"):
        find_layers(lambda x: x, {}, ROWS)
    model = InsideOut()
    variables = model.init(jax.random.key(0), ROWS)
    with pytest.raises(ValueError, match=r"'nnx' \(ToLinen\)"):
        matching(find_layers(model, variables, ROWS), ".*")


def test_a_layer_in_nn_jit_is_refused_in_a_mode_and_free_without():
    model = networks.Lifted("jit")
    variables = model.init(jax.random.key(0), ROWS)
    plain = model.apply(variables, ROWS)
    np.testing.assert_array_equal(modulated_apply(model, variables, {}, ROWS), plain)
    head = {"head": {"bias": jnp.ones(3)}}
    np.testing.assert_allclose(modulated_apply(model, variables, head, ROWS), plain + 1, rtol=1e-5)
    fresh = networks.Lifted("jit")
    mode = {"lifted/dense": {"bias": jnp.ones(5)}}
    with pytest.raises(ValueError, match="within nn.jit.*jit the whole call|did not call"):
        modulated_apply(fresh, variables, mode, ROWS)


@pytest.mark.parametrize(
    "mode, message",
    [
        ({"head": {"bias": jnp.ones(2)}}, r"bias of layer .head. has shape \(2,\); it must have"),
        ({"head": {"key": jnp.ones(1)}}, "key of layer 'head' has shape"),
        ({"head": {"scale": jnp.ones(3)}}, r"layer 'head' has \['scale'\]; a layer has a 'key'"),
        ({"lifted/dense": {"bias": jnp.ones((4, 5))}}, "first axis is not the batch of 4 examples"),
    ],
)  # fmt: skip
def test_vectors_that_do_not_fit_are_errors(mode, message):
    model, variables, x, _ = started("vmap")
    with pytest.raises(ValueError, match=message):
        modulated_apply(model, variables, mode, x)


def fisher_by_definition(run, params, x, labels):
    """One example at a time, by autodiff of the plain network."""

    def log_p(params, x_i, y_i):
        return jax.nn.log_softmax(run(params, x_i[None])[0])[y_i]

    each = jax.jit(jax.grad(log_p))
    squares = [
        jax.tree.map(jnp.square, each(params, *pair)) for pair in zip(x, labels, strict=True)
    ]
    return jax.tree.map(lambda *s: sum(s) / len(s), *squares)


def close(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-7), got, expected)


IMPORTANCE = {
    "conv_layer_norm": (networks.ConvLayerNorm(), PICTURES),
    "vit": (networks.ViT(), PICTURES),
    "shared": (networks.Shared(), ROWS),
    "scan": (networks.Lifted("scan"), ROWS),
    "vmap": (networks.Lifted("vmap"), ROWS),
    "remat": (networks.Lifted("remat"), ROWS),
    "jit": (networks.Lifted("jit"), ROWS),
    "weight_norm": (networks.Normed(), ROWS),
    "text": (networks.Text(), TOKENS),
}


@pytest.mark.parametrize("name", IMPORTANCE)
def test_fisher_equals_the_definition(name):
    model, x = IMPORTANCE[name]
    params = model.init(jax.random.key(2), x)["params"]
    labels = LABELS % 2
    expected = fisher_by_definition(lambda p, b: model.apply({"params": p}, b), params, x, labels)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected)) or name == "vit"
    close(importance.fisher(model, params, {}, x, labels, chunk=2), expected)


def test_fisher_of_batch_norm_is_that_of_its_running_averages():
    model, variables, x, _ = started("resnet")
    _, new = model.apply(variables, x, train=True, mutable=["batch_stats"])
    variables = {"params": variables["params"], **new}
    as_tested = fixed(model, variables, train=False)

    def run(params, x):
        return model.apply({"params": params, **new}, x, train=False)

    expected = fisher_by_definition(run, variables["params"], x, LABELS)
    close(importance.fisher(as_tested, variables["params"], {}, x, LABELS), expected)
    told = fixed(model, train=False)  # the collections beside the parameters instead
    close(importance.fisher(told, variables, {}, x, LABELS), expected)
    close(jax.tree.map(jnp.zeros_like, importance.sensitivity(told, variables, {}, x)),
          jax.tree.map(jnp.zeros_like, expected))  # fmt: skip


def test_batch_statistics_in_importance_are_an_error_with_the_remedy():
    model, variables, x, _ = started("resnet")
    remedy = "BatchNorm must use its running averages: pass .*linen.fixed"
    with pytest.raises(ValueError, match=remedy):  # examples would normalise each other
        importance.fisher(fixed(model, train=True), variables, {}, x, LABELS)
    with pytest.raises(ValueError, match=remedy):  # no averages
        importance.fisher(fixed(model, train=False), variables["params"], {}, x, LABELS)
    with pytest.raises(ValueError, match="mutable cannot be fixed"):
        fixed(model, variables, train=True, mutable=["batch_stats"])


def test_a_layer_that_has_no_input_of_its_own_cannot_be_taken_out():
    model, variables, x, _ = started("scan")
    layers = find_layers(model, variables, x)
    assert not layers["lifted/dense"].plain and layers["head"].plain
    with pytest.raises(ValueError, match="'lifted/dense' lies within nn.scan"):
        linen.layer_inputs(model, variables["params"], {}, x, ["lifted/dense"])


@pytest.mark.parametrize("family", ["resnet", "vit"])
def test_a_model_of_a_published_package(family, monkeypatch):
    """flaim (Flax Image Models) on PyPI: pure Linen, written without knowledge of this library."""
    # Its release of 2023 names a type, in an annotation, that JAX has since dropped.
    monkeypatch.setattr(jax.random, "KeyArray", jax.Array, raising=False)
    pytest.importorskip("flaim", reason="pip install flaim, a package of Linen models")
    from flaim.models import resnet, vit

    x = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    if family == "vit":
        model, kwargs = vit.ViT(depth=1, token_dim=8, n_heads=2, n_classes=3), {}
    else:
        model = resnet.ResNet(depths=(1,), n_classes=3)
        kwargs = {"training": False}
    variables = jax.jit(lambda key: model.init(key, x, **kwargs))(jax.random.key(1))
    layers = matching(find_layers(model, variables, x, **kwargs), ".*")
    assert len(layers) > 4
    mode = modes_of(variables, layers)
    changed = {**variables, "params": absorbed(variables["params"], layers, mode)}
    got = jax.jit(lambda v, m: modulated_apply(model, v, m, x, **kwargs))(variables, mode)
    expected = jax.jit(lambda v: model.apply(v, x, **kwargs))(changed)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)
