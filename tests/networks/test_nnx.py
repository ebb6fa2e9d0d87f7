"""The adapter of NNX: against Linen with the same weights and against hand computation."""

import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bpnjax
from bpnjax import methods
from bpnjax.networks import from_linen, matching
from bpnjax.networks.nnx import TRAIN_FLAGS, from_nnx

KEY = jax.random.key(0)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def mlp(rngs):
    return nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.relu, nnx.Linear(4, 2, rngs=rngs))


class Residual(nnx.Module):
    """Convolution, BatchNorm and dropout, whose flags are attributes."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 3, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(3, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.out(self.dropout(x.mean((1, 2))))


class Nested(nnx.Module):
    """The layer ``twice`` is at two places and called twice."""

    def __init__(self, rngs):
        self.inner = nnx.Dict(first=nnx.Linear(3, 4, use_bias=False, rngs=rngs))
        self.twice = nnx.Linear(4, 4, rngs=rngs)
        self.zwei = self.twice
        self.out = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(self.zwei(self.twice(nnx.relu(self.inner["first"](x)))))


class Doubled(nnx.Linear):
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


class Bypassed(nnx.Linear):
    def __call__(self, inputs):
        return inputs @ self.kernel[...]


# Linen with the same weights.


class LinenConvolutional(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(3, (3, 3), name="conv")(x))
        x = nn.ConvTranspose(4, (2, 2), strides=(2, 2), name="transpose")(x)
        return nn.Dense(2, name="out")(nn.LayerNorm(name="norm")(x.mean((1, 2))))


class NnxConvolutional(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 3, (3, 3), rngs=rngs)
        self.transpose = nnx.ConvTranspose(3, 4, (2, 2), (2, 2), rngs=rngs)
        self.norm = nnx.LayerNorm(4, epsilon=1e-6, rngs=rngs)
        self.out = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        x = self.transpose(nnx.relu(self.conv(x)))
        return self.out(self.norm(x.mean((1, 2))))


class LinenAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x, x)
        return nn.DenseGeneral((2, 3), axis=(-2, -1), name="out")(x)


class NnxAttention(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)
        self.out = nnx.LinearGeneral((5, 6), (2, 3), axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        return self.out(self.attention(x))


class LinenDense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="out")(nn.relu(nn.Dense(4, name="hidden")(x)))


class NnxDense(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.out = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


@pytest.mark.parametrize(
    "linen, factory, shape, rows",
    [
        (LinenDense(), NnxDense, (5, 3), ()),
        (LinenConvolutional(), NnxConvolutional, (5, 4, 4, 2), ()),
        (LinenAttention(), NnxAttention, (5, 5, 6), (5,)),  # a mode per example
    ],
)
def test_the_outputs_are_those_of_linen_with_the_same_weights(linen, factory, shape, rows):
    x = normal(1, *shape)
    there, here = from_linen(linen, x), from_nnx(lambda rngs: factory(rngs), x)
    params, _ = jax.jit(there.init)(KEY)
    own, _ = jax.eval_shape(here.init, KEY)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, own)
    assert list(here.layers) == list(there.layers)
    assert [vars(layer) for layer in here.layers.values()] == [
        vars(layer) for layer in there.layers.values()
    ]
    assert [vars(other) for other in here.layers.others.values()] == [
        vars(other) for other in there.layers.others.values()
    ]
    ours, theirs = jax.jit(here.apply), jax.jit(there.apply)
    close(ours(params, {}, x)[0], theirs(params, {}, x)[0])
    mode = {
        path: {"key": 1 + normal(2, *rows, layer.inputs), "bias": normal(3, *rows, layer.outputs)}
        for path, layer in here.layers.items()
    }
    close(ours(params, mode, x)[0], theirs(params, mode, x)[0])


# Modes.


def test_a_mode_adds_keys_and_biases_as_the_formula_says():
    x = normal(1, 5, 3)
    network = from_nnx(Nested(nnx.Rngs(0)), x)
    params, variables = network.init(KEY)
    assert variables == {}
    assert {path: layer.calls for path, layer in network.layers.items()} == {
        "inner/first": 1, "twice": 2, "out": 1,
    }  # fmt: skip
    assert "zwei" not in params
    mode = {
        "inner/first": {"key": normal(2, 3), "bias": normal(3, 4)},
        "twice": {"key": normal(4, 4), "bias": normal(5, 4)},
        "out": {"bias": normal(6, 2)},
    }
    h = jax.nn.relu((x * mode["inner/first"]["key"]) @ params["inner"]["first"]["kernel"]
                    + mode["inner/first"]["bias"])  # fmt: skip
    for _ in range(2):
        h = (h * mode["twice"]["key"]) @ params["twice"]["kernel"] + params["twice"]["bias"]
        h = h + mode["twice"]["bias"]
    expected = h @ params["out"]["kernel"] + params["out"]["bias"] + mode["out"]["bias"]
    close(network.apply(params, mode, x)[0], expected)


def test_one_mode_per_example_equals_one_pass_per_example():
    x = normal(1, 5, 4, 4, 2)
    network = from_nnx(NnxConvolutional(nnx.Rngs(0)), x)
    params, _ = network.init(KEY)
    mode = {
        path: {"key": 1 + normal(2, 5, layer.inputs), "bias": normal(3, 5, layer.outputs)}
        for path, layer in network.layers.items()
    }
    apply = jax.jit(network.apply)
    expected = [
        apply(params, jax.tree.map(lambda v, i=i: v[i], mode), x[i : i + 1])[0][0] for i in range(5)
    ]
    close(apply(params, mode, x)[0], jnp.stack(expected))


@pytest.mark.parametrize("layer, factor", [(Doubled, 2), (nnx.LoRALinear, 1)])
def test_a_subclass_takes_the_mode_where_it_calls_its_base(layer, factor):
    more = {"lora_rank": 2} if layer is nnx.LoRALinear else {}
    x = normal(1, 5, 3)
    network = from_nnx(lambda rngs: nnx.Sequential(layer(3, 2, rngs=rngs, **more)), x)
    assert network.layers["layers/0"].plain
    params, _ = network.init(KEY)
    mode = {"layers/0": {"bias": jnp.array([1.0, 5.0])}}
    difference = network.apply(params, mode, x)[0] - network.apply(params, {}, x)[0]
    close(difference, factor * jnp.tile(mode["layers/0"]["bias"], (5, 1)))


def test_a_subclass_that_does_not_call_its_base_is_no_layer():
    network = from_nnx(lambda rngs: nnx.Sequential(Bypassed(3, 2, rngs=rngs)), normal(1, 5, 3))
    assert not network.layers
    with pytest.raises(ValueError, match=r"'layers/0' \(Bypassed, which is not called\).*Linear"):
        matching(network.layers, ".*")


@pytest.mark.parametrize(
    "equation, kernel, shape, inputs, outputs",
    [
        ("nta,ab->ntb", (2, 3), (5, 4, 2), 2, 3),
        ("...a,ab->...b", (2, 3), (5, 4, 2), 2, 3),
        ("nta,hab->nthb", (6, 2, 3), (5, 4, 2), 2, 18),
        ("nta,tab->nb", (4, 2, 3), (5, 4, 2), 8, 3),
        ("nta,bat->nb", (3, 2, 4), (5, 4, 2), 8, 3),
    ],
)
def test_an_einsum_that_is_a_linear_layer_takes_a_mode(equation, kernel, shape, inputs, outputs):
    x = normal(1, *shape)
    model = nnx.Sequential(nnx.Einsum(equation, kernel, rngs=nnx.Rngs(0)))
    network = from_nnx(model, x)
    layer = network.layers["layers/0"]
    assert (layer.kind, layer.inputs, layer.outputs) == ("dense_general", inputs, outputs)
    params, _ = network.init(KEY)
    key, bias = normal(2, inputs), normal(3, outputs)
    contracted = shape[-1:] if inputs == 2 else shape[1:]
    y = jnp.einsum(equation, x * key.reshape(contracted), params["layers"]["0"]["kernel"])
    expected = y + bias.reshape(y.shape[-2:] if outputs == 18 else y.shape[-1:])
    close(network.apply(params, {"layers/0": {"key": key, "bias": bias}}, x)[0], expected)


@pytest.mark.parametrize(
    "equation, kernel",
    [
        ("nta,ta->nta", (4, 2)),  # multiplies each place by a weight of its own
        ("nta,tab->ntb", (4, 2, 3)),  # another kernel at each place
        ("nta,ab->nb", (2, 3)),  # adds up places without a kernel
        ("nta,ab->tnb", (2, 3)),  # the batch is no longer first
        ("nta,ab->nbt", (2, 3)),  # the features are not last
        ("nta,abc->ntb", (2, 3, 3)),  # adds up the kernel
        ("nta,bc->ntabc", (3, 3)),  # contracts nothing
        ("nta,...b->ntab", (1, 3)),  # an ellipsis in the kernel
    ],
)
def test_another_einsum_is_left_alone_and_refused_by_name(equation, kernel):
    x = normal(1, 5, 4, 2)
    model = nnx.Sequential(nnx.Einsum(equation, kernel, rngs=nnx.Rngs(0)))
    network = from_nnx(model, x)
    assert not network.layers
    with pytest.raises(ValueError, match=r"neither key nor bias: 'layers/0' \(Einsum\)"):
        matching(network.layers, ".*")
    params, _ = network.init(KEY)
    with pytest.raises(ValueError, match="'layers/0' is a Einsum, which takes neither"):
        network.apply(params, {"layers/0": {"bias": jnp.ones(3)}}, x)


# Transformations.


def test_jit_vmap_and_grad():
    x = normal(1, 5, 3)
    network = from_nnx(mlp, x)
    params, _ = network.init(KEY)
    biases = normal(2, 3, 2)

    def loss(bias, params):
        return network.apply(params, {"layers/2": {"bias": bias}}, x)[0].sum()

    plain = loss(jnp.zeros(2), params)
    close(jax.jit(jax.vmap(loss, (0, None)))(biases, params), plain + 5 * biases.sum(1))
    close(jax.jit(jax.grad(loss))(biases[0], params), jnp.full(2, 5.0))
    by_kernel = jax.grad(loss, argnums=1)(biases[0], params)["layers"]["2"]
    hidden = jax.nn.relu(x @ params["layers"]["0"]["kernel"])
    close(by_kernel["kernel"], jnp.tile(hidden.sum(0)[:, None], (1, 2)))


def test_a_factory_builds_a_network_per_key_under_vmap_and_jit():
    x = normal(1, 5, 4, 4, 2)
    network = from_nnx(lambda rngs: Residual(rngs), x)
    keys = jax.random.split(KEY, 3)
    many, variables = jax.jit(jax.vmap(network.init))(keys)
    assert variables["batch_stats"]["norm"]["mean"].shape == (3, 3)
    kernels = np.asarray(many["conv"]["kernel"])
    assert not np.allclose(kernels[0], kernels[1])
    close(kernels[2], network.init(keys[2])[0]["conv"]["kernel"])
    close(kernels[2], Residual(nnx.Rngs(keys[2])).conv.kernel[...])

    def run(params, variables):
        return network.apply(params, {}, x, variables=variables)[0]

    one = jax.tree.map(lambda leaf: leaf[1], (many, variables))
    close(jax.jit(jax.vmap(run))(many, variables)[1], jax.jit(run)(*one))


def test_a_network_of_lifted_layers():
    class Stacked(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=3)
            @nnx.vmap
            def make(rngs):
                return nnx.Linear(3, 3, rngs=rngs)

            self.stack, self.remat = make(rngs), nnx.Linear(3, 3, rngs=rngs)
            self.jit, self.out = nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x):
            @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            def scanned(layer, x):
                return layer(x)

            x = scanned(self.stack, x)
            x = nnx.remat(lambda layer, x: layer(x))(self.remat, x)
            return self.out(nnx.jit(lambda layer, x: layer(x))(self.jit, x))

    x = normal(1, 5, 3)
    network = from_nnx(Stacked(nnx.Rngs(0)), x)
    assert {path: layer.plain for path, layer in network.layers.items()} == {
        "stack": False, "remat": False, "jit": False, "out": True,
    }  # fmt: skip
    params, _ = network.init(KEY)

    def expected(mode):
        def layer(path, x, weights):
            return x @ weights["kernel"] + weights["bias"] + mode[path]["bias"]

        h = x
        for i in range(3):
            h = layer("stack", h, jax.tree.map(lambda leaf, i=i: leaf[i], params["stack"]))
        for path in ("remat", "jit", "out"):
            h = layer(path, h, params[path])
        return h

    for seed in (2, 3):  # nnx.jit must not keep the first mode
        mode = {
            path: {"bias": normal(seed, layer.outputs)} for path, layer in network.layers.items()
        }
        close(network.apply(params, mode, x)[0], expected(mode))
        close(jax.jit(network.apply)(params, mode, x)[0], expected(mode))
    with pytest.raises(ValueError, match="layer 'remat' lies within a lifted transformation"):
        network.tapped(params, {}, x, record=("remat",))


def test_passes_in_threads_and_within_each_other_do_not_mix():
    x = normal(1, 5, 3)
    network = from_nnx(mlp, x)
    params, _ = network.init(KEY)
    plain, _ = network.apply(params, {}, x)
    found = {}

    def run(shift):
        for _ in range(10):
            mode = {"layers/2": {"bias": jnp.full(2, float(shift))}}
            found.setdefault(shift, []).append(network.apply(params, mode, x)[0])

    threads = [threading.Thread(target=run, args=(shift,)) for shift in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for shift, outputs in found.items():
        close(jnp.stack(outputs), jnp.stack([plain + shift] * 10))


# Training.


def test_dropout_is_a_pure_function_of_the_key():
    x = normal(1, 5, 4, 4, 2)
    network = from_nnx(Residual(nnx.Rngs(0)), x)
    params, variables = network.init(KEY)

    def run(seed, **options):
        key = None if seed is None else jax.random.key(seed)
        return network.apply(params, {}, x, variables=variables, key=key, **options)[0]

    np.testing.assert_array_equal(run(1, train=True), run(1, train=True))
    close(jax.jit(lambda: run(1, train=True))(), run(1, train=True))
    assert not np.allclose(run(1, train=True), run(2, train=True))
    np.testing.assert_array_equal(run(1), run(None))
    np.testing.assert_array_equal(
        network.apply(params, {}, x, variables=variables, train=True, key=jax.random.PRNGKey(1))[0],
        run(1, train=True),
    )
    with pytest.raises(ValueError, match="draws random numbers in training.*key="):
        run(None, train=True)


@pytest.mark.parametrize("train", [True, False])
def test_each_random_stream_gets_numbers_of_its_own(train):
    class Streams(nnx.Module):
        def __init__(self, rngs):
            self.rngs = rngs
            self.first = nnx.Dropout(0.5, rngs=rngs)
            self.second = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            noise = [jax.random.normal(self.rngs.noise(), x.shape) for _ in range(2)]
            return jnp.stack([self.first(x), self.second(x), *noise], 1)

    x = jnp.ones((3, 20))
    network = from_nnx(Streams(nnx.Rngs(0, noise=1)), x)
    out = np.asarray(network.apply({}, {}, x, train=train, key=KEY)[0])
    pairs = [(2, 3)] if not train else [(0, 1), (2, 3)]
    assert all(not np.allclose(out[:, a], out[:, b]) for a, b in pairs)
    assert np.allclose(out[:, 0], 1) != train


@pytest.mark.parametrize("argument", ["none", "train", "use_running_average"])
def test_batch_norm_follows_the_batch_in_training_unless_it_is_frozen(argument):
    class Told(Residual):
        def __call__(self, x, train):
            x = self.norm(self.conv(x), use_running_average=not train)
            return self.out(x.mean((1, 2)))

    class Passed(Residual):
        def __call__(self, x, *, use_running_average, rngs):
            x = self.norm(self.conv(x), use_running_average)
            return self.out(self.dropout(x.mean((1, 2)), rngs=rngs))

    model = {"none": Residual, "train": Told, "use_running_average": Passed}[argument]
    x = 3 + normal(1, 5, 4, 4, 2)
    network = from_nnx(model(nnx.Rngs(0)), x)
    params, variables = network.init(KEY)
    options = {"variables": variables, "key": KEY}
    trained, changed = network.apply(params, {}, x, train=True, **options)
    h = jax.lax.conv_general_dilated(
        x, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    close(changed["batch_stats"]["norm"]["mean"], 0.1 * h.mean((0, 1, 2)))
    close(changed["batch_stats"]["norm"]["var"], 0.9 + 0.1 * h.var((0, 1, 2)))
    frozen, same = network.apply(params, {}, x, train=True, freeze_statistics=True, **options)
    assert jax.tree.all(jax.tree.map(np.array_equal, same, variables))
    evaluated, same = network.apply(params, {}, x, **options)
    assert same is variables
    assert not np.allclose(trained, evaluated)
    if argument == "train":  # no dropout there
        close(frozen, evaluated)
    with pytest.raises(ValueError, match=r"variables 'batch_stats'.*network.bind\(variables\)"):
        network.apply(params, {}, x)
    close(network.bind(variables).apply(params, {}, x)[0], evaluated)


def test_variables_of_other_types_and_constants_are_variables_too():
    class Counter(nnx.Variable):
        pass

    class Counting(nnx.Module):
        def __init__(self, rngs):
            self.steps = Counter(jnp.zeros((), jnp.int32))
            self.projection = jax.random.normal(rngs.params(), (3, 2))
            self.places = np.array([1, 0])
            self.is_training = None

        def __call__(self, x):
            if self.is_training:
                self.steps[...] += 1
            return (x @ self.projection)[:, self.places]

    x = normal(1, 5, 3)
    network = from_nnx(lambda rngs: Counting(rngs), x)
    params, variables = network.init(KEY)
    assert params == {}
    assert set(variables) == {"Counter", "constants"}
    close(network.apply({}, {}, x, variables=variables)[0],
          (x @ variables["constants"]["projection"])[:, ::-1])  # fmt: skip
    _, changed = network.apply({}, {}, x, variables=variables, train=True)
    assert int(changed["Counter"]["steps"]) == 1
    _, changed = network.apply({}, {}, x, variables=variables)
    assert int(changed["Counter"]["steps"]) == 0


def test_flags_of_other_names():
    class Switched(nnx.Module):
        def __init__(self):
            self.augment = False

        def __call__(self, x):
            return x + 1 if self.augment else x

    x = jnp.zeros((1, 1))
    network = from_nnx(Switched(), x, train_flags={**TRAIN_FLAGS, "augment": True})
    assert network.apply({}, {}, x, train=True)[0].item() == 1
    assert network.apply({}, {}, x)[0].item() == 0
    with pytest.raises(ValueError, match="the call of Switched.*attribute 'augmented'"):
        from_nnx(Switched(), x, train_flags={"augmented": True})


# Probes.


def test_probes_and_inputs_give_the_gradient_of_each_example():
    x = normal(1, 5, 3)
    network = from_nnx(mlp, x)
    params, _ = network.init(KEY)
    mode = {"layers/0": {"key": normal(2, 3), "bias": normal(3, 4)}}
    probes = {path: jnp.zeros((5, layer.outputs)) for path, layer in network.layers.items()}

    def loss_of(outputs):
        return (outputs**2).sum(-1)

    def probed(probes):
        outputs, inputs = network.tapped(params, mode, x, probes=probes, record=tuple(probes))
        return loss_of(outputs).sum(), inputs

    deltas, inputs = jax.jit(jax.grad(probed, has_aux=True))(probes)

    def one(params, example):
        return loss_of(network.apply(params, mode, example[None])[0])[0]

    expected = jax.vmap(jax.grad(one), (None, 0))(params, x)["layers"]
    for path in probes:
        (layer_input,) = inputs[path]
        place = path.split("/")[1]
        close(jnp.einsum("ni,no->nio", layer_input, deltas[path]), expected[place]["kernel"])
        close(deltas[path], expected[place]["bias"])
    close(inputs["layers/0"][0], x * mode["layers/0"]["key"])
    close(network.features(params, mode, x, ("layers/0",))["layers/0"], inputs["layers/0"][0])


def test_an_input_is_replaced_after_the_key():
    x = normal(1, 5, 3)
    network = from_nnx(mlp, x)
    params, _ = network.init(KEY)
    other = normal(2, 20)
    mode = {"layers/2": {"key": normal(3, 4)}}
    outputs, inputs = network.tapped(
        params, mode, x, replaced={"layers/2": other}, record=("layers/2",)
    )
    weights = params["layers"]["2"]
    close(outputs, other.reshape(5, 4) @ weights["kernel"] + weights["bias"])
    close(inputs["layers/2"][0], other.reshape(5, 4))


@pytest.mark.parametrize("tied", ["kernel", "bias"])
def test_a_layer_whose_parameters_another_one_shares_is_not_plain(tied):
    def build(rngs):
        first, second = nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)
        setattr(second, tied, getattr(first, tied))
        return nnx.Sequential(first, second, nnx.Linear(3, 2, rngs=rngs))

    network = from_nnx(build, normal(1, 5, 3))
    assert [layer.plain for layer in network.layers.values()] == [False, False, True]
    params, _ = network.init(KEY)
    assert tied not in params["layers"]["1"]


def test_a_layer_whose_kernel_is_not_the_one_in_the_parameters_is_not_plain():
    class Normalised(nnx.Module):
        """As nnx.WeightNorm does, which old versions of Flax have not."""

        def __init__(self, rngs):
            self.layer = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x):
            self.layer.kernel[...] = self.layer.kernel[...] / 2
            return self.layer(x)

    x = normal(1, 5, 3)
    network = from_nnx(Normalised(nnx.Rngs(0)), x)
    assert not network.layers["layer"].plain
    params, _ = network.init(KEY)
    before = jnp.copy(params["layer"]["kernel"])
    close(network.apply(params, {}, x)[0], x @ before / 2)
    np.testing.assert_array_equal(params["layer"]["kernel"], before)


# The size of a layer's outputs.


def measures(network, params, x, biases=0.0, **options):
    """The gradient of some loss for the measures of all layers, whose biases are all one number."""
    mode = {
        path: {"bias": jnp.full(layer.outputs, biases), "measure": jnp.zeros(2)}
        for path, layer in network.layers.items()
    }

    def loss(mode):
        return jnp.sum(jnp.sin(network.apply(params, mode, x, **options)[0]))

    eager, jitted = ({p: v["measure"] for p, v in g(mode).items()}
                     for g in (jax.grad(loss), jax.jit(jax.grad(loss))))  # fmt: skip
    for path, measure in eager.items():
        np.testing.assert_allclose(jitted[path], measure, rtol=1e-5)
    return eager


def squares_of(*outputs):
    """The sum of squares and the number of all elements of some arrays."""
    each = [np.asarray(y, np.float64) for y in outputs]
    return [sum((y**2).sum() for y in each), sum(y.size for y in each)]


@pytest.mark.parametrize(
    "linen, factory, shape",
    [
        (LinenDense(), NnxDense, (5, 3)),
        (LinenConvolutional(), NnxConvolutional, (5, 4, 4, 2)),
        (LinenAttention(), NnxAttention, (5, 5, 6)),
    ],
)
def test_layers_are_measured_as_in_linen(linen, factory, shape):
    x = normal(1, *shape)
    there, here = from_linen(linen, x), from_nnx(lambda rngs: factory(rngs), x)
    params, _ = there.init(KEY)
    expected = measures(there, params, x, 0.3)
    found = measures(here, params, x, 0.3)
    assert set(found) == set(expected)
    for path, measure in found.items():
        assert measure[0] > 0
        np.testing.assert_allclose(measure, expected[path], rtol=1e-4)


def test_a_layer_that_is_called_twice_is_measured_twice():
    x = normal(1, 5, 3)
    network = from_nnx(Nested(nnx.Rngs(0)), x)
    params, _ = network.init(KEY)
    found = measures(network, params, x, 0.3)
    first = x @ params["inner"]["first"]["kernel"]
    twice = params["twice"]
    once = jax.nn.relu(first + 0.3) @ twice["kernel"] + twice["bias"]
    again = (once + 0.3) @ twice["kernel"] + twice["bias"]
    out = (again + 0.3) @ params["out"]["kernel"] + params["out"]["bias"]
    np.testing.assert_allclose(found["inner/first"], squares_of(first), rtol=1e-5)
    np.testing.assert_allclose(found["twice"], squares_of(once, again), rtol=1e-5)
    np.testing.assert_allclose(found["out"], squares_of(out), rtol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_behind_a_batch_norm_its_output_is_measured(frozen):
    """On the statistics of the batch, or the running ones; before the bias is added."""

    class Plain(Residual):
        def __call__(self, x):
            return self.out(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))

    x = 3 + 20 * normal(1, 5, 4, 4, 2)  # before the norm outputs are far larger
    network = from_nnx(Plain(nnx.Rngs(0)), x)
    params, variables = network.init(KEY)
    found = measures(
        network, params, x, 0.5, variables=variables, train=True, freeze_statistics=frozen
    )
    y = (
        jax.lax.conv_general_dilated(
            x, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        + params["conv"]["bias"]
    )
    y = np.asarray(y, np.float64)
    mean, var = (0.0, 1.0) if frozen else (y.mean((0, 1, 2)), y.var((0, 1, 2)))
    normed = (y - mean) / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(found["conv"], squares_of(normed), rtol=1e-4)
    out = np.maximum(normed + 0.5, 0.0).mean((1, 2)) @ params["out"]["kernel"]
    np.testing.assert_allclose(found["out"], squares_of(out + params["out"]["bias"]), rtol=1e-4)


def test_lifted_layers_are_measured_at_all_their_calls():
    """Three in nnx.scan, and under nnx.remat none twice."""

    class Stacked(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=3)
            @nnx.vmap
            def make(rngs):
                return nnx.Linear(3, 3, rngs=rngs)

            self.stack, self.remat = make(rngs), nnx.Linear(3, 3, rngs=rngs)

        def __call__(self, x):
            @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            def scanned(layer, x):
                return layer(x)

            x = scanned(self.stack, x)
            return nnx.remat(lambda layer, x: layer(x))(self.remat, x)

    x = normal(1, 5, 3)
    network = from_nnx(Stacked(nnx.Rngs(0)), x)
    params, _ = network.init(KEY)
    found = measures(network, params, x, 0.3)
    h, outputs = x, []
    for i in range(3):
        outputs.append(h @ params["stack"]["kernel"][i] + params["stack"]["bias"][i])
        h = outputs[-1] + 0.3
    np.testing.assert_allclose(found["stack"], squares_of(*outputs), rtol=1e-5)
    last = h @ params["remat"]["kernel"] + params["remat"]["bias"]
    np.testing.assert_allclose(found["remat"], squares_of(last), rtol=1e-5)


def test_bd_has_relative_steps_on_a_network_of_nnx():
    x = normal(1, 5, 3)
    network = from_nnx(Nested(nnx.Rngs(0)), x)
    method = methods.bd(epsilon=0.5, hidden_dim=4)
    learner = bpnjax.learner(network, method, optax.sgd(0.1), num_tasks=1)
    state = learner.begin_task(learner.init(KEY), 0)
    found = measures(network, state.params, x)
    state, _ = learner.step(state, (np.asarray(x), np.array([0, 1, 0, 1, 1])))
    assert set(state.task_params) == set(found)
    for path, (square, size) in found.items():
        moved = np.abs(state.task_params[path]["bias"]["M"])
        np.testing.assert_allclose(moved, 0.5 * (square / size) ** 0.5, rtol=1e-4)


# What is left alone, and what is refused.


def test_nothing_of_the_module_is_changed():
    model = Residual(nnx.Rngs(0))
    x = normal(1, 5, 4, 4, 2)
    graphdef, state = nnx.split(model)
    before = jax.tree.map(jnp.copy, jax.tree.leaves(state))
    classes = [type(node) for _, node in nnx.iter_graph(model)]
    network = from_nnx(model, x)
    params, variables = network.init(KEY)
    mode = {"out": {"bias": jnp.ones(2)}}
    network.apply(params, mode, x, variables=variables, train=True, key=KEY)
    network.tapped(params, mode, x, variables=variables, record=("out",))

    # A step that donates the parameters takes only those of init.
    jax.jit(lambda p: jax.tree.map(lambda leaf: leaf + 1, p), donate_argnums=0)(params)
    after = nnx.split(model)
    assert after[0] == graphdef
    assert classes == [type(node) for _, node in nnx.iter_graph(model)]
    for old, new in zip(before, jax.tree.leaves(after[1]), strict=True):
        assert bool((old == new).all())
    assert nnx.Linear.__call__.__module__ == nnx.Linear.__module__
    again, _ = network.init(jax.random.key(1))
    close(again["out"]["kernel"], model.out.kernel[...])
    vmapped, _ = jax.vmap(network.init)(jax.random.split(KEY, 2))
    assert vmapped["out"]["kernel"].shape == (2, 3, 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_earlier_calls_have_left_in_the_module_is_no_variable():
    class Sowing(nnx.Module):
        def __init__(self, rngs):
            self.out = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x):
            self.sow(nnx.Intermediate, "seen", x)
            return self.out(x)

    x = normal(1, 5, 3)
    model = Sowing(nnx.Rngs(0))
    expected = model(x)
    network = from_nnx(model, x)
    params, variables = network.init(KEY)
    assert variables == {}
    close(network.apply(params, {}, x, train=True)[0], expected)


@pytest.mark.parametrize(
    "module, message",
    [
        (nnx.Linear, "the class Linear; pass an instance.*lambda rngs: Linear"),
        (nn.Dense(2), r"flax.linen \(Dense\); use networks.from_linen"),
        (nn.Dense, r"flax.linen \(Dense\); use networks.from_linen"),
        (3, "must be a flax.nnx Module, or a function.*not an int"),
        (lambda rngs: 3, "must be a function from nnx.Rngs.*returns int"),
        (
            nnx.eval_shape(lambda: nnx.Linear(3, 2, rngs=nnx.Rngs(0))),
            "'bias' holds a ShapeDtypeStruct",
        ),
        (lambda rngs: nnx.Linear(4, 2, rngs=rngs), r"Linear cannot be run on a batch of.*\(5, 3\)"),
    ],
)
def test_what_is_no_network_is_refused(module, message):
    with pytest.raises(ValueError, match=message):
        from_nnx(module, jax.ShapeDtypeStruct((5, 3), jnp.float32))


def test_modes_that_do_not_fit_are_refused():
    class Normed(nnx.Module):
        def __init__(self, rngs):
            self.norm, self.out = nnx.LayerNorm(3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)
            self.unused = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x):
            return self.out(self.norm(x))

    x = normal(1, 5, 3)
    network = from_nnx(Normed(nnx.Rngs(0)), x)
    assert list(matching(network.layers, "out|norm")) == ["out"]
    with pytest.raises(ValueError, match=r"'unused' \(Linear, which is not called\)"):
        matching(network.layers, ".*")
    params, _ = network.init(KEY)
    for mode, message in [
        (
            {"out": {"scale": jnp.ones(2)}},
            r"'out' has \['scale'\]; a layer has key, depthwise, gain",
        ),
        ({"out": {"bias": jnp.ones(3)}}, r"bias of layer 'out' has shape \(3,\).*\[2\]"),
        ({"out": {"key": jnp.ones((4, 3))}}, "first axis is not the batch of 4"),
        ({"outs": {"bias": jnp.ones(2)}}, "did not call: outs; it has out"),
        ({"unused": {"bias": jnp.ones(2)}}, "did not call: unused; it has out"),
        ({"norm": {"bias": jnp.ones(2)}}, "norm.*'norm' is a LayerNorm, which takes neither"),
    ]:
        with pytest.raises(ValueError, match=message):
            network.apply(params, mode, x)
    for options in ({"probes": {"outs": x}}, {"record": ("outs",)}, {"replaced": {"outs": x}}):
        with pytest.raises(ValueError, match="the network has no layer 'outs'; it has out"):
            network.tapped(params, {}, x, **options)
    with pytest.raises(ValueError, match="params has no 'norm/bias'"):
        network.apply({"out": params["out"]}, {}, x)


def test_batch_statistics_in_evaluation_are_refused():
    class Fixed(Residual):
        def __call__(self, x):
            return self.norm(self.conv(x), use_running_average=False)

    with pytest.raises(ValueError, match="evaluated example by example.*'norm' is told not to"):
        from_nnx(Fixed(nnx.Rngs(0)), normal(1, 5, 4, 4, 2))
