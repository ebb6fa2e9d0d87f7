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
from bpnjax.utils.errors import UserError

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
        x = networks.modulate(x, vectors)
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
        learner(methods.bd_ewc(step="absolute"), unseen).answering()
    with pytest.raises(ValueError, match="'conv' matches no layer; there are: hidden_0, output"):
        learner(methods.bd(layers="conv"), network)
    with pytest.raises(ValueError, match="Kronecker factors of .* are not known"):
        learner(methods.ewc_kfac(), network)


def test_a_function_without_an_example_is_trained_all_the_same():
    _, params = mlp()
    ends = []
    for network in (plain(params), plain(params, x=None)):
        method = methods.bd_ewc(hidden_dim=4, step="absolute")
        learner = bpnjax.learner(network, method, optax.sgd(0.1), num_tasks=2)
        state = learner.begin_task(learner.init(jax.random.key(0)), 0)
        state, metrics = learner.step(state, (np.asarray(X), np.asarray(Y)))
        state = learner.end_task(state, (np.asarray(X), np.asarray(Y)))
        ends.append((learner.apply(state, X, np.arange(6) % 2), metrics, state.params))
    same(*ends)


# The size of a layer's outputs.


def squares_of(y):
    """The sum of squares and the size of an array, or of several."""
    arrays = [np.asarray(a, np.float64) for a in (y if isinstance(y, list) else [y])]
    return np.array([sum((a**2).sum() for a in arrays), sum(a.size for a in arrays)])


def test_the_gradient_for_a_measure_is_the_size_of_the_array_whatever_the_loss():
    y = jax.random.normal(jax.random.key(0), (4, 3))
    losses = [jnp.sum, lambda y: 1e-6 * jnp.sum(jnp.sin(y)), lambda y: 0.0 * jnp.sum(y),
              lambda y: jax.nn.logsumexp(y)]  # fmt: skip
    for loss in losses:
        for measure in (jnp.zeros(2), jnp.array([5.0, -7.0])):

            def measured_loss(y, m, loss=loss):
                return loss(networks.measured(y, m))

            both = jax.value_and_grad(measured_loss, (0, 1))
            for run in (both, jax.jit(both)):
                value, (of_y, of_measure) = run(y, measure)
                np.testing.assert_allclose(of_measure, squares_of(y), rtol=1e-6)
                np.testing.assert_allclose(of_y, jax.grad(loss)(y), rtol=1e-6)
                np.testing.assert_allclose(value, loss(y), rtol=1e-6)
    np.testing.assert_array_equal(networks.measured(y, jnp.zeros(2)), y)


def test_an_array_that_nothing_reads_is_not_measured():
    """As a layer's output in front of the BatchNorm behind which it is measured."""
    y = jax.random.normal(jax.random.key(0), (4, 3))

    def loss(m):
        unread = networks.measured(y, m) + 1.0
        assert unread.shape == (4, 3)
        return jnp.sum(networks.measured(2.0 * y, m))

    for of in (loss, jax.checkpoint(loss)):
        for gradient in (jax.grad(of), jax.jit(jax.grad(of))):
            np.testing.assert_allclose(gradient(jnp.zeros(2)), squares_of(2.0 * y), rtol=1e-6)


def test_a_measure_of_bfloat16_outputs_is_of_single_precision():
    """Their size in bfloat16 would be wrong from 257 elements on."""
    y = jnp.full((7, 1001), 0.5, jnp.bfloat16)

    def loss(y, m):
        out = networks.measured(y, m)
        assert out.dtype == jnp.bfloat16
        return jnp.sum(out.astype(jnp.float32))

    of_y, of_measure = jax.grad(loss, (0, 1))(y, jnp.zeros(2))
    assert (of_y.dtype, of_measure.dtype) == (jnp.bfloat16, jnp.float32)
    assert of_measure.tolist() == [7007 * 0.25, 7007.0]


def test_measures_under_vmap():
    """Of each array where each has a measure of its own, and of all where they share one."""
    y = jax.random.normal(jax.random.key(0), (5, 4, 3))

    def loss(m, y):
        return jnp.sum(jnp.cos(networks.measured(y, m)))

    each = jax.vmap(jax.grad(loss), (None, 0))(jnp.zeros(2), y)
    own = jax.jit(jax.vmap(jax.grad(loss)))(jnp.zeros((5, 2)), y)
    for found in (each, own):
        np.testing.assert_allclose(found, [squares_of(row) for row in y], rtol=1e-5)
    shared = jax.grad(lambda m: jnp.sum(jax.vmap(loss, (None, 0))(m, y)))(jnp.zeros(2))
    np.testing.assert_allclose(shared, squares_of(y), rtol=1e-5)
    one = jax.grad(lambda m: jnp.sum(jax.vmap(loss, (0, None))(m, y[0])))(jnp.zeros((2, 2)))
    np.testing.assert_allclose(one, [squares_of(y[0])] * 2, rtol=1e-5)


