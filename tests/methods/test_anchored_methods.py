"""SI, MAS, XdG and the controls against closed forms."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import Jitted, digits_config

from bpnjax import optim
from bpnjax.methods import mas, si
from bpnjax.modes import keys
from bpnjax.networks import linen

pytestmark = pytest.mark.usefixtures("compile_once")


def si_state(**fields):
    zero = jnp.zeros(3)
    state = si.SiState(zero, zero, zero, jnp.float32(1.0))
    return state._replace(**{k: jnp.asarray(v, jnp.float32) for k, v in fields.items()})


def test_si_path_integral_is_the_fall_of_the_loss():
    """For small steps sum w = loss before - loss after: a line integral of the gradient."""
    jitted = Jitted(digits_config("si", train__optimizer="sgd", train__learning_rate=1e-3))
    key = jax.random.key(0)
    state = jitted.begin_task(key, jitted.init(key), 0)
    x, y = (jnp.concatenate(part) for part in zip(*jitted.epoch(key, 0, 0), strict=True))

    def loss(core):
        log_p = jax.nn.log_softmax(jitted.problem.model.apply({"params": core}, x))
        return -jnp.mean(log_p[jnp.arange(len(y)), y])

    before = loss(state.core)
    for _ in range(100):
        grads = jax.grad(loss)(state.core)
        new = jax.tree.map(lambda p, g: p - 1e-3 * g, state.core, grads)
        state = state._replace(
            core=new, method=si.after_step(state.method, state.core, new, grads, None)
        )
    total = sum(float(w.sum()) for w in jax.tree.leaves(state.method.path))
    np.testing.assert_allclose(total, before - loss(state.core), rtol=0.01)


def test_si_accumulates_the_applied_update_of_the_unpenalised_gradient():
    """Under Adam the step is not -lr * g; and in a later task the anchor's pull is left out."""
    jitted = Jitted(digits_config("si", si__strength=100.0))
    key = jax.random.key(0)
    state, _ = jitted.train(key, [0], epochs=2)
    state = jitted.begin_task(key, state, 1)
    moved, _ = jitted.run_steps(key, state, jitted.data, 1, 0, 0, 1)
    again, _ = jitted.run_steps(key, moved, jitted.data, 1, 0, 1, 2)
    x, y = jitted.epoch(key, 1, 0)[1]

    def loss(core):
        log_p = jax.nn.log_softmax(jitted.problem.model.apply({"params": core}, x))
        return -jnp.mean(log_p[jnp.arange(len(y)), y])

    grads = jax.grad(loss)(moved.core)
    expected = jax.tree.map(
        lambda w, g, a, b: w - g * (b - a), moved.method.path, grads, moved.core, again.core
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-8),
        again.method.path, expected,
    )  # fmt: skip


@pytest.mark.parametrize(
    "clamp, expected", [("sum", [3.0, 0.0, 0.5]), ("increment", [3.0, 1.0, 0.5]),
                        ("none", [3.0, -1.0, 0.5])]
)  # fmt: skip
def test_si_fold_by_hand(clamp, expected):
    state = si_state(path=[1.0, -1.0, 0.0], importance=[1.0, 1.0, 0.5], strength=1.0)
    core = jnp.array([0.5, 0.5, 0.5])
    after = si.fold(state, core, damping=0.25, clamp=clamp)  # (0.5)^2 + 0.25 = 0.5
    np.testing.assert_allclose(after.importance, expected)
    np.testing.assert_array_equal(after.anchor, core)
    assert not after.path.any()


@pytest.mark.parametrize("method, module", [("si", si), ("mas", mas)])
def test_penalties_have_no_half(method, module):
    """c sum Omega (theta - anchor)^2: its gradient is 2 c Omega (theta - anchor)."""
    jitted = Jitted(digits_config(method))
    state = jitted.init(jax.random.key(0)).method
    ones = jax.tree.map(jnp.ones_like, state.importance)
    state = state._replace(importance=ones, strength=jnp.float32(3.0))
    core = jax.tree.map(lambda a: a + 0.5, state.anchor)
    zero = jax.tree.map(jnp.zeros_like, core)
    pull = module.gradient(zero, core, state, SimpleNamespace(size=0.0))
    jax.tree.map(lambda g: np.testing.assert_allclose(g, 2 * 3.0 * 0.5, rtol=1e-5), pull)


