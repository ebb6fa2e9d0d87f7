"""Networks of any author in modes: against the same change made to their parameters."""

import functools

import flax.linen as nn
import flax_networks
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util

import bpnjax
from bpnjax import importance, methods, modes, networks, optim
from bpnjax.methods.bd import empty_bank, init_factors, product
from bpnjax.networks import find_layers, matching, modulated_apply

IMAGES = jax.random.normal(jax.random.key(0), (4, 4, 4, 2))
ROWS = jax.random.normal(jax.random.key(1), (4, 5))
TOKENS = jnp.array([[1, 2, 3], [0, 0, 6], [5, 4, 3], [2, 2, 1]])
LABELS = jnp.array([0, 2, 1, 1])

pytestmark = pytest.mark.usefixtures("compile_once")

MODELS = {
    "resnet": (flax_networks.ResNet(), IMAGES, {"train": False}),
    "vit": (flax_networks.ViT(), IMAGES, {}),
    "text": (flax_networks.Text(), TOKENS, {}),
    "shared": (flax_networks.Shared(), ROWS, {}),
    "shapes": (flax_networks.Shapes(), IMAGES, {}),
    "scan": (flax_networks.Lifted("scan"), ROWS, {}),
    "remat": (flax_networks.Lifted("remat"), ROWS, {}),
    "vmap": (flax_networks.Lifted("vmap"), ROWS, {}),
}


@functools.cache
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


def averages(variables):
    """What a network keeps beside its parameters."""
    return {name: tree for name, tree in variables.items() if name != "params"}


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
    mixed = run(modes.select(bank, tasks), x)
    each = [run(modes.select(bank, t), x[i : i + 1])[0] for i, t in enumerate(tasks)]
    np.testing.assert_allclose(mixed, jnp.stack(each), rtol=1e-4, atol=1e-5)


def test_attention_gets_flat_vectors_over_heads():
    model, x = flax_networks.ViT(depth=2), IMAGES
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
    seeds = modes.key_bank(jax.random.key(0), chosen)
    biases = product(init_factors(jax.random.key(1), chosen, 4))
    mode = modes.merge(modes.select(seeds, 1), biases)
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


def measures(run, layers):
    """The gradient of some loss for the measures of layers, each with a bias of zeros."""
    mode = {
        path: {"bias": jnp.zeros(layer.outputs), "measure": jnp.zeros(2)}
        for path, layer in layers.items()
    }

    def loss(mode):
        return jnp.sum(jnp.tanh(run(mode)))

    eager, jitted = jax.grad(loss), jax.jit(jax.grad(loss))
    found = [
        {path: np.asarray(v["measure"]) for path, v in g(mode).items()} for g in (eager, jitted)
    ]
    for path in mode:
        np.testing.assert_allclose(*(one[path] for one in found), rtol=1e-5)
    return found[0]


def squares_of(outputs):
    """The sum of squares and the number of all elements of some arrays."""
    each = [np.asarray(y, np.float64) for y in outputs]
    return [sum((y**2).sum() for y in each), sum(y.size for y in each)]


@pytest.mark.parametrize("name", ["resnet", "vit", "text", "shared", "shapes"])
def test_the_size_of_what_every_layer_puts_out_is_measured(name):
    """Of each call, with the outputs that Flax itself captures."""
    model, variables, x, kwargs = started(name)
    layers = find_layers(model, variables, x, **kwargs)
    if name == "text":  # Flax captures nothing in its scan
        layers = matching(layers, "project")
    _, seen = model.apply(variables, x, capture_intermediates=True, **kwargs)
    seen = traverse_util.flatten_dict(seen["intermediates"], sep="/")
    found = measures(lambda mode: modulated_apply(model, variables, mode, x, **kwargs), layers)
    assert set(found) == set(layers)
    for path, measure in found.items():
        # Behind a BatchNorm the bias is added, and the output measured, that comes out of the norm.
        own = path.replace("Block_0/Conv_", "Block_0/BatchNorm_")
        own = own.replace("Block_1/Conv_", "Block_1/BatchNorm_")
        outputs = seen[f"{own}/__call__"]
        if path == "activated":  # the call of its parent, and that around it
            outputs = outputs[:1]
        np.testing.assert_allclose(measure, squares_of(outputs), rtol=1e-4, err_msg=path)
        assert len(outputs) == layers[path].calls


