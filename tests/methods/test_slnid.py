"""Inhibition against a double loop; what SLNID adds to MAS and to EWC."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import Jitted, changed, digits_config

from bpnjax.methods.slnid import hidden_layers, inhibition
from bpnjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.mark.parametrize("discount", ["sum", "max"])
@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_inhibition_by_hand(scale, discount):
    rng = np.random.default_rng(0)
    units, importance = np.abs(rng.normal(size=(5, 6))), rng.gamma(1.0, size=6)
    expected = 0.0
    for i in range(6):
        for j in range(6):
            if i == j:
                continue
            both = importance[i] + importance[j]
            both = both if discount == "sum" else max(importance[i], importance[j])
            near = np.exp(-((i - j) ** 2) / (2 * (6 / scale) ** 2)) if scale else 1.0
            expected += np.exp(-both) * near * np.mean(units[:4, i] * units[:4, j])
    weight = jnp.array([1.0, 1.0, 1.0, 1.0, 0.0])  # the last example is padding
    got = inhibition(jnp.asarray(units), jnp.asarray(importance), weight, scale, discount)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_only_hidden_layers_that_feed_a_dense_layer_are_inhibited():
    convnet = Jitted(digits_config("slnid", model__name="convnet", model__channels=(4,),
                                   model__hidden=(8, 6)))  # fmt: skip
    assert hidden_layers(convnet.learner.network.layers) == {
        "hidden_0": "hidden_1", "hidden_1": "output"}  # fmt: skip
    with pytest.raises(UserError, match="method: slnid .* set --config.model.hidden"):
        Jitted(digits_config("slnid", model__hidden=()))


@pytest.mark.parametrize("on", ["mas", "ewc"])
def test_without_strength_it_is_the_method_it_stands_on(on):
    key = jax.random.key(0)
    strength = {f"{on}__strength": 0.5, f"{on}__form": "proximal"}
    plain, _ = Jitted(digits_config(on, **strength)).train(key, [0, 1], epochs=2)
    same = digits_config("slnid", slnid__on=on, slnid__strength=0.0, slnid__anchor_strength=0.5)
    same, _ = Jitted(same).train(key, [0, 1], epochs=2)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        plain.learner.params, same.learner.params,
    )  # fmt: skip


@pytest.mark.parametrize("on", ["mas", "ewc"])
def test_one_step_adds_the_gradient_of_the_inhibition(on):
    """The second task's first step, with the first task's units discounted."""
    changes = dict(train__optimizer="sgd", train__learning_rate=0.1, slnid__on=on,
                   slnid__strength=0.5, slnid__anchor_strength=0.0)  # fmt: skip
    key = jax.random.key(0)
    with_it = Jitted(digits_config("slnid", **changes))
    state, _ = with_it.train(key, [0], epochs=1)
    state = with_it.begin_task(state, 1)
    moved, _ = with_it.run_steps(state, with_it.data, 1, 0, 0, 1)
    before = state.learner.params
    plain = Jitted(digits_config("sgd", train__optimizer="sgd", train__learning_rate=0.1))
    straight = changed(plain.init(key), params=before)
    straight, _ = plain.run_steps(straight, plain.data, 1, 0, 0, 1)
    x = with_it.learner.network.prepare(with_it.epoch(key, 1, 0)[0][0])

    def units(params):
        hidden = params["hidden_0"]
        return jax.nn.relu(x.reshape(len(x), -1) @ hidden["kernel"] + hidden["bias"])

    a = state.learner.method.importance["hidden_0"]
    assert float(a.min()) >= 0 and float(a.max()) > 0
    place = np.arange(16)
    near = np.exp(-((place[:, None] - place) ** 2) / (2 * (16 / 6) ** 2))
    factor = jnp.asarray(near * (1 - np.eye(16))) * jnp.exp(-(a[:, None] + a))

    def loss(params):
        return jnp.einsum("ij,bi,bj->", factor, units(params), units(params)) / len(x)

    for layer, leaves in jax.grad(loss)(before).items():
        for name, g in leaves.items():
            expected = straight.learner.params[layer][name] - 0.1 * 0.5 * g
            ours = moved.learner.params[layer][name]
            np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-5)


def test_importance_of_units_adds_up_over_tasks():
    jitted = Jitted(digits_config("slnid"))
    key = jax.random.key(0)
    one, _ = jitted.train(key, [0], epochs=1)
    two, _ = jitted.train(key, [0, 1], epochs=1)
    before, after = (s.learner.method.importance["hidden_0"] for s in (one, two))
    assert (np.asarray(after) >= np.asarray(before)).all() and (after > before).any()
