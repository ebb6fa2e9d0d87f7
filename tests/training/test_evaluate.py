"""The three accuracies against a plain NumPy evaluation."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from bpnjax import config as configuration
from bpnjax.data import load_sequence
from bpnjax.evaluation import task_inference
from bpnjax.evaluation.accuracy import Correct, accuracies, evaluate
from bpnjax.networks.linen import modulated_apply
from bpnjax.run.setup import make_problem
from bpnjax.training import epochs
from bpnjax.training.task_data import put_on_device
from bpnjax.utils import prng

pytestmark = pytest.mark.usefixtures("compile_once")


def trained(method="bd_psp", **changes):
    config = configuration.default()
    config.method, config.dataset.name = method, "digits"
    config.sequence.num_tasks = 3
    config.model.hidden = (16,)
    config.train.batch_size = 48
    config.train.learning_rate = 1e-2
    config.bd.hidden_dim = 8
    config.evaluate.batch_size = 32  # the last chunk of a task is not full
    config.evaluate.update(changes)
    sequence = load_sequence(config)
    problem = make_problem(config, sequence)
    data = put_on_device(sequence)
    key = jax.random.key(0)
    state = epochs.init_state(problem, key)
    run_steps = jax.jit(partial(epochs.run_steps, problem))
    for task in range(3):
        state = epochs.begin_task(problem, key, state, task)
        for epoch in range(3):
            state, _ = run_steps(key, state, data, task, epoch, 0, 5)
        state = epochs.end_task(problem, key, state, data, task)
    return problem, key, state, data, sequence


def densities(problem, key, sequence, x, rows):
    """Log-densities [modes, n] of inputs under the Gaussians of the tasks, by SciPy."""
    r, scores = problem.statistics, []
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


def by_hand(problem, key, state, sequence, rows, infer, batch, limit, rule="entropy"):
    split, modes = sequence.test, range(rows)
    found = np.full((4, 3), np.nan)
    for task in range(rows):
        index = split.index[task, : split.count[task]]
        x = jnp.asarray(split.images[index] * sequence.scale + sequence.shift)
        y = split.labels[index]
        logits = np.stack([
            modulated_apply(problem.model, state.core, problem.method.mode(state.method, m), x)
            for m in modes
        ])  # fmt: skip
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
            scores = densities(problem, key, sequence, x[: limit or None], rows)
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
    problem, key, state, data, sequence = trained(
        infer=infer, inferred_examples=limit, rule=rule, statistics=6
    )
    program = jax.jit(partial(evaluate, problem))
    for row in (0, 2):
        found = accuracies(program(key, state, data, row, True), sequence.test.count, limit)
        expected = by_hand(problem, key, state, sequence, row + 1, infer, 32, limit, rule)
        for got, hand in zip(found.values(), expected, strict=True):
            np.testing.assert_allclose(got, hand, atol=0.02)  # ties in float32
        np.testing.assert_array_equal(np.isnan(found["task_told"]), np.isnan(expected[0]))
    if rule == "statistics":
        assert found["task_guess"].mean() > (0.9 if infer == "batch" else 0.5)
    skipped = accuracies(program(key, state, data, 2, False), sequence.test.count, limit)
    assert np.isnan(skipped["task_inferred"]).all() and not np.isnan(skipped["task_told"]).any()


def test_masking_recovers_what_a_shared_output_layer_forgot():
    problem, key, state, data, sequence = trained("sgd")
    found = accuracies(evaluate(problem, key, state, data, 2, True), sequence.test.count)
    expected = by_hand(problem, key, state, sequence, 3, "example", 32, 0)
    expected[3] = np.nan  # it has no modes to choose from
    for got, hand in zip(found.values(), expected, strict=True):
        np.testing.assert_allclose(got, hand, atol=0.02)
    assert found["task_told"][0] < 0.1 and found["task_masked"][0] > 0.6


def test_counts_become_exact_shares():
    counts = Correct(np.array([3, -1]), np.array([3, -1]), np.array([1, -1]), np.array([2, -1]))
    found = accuracies(counts, np.array([3, 7]), inferred_examples=2)
    np.testing.assert_array_equal(found["task_told"], [1.0, np.nan])
    np.testing.assert_array_equal(found["task_inferred"], [0.5, np.nan])
    np.testing.assert_array_equal(found["task_guess"], [1.0, np.nan])


def test_methods_without_modes_have_one_number():
    config = configuration.default()
    config.method, config.dataset.name, config.train.batch_size = "sgd", "digits", 48
    config.model.hidden = (8,)
    sequence = load_sequence(config)
    problem = make_problem(config, sequence)
    key = jax.random.key(0)
    state = epochs.init_state(problem, key)
    found = evaluate(problem, key, state, put_on_device(sequence), 2, True)
    np.testing.assert_array_equal(found.task_told, found.task_inferred)
