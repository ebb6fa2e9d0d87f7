"""Modes: against hand-written forward passes, for every kind of layer and of module."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bpnjax.modes import keys
from bpnjax.modes.keys import key_bank
from bpnjax.networks import linen
from bpnjax.networks.linen import find_layers, merge, modulated_apply, select


class Block(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Dense(self.width, use_bias=False, name="inner")(x))


class Nested(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = Block(4, name="block")(x)
        twice = nn.Dense(4, name="twice")
        return nn.Dense(2, name="out")(twice(twice(x)))


class Convolutional(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (3, 3), name="conv")(x)
        return nn.Dense(2, name="out")(x.reshape(x.shape[0], -1))


def params_of(model, x, seed=0):
    return model.init(jax.random.key(seed), x)["params"]


def test_formula_on_nested_modules_repeated_calls_and_no_bias():
    x = jax.random.normal(jax.random.key(1), (5, 3))
    model = Nested()
    params = params_of(model, x)
    draws = iter(jax.random.split(jax.random.key(2), 9))
    mode = {
        "block/inner": {"key": jax.random.normal(next(draws), (3,)), "bias": jnp.arange(4.0)},
        "twice": {"key": jax.random.normal(next(draws), (4,)), "bias": -jnp.arange(4.0)},
        "out": {"bias": jnp.array([0.5, 7.0])},
    }
    h = jax.nn.relu((x * mode["block/inner"]["key"]) @ params["block"]["inner"]["kernel"]
                    + mode["block/inner"]["bias"])  # fmt: skip
    twice = params["twice"]
    for _ in range(2):
        h = (h * mode["twice"]["key"]) @ twice["kernel"] + twice["bias"] + mode["twice"]["bias"]
    expected = h @ params["out"]["kernel"] + params["out"]["bias"] + mode["out"]["bias"]
    np.testing.assert_allclose(modulated_apply(model, params, mode, x), expected, rtol=1e-5)


def test_empty_mode_is_the_plain_network():
    x = jnp.ones((2, 3))
    params = params_of(Nested(), x)
    plain = Nested().apply({"params": params}, x)
    np.testing.assert_array_equal(modulated_apply(Nested(), params, {}, x), plain)


def test_conv_key_multiplies_channels_and_bias_adds_per_channel():
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 2))
    model = Convolutional()
    params = params_of(model, x)
    key, bias = jnp.array([-1.0, 1.0]), jnp.array([0.1, 0.2, 0.3])
    out = modulated_apply(model, params, {"conv": {"key": key, "bias": bias}}, x)
    shifted = {**params, "conv": {**params["conv"], "bias": params["conv"]["bias"] + bias}}
    expected = model.apply({"params": shifted}, x * key)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model, shape", [(Nested(), (6, 3)), (Convolutional(), (6, 5, 5, 2))])
def test_a_batch_of_mixed_tasks_equals_one_call_per_task(model, shape):
    x = jax.random.normal(jax.random.key(0), shape)
    params = params_of(model, x)
    layers = find_layers(model, params, x)
    bank = merge(
        key_bank(jax.random.key(3), layers),
        {p: {"bias": jax.random.normal(jax.random.key(i), (4, l.outputs))}
         for i, (p, l) in enumerate(layers.items())},
    )  # fmt: skip
    tasks = jnp.array([0, 3, 1, 1, 2, 0])
    mixed = modulated_apply(model, params, select(bank, tasks), x)
    single = [modulated_apply(model, params, select(bank, t), x[i : i + 1])[0]
              for i, t in enumerate(tasks)]  # fmt: skip
    np.testing.assert_allclose(mixed, jnp.stack(single), rtol=1e-4, atol=1e-5)
    other = modulated_apply(model, params, select(bank, 1), x)
    assert np.abs(np.asarray(mixed - other))[0].max() > 1e-3


def test_bfloat16_parameters_stay_bfloat16():
    x = jnp.ones((2, 3), jnp.bfloat16)
    model = nn.Dense(4, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    params = params_of(model, x)
    mode = {"": {"key": jnp.ones(3), "bias": jnp.ones(4)}}
    out = modulated_apply(model, params, mode, x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        out.astype(jnp.float32),
        model.apply({"params": params}, x).astype(jnp.float32) + 1,
        atol=0.02,
    )


def test_an_unknown_layer_in_a_mode_is_an_error():
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="did not call: nowhere"):
        modulated_apply(Nested(), params_of(Nested(), x), {"nowhere": {"bias": jnp.ones(2)}}, x)


def test_layers_are_found_and_left_out_by_pattern():
    x = jnp.ones((2, 3))
    layers = find_layers(Nested(), params_of(Nested(), x), x)
    assert list(layers) == ["block/inner", "twice", "out"]
    assert layers["twice"].calls == 2
    assert (layers["block/inner"].inputs, layers["block/inner"].outputs) == (3, 4)
    assert list(linen.matching(layers, "(?!out$).*")) == ["block/inner", "twice"]


def test_keys_are_signs_drawn_independently_and_stored_as_a_seed():
    layer = linen.Layer("dense", 5000, 10, 1, 2, (1, 10))
    bank = key_bank(jax.random.key(0), {"a": layer, "b": layer})
    assert sum(leaf.size for leaf in jax.tree.leaves(bank)) == 2
    keys = [select(bank, t)[name]["key"] for t in range(3) for name in "ab"]
    for key in keys:
        assert set(np.unique(key)) == {-1.0, 1.0}
        assert abs(float(key.mean())) < 0.06  # 4 standard deviations of a fair coin
    for i, a in enumerate(keys):
        for b in keys[i + 1 :]:
            assert abs(float(jnp.mean(a * b))) < 0.06
    again = key_bank(jax.random.key(0), {"b": layer})
    np.testing.assert_array_equal(select(again, 1)["b"]["key"], select(bank, 1)["b"]["key"])


def test_gradient_with_key_equals_training_on_keyed_inputs():
    x = jax.random.normal(jax.random.key(0), (8, 6))
    y = jax.random.normal(jax.random.key(1), (8, 2))
    model = nn.Dense(2)
    params = params_of(model, x)
    key = keys.KeySeeds(jax.random.key(7), 6).row(2)

    def loss(p, mode, x):
        return jnp.mean((modulated_apply(model, p, mode, x) - y) ** 2)

    keyed = jax.grad(loss)(params, {"": {"key": key}}, x)
    plain = jax.grad(loss)(params, {}, x * key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), keyed, plain)


def test_a_task_beyond_the_bank_is_nan_and_not_the_last_task():
    assert np.isnan(select({"a": {"bias": jnp.ones((2, 3))}}, 2)["a"]["bias"]).all()


def test_merge_adds_biases_and_multiplies_keys():
    one = {"a": {"bias": jnp.array([1.0]), "key": jnp.array([-1.0])}}
    two = {"a": {"bias": jnp.array([2.0]), "key": jnp.array([-1.0])}, "b": {}}
    merged = merge(one, two)
    assert float(merged["a"]["bias"][0]) == 3.0 and float(merged["a"]["key"][0]) == 1.0


def test_switching_tasks_does_not_recompile():
    model = Nested()
    x = jnp.ones((2, 3))
    params = params_of(model, x)
    bank = key_bank(jax.random.key(0), find_layers(model, params, x))
    traces = []

    @jax.jit
    def answer(task):
        traces.append(1)
        return modulated_apply(model, params, select(bank, task), x)

    for task in range(4):
        answer(task)
    assert len(traces) == 1
