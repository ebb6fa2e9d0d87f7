"""Memories and what is replayed from them, against hand-made examples."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from support import Jitted, changed, digits_config

import bpnjax
from bpnjax import methods, networks
from bpnjax.methods import Batch, TaskData, replay
from bpnjax.methods.gem import Memory, last_examples
from bpnjax.methods.gem import draw as draw_of_tasks
from bpnjax.utils import prng
from bpnjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_once")
NUMBER = jax.ShapeDtypeStruct((), jnp.int32)


def numbered(numbers, weight):
    """A batch whose examples, labels and tasks tell which they are."""
    numbers = jnp.asarray(numbers)
    return Batch(numbers, numbers + 1000, jnp.asarray(weight, jnp.float32), numbers + 2000)


def test_reservoir_is_a_uniform_sample_of_the_stream():
    stream, size = 60, 10

    def fill(key):
        memory = replay.empty(size, NUMBER, NUMBER)
        for i, start in enumerate(range(0, stream, 15)):
            weight = jnp.arange(20) < 15  # the rest is padding
            batch = numbered(jnp.arange(start, start + 20), weight)
            memory = replay.offer(memory, jax.random.fold_in(key, i), batch)
        return memory

    memories = jax.jit(jax.vmap(fill))(jax.random.split(jax.random.key(0), 4000))
    assert (memories.seen == stream).all()
    counts = np.bincount(np.asarray(memories.x).ravel(), minlength=stream)
    assert len(counts) == stream  # padding never enters
    expected = 4000 * size / stream
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
    assert all(len(set(row)) == size for row in np.asarray(memories.x[:200]))
    # What belongs to an example stays with it.
    np.testing.assert_array_equal(memories.y, memories.x + 1000)
    np.testing.assert_array_equal(memories.task, memories.x + 2000)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_full_reservoir_of_one_keeps_each_of_two_examples_half_the_time(at_once):
    """Off by one it would keep the first of two with 1/3 or never."""

    def first_stays(key):
        memory = replay.empty(1, NUMBER, NUMBER)
        for i, numbers in enumerate([[7, 8]] if at_once else [[7], [8]]):
            batch = numbered(numbers, [1.0] * len(numbers))
            memory = replay.offer(memory, jax.random.fold_in(key, i), batch)
        return memory.x[0] == 7

    kept = jax.jit(jax.vmap(first_stays))(jax.random.split(jax.random.key(1), 10_000))
    assert abs(float(kept.mean()) - 0.5) < 5 * 0.5 / 100


def test_reservoir_keeps_everything_while_there_is_room():
    outputs = jnp.arange(6.0).reshape(3, 2)
    memory = replay.empty(5, NUMBER, NUMBER, outputs=(2,))
    memory = replay.offer(memory, jax.random.key(0), numbered([7, 8, 9], [1, 0, 1]), outputs)
    assert memory.x[:2].tolist() == [7, 9] and int(memory.seen) == 2
    np.testing.assert_array_equal(memory.outputs[:2], outputs[jnp.array([0, 2])])
    drawn, there = replay.draw(memory, jax.random.key(1), 50)
    assert set(drawn.x.tolist()) == {7, 9} and float(there) == 1.0
    np.testing.assert_array_equal(drawn.y, drawn.x + 1000)
    np.testing.assert_array_equal(drawn.task, drawn.x + 2000)
    np.testing.assert_array_equal(drawn.outputs[:, 0], np.where(drawn.x == 7, 0.0, 4.0))
    assert float(replay.draw(replay.empty(5, NUMBER, NUMBER), jax.random.key(1), 3)[1]) == 0.0


# What each adds to the gradient of the batch's mean loss: a share of that, of the squared distance
# to the outputs kept, and of the cross-entropy. A draw of 40 joins a batch of 10.
RULES = {
    "union": (methods.er(batch_size=40), 10 / 50, 0.0, 40 / 50),
    "sum": (methods.er(batch_size=40, combine="sum"), 1.0, 0.0, 1.0),
    "der": (methods.der(batch_size=40, alpha=3.0), 1.0, 3.0, 0.0),
    "derpp": (methods.derpp(batch_size=40, alpha=3.0, beta=0.5), 1.0, 3.0, 0.5),
}


@pytest.mark.parametrize("rule", RULES)
def test_replayed_gradient_by_hand(rule):
    """A linear network answers from memory; two of the batch's twelve examples are padding."""
    method, own, alpha, beta = RULES[rule]
    inputs, labels = jnp.array([[1.0, 2.0], [-1.0, 0.5]]), jnp.array([2, 0])
    params = jnp.array([[0.1, 0.2, 0.3], [0.3, -0.1, 0.2]])
    network = networks.from_function(lambda p, mode, x: x @ p, lambda key: params, x=inputs)
    learner = bpnjax.learner(network, method, optax.sgd(1.0), num_tasks=2)
    state = learner.begin_task(learner.init(jax.random.key(5)), 0)
    kept = jnp.array([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    memory = state.method.memory
    full = {"x": inputs, "y": labels, "task": jnp.zeros(2, int)}
    if rule in ("der", "derpp"):
        full["outputs"] = kept
    filled = {name: getattr(memory, name).at[:2].set(value) for name, value in full.items()}
    memory = replay.Reservoir(**{"outputs": None} | filled, seen=jnp.int32(2))
    ones, weight = jnp.ones((2, 3)), jnp.ones(12).at[10:].set(0.0)
    batch = Batch(jnp.zeros((12, 2)), jnp.zeros(12, int), weight, jnp.zeros(12, int))
    ctx = methods.Context(
        learner.setup, 0, 0, True, jax.random.key(5),
        trained=lambda p, x, task: (x @ p, {}),
        loss_of=lambda z, y, task: -jnp.take_along_axis(
            jax.nn.log_softmax(z), y[:, None], 1
        )[:, 0],
    )  # fmt: skip
    found = method.gradient(ones, params, state.method._replace(memory=memory), batch, ctx)

    first, second = jax.random.split(jax.random.fold_in(ctx.key, 0))
    expected = own * np.ones((2, 3))
    for key, weight, kind in ((first, alpha, "outputs"), (second, beta, "labels")):
        drawn, _ = replay.draw(memory, key, 40)
        places = np.where(np.asarray(drawn.x)[:, 0] == 1.0, 0, 1)
        assert 10 < places.sum() < 30
        x = np.asarray(inputs)[places]
        z = x @ np.asarray(params)
        if kind == "outputs":
            delta = 2 * (z - np.asarray(kept)[places]) / z.size
        else:
            p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
            delta = (p - np.eye(3)[np.asarray(labels)[places]]) / len(z)
        expected += weight * x.T @ delta
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_step_of_er_is_that_on_the_union_of_batch_and_draw():
    """Its authors' rule, on the whole step: one mean over all examples, whichever they are."""
    key = jax.random.key(0)
    jitted = Jitted(digits_config("er", train__optimizer="sgd", train__learning_rate=0.1))
    state, _ = jitted.run_steps(jitted.begin_task(jitted.init(key), 0), jitted.data, 0, 0, 0, 1)
    after, _ = jitted.run_steps(state, jitted.data, 0, 0, 1, 2)
    memory = state.learner.method.memory
    np.testing.assert_array_equal(memory.x[:48], jitted.epoch(key, 0, 0)[0][0])
    # The draw of the second step, by the key of that step.
    step = prng.fold(key, prng.STEP, 0, 1)
    _, second = jax.random.split(jax.random.fold_in(step, 0))
    drawn, _ = replay.draw(memory, second, 24)
    x, y = jitted.epoch(key, 0, 0)[1]
    x, y = jnp.concatenate([x, drawn.x]), jnp.concatenate([y, drawn.y])

    def loss(params):
        logits, _ = jitted.learner.network.apply(params, {}, x)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(72), y])

    before = state.learner.params
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, before, jax.grad(loss)(before))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        after.learner.params, expected,
    )  # fmt: skip


