"""The three accuracies against a plain NumPy evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from support import Jitted, digits_config

from bpnjax.evaluation import task_inference
from bpnjax.evaluation.accuracy import Correct, accuracies
from bpnjax.methods import Context
from bpnjax.utils import prng

pytestmark = pytest.mark.usefixtures("compile_once")


def trained(method="bd_psp", epochs=3, **changes):
    """A run of three tasks that are all trained, and its seed's key."""
    config = digits_config(method, train__learning_rate=1e-2, bd__learning_rate=None)
    config.evaluate.batch_size = 32  # the last chunk of a task is not full
    config.evaluate.update(changes)
    jitted, key = Jitted(config), jax.random.key(0)
    state, _ = jitted.train(key, epochs=epochs)
    return jitted, key, state


def densities(jitted, key, x, rows):
    """Log-densities [modes, n] of inputs under the Gaussians of the tasks, by SciPy."""
    sequence, r, scores = jitted.sequence, jitted.experiment.width, []
    directions = task_inference.directions(prng.fold(key, prng.STATISTICS), 64, r)
    for task in range(rows):
        index = sequence.train.index[task, : sequence.train.count[task]]
        seen = sequence.train.images[index] * sequence.scale + sequence.shift
        z = seen.reshape(len(index), -1) @ np.asarray(directions, np.float64)
        covariance, share = np.cov(z.T, bias=True), r / (r + len(index))
        sphere = np.trace(covariance) / r * np.eye(r)
        scores.append(
            stats.multivariate_normal(z.mean(0), (1 - share) * covariance + share * sphere).logpdf(
                np.asarray(x).reshape(len(x), -1) @ directions
            )
        )
    return np.array(scores)


def outputs_by_hand(learner, state, x, task):
    """An MLP in NumPy, in the mode that the method gives for a task."""
    ctx = Context(learner.setup, jnp.int32(task), None, False)
    params, mode = learner.method.forward(state.params, state.task_params, state.method, ctx)
    h = np.asarray(learner.network.prepare(jnp.asarray(x))).reshape(len(x), -1)
    for path in learner.network.layers:
        own = {name: np.asarray(vector) for name, vector in mode.get(path, {}).items()}
        h = h * own.get("key", 1.0) @ np.asarray(params[path]["kernel"])
        h = h + params[path]["bias"] + own.get("bias", 0.0)
        h = np.maximum(h, 0.0) if path != "output" else h
    return h


def by_hand(jitted, key, state, rows, infer, batch, limit, rule="entropy"):
    sequence, learner = jitted.sequence, jitted.learner
    split, modes = sequence.test, range(rows)
    found = np.full((4, 3), np.nan)
    for task in range(rows):
        index = split.index[task, : split.count[task]]
        x = split.images[index]
        y = split.labels[index]
        logits = np.stack([outputs_by_hand(learner, state.learner, x, mode) for mode in modes])
        masked = np.where(sequence.classes[task], logits[task], -np.inf)
        found[0, task] = (logits[task].argmax(-1) == y).mean()
        found[1, task] = (masked.argmax(-1) == y).mean()
        logits, y = logits[:, : limit or None], y[: limit or None]
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        scores = (p * np.log(p + 1e-30)).sum(-1)  # [modes, n]
        if rule == "max_logit":
            scores = logits.max(-1).copy()
        if rule == "statistics":
            seen = x[: limit or None] * sequence.scale + sequence.shift
            scores = densities(jitted, key, seen, rows)
        if infer == "batch":
            size = min(batch, limit or len(split.index[task]), split.index.shape[1])
            for start in range(0, len(y), size):
                part = scores[:, start : start + size]
                part[:] = part.sum(1, keepdims=True)
        answer = logits[scores.argmax(0), np.arange(len(y))].argmax(-1)
        found[2, task] = (answer == y).mean()
        found[3, task] = (scores.argmax(0) == task).mean()
    return found


@pytest.mark.parametrize(
    "infer, limit, rule",
    [
        ("example", 0, "entropy"),
        ("batch", 0, "entropy"),
        ("example", 20, "entropy"),
        ("example", 0, "max_logit"),
        ("example", 0, "statistics"),
        ("batch", 20, "statistics"),
    ],
)
def test_equals_numpy(infer, limit, rule):
    jitted, key, state = trained(infer=infer, inferred_examples=limit, rule=rule, statistics=6)
    count = jitted.sequence.test.count
    for row in (0, 2):
        found = accuracies(jitted.evaluate(state, jitted.data, row, True), count, limit)
        expected = by_hand(jitted, key, state, row + 1, infer, 32, limit, rule)
        for got, hand in zip(found.values(), expected, strict=True):
            np.testing.assert_allclose(got, hand, atol=0.02)  # ties in float32
        np.testing.assert_array_equal(np.isnan(found["task_told"]), np.isnan(expected[0]))
    if rule == "statistics":
        assert found["task_guess"].mean() > (0.9 if infer == "batch" else 0.5)
    skipped = accuracies(jitted.evaluate(state, jitted.data, 2, False), count, limit)
    assert np.isnan(skipped["task_inferred"]).all() and not np.isnan(skipped["task_told"]).any()


def test_masking_recovers_what_a_shared_output_layer_forgot():
    jitted, key, state = trained("sgd")
    found = jitted.test(state, 2)
    expected = by_hand(jitted, key, state, 3, "example", 32, 0)
    expected[3] = np.nan  # it has no modes to choose from
    for got, hand in zip(found.values(), expected, strict=True):
        np.testing.assert_allclose(got, hand, atol=0.02)
    assert found["task_told"][0] < 0.1 and found["task_masked"][0] > 0.6


@pytest.mark.parametrize("method", ["bd_psp", "bd_ewc"])
def test_the_task_in_training_is_tested_with_its_own_mode(method):
    """Before a task ends its mode is not in the bank yet; after it the answers are the same."""
    jitted = Jitted(digits_config(method, bd__epsilon=1.0))  # biases without which nothing is right
    state, _ = jitted.train(jax.random.key(0), [0, 1], epochs=4)
    state = jitted.begin_task(state, 2)
    for epoch in range(4):
        state, _ = jitted.run_steps(state, jitted.data, 2, epoch, 0, jitted.steps(2))
    count = jitted.sequence.test.count
    during = accuracies(jitted.evaluate(state, jitted.data, 2, True, in_training=True), count)
    stored = accuracies(jitted.evaluate(state, jitted.data, 2, True), count)
    after = jitted.test(jitted.end_task(state, jitted.data, 2), 2)
    assert during["task_masked"][2] > 0.9
    for kind in during:
        np.testing.assert_array_equal(during[kind], after[kind], err_msg=kind)
    assert stored["task_told"][2] < after["task_told"][2] - 0.1  # its place of the bank is empty


def test_counts_become_exact_shares():
    counts = Correct(np.array([3, -1]), np.array([3, -1]), np.array([1, -1]), np.array([2, -1]))
    found = accuracies(counts, np.array([3, 7]), inferred_examples=2)
    np.testing.assert_array_equal(found["task_told"], [1.0, np.nan])
    np.testing.assert_array_equal(found["task_inferred"], [0.5, np.nan])
    np.testing.assert_array_equal(found["task_guess"], [1.0, np.nan])


def test_methods_without_modes_have_one_number():
    jitted = Jitted(digits_config("sgd"))
    found = jitted.evaluate(jitted.init(jax.random.key(0)), jitted.data, 2, True)
    np.testing.assert_array_equal(found.task_told, found.task_inferred)
    assert (found.task_guess == -1).all()
