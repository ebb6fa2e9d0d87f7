"""Memories and what is replayed from them, against hand-made examples."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import Jitted, digits_config

from bpnjax.methods import er, gem, replay

pytestmark = pytest.mark.usefixtures("compile_once")


def test_reservoir_is_a_uniform_sample_of_the_stream():
    stream, size = 60, 10

    def fill(key):
        memory = replay.empty(size)
        for i, start in enumerate(range(0, stream, 15)):
            slots = jnp.arange(start, start + 20)
            weight = (jnp.arange(20) < 15).astype(jnp.float32)  # the rest is padding
            memory = replay.offer(memory, jax.random.fold_in(key, i), slots, weight)
        return memory

    memories = jax.jit(jax.vmap(fill))(jax.random.split(jax.random.key(0), 4000))
    assert (memories.seen == stream).all()
    counts = np.bincount(np.asarray(memories.slots).ravel(), minlength=stream)
    assert len(counts) == stream  # padding never enters
    expected = 4000 * size / stream
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
    assert all(len(set(row)) == size for row in np.asarray(memories.slots[:200]))


def test_reservoir_keeps_everything_while_there_is_room():
    logits = jnp.arange(6.0).reshape(3, 2)
    memory = replay.offer(replay.empty(5, 2), jax.random.key(0), jnp.array([7, 8, 9]),
                          jnp.array([1.0, 0.0, 1.0]), logits)  # fmt: skip
    assert memory.slots[:2].tolist() == [7, 9] and int(memory.seen) == 2
    np.testing.assert_array_equal(memory.logits[:2], logits[jnp.array([0, 2])])
    slots, kept, there = replay.draw(memory, jax.random.key(1), 50)
    assert set(slots.tolist()) == {7, 9} and float(there) == 1.0
    np.testing.assert_array_equal(kept[:, 0], np.where(slots == 7, 0.0, 4.0))
    assert float(replay.draw(replay.empty(5), jax.random.key(1), 3)[2]) == 0.0


@pytest.mark.parametrize("method, alpha, beta", [("er", 0, 1), ("der", 3, 0), ("derpp", 3, 0.5)])
def test_replayed_gradient_by_hand(method, alpha, beta):
    """A linear network answers from memory; alpha mean (z - kept)^2 + beta cross-entropy."""
    x = {0: jnp.array([1.0, 2.0]), 1: jnp.array([-1.0, 0.5])}
    labels = jnp.array([2, 0])

    def logits(core, slots):
        return jnp.stack([x[0], x[1]])[slots] @ core

    def losses(core, slots):
        log_p = jax.nn.log_softmax(logits(core, slots))
        return -jnp.take_along_axis(log_p, labels[slots][:, None], 1)[:, 0]

    core = jnp.array([[0.1, 0.2, 0.3], [0.3, -0.1, 0.2]])
    kept = jnp.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    memory = replay.Reservoir(jnp.array([0, 1]), kept, jnp.int32(2))
    state = er.ReplayState(memory, jnp.float32(3.0), jnp.float32(beta))
    config = SimpleNamespace(replay=SimpleNamespace(batch_size=40))
    examples = SimpleNamespace(logits=logits, losses=losses)
    spec = SimpleNamespace(config=config)
    step = SimpleNamespace(key=jax.random.key(5), examples=examples, spec=spec)
    found = getattr(er, method.upper()).gradient(jnp.ones((2, 3)), core, state, step)

    first, second = jax.random.split(jax.random.fold_in(step.key, 0))
    expected = np.ones((2, 3))
    for key, weight, kind in ((first, alpha, "logits"), (second, beta, "labels")):
        places = np.asarray(replay.draw(memory, key, 40)[0])
        inputs = np.stack([x[i] for i in places])
        z = inputs @ np.asarray(core)
        if kind == "logits":
            delta = 2 * (z - np.asarray(kept)[places]) / z.size
        else:
            p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
            delta = (p - np.eye(3)[np.asarray(labels)[places]]) / len(z)
        expected += weight * inputs.T @ delta
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_an_empty_memory_changes_nothing():
    key = jax.random.key(0)
    first = {}
    for method in ("sgd", "er", "derpp", "gem", "agem"):
        jitted = Jitted(digits_config(method))
        state = jitted.begin_task(key, jitted.init(key), 0)
        state, _ = jitted.run_steps(key, state, jitted.data, 0, 0, 0, 1)
        first[method] = state.core
    for method, core in first.items():
        (
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
                core,
                first["sgd"],
            ),
            method,
        )


def test_examples_enter_with_the_logits_before_the_step():
    jitted = Jitted(digits_config("der"))
    key = jax.random.key(0)
    state = jitted.begin_task(key, jitted.init(key), 0)
    moved, _ = jitted.run_steps(key, state, jitted.data, 0, 0, 0, 1)
    memory = moved.method.memory
    x, _ = jitted.epoch(key, 0, 0)[0]
    answers = jitted.problem.model.apply({"params": state.core}, x)
    np.testing.assert_allclose(memory.logits[:48], answers, rtol=1e-3, atol=1e-5)
    assert int(memory.seen) == 48


@pytest.mark.parametrize("per", ["task", "class"])
def test_gem_keeps_the_last_examples_of_the_stream(per):
    slots = jnp.arange(100, 112)
    labels = jnp.array([0, 1, 0, 0, 0, 1, 0, 0, 0, 9, 9, 9])  # the last three are padding
    examples = SimpleNamespace(labels=lambda slots: labels[slots - 100])
    ended = SimpleNamespace(slots=slots, examples=examples, count=jnp.int32(9))
    kept, real = gem.last_examples(ended, 4, 2 if per == "class" else 0, 10)
    chosen = set(np.asarray(kept)[np.asarray(real) > 0].tolist())
    # Per class the last two of class 0 and of class 1; per task simply the last four.
    assert chosen == ({107, 108, 101, 105} if per == "class" else {105, 106, 107, 108})
    kept, real = gem.last_examples(ended, 20, 0, 10)
    assert kept.shape == (20,) and float(real.sum()) == 9


def test_agem_draws_examples_of_earlier_tasks_once():
    slots = jnp.arange(24).reshape(4, 6)
    real = jnp.ones((4, 6)).at[1, 4:].set(0.0)  # the second task had four examples
    memory, earlier = gem.Memory(slots, real), jnp.array([True, True, False, False])
    keys = jax.random.split(jax.random.key(0), 2000)
    found, weight = jax.jit(jax.vmap(lambda key: gem.draw(memory, earlier, key, 5)))(keys)
    assert (weight == 1).all() and all(len(set(row)) == 5 for row in np.asarray(found).tolist())
    counts = np.bincount(np.asarray(found).ravel(), minlength=24)
    assert (counts[10:] == 0).all()
    assert np.abs(counts[:10] - 1000).max() < 5 * np.sqrt(1000)
    for size, places in ((20, 20), (30, 24)):  # more than there are: all of them
        found, weight = gem.draw(memory, earlier, keys[0], size)
        assert found.shape == (places,)
        assert sorted(np.asarray(found)[np.asarray(weight) > 0].tolist()) == list(range(10))
    assert not gem.draw(memory, earlier & False, keys[0], 5)[1].any()


def test_gem_and_replay_remember_what_sgd_forgets():
    key = jax.random.key(0)
    told = {}
    for method in ("sgd", "gem", "agem", "er", "derpp"):
        # A rate at which sgd forgets in so short a sequence.
        jitted = Jitted(digits_config(method, train__learning_rate=1e-2, train__epochs=8))
        state, _ = jitted.train(key, [0, 1])
        told[method] = jitted.test(key, state, 1)["task_told"]
    assert told["sgd"][0] < 0.2
    for method in ("gem", "er", "derpp"):
        assert told[method][0] > told["sgd"][0] + 0.5, (method, told)
    assert told["agem"][0] > told["sgd"][0], told