@pytest.mark.parametrize("how", ["scan", "remat", "vmap"])
def test_a_layer_in_a_lifted_transformation_is_measured_at_all_its_calls(how):
    """nn.scan has three, nn.vmap one of all rows, and under nn.remat none counts twice."""
    model, variables, x, _ = started(how)
    layers = find_layers(model, variables, x)
    own = variables["params"]["lifted"]["dense"]
    kernels, biases = own["kernel"], own["bias"]
    h, outputs = x, []
    for i in range(3 if how == "scan" else 1):
        kernel, bias = (kernels[i], biases[i]) if how == "scan" else (kernels, biases)
        outputs.append(h @ kernel + bias)
        h = jnp.tanh(outputs[-1])
    found = measures(lambda mode: modulated_apply(model, variables, mode, x), layers)
    np.testing.assert_allclose(found["lifted/dense"], squares_of(outputs), rtol=1e-5)
    head = variables["params"]["head"]
    expected = squares_of([h @ head["kernel"] + head["bias"]])
    np.testing.assert_allclose(found["head"], expected, rtol=1e-5)


class NormedLayers(nn.Module):
    """A layer in front of a BatchNorm, and one whose output is also read beside the norm."""

    @nn.compact
    def __call__(self, x, train):
        def norm(y, name):
            return nn.BatchNorm(use_running_average=not train, momentum=0.5, name=name)(y)

        x = nn.tanh(norm(nn.Dense(4, name="first")(x), "first_norm"))
        y = nn.Dense(4, name="second")(x)
        return nn.Dense(3, name="head")(norm(y, "second_norm") + y)


@pytest.mark.parametrize("frozen, padded", [(False, False), (True, False), (False, True)])
def test_behind_a_batch_norm_its_output_is_measured(frozen, padded):
    """On the statistics of the batch, or the running ones; before the bias is added.

    The norm sees padding, the measure does not.
    """
    network = networks.from_linen(NormedLayers(), ROWS)
    params, variables = network.init(jax.random.key(0))
    x = 7.0 + 30.0 * ROWS  # before the norm outputs are far larger
    mode = {path: {"bias": jnp.full(layer.outputs, 0.5), "measure": jnp.zeros(2)}
            for path, layer in network.layers.items()}  # fmt: skip
    real = slice(0, 3 if padded else 4)
    if padded:
        weight = jnp.array([1.0, 1.0, 1.0, 0.0])
        mode = {path: {**vectors, "weight": weight} for path, vectors in mode.items()}

    def loss(mode):
        out, _ = network.apply(
            params, mode, x, variables=variables, train=True, freeze_statistics=frozen
        )
        return jnp.sum(jnp.sin(out))

    found = {path: v["measure"] for path, v in jax.jit(jax.grad(loss))(mode).items()}

    def norm(y):
        mean, var = (0.0, 1.0) if frozen else (y.mean(0), y.var(0))
        return (y - mean) / np.sqrt(var + 1e-5)

    def dense(name, x):
        return x @ np.asarray(params[name]["kernel"], np.float64) + np.asarray(params[name]["bias"])

    first = norm(dense("first", np.asarray(x, np.float64)))
    np.testing.assert_allclose(found["first"], squares_of([first[real]]), rtol=1e-3)
    beside = dense("second", np.tanh(first + 0.5))
    behind = norm(beside)
    # What is read beside the norm has the bias too, hence is measured too.
    both = squares_of([behind[real], beside[real]])
    np.testing.assert_allclose(found["second"], both, rtol=1e-3)
    head = dense("head", behind + 0.5 + beside + 0.5)
    np.testing.assert_allclose(found["head"], squares_of([head[real]]), rtol=1e-3)


