"""The learner in a user's own loop: any network, loss, batch, file, and number of seeds."""

import functools
import os
import subprocess
import sys

import flax.linen as nn
import flax_networks
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from command import ROOT, XLA_FLAGS

import bpnjax
from bpnjax import methods, networks
from bpnjax.models import MLP
from bpnjax.utils import prng
from bpnjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_once")

DRAWS = np.random.default_rng(0)
CLASSES = ((0, 1), (2, 3), (1, 2))
SETTINGS = {
    "agem": {"memories": 6, "batch_size": 4},
    "bd_ewc": {"hidden_dim": 4, "strength": 0.1},
    "bd_psp": {"hidden_dim": 4},
    "der": {"memory_size": 9, "batch_size": 4},
    "derpp": {"memory_size": 9, "batch_size": 4},
    "ebll": {"code": 3, "epochs": 1},
    "er": {"memory_size": 9, "batch_size": 4},
    "ewc": {"strength": 0.1},
    "gem": {"memories": 6},
    "mas": {"strength": 1.0},
    "si": {"strength": 1.0},
}


def make_task(task, n=8):
    """Examples of two classes."""
    y = np.asarray(CLASSES[task], np.int32)[DRAWS.integers(2, size=n)]
    return DRAWS.normal(size=(n, 5)).astype(np.float32) + y[:, None], y


TASKS = [make_task(task) for task in range(3)]
X, Y = TASKS[0]
IDS = np.array([1, 0, 0, 1, 1, 0, 1, 0])


@functools.cache
def linen(module):
    return networks.from_linen(module, X[:1])


def mlp(outputs=4):
    return linen(MLP((6,), outputs))


def make(method="bd_ewc", network=None, optimizer=None, num_tasks=2, settings=None, **options):
    """A learner of a method of the registry, or of a method."""
    if network is None and optimizer is None and settings is None and isinstance(method, str):
        return usual(method, num_tasks, tuple(sorted(options.items(), key=str)))
    if isinstance(method, str):
        method = methods.REGISTRY[method](**(settings or SETTINGS.get(method, {})))
    network = mlp() if network is None else network
    optimizer = optax.sgd(0.1, momentum=0.9) if optimizer is None else optimizer
    return bpnjax.learner(network, method, optimizer, num_tasks, **options)


@functools.cache
def usual(method, num_tasks, options):
    """The same learner for all tests that change nothing, which compiles once."""
    return make(method, mlp(), num_tasks=num_tasks, **dict(options))


def begun(learner, task=0, seed=0):
    return learner.begin_task(learner.init(jax.random.key(seed)), task)


def train(learner, state, tasks=(0, 1), data=TASKS, steps=3):
    """Trains tasks in turn; returns the state and what the last step said."""
    for task in tasks:
        state = learner.begin_task(state, task)
        for _ in range(steps):
            state, metrics = learner.step(state, data[task])
        state = learner.end_task(state, data[task])
    return state, metrics


def copied(state):
    """A copy that no step consumes."""
    return jax.tree.map(jnp.copy, state)


def same(ours, expected, **tolerance):
    """Two trees agree; bit for bit without a tolerance."""
    ours, expected = prng.to_numbers(ours), prng.to_numbers(expected)
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if tolerance:
            np.testing.assert_allclose(a, b, **tolerance)
        else:
            np.testing.assert_array_equal(a, b)


CLOSE = {"rtol": 2e-5, "atol": 2e-6}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


# Batches.


@pytest.mark.parametrize(
    "method", ["agem", "bd_ewc", slow("derpp"), "ebll", "er", slow("lwf"), "si"]
)
def test_padding_counts_nothing(method):
    """Three real examples of eight, the others far away, are the batch of these three."""
    learner = make(method, classes=CLASSES[:2])
    state, _ = train(learner, learner.init(jax.random.key(0)), (0,))
    state = learner.begin_task(state, 1)
    other = copied(state)
    x, y = TASKS[1]
    rows, weight = np.array([0, 1, 2]), (np.arange(8) < 3).astype(np.float32)
    padded = np.where(weight[:, None] > 0, x, 100.0).astype(np.float32)
    for _ in range(2):
        state, metrics = learner.step(state, (x[rows], y[rows]))
        other, more = learner.step(other, (padded, y, weight))
    assert float(metrics["examples"]) == 3.0
    same(more, metrics, **CLOSE)
    same(other, state, **CLOSE)


def test_a_weight_of_two_is_the_example_twice():
    learner = make()
    state = begun(learner)
    other = copied(state)
    twice = np.concatenate([X, X[:3]]), np.concatenate([Y, Y[:3]])
    state, metrics = learner.step(state, twice)
    weight = np.array([2, 2, 2, 1, 1, 1, 1, 1])
    other, more = learner.step(other, (X, Y, weight))
    assert float(more["examples"]) == 11.0
    same((more, other.params, other.task_params), (metrics, state.params, state.task_params),
         **CLOSE)  # fmt: skip


