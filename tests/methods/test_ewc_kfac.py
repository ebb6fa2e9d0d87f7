"""Kronecker factors and their anchor against definitions and dense algebra."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import Jitted, digits_config

from bpnjax.importance import kronecker
from bpnjax.methods import ewc_kfac
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
    params = Net().init(jax.random.key(0), x)["params"]
    found = kronecker.factors(Net(), params, {"hidden": {"key": key}}, x, y)

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
    params = Net().init(jax.random.key(0), x)["params"]
    weights, head = jnp.array([1.0, 1.0, 0.0, 0.0]), jnp.array([True, True, False])
    some = kronecker.factors_sum(Net(), params, {}, x, y, weights=weights, classes=head)
    first = kronecker.factors_sum(Net(), params, {}, x[:2], y[:2], classes=head)
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
    state, _ = jitted.train(key, [0])
    one = state.method
    assert int(one.tasks) == 1 and not np.array_equal(one.basis["output"].curvature, 0)
    jax.tree.map(np.testing.assert_array_equal, one.anchor, state.core)
    free, _ = Jitted(digits_config("sgd", train__epochs=2)).train(key, [0])
    jax.tree.map(np.testing.assert_array_equal, free.core, state.core)

    both, _ = jitted.train(key, [0, 1])
    for path, total in both.method.total.items():
        gained = np.asarray(total.inputs - one.total[path].inputs)
        assert np.linalg.eigvalsh(gained).min() > -1e-3  # a sum of outer products
        curvature = np.sort(np.asarray(both.method.basis[path].curvature).ravel())
        a, g = (np.linalg.eigvalsh(np.asarray(m, np.float64)) for m in total)
        np.testing.assert_allclose(
            curvature, np.sort(np.outer(a, g).clip(0).ravel()) / 2, rtol=1e-2, atol=1e-4
        )


def test_the_pull_comes_every_so_many_updates():
    """Between them the update is the optimizer's alone; at one it is that, pulled back."""
    jitted = Jitted(digits_config("ewc_kfac", train__epochs=1, ewc_kfac__every=2))
    key = jax.random.key(0)
    state, _ = jitted.train(key, [0])
    state = jitted.begin_task(key, state, 1)
    free = state._replace(method=state.method._replace(strength=jnp.float32(0)))
    ones = [jitted.run_steps(key, s, jitted.data, 1, 0, 0, 1)[0].core for s in (state, free)]
    jax.tree.map(np.testing.assert_array_equal, *ones)
    twos = [jitted.run_steps(key, s, jitted.data, 1, 0, 0, 2)[0].core for s in (state, free)]
    rate = jitted.config.train.learning_rate
    pulled = kronecker.pull_back(
        ewc_kfac.joined(twos[1]["output"]),
        ewc_kfac.joined(state.core["output"]),
        state.method.basis["output"],
        2 * rate * jitted.config.ewc_kfac.strength,
    )
    np.testing.assert_allclose(ewc_kfac.joined(twos[0]["output"]), pulled, rtol=1e-5, atol=1e-7)
    assert not np.allclose(pulled, ewc_kfac.joined(twos[1]["output"]))


def test_a_composition_passes_the_pull_on():
    """bd_ewc_kfac moves the shared weights as ewc_kfac's pull says, and not without strength."""
    jitted = Jitted(digits_config("bd_ewc_kfac", train__epochs=1, ewc_kfac__every=1))
    key = jax.random.key(0)
    state, _ = jitted.train(key, [0])
    state = jitted.begin_task(key, state, 1)
    bank, anchored = state.method
    free = state._replace(method=(bank, anchored._replace(strength=jnp.float32(0))))
    pulled, moved = (
        jitted.run_steps(key, s, jitted.data, 1, 0, 0, 1)[0].core["output"] for s in (state, free)
    )
    expected = kronecker.pull_back(
        ewc_kfac.joined(moved),
        ewc_kfac.joined(state.core["output"]),
        anchored.basis["output"],
        jitted.config.train.learning_rate * jitted.config.ewc_kfac.strength,
    )
    np.testing.assert_allclose(ewc_kfac.joined(pulled), expected, rtol=1e-5, atol=1e-7)
    assert not np.allclose(ewc_kfac.joined(moved), expected, atol=1e-7)


def test_the_pull_stays_a_branch_under_vmap():
    """As a select it would be paid for at every step."""
    jitted = Jitted(digits_config("ewc_kfac"))
    keys = jnp.stack([jax.random.key(s) for s in (0, 1)])
    states = jax.vmap(partial(epochs.init_state, jitted.problem))(keys)
    steps = jax.vmap(partial(epochs.run_steps, jitted.problem), (0, 0, *[None] * 5))
    program = jax.make_jaxpr(steps)(keys, states, jitted.data, 1, 0, 0, 5)
    assert " cond[" in str(program)


def test_moved_rows_give_the_factors_of_permuted_pictures():
    def factors(moves_rows):
        config = digits_config("ewc_kfac", sequence__kind="permuted", train__optimizer="sgd",
                               train__epochs=1, sequence__first_identity=False)  # fmt: skip
        jitted = Jitted(config)
        if not moves_rows:
            jitted.problem = jitted.problem._replace(input_layer="")
            for name in ("begin_task", "end_task"):
                function = partial(getattr(programs, name), jitted.problem)
                setattr(jitted, name, jax.jit(function))
        state, _ = jitted.train(jax.random.key(0), [0])
        return state.method.total

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        factors(True), factors(False),
    )  # fmt: skip


def test_a_network_with_convolutions_is_refused():
    with pytest.raises(UserError, match="Kronecker factors of conv_0/bias are not known"):
        Jitted(digits_config("ewc_kfac", model__name="convnet", model__channels=(4,)))
