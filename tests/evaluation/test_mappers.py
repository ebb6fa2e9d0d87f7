"""Task mappers: against scikit-learn, in a run, after loading, and in a user's own loop."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.cluster import KMeans
from sklearn.covariance import EmpiricalCovariance
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from support import Jitted, digits_config

import bpnjax
from bpnjax import methods, networks
from bpnjax.evaluation import mappers, task_inference
from bpnjax.run import byte_counts, export
from bpnjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_once")

rng = np.random.default_rng(0)
CENTRES = 5.0 * rng.normal(size=(4, 3))
Z = (CENTRES[np.arange(200) % 4] + rng.normal(size=(200, 3)) * [1.0, 0.5, 2.0]).astype(np.float32)
# Padding that must not count.
PADDED = np.concatenate([Z, np.full((7, 3), 1e3, np.float32)])
WEIGHT = (np.arange(207) < 200).astype(np.float32)
NEW = rng.normal(size=(9, 3)).astype(np.float32) * 4
KEY = jax.random.key(0)


def test_k_means_is_scikit_learns():
    start = Z[:4] + 1.0
    found = mappers.k_means(PADDED, WEIGHT, jnp.asarray(start))
    reference = KMeans(4, init=start, n_init=1, max_iter=300, tol=0, algorithm="lloyd").fit(Z)
    np.testing.assert_allclose(found, reference.cluster_centers_, rtol=1e-4)
    away = mappers.squared_distances(NEW, found)
    np.testing.assert_allclose(away, reference.transform(NEW) ** 2, rtol=1e-3)


def test_means_to_start_from_are_examples_far_from_each_other():
    found = np.asarray(mappers.spread_means(KEY, PADDED, WEIGHT, 4))
    assert all((mean == Z).all(1).any() for mean in found)
    nearest = np.square(found[:, None] - CENTRES).sum(-1).argmin(1)
    assert len(set(nearest)) >= 3  # of four clusters
    same = mappers.spread_means(KEY, jnp.ones((5, 2)), jnp.ones(5), 3)  # nothing is far away
    np.testing.assert_array_equal(same, np.ones((3, 2)))


def test_mixture_is_scikit_learns():
    mean, floor = jnp.asarray(CENTRES, jnp.float32), 0.05
    start = mappers.mixture(PADDED, WEIGHT, mean, floor, rounds=0)
    found = mappers.mixture(PADDED, WEIGHT, mean, floor, rounds=20)
    weights = np.asarray(start.weight, np.float64)
    reference = GaussianMixture(
        4, covariance_type="diag", means_init=start.mean, weights_init=weights / weights.sum(),
        precisions_init=start.precision, reg_covar=floor, max_iter=20, tol=0,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        reference.fit(Z.astype(np.float64))
    np.testing.assert_allclose(found.mean, reference.means_, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found.precision, reference.precisions_, rtol=1e-3)
    np.testing.assert_allclose(found.weight, reference.weights_, rtol=1e-3)
    scores = mappers.mixture_log_likelihood(found, NEW)
    np.testing.assert_allclose(scores, reference.score_samples(NEW), rtol=1e-3, atol=1e-2)


def fitted(mapper, tasks=2):
    """What a mapper keeps of two tasks of two clusters each, which are classes as well."""
    kept = mapper.empty(tasks, 3)
    cluster = np.concatenate([np.arange(200) % 4, np.zeros(7, int)])
    for task in range(2):
        weight = WEIGHT * (cluster // 2 == task)
        kept = mapper.fit(kept, task, KEY, PADDED, cluster % 2, weight)
    return kept


def test_mahalanobis_is_scikit_learns_with_a_shared_covariance():
    kept = fitted(mappers.mahalanobis(2))
    means = np.stack([Z[c::4].mean(0) for c in range(4)])
    residuals = (Z - means[np.arange(200) % 4]).astype(np.float64)
    reference = EmpiricalCovariance(assume_centered=True).fit(residuals)
    share, covariance = 3 / 203, reference.covariance_
    shrunk = (1 - share) * covariance + share * np.trace(covariance) / 3 * np.eye(3)
    np.testing.assert_allclose(kept.precision, np.linalg.inv(shrunk), rtol=1e-3, atol=1e-5)
    for task in range(2):
        found = mappers.mahalanobis(2).score(kept, task, NEW)
        reference.precision_ = np.linalg.inv(shrunk)
        each = [reference.mahalanobis(NEW - means[c]) for c in (2 * task, 2 * task + 1)]
        np.testing.assert_allclose(found, -np.min(each, 0), rtol=1e-3)


@pytest.mark.parametrize("name", task_inference.MAPPERS)
def test_each_guesses_tasks_that_are_apart(name):
    mapper = mappers.make(name, clusters=2, classes=2)
    kept = fitted(mapper)
    scores = jnp.stack([mapper.score(kept, task, Z) for task in range(2)], 1)
    assert np.isfinite(scores).all()
    assert (np.argmax(scores, 1) == np.arange(200) % 4 // 2).mean() > 0.9
    # The second task changes nothing of the first, but for the covariance that they share.
    first = mapper.fit(mapper.empty(2, 3), 0, KEY, PADDED, np.zeros(207, int), WEIGHT)
    both = mapper.fit(first, 1, KEY, PADDED + 1.0, np.zeros(207, int), WEIGHT)
    for field in set(first._fields) - {"scatter", "examples", "precision"}:
        np.testing.assert_array_equal(getattr(first, field)[0], getattr(both, field)[0])


@pytest.mark.parametrize(
    "rule, features, floats",
    [
        ("gmm", "core", 3 * (2 * 16 + 1)),
        ("nearest_mean", "input", 3 * 6),
        ("mahalanobis", "mode", 2 * (16 + 1)),
    ],
)
def test_a_run_and_its_loaded_model_guess_alike(rule, features, floats, tmp_path):
    """On a core that does not move, what each further task costs, and as a loaded model."""
    config = digits_config(
        "bd", train__rates=".*=0", train__epochs=2, bd__layers="hidden_.*",
        evaluate__rule=rule, evaluate__features=features, evaluate__clusters=3,
        evaluate__statistics=6,
    )  # fmt: skip
    jitted = Jitted(config)
    state, _ = jitted.train(KEY)
    correct = jax.tree.map(np.asarray, jitted.evaluate(state, jitted.data, 2, True))
    guessed = correct.task_guess / jitted.sequence.test.count
    assert guessed.mean() > 0.6
    biases = 16
    report = byte_counts.report(jitted.experiment)
    assert report["parameters_per_task"] == biases + floats
    assert report["bytes_per_task"] == 4 * (biases + floats)
    export.save_models(tmp_path, jitted.experiment, state, 1, jitted.sequence)
    predictor = bpnjax.load(tmp_path)
    split = jitted.sequence.test
    for task in range(3):
        x = split.images[split.index[task][: split.count[task]]]
        assert abs((predictor.infer(x).task == task).sum() - correct.task_guess[task]) <= 1
    with pytest.raises(ValueError, match="has no statistics of its tasks; train it with"):
        predictor.infer(x, "statistics")
    assert predictor.infer(x, "entropy").task.shape == (len(x),)


def test_a_user_s_own_loop_infers():
    x = np.concatenate([Z[:40], Z[:40] + 30.0])
    y = np.tile([0, 1], 40)
    network = networks.from_linen(nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)]), x[:1])
    learner = bpnjax.learner(network, methods.psp(layers="layers_2"), optax.sgd(0.1), num_tasks=3)
    state, tasks = learner.init(KEY), (slice(40), slice(40, 80))
    mapper = mappers.gmm(2)
    kept = mapper.empty(3, learner.width("gmm"))
    assert learner.width("gmm") == 8
    for task, own in enumerate(tasks):
        state = learner.end_task(learner.begin_task(state, task), (x[own], y[own]))
        z = learner.features(state, jnp.asarray(x[own]))
        np.testing.assert_allclose(
            z, np.maximum(x[own] @ np.asarray(state.params["layers_0"]["kernel"]), 0.0), atol=1e-4
        )
        kept = mapper.fit(kept, task, KEY, z, y[own], jnp.ones(40))
    guess = learner.infer(state, x, mapper, kept, tasks=2)
    assert (guess.task == np.repeat([0, 1], 40)).mean() > 0.9
    told = np.asarray(learner.apply(state, x, guess.task))
    np.testing.assert_array_equal(guess.outputs, told.argmax(1))
    by_answers = learner.infer(state, x, "entropy", per="batch")
    assert by_answers.scores.shape == (80, 3) and len(set(by_answers.task)) == 1
    logits = learner.apply(state, x, 1)
    np.testing.assert_allclose(by_answers.scores[:, 1], task_inference.entropy(logits), atol=1e-5)
    # In the mode of a task its key lies on what enters the layer.
    keyed = learner.features(state, jnp.asarray(x), 1)
    np.testing.assert_allclose(np.abs(keyed), learner.features(state, jnp.asarray(x)), rtol=1e-5)
    for wrong, message in (
        ({"rule": "gmm"}, "rule: 'gmm' needs what is kept of the tasks"),
        ({"tasks": 4}, "tasks: 4; this learner has 1 to 3"),
        ({"features": "input"}, "features: unknown value 'input'"),
    ):
        with pytest.raises(UserError, match=message):
            learner.infer(state, x, **wrong)


def test_a_network_that_does_not_show_its_features():
    network = networks.from_function(
        lambda p, mode, x: networks.modulate(x @ p, mode.get("out", {})),
        lambda key: jnp.ones((3, 2)), {"out": 2}, Z[:1],
    )  # fmt: skip
    learner = bpnjax.learner(network, methods.plain_bias(), optax.sgd(0.1), num_tasks=2)
    with pytest.raises(UserError, match="gmm: function does not show what goes into its layers"):
        learner.width("gmm")