def test_batches_may_be_lists_and_weights_of_any_kind():
    learner = make()
    ends = []
    for batch in (
        (X[:5], Y[:5]),
        (X.tolist()[:5], Y.tolist()[:5]),
        [jnp.asarray(X)[:5], jnp.asarray(Y)[:5]],
        (X, Y.astype(np.int64), np.arange(8) < 5),
        (X.astype(np.float64), Y.astype(np.uint8), [1, 1, 1, 1, 1, 0, 0, 0]),
        (X, Y, jnp.array([1.0] * 5 + [0.0] * 3)),
    ):
        state, metrics = learner.step(begun(learner), batch)
        ends.append((state.params, metrics))
    for end in ends[1:]:
        same(end, ends[0], **CLOSE)


def test_the_data_of_a_task_may_come_in_batches():
    learner = make("ewc")
    state, _ = learner.step(begun(learner), (X, Y))
    states = [copied(state) for _ in range(6)]
    expected = learner.end_task(state, (X, Y))
    far = np.full((8, 5), 100.0, np.float32)
    weight = np.array([1, 1, 0, 0, 0, 0, 0, 0])
    parts = [(X[:6], Y[:6]), (np.concatenate([X[6:], far[2:]]), Y, weight)]
    parts[1] = (parts[1][0], np.concatenate([Y[6:], Y[:6]]), weight)
    for start, data in zip(
        states,
        (
            (X.tolist(), Y.tolist()),
            [(X[:3], Y[:3]), (X[3:], Y[3:])],
            ((x, y) for x, y in ((X[:3], Y[:3]), (jnp.asarray(X[3:]), jnp.asarray(Y[3:])))),
            parts,
            (np.concatenate([X, far]), np.concatenate([Y, Y]), np.arange(16) < 8),
            [X, Y],
        ),
        strict=True,
    ):
        same(learner.end_task(start, data), expected, **CLOSE)


def test_a_task_compiles_nothing_that_another_did():
    traces = []

    def apply(params, mode, x):
        traces.append(1)
        return networks.modulate(x @ params, mode.get("out", {}))

    network = networks.from_function(apply, lambda key: jnp.ones((5, 4)), {"out": 4}, x=X)
    learner = make(network=network, num_tasks=3)
    state, _ = train(learner, learner.init(jax.random.key(0)), (0,))
    learner.apply(state, X, 0)
    before = len(traces)
    state, _ = train(learner, state, (1, 2))
    for task in range(3):
        learner.apply(state, X, task)
    assert len(traces) == before > 0


def test_steps_may_be_a_loop_of_jax():
    learner = make()
    state = begun(learner)
    batches = np.stack([X, X[::-1]]), np.stack([Y, Y[::-1]])
    one = copied(state)
    for batch in zip(*batches, strict=True):
        one, metrics = learner.step(one, batch)
    loop = jax.jit(lambda state, batches: jax.lax.scan(learner.step, state, batches))
    state, said = loop(state, batches)
    same(state, one, **CLOSE)
    same(jax.tree.map(lambda leaf: leaf[-1], said), metrics, **CLOSE)


@pytest.mark.parametrize("call", ["begin_task", "step", "end_task"])
def test_a_state_is_consumed(call):
    learner = make()
    state = begun(learner)
    kept = copied(state)
    arguments = {"begin_task": 1, "step": (X, Y), "end_task": (X, Y)}
    getattr(learner, call)(state, arguments[call])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    for name, argument in arguments.items():
        with pytest.raises(
            UserError, match="state: an earlier call has consumed it; continue with"
        ):
            getattr(learner, name)(state, argument)
    with pytest.raises(UserError, match="state: an earlier call has consumed it"):
        learner.apply(state, X, 0)
    learner.apply(kept, X, 0)
    learner.apply(kept, X, 1)  # an answer consumes nothing


class Half(nn.Module):
    """All its arrays are bf16, those of the network's head f32."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(6, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)(x))
        return nn.Dense(4)(x)


@pytest.mark.parametrize("method", ["bd_ewc", "er", "imm_mode"])
def test_a_state_keeps_its_dtypes(tmp_path, method):
    learner = make(method, linen(Half()), optax.adam(0.01))
    start = learner.init(jax.random.key(0))
    assert start.params["Dense_0"]["kernel"].dtype == jnp.bfloat16
    state, metrics = train(learner, copied(start))
    for before, after in zip(*map(jax.tree.leaves, (start, state)), strict=True):
        assert (before.shape, before.dtype) == (after.shape, after.dtype)
    assert np.isfinite(metrics["loss"]) and learner.apply(state, X, 0).dtype == jnp.float32
    learner.save(state, tmp_path / "state.safetensors")
    same(learner.load(tmp_path / "state.safetensors"), state)


# BatchNorm and dropout.

IMAGES = [DRAWS.normal(size=(8, 4, 4, 2)).astype(np.float32) * (1 + t) + t for t in range(2)]
IMAGE_TASKS = [(x, (np.arange(8) % 3).astype(np.int32)) for x in IMAGES]


@pytest.fixture(scope="module")
def resnet():
    return networks.from_linen(flax_networks.ResNet(), IMAGES[0][:1])


def statistics_of(learner, steps=2):
    """Trains two tasks; the state, and the variables before and after each task's steps."""
    state, seen = learner.init(jax.random.key(0)), []
    for task, batch in enumerate(IMAGE_TASKS):
        state = learner.begin_task(state, task)
        before = copied(state.variables)
        for _ in range(steps):
            state, _ = learner.step(state, batch)
        seen.append((before, copied(state.variables)))
        if task == 0:
            state = learner.end_task(state, batch)
    return state, seen


