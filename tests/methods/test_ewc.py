"""EWC and its online form: anchors, Fishers, and what a first task must not feel of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import Jitted, digits_config

import bpnjax
from bpnjax import importance, methods, modes, networks
from bpnjax.methods.bd import product
from bpnjax.methods.ewc import DEFAULT_STRENGTH, EwcState, accumulate, relative_importance
from bpnjax.models import MLP
from bpnjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_once")


def close(a, b, rtol=1e-3, atol=1e-8):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


@pytest.mark.parametrize("form, strength", [("proximal", 500.0), ("relative", None)])
def test_ewc_first_task_is_sgd_and_later_tasks_are_not(form, strength):
    key = jax.random.key(0)
    plain, anchored = (
        Jitted(digits_config(method, ewc__strength=strength, ewc__form=form))
        for method in ("sgd", "ewc")
    )
    first = [jitted.train(key, [0])[0].learner for jitted in (plain, anchored)]
    close(first[0].params, first[1].params, rtol=1e-4, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, first[1].method.anchor, first[1].params)
    both = [jitted.train(key, [0, 1])[0].learner for jitted in (plain, anchored)]
    # The anchor has moved on to the newest parameters.
    jax.tree.map(np.testing.assert_array_equal, both[1].method.anchor, both[1].params)
    apart = both[0].params["output"]["kernel"] - both[1].params["output"]["kernel"]
    assert np.abs(apart).max() > 1e-2


@pytest.mark.parametrize("anchors", ["latest", "per_task"])
def test_accumulated_anchors_equal_the_sum_of_penalties(anchors):
    """Per-task penalties add up to one, for every theta, up to a constant."""
    rng = np.random.default_rng(0)
    fishers, points = rng.gamma(1.0, size=(3, 5)), rng.normal(size=(3, 5))
    state = EwcState(jnp.zeros(5), jnp.zeros(5), jnp.float32(1.0))
    for f, p in zip(fishers, points, strict=True):
        state = accumulate(state, jnp.asarray(p), jnp.asarray(f), anchors=anchors)
    theta = rng.normal(size=5)
    got = state.importance * (theta - state.anchor)
    per_task = (fishers * (theta - points)).sum(0)
    latest = fishers.sum(0) * (theta - points[-1])
    np.testing.assert_allclose(got, per_task if anchors == "per_task" else latest, rtol=1e-4)


def by_root(fisher):
    """The roots of a Fisher over their mean in each array."""

    def one(f):
        root = np.sqrt(np.asarray(f, np.float64))
        return root / root.mean() if root.any() else root

    return jax.tree.map(one, fisher)


@pytest.mark.parametrize(
    "kind, form",
    [("empirical", "proximal"), ("true", "proximal"), ("empirical", "relative")],
)
def test_a_fisher_of_some_examples_is_their_mean(kind, form):
    """Of the first ones in the order of the task's last epoch."""
    changes = dict(ewc__examples=50, ewc__fisher=kind, ewc__form=form, train__epochs=2)
    jitted = Jitted(digits_config("ewc", **changes))
    key = jax.random.key(0)
    state = jitted.train(key, [0])[0].learner
    x, y = (np.concatenate(part)[:50] for part in zip(*jitted.epoch(key, 0, 1), strict=True))
    network = jitted.learner.network
    expected = importance.fisher(network, state.params, {}, jnp.asarray(x), y, kind=kind)
    if form == "relative":
        expected = by_root(expected)
    close(state.method.importance, expected, atol=1e-5 if form == "relative" else 1e-8)
    other = np.concatenate([x for x, _ in jitted.epoch(key, 0, 0)])[:50]
    assert (other != x).any()  # the order tells


