"""Kronecker factors and their anchor against definitions and dense algebra."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import Jitted, changed, digits_config

from bpnjax import networks
from bpnjax.importance import kronecker
from bpnjax.methods.ewc_kfac import joined
from bpnjax.training import epochs
from bpnjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_once")


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="out")(jnp.tanh(nn.Dense(4, name="hidden")(x)))


def test_factors_are_second_moments_of_inputs_and_of_derivatives():
    """By one backward pass an example; keys count, since they change what a layer sees."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 3, 6))
    key = jnp.asarray(rng.choice([-1.0, 1.0], 5), jnp.float32)
    network = networks.from_linen(Net(), x)
    params, _ = network.init(jax.random.key(0))
    found = kronecker.factors(network, params, {"hidden": {"key": key}}, x, y)

    inputs, outputs = np.zeros((6, 6)), np.zeros((4, 4))
    for x_i, y_i in zip(x, y, strict=True):

        def loss(z, y_i=y_i):
            out = params["out"]
            return -jax.nn.log_softmax(jnp.tanh(z) @ out["kernel"] + out["bias"])[y_i]

        a = np.append(x_i * key, 1.0)
        hidden = params["hidden"]
        d = np.asarray(jax.grad(loss)((x_i * key) @ hidden["kernel"] + hidden["bias"]))
        inputs += np.outer(a, a) / 6
        outputs += np.outer(d, d) / 6
    np.testing.assert_allclose(found["hidden"].inputs, inputs, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["hidden"].outputs, outputs, rtol=1e-4, atol=1e-7)


def test_weights_of_padding_and_the_head_count():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 5)), jnp.float32)
    y = jnp.array([0, 1, 0, 1])
    network = networks.from_linen(Net(), x)
    params, _ = network.init(jax.random.key(0))
    weights, head = jnp.array([1.0, 1.0, 0.0, 0.0]), jnp.array([True, True, False])
    some = kronecker.factors_sum(network, params, {}, x, y, weights=weights, classes=head)
    first = kronecker.factors_sum(network, params, {}, x[:2], y[:2], classes=head)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), some, first)
    np.testing.assert_allclose(some["out"].outputs[2], 0.0, atol=1e-12)  # outside the head


def test_pull_back_solves_its_minimisation():
    """Against the dense linear system (1 + s A (x) G) vec Z = vec theta + s A (x) G vec anchor."""
    rng = np.random.default_rng(2)
    a, g = (m @ m.T for m in (rng.normal(size=(4, 4)), rng.normal(size=(3, 3))))
    theta, anchor = rng.normal(size=(2, 4, 3))
    basis = kronecker.diagonalise(kronecker.Factors(jnp.asarray(a), jnp.asarray(g)), 0.5)
    found = kronecker.pull_back(jnp.asarray(theta), jnp.asarray(anchor), basis, 0.7)
    penalty = 0.7 * 0.5 * np.kron(a, g)
    expected = np.linalg.solve(np.eye(12) + penalty, theta.ravel() + penalty @ anchor.ravel())
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-3, atol=1e-4)


def test_a_huge_strength_is_finite_and_keeps_what_tasks_used():
    basis = kronecker.diagonalise(kronecker.Factors(jnp.diag(jnp.array([1.0, 0.0])), jnp.eye(1)))
    found = kronecker.pull_back(jnp.array([[5.0], [5.0]]), jnp.zeros((2, 1)), basis, 1e30)
    np.testing.assert_allclose(found.ravel(), [0.0, 5.0], atol=1e-20)