def far_apart(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.abs(x - y).max() > 1e-3 for x, y in pairs)


def test_each_task_has_running_statistics_of_its_own(resnet):
    learner = make("bd_ewc", resnet, batch_statistics="task")
    assert learner.told_task
    state, ((first, one), (second, two)) = statistics_of(learner)
    same(first, learner.init(jax.random.key(0)).variables)
    same(second, one)  # the second task starts with those of the first
    assert far_apart(one, first) and far_apart(two, one)
    same(jax.tree.map(lambda leaf: leaf[0], state.task_variables), one)

    def answers(state, task, variables):
        """By the network itself, in the mode of the task."""
        bank = state.method[0]
        mode = {path: {"bias": vectors["bias"][task]} for path, vectors in bank.items()}
        return resnet.apply(state.params, mode, IMAGES[0], variables=variables)[0]

    # In training: the task's own, and those stored of the other, also in one batch.
    now = [learner.apply(state, IMAGES[0], task) for task in range(2)]
    np.testing.assert_allclose(now[0], answers(state, 0, one), **CLOSE)
    mixed = learner.apply(state, IMAGES[0], IDS)
    np.testing.assert_allclose(mixed, np.choose(IDS[:, None], now), rtol=1e-4, atol=1e-5)
    state = learner.end_task(state, IMAGE_TASKS[1])
    same(jax.tree.map(lambda leaf: leaf[0], state.task_variables), one)
    same(jax.tree.map(lambda leaf: leaf[1], state.task_variables), two)
    for task, variables in enumerate((one, two)):
        answer = learner.apply(state, IMAGES[0], task)
        np.testing.assert_allclose(answer, answers(state, task, variables), **CLOSE)
        np.testing.assert_allclose(answer, now[task], rtol=1e-4, atol=1e-5)
    after = learner.apply(state, IMAGES[0], IDS)
    np.testing.assert_allclose(after, mixed, rtol=1e-4, atol=1e-5)
    swapped = resnet.apply(state.params, {}, IMAGES[0], variables=two)[0]
    assert np.abs(swapped - answers(state, 0, one)).max() > 1e-2
    # What answers need: the bank of statistics, and not those of the task trained last.
    needed = learner.answering()
    assert all(jax.tree.leaves(needed.task_variables))
    assert not any(jax.tree.leaves(needed.variables))


def test_running_statistics_may_be_shared(resnet):
    learner = make("sgd", resnet, batch_statistics="shared")
    assert not learner.told_task
    state, ((_, one), (second, two)) = statistics_of(learner)
    same(second, one)
    assert state.task_variables == {} and far_apart(two, one)
    state = learner.end_task(state, IMAGE_TASKS[1])
    expected = resnet.apply(state.params, {}, IMAGES[0], variables=two)[0]
    for task in (0, 1, IDS):
        np.testing.assert_allclose(learner.apply(state, IMAGES[0], task), expected, **CLOSE)
    assert all(jax.tree.leaves(learner.answering().variables))


