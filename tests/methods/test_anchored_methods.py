"""SI, MAS, XdG and the controls against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import Jitted, changed, digits_config

from bpnjax import methods, modes, optim
from bpnjax.learner import Clock
from bpnjax.methods import Context
from bpnjax.methods.si import SiState, fold
from bpnjax.networks import Layer

pytestmark = pytest.mark.usefixtures("compile_once")


def mean_loss(jitted, params, x, y, mode=None):
    logits, _ = jitted.learner.network.apply(params, mode or {}, x)
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(y)), y])


def si_state(**fields):
    zero = jnp.zeros(3)
    state = SiState(zero, zero, zero, jnp.float32(1.0))
    return state._replace(**{k: jnp.asarray(v, jnp.float32) for k, v in fields.items()})


def test_si_path_integral_is_the_fall_of_the_loss():
    """For small steps sum w = loss before - loss after: a line integral of the gradient."""
    jitted = Jitted(digits_config("si", train__optimizer="sgd", train__learning_rate=1e-3))
    learner, key = jitted.learner, jax.random.key(0)
    state = jitted.begin_task(jitted.init(key), 0).learner
    x, y = (jnp.concatenate(part) for part in zip(*jitted.epoch(key, 0, 0), strict=True))
    n = len(x)
    batch = methods.Batch(x, y, jnp.ones(n), jnp.zeros(n, jnp.int32))

    @jax.jit
    def hundred(state):
        def step(i, state):
            return learner.update(state, batch, Clock(0, i))[0]

        return jax.lax.fori_loop(0, 100, step, state)

    after = hundred(state)
    total = sum(float(w.sum()) for w in jax.tree.leaves(after.method.path))
    fall = mean_loss(jitted, state.params, x, y) - mean_loss(jitted, after.params, x, y)
    assert fall > 1e-3
    np.testing.assert_allclose(total, fall, rtol=0.01)


def test_si_accumulates_the_applied_update_of_the_unpenalised_gradient():
    """Under Adam the step is not -lr * g; and in a later task the anchor's pull is left out."""
    jitted = Jitted(digits_config("si", si__strength=100.0))
    key = jax.random.key(0)
    state, _ = jitted.train(key, [0], epochs=2)
    moved, _ = jitted.run_steps(jitted.begin_task(state, 1), jitted.data, 1, 0, 0, 1)
    again, _ = jitted.run_steps(moved, jitted.data, 1, 0, 1, 2)
    x, y = jitted.epoch(key, 1, 0)[1]
    before, after = moved.learner, again.learner
    grads = jax.grad(lambda params: mean_loss(jitted, params, x, y))(before.params)
    expected = jax.tree.map(
        lambda w, g, a, b: w - g * (b - a), before.method.path, grads, before.params, after.params
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-8),
        after.method.path, expected,
    )  # fmt: skip


@pytest.mark.parametrize(
    "clamp, expected", [("sum", [3.0, 0.0, 0.5]), ("increment", [3.0, 1.0, 0.5]),
                        ("none", [3.0, -1.0, 0.5])]
)  # fmt: skip
def test_si_fold_by_hand(clamp, expected):
    state = si_state(path=[1.0, -1.0, 0.0], importance=[1.0, 1.0, 0.5], strength=1.0)
    params = jnp.array([0.5, 0.5, 0.5])
    after = fold(state, params, damping=0.25, clamp=clamp)  # (0.5)^2 + 0.25 = 0.5
    np.testing.assert_allclose(after.importance, expected)
    np.testing.assert_array_equal(after.anchor, params)
    assert not after.path.any()


@pytest.mark.parametrize("clamp", ["sum", "increment", "none"])
def test_si_ends_a_task_by_its_own_settings(clamp):
    jitted = Jitted(digits_config("si", si__damping=0.5, si__clamp=clamp))
    state = jitted.begin_task(jitted.init(jax.random.key(0)), 0)
    kept = state.learner.method
    signs = jax.tree.map(lambda p: jnp.where(jnp.arange(p.size) % 2, 1.0, -1.0).reshape(p.shape),
                         kept.path)  # fmt: skip
    kept = kept._replace(path=signs, importance=jax.tree.map(jnp.ones_like, signs))
    params = jax.tree.map(lambda p: p + 0.5, state.learner.params)
    ended = jitted.end_task(changed(state, params=params, method=kept), jitted.data, 0)
    for got, sign in zip(*map(jax.tree.leaves, (ended.learner.method.importance, signs)),
                         strict=True):  # fmt: skip
        expected = 1 + sign / 0.75  # 0.5^2 + 0.5
        if clamp == "increment":
            expected = 1 + np.maximum(sign, 0) / 0.75
        expected = np.maximum(expected, 0) if clamp == "sum" else expected
        np.testing.assert_allclose(got, expected, rtol=1e-4)