def test_mas_sums_over_tasks_and_anchors_at_the_last():
    jitted = Jitted(digits_config("mas"))
    key = jax.random.key(0)
    one, _ = jitted.train(key, [0], epochs=1)
    two, _ = jitted.train(key, [0, 1], epochs=1)
    jax.tree.map(np.testing.assert_array_equal, two.method.anchor, two.core)
    assert all(
        (b >= a).all() and (b > a).any()
        for a, b in zip(*(jax.tree.leaves(s.method.importance) for s in (one, two)), strict=True)
    )


def test_gates_silence_the_chosen_share_of_hidden_units():
    layers = {"a": linen.Layer("dense", 4000, 1, 1, 2, (1, 1))}
    bank = keys.gate_bank(jax.random.key(0), layers, 0.8)
    gates = [linen.select(bank, t)["a"]["key"] for t in (0, 1)]
    for gate in gates:
        assert set(np.unique(gate)) == {0.0, 1.0} and abs(float(gate.mean()) - 0.2) < 0.03
    assert abs(float(jnp.mean(gates[0] * gates[1])) - 0.04) < 0.02  # independent tasks
    jitted = Jitted(digits_config("xdg"))
    mode = jitted.problem.method.mode(jitted.init(jax.random.key(0)).method, 0)
    assert list(mode) == ["output"]  # not on pixels


def test_an_output_mask_gives_ewc_its_masked_accuracy():
    key = jax.random.key(0)
    plain, masked = Jitted(digits_config("ewc")), Jitted(digits_config("ewc_masked"))
    (a, _), (b, _) = plain.train(key), masked.train(key)
    jax.tree.map(np.testing.assert_array_equal, a.core, b.core)  # trained alike
    told, answer = plain.test(key, a, 2), masked.test(key, b, 2)
    np.testing.assert_array_equal(answer["task_told"], told["task_masked"])
    assert (answer["task_told"] > told["task_told"]).any()


def test_matched_step_is_as_long_as_the_sign_step():
    g = {"M": jax.random.normal(jax.random.key(0), (1, 50)), "N": jnp.zeros((1, 3))}
    along, _ = optim.matched_step(0.1).update(g, optim.matched_step(0.1).init(g))
    sign, _ = optim.beneficial_sign(0.1).update(g, optim.beneficial_sign(0.1).init(g))
    np.testing.assert_allclose(jnp.linalg.norm(along["M"]), jnp.linalg.norm(sign["M"]), rtol=1e-5)
    cosine = jnp.sum(along["M"] * g["M"]) / jnp.linalg.norm(along["M"]) / jnp.linalg.norm(g["M"])
    np.testing.assert_allclose(cosine, -1.0, rtol=1e-5)
    assert not along["N"].any()


def test_random_biases_have_the_chosen_norm_and_stay():
    jitted = Jitted(digits_config("random_bias_ewc", random_bias__norm=3.0))
    key = jax.random.key(0)
    start = jitted.init(key).method[0]
    state, _ = jitted.train(key, [0], epochs=1)
    for path, layer in state.method[0].items():
        np.testing.assert_allclose(jnp.linalg.norm(layer["bias"], axis=1), 3.0, rtol=1e-5)
        np.testing.assert_array_equal(layer["bias"], start[path]["bias"])


def test_a_plain_bias_follows_its_gradient_and_is_frozen():
    config = digits_config("bias_ewc", train__optimizer="sgd", plain_bias__learning_rate=0.5)
    jitted = Jitted(config)
    key = jax.random.key(0)
    state = jitted.begin_task(key, jitted.init(key), 0)
    moved, _ = jitted.run_steps(key, state, jitted.data, 0, 0, 0, 1)
    x, y = jitted.epoch(key, 0, 0)[0]

    def loss(bias):
        mode = {p: {"bias": b} for p, b in bias.items()}
        logits = linen.modulated_apply(jitted.problem.model, state.core, mode, x)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(y)), y])

    zero = {"hidden_0": jnp.zeros(16), "output": jnp.zeros(6)}
    for path, g in jax.grad(loss)(zero).items():
        got = moved.learned["plain_bias"][path]["bias"]
        np.testing.assert_allclose(got, -0.5 * g, rtol=1e-4, atol=1e-7)
    ended = jitted.end_task(key, moved, jitted.data, 0)
    kept = jitted.problem.method.mode(ended.method, 0)
    learned = moved.learned["plain_bias"]
    np.testing.assert_array_equal(kept["output"]["bias"], learned["output"]["bias"])
