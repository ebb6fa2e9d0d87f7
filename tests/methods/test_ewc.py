"""EWC and its online form: anchors, Fishers, and what a first task must not feel of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import Jitted, digits_config

from bpnjax import importance, methods, modes
from bpnjax.methods.bd import product
from bpnjax.methods.ewc import EwcState, accumulate
from bpnjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_once")


def close(a, b, rtol=1e-3, atol=1e-8):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def test_ewc_first_task_is_sgd_and_later_tasks_are_not():
    key = jax.random.key(0)
    plain, anchored = (
        Jitted(digits_config(method, ewc__strength=500.0)) for method in ("sgd", "ewc")
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


@pytest.mark.parametrize("kind", ["empirical", "true"])
def test_a_fisher_of_some_examples_is_their_mean(kind):
    """Of the first ones in the order of the task's last epoch."""
    changes = dict(ewc__examples=50, ewc__fisher=kind, train__epochs=2)
    jitted = Jitted(digits_config("ewc", **changes))
    key = jax.random.key(0)
    state = jitted.train(key, [0])[0].learner
    x, y = (np.concatenate(part)[:50] for part in zip(*jitted.epoch(key, 0, 1), strict=True))
    network = jitted.learner.network
    expected = importance.fisher(network, state.params, {}, jnp.asarray(x), y, kind=kind)
    close(state.method.importance, expected)
    other = np.concatenate([x for x, _ in jitted.epoch(key, 0, 0)])[:50]
    assert (other != x).any()  # the order tells


def mode_of(method, state):
    """The mode in which a composition with ewc was trained, from its state before the end."""
    parts = zip(method.split("_"), state.task_params, state.method, strict=True)
    found = {
        "bd": lambda own, kept: product(own),
        "bias": lambda own, kept: own,
        "psp": lambda own, kept: modes.select(kept, state.task),
        "xdg": lambda own, kept: modes.select(kept, state.task),
        "ewc": lambda own, kept: {},
    }
    return modes.merge(*(found[name](own, kept) for name, own, kept in parts))


@pytest.mark.parametrize("method", ["bd_ewc", "bd_psp_ewc", "bias_ewc", "xdg_ewc"])
def test_the_fisher_is_that_of_the_network_in_the_mode_of_its_task(method):
    """With the bias and the key with which it was trained: the plain network's is another."""
    jitted = Jitted(digits_config(method, train__epochs=1, bd__epsilon=0.1,
                                  plain_bias__learning_rate=0.1))  # fmt: skip
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


def test_online_ewc_is_not_ewc_by_default():
    """From the third task on; before it both have the same single Fisher."""
    key, found = jax.random.key(0), {}
    for method in ("ewc", "ewc_online"):
        jitted = Jitted(digits_config(method, train__epochs=2, ewc__strength=50.0))
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
    """The explicit form goes to NaN, the default does not."""
    changes = dict(train__optimizer="sgd", train__learning_rate=0.3, ewc__strength=2000.0,
                   ewc__fisher="true", train__epochs=2)  # fmt: skip

    def final(form):
        state, _ = Jitted(digits_config("ewc", ewc__form=form, **changes)).train(jax.random.key(0))
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.learner.params)])

    assert np.isfinite(final("proximal")).all()
    assert not np.isfinite(final("gradient")).all()