def test_running_statistics_may_be_frozen(resnet):
    learner = make("sgd", resnet, optax.sgd(0.1), batch_statistics="frozen")
    state = begun(learner)
    x, y = IMAGE_TASKS[0]
    params, fresh = resnet.init(prng.fold(jax.random.key(0), prng.INIT))
    same((state.params, state.variables), (params, fresh), **CLOSE)

    def loss(params):  # of the network as it is tested
        logits = resnet.apply(params, {}, x, variables=fresh)[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    state, metrics = learner.step(state, (x, y))
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    same(state.params, expected, rtol=1e-3, atol=1e-5)
    same(state.variables, fresh)
    state = learner.end_task(state, (x, y))
    same(state.variables, fresh)
    assert state.task_variables == {} and not learner.told_task


class Normed(nn.Module):
    """BatchNorm in a small network."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(6, name="in")(x))
        return nn.Dense(4, name="out")(nn.relu(x))


@pytest.mark.parametrize("policy", ["task", "shared", "frozen"])
def test_networks_per_task_have_their_statistics_too(policy):
    network = linen(Normed())
    learner = make("stl", network, batch_statistics=policy)
    state, seen = learner.init(jax.random.key(0)), []
    for task in range(2):
        state = learner.begin_task(state, task)
        start = copied(state.variables)
        same(start, jax.tree.map(lambda v: v[0], learner.init(jax.random.key(0)).task_variables))
        state, _ = learner.step(state, TASKS[task])
        assert far_apart(start, state.variables) == (policy != "frozen")
        seen.append((copied(state.params), copied(state.variables)))
        state = learner.end_task(state, TASKS[task])
    expected = [network.apply(params, {}, X, variables=own)[0] for params, own in seen]
    for task in range(2):
        np.testing.assert_allclose(learner.apply(state, X, task), expected[task], **CLOSE)
    mixed = learner.apply(state, X, IDS)
    np.testing.assert_allclose(mixed, np.choose(IDS[:, None], expected), **CLOSE)


class Dropped(nn.Module):
    rate: float = 0.5

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dropout(self.rate, deterministic=not train)(nn.relu(nn.Dense(20, name="in")(x)))
        return nn.Dense(4, name="out")(x)


def test_dropout_is_drawn_anew_in_each_step_and_never_in_answers():
    network = linen(Dropped())
    learner = make("sgd", network, optax.sgd(0.0))

    def losses(learner, seed=0):
        state, found = begun(learner, seed=seed), []
        for _ in range(3):
            state, metrics = learner.step(state, (X, Y))
            found.append(float(metrics["loss"]))
        return found, state

    found, state = losses(learner)
    assert len(set(found)) == 3
    assert losses(learner)[0] == found  # the same seed
    assert not set(losses(learner, seed=1)[0]) & set(found)
    answer = learner.apply(state, X, 0)
    np.testing.assert_array_equal(answer, learner.apply(state, X, 0))
    np.testing.assert_allclose(answer, network.apply(state.params, {}, X)[0], **CLOSE)
    never = make("sgd", linen(Dropped(0.0)), optax.sgd(0.0))
    assert len(set(losses(never)[0])) == 1


def test_replayed_examples_see_dropout_too():
    learner = make("er", linen(Dropped()), optax.sgd(1.0))
    state = learner.step(begun(learner), (X, Y))[0]
    one, other = copied(state), copied(state)
    # The batch counts next to nothing, so that what is left is the draw from the memory.
    weight = np.full(8, 1e-6, np.float32)
    keys = jax.random.key(0), jax.random.key(1)
    ends = [learner.step(s.replace(key=k), (X, Y, weight))[0]
            for s, k in zip((one, other), keys, strict=True)]  # fmt: skip
    moved = [np.asarray(end.params["in"]["bias"] - state.params["in"]["bias"]) for end in ends]
    assert ((moved[0] == 0) != (moved[1] == 0)).any()


# Losses.


def squared(outputs, labels):
    return jnp.square(outputs - labels).sum(-1)


def per_token(outputs, labels):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels)  # [n, l]


class Tokens(nn.Module):
    """Outputs for each of three tokens."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(6, name="in")(x.reshape(x.shape[0], 3, 2)))
        return nn.Dense(4, name="out")(x)


TARGETS = DRAWS.normal(size=(2, 8, 3)).astype(np.float32)
TEXTS = DRAWS.normal(size=(2, 8, 6)).astype(np.float32)
LABELS = DRAWS.integers(4, size=(2, 8, 3)).astype(np.int32)
SENTENCES = list(zip(TEXTS, LABELS, strict=True))
NUMBERS = [(TASKS[task][0], TARGETS[task]) for task in range(2)]
PER_TOKEN = networks.from_linen(Tokens(), TEXTS[0])
OTHER_LOSSES = {
    "squared error": (mlp(outputs=3), NUMBERS, {"loss": squared, "label": TARGETS[0]}),
    "own loss per token": (PER_TOKEN, SENTENCES, {"loss": per_token, "label": LABELS[0]}),
    "cross-entropy per token": (
        PER_TOKEN, SENTENCES, {"label": jax.ShapeDtypeStruct((1, 3), jnp.int32)}
    ),
}  # fmt: skip
REFUSALS = {
    "squared error": "loss: {} is defined for cross-entropy on class labels only",
    "cross-entropy per token": "label: {} is defined for one class label per example",
}


def mean_loss(kind, outputs, labels):
    """One loss per example."""
    if kind == "squared error":
        return squared(outputs, labels)
    return per_token(outputs, labels).mean(-1)


@pytest.mark.parametrize(
    "kind, method",
    [
        ("own loss per token", "ewc"),
        *((kind, method) for kind in ("squared error", "cross-entropy per token")
          for method in ("ewc", "si", "mas", "er", "bd_ewc")),
    ],
)  # fmt: skip
def test_other_losses_and_labels(kind, method):
    network, data, options = OTHER_LOSSES[kind]
    plain = {"form": "proximal", "strength": 10.0} if "ewc" in method else {}  # keeps the Fisher
    settings = SETTINGS.get(method, {}) | plain
    learner = make(method, network, optax.sgd(0.05), settings=settings, **options)
    state = begun(learner)
    (x, y), values = data[0], []
    for _ in range(4):
        before = copied(state)
        state, metrics = learner.step(state, (x, y))
        values.append(float(metrics["loss"]))
    assert values[-1] < values[0]
    outputs = learner.apply(before, x, 0)
    np.testing.assert_allclose(values[-1], mean_loss(kind, outputs, y).mean(), rtol=1e-4)
    if "loss" in options:
        assert set(metrics) == {"loss", "examples"}
    else:
        right = (outputs.argmax(-1) == y).mean()
        np.testing.assert_allclose(metrics["accuracy"], right, rtol=1e-5)
    mode = {}
    if method == "bd_ewc":
        mode = {
            p: {"bias": (f["bias"]["M"] @ f["bias"]["W"])[0]}
            for p, f in state.task_params[0].items()
        }
    params, path = copied(state.params), copied(state.method) if method == "si" else None
    state = learner.end_task(state, (x, y))

    def one(params, x, y):
        outputs = network.apply(params, mode, x[None])[0].astype(jnp.float32)
        if method == "mas":
            return jnp.sum(outputs**2)
        return mean_loss(kind, outputs, y[None])[0]

    each = jax.jit(jax.vmap(jax.grad(one), (None, 0, 0)))(params, x, y)
    kept = state.method[1] if method == "bd_ewc" else state.method
    if method == "er":
        stored = np.asarray(kept.memory.y)
        assert stored.shape == (9, *y.shape[1:]) and stored.dtype == y.dtype
        assert all(any(np.array_equal(row, label) for label in y) for row in stored)
    elif method == "si":
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(path.path))
        assert sum(float(leaf.sum()) for leaf in jax.tree.leaves(path.path)) > 0
    else:
        size = jnp.abs if method == "mas" else jnp.square
        same(kept.importance, jax.tree.map(lambda g: size(g).mean(0), each), rtol=1e-3, atol=1e-5)
    state, _ = train(learner, state, (1,), data)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.params, state.method))
               if jnp.issubdtype(leaf.dtype, jnp.floating))  # fmt: skip