@pytest.mark.parametrize("method, factor", [("si", 2.0), ("mas", 2.0), ("ewc", 1.0)])
def test_penalties_of_si_and_mas_have_no_half(method, factor):
    """c sum Omega (theta - anchor)^2: its gradient is 2 c Omega (theta - anchor)."""
    strength = {f"{method}__strength": 3.0, f"{method}__form": "gradient"}
    jitted = Jitted(digits_config(method, **strength))
    state = jitted.init(jax.random.key(0)).learner
    kept = state.method._replace(importance=jax.tree.map(jnp.ones_like, state.params))
    params = jax.tree.map(lambda a: a + 0.5, kept.anchor)
    zero = jax.tree.map(jnp.zeros_like, params)
    ctx = Context(jitted.learner.setup, 1, 1, True, step_size=state.step_size)
    pull = jitted.learner.method.gradient(zero, params, kept, None, ctx)
    jax.tree.map(lambda g: np.testing.assert_allclose(g, factor * 3.0 * 0.5, rtol=1e-5), pull)


def test_mas_sums_over_tasks_and_anchors_at_the_last():
    jitted = Jitted(digits_config("mas"))
    key = jax.random.key(0)
    one, two = (jitted.train(key, tasks, epochs=1)[0].learner for tasks in ([0], [0, 1]))
    jax.tree.map(np.testing.assert_array_equal, two.method.anchor, two.params)
    assert all(
        (b >= a).all() and (b > a).any()
        for a, b in zip(*(jax.tree.leaves(s.method.importance) for s in (one, two)), strict=True)
    )


def mode_of(jitted, state, task):
    """The mode that answers a task between two tasks."""
    learner, ctx = state.learner, Context(jitted.learner.setup, task, None, False)
    return jitted.learner.method.forward(learner.params, learner.task_params, learner.method, ctx)


def test_gates_silence_the_chosen_share_of_hidden_units():
    layers = {"a": Layer("dense", 4000, 1, 1, 2, (1, 1))}
    bank = modes.gate_bank(jax.random.key(0), layers, 0.8)
    gates = [modes.select(bank, t)["a"]["key"] for t in (0, 1)]
    for gate in gates:
        assert set(np.unique(gate)) == {0.0, 1.0} and abs(float(gate.mean()) - 0.2) < 0.03
    assert abs(float(jnp.mean(gates[0] * gates[1])) - 0.04) < 0.02  # independent tasks
    jitted = Jitted(digits_config("xdg", xdg__gated=0.5, model__hidden=(4000,)))
    _, mode = mode_of(jitted, jitted.init(jax.random.key(0)), 0)
    assert list(mode) == ["output"]  # not on pixels
    assert abs(float(mode["output"]["key"].mean()) - 0.5) < 0.04


def test_an_output_mask_gives_ewc_its_masked_accuracy():
    key = jax.random.key(0)
    plain, masked = Jitted(digits_config("ewc")), Jitted(digits_config("ewc_masked"))
    (a, _), (b, _) = plain.train(key), masked.train(key)
    # Trained alike.
    jax.tree.map(np.testing.assert_array_equal, a.learner.params, b.learner.params)
    told, answer = plain.test(a, 2), masked.test(b, 2)
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
    start = jitted.init(key).learner.method[0]
    state, _ = jitted.train(key, [0], epochs=1)
    for path, layer in state.learner.method[0].items():
        np.testing.assert_allclose(jnp.linalg.norm(layer["bias"], axis=1), 3.0, rtol=1e-5)
        np.testing.assert_array_equal(layer["bias"], start[path]["bias"])
        assert not np.allclose(layer["bias"][0], layer["bias"][1])


@pytest.mark.parametrize("method", ["bias_ewc", "plain_bias"])
def test_a_plain_bias_follows_its_gradient_and_is_frozen(method):
    config = digits_config(method, train__optimizer="sgd", plain_bias__learning_rate=0.5)
    jitted = Jitted(config)
    key = jax.random.key(0)
    state = jitted.begin_task(jitted.init(key), 0)
    moved, _ = jitted.run_steps(state, jitted.data, 0, 0, 0, 1)
    x, y = jitted.epoch(key, 0, 0)[0]

    def loss(bias):
        mode = {path: {"bias": b} for path, b in bias.items()}
        return mean_loss(jitted, state.learner.params, x, y, mode)

    def own(task_params):
        return task_params if method == "plain_bias" else task_params[0]

    zero = {"hidden_0": jnp.zeros(16), "output": jnp.zeros(6)}
    learned = own(moved.learner.task_params)
    for path, g in jax.grad(loss)(zero).items():
        np.testing.assert_allclose(learned[path]["bias"]["change"], -0.5 * g, rtol=1e-4, atol=1e-7)
    ended = jitted.end_task(moved, jitted.data, 0)
    _, kept = mode_of(jitted, ended, 0)
    for path, layer in learned.items():
        np.testing.assert_array_equal(kept[path]["bias"], layer["bias"]["change"])
        assert not own(ended.learner.task_params)[path]["bias"]["change"].any()
