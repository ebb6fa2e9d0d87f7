"""One head per task: outputs laid out per task, losses, importance and replay within a head."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import Jitted, digits_config, whole_registry

import bpnjax
from bpnjax import importance, methods, networks
from bpnjax.data import load_sequence
from bpnjax.models import MLP, ConvNet
from bpnjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_once")


def multi(method="sgd", **changes):
    return digits_config(method, sequence__heads="multi", **changes)


def test_tasks_that_share_classes_get_outputs_of_their_own():
    sequence = load_sequence(multi(sequence__classes="7,2;2,9"))
    assert sequence.num_classes == 4 and sequence.class_names == ("7", "2", "2", "9")
    assert sequence.classes.tolist() == [[True, True, False, False], [False, False, True, True]]
    assert sequence.columns.tolist() == [[0, 1, 0], [0, 2, 3]]  # of 7, 2 and 9


def test_permuted_tasks_have_ten_outputs_each():
    sequence = load_sequence(multi(sequence__kind="permuted"))
    assert sequence.classes.shape == (3, 30)
    np.testing.assert_array_equal(sequence.columns, np.arange(30).reshape(3, 10))
    single = load_sequence(digits_config("sgd", sequence__kind="permuted"))
    assert single.classes.all() and single.classes.shape == (3, 10)


@pytest.mark.parametrize("method", whole_registry())
def test_every_method_learns_with_a_head_per_task(method):
    jitted = Jitted(multi(method, sequence__num_tasks=2))
    key = jax.random.key(0)
    start = jitted.init(key).learner.params["output"]["kernel"]
    joint = jitted.experiment.jointly
    state, _ = jitted.train(key, [1] if joint else [0], epochs=8)
    if not joint:
        # Nothing pulls at a head whose task has not come, unless all logits are to be kept.
        if method not in ("der", "derpp", "stl"):
            ours = state.learner.params["output"]["kernel"]
            np.testing.assert_array_equal(ours[:, 2:], start[:, 2:])
        state, _ = jitted.train_task(state, 1, epochs=8)
    found = jitted.test(state, 1)
    assert found["task_masked"].min() > 0.8, found


def test_a_replayed_example_counts_within_the_head_of_its_own_task():
    """A method's hooks get such losses, and so does a step on the examples of several tasks."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 5)).astype(np.float32)
    y, task = np.array([0, 1, 2, 5]), np.array([0, 0, 1, 2])

    def record(old, new, grads, state, batch, ctx):
        return new, (ctx.outputs(old, x, task), ctx.losses(old, x, y, task))

    watching = methods.Method(
        init=lambda key, params, setup: (jnp.zeros((4, 6)), jnp.zeros(4)), end_step=record
    )
    network = networks.from_linen(MLP((3,), 6), x)
    classes = [[0, 1], [2, 3], [4, 5]]
    learner = bpnjax.learner(
        network, watching, optax.sgd(0.1), num_tasks=3, classes=classes, heads="multi"
    )
    state = learner.begin_task(learner.init(jax.random.key(0)), 2)
    state, metrics = learner.step(state, (x[3:], y[3:]))
    logits, losses = state.method
    for z, label, loss in zip(logits, y, losses, strict=True):
        head = z[label // 2 * 2 : label // 2 * 2 + 2]
        np.testing.assert_allclose(loss, -jax.nn.log_softmax(head)[label % 2], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], losses[3], rtol=1e-5)

    joint = bpnjax.learner(
        network, methods.joint(), optax.sgd(0.1), num_tasks=3, classes=classes, heads="multi"
    )
    state = joint.begin_task(joint.init(jax.random.key(0)), 2)
    _, metrics = joint.step(state, (x, y, np.ones(4, np.float32), task))
    np.testing.assert_allclose(metrics["loss"], losses.mean(), rtol=1e-5)


def test_heads_need_classes_and_cross_entropy():
    network = networks.from_linen(MLP((), 4), jnp.zeros((1, 2)))
    with pytest.raises(UserError, match=r"heads='multi'.* pass bpnjax.learner\(..., classes="):
        bpnjax.learner(network, methods.sgd(), optax.sgd(0.1), num_tasks=2, heads="multi")
    with pytest.raises(UserError, match="loss: a head per task .* cross-entropy"):
        bpnjax.learner(
            network, methods.sgd(), optax.sgd(0.1), num_tasks=2, heads="multi",
            classes=[[0, 1], [2, 3]], loss=lambda z, y: jnp.square(z - y).mean(-1),
        )  # fmt: skip


MODELS = {
    "mlp": (MLP((8, 8), 5), (7, 5)),
    "convnet": (ConvNet((2,), (4,), 5), (7, 6, 6, 1)),
}


@pytest.mark.parametrize("name", MODELS)
def test_importance_within_a_head_equals_that_of_a_network_with_this_head_only(name):
    model, shape = MODELS[name]
    x = jax.random.normal(jax.random.key(0), shape)
    network = networks.from_linen(model, x)
    small = networks.from_linen(model.clone(num_classes=2), x)
    params, _ = network.init(jax.random.key(1))
    cut = {**params, "output": jax.tree.map(lambda p: p[..., 3:], params["output"])}
    head = jnp.array([False, False, False, True, True])
    labels = jnp.arange(7) % 2
    found = {
        kind: importance.fisher_sum(network, params, {}, x, labels + 3, kind=kind, classes=head)
        for kind in ("empirical", "true")
    } | {"mas": importance.sensitivity_sum(network, params, {}, x, classes=head)}
    expected = {
        kind: importance.fisher_sum(small, cut, {}, x, labels, kind=kind)
        for kind in ("empirical", "true")
    } | {"mas": importance.sensitivity_sum(small, cut, {}, x)}
    for kind, tree in found.items():
        np.testing.assert_allclose(tree["output"]["kernel"][:, :3], 0.0, atol=1e-7)
        tree["output"] = jax.tree.map(lambda p: p[..., 3:], tree["output"])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
            tree, expected[kind],
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["output_norm", "loss"])
def test_importance_of_units_is_the_mean_size_of_their_gradients(kind):
    """The gradient of a bias is that of the sum which its unit puts into the nonlinearity."""
    model, shape = MODELS["mlp"]
    x = jax.random.normal(jax.random.key(0), shape)
    network = networks.from_linen(model, x)
    params, _ = network.init(jax.random.key(1))
    labels = jnp.arange(7) % 5

    def measured(params, x_i, y):
        z = model.apply({"params": params}, x_i[None])[0]
        return jnp.sum(z**2) if kind == "output_norm" else -jax.nn.log_softmax(z)[y]

    each = [jax.grad(measured)(params, x_i, y) for x_i, y in zip(x, labels, strict=True)]
    found = importance.neurons(network, params, {}, x, labels, of=kind)
    assert set(found) == {"hidden_0", "hidden_1", "output"}
    for path, a in found.items():
        expected = np.mean([np.abs(g[path]["bias"]) for g in each], axis=0)
        np.testing.assert_allclose(a, expected, rtol=1e-3, atol=1e-6)
    if kind == "output_norm":
        with pytest.raises(ValueError, match="unknown importance 'both'; use one of loss"):
            importance.neurons(network, params, {}, x, labels, of="both")
