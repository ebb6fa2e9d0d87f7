"""Modes: against hand-written forward passes, for every kind of layer and of module."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bpnjax.modes import GateSeeds, KeySeeds, gate_bank, key_bank, merge, select, store
from bpnjax.networks import Layer, find_layers, matching, modulated_apply

pytestmark = pytest.mark.usefixtures("compile_once")


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
    assert list(matching(layers, "(?!out$).*")) == ["block/inner", "twice"]


def test_keys_are_signs_drawn_independently_and_stored_as_a_seed():
    layer = Layer("dense", 5000, 10, 1, 2, (1, 10))
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
    key = KeySeeds(jax.random.key(7), 6).row(2)

    def loss(p, mode, x):
        return jnp.mean((modulated_apply(model, p, mode, x) - y) ** 2)

    keyed = jax.grad(loss)(params, {"": {"key": key}}, x)
    plain = jax.grad(loss)(params, {}, x * key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), keyed, plain)


BANK = {"a": {"bias": jnp.arange(6.0).reshape(2, 3)}}


@pytest.mark.parametrize(
    "task, message",
    [
        (2, "task 2 is not in the bank; it has tasks 0 to 1"),
        (-1, "task -1 is not in the bank"),
        (2**32, f"task {2**32} is not in the bank"),
        (np.array([0, 1, 5]), "task 5 is not in the bank"),
        (np.array([0, -2, 5]), "task -2 is not in the bank"),
        (jnp.array([3]), "task 3 is not in the bank"),
        (1.0, "task 1.0 is not an integer"),
        (True, "task True is not an integer"),
        (None, "task None is not an integer"),
    ],
)
def test_a_task_that_is_not_there_is_refused(task, message):
    with pytest.raises(ValueError, match=message):
        select(BANK, task)
    with pytest.raises(ValueError, match=message):
        store(BANK, {"a": {"bias": jnp.ones(3)}}, task)
    assert select(BANK, 1)["a"]["bias"].tolist() == [3, 4, 5]


def test_keys_are_there_for_any_task_from_0():
    bank = {"a": {"key": KeySeeds(jax.random.key(0), 5)}}
    assert select(bank, 10**6)["a"]["key"].shape == (5,)
    for task, message in ((-1, "task -1 .* has tasks from 0"), (1.7, "not an integer")):
        with pytest.raises(ValueError, match=message):
            select(bank, task)
        with pytest.raises(ValueError, match="task 2 is not in the bank; it has tasks 0 to 1"):
            select(merge(bank, BANK), 2)  # no more tasks than there are biases


@pytest.mark.parametrize("task", [2, -1, 7])
def test_a_traced_task_beyond_the_bank_is_nan_and_stores_nothing(task):
    found = jax.jit(lambda task: select(BANK, task))(task)
    assert np.isnan(found["a"]["bias"]).all()
    found = jax.jit(lambda tasks: select(BANK, tasks))(jnp.array([1, task]))["a"]["bias"]
    assert found[0].tolist() == [3, 4, 5] and np.isnan(found[1]).all()
    after = jax.jit(lambda task: store(BANK, {"a": {"bias": jnp.ones(3)}}, task))(task)
    np.testing.assert_array_equal(after["a"]["bias"], BANK["a"]["bias"])
    with pytest.raises(ValueError, match="task ids have dtype float32; give integers"):
        jax.jit(lambda task: select(BANK, task))(1.0)


def test_store_replaces_the_row_of_its_task_only():
    bank = {"a": {"bias": jnp.zeros((3, 2))}, "b": {"bias": jnp.ones((3, 1))}}
    mode = {"a": {"bias": jnp.array([4.0, 5.0])}, "b": {"bias": jnp.array([6.0])}}
    for task in (jnp.int32(1), np.int64(1), 1):
        after = store(bank, mode, task)
        assert after["a"]["bias"].tolist() == [[0, 0], [4, 5], [0, 0]]
        assert after["b"]["bias"].tolist() == [[1], [6], [1]]
    jax.tree.map(np.testing.assert_array_equal, select(after, 1), mode)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (1, 2)])
def test_store_refuses_vectors_that_would_only_broadcast(shape):
    with pytest.raises(ValueError, match=r"the bank has room for \(2,\) per task, not "):
        store({"a": {"bias": jnp.zeros((3, 2))}}, {"a": {"bias": jnp.ones(shape)}}, 0)
    with pytest.raises(ValueError):
        store({"a": {"bias": jnp.zeros((3, 2))}}, {"b": {"bias": jnp.ones(2)}}, 0)


def test_gates_are_open_with_their_probability_and_differ_per_task_and_layer():
    layer = Layer("dense", 4000, 10, 1, 2, (1, 10))
    bank = gate_bank(jax.random.key(0), {"a": layer, "b": layer}, 0.8)
    assert isinstance(bank["a"]["key"], GateSeeds)
    gates = [np.asarray(select(bank, t)[name]["key"]) for t in range(2) for name in "ab"]
    for gate in gates:
        assert set(np.unique(gate)) == {0.0, 1.0}
        assert abs(gate.mean() - 0.2) < 4 * (0.2 * 0.8 / 4000) ** 0.5
    for i, a in enumerate(gates):
        for b in gates[i + 1 :]:
            assert abs((a * b).mean() - 0.04) < 4 * (0.04 / 4000) ** 0.5
    mixed = select(bank, jnp.array([1, 0]))["b"]["key"]
    np.testing.assert_array_equal(mixed, [gates[3], gates[1]])


def test_keys_and_gates_do_not_depend_on_the_default_float():
    keys, gates = KeySeeds(jax.random.key(3), 100), GateSeeds(jax.random.key(3), 100, 0.8)
    narrow = [np.asarray(seeds.row(2)) for seeds in (keys, gates)]
    with jax.enable_x64(True):
        wide = [np.asarray(seeds.row(2)) for seeds in (keys, gates)]
    for a, b in zip(narrow, wide, strict=True):
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_array_equal(a, b)


def test_merge_adds_biases_and_multiplies_keys():
    one = {"a": {"bias": jnp.array([1.0]), "key": jnp.array([-1.0])}}
    two = {"a": {"bias": jnp.array([2.0]), "key": jnp.array([-1.0])}, "b": {}}
    merged = merge(one, two)
    assert float(merged["a"]["bias"][0]) == 3.0 and float(merged["a"]["key"][0]) == 1.0


def test_modes_of_other_widths_are_not_broadcast():
    for name in ("bias", "key"):
        with pytest.raises(AssertionError, match="shape"):
            merge({"a": {name: jnp.ones(3)}}, {"a": {name: jnp.ones(1)}})


def test_merge_adds_measures_so_that_each_mode_gets_the_size_of_the_outputs():
    """Two modes that both measure a layer: its outputs before the biases of both."""
    x = jax.random.normal(jax.random.key(0), (6, 5))
    params = params_of(nn.Dense(3), x)
    first, second = (
        {"": {"bias": jnp.full(3, value), "measure": jnp.array([value, -value])}}
        for value in (1.0, 2.0)
    )
    assert merge(first, second)[""]["measure"].tolist() == [3.0, -3.0]
    plain = {"": {"bias": jnp.ones(3)}}
    assert merge(plain, first)[""]["measure"].tolist() == [1.0, -1.0]

    def loss(first, second):
        mode = merge(first, second, plain, {"": {"key": jnp.full(5, 0.5)}})
        return jnp.sum(jnp.tanh(modulated_apply(nn.Dense(3), params, mode, x)))

    y = np.asarray(0.5 * x @ params["kernel"] + params["bias"], np.float64)
    for found in jax.grad(loss, (0, 1))(first, second):
        np.testing.assert_allclose(found[""]["measure"], [(y**2).sum(), y.size], rtol=1e-5)


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