def test_factors_add_up_over_tasks_and_the_first_task_is_free():
    jitted = Jitted(digits_config("ewc_kfac", train__epochs=2))
    key = jax.random.key(0)
    state = jitted.train(key, [0])[0].learner
    one = state.method
    assert int(one.tasks) == 1 and not np.array_equal(one.basis["output"].curvature, 0)
    jax.tree.map(np.testing.assert_array_equal, one.anchor, state.params)
    free, _ = Jitted(digits_config("sgd", train__epochs=2)).train(key, [0])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        free.learner.params, state.params,
    )  # fmt: skip

    both = jitted.train(key, [0, 1])[0].learner.method
    assert int(both.tasks) == 2
    for path, total in both.total.items():
        gained = np.asarray(total.inputs - one.total[path].inputs)
        assert np.linalg.eigvalsh(gained).min() > -1e-3  # a sum of outer products
        curvature = np.sort(np.asarray(both.basis[path].curvature).ravel())
        a, g = (np.linalg.eigvalsh(np.asarray(m, np.float64)) for m in total)
        np.testing.assert_allclose(
            curvature, np.sort(np.outer(a, g).clip(0).ravel()) / 2, rtol=1e-2, atol=1e-4
        )


def test_the_first_layers_factors_are_of_permuted_images():
    """Of what the network sees in the task, in the order of its last epoch."""
    config = digits_config("ewc_kfac", sequence__kind="permuted", train__epochs=1,
                           sequence__first_identity=False, ewc_kfac__examples=300)  # fmt: skip
    jitted = Jitted(config)
    key = jax.random.key(0)
    state, _ = jitted.train(key, [1])
    x = jitted.learner.network.prepare(jnp.concatenate([x for x, _ in jitted.epoch(key, 1, 0)]))
    a = jnp.pad(x[:300].reshape(300, -1), [(0, 0), (0, 1)], constant_values=1.0)
    found = state.learner.method.total["hidden_0"].inputs
    np.testing.assert_allclose(found, a.T @ a / 300, rtol=1e-3, atol=1e-4)


def second_task(method="ewc_kfac", **changes):
    """A run in its second task, and the same state with an anchor of no strength."""
    jitted = Jitted(digits_config(method, **changes))
    state, _ = jitted.train(jax.random.key(0), [0], epochs=1)
    state = jitted.begin_task(state, 1)
    kept = state.learner.method
    anchored = kept[1] if method.startswith("bd") else kept
    free = anchored._replace(strength=jnp.float32(0))
    free = changed(state, method=(kept[0], free) if method.startswith("bd") else free)
    return jitted, state, free, anchored


def assert_pulled(pulled, moved, anchored, strengths):
    """``pulled`` is ``moved`` after the proximal step of each layer, which is not nothing."""
    for path, strength in strengths.items():
        after, before, anchor = (
            joined(tree[path])
            for tree in (pulled.learner.params, moved.learner.params, anchored.anchor)
        )
        expected = kronecker.pull_back(before, anchor, anchored.basis[path], strength)
        np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-6)
        assert not np.allclose(before, expected, rtol=1e-4, atol=1e-5)


def test_the_pull_comes_every_so_many_updates():
    """Between them the update is the optimizer's alone; at one it is that, pulled back."""
    jitted, state, free, anchored = second_task(ewc_kfac__every=2)
    ones = [jitted.run_steps(s, jitted.data, 1, 0, 0, 1)[0].learner.params for s in (state, free)]
    jax.tree.map(np.testing.assert_array_equal, *ones)
    pulled, moved = (jitted.run_steps(s, jitted.data, 1, 0, 0, 2)[0] for s in (state, free))
    strength = 2 * 3e-3 * jitted.config.ewc_kfac.strength
    assert_pulled(pulled, moved, anchored, {"hidden_0": strength, "output": strength})


def test_updates_are_counted_over_the_task_and_not_over_an_epoch():
    """With fewer steps in an epoch than `every`, as with one, the anchor still pulls."""
    jitted, state, free, anchored = second_task(
        train__batch_size=276, ewc_kfac__every=4, ewc_kfac__strength=1000.0
    )
    assert jitted.steps(1) == 1
    for epoch in range(3):
        state, _ = jitted.run_steps(state, jitted.data, 1, epoch, 0, 1)
        free, _ = jitted.run_steps(free, jitted.data, 1, epoch, 0, 1)
    jax.tree.map(np.testing.assert_array_equal, state.learner.params, free.learner.params)
    state, _ = jitted.run_steps(state, jitted.data, 1, 3, 0, 1)
    free, _ = jitted.run_steps(free, jitted.data, 1, 3, 0, 1)
    strength = 4 * 3e-3 * 1000.0
    assert_pulled(state, free, anchored, {"hidden_0": strength, "output": strength})