def mode_of(method, state):
    """The mode in which a composition with ewc was trained, from its state before the end."""
    parts = zip(method.split("_"), state.task_params, state.method, strict=True)
    found = {
        "bd": lambda own, kept: product(own),
        "bias": lambda own, kept: {p: {"bias": v["bias"]["change"]} for p, v in own.items()},
        "psp": lambda own, kept: modes.select(kept, state.task),
        "xdg": lambda own, kept: modes.select(kept, state.task),
        "ewc": lambda own, kept: {},
    }
    return modes.merge(*(found[name](own, kept) for name, own, kept in parts))


@pytest.mark.parametrize("method", ["bd_ewc", "bd_psp_ewc", "bias_ewc", "xdg_ewc"])
def test_the_fisher_is_that_of_the_network_in_the_mode_of_its_task(method):
    """With the bias and the key with which it was trained: the plain network's is another."""
    jitted = Jitted(digits_config(method, train__epochs=1, bd__epsilon=0.1, bd__step="absolute",
                                  plain_bias__learning_rate=0.1, ewc__form="proximal"))  # fmt: skip
    key = jax.random.key(0)
    state = jitted.begin_task(jitted.init(key), 1)
    state, _ = jitted.run_steps(state, jitted.data, 1, 0, 0, jitted.steps(1))
    ended = jitted.end_task(state, jitted.data, 1).learner
    x, y = (jnp.concatenate(part) for part in zip(*jitted.epoch(key, 1, 0), strict=True))
    network, params = jitted.learner.network, state.learner.params
    in_mode = importance.fisher(network, params, mode_of(method, state.learner), x, y)
    close(ended.method[-1].importance, in_mode, rtol=2e-3, atol=1e-7)
    plain = importance.fisher(network, params, {}, x, y)
    for layer in ("hidden_0", "output"):
        with_it, without = (fisher[layer]["kernel"] for fisher in (in_mode, plain))
        assert np.abs(without - with_it).max() > 0.05 * with_it.max()


def test_online_ewc_forgets_by_its_decay():
    state = EwcState(jnp.array([4.0]), jnp.zeros(1), jnp.float32(1.0))
    state = accumulate(state, jnp.ones(1), jnp.array([1.0]), decay=0.5)
    assert float(state.importance[0]) == 3.0 and float(state.anchor[0]) == 1.0


@pytest.mark.parametrize("form, strength, epochs", [("proximal", 50.0, 2), ("relative", 0.05, 6)])
def test_online_ewc_is_not_ewc_by_default(form, strength, epochs):
    """From the third task on; before it both have the same single Fisher."""
    key, found = jax.random.key(0), {}
    for method in ("ewc", "ewc_online"):
        jitted = Jitted(
            digits_config(method, train__epochs=epochs, ewc__strength=strength, ewc__form=form)
        )
        found[method] = [jitted.train(key, tasks)[0].learner for tasks in ([0], [0, 1], [0, 1, 2])]
    one, two, three = zip(*found.values(), strict=True)
    for before in (one, two):
        close(before[0].params, before[1].params, rtol=1e-4, atol=1e-6)
    close(one[0].method.importance, one[1].method.importance, rtol=1e-4)
    # F_2 is the same in both: the sum less the first, and less 0.9 times the first.
    first, total, online = (s.method.importance for s in (one[0], two[0], two[1]))
    close(jax.tree.map(lambda t, f: t - 0.1 * f, total, first), online, rtol=1e-4, atol=1e-7)
    apart = three[0].params["output"]["kernel"] - three[1].params["output"]["kernel"]
    assert np.abs(apart).max() > 1e-3


def test_a_decay_of_one_would_be_ewc_and_is_refused():
    with pytest.raises(UserError, match=r"ewc\.decay: 1\.0 is not below 1; give a smaller number"):
        methods.ewc_online(decay=1.0)
    with pytest.raises(UserError, match=r"ewc\.decay: 1\.0 is not below 1; give a smaller number"):
        digits_config("ewc", ewc__decay=1.0)
    with pytest.raises(UserError, match=r"ewc\.decay: ewc has no such setting"):
        methods.ewc(decay=0.5)


