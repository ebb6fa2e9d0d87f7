"""Shapes that would broadcast and give a number, and the wrong one, are refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bpnjax
from bpnjax import importance, methods, modes, networks, optim
from bpnjax.importance import kronecker
from bpnjax.utils.errors import UserError
from bpnjax.utils.heads import within_head

N, C = 4, 3
X = jnp.arange(8.0).reshape(N, 2) / 8
LABELS = jnp.array([0, 1, 2, 0])


@pytest.fixture(scope="module")
def net():
    network = networks.from_linen(nn.Dense(C), X)
    params, _ = network.init(jax.random.key(0))
    return network, params


def measured(net, **options):
    """The four sums of importance, each with the same options."""
    network, params = net
    args = (network, params, {}, X)
    return (
        lambda: importance.fisher_sum(*args, LABELS, **options),
        lambda: importance.sensitivity_sum(*args, **options),
        lambda: importance.neurons_sum(*args, LABELS, **options),
        lambda: kronecker.factors_sum(*args, LABELS, **options),
    )


@pytest.mark.parametrize("shape", [(), (1,), (N, 1), (1, N), (N + 1,)])
def test_weights_are_one_per_example(net, shape):
    for measure in measured(net, weights=jnp.ones(shape)):
        with pytest.raises(AssertionError, match="rank|shape prefix"):
            measure()
    for measure in measured(net, weights=jnp.ones(N)):
        measure()


@pytest.mark.parametrize("shape", [(), (1,), (N, C), (1, C), (C + 1,)])
def test_classes_are_one_per_output(net, shape):
    for measure in measured(net, classes=jnp.ones(shape, bool)):
        with pytest.raises(AssertionError, match="rank|shape suffix"):
            measure()
    for measure in measured(net, classes=jnp.ones(C, bool)):
        measure()


def test_a_loss_is_one_number_per_example(net):
    network, params = net
    targets = jnp.linspace(0, 1, N)

    def mixing(outputs, y):  # [n, 1] and [n] give [n, n]
        return jnp.square(outputs[:, :1] - y)

    def right(outputs, y):
        return jnp.square(outputs[:, 0] - y)

    args = (network, params, {}, X, targets)
    for measure in (importance.fisher_sum, kronecker.factors_sum, importance.fisher):
        with pytest.raises(AssertionError, match="assert_shape"):
            measure(*args, loss=mixing)
        measure(*args, loss=right)
    with pytest.raises(AssertionError, match="assert_shape"):
        importance.neurons_sum(*args, of="loss", loss=mixing)
    importance.neurons_sum(*args, of="loss", loss=right)


def test_labels_are_as_many_as_examples(net):
    network, params = net

    def loss(outputs, y):
        return jnp.square(outputs[:, 0] - y)

    for labels in (jnp.zeros(1), jnp.zeros(N + 1)):
        for measure in (importance.fisher_sum, kronecker.factors_sum):
            with pytest.raises(AssertionError, match="shape prefix"):
                measure(network, params, {}, X, labels, loss=loss)


@pytest.mark.parametrize("shape", [(), (1,), (2, 1), (2, C), (C + 1,)])
@pytest.mark.parametrize("name", ["bias", "key"])
def test_merge_wants_one_width_per_layer(shape, name):
    of_batch = {"out": {name: jnp.full(C, 2.0)}}
    if shape == (2, C):  # one vector for all, and one per example
        merged = modes.merge(of_batch, {"out": {name: jnp.full(shape, 3.0)}})["out"][name]
        assert merged.tolist() == [[5.0 if name == "bias" else 6.0] * C] * 2
        return
    with pytest.raises(AssertionError, match="shape suffix"):
        modes.merge(of_batch, {"out": {name: jnp.ones(shape)}})


def test_a_bank_takes_one_task_at_a_time_and_gives_a_vector_of_them():
    bank = {"out": {"bias": jnp.zeros((2, C))}}
    with pytest.raises(AssertionError, match="rank 1"):
        modes.store(bank, {"out": {"bias": jnp.ones(C)}}, np.array([0, 1]))
    with pytest.raises(AssertionError, match="rank 2"):
        modes.select(bank, np.array([[0], [1]]))


@pytest.mark.parametrize("wrong", ["params", "anchor", "importance"])
@pytest.mark.parametrize("shape", [(), (1,), (1, C), (N, C)])
def test_an_anchor_has_the_shapes_of_the_parameters(wrong, shape):
    trees = {name: {"w": jnp.ones(C)} for name in ("params", "anchor", "importance")}
    trees[wrong] = {"w": jnp.ones(shape)}
    with pytest.raises(AssertionError, match="different shapes"):
        optim.anchor_gradient({"w": jnp.ones(C)}, **trees, strength=1.0)
    with pytest.raises(AssertionError, match="different shapes"):
        optim.anchor_penalty(**trees, strength=1.0)
    with pytest.raises(AssertionError, match="different shapes"):
        optim.pull_to_anchor(**trees, strength=1.0)
    with pytest.raises(AssertionError, match="different shapes"):
        tx = optim.add_quadratic_anchor(1.0)
        params = trees.pop("params")
        tx.update({"w": jnp.ones(C)}, tx.init(params), params, **trees)


def test_a_strength_and_a_rate_of_an_anchor_are_scalars():
    trees = {name: {"w": jnp.ones(C)} for name in ("grads", "params", "anchor", "importance")}
    for options in ({"strength": jnp.ones(C)}, {"strength": 1.0, "step_size": {"w": jnp.ones(C)}}):
        with pytest.raises(AssertionError, match="rank 1"):
            optim.anchor_gradient(**trees, **options)


def test_the_basis_of_kronecker_factors_is_that_of_the_weights():
    basis = kronecker.Basis(jnp.eye(2), jnp.eye(C), jnp.ones((2, C)))
    for weights, anchor in (((2, C), (2, 1)), ((2, C), (C,)), ((2, 1), (2, C))):
        with pytest.raises(AssertionError, match="different shapes"):
            kronecker.pull_back(jnp.ones(weights), jnp.ones(anchor), basis, 1.0)


def test_a_head_has_the_outputs_of_the_network():
    for shape in ((), (1,), (C + 1,), (2, N, C)):
        with pytest.raises(AssertionError):
            within_head(jnp.zeros((N, C)), jnp.ones(shape, bool))
    for shape in ((C,), (N, C), (1, C)):
        within_head(jnp.zeros((N, C)), jnp.ones(shape, bool))


def test_a_learner_refuses_a_loss_that_mixes_examples():
    x = jnp.arange(8.0).reshape(N, 2) / 8
    network, targets = networks.from_linen(nn.Dense(1), x), jnp.linspace(0, 1, N)

    def learner_with(loss):
        return bpnjax.learner(
            network, methods.sgd(), optax.sgd(0.1), num_tasks=1, loss=loss, label=targets
        )

    def mixing(outputs, y):  # [n, 1] and [n] give [n, n]
        return jnp.square(outputs - y)

    made = learner_with(mixing)
    state = made.begin_task(made.init(jax.random.key(0)), 0)
    with pytest.raises(UserError, match=r"loss: it returns shape \(4, 4\) .*one loss per example"):
        made.step(state, (x, targets))
    for right in (
        lambda outputs, y: jnp.square(outputs[:, 0] - y),
        lambda outputs, y: jnp.square(outputs - y[:, None]),
        # As many axes as examples, and yet none of another example.
        lambda outputs, y: jnp.square(outputs - y[:, None]) * jnp.ones(N),
    ):
        made = learner_with(right)
        state = made.begin_task(made.init(jax.random.key(0)), 0)
        assert np.isfinite(made.step(state, (x, targets))[1]["loss"])