@pytest.mark.parametrize("name", ["resnet", "vit", "scan"])
def test_bd_has_relative_steps_on_a_network_of_any_layers(name):
    """Every layer's M moves by the size of its outputs, the shared network as without."""
    model, _, x, _ = started(name)
    network, method = networks.from_linen(model, x), methods.bd(epsilon=0.5, hidden_dim=4)
    learner = bpnjax.learner(network, method, optax.sgd(1e-3), num_tasks=1)
    state = learner.begin_task(learner.init(jax.random.key(2)), 0)
    params, others = state.params, state.variables

    def run(mode):
        """As in training, but for dropout."""
        return network.apply(params, mode, x, variables=others, train=name == "resnet")[0]

    sizes = {path: np.sqrt(m[0] / m[1]) for path, m in measures(run, network.layers).items()}
    state, _ = learner.step(state, (x, LABELS))
    assert set(state.task_params) == set(sizes)
    for path, factors in state.task_params.items():
        moved = np.abs(factors["bias"]["M"])
        if name == "vit":  # the dropout of the step changes the sizes of what follows it
            assert moved[0, 0] > 0
            np.testing.assert_allclose(moved, moved[0, 0], rtol=1e-5)
        else:
            np.testing.assert_allclose(moved, 0.5 * sizes[path], rtol=1e-3, err_msg=path)


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_learns_a_task_with_factors_and_any_optimizer(name):
    model, variables, x, _ = started(name)
    others = {k: v for k, v in variables.items() if k != "params"}
    layers = matching(find_layers(model, variables, x, train=False), "(?!head$).*")
    assert "head" not in layers
    params = {"core": variables["params"], "bd": init_factors(jax.random.key(3), layers, 8)}
    tx = optim.beneficial_perturbation(optax.adamw(1e-2), 0.02)

    def loss(params, others):
        logits, new = modulated_apply(
            model, {"params": params["core"], **others}, product(params["bd"]), x,
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
    biases = product(params["bd"])
    assert set(biases) == set(layers)
    assert all(np.abs(vectors["bias"]).max() > 1e-3 for vectors in biases.values())
    bank = modes.store(empty_bank(layers, 2), biases, 1)
    core = {"params": params["core"], **others}
    kept = modulated_apply(model, core, modes.select(bank, 1), x, train=False)
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
    model = flax_networks.Unknown()
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
    with pytest.raises(ValueError, match="not the NNX module Linear: .*use networks.from_nnx"):
        modulated_apply(nnx.Linear(5, 4, rngs=nnx.Rngs(0)), {}, {}, ROWS)
    with pytest.raises(ValueError, match="model is the class ResNet; pass an instance"):
        find_layers(flax_networks.ResNet, {}, IMAGES)
    with pytest.raises(ValueError, match="must be a flax.linen Module, not function"):
        find_layers(lambda x: x, {}, ROWS)
    with pytest.raises(ValueError, match="model is the class ResNet; pass an instance"):
        networks.from_linen(flax_networks.ResNet, IMAGES)
    model = InsideOut()
    variables = model.init(jax.random.key(0), ROWS)
    with pytest.raises(ValueError, match=r"'nnx' \(ToLinen\)"):
        matching(find_layers(model, variables, ROWS), ".*")


def test_a_layer_in_nn_jit_is_refused_in_a_mode_and_free_without():
    model = flax_networks.Lifted("jit")
    variables = model.init(jax.random.key(0), ROWS)
    plain = model.apply(variables, ROWS)
    np.testing.assert_array_equal(modulated_apply(model, variables, {}, ROWS), plain)
    head = {"head": {"bias": jnp.ones(3)}}
    np.testing.assert_allclose(modulated_apply(model, variables, head, ROWS), plain + 1, rtol=1e-5)
    fresh = flax_networks.Lifted("jit")
    mode = {"lifted/dense": {"bias": jnp.ones(5)}}
    with pytest.raises(ValueError, match="within nn.jit.*jit the whole call|did not call"):
        modulated_apply(fresh, variables, mode, ROWS)


@pytest.mark.parametrize(
    "mode, message",
    [
        ({"head": {"bias": jnp.ones(2)}}, r"bias of layer .head. has shape \(2,\); it must have"),
        ({"head": {"key": jnp.ones(1)}}, "key of layer 'head' has shape"),
        ({"head": {"scale": jnp.ones(3)}}, r"layer 'head' has \['scale'\]; a layer has key, dep"),
        ({"head": {"measures": jnp.ones(2)}}, r"layer 'head' has \['measures'\]"),
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
    "conv_layer_norm": (flax_networks.ConvLayerNorm(), IMAGES),
    "vit": (flax_networks.ViT(), IMAGES),
    "shared": (flax_networks.Shared(), ROWS),
    "scan": (flax_networks.Lifted("scan"), ROWS),
    "vmap": (flax_networks.Lifted("vmap"), ROWS),
    "remat": (flax_networks.Lifted("remat"), ROWS),
    "jit": (flax_networks.Lifted("jit"), ROWS),
    "weight_norm": (flax_networks.Normed(), ROWS),
    "text": (flax_networks.Text(), TOKENS),
}


@pytest.mark.parametrize("name", IMPORTANCE)
def test_fisher_equals_the_definition(name):
    model, x = IMPORTANCE[name]
    network = networks.from_linen(model, x)
    params, _ = jax.jit(network.init)(jax.random.key(2))
    labels = LABELS % 2
    expected = fisher_by_definition(lambda p, b: model.apply({"params": p}, b), params, x, labels)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected)) or name == "vit"
    measure = jax.jit(lambda params: importance.fisher(network, params, {}, x, labels, chunk=2))
    close(measure(params), expected)