def test_strength_2000_with_plain_sgd_is_finite_in_the_proximal_form_only():
    """The explicit form goes to NaN, the proximal one does not."""
    changes = dict(train__optimizer="sgd", train__learning_rate=0.3, ewc__strength=2000.0,
                   ewc__fisher="true", train__epochs=2)  # fmt: skip

    def final(form):
        state, _ = Jitted(digits_config("ewc", ewc__form=form, **changes)).train(jax.random.key(0))
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.learner.params)])

    assert np.isfinite(final("proximal")).all()
    assert not np.isfinite(final("gradient")).all()


# The relative form.


def tree_of_fishers(seed=0):
    draws = np.random.default_rng(seed)
    return {"a": {"kernel": jnp.asarray(draws.gamma(0.3, size=(4, 3)), jnp.float32)},
            "b": jnp.asarray(draws.gamma(0.3, size=7), jnp.float32)}  # fmt: skip


def test_relative_importance_has_mean_1_in_each_array():
    fisher = tree_of_fishers()
    found = relative_importance(fisher)
    close(found, by_root(fisher), rtol=1e-5)
    for leaf in jax.tree.leaves(found):
        np.testing.assert_allclose(leaf.mean(), 1.0, rtol=1e-5)


@pytest.mark.parametrize("factor", [1e-12, 0.01, 1e8])
def test_relative_importance_does_not_change_with_the_size_of_the_fisher(factor):
    fisher = tree_of_fishers(1)
    scaled = jax.tree.map(lambda f: factor * f, fisher)
    close(relative_importance(scaled), relative_importance(fisher), rtol=1e-4)


def test_relative_importance_of_a_fisher_of_zeros_is_zero():
    """A task whose loss has no gradient asks for nothing; no number is divided by 0."""
    zeros = jax.tree.map(jnp.zeros_like, tree_of_fishers())
    jax.tree.map(np.testing.assert_array_equal, relative_importance(zeros), zeros)
    some = zeros | {"b": jnp.array([0.0, 9.0, 0, 0, 0, 0, 0])}
    found = relative_importance(some)
    assert not found["a"]["kernel"].any() and found["b"].tolist() == [0, 7, 0, 0, 0, 0, 0]
    assert relative_importance({}) == {}


DRAWS = np.random.default_rng(0)
X, Y = DRAWS.normal(size=(3, 12, 5)).astype(np.float32), DRAWS.integers(3, size=(3, 12))


def trained(method, factor, optimizer=None, tasks=3):
    """A learner after some tasks, its loss multiplied by a number and its rate divided by it."""

    def loss(outputs, labels):
        return factor * optax.softmax_cross_entropy_with_integer_labels(outputs, labels)

    network = networks.from_linen(MLP((6,), 3), X[0])
    optimizer = optax.sgd(0.2 / factor) if optimizer is None else optimizer
    learner = bpnjax.learner(network, method, optimizer, num_tasks=3, loss=loss)
    state = learner.init(jax.random.key(0))
    for task in range(tasks):
        state = learner.begin_task(state, task)
        for _ in range(8):
            state, _ = learner.step(state, (X[task], Y[task]))
        state = learner.end_task(state, (X[task], Y[task]))
    return state


@pytest.mark.parametrize("factor", [1e-3, 32.0])
@pytest.mark.parametrize(
    "method",
    [
        methods.ewc(0.1),
        methods.ewc(0.1, anchors="per_task"),
        methods.ewc_online(0.1),
        methods.bd_ewc(hidden_dim=4, strength=0.1),
    ],
    ids=["latest", "per_task", "online", "bd_ewc"],
)
def test_a_loss_multiplied_by_a_number_changes_nothing(method, factor):
    """With the relative form: what it keeps and what it pulls have no unit."""
    one, other = trained(method, 1.0), trained(method, factor)
    close(other.params, one.params, rtol=1e-4, atol=1e-5)
    close(other.method, one.method, rtol=2e-3, atol=1e-4)
    # And it does pull.
    free = trained(methods.ewc(0.0), 1.0)
    assert np.abs(free.params["output"]["kernel"] - one.params["output"]["kernel"]).max() > 0.02


