"""Codes by hand, the fit of an autoencoder against a plain loop, and what EBLL adds to LwF."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import Jitted, changed, digits_config

from bpnjax.methods.ebll import Encoder, code_loss, encode
from bpnjax.utils import prng
from bpnjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_once")
SMALL = dict(ebll__code=5, ebll__epochs=2)


def test_code_loss_by_hand():
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(4, 3)), rng.normal(size=3)
    new, old = rng.normal(size=(2, 3, 4))
    codes = [1 / (1 + np.exp(-(x @ kernel + bias))) for x in (new, old)]
    expected = 0.5 * ((codes[0] - codes[1]) ** 2).sum(1)[:2].mean()
    encoder = Encoder(jnp.asarray(kernel), jnp.asarray(bias))
    weight = jnp.array([1.0, 1.0, 0.0])  # the third example is padding
    got = code_loss(encoder, jnp.asarray(new), jnp.asarray(old), weight)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def hidden(jitted, params, x):
    """The units that go into the output layer."""
    x, layer = jitted.learner.network.prepare(x), params["hidden_0"]
    return jax.nn.relu(x.reshape(len(x), -1) @ layer["kernel"] + layer["bias"])


def test_fit_equals_a_plain_loop():
    """Adam on alpha_r |x - x'|^2 + the frozen output layer's loss on x', example order and all."""
    jitted = Jitted(
        digits_config("ebll", train__epochs=1, ebll__reconstruction=0.3, ebll__batch_size=48,
                      **SMALL)
    )  # fmt: skip
    key = jax.random.key(0)
    state = jitted.train(key, [0])[0].learner
    found = jax.tree.map(lambda leaf: leaf[0], state.method.encoders)
    assert not state.method.encoders.kernel[1:].any()

    first, second = jax.random.split(prng.fold(key, prng.ENDED, 0))
    glorot = jax.nn.initializers.glorot_uniform()
    params = {"A": glorot(first, (16, 5)), "a": jnp.zeros(5),
              "D": glorot(second, (5, 16)), "d": jnp.zeros(16)}  # fmt: skip
    output, optimizer = state.params["output"], optax.adam(1e-3)
    optimizer_state = optimizer.init(params)

    def loss(params, x, y):
        again = jax.nn.sigmoid(x @ params["A"] + params["a"]) @ params["D"] + params["d"]
        log_p = jax.nn.log_softmax(again @ output["kernel"] + output["bias"])
        distance = jnp.sum((x - again) ** 2, 1)
        return jnp.mean(0.3 * distance - log_p[jnp.arange(len(y)), y])

    for _ in range(2):
        for x, y in jitted.epoch(key, 0, 0):
            grads = jax.grad(loss)(params, hidden(jitted, state.params, x), y)
            updates, optimizer_state = optimizer.update(grads, optimizer_state)
            params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(found.kernel, params["A"], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.bias, params["a"], rtol=1e-3, atol=1e-5)


def test_fitting_longer_keeps_more_of_the_features():
    key, lost = jax.random.key(0), []
    for epochs in (1, 60):
        jitted = Jitted(digits_config("ebll", train__epochs=4, ebll__code=4, ebll__epochs=epochs,
                                      ebll__learning_rate=1e-2,
                                      ebll__reconstruction=10.0))  # fmt: skip
        state = jitted.train(key, [0])[0].learner
        x = jnp.concatenate([x for x, _ in jitted.epoch(key, 0, 0)])
        features = hidden(jitted, state.params, x)
        codes = encode(jax.tree.map(lambda leaf: leaf[0], state.method.encoders), features)
        codes = np.c_[codes, np.ones(len(x))]  # the best linear decoder of these codes
        rest = features - codes @ np.linalg.lstsq(codes, np.asarray(features), rcond=None)[0]
        lost.append(float((rest**2).mean()))
    assert lost[1] < 0.7 * lost[0], lost


def test_two_steps_add_the_gradient_of_the_codes_to_lwf():
    """In the third task, with two encoders; without strength it is LwF."""
    key = jax.random.key(0)
    changes = dict(train__optimizer="sgd", train__learning_rate=0.1, **SMALL)
    jitted = Jitted(digits_config("ebll", ebll__strength=4.0, **changes))
    state, _ = jitted.train(key, [0, 1], epochs=1)
    start, _ = jitted.run_steps(jitted.begin_task(state, 2), jitted.data, 2, 0, 0, 1)
    moved, _ = jitted.run_steps(start, jitted.data, 2, 0, 1, 2)
    before, kept = start.learner.params, start.learner.method
    plain = Jitted(digits_config("lwf", **changes))
    lwf = changed(plain.init(key), params=before, method=kept.lwf)
    lwf, _ = plain.run_steps(lwf, plain.data, 2, 0, 1, 2)
    x, _ = jitted.epoch(key, 2, 0)[1]
    old = hidden(jitted, state.learner.params, x)  # the teacher is the network before the task

    def loss(params):
        total = 0.0
        for k in range(2):
            encoder = jax.tree.map(lambda leaf, k=k: leaf[k], kept.encoders)
            codes = [jax.nn.sigmoid(f @ encoder.kernel + encoder.bias)
                     for f in (hidden(jitted, params, x), old)]  # fmt: skip
            total += jnp.mean(jnp.sum((codes[0] - codes[1]) ** 2, 1))
        return 4.0 / 2 * total

    extra = jax.grad(loss)(before)
    assert float(jnp.abs(extra["hidden_0"]["kernel"]).max()) > 1e-5
    for layer, leaves in extra.items():
        for name, g in leaves.items():
            expected = lwf.learner.params[layer][name] - 0.1 * g
            np.testing.assert_allclose(moved.learner.params[layer][name], expected,
                                       rtol=1e-3, atol=1e-6)  # fmt: skip


def test_a_layer_that_cannot_be_encoded_is_refused():
    with pytest.raises(UserError, match="ebll.layer: 'nope' is not a layer .* hidden_0, output"):
        Jitted(digits_config("ebll", ebll__layer="nope"))
    with pytest.raises(UserError, match="ebll.layer: 'conv_0' .* name a Dense layer"):
        Jitted(digits_config("ebll", ebll__layer="conv_0", model__name="convnet",
                             model__channels=(2,)))  # fmt: skip


def test_the_input_of_a_dense_layer_after_convolutions_can_be_encoded():
    jitted = Jitted(digits_config("ebll", ebll__layer="hidden_0", model__name="convnet",
                                  model__channels=(2,), **SMALL))  # fmt: skip
    state, _ = jitted.train(jax.random.key(0), [0, 1], epochs=1)
    assert state.learner.method.encoders.kernel.shape == (3, 2 * 4 * 4, 5)
    assert jitted.steps(0) > 1