@pytest.mark.parametrize("kind", REFUSALS)
@pytest.mark.parametrize(
    "method, who",
    [
        (methods.lwf(), "lwf"),
        (methods.ebll(), "ebll"),
        (methods.imm_mode(), "the sampled Fisher of imm_mode"),
        (methods.ewc(fisher="true"), "the true Fisher"),
        (methods.ewc_online(fisher="sampled"), "the sampled Fisher"),
        (methods.bd_ewc(fisher="true"), "the true Fisher"),
    ],
)
def test_methods_that_need_classes_refuse_other_losses(kind, method, who):
    network, _, options = OTHER_LOSSES[kind]
    with pytest.raises(UserError, match=REFUSALS[kind].format(who)):
        make(method, network, classes=[[0], [1]], **options)
    with pytest.raises(UserError, match=REFUSALS[kind].format("a head per task .*")):
        make("ewc", network, classes=[[0], [1]], heads="multi", **options)


def test_a_loss_that_is_not_one_per_example_is_refused():
    for loss, shape in (
        (lambda o, y: squared(o, y).mean(), r"\(\)"),
        (lambda o, y: o[0], r"\(3,\)"),
    ):
        learner = make("sgd", mlp(outputs=3), loss=loss, label=TARGETS[0])
        with pytest.raises(UserError, match=f"loss: it returns shape {shape} for 8 examples; ret"):
            learner.step(begun(learner), (X, TARGETS[0]))
    column = make("sgd", mlp(outputs=1), loss=lambda o, y: (o - y) ** 2, label=TARGETS[0, :, 0])
    with pytest.raises(UserError, match=r"shape \(8, 8\) for 8 examples, the outputs of each with"):
        column.step(begun(column), (X, TARGETS[0, :, 0]))
    with pytest.raises(UserError, match="label: float32 labels have no cross-entropy; pass bpnjax"):
        make("sgd", mlp(outputs=3), label=TARGETS[0])


def test_a_head_per_task_is_trained_alone():
    learner = make("bd_ewc", classes=CLASSES[:2], heads="multi")
    start = np.asarray(learner.init(jax.random.key(0)).params["output"]["kernel"])
    state = begun(learner)
    right = np.asarray(learner.apply(state, X, 0))[:, CLASSES[0]].argmax(-1) == Y
    state, metrics = learner.step(state, (X, Y))
    np.testing.assert_allclose(metrics["accuracy"], right.mean(), rtol=1e-6)
    moved = np.asarray(state.params["output"]["kernel"]) != start
    assert moved[:, CLASSES[0]].all() and not moved[:, CLASSES[1]].any()
    state = learner.end_task(state, (X, Y))
    measured = np.asarray(state.method[1].importance["output"]["kernel"])
    assert (measured[:, CLASSES[0]] > 0).any() and not measured[:, CLASSES[1]].any()


def test_joint_training_takes_the_task_of_each_example():
    learner = make("joint", optimizer=optax.sgd(0.1), classes=CLASSES[:2], heads="multi")
    x, y = (np.concatenate(both) for both in zip(*TASKS[:2], strict=True))
    task = np.repeat([0, 1], 8)
    state = begun(learner)
    start = copied(state.params)
    state, metrics = learner.step(state, (x, y, np.ones(16), task))

    def loss(params):
        logits = mlp().apply(params, {}, x)[0]
        own = np.array([[True, True, False, False], [False, False, True, True]])[task]
        log_p = jax.nn.log_softmax(jnp.where(own, logits, -jnp.inf))
        return -log_p[jnp.arange(16), y].mean()

    value, grads = jax.value_and_grad(loss)(start)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    same(state.params, jax.tree.map(lambda p, g: p - 0.1 * g, start, grads), **CLOSE)


# One task id per example.


@pytest.mark.parametrize("method", ["bd_ewc", slow("bd_psp"), "xdg_ewc", "stl", "imm_mean"])
def test_an_id_per_example_is_one_task_at_a_time(method):
    learner = make(method)
    state, _ = train(learner, learner.init(jax.random.key(0)), (0,))
    state = learner.begin_task(state, 1)
    state, _ = learner.step(state, TASKS[1])  # in training
    traced = jax.jit(lambda state, task: learner.apply(state, X, task))
    for _ in range(2):
        each = [learner.apply(state, X, task) for task in range(2)]
        if learner.method.told_task:
            assert np.abs(each[0] - each[1]).max() > 1e-3
        mixed = np.choose(IDS[:, None], each)
        np.testing.assert_allclose(learner.apply(state, X, IDS), mixed, **CLOSE)
        np.testing.assert_allclose(traced(state, IDS), mixed, **CLOSE)
        np.testing.assert_allclose(traced(state, 1), each[1], **CLOSE)
        if int(state.task) == 1:
            state = learner.end_task(state, TASKS[1])
    again = [learner.apply(state, X, task) for task in range(2)]
    if method != "imm_mean":  # the end of a task merges
        np.testing.assert_allclose(again, each, **CLOSE)