def test_er_ignores_the_weights_of_its_dark_kin():
    """`replay.alpha` and `replay.beta` are those of DER and DER++."""
    found = []
    for changes in ({}, {"replay__alpha": 7.0, "replay__beta": 0.0}):
        jitted = Jitted(digits_config("er", replay__combine="sum", **changes))
        state = jitted.begin_task(jitted.init(jax.random.key(0)), 0)
        found.append(jitted.run_steps(state, jitted.data, 0, 0, 0, 3)[0].learner.params)
    jax.tree.map(np.testing.assert_array_equal, *found)
    for names in ({"alpha": 1.0}, {"beta": 1.0}):
        with pytest.raises(UserError, match=r"replay\.\w+: er has no such setting"):
            methods.er(**names)


def test_an_empty_memory_changes_nothing():
    key, first = jax.random.key(0), {}
    for method in ("sgd", "er", "derpp", "gem", "agem"):
        jitted = Jitted(digits_config(method))
        state = jitted.begin_task(jitted.init(key), 0)
        state, _ = jitted.run_steps(state, jitted.data, 0, 0, 0, 1)
        first[method] = state.learner.params
    for params in first.values():
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            params, first["sgd"],
        )  # fmt: skip


def test_examples_enter_with_the_outputs_before_the_step():
    jitted = Jitted(digits_config("der"))
    key = jax.random.key(0)
    state = jitted.begin_task(jitted.init(key), 1)
    moved, _ = jitted.run_steps(state, jitted.data, 1, 0, 0, 1)
    memory = moved.learner.method.memory
    x, y = jitted.epoch(key, 1, 0)[0]
    answers, _ = jitted.learner.network.apply(state.learner.params, {}, x)
    np.testing.assert_allclose(memory.outputs[:48], answers, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(memory.x[:48], x)
    np.testing.assert_array_equal(memory.y[:48], y)
    assert memory.task[:48].tolist() == [1] * 48
    assert int(memory.seen) == 48


@pytest.mark.parametrize("per", ["task", "class"])
def test_gem_keeps_the_last_examples_of_the_stream(per):
    labels = jnp.array([0, 1, 0, 0, 0, 1, 0, 0, 0, 9, 9, 9])  # the last three are padding

    def take(places):
        return places + 100, labels[places]

    data = TaskData(take, 12, jnp.int32(9), *[None] * 5)
    x, y, real = last_examples(data, 4, 2 if per == "class" else 0, 10)
    chosen = np.asarray(x)[np.asarray(real) > 0].tolist()
    # Per class the last two of class 0 and of class 1; per task simply the last four.
    assert chosen == ([101, 105, 107, 108] if per == "class" else [105, 106, 107, 108])
    np.testing.assert_array_equal(y, labels[x - 100])
    x, _, real = last_examples(data, 20, 0, 10)
    assert x.shape == (20,) and float(real.sum()) == 9


@pytest.mark.parametrize("per, places", [("task", 5), ("class", 10)])
def test_gem_fills_the_memory_of_a_task_when_it_ends(per, places):
    jitted = Jitted(digits_config("gem", gem__memories=5, gem__per=per, train__epochs=1))
    key = jax.random.key(0)
    state, _ = jitted.train(key, [1])
    memory = state.learner.method
    x, y = (np.concatenate(part) for part in zip(*jitted.epoch(key, 1, 0), strict=True))
    assert memory.x.shape[:2] == (3, places)
    if per == "task":
        chosen = np.arange(len(y))[-5:]
    else:
        chosen = np.sort(np.concatenate([np.flatnonzero(y == c)[-5:] for c in (2, 3)]))
    np.testing.assert_array_equal(memory.x[1], x[chosen])
    np.testing.assert_array_equal(memory.y[1], y[chosen])
    assert memory.real.tolist() == [[0.0] * places, [1.0] * places, [0.0] * places]


def test_agem_draws_examples_of_earlier_tasks_once():
    numbers = jnp.arange(24).reshape(4, 6)
    real = jnp.ones((4, 6)).at[1, 4:].set(0.0)  # the second task had four examples
    memory = Memory(numbers, numbers + 100, real)
    earlier = jnp.array([True, True, False, False])
    keys = jax.random.split(jax.random.key(0), 2000)
    draw = jax.jit(jax.vmap(lambda key: draw_of_tasks(memory, earlier, key, 5)))
    found, labels, task, weight = draw(keys)
    assert (weight == 1).all() and all(len(set(row)) == 5 for row in np.asarray(found).tolist())
    np.testing.assert_array_equal(labels, found + 100)
    np.testing.assert_array_equal(task, found // 6)
    counts = np.bincount(np.asarray(found).ravel(), minlength=24)
    assert (counts[10:] == 0).all()
    assert np.abs(counts[:10] - 1000).max() < 5 * np.sqrt(1000)
    for size, places in ((20, 20), (30, 24)):  # more than there are: all of them
        found, _, _, weight = draw_of_tasks(memory, earlier, keys[0], size)
        assert found.shape == (places,)
        assert sorted(np.asarray(found)[np.asarray(weight) > 0].tolist()) == list(range(10))
    assert not draw_of_tasks(memory, earlier & False, keys[0], 5)[3].any()


@pytest.mark.parametrize("method", ["gem", "agem"])
def test_a_step_never_raises_the_loss_on_what_is_kept(method):
    """The projected step against the gradients of the memories, each in its task's own way."""
    changes = dict(train__optimizer="sgd", train__learning_rate=1e-3, gem__margin=0.0,
                   gem__damping=1e-6, gem__memories=5, gem__batch_size=20)  # fmt: skip
    jitted = Jitted(digits_config(method, **changes))
    key = jax.random.key(0)
    state, _ = jitted.train(key, [0, 1], epochs=8)
    state = jitted.begin_task(state, 2)
    kept = state.learner.method
    free = changed(state, method=kept._replace(real=jnp.zeros_like(kept.real)))
    moves = []
    for one in (state, free):
        moved, _ = jitted.run_steps(one, jitted.data, 2, 0, 0, 1)
        move = jax.tree.map(jnp.subtract, moved.learner.params, one.learner.params)
        moves.append(ravel_pytree(move)[0])

    def loss(params, tasks):
        x, y = (jnp.concatenate([leaf[t] for t in tasks]) for leaf in (kept.x, kept.y))
        logits, _ = jitted.learner.network.apply(params, {}, x)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(y)), y])

    def rise(move, tasks):
        return float(ravel_pytree(jax.grad(loss)(state.learner.params, tasks))[0] @ move)

    groups = [(0,), (1,)] if method == "gem" else [(0, 1)]
    for tasks in groups:
        assert rise(moves[0], tasks) < 1e-7, (tasks, rise(moves[0], tasks))
    assert any(rise(moves[1], tasks) > 1e-5 for tasks in groups)  # left alone it would


