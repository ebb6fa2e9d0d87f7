"""Frozen: nothing shared moves but the columns of the task; earlier answers stay bit for bit."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import Jitted, digits_config

import bpnjax
from bpnjax import methods, networks
from bpnjax.utils.errors import UserError


def trained(name, heads, **changes):
    """States after each of two tasks."""
    jitted = Jitted(digits_config(name, sequence__heads=heads, train__epochs=2, **changes))
    state, after = jitted.init(jax.random.key(0)), []
    for task in range(2):
        state = jitted.begin_task(state, task)
        for epoch in range(2):
            state, _ = jitted.run_steps(state, jitted.data, task, epoch, 0, 5)
        state = jitted.end_task(state, jitted.data, task)
        after.append(jax.tree.map(np.asarray, state.learner.params))
    return jitted, state, after


@pytest.mark.parametrize("name", ["frozen", "bd_frozen", "bias_frozen"])
@pytest.mark.parametrize("optimizer", ["adam", "momentum"])
def test_only_the_columns_of_the_task_move(name, optimizer):
    jitted, _, (first, second) = trained(name, "single", train__optimizer=optimizer)
    start = jax.tree.map(np.asarray, jitted.init(jax.random.key(0)).learner.params)
    classes = jitted.sequence.classes
    for before, after, task in ((start, first, 0), (first, second, 1)):
        for layer, leaves in before.items():
            for leaf, old in leaves.items():
                moved = (after[layer][leaf] != old).reshape(-1, old.shape[-1]).any(0)
                if layer == "output":
                    np.testing.assert_array_equal(moved, classes[task])
                else:
                    assert not moved.any()


@pytest.mark.parametrize("name", ["bd_frozen", "bias_frozen"])
def test_earlier_answers_stay_bit_for_bit(name):
    jitted, last, _ = trained(name, "multi")
    config = digits_config(name, sequence__heads="multi", train__epochs=2)
    again = Jitted(config)
    state = again.begin_task(again.init(jax.random.key(0)), 0)
    for epoch in range(2):
        state, _ = again.run_steps(state, again.data, 0, epoch, 0, 5)
    state = again.end_task(state, again.data, 0)
    x = jnp.asarray(jitted.sequence.test.images[:20])
    own = jitted.sequence.classes[0]
    before = np.asarray(jitted.learner.answer(state.learner, x, 0, between_tasks=True))
    after = np.asarray(jitted.learner.answer(last.learner, x, 0, between_tasks=True))
    assert before[:, own].tobytes() == after[:, own].tobytes()


def test_the_gradient_of_the_frozen_part_is_not_computed():
    """A kernel that enters by a stopped gradient has none in the backward pass."""
    network = networks.from_linen(nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(4)]),
                                  jnp.ones((1, 6)))  # fmt: skip
    learner = bpnjax.learner(
        network, methods.bias_frozen(), optax.sgd(0.1), 2, classes=[[0, 1], [2, 3]]
    )
    frozen = learner.begin_task(learner.init(jax.random.key(0)), 0)
    batch = (jnp.ones((5, 6)), jnp.zeros(5, jnp.int32))
    free = bpnjax.learner(
        network, methods.plain_bias(), optax.sgd(0.1), 2, classes=[[0, 1], [2, 3]]
    )
    products = [
        str(jax.make_jaxpr(one.step)(state, batch)).count("dot_general")
        for one, state in ((learner, frozen), (free, free.begin_task(free.init(jax.random.key(0)),
                                                                     0)))
    ]  # fmt: skip
    assert products[0] < products[1]


def test_classes_must_be_known():
    network = networks.from_linen(nn.Dense(4), jnp.ones((1, 6)))
    with pytest.raises(UserError, match="classes: frozen needs to know which outputs belong"):
        bpnjax.learner(network, methods.frozen(), optax.sgd(0.1), 2)


def test_an_optimizer_that_moves_without_a_gradient_moves_nothing_frozen():
    """Weight decay pulls at parameters whose gradient is zero, and momentum keeps them going."""
    network = networks.from_linen(nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(4)]),
                                  jnp.ones((1, 6)))  # fmt: skip
    learner = bpnjax.learner(
        network, methods.frozen(), optax.adamw(0.1, weight_decay=0.5), 2, classes=[[0, 1], [2, 3]]
    )
    state = learner.begin_task(learner.init(jax.random.key(0)), 0)
    before = jax.tree.map(np.asarray, state.params)
    for _ in range(3):
        state, _ = learner.step(state, (jnp.ones((5, 6)), jnp.zeros(5, jnp.int32)))
    after = jax.tree.map(np.asarray, state.params)
    np.testing.assert_array_equal(after["layers_0"]["kernel"], before["layers_0"]["kernel"])
    moved = (after["layers_2"]["kernel"] != before["layers_2"]["kernel"]).any(0)
    np.testing.assert_array_equal(moved, [True, True, False, False])