def test_a_whole_run_with_one_step_per_epoch_is_not_that_of_sgd():
    changes = dict(train__batch_size=276, train__epochs=3)
    plain, anchored = (
        Jitted(digits_config(method, **changes)).train(jax.random.key(0), [0, 1])[0]
        for method in ("sgd", "ewc_kfac")
    )
    for path, layer in plain.learner.params.items():
        apart = jnp.abs(layer["kernel"] - anchored.learner.params[path]["kernel"]).max()
        assert apart > 1e-4, path


@pytest.mark.parametrize("steps", [1, 3])
def test_the_steps_that_are_left_are_pulled_when_the_task_ends(steps):
    changes = dict(train__batch_size=276, train__epochs=steps, ewc_kfac__every=4)
    jitted, state, free, anchored = second_task(ewc_kfac__strength=1000.0, **changes)
    for epoch in range(steps):
        state, _ = jitted.run_steps(state, jitted.data, 1, epoch, 0, 1)
        free, _ = jitted.run_steps(free, jitted.data, 1, epoch, 0, 1)
    ended = jitted.end_task(state, jitted.data, 1)
    strength = steps * 3e-3 * 1000.0
    assert_pulled(ended, free, anchored, {"hidden_0": strength, "output": strength})
    # The new anchor is where the pull led.
    learner = ended.learner
    jax.tree.map(np.testing.assert_array_equal, learner.method.anchor, learner.params)


@pytest.mark.parametrize(
    "changes, left",
    [
        ({"train__rate_decay": 4.0}, 1 / 5),
        ({"train__rate_drops": (0.5,)}, 1 / 10),
        ({"train__rate_decay": 4.0, "train__rate_drops": (0.5,)}, 1 / 50),
    ],
)
def test_the_pull_has_the_rate_that_is_left(changes, left):
    jitted, state, free, anchored = second_task(
        train__epochs=2, ewc_kfac__every=1, ewc_kfac__strength=1e5, **changes
    )
    pulled, moved = (jitted.run_steps(s, jitted.data, 1, 1, 0, 1)[0] for s in (state, free))
    strength = left * 3e-3 * 1e5
    assert_pulled(pulled, moved, anchored, {"hidden_0": strength, "output": strength})


def test_the_pull_has_the_rate_of_each_layer():
    jitted, state, free, anchored = second_task(
        train__rates="output=10", ewc_kfac__every=1, ewc_kfac__strength=1000.0
    )
    pulled, moved = (jitted.run_steps(s, jitted.data, 1, 0, 0, 1)[0] for s in (state, free))
    assert_pulled(pulled, moved, anchored, {"hidden_0": 3.0, "output": 30.0})


def test_a_composition_passes_the_pull_on():
    """bd_ewc_kfac moves the shared weights as ewc_kfac's pull says, and not without strength."""
    jitted, state, free, anchored = second_task("bd_ewc_kfac", ewc_kfac__every=1)
    pulled, moved = (jitted.run_steps(s, jitted.data, 1, 0, 0, 1)[0] for s in (state, free))
    strength = 3e-3 * jitted.config.ewc_kfac.strength
    assert_pulled(pulled, moved, anchored, {"hidden_0": strength, "output": strength})


def test_the_pull_stays_a_branch_under_vmap():
    """As a select it would be paid for at every step."""
    jitted = Jitted(digits_config("ewc_kfac"))
    keys = jnp.stack([jax.random.key(s) for s in (0, 1)])
    states = jax.vmap(partial(epochs.init_state, jitted.experiment))(keys)
    steps = jax.vmap(partial(epochs.run_steps, jitted.experiment), (0, *[None] * 5))
    program = jax.make_jaxpr(steps)(states, jitted.data, 1, 0, 0, 5)
    assert " cond[" in str(program)


def test_a_network_with_convolutions_is_refused():
    with pytest.raises(UserError, match="Kronecker factors of conv_0/bias are not known"):
        Jitted(digits_config("ewc_kfac", model__name="convnet", model__channels=(4,)))
