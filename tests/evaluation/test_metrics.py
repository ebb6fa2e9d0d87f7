"""Summaries against matrices worked out by hand; counts of what is stored."""

import math

import numpy as np
import pytest

from bpnjax import config as configuration
from bpnjax.data import load_sequence
from bpnjax.evaluation import metrics
from bpnjax.run import byte_counts
from bpnjax.training.experiment import make_experiment

NAN = math.nan
MATRIX = [[0.9, NAN, NAN], [0.5, 0.8, NAN], [0.6, 0.4, 0.7]]


def test_summaries_by_hand():
    assert metrics.average_accuracy(MATRIX) == pytest.approx((0.6 + 0.4 + 0.7) / 3)
    assert metrics.first_task_accuracy(MATRIX) == 0.6
    assert metrics.backward_transfer(MATRIX) == pytest.approx(((0.6 - 0.9) + (0.4 - 0.8)) / 2)
    assert metrics.forgetting(MATRIX) == pytest.approx(((0.9 - 0.6) + (0.8 - 0.4)) / 2)


def test_anytime_accuracies_are_those_of_all_test_examples_so_far():
    """By counting right answers among the test examples of all classes seen after each task."""
    count = np.array([10, 30, 20])
    right = np.array([[9, 0, 0], [5, 24, 0], [6, 12, 14]])
    matrix = [[9 / 10, NAN, NAN], [5 / 10, 24 / 30, NAN], [6 / 10, 12 / 30, 14 / 20]]
    steps = [right[i].sum() / count[: i + 1].sum() for i in range(3)]
    assert metrics.last_accuracy(matrix, count) == pytest.approx(steps[-1])
    assert metrics.average_incremental_accuracy(matrix, count) == pytest.approx(np.mean(steps))
    summary = metrics.summarise([matrix, matrix], count)
    assert summary["last_accuracy"]["mean"] == pytest.approx(steps[-1])
    assert summary["average_incremental_accuracy"]["mean"] == pytest.approx(np.mean(steps))
    # Tasks of one size.
    assert metrics.last_accuracy(MATRIX) == pytest.approx(metrics.average_accuracy(MATRIX))
    wanted = np.mean([0.9, (0.5 + 0.8) / 2, (0.6 + 0.4 + 0.7) / 3])
    assert metrics.average_incremental_accuracy(MATRIX) == pytest.approx(wanted)


def test_forgetting_takes_the_best_earlier_row_and_not_the_diagonal():
    matrix = [[0.5, NAN, NAN], [0.9, 0.8, NAN], [0.7, 0.9, 0.7]]
    assert metrics.forgetting(matrix) == pytest.approx(((0.9 - 0.7) + (0.8 - 0.9)) / 2)
    assert metrics.backward_transfer(matrix) == pytest.approx(((0.7 - 0.5) + (0.9 - 0.8)) / 2)


def test_one_task_and_untested_rows_have_no_transfer():
    assert math.isnan(metrics.backward_transfer([[0.5]]))
    assert math.isnan(metrics.forgetting([[0.5]]))
    only_last = [[NAN, NAN], [0.4, 0.6]]
    assert metrics.average_accuracy(only_last) == metrics.last_accuracy(only_last) == 0.5
    assert math.isnan(metrics.average_incremental_accuracy(only_last))
    assert math.isnan(metrics.backward_transfer(only_last))
    assert metrics.summarise(np.array([only_last]))["forgetting"] == {"mean": None, "sd": None}


def test_mean_and_sd_over_seeds():
    summary = metrics.summarise(np.array([MATRIX, MATRIX])[..., :])["first_task_accuracy"]
    assert summary == {"mean": 0.6, "sd": 0.0}
    assert metrics.mean_and_sd([0.5]) == {"mean": 0.5, "sd": None}
    assert metrics.mean_and_sd([1.0, 2.0, 4.0])["sd"] == pytest.approx(np.std([1, 2, 4], ddof=1))


@pytest.mark.parametrize(
    "method, floats",
    # Biases of 300 per hidden layer and 10 outputs; keys cost a seed; stl a whole network.
    [("bd_ewc", 5 * 300 + 10), ("bd_psp", 5 * 300 + 10), ("psp", 0), ("ewc", 0), ("stl", None)],
)
def test_what_is_stored_per_task(method, floats):
    config = configuration.default()
    config.method, config.dataset.name, config.train.batch_size = method, "digits", 32
    report = byte_counts.report(make_experiment(config, load_sequence(config)))
    core = 64 * 300 + 4 * 300**2 + 300 * 10 + 5 * 300 + 10
    assert report["core_parameters"] == core
    floats = core if floats is None else floats
    assert report["parameters_per_task"] == floats
    assert report["bytes_per_task"] == 4 * floats
    kept = 5 * floats + (0 if method == "stl" else core)
    assert report["answering_bytes"] - 4 * kept in range(100)  # seeds of keys
    assert report["training_bytes"] >= 3 * 4 * core  # parameters and Adam's two moments
    assert report["replay_bytes"] == 0


@pytest.mark.parametrize(
    ("method", "floats"),
    [("ncm", 10 * 301), ("fecam", 10 * (300 + 300**2 + 1) + 1), ("ranpac", 10 * 2001 + 2)],
)
def test_what_an_analytic_head_stores(method, floats):
    """In place of the output layer, and nothing more with more tasks of the same classes."""
    config = configuration.default()
    config.method, config.dataset.name, config.train.batch_size = method, "digits", 32
    report = byte_counts.report(make_experiment(config, load_sequence(config)))
    hidden = 64 * 300 + 4 * 300**2 + 5 * 300
    assert report["answering_bytes"] == 4 * (hidden + floats)
    assert report["bytes_per_task"] == 0


def test_what_a_memory_keeps():
    """The paper's GEM(10) on two classes a task: 20 images, here of 64 bytes, for each task."""
    config = configuration.default()
    config.method, config.dataset.name, config.train.batch_size = "gem", "digits", 32
    config.gem.memories, config.gem.per = 10, "class"
    report = byte_counts.report(make_experiment(config, load_sequence(config)))
    assert report["replay_bytes"] == 5 * 20 * (64 + 4 + 4)  # with its label and whether it is real


@pytest.mark.parametrize("method, numbers", [("er", 0), ("derpp", 10)])
def test_what_a_reservoir_keeps(method, numbers):
    """300 examples of 64 bytes, each with its label and task, DER++'s with its outputs; a count."""
    config = configuration.default()
    config.method, config.dataset.name, config.train.batch_size = method, "digits", 32
    config.replay.memory_size = 300
    report = byte_counts.report(make_experiment(config, load_sequence(config)))
    assert report["replay_bytes"] == 300 * (64 + 4 + 4 + 4 * numbers) + 4
    assert report["bytes_per_task"] == 0  # one reservoir, however many tasks