def test_a_task_to_come_is_nan_only_where_it_is_traced():
    learner = make("bd_ewc")
    state, _ = train(learner, learner.init(jax.random.key(0)))
    for task in (2, -1):
        with pytest.raises(
            UserError, match=f"task: task {task} is not in the bank; it has tasks 0"
        ):
            learner.apply(state, X, task)
        traced = jax.jit(lambda state, task: learner.apply(state, X, task))
        assert np.isnan(traced(state, task)).all()


# Seeds and devices.


@pytest.mark.parametrize("method", ["bd_ewc", "er", slow("gem"), slow("stl")])
def test_seeds_under_vmap_are_single_seeds(method):
    learner = make(method)
    keys = jax.random.split(jax.random.key(0), 2)
    over = {name: jax.vmap(getattr(learner, name), (0, None))
            for name in ("begin_task", "step", "end_task")}  # fmt: skip
    states = jax.vmap(learner.init)(keys)
    for task in range(2):
        states = over["begin_task"](states, task)
        for _ in range(2):
            states, metrics = over["step"](states, TASKS[task])
        states = over["end_task"](states, TASKS[task])
    answers = jax.vmap(learner.apply, (0, None, None))(states, X, IDS)
    assert np.abs(answers[0] - answers[1]).max() > 1e-3
    for i, key in enumerate(keys):
        state, said = train(learner, learner.init(key), steps=2)
        same(jax.tree.map(lambda leaf, i=i: leaf[i], (states, metrics)), (state, said),
             rtol=1e-4, atol=1e-5)  # fmt: skip
        np.testing.assert_allclose(answers[i], learner.apply(state, X, IDS), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="states of several seeds need jax.vmap"):
        learner.apply(states, X, 0)


@pytest.mark.parametrize(
    "chosen", [("bd_ewc", "er", "ranpac", "slda"), slow(("agem", "gem", "si"))]
)
def test_four_devices_are_one(chosen):
    """In a process of its own, since the number of devices is fixed at the start."""
    flags = f"{XLA_FLAGS} --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "four_devices.py"), *chosen],
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# Later tasks.


@pytest.mark.parametrize(
    "method", ["bd_psp", slow("er"), "gem", slow("imm_mean"), slow("lwf"), "stl"]
)
def test_growing_keeps_earlier_answers_and_makes_room(method):
    learner = make(method, linen(Normed()), classes=CLASSES[:2])
    state, _ = train(learner, learner.init(jax.random.key(0)))
    more, grown = learner.grow(state, 3, CLASSES)
    assert (more.num_tasks, learner.num_tasks) == (3, 2)
    for task in (0, 1, IDS):
        np.testing.assert_allclose(
            more.apply(grown, X, task), learner.apply(state, X, task), **CLOSE
        )
    # The next task is trained as it would have been with room from the start.
    expected, _ = train(more, more.init(jax.random.key(0)), (0, 1, 2))
    grown, _ = train(more, grown, (2,))
    same(grown.params, expected.params, **CLOSE)
    for task in range(3):
        np.testing.assert_allclose(
            more.apply(grown, X, task), more.apply(expected, X, task), **CLOSE
        )


def test_growing_that_is_impossible_is_refused():
    learner = make("lwf", classes=CLASSES[:2])
    state, _ = train(learner, learner.init(jax.random.key(0)), (0,))
    with pytest.raises(UserError, match="num_tasks: 1 is below the 2 there are"):
        learner.grow(state, 1, CLASSES[:1])
    with pytest.raises(UserError, match="num_tasks: '3' is not a number of tasks"):
        learner.grow(state, "3", CLASSES)
    with pytest.raises(UserError, match="classes: give those of all tasks, as they were given"):
        learner.grow(state, 3)
    with pytest.raises(UserError, match="classes: 2 lists for 3 tasks"):
        learner.grow(state, 3, CLASSES[:2])
    with pytest.raises(UserError, match="state: not one that learner.init of lwf on MLP with 2"):
        learner.grow({}, 3, CLASSES)


# Files.


@pytest.mark.parametrize(
    "method, where",
    [("bd_psp", "between"), ("derpp", "within"), slow("bd_psp", "within"), slow("si", "within")],
)
def test_a_state_is_saved_and_loaded_bit_for_bit(tmp_path, method, where):
    learner = make(method, linen(Dropped()), optax.adam(0.01))
    state, _ = train(learner, learner.init(jax.random.key(0)), (0,))
    if where == "within":
        state, _ = learner.step(learner.begin_task(state, 1), TASKS[1])
    learner.save(state, tmp_path / "state.safetensors")
    # In a new process nothing but the learner, made as it was, is there.
    again = make(method, linen(Dropped()), optax.adam(0.01))
    loaded = again.load(tmp_path / "state.safetensors")
    same(loaded, state)
    np.testing.assert_array_equal(again.apply(loaded, X, IDS), learner.apply(state, X, IDS))
    if where == "within":
        ends = [one.step(s, TASKS[1])[0] for one, s in ((learner, state), (again, loaded))]
    else:
        ends = [train(one, s, (1,))[0] for one, s in ((learner, state), (again, loaded))]
    same(*ends)
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


