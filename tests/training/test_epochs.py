"""The order of an epoch's examples, and the steps that take them."""

import jax
import numpy as np
import pytest
from support import Jitted, digits_config

from bpnjax.training import epochs

pytestmark = pytest.mark.usefixtures("compile_once")


def order(jitted, seed, task, epoch):
    """The slots of an epoch's real examples, in their order."""
    key = jax.random.key(seed)
    slots, count = epochs.epoch_order(jitted.experiment, key, jitted.data.train, task, epoch)
    slots, count = np.asarray(slots), int(count)
    width = jitted.data.train.index.shape[1]
    real = np.asarray(jitted.data.train.count)
    assert (slots[count:] % width >= real[slots[count:] // width]).all()  # padding comes last
    return slots[:count]


def test_an_epoch_takes_each_example_of_its_task_once():
    jitted = Jitted(digits_config("sgd"))
    width, count = jitted.data.train.index.shape[1], jitted.sequence.train.count
    assert len(set(count.tolist())) > 1  # tasks of different sizes
    for task in range(3):
        slots = order(jitted, 0, task, 0)
        assert sorted(slots.tolist()) == [task * width + i for i in range(count[task])]


def test_joint_training_takes_the_examples_of_all_tasks_mixed():
    jitted = Jitted(digits_config("joint"))
    width, count = jitted.data.train.index.shape[1], jitted.sequence.train.count
    slots = order(jitted, 0, 2, 0)
    every = [t * width + i for t in range(3) for i in range(count[t])]
    assert sorted(slots.tolist()) == every
    first = slots[:60] // width
    assert all(5 < (first == task).sum() < 40 for task in range(3))
    assert (order(jitted, 0, 2, 1) != slots).mean() > 0.9


def test_every_epoch_task_and_seed_has_an_order_of_its_own():
    jitted = Jitted(digits_config("sgd"))
    width = jitted.data.train.index.shape[1]
    least = int(jitted.sequence.train.count.min())
    at = [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 2, 0), (1, 0, 0)]
    found = {place: order(jitted, *place) % width for place in at}
    for i, one in enumerate(at):
        assert (np.diff(found[one]) < 0).mean() > 0.3  # shuffled
        for other in at[:i]:
            # As permutations of the task's own examples, both shuffled apart.
            assert (found[one][:least] != found[other][:least]).mean() > 0.9, (one, other)
    np.testing.assert_array_equal(order(jitted, 0, 0, 1) % width, found[0, 0, 1])


def test_a_step_takes_the_examples_of_its_place_in_its_epoch():
    """Weights that a step moves are those of pixels that its only example has."""
    config = digits_config("sgd", train__optimizer="sgd", train__batch_size=1, model__hidden=(),
                           dataset__normalize="unit")  # fmt: skip
    jitted, key = Jitted(config), jax.random.key(0)
    start = jitted.begin_task(jitted.init(key), 1)
    for epoch, step in [(0, 0), (0, 5), (1, 0), (1, 5)]:
        x, _ = jitted.epoch(key, 1, epoch)[step]
        after, _ = jitted.run_steps(start, jitted.data, 1, epoch, step, step + 1)
        kernels = (s.learner.params["output"]["kernel"] for s in (start, after))
        moved = np.abs(np.subtract(*kernels)).max(1) > 0
        np.testing.assert_array_equal(moved, np.asarray(x).ravel() > 0)


def test_a_range_in_pieces_equals_the_whole():
    jitted = Jitted(digits_config("bd_ewc"))
    start = jitted.begin_task(jitted.init(jax.random.key(0)), 0)
    whole, sums = jitted.run_steps(start, jitted.data, 0, 0, 0, 6)
    state, total = start, 0.0
    for first, last in [(0, 2), (2, 3), (3, 6)]:
        state, part = jitted.run_steps(state, jitted.data, 0, 0, first, last)
        total += float(part.examples)
    jax.tree.map(np.testing.assert_array_equal, state.learner.params, whole.learner.params)
    assert total == float(sums.examples) == jitted.sequence.train.count[0]
    assert int(state.learner.step) == 6 and int(state.learner.task) == 0
