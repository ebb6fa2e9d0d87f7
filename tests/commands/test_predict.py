"""A loaded model answers as the trained one did; mixed tasks, tasks not told, refusals."""

import csv
import shutil

import jax
import numpy as np
import pytest

import bpnjax
from bpnjax import predict
from bpnjax.data import load_sequence
from bpnjax.run import train
from bpnjax.run.setup import make_problem
from bpnjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_once")

KEPT = {"evaluate.rule": "statistics", "evaluate.statistics": 8}
CASES = {
    "bd_psp": KEPT,
    "bd_ewc": {"sequence.kind": "permuted"} | KEPT,
    "bd_psp_ewc": {"sequence.heads": "multi", "num_seeds": 2, "seed": 3},
    "stl": {"evaluate.rule": "max_logit"},
    "imm_mode": KEPT,
    "xdg": {},
    "ewc_masked": {},
    "psp": {"model.name": "convnet", "model.channels": (4,), "model.hidden": (8,)} | KEPT,
}


@pytest.fixture(scope="module", params=CASES)
def trained(request, tmp_path_factory):
    from bpnjax.config import default

    config = default()
    config.update_from_flattened_dict(
        {"dataset.name": "digits", "sequence.num_tasks": 3, "model.hidden": (16,),
         "train.epochs": 1, "train.batch_size": 32, "train.learning_rate": 3e-3,
         "bd.hidden_dim": 8, "method": request.param} | CASES[request.param]
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("run")
    return config, folder, train.train_and_evaluate(config, folder)


def test_answers_are_those_that_the_run_counted(trained):
    config, folder, result = trained
    sequence = load_sequence(config)
    split = sequence.test
    for number in range(config.num_seeds):
        predictor = bpnjax.load(folder, None if number == 0 else config.seed + number)
        assert predictor.metadata["seed"] == str(config.seed + number)
        for task in range(3):
            rows = split.index[task, : split.count[task]]
            labels = sequence.columns[task, split.labels[rows]]
            images = predictor.permuted(split.images[rows], task)
            logits = predictor.logits(images, task)
            answers = np.where(sequence.classes[task], logits, -np.inf).argmax(1)
            for kind, given in (("task_masked", answers), ("task_told", logits.argmax(1))):
                if kind == "task_told" and config.sequence.heads == "multi":
                    continue  # the predictor answers within the head, the run counted all outputs
                right = np.mean(given == labels)
                assert right == result["accuracy"][kind][number][-1][task], (kind, task)


def test_the_task_is_inferred_as_the_run_did(trained):
    config, folder, result = trained
    sequence = load_sequence(config)
    split = sequence.test
    for number in range(config.num_seeds):
        predictor = bpnjax.load(folder, config.seed + number)
        for task in range(3):
            rows = split.index[task, : split.count[task]]
            labels = sequence.columns[task, split.labels[rows]]
            images = predictor.permuted(split.images[rows], task)
            right = np.mean(predictor(images) == labels)
            assert right == result["accuracy"]["task_inferred"][number][-1][task]
            if result["inference"] is not None:
                assert result["inference"]["rule"] == config.evaluate.rule == predictor.rule
                right = np.mean(predictor.infer(images).task == task)
                assert right == result["inference"]["task_accuracy"][number][-1][task]
                together = predictor.infer(images, per="batch")
                assert len(set(together.task)) == 1
                assert together.task[0] == together.scores.sum(0).argmax()


def test_mixed_tasks_equal_one_task_at_a_time(trained):
    config, folder, _ = trained
    predictor = bpnjax.load(folder / "model.safetensors")
    images = load_sequence(config).test.images[:30]
    task = np.arange(30) % 3
    mixed = predictor.logits(images, task)
    for one in range(3):
        np.testing.assert_allclose(
            mixed[task == one], predictor.logits(images, one)[task == one], rtol=1e-5, atol=1e-6
        )
    p = predictor.probabilities(images, task)
    np.testing.assert_allclose(p.sum(1), 1.0, rtol=1e-5)
    if predictor.restricted:
        assert (p[~predictor.outputs[task]] == 0).all()
    assert (predictor(images, task=task) == mixed.argmax(1)).all()


def test_not_told_it_takes_the_surest_mode(trained):
    config, folder, _ = trained
    predictor = bpnjax.load(folder)
    images = load_sequence(config).test.images[:20]
    guess = predictor.infer(images, "entropy")
    entropy = []
    for task in range(3):
        p = predictor.probabilities(images, task).astype(np.float64)
        entropy.append(-(p * np.log(np.maximum(p, 1e-300))).sum(1))
    np.testing.assert_allclose(guess.scores, -np.array(entropy).T, rtol=1e-3, atol=1e-5)
    largest = np.array([predictor.logits(images, task).max(1) for task in range(3)]).T
    scores = predictor.infer(images, "max_logit").scores
    np.testing.assert_allclose(scores, largest, rtol=1e-4, atol=1e-5)
    at = np.arange(20)
    assert (guess.scores[at, guess.task] == guess.scores.max(1)).all()
    np.testing.assert_array_equal(guess.outputs, predictor(images, task=guess.task))


one_model = pytest.mark.parametrize("trained", ["bd_psp"], indirect=True)


@one_model
def test_a_loaded_network_is_the_trained_one_bit_for_bit(trained):
    from bpnjax.run import checkpoint
    from bpnjax.run.checkpoint import Position
    from bpnjax.training import epochs

    config, folder, _ = trained
    problem = make_problem(config, load_sequence(config))
    shapes = jax.eval_shape(lambda k: epochs.init_state(problem, k), jax.random.key(0))
    state = checkpoint.restore_at(folder / "checkpoints", Position(3, 0, 0), shapes)
    predictor = bpnjax.load(folder)
    jax.tree.map(np.testing.assert_array_equal, predictor.core, state.core)
    for task in range(3):
        mode = problem.method.mode(state.method, task)
        found = bpnjax.select(predictor.bank, task)
        jax.tree.map(np.testing.assert_array_equal, found, mode)


@one_model
def test_command(trained, tmp_path, capsys):
    config, folder, _ = trained
    images = load_sequence(config).test.images[:7]
    np.savez(tmp_path / "in.npz", images=images, task=np.array([1, 2, 3, 1, 2, 3, 1]))
    np.savez(tmp_path / "untold.npz", images=images)
    flags = [f"--model={folder}", f"--output={tmp_path / 'out.csv'}"]
    predictor = bpnjax.load(folder)

    def rows(*more):
        assert predict.run([*flags, *more]) == 0
        return list(csv.DictReader((tmp_path / "out.csv").open()))

    told = rows(f"--input={tmp_path / 'in.npz'}")
    assert [r["task"] for r in told] == list("1231231") and {r["told"] for r in told} == {"yes"}
    expected = predictor(images, task=[0, 1, 2, 0, 1, 2, 0])
    assert [int(r["output"]) for r in told] == expected.tolist()
    assert [r["class"] for r in told] == [predictor.class_names[c] for c in expected]
    second = rows(f"--input={tmp_path / 'untold.npz'}", "--task=2")
    assert [int(r["output"]) for r in second] == predictor(images, task=1).tolist()
    guessed = rows(f"--input={tmp_path / 'untold.npz'}")
    assert {r["told"] for r in guessed} == {"no"}
    assert [int(r["output"]) for r in guessed] == predictor(images).tolist()
    alike = rows(f"--input={tmp_path / 'untold.npz'}", "--rule=max_logit", "--per=batch")
    task = predictor.infer(images, "max_logit", "batch").task
    assert [int(r["task"]) for r in alike] == (task + 1).tolist() and len(set(task)) == 1
    assert "7 answers in" in capsys.readouterr().out


@one_model
def test_refusals(trained, tmp_path, capsys):
    config, folder, _ = trained
    images = load_sequence(config).test.images[:2]
    np.savez(tmp_path / "in.npz", images=images)
    np.savez(tmp_path / "flat.npz", images=images.reshape(2, -1))
    np.savez(tmp_path / "named.npz", pictures=images)
    (tmp_path / "text.npz").write_text("no")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100])
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    text = (old / "model.safetensors").read_bytes().replace(b"bpnjax-2", b"bpnjax-1")
    (old / "model.safetensors").write_bytes(text)
    good = {"model": folder, "input": tmp_path / "in.npz", "output": tmp_path / "out.csv"}

    def refused(message, *more, **changes):
        flags = [f"--{name}={value}" for name, value in (good | changes).items() if value]
        assert predict.run([*flags, *more]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and "\n" not in error, error
        assert not (tmp_path / "out.csv").exists()

    refused("--model: missing", model=None)
    refused("no model", model=tmp_path)
    refused("no model", "--seed=99")
    refused("is no safetensors file", model=broken)
    refused("has the format 'bpnjax-1'", model=old)
    refused("cannot read", input=tmp_path / "text.npz")
    refused("holds pictures; it needs `images`", input=tmp_path / "named.npz")
    refused("pictures of shape (64,); this model reads (8, 8, 1)", input=tmp_path / "flat.npz")
    refused("task 3; this model has tasks 0 to 2", "--task=4")
    refused("--output: no folder", output=tmp_path / "none" / "out.csv")
    refused("is no flag", "extra")
    refused("value should be one of <entropy|max_logit|statistics>", "--rule=surest")
    with pytest.raises(UserError, match="no model .* name the folder of a complete run"):
        bpnjax.load(tmp_path)