def test_files_of_others_are_refused(tmp_path):
    path = tmp_path / "state.safetensors"
    learner = make("bd_ewc")
    learner.save(begun(learner), path)
    wrong = [
        (make("gd_ewc", settings={"hidden_dim": 4}), "another method"),  # the same arrays
        (make("ewc"), "another method"),
        (make("bd_ewc", linen(Twin())), "another network"),  # the same arrays
        (make("bd_ewc", mlp(outputs=5)), r"is float32\[.*4.*\], not float32\[.*5.*\]"),
        (make("bd_ewc", num_tasks=3), r"is float32\[2, .*\], not float32\[3, "),
        (make("bd_ewc", optimizer=optax.sgd(0.1)), "is too much"),
        (make("bd_ewc", optimizer=optax.adam(0.1)), "is missing|is too much"),
        (make("bd_ewc", settings={"hidden_dim": 5}), r"is float32\[1, 4\], not float32\[1, 5\]"),
    ]
    for other, why in wrong:
        said = f"a state of the method bd_ewc on the network MLP with 2 tasks, not of .*{why}"
        with pytest.raises(UserError, match=said):
            other.load(path)
    with pytest.raises(UserError, match="no such file; name a .safetensors file"):
        learner.load(tmp_path / "nothing.safetensors")
    text = tmp_path / "text.safetensors"
    text.write_text("no state")
    with pytest.raises(UserError, match="text.safetensors is not a safetensors file"):
        learner.load(text)
    text.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match="text.safetensors is not a safetensors file"):
        learner.load(text)
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(1)}, text)
    with pytest.raises(UserError, match="no state that learner.save wrote"):
        learner.load(text)
    for state in ({}, make("ewc").init(jax.random.key(0))):
        with pytest.raises(UserError, match="state: not one that learner.init of bd_ewc on MLP"):
            learner.save(state, path)