def test_measures_of_micro_batches_add_up_to_that_of_the_batch():
    """So does one in a scan or a loop, and under jax.checkpoint nothing is counted twice."""
    y = jax.random.normal(jax.random.key(0), (6, 4))

    def loss(m, y):
        return jnp.sum(jnp.sin(networks.measured(y, m)))

    parts = [jax.grad(loss)(jnp.zeros(2), y[i : i + 2]) for i in (0, 2, 4)]
    np.testing.assert_allclose(sum(parts), squares_of(y), rtol=1e-5)

    def scanned(m):
        return jax.lax.scan(lambda sum, row: (sum + loss(m, row), None), 0.0, y)[0]

    again = jax.checkpoint(lambda m: loss(m, y))
    for total in (scanned, again, jax.checkpoint(scanned)):
        np.testing.assert_allclose(jax.jit(jax.grad(total))(jnp.zeros(2)), squares_of(y), rtol=1e-5)


def test_examples_count_in_a_measure_with_their_weights():
    """Those of weight 0 not at all, whatever stands in them; the loss is not weighted."""
    y = np.array(jax.random.normal(jax.random.key(0), (4, 3, 2)))
    weight = jnp.array([1.0, 0.0, 2.0, 0.0])
    square = (y.astype(np.float64) ** 2).sum((1, 2))
    expected = [square[0] + 2 * square[2], 3 * 6]

    def loss(m, y, w=weight):
        return jnp.sum(jnp.where(jnp.isfinite(y), networks.measured(y, m, w), 0.0))

    for padding in (y[1], 1e3, jnp.inf, jnp.nan):
        y[1], y[3] = padding, padding
        for gradient in (jax.grad(loss), jax.jit(jax.grad(loss))):
            np.testing.assert_allclose(gradient(jnp.zeros(2), y), expected, rtol=1e-6)
    y[1], y[3] = 0.0, 0.0
    ones, halves = (jax.grad(loss)(jnp.zeros(2), y, jnp.full(4, w)) for w in (1.0, 0.5))
    np.testing.assert_allclose(ones, squares_of(y), rtol=1e-6)
    np.testing.assert_allclose(halves, 0.5 * ones, rtol=1e-6)  # the ratio is the same
    # A device that got padding only adds nothing to the sum over devices.
    assert jax.grad(loss)(jnp.zeros(2), y, jnp.zeros(4)).tolist() == [0.0, 0.0]
    both = jax.grad(lambda y: loss(jnp.zeros(2), y))(y)
    np.testing.assert_array_equal(both, 1.0)


def test_weights_of_examples_in_arrays_of_other_shapes():
    """Rows of examples one after another count like their example; what is no batch counts all."""
    y = jax.random.normal(jax.random.key(0), (6, 3))

    def found(y, weight):
        of = jax.grad(lambda m: jnp.sum(networks.measured(y, m, jnp.array(weight))))
        return of(jnp.zeros(2))

    np.testing.assert_allclose(found(y, [1.0, 0.0]), squares_of(y[:3]), rtol=1e-6)
    np.testing.assert_allclose(found(y, [1.0, 0.0, 1.0, 0.0]), squares_of(y), rtol=1e-6)
    np.testing.assert_allclose(found(jnp.float32(3.0), [1.0, 0.0]), [9.0, 1.0])


def test_modulate_adds_and_measures_what_it_is_given():
    y = jax.random.normal(jax.random.key(0), (4, 3))
    bias = jnp.arange(3.0)
    np.testing.assert_array_equal(networks.modulate(y, {}), y)
    np.testing.assert_array_equal(networks.modulate(y, {"key": jnp.ones(5)}), y)
    np.testing.assert_array_equal(networks.modulate(y, {"bias": bias}), y + bias)

    def loss(vectors):
        return jnp.sum(jnp.square(networks.modulate(y, vectors)))

    found = jax.grad(loss)({"bias": bias, "measure": jnp.zeros(2)})
    np.testing.assert_allclose(found["measure"], squares_of(y), rtol=1e-5)  # without the bias
    np.testing.assert_allclose(found["bias"], 2 * (y + bias).sum(0), rtol=1e-5)
    only = jax.grad(loss)({"measure": jnp.zeros(2)})["measure"]
    np.testing.assert_allclose(only, squares_of(y), rtol=1e-5)
    some = {"measure": jnp.zeros(2), "weight": jnp.array([1.0, 1.0, 0.0, 0.0])}
    np.testing.assert_allclose(jax.grad(loss)(some)["measure"], squares_of(y[:2]), rtol=1e-5)
    np.testing.assert_array_equal(networks.modulate(y, {"weight": some["weight"]}), y)


