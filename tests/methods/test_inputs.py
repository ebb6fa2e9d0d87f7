"""What a learner refuses to be given, and what it converts: batches, data, examples, labels."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bpnjax
from bpnjax import methods, networks
from bpnjax.models import MLP
from bpnjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_once")

X = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
Y = np.array([0, 1, 2, 3, 0, 1], np.int32)
NAN, INFINITE = (np.where(np.arange(6)[:, None] == 3, v, X) for v in (np.nan, np.inf))


def make(network, **options):
    return bpnjax.learner(network, methods.sgd(), optax.sgd(0.1), num_tasks=2, **options)


@pytest.fixture(scope="module")
def learner():
    return make(networks.from_linen(MLP((4,), 4), X[:1]))


@pytest.fixture
def state(learner):
    return learner.begin_task(learner.init(jax.random.key(0)), 0)


EXAMPLES = [
    (X[:, :4], r"x: examples of shape \(4,\); the network was built for \(5,\)"),
    (X[0], r"x: examples of shape \(\); the network was built for \(5,\)"),
    (X[None], r"x: examples of shape \(6, 5\); the network was built for \(5,\)"),
    (X.reshape(6, 5, 1), r"x: examples of shape \(5, 1\)"),
    (np.float32(1), r"x: examples of shape \(\)"),
    (NAN, "x: the examples hold NaN or infinite numbers; fix the data"),
    (INFINITE, "x: the examples hold NaN or infinite numbers"),
    (NAN.tolist(), "x: the examples hold NaN or infinite numbers"),
    (
        np.ones((6, 5), np.uint8),
        "x: examples of dtype uint8; the network was built for float32. Gi",
    ),
    (jnp.ones((6, 5), jnp.int32), "x: examples of dtype int32; the network was built for float32"),
    (np.ones((6, 5), bool), "x: examples of dtype bool"),
    (np.ones((6, 5), complex), "x: examples of dtype complex128"),
    (np.full((6, 5), "a"), "x: examples of dtype <U1"),
    (np.full((6, 5), None), "x: examples of dtype object"),
    ([[1.0, 2.0], [3.0]], "x: no array of examples"),
]
LABELS = [
    (Y[:5], r"y: labels of shape \(5,\) and dtype int32 for 6 examples; the learner expects \[n\]"),
    (np.eye(4, dtype=np.int32)[Y], r"y: labels of shape \(6, 4\) .*pass bpnjax.learner\(.*label="),
    (Y[:, None], r"y: labels of shape \(6, 1\)"),
    (Y.astype(np.float32), "y: labels .* dtype float32 .* of int32"),
    (jnp.ones(6), "y: labels .* dtype float32"),
    (Y == 0, "y: labels .* dtype bool"),
    (np.array(list("abcdef")), "y: labels .* dtype <U1"),
    (Y + 1, "y: label 4 is not a class of this network; it has 4 outputs, labels are 0 to 3"),
    (Y - 1, "y: label -1 is not a class of this network"),
    (np.array([0, 1, 2, 255, 0, 1], np.uint8), "y: label 255 is not a class"),
    (np.array([0, 1, 2, 2**32, 0, 1]), f"y: label {2**32} is not a class"),
    (2, r"y: labels of shape \(\)"),
    ([[1], [2, 3]], "y: no array of labels"),
]


@pytest.mark.parametrize("x, message", EXAMPLES)
def test_examples_that_do_not_fit(learner, state, x, message):
    for call in (
        lambda: learner.apply(state, x, 0),
        lambda: learner.step(state, (x, Y)),
        lambda: learner.end_task(state, (x, Y)),
    ):
        with pytest.raises(UserError, match=message):
            call()
    learner.apply(state, X, 0)  # it was not consumed


@pytest.mark.parametrize("y, message", LABELS)
def test_labels_that_do_not_fit(learner, state, y, message):
    for call in (learner.step, learner.end_task):
        with pytest.raises(UserError, match=message):
            call(state, (X, y))


@pytest.mark.parametrize(
    "batch, message",
    [
        (X, r"batch: give \(x, y\), or \(x, y, weight\) with 0 for padding, not ndarray"),
        ({"x": X, "y": Y}, r"batch: give \(x, y\), .* not dict"),
        (None, r"batch: give \(x, y\), .* not NoneType"),
        ((X,), r"batch: give \(x, y\)"),
        ((X, Y, None, None, None), r"batch: give \(x, y\)"),
        ((X[:0], Y[:0]), "batch: it holds no examples; leave empty batches out"),
        ((X, Y, np.ones(5)), r"batch: weight has shape \(5,\); give \[6\]"),
        ((X, Y, np.ones((6, 1))), r"batch: weight has shape \(6, 1\); give \[6\]"),
        ((X, Y, 1.0), r"batch: weight has shape \(\); give \[6\]"),
        ((X, Y, np.zeros(6)), "batch: weights are finite numbers from 0, and not all of them 0"),
        ((X, Y, [0] * 6), "batch: weights are finite"),
        ((X, Y, np.arange(6) - 1.0), "batch: weights are finite"),
        ((X, Y, np.full(6, np.nan)), "batch: weights are finite"),
        ((X, Y, np.full(6, np.inf)), "batch: weights are finite"),
        ((X, Y, None, np.zeros(5, int)), r"batch: task has shape \(5,\); give \[6\]"),
        ((X, Y, None, np.full(6, 2)), "batch: task 2 is not in the bank; it has tasks 0 to 1"),
        ((X, Y, None, np.full(6, -1)), "batch: task -1 is not in the bank"),
        ((X, Y, None, np.zeros(6)), "batch: task .* is not an integer"),
    ],
)
def test_batches_that_are_none(learner, state, batch, message):
    with pytest.raises(UserError, match=message):
        learner.step(state, batch)


@pytest.mark.parametrize(
    "data, message",
    [
        (None, r"data: give \(x, y\), or an iterable of batches \(x, y\)"),
        (X, r"data: give \(x, y\), or an iterable of batches"),
        ([], "data: no batches; give the examples of the task that ended"),
        (iter(()), "data: no batches"),
        ((), r"data: give \(x, y\)"),
        ((X,), r"data: give \(x, y\)"),
        ({"x": X, "y": Y}, r"data: give \(x, y\), or an iterable of batches \(x, y\), not of str"),
        ([X, Y, X, Y, X], r"data: give \(x, y\)"),
        ((X[:0], Y[:0]), "data: no examples; give those of the task that ended"),
        ([(X, Y, np.zeros(6))], "data: no examples"),
        ([(X, Y), (X[:, :4], Y)], "data: batches that do not go together"),
        ([(X, Y), (X[0], Y[0])], "data: batches that do not go together"),
        ([(X, Y, np.ones(5))], r"data: weight has shape \(5,\); give \[6\]"),
        ([(X, Y), (X, Y[:5])], r"y: labels of shape \(11,\) .* for 12 examples"),
        ([(X, Y), (NAN, Y)], "x: the examples hold NaN"),
        ([(X, Y), (X, Y + 1)], "y: label 4 is not a class"),
    ],
)
def test_data_of_a_task_that_are_none(learner, state, data, message):
    with pytest.raises(UserError, match=message):
        learner.end_task(state, data)


def test_numbers_of_another_width_are_converted(learner, state):
    expected = learner.apply(state, X.astype(np.float16).astype(np.float32), 0)
    for x in (X.astype(np.float16), X.astype(np.float16).astype(np.float64)):
        np.testing.assert_allclose(learner.apply(state, x, 0), expected, rtol=1e-6)


class Words(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(4, name="out")(nn.Embed(300, 3)(tokens).mean(1))


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_whole_numbers_must_have_room(dtype):
    tokens = np.array([[1, 2, 3], [250, 5, 6]])
    learner = make(networks.from_linen(Words(), tokens[:1].astype(dtype)))
    state = learner.begin_task(learner.init(jax.random.key(0)), 0)
    expected = learner.apply(state, tokens.astype(dtype), 0)
    for other in (np.int64, np.uint16, np.uint8):
        np.testing.assert_array_equal(learner.apply(state, tokens.astype(other), 0), expected)
    room = np.iinfo(dtype).max
    with pytest.raises(UserError, match=f"x: examples from 1 to {room + 1}; the network was built"):
        learner.apply(state, np.array([[1, 2, room + 1]]), 0)
    with pytest.raises(UserError, match="x: examples of dtype float32; the network was built for"):
        learner.apply(state, tokens.astype(np.float32), 0)


def squared(outputs, labels):
    return jnp.square(outputs - labels).sum(-1)


def test_labels_of_another_loss(learner):
    targets = np.random.default_rng(1).normal(size=(6, 4))
    learner = make(learner.network, loss=squared, label=targets)
    state = learner.begin_task(learner.init(jax.random.key(0)), 0)
    for y, message in (
        (Y, r"y: labels of shape \(6,\) .* expects \[n, 4\] of float32"),
        (targets[:, :3], r"y: labels of shape \(6, 3\)"),
        (targets.astype(np.int32), "y: labels .* dtype int32"),
        (targets * np.nan, "y: the labels hold NaN or infinite numbers; fix the data"),
    ):
        with pytest.raises(UserError, match=message):
            learner.step(state, (X, y))
    _, metrics = learner.step(state, (X, targets))  # float64
    assert np.isfinite(metrics["loss"])


def test_a_network_of_unknown_input_takes_what_its_function_takes():
    def apply(params, mode, x):
        return x @ params

    network = networks.from_function(apply, lambda key: jnp.ones((5, 4)))
    learner = make(network)
    state = learner.begin_task(learner.init(jax.random.key(0)), 0)
    with pytest.raises(UserError, match="x: a scalar is not a batch of examples; give"):
        learner.apply(state, 1.0, 0)
    assert learner.apply(state, X.tolist(), 0).shape == (6, 4)
    with pytest.raises(UserError, match=r"y: labels of shape \(5,\)"):
        learner.step(state, (X, Y[:5]))
    learner.step(state, (X, Y))


def test_numbers_on_a_device_are_not_looked_at(learner, state):
    """A look would wait for the device; shapes and dtypes are free."""
    assert np.isnan(learner.apply(state, jnp.asarray(NAN), 0)).any()
    _, metrics = learner.step(state, (jnp.asarray(NAN), jnp.asarray(Y)))
    assert np.isnan(metrics["loss"])