def test_a_loss_multiplied_by_a_number_changes_the_proximal_form():
    """Its strength has the unit of a loss, so the test above tells the forms apart."""
    one, other = (trained(methods.ewc(1.0, form="proximal"), factor) for factor in (1.0, 32.0))
    assert np.abs(other.params["output"]["kernel"] - one.params["output"]["kernel"]).max() > 0.02


def test_all_tasks_count_alike_in_the_relative_form():
    """A task adds importance of mean 1, whatever its loss was worth."""
    for tasks in (1, 2, 3):
        kept = trained(methods.ewc(0.1), 1.0, tasks=tasks).method.importance
        flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(kept)])
        np.testing.assert_allclose(flat.mean(), tasks, rtol=1e-5)


@pytest.mark.parametrize("optimizer", [optax.adam(0.05), optax.sgd(0.1, momentum=0.9)])
def test_the_relative_pull_stands_after_the_optimizer(optimizer):
    """The step is the optimizer's for the task's loss alone, and then a share of the way back."""
    free, held = (
        bpnjax.learner(networks.from_linen(MLP((6,), 3), X[0]), method, optimizer, num_tasks=3)
        for method in (methods.sgd(), methods.ewc(0.3))
    )
    state = held.init(jax.random.key(0))
    state = held.begin_task(state, 0)
    for _ in range(3):
        state, _ = held.step(state, (X[0], Y[0]))
    state = held.begin_task(held.end_task(state, (X[0], Y[0])), 1)
    state, _ = held.step(state, (X[1], Y[1]))
    before = jax.tree.map(np.array, (state.params, state.method))
    plain = free.begin_task(free.init(jax.random.key(0)), 1)
    plain = plain.replace(
        params=jax.tree.map(jnp.array, state.params),
        optimizer=jax.tree.map(jnp.array, state.optimizer),
    )
    moved, _ = free.step(plain, (X[1], Y[1]))
    pulled, _ = held.step(state, (X[1], Y[1]))
    _, kept = before

    def back(p, anchor, g):
        return p - 0.3 * g / (1 + 0.3 * g) * (p - anchor)

    expected = jax.tree.map(back, moved.params, kept.anchor, kept.importance)
    close(pulled.params, expected, rtol=1e-5, atol=1e-6)
    close(pulled.optimizer, moved.optimizer, rtol=1e-5, atol=1e-6)


def test_a_strength_of_another_form_is_refused():
    """A lambda of thousands given to the relative form would freeze the network silently."""
    words = (
        r"ewc\.strength: 2000\.0 would hold all parameters where they are; ewc\.form=relative "
        r"takes kappa.* give ewc\.form=proximal with it"
    )
    for make in (methods.ewc, methods.ewc_online, methods.bd_ewc):
        with pytest.raises(UserError, match=words):
            make(strength=2000.0)
        make(strength=2000.0, form="proximal")
        make(strength=100.0)
    with pytest.raises(UserError, match=r"ewc\.strength: -1\.0 is below 0"):
        methods.ewc(strength=-1.0)


@pytest.mark.parametrize("form, strength", DEFAULT_STRENGTH.items())
@pytest.mark.parametrize("make", [methods.ewc, methods.ewc_online])
def test_the_default_strength_is_that_of_the_form(make, form, strength):
    network = networks.from_linen(MLP((6,), 3), X[0])
    for given in ({}, {"strength": None}):
        method = make(form=form, **given)
        state = bpnjax.learner(network, method, optax.sgd(0.1), 2).init(jax.random.key(0))
        np.testing.assert_allclose(state.method.strength, strength)
    assert methods.ewc.fields["ewc.form"].default == "relative"