def test_gem_and_replay_remember_what_sgd_forgets():
    key, told = jax.random.key(0), {}
    for method in ("sgd", "gem", "agem", "er", "derpp"):
        # A rate at which sgd forgets in so short a sequence.
        jitted = Jitted(digits_config(method, train__learning_rate=1e-2, train__epochs=8))
        state, _ = jitted.train(key, [0, 1])
        told[method] = jitted.test(state, 1)["task_told"]
    assert told["sgd"][0] < 0.2
    for method in ("gem", "er", "derpp"):
        assert told[method][0] > told["sgd"][0] + 0.5, (method, told)
    assert told["agem"][0] > told["sgd"][0], told


class Normed(nn.Module):
    """BatchNorm and an output."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
        return nn.Dense(2)(x)


@pytest.mark.parametrize("policy", ["shared", "task", "frozen"])
@pytest.mark.parametrize("make", [methods.er, methods.derpp])
def test_replayed_examples_enter_statistics_that_tasks_share(make, policy):
    """Step 1 sees ones and nothing kept, step 2 zeros and, in passes of their own, kept ones."""
    zeros, ones = np.zeros((4, 3), np.float32), np.ones((4, 3), np.float32)
    y = np.array([0, 1, 0, 1], np.int32)
    network = networks.from_linen(Normed(), zeros)
    learner = bpnjax.learner(
        network, make(memory_size=4, batch_size=4), optax.sgd(0.0), 1, batch_statistics=policy
    )
    state = learner.begin_task(learner.init(jax.random.key(0)), 0)
    state, _ = learner.step(state, (ones, y))
    first = 0.0 if policy == "frozen" else 0.1  # the zeros of an empty memory do not count
    mean = state.variables["batch_stats"]["norm"]["mean"]
    np.testing.assert_allclose(mean, first, rtol=1e-6)
    state, _ = learner.step(state, (zeros, y))
    passes = 1 if make is methods.er else 2  # of replayed examples, beside that of the batch
    share = passes / (1 + passes) if policy == "shared" else 0.0
    mean = state.variables["batch_stats"]["norm"]["mean"]
    np.testing.assert_allclose(mean, 0.9 * first + 0.1 * share, rtol=1e-6)


def test_frozen_statistics_stay_bit_for_bit():
    """A mean of equal numbers may differ from them in the last place."""
    x, y = np.ones((4, 3), np.float32), np.array([0, 1, 0, 1], np.int32)
    network = networks.from_linen(Normed(), x)
    method = methods.derpp(memory_size=4, batch_size=4)
    learner = bpnjax.learner(network, method, optax.sgd(0.1), 1, batch_statistics="frozen")
    state = learner.init(jax.random.key(0))
    start = np.float32([0.1, 1 / 3, 0.7])
    state = state.replace(
        variables=jax.tree.map(lambda v: jnp.asarray(start), state.variables),
    )
    state = learner.begin_task(state, 0)
    for _ in range(3):
        state, _ = learner.step(state, (x, y))
    for leaf in jax.tree.leaves(state.variables):
        np.testing.assert_array_equal(leaf, start)


def test_outputs_are_kept_as_training_gives_them():
    """With the statistics of the batch; running ones of a fresh network are far from them."""
    x = 5.0 + 3.0 * np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    network = networks.from_linen(Normed(), x)
    learner = bpnjax.learner(network, methods.der(memory_size=4), optax.sgd(0.1), 1)
    state = learner.begin_task(learner.init(jax.random.key(0)), 0)
    params = jax.tree.map(np.array, state.params)
    state, _ = learner.step(state, (x, np.array([0, 1, 0, 1], np.int32)))
    z = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    expected = z @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    np.testing.assert_allclose(state.method.memory.outputs, expected, rtol=1e-3, atol=1e-3)