def test_a_function_is_measured_like_a_module():
    """The layers of the same network in both forms, in a mode with keys and biases."""
    network, params = mlp()
    mode = {path: {**vectors, "measure": jnp.zeros(2)} for path, vectors in MODE.items()}

    def of(network):
        def loss(mode):
            logits, _ = network.apply(params, mode, X)
            return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()

        return {path: found["measure"] for path, found in jax.grad(loss)(mode).items()}

    expected = {}
    for path, inputs in network.features(params, MODE, X, list(network.layers)).items():
        expected[path] = squares_of(inputs @ params[path]["kernel"] + params[path]["bias"])
    for form in (network, plain(params), network.with_input(lambda x: x)):
        same(of(form), expected, rtol=1e-5)


def test_bd_on_a_function_is_bd_on_the_module():
    network, params = mlp()
    ends = []
    for form in (network, plain(params)):
        learner = bpnjax.learner(form, methods.bd(hidden_dim=4), optax.sgd(0.1), num_tasks=2)
        state = learner.init(jax.random.key(0))
        state = learner.begin_task(state.replace(params=jax.tree.map(jnp.array, params)), 1)
        for _ in range(3):
            state, _ = learner.step(state, (X, Y))
        ends.append(learner.end_task(state, (X, Y)))
    same(ends[0].method, ends[1].method, rtol=1e-4, atol=1e-6)
    same(ends[0].params, ends[1].params, rtol=1e-4, atol=1e-6)
    assert all(np.abs(vectors["bias"][1]).max() > 0.1 for vectors in ends[0].method.values())


def silent(params, mode, x):
    """It adds the biases, but shows the size of the hidden layer's outputs only."""
    hidden = networks.modulate(x @ params["hidden_0"]["kernel"], mode.get("hidden_0", {}))
    out = jax.nn.relu(hidden) @ params["output"]["kernel"]
    return out + mode.get("output", {}).get("bias", 0.0)


@pytest.mark.parametrize(
    "method",
    [methods.bd(), methods.bd_ewc(), methods.gd_matched(), methods.plain_bias(step="relative")],
    ids=["bd", "bd_ewc", "gd_matched", "plain_bias"],
)
def test_a_function_that_does_not_show_the_size_of_its_outputs_is_refused(method):
    """In one line with the remedy; NaN biases would be the alternative."""
    _, params = mlp()
    network = networks.from_function(silent, lambda key: params, WIDTHS, x=X)
    words = (
        r"bd\.step: the network is a function that does not show the size of the outputs of "
        r"output; pass them through networks\.modulate\(y, mode\.get\('output', {}\)\), or choose "
        r"step='absolute'"
    )
    for given in (network, network.with_input(lambda x: 2.0 * x)):
        with pytest.raises(UserError, match=words) as refused:
            bpnjax.learner(given, method, optax.sgd(0.1), num_tasks=2)
    assert "\n" not in str(refused.value)


def test_a_function_that_is_not_measured_has_what_needs_no_size():
    _, params = mlp()
    network = networks.from_function(silent, lambda key: params, WIDTHS, x=X)
    for method in (
        methods.bd(step="absolute"), methods.gd(), methods.gd_matched(step="absolute"),
        methods.plain_bias(), methods.bd(layers="hidden_0"),
    ):  # fmt: skip
        learner = bpnjax.learner(network, method, optax.sgd(0.1), num_tasks=1)
        state = learner.begin_task(learner.init(jax.random.key(0)), 0)
        for _ in range(2):
            state, _ = learner.step(state, (X, Y))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.task_params))


@pytest.mark.parametrize(
    "options, who",
    [
        ({}, r"a step relative to the outputs of layers \(bd\.step\)"),
        ({"modulation": "gain"}, r"bd\.modulation=gain"),
        ({"modulation": "mask", "step": "absolute"}, r"bd\.modulation=mask"),
    ],
)
def test_a_function_of_which_no_example_is_known(options, who):
    """Whether it reads and measures cannot be seen then; it is said before training."""
    _, params = mlp()
    with pytest.raises(UserError, match=rf"^x: {who} must know the shape of an ex.*x="):
        bpnjax.learner(plain(params, x=None), methods.bd(**options), optax.sgd(0.1), num_tasks=1)


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
