"""Rules that choose a mode: closed forms, and what a run keeps for the one that needs something."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats
from support import Jitted, digits_config

import bpnjax
from bpnjax import modes
from bpnjax.data.permutation import pixel_order
from bpnjax.evaluation import task_inference
from bpnjax.run import byte_counts, train
from bpnjax.training import epochs
from bpnjax.utils import prng
from bpnjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_once")

STATISTICS = {"evaluate__rule": "statistics", "evaluate__statistics": 6}


def test_scores_of_answers():
    logits = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    p = special.softmax(logits, 1)
    np.testing.assert_allclose(task_inference.entropy(logits), -stats.entropy(p, axis=1), rtol=1e-5)
    np.testing.assert_array_equal(task_inference.max_logit(logits), logits.max(1))
    far = jnp.array([0.0, -1e9])  # outside a head
    assert float(task_inference.entropy(far)) == 0.0
    assert set(task_inference.RULES) == {
        "entropy", "max_logit", "statistics", "gmm", "nearest_mean", "mahalanobis",
    }  # fmt: skip


def test_gaussian_and_density_equal_scipy():
    rng = np.random.default_rng(1)
    seen, new = rng.normal(size=(40, 3)) @ rng.normal(size=(3, 3)) + 2.0, rng.normal(size=(7, 3))
    mean, whitener = task_inference.gaussian(40.0, seen.sum(0), seen.T @ seen)
    covariance = np.cov(seen.T, bias=True)
    drawn = (1 - 3 / 43) * covariance + 3 / 43 * np.trace(covariance) / 3 * np.eye(3)
    expected = stats.multivariate_normal(seen.mean(0), drawn).logpdf(new)
    found = task_inference.log_likelihood(mean, whitener, new) - 1.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(found, expected, rtol=1e-3)


@pytest.mark.parametrize("examples", [np.ones((3, 4)), np.eye(4)[:1], np.zeros((2, 4))])
def test_few_or_equal_examples_have_a_density(examples):
    mean, whitener = task_inference.gaussian(
        float(len(examples)), examples.sum(0), examples.T @ examples
    )
    near, far = task_inference.log_likelihood(mean, whitener, jnp.stack([mean, mean + 1.0]))
    assert np.isfinite([near, far]).all() and near > far


def test_directions_are_signs_and_keep_lengths():
    directions = task_inference.directions(jax.random.key(0), 784, 64)
    np.testing.assert_allclose(np.abs(directions), 784**-0.5, rtol=1e-6)
    assert abs(float(jnp.sum(directions)) * 784**0.5) < 4 * (784 * 64) ** 0.5
    other = task_inference.directions(jax.random.key(1), 784, 64)
    assert not np.array_equal(directions, other)


def test_a_batch_has_the_sum_of_its_scores():
    scores = np.array([[0.0, 4.0, -5.0], [0.0, 4.0, 0.0], [7.0, 0.0, 0.0]])
    assert task_inference.choose(scores).tolist() == [1, 1, 0]
    assert task_inference.choose(scores, "batch").tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="per 'seed'; tasks are inferred per 'example'"):
        task_inference.choose(scores, "seed")


def test_a_score_that_is_nan_is_never_the_highest():
    """argmax of NumPy takes the first NaN."""
    scores = np.array([[np.nan, 1.0, 0.0], [2.0, np.nan, np.nan]])
    assert task_inference.choose(scores).tolist() == [1, 0]
    assert task_inference.choose(scores[:1], "batch").tolist() == [1]
    with pytest.raises(ValueError, match="the scores of example 1 are NaN in every mode"):
        task_inference.choose(np.array([[0.0, 1.0], [np.nan, np.nan]]))


@pytest.mark.parametrize("kind", ["class_split", "permuted"])
def test_a_run_keeps_the_gaussian_of_each_task_as_its_inputs_come(kind):
    """Before any key, pixels in the task's order, of all examples: against NumPy."""
    config = digits_config("bd_psp", sequence__kind=kind, train__epochs=1, **STATISTICS)
    jitted, key = Jitted(config), jax.random.key(3)
    state, _ = jitted.train(key, [0, 1])
    directions = np.asarray(epochs.input_directions(jitted.experiment, key))
    sequence = jitted.sequence
    for task in range(2):
        rows = sequence.train.index[task, : sequence.train.count[task]]
        x = (sequence.train.images[rows] * sequence.scale + sequence.shift).reshape(len(rows), -1)
        if kind == "permuted" and task:
            x = x[:, pixel_order(prng.fold(key, prng.PIXELS), task, 64, True)]
        z = x @ directions
        mean, whitener = task_inference.gaussian(float(len(z)), z.sum(0), z.T @ z)
        np.testing.assert_allclose(state.statistics.mean[task], mean, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(state.statistics.whitener[task], whitener, rtol=1e-2, atol=1e-3)
    assert not state.statistics.mean[2].any()  # not learned yet


def test_another_rule_keeps_nothing_and_trains_the_same():
    key = jax.random.key(0)
    plain = Jitted(digits_config("bd_psp", train__epochs=1))
    kept = Jitted(digits_config("bd_psp", train__epochs=1, **STATISTICS))
    (one, _), (two, _) = plain.train(key, [0, 1]), kept.train(key, [0, 1])
    assert one.statistics == ()
    jax.tree.map(np.testing.assert_array_equal, one.learner.params, two.learner.params)
    banks = [modes.select(state.learner.method[0], 1) for state in (one, two)]
    jax.tree.map(np.testing.assert_array_equal, *banks)
    counts = [byte_counts.report(jitted.experiment) for jitted in (plain, kept)]
    floats = 6 + 6 * 7 // 2
    assert counts[1]["parameters_per_task"] - counts[0]["parameters_per_task"] == floats
    assert counts[1]["bytes_per_task"] - counts[0]["bytes_per_task"] == 4 * floats
    assert counts[1]["training_bytes"] - counts[0]["training_bytes"] == 3 * 4 * floats
    untold = Jitted(digits_config("ewc", **STATISTICS))  # the same network for every task
    assert jax.eval_shape(partial(epochs.init_state, untold.experiment), key).statistics == ()


def test_refusals(tmp_path):
    with pytest.raises(UserError, match="evaluate.statistics: 65 projections of an input of 64"):
        Jitted(digits_config("bd_psp", evaluate__rule="statistics", evaluate__statistics=65))
    with pytest.raises(UserError, match="evaluate.statistics: 0 is below 1"):
        digits_config("bd_psp", evaluate__statistics=0)
    with pytest.raises(UserError, match="evaluate.rule: unknown value 'entrophy'; did you mean"):
        digits_config("bd_psp", evaluate__rule="entrophy")
    train.train_and_evaluate(digits_config("bd_psp", train__epochs=1), tmp_path)
    predictor = bpnjax.load(tmp_path)
    images = np.tile(np.array([0, 16], np.uint8), (2, 8, 4))[..., None]
    with pytest.raises(
        ValueError, match="no statistics of its tasks; train it with --config.evaluate.rule=st"
    ):
        predictor.infer(images, "statistics")
    with pytest.raises(ValueError, match="unknown rule 'surest'; use one of entropy, max_logit"):
        predictor.infer(images, "surest")
    with pytest.raises(ValueError, match="per 'task'; tasks are inferred"):
        predictor.infer(images, per="task")
