"""Networks with BatchNorm and dropout in the command: statistics per task, shared or frozen."""

import flax.linen as nn
import jax
import numpy as np
import pytest

import bpnjax
from bpnjax import models
from bpnjax.data import load_sequence
from bpnjax.run import train

pytestmark = pytest.mark.usefixtures("compile_once")


class Normed(nn.Module):
    """A hidden layer with BatchNorm and dropout."""

    num_classes: int

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(16, name="hidden")(x.reshape(x.shape[0], -1))
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(self.num_classes, name="output")(x)


@pytest.fixture
def normed(tiny):
    """A run of the command's loop on that network, as a function of fields."""
    models.register("normed")(Normed)
    tiny.model.name = "normed"

    def run(folder, **fields):
        tiny.update_from_flattened_dict({f.replace("__", "."): v for f, v in fields.items()})
        return train.train_and_evaluate(tiny, folder)

    run.config = tiny
    yield run
    del models.REGISTRY["normed"]


def told(predictor, sequence):
    """Share of right answers of a loaded model on each task."""
    found = []
    for task in range(predictor.num_tasks):
        rows = sequence.test.index[task, : sequence.test.count[task]]
        labels = sequence.columns[task, sequence.test.labels[rows]]
        found.append(np.mean(predictor(sequence.test.images[rows], task=task) == labels))
    return found


@pytest.mark.parametrize("policy", ["task", "shared", "frozen"])
def test_the_loaded_model_answers_as_the_run_did(normed, tmp_path, policy):
    result = normed(tmp_path, method="bd_ewc", model__batch_statistics=policy)
    predictor = bpnjax.load(tmp_path)
    run = result["accuracy"]["task_told"][0, -1]
    assert told(predictor, load_sequence(normed.config)) == run.tolist()
    # Mean and variance of 16 units for each further task, where each has its own.
    biases = 4 * (16 + len(predictor.class_names))
    own = 4 * 2 * 16 if policy == "task" else 0
    assert result["memory"]["bytes_per_task"] == biases + own
    kept = jax.tree.leaves(predictor.state.task_variables)
    assert bool(kept) == (policy == "task")


def test_each_task_keeps_statistics_of_its_own(normed, tmp_path):
    normed(tmp_path, method="sgd", model__batch_statistics="task")
    bank = bpnjax.load(tmp_path).state.task_variables
    means = np.asarray(bank["batch_stats"]["BatchNorm_0"]["mean"])
    assert means.shape[0] == 3
    assert not np.allclose(means[0], means[1])


def test_a_network_per_task_has_statistics_per_task(normed, tmp_path):
    result = normed(tmp_path, method="stl", model__batch_statistics="shared")
    run = result["accuracy"]["task_told"][0, -1]
    assert told(bpnjax.load(tmp_path), load_sequence(normed.config)) == run.tolist()


def test_a_run_that_was_cut_goes_on_with_its_statistics(normed, tmp_path, monkeypatch):
    whole = normed(tmp_path / "whole", method="bd_ewc")

    class Cut(Exception):
        pass

    def cut(self, task):
        if task == 1:
            raise Cut
        return save(self, task)

    save = train._Run.train_task
    with monkeypatch.context() as patch:
        patch.setattr(train._Run, "train_task", cut)
        with pytest.raises(Cut):
            normed(tmp_path / "cut", method="bd_ewc")
    again = normed(tmp_path / "cut", method="bd_ewc")
    for kind, matrix in whole["accuracy"].items():
        np.testing.assert_array_equal(again["accuracy"][kind], matrix)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert one == other


def test_statistics_per_task_tell_the_task(normed, tmp_path):
    # ewc has no modes, but with statistics per task whoever answers must know or guess the task.
    result = normed(tmp_path, method="ewc", model__batch_statistics="task")
    assert result["inference"] is not None
    told, inferred = (result["accuracy"][kind][0, -1] for kind in ("task_told", "task_inferred"))
    assert not np.array_equal(told, inferred)


def test_shared_statistics_do_not(normed, tmp_path):
    result = normed(tmp_path, method="ewc", model__batch_statistics="shared")
    assert result["inference"] is None
