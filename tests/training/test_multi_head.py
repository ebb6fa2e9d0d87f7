"""One head per task: outputs laid out per task, losses, importance and replay within a head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import Jitted, digits_config, whole_registry

from bpnjax import importance
from bpnjax.data import load_sequence
from bpnjax.models import MLP, ConvNet
from bpnjax.training.recall import make_examples

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
def test_every_method_learns_with_a_head_a_task(method):
    jitted = Jitted(multi(method, sequence__num_tasks=2))
    key = jax.random.key(0)
    start = jitted.init(key)
    joint = jitted.problem.method.joint
    state, _ = jitted.train(key, [1] if joint else [0], epochs=8)
    if not joint:
        # Nothing pulls at a head whose task has not come, unless all logits are to be kept.
        if method not in ("der", "derpp", "stl"):
            np.testing.assert_array_equal(
                state.core["output"]["kernel"][:, 2:], start.core["output"]["kernel"][:, 2:]
            )
        state = jitted.begin_task(key, state, 1)
        for epoch in range(8):
            state, _ = jitted.run_steps(key, state, jitted.data, 1, epoch, 0, 6)
        state = jitted.end_task(key, state, jitted.data, 1)
    found = jitted.test(key, state, 1)
    assert found["task_masked"].min() > 0.8, found


def test_replayed_losses_are_those_of_each_examples_head():
    jitted = Jitted(multi())
    key = jax.random.key(0)
    core = jitted.init(key).core
    examples = make_examples(jitted.problem, key, jitted.data)
    width = jitted.data.train.index.shape[1]
    slots = jnp.array([0, 1, width, 2 * width + 3])
    logits, labels = examples.logits(core, slots), examples.labels(slots)
    assert (labels // 2).tolist() == [0, 0, 1, 2]
    for z, y, loss in zip(logits, labels, examples.losses(core, slots), strict=True):
        head = z[y // 2 * 2 : y // 2 * 2 + 2]
        np.testing.assert_allclose(loss, -jax.nn.log_softmax(head)[y % 2], rtol=1e-5)


MODELS = {
    "mlp": (MLP((8, 8), 5), (7, 5)),
    "convnet": (ConvNet((2,), (4,), 5), (7, 6, 6, 1)),
}


@pytest.mark.parametrize("name", MODELS)
def test_importance_within_a_head_equals_that_of_a_network_with_this_head_only(name):
    model, shape = MODELS[name]
    x = jax.random.normal(jax.random.key(0), shape)
    params = model.init(jax.random.key(1), x)["params"]
    small = model.clone(num_classes=2)
    cut = {**params, "output": jax.tree.map(lambda p: p[..., 3:], params["output"])}
    head = jnp.array([False, False, False, True, True])
    labels = jnp.arange(7) % 2
    found = {
        kind: importance.fisher_sum(model, params, {}, x, labels + 3, kind=kind, classes=head)
        for kind in ("empirical", "true")
    } | {"mas": importance.sensitivity_sum(model, params, {}, x, classes=head)}
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
    params = model.init(jax.random.key(1), x)["params"]
    labels = jnp.arange(7) % 5

    def measured(params, x_i, y):
        z = model.apply({"params": params}, x_i[None])[0]
        return jnp.sum(z**2) if kind == "output_norm" else -jax.nn.log_softmax(z)[y]

    each = [jax.grad(measured)(params, x_i, y) for x_i, y in zip(x, labels, strict=True)]
    found = importance.neurons(model, params, {}, x, labels, of=kind)
    assert set(found) == {"hidden_0", "hidden_1", "output"}
    for path, a in found.items():
        expected = np.mean([np.abs(g[path]["bias"]) for g in each], axis=0)
        np.testing.assert_allclose(a, expected, rtol=1e-3, atol=1e-6)
    if kind == "output_norm":
        with pytest.raises(ValueError, match="unknown importance 'both'; use one of loss"):
            importance.neurons(model, params, {}, x, labels, of="both")