class Twin(nn.Module):
    """Arrays like those of an MLP, another function."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="output")(nn.tanh(nn.Dense(6, name="hidden_0")(x)))


# Optimizers.


@pytest.mark.parametrize("optimizer", [optax.adam(0.01), optax.sgd(0.3, momentum=0.9)])
def test_factors_take_the_beneficial_step_under_any_optimizer(optimizer):
    """M moves by epsilon against the sign of its gradient, whatever moves the rest."""
    method = methods.bd(epsilon=0.05, hidden_dim=4, step="absolute")
    learner = make(method, optimizer=optimizer)
    control = make(methods.gd(hidden_dim=4), optimizer=optimizer)
    state = begun(learner)
    gd = begun(control)
    same(gd.task_params, state.task_params)
    start, before = copied(state.task_params), copied(state.task_params)
    for _ in range(3):
        state, _ = learner.step(state, (X, Y))
        gd, _ = control.step(gd, (X, Y))
        for path, factors in state.task_params.items():
            moved = np.abs(factors["bias"]["M"] - before[path]["bias"]["M"])
            np.testing.assert_allclose(moved, 0.05, rtol=1e-5)
        before = copied(state.task_params)
    # W follows its gradient by the optimizer: in the first step as in the control.
    for path, factors in gd.task_params.items():
        moved = np.abs(factors["bias"]["M"] - start[path]["bias"]["M"])
        assert moved.max() > 0 and not np.allclose(moved, 0.15, rtol=1e-2)
    for name in ("gd", "bd"):
        learner = make(name, optimizer=optimizer, settings={"hidden_dim": 4})
        state = begun(learner)
        plain = make("sgd", optimizer=optimizer)
        expected, _ = plain.step(begun(plain), (X, Y))
        state, _ = learner.step(state, (X, Y))
        same(state.params, expected.params, **CLOSE)  # M is 0, so the first step is the plain one


def test_task_parameters_may_have_a_rate_or_an_optimizer_of_their_own():
    def moved_w(**options):
        settings = options.pop("settings", {})
        learner = make(methods.bd(hidden_dim=4, **settings), optimizer=optax.sgd(0.1), **options)
        state = learner.step(begun(learner), (X, Y))[0]  # M is 0 before, and W does not move
        before = copied(state.task_params)
        state, _ = learner.step(state, (X, Y))
        return jax.tree.map(lambda a, b: a - b, state.task_params, before), state.params

    (plain, params), (faster, same_params) = moved_w(), moved_w(settings={"learning_rate": 0.3})
    same(same_params, params, **CLOSE)
    own, _ = moved_w(task_optimizer=optax.sgd(0.2))
    for path, factors in plain.items():
        usual, fast, of = factors["bias"], faster[path]["bias"], own[path]["bias"]
        np.testing.assert_allclose(fast["W"], 3 * usual["W"], rtol=1e-3, atol=1e-7)
        np.testing.assert_allclose(of["W"], 2 * usual["W"], rtol=1e-3, atol=1e-7)
        np.testing.assert_allclose(fast["M"], usual["M"], rtol=1e-5)


@pytest.mark.parametrize("reset", [True, False])
def test_the_optimizer_starts_afresh_with_a_task_or_goes_on(reset):
    learner = make("ewc", optimizer=optax.adam(0.01), reset_optimizer=reset)
    state, _ = train(learner, learner.init(jax.random.key(0)), (0,), steps=3)
    kept = copied(state.optimizer)
    state = learner.begin_task(state, 1)
    fresh = learner.init(jax.random.key(0)).optimizer
    same(state.optimizer, fresh if reset else kept)
    afresh = make("stl", optimizer=optax.adam(0.01), reset_optimizer=reset)
    state, _ = train(afresh, afresh.init(jax.random.key(0)), (0,), steps=3)
    same(afresh.begin_task(state, 1).optimizer, fresh)  # a network of its own


# What cannot be.


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"network": MLP((6,), 4)}, "network: MLP is not a bpnjax.networks.Network; pass networks"),
        ({"method": methods.ewc}, r"method: Factory is not a method; .* as methods\.ewc\(\)"),
        ({"method": None}, r"method: NoneType is not a method; .* as methods\.bd_ewc\(\)"),
        ({"optimizer": optax.adam}, "optimizer: function is not an optax optimizer; pass one, as"),
        ({"optimizer": 0.1}, "optimizer: float is not an optax optimizer"),
        ({"num_tasks": 0}, "num_tasks: 0 is not a number of tasks; give an integer from 1"),
        ({"num_tasks": 2.0}, "num_tasks: 2.0 is not a number of tasks"),
        ({"num_tasks": True}, "num_tasks: True is not a number of tasks"),
        ({"heads": "many"}, "heads: unknown value 'many'; choose from: single, multi"),
        ({"batch_statistics": "own"}, "batch_statistics: unknown value 'own'; choose from: task,"),
        ({"heads": "multi"}, r"classes: a head per task \(heads='multi'\) needs to know which out"),
        ({"classes": [[0]]}, "classes: 1 lists for 2 tasks; give one each"),
        ({"classes": [[0], [4]]}, "classes: 4 is not an output of the network; it has 4, from 0"),
        ({"classes": [[0], [-1]]}, "classes: -1 is not an output of the network"),
        ({"classes": np.ones((2, 3), bool)}, r"classes: shape \(2, 3\); give bool \[2, 4\]"),
        ({"method": methods.lwf()}, "classes: lwf needs to know which outputs belong to which"),
        ({"method": methods.bd(layers="conv.*")}, "bd.layers: 'conv.*' matches no layer; there ar"),
    ],
)
def test_learners_that_cannot_be_made(changes, message):
    given = {"network": mlp(), "method": methods.bd_ewc(), "optimizer": optax.sgd(0.1)}
    given = {**given, "num_tasks": 2, **changes}
    with pytest.raises(UserError, match=message):
        bpnjax.learner(**given)


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x), x


def test_networks_of_several_outputs_are_refused():
    with pytest.raises(UserError, match="network: Pair returns tuple; it must return one array of"):
        make("sgd", linen(Pair()))


def test_calls_that_cannot_be_made():
    learner = make("bd_ewc")
    for key in (jax.random.PRNGKey(0), 0, None):
        with pytest.raises(UserError, match="key: give a typed PRNG key, jax.random.key"):
            learner.init(key)
    for task, message in (
        (2, "task: task 2 is not in the bank; it has tasks 0 to 1; .*learner.grow makes room"),
        (-1, "task: task -1 is not in the bank"),
        (1.0, "task: task 1.0 is not an integer"),
        (None, "task: task None is not an integer"),
        (True, "task: task True is not an integer"),
        ([0, 1], r"task: \(2,\) ids; a learner trains one task at a time"),
    ):
        with pytest.raises(UserError, match=message):
            learner.begin_task(learner.init(jax.random.key(0)), task)
    state = begun(learner)
    for task, message in (
        (np.array([0, 1]), r"task: \(2,\) ids for 8 examples; give one each"),
        (np.zeros((8, 1), int), r"task: \(8, 1\) ids for 8 examples"),
        (np.zeros(8), "is not an integer"),
        (np.full(8, 2**32), f"task {2**32} is not in the bank"),
    ):
        with pytest.raises(UserError, match=message):
            learner.apply(state, X, task)
    with pytest.raises(UserError, match="no task is in training; call learner.begin_task before"):
        learner.end_task(learner.init(jax.random.key(0)), (X, Y))


def test_states_of_other_learners_are_refused():
    learner = make("bd_ewc")
    others = [
        make("bd_ewc", num_tasks=3).init(jax.random.key(0)),
        make("bd_ewc", mlp(outputs=5)).init(jax.random.key(0)),
        make("ewc").init(jax.random.key(0)),
        {"params": 1},
        None,
    ]
    said = "state: not one that learner.init of bd_ewc on MLP with 2 tasks gives; states of several"
    for state in others:
        for call, argument in (
            (learner.begin_task, (0,)),
            (learner.step, ((X, Y),)),
            (learner.end_task, ((X, Y),)),
            (learner.apply, (X, 0)),
        ):
            with pytest.raises(UserError, match=said):
                call(state, *argument)