def test_fisher_of_batch_norm_is_that_of_its_running_averages():
    model, variables, x, _ = started("resnet")
    network, params = networks.from_linen(model, x), variables["params"]
    _, new = network.apply(params, {}, x, variables=averages(variables), train=True)

    def run(params, x):
        return model.apply({"params": params, **new}, x, train=False)

    expected = fisher_by_definition(run, params, x, LABELS)
    close(importance.fisher(network.bind(new), params, {}, x, LABELS), expected)
    stale = importance.fisher(network.bind(averages(variables)), params, {}, x, LABELS)
    assert not np.allclose(stale["head"]["kernel"], expected["head"]["kernel"], rtol=0.1)


class BatchOnly(nn.Module):
    """BatchNorm that always uses the statistics of the batch."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.BatchNorm(use_running_average=False)(x))


def test_batch_statistics_in_evaluation_are_an_error_with_the_remedy():
    model, variables, x, _ = started("resnet")
    network = networks.from_linen(model, x)
    remedy = "BatchNorm must use its running statistics there; give its call an argument train"
    with pytest.raises(ValueError, match=remedy):  # no averages
        importance.fisher(network, variables["params"], {}, x, LABELS)
    with pytest.raises(ValueError, match=remedy):
        network.apply(variables["params"], {}, x)
    with pytest.raises(ValueError, match=remedy):  # examples would normalise each other
        networks.from_linen(BatchOnly(), ROWS)


def dropped(x, off):
    return nn.Dropout(0.5, deterministic=off)(nn.Dense(4, name="dense")(x))


class Train(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return dropped(x, not train)


class Training(nn.Module):
    @nn.compact
    def __call__(self, x, training):
        return dropped(x, not training)


class IsTraining(nn.Module):
    @nn.compact
    def __call__(self, x, is_training=False):
        return dropped(x, not is_training)


class Deterministic(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic):
        return dropped(x, deterministic)


class UseRunningAverage(nn.Module):
    @nn.compact
    def __call__(self, x, use_running_average=True):
        return dropped(x, use_running_average)


class Learns(nn.Module):
    @nn.compact
    def __call__(self, x, learns):
        return dropped(x, not learns)


@pytest.mark.parametrize(
    "model, told, given",
    [
        (Train(), {"train": True}, {}),
        (Training(), {"training": True}, {}),
        (IsTraining(), {"is_training": True}, {}),
        (Deterministic(), {"deterministic": False}, {}),
        (UseRunningAverage(), {"use_running_average": False}, {}),
        (Learns(), {"learns": True}, {"train": "learns"}),
    ],
)
def test_the_call_is_told_that_it_trains(model, told, given):
    network = networks.from_linen(model, ROWS, **given)
    assert (network.name, network.example.shape) == (type(model).__name__, (1, 5))
    params, variables = network.init(jax.random.key(0))
    assert variables == {}
    evaluation = {name: not value for name, value in told.items()}
    plain, _ = network.apply(params, {}, ROWS)
    np.testing.assert_array_equal(plain, model.apply({"params": params}, ROWS, **evaluation))
    key = jax.random.key(1)
    trained, _ = network.apply(params, {}, ROWS, train=True, key=key)
    expected = model.apply({"params": params}, ROWS, **told, rngs={"dropout": key})
    np.testing.assert_array_equal(trained, expected)
    assert 0 < (trained == 0).sum() < trained.size
    with pytest.raises(ValueError, match="draws random numbers in training: pass apply.*key="):
        network.apply(params, {}, ROWS, train=True)


def test_a_flag_that_the_module_has_is_not_given_again():
    network = networks.from_linen(nn.Dropout(0.5, deterministic=True), ROWS)
    np.testing.assert_array_equal(network.apply({}, {}, ROWS, train=True)[0], ROWS)
    silent = networks.from_linen(IsTraining(), ROWS, train=None)  # its default holds
    params, _ = silent.init(jax.random.key(0))
    out, _ = silent.apply(params, {}, ROWS, train=True, key=jax.random.key(1))
    np.testing.assert_array_equal(out, silent.apply(params, {}, ROWS)[0])


class Masked(nn.Module):
    @nn.compact
    def __call__(self, x, mask, *, train=False):
        return nn.Dense(3)(x * mask)


def test_calls_that_cannot_be_made_are_refused_and_further_arguments_passed():
    with pytest.raises(ValueError, match="the call of ViT has no argument 'learns'; it has x, tra"):
        networks.from_linen(flax_networks.ViT(), IMAGES, train="learns")
    with pytest.raises(
        ValueError, match=r"Masked cannot be run on a batch of shape \(4, 5\): .*mask"
    ):
        networks.from_linen(Masked(), ROWS)
    with pytest.raises(ValueError, match=r"ResNet cannot be run on a batch of shape \(4, 5\): "):
        networks.from_linen(flax_networks.ResNet(), ROWS)
    mask = jnp.arange(5.0)
    network = networks.from_linen(Masked(), jax.ShapeDtypeStruct((9, 5), jnp.float32), mask=mask)
    params, _ = network.init(jax.random.key(0))
    expected = Masked().apply({"params": params}, ROWS, mask)
    for train in (False, True):
        np.testing.assert_array_equal(network.apply(params, {}, ROWS, train=train)[0], expected)


def test_batch_norm_keeps_new_averages_or_is_frozen():
    model, collections, x, _ = started("resnet")
    network, params = networks.from_linen(model, x), collections["params"]
    init = network.init(jax.random.key(2))
    same = jax.tree.map(np.array_equal, (params, averages(collections)), init)
    assert all(jax.tree.leaves(same))
    mode = modes_of(collections, network.layers)
    out, changed = network.apply(params, mode, x, variables=init[1], train=True)
    expected, new = modulated_apply(
        model, collections, mode, x, train=True, mutable=["batch_stats"]
    )
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), changed, new)
    plain, kept = network.apply(params, mode, x, variables=changed)
    frozen, still = network.apply(
        params, mode, x, variables=changed, train=True, freeze_statistics=True
    )
    np.testing.assert_allclose(frozen, plain, rtol=1e-6)
    assert np.abs(frozen - out).max() > 1e-2
    for tree in (kept, still):
        jax.tree.map(np.testing.assert_array_equal, tree, changed)
    with pytest.raises(ValueError, match="keeps variables beside its parameters.*pass apply"):
        network.apply(params, {}, x, train=True)


class Sown(nn.Module):
    """It notes something in each call, beside BatchNorm."""

    @nn.compact
    def __call__(self, x, train):
        self.sow("losses", "size", x.mean())
        self.sow("intermediates", "x", x)
        return nn.Dense(3)(nn.BatchNorm(use_running_average=not train)(x))


def test_what_a_module_sows_is_no_state():
    network = networks.from_linen(Sown(), ROWS)
    params, variables = network.init(jax.random.key(0))
    assert set(variables) == {"batch_stats"}
    _, changed = network.apply(params, {}, ROWS, variables=variables, train=True)
    assert jax.tree.structure(changed) == jax.tree.structure(variables)


class NormToldInItsCall(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(3)(nn.BatchNorm()(x, use_running_average=not train))


class NormToldWhenMade(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(3)(nn.BatchNorm(use_running_average=not train)(x))


@pytest.mark.parametrize("model", [NormToldInItsCall(), NormToldWhenMade()])
def test_statistics_are_frozen_wherever_batch_norm_is_told(model):
    network = networks.from_linen(model, ROWS)
    params, variables = network.init(jax.random.key(0))
    plain, _ = network.apply(params, {}, ROWS, variables=variables)
    train = {"variables": variables, "train": True}
    frozen, same = network.apply(params, {}, ROWS, **train, freeze_statistics=True)
    np.testing.assert_array_equal(frozen, plain)
    jax.tree.map(np.testing.assert_array_equal, same, variables)
    free, changed = network.apply(params, {}, ROWS, **train)
    assert np.abs(free - plain).max() > 1e-3
    assert np.abs(changed["batch_stats"]["BatchNorm_0"]["mean"]).max() > 1e-3


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
