"""A loaded model answers as the trained one did; mixed tasks, tasks not told, refusals."""

import csv
import json
import shutil
import warnings
import zipfile

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import bpnjax
from bpnjax import methods, predict
from bpnjax.data import builtin_sets, load_sequence
from bpnjax.modes import is_seed
from bpnjax.run import checkpoint, predictor, train
from bpnjax.run.checkpoint import Position
from bpnjax.training import epochs
from bpnjax.training.experiment import make_experiment
from bpnjax.utils import arrays
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
    if config.sequence.heads == "multi" or config.method == "ewc_masked":
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


# What of a method's state is in its model, beside the shared parameters.
KEPT_OF = {
    "bd_psp": {"method/0/{}/bias", "method/1/{}/key/seed"},
    "bd_ewc": {"method/0/{}/bias"},
    "bd_psp_ewc": {"method/0/{}/bias", "method/1/{}/key/seed"},
    "stl": {"method/{}/kernel", "method/{}/bias"},
    "imm_mode": {"method/merged/{}/kernel", "method/merged/{}/bias"},
    "xdg": {"method/{}/key/seed"},
    "psp": {"method/{}/key/seed"},
}


def test_the_model_holds_what_answers_and_nothing_else(trained):
    """No Fisher, anchor, optimizer or example; statistics only if tasks are told apart by them."""
    config, folder, _ = trained
    found = load_file(folder / "model.safetensors")
    layers = ["conv_0", "hidden_0", "output"] if config.method == "psp" else ["hidden_0", "output"]
    own = {name.format(layer) for name in KEPT_OF.get(config.method, ()) for layer in layers}
    if config.method == "xdg":
        own -= {"method/hidden_0/key/seed"}  # the inputs are never silent
    shared = {f"params/{layer}/{leaf}" for layer in layers for leaf in ("kernel", "bias")}
    if config.method in ("stl", "imm_mode"):
        shared = set()  # networks of their own answer
    told = methods.REGISTRY[config.method].from_config(config).told_task
    if config.evaluate.rule == "statistics" and told:
        own |= {"statistics/mean", "statistics/whitener"}
    assert set(found) == shared | own
    # A further task costs the bytes that result.json names.
    per_task = [name for name in own if not name.endswith("seed") and "merged" not in name]
    result = json.loads((folder / "result.json").read_text())
    assert sum(found[name].nbytes for name in per_task) == 3 * result["memory"]["bytes_per_task"]


def test_a_loaded_network_is_the_trained_one_bit_for_bit(trained):
    """Of each seed, against the run's last checkpoint; what is not in the file is zero."""
    config, folder, _ = trained
    experiment = make_experiment(config, load_sequence(config))

    def init(key):
        state = epochs.init_state(experiment, key)
        if config.num_seeds == 1:
            return state
        return jax.tree.map(lambda leaf: jax.numpy.stack([leaf] * config.num_seeds), state)

    shapes = jax.eval_shape(init, jax.random.key(0))
    state = checkpoint.restore_at(folder / "checkpoints", Position(3, 0, 0), shapes)
    for number in range(config.num_seeds):
        loaded = bpnjax.load(folder, config.seed + number)
        learned = state.learner
        if config.num_seeds > 1:
            learned = jax.tree.map(lambda leaf, n=number: leaf[n], learned)
        needed = jax.tree.leaves(experiment.learner.answering())
        assert any(needed) and not all(needed)
        trained_arrays, own = (arrays.flatten(s) for s in (learned, loaded.state))
        for (name, array), need in zip(trained_arrays.items(), needed, strict=True):
            # Between two tasks none is in training: its number is -1.
            unused = np.full_like(array, -1 if name == "task" else 0)
            assert own[name].tobytes() == (array if need else unused).tobytes(), name


@one_model
def test_command(trained, tmp_path, capsys):
    config, folder, _ = trained
    images = load_sequence(config).test.images[:7]
    np.savez(tmp_path / "in.npz", x=images, task=np.array([1, 2, 3, 1, 2, 3, 1]))
    np.savez(tmp_path / "untold.npz", images=images)
    flags = [f"--model={folder}", f"--output={tmp_path / 'out.csv'}"]
    predictor = bpnjax.load(folder)

    def rows(*more):
        assert predict.run([*flags, *more]) == 0
        return list(csv.DictReader((tmp_path / "out.csv").open()))

    told = rows(f"--input={tmp_path / 'in.npz'}")
    assert list(told[0]) == ["example", "task", "told", "output", "class", "probability"]
    assert [r["example"] for r in told] == list("0123456")
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


def test_the_model_is_not_asked_for_tasks_that_it_does_not_have(trained):
    config, folder, _ = trained
    model = bpnjax.load(folder)
    images = load_sequence(config).test.images[:4]
    for task, said in (
        (3, "task 3; this model has tasks 0 to 2"), (-1, "task -1; this model has tasks"),
        ([0, 1, 2, 3], "task 3"), (2**32, "task 4294967296"), (1.0, "dtype float64; give integers"),
        (True, "dtype bool; give integers"), ([0, 1], r"shape \(2,\) for 4 examples"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            model.logits(images, task)
        with pytest.raises(ValueError, match=said):
            model.permuted(images, task)


# Examples on another scale than in training (trained on uint8 between 0 and 16).


@one_model
def test_another_kind_of_number_is_refused(trained, tmp_path, capsys):
    """Integers do not become floats, whose scale nobody knows; widths may differ."""
    config, folder, _ = trained
    model, images = bpnjax.load(folder), load_sequence(config).test.images[:50]
    assert (model.input_dtype, model.input_range) == (np.uint8, (0.0, 16.0))
    expected = model.logits(images, 0)
    for kind in (np.int32, np.int64, np.uint16):
        np.testing.assert_array_equal(model.logits(images.astype(kind), 0), expected)
    for wrong in (images / 16, images.astype(np.float32), images > 8, images.astype("S2")):
        with pytest.raises(ValueError, match=rf"dtype {wrong.dtype}; this model was .* on uint8"):
            model(wrong, task=0)
        with pytest.raises(ValueError, match=rf"dtype {wrong.dtype}; this model was .* on uint8"):
            model.infer(wrong)
    np.savez(tmp_path / "in.npz", images=images / 16)
    flags = [f"--model={folder}", f"--input={tmp_path / 'in.npz'}", "--task=1"]
    assert predict.run([*flags, f"--output={tmp_path / 'out.csv'}"]) == 2
    assert "--input: examples of dtype float64; this model was trained on uint8" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "out.csv").exists()


@one_model
def test_another_range_is_warned_of(trained, tmp_path, capsys):
    config, folder, _ = trained
    model, images = bpnjax.load(folder), load_sequence(config).test.images[:50]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images, task=0)
        model.infer(images[:1])
        model(images * 4, task=0)  # brighter images may be right
    for factor, said in ((15, "between 0 and 240"), (1 / 16, "between 0 and 1")):
        wrong = (images * factor).astype(np.uint8)
        with pytest.warns(UserWarning, match=f"{said}, those .* between 0 and 16: are they scaled"):
            model(wrong, task=0)
    np.savez(tmp_path / "in.npz", images=images * 15)
    flags = [f"--model={folder}", f"--input={tmp_path / 'in.npz'}"]
    assert predict.run([*flags, f"--output={tmp_path / 'out.csv'}"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bpnjax: --input: the examples lie between 0 and 240, those that the")
    assert (tmp_path / "out.csv").read_text().count("\n") == 51


def test_floats_are_read_with_their_scale(tiny, tmp_path):
    """A model of floats: their precision is free, whole numbers and NaN are refused."""
    tiny.update_from_flattened_dict(
        {"dataset.name": "gaussians", "sequence.classes": "0,1;0,2", "train.epochs": 1,
         "model.hidden": (8,)}
    )  # fmt: skip
    train.train_and_evaluate(tiny, tmp_path)
    model, points = bpnjax.load(tmp_path), builtin_sets.gaussians().test_images[:100]
    assert model.input_dtype == np.float32
    expected = model.logits(points, 1)
    np.testing.assert_allclose(model.logits(points.astype(np.float64), 1), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"dtype int32; this model was trained on float32"):
        model(points.astype(np.int32), task=1)
    for bad in (np.nan, np.inf):
        wrong = points.copy()
        wrong[7, 1] = bad
        with pytest.raises(ValueError, match="examples hold NaN or infinite numbers; fix the da"):
            model(wrong, task=1)
    with pytest.warns(UserWarning, match="are they scaled alike"):
        model(points / 100, task=1)


@one_model
def test_refusals(trained, tmp_path, capsys):
    config, folder, _ = trained
    images = load_sequence(config).test.images[:2]
    np.savez(tmp_path / "in.npz", images=images)
    np.savez(tmp_path / "flat.npz", images=images.reshape(2, -1))
    np.savez(tmp_path / "named.npz", pictures=images)
    np.savez(tmp_path / "none.npz", images=images[:0])
    np.savez(tmp_path / "named_tasks.npz", images=images, task=np.array(["1", "2"]))
    np.savez(tmp_path / "part_tasks.npz", images=images, task=np.array([1.0, 1.7]))
    np.savez(tmp_path / "three_tasks.npz", images=images, task=np.array([1, 2, 3]))
    np.save(tmp_path / "alone.npz.npy", images)
    (tmp_path / "alone.npz.npy").rename(tmp_path / "alone.npz")
    (tmp_path / "text.npz").write_text("no")
    (tmp_path / "empty.npz").write_bytes(b"")
    whole = (tmp_path / "in.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with zipfile.ZipFile(tmp_path / "odd.npz", "w") as file:
        file.writestr("images.npy", b"no array")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100])
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    text = (old / "model.safetensors").read_bytes().replace(b"bpnjax-3", b"bpnjax-1")
    (old / "model.safetensors").write_bytes(text)
    good = {"model": folder, "input": tmp_path / "in.npz", "output": tmp_path / "out.csv"}

    def refused(message, *more, **changes):
        flags = [f"--{name}={value}" for name, value in (good | changes).items() if value]
        assert predict.run([*flags, *more]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("bpnjax: ") and "\n" not in error, error
        assert message in error, error
        assert not (tmp_path / "out.csv").exists()

    def unreadable(name):
        refused(f"--input: cannot read {tmp_path / name} as .npz (", input=tmp_path / name)

    refused("--model: missing", model=None)
    refused("no model", model=tmp_path)
    refused("no model", "--seed=99")
    refused("is not a safetensors file", model=broken)
    refused("has the format 'bpnjax-1'", model=old)
    for name in ("text.npz", "empty.npz", "cut.npz", "alone.npz", "absent.npz", "odd.npz"):
        unreadable(name)
    refused("holds pictures; it needs the examples as `x`", input=tmp_path / "named.npz")
    refused("examples of shape (64,); this model reads (8, 8, 1)", input=tmp_path / "flat.npz")
    refused("--input: no examples", input=tmp_path / "none.npz")
    refused("`task` of", input=tmp_path / "named_tasks.npz")
    refused("is of dtype float64; give task numbers", input=tmp_path / "part_tasks.npz")
    refused("shape (3,) for 2 examples", input=tmp_path / "three_tasks.npz")
    refused("task 3; this model has tasks 0 to 2", "--task=4")
    refused("task -1; this model has tasks 0 to 2", "--task=0")
    refused("task 4294967296; this model has tasks 0 to 2", "--task=4294967297")
    refused("--output: no folder", output=tmp_path / "none" / "out.csv")
    refused("is what --input names", output=tmp_path / "in.npz")
    refused("is not a file that can be replaced", output="/dev/null")
    model = folder / "model.safetensors"
    refused("is what --model names", model=model, output=model)
    refused("is not a flag", "extra")
    refused("value should be one of <entropy|max_logit|statistics|", "--rule=surest")
    refused("--config: no file 'none.py'", "--config=none.py")
    assert (tmp_path / "in.npz").read_bytes() == whole
    with pytest.raises(UserError, match="no model .* name the folder of a complete run"):
        bpnjax.load(tmp_path)


@one_model
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("config", "{"), ("config", "[]"), ("config", None), ("config", '{"train": 3}'),
        ("config", '{"model": {"name": "resnet"}}'), ("config", '{"method": "none"}'),
        ("outputs", "[[0, 1], [2, 99]]"), ("outputs", "3"), ("outputs", None),
        ("outputs", "[[0, 1], [2, 3]]"), ("class_names", "[]"), ("class_names", '["a"]'),
        ("input_shape", "[8]"), ("input_shape", '"x"'), ("input_shape", "[8, 9, 1]"),
        ("input_dtype", "picture"), ("input_range", "[3]"), ("input_range", None),
        ("scale", "x"), ("scale", "[1.0, 2.0, 3.0]"), ("shift", None), ("seed", "three"),
        ("seed", None),
    ],
)  # fmt: skip
def test_a_model_with_odd_metadata_is_refused_in_one_line(trained, tmp_path, field, value):
    file = trained[1] / "model.safetensors"
    metadata = predictor.read_metadata(file)
    changed = {k: v for k, v in (metadata | {field: value}).items() if v is not None}
    save_file(load_file(file), tmp_path / "odd.safetensors", changed)
    with pytest.raises(UserError) as error:
        bpnjax.load(tmp_path / "odd.safetensors")
    assert "odd.safetensors" in str(error.value) and "\n" not in str(error.value)


@one_model
def test_a_model_with_other_arrays_is_refused(trained, tmp_path):
    file = trained[1] / "model.safetensors"
    found, metadata = load_file(file), predictor.read_metadata(file)

    def refused(changed, said):
        save_file(changed, tmp_path / "odd.safetensors", metadata)
        with pytest.raises(UserError, match=said):
            bpnjax.load(tmp_path / "odd.safetensors")

    for name in ("params/hidden_0/kernel", "method/0/output/bias", "method/1/output/key/seed"):
        less = {other: array for other, array in found.items() if other != name}
        refused(less, f"{name} is missing; the file was written by something else")
        refused(found | {name: found[name][..., :1]}, f"{name} is .*written by something else")
    kernel = "params/output/kernel"
    refused(found | {kernel: found[kernel].astype(np.float64)}, f"{kernel} is float64")
    refused(found | {"params/extra": np.zeros(1)}, "params/extra is not part of its model")


@one_model
def test_weights_that_are_not_finite_give_no_class(trained, tmp_path, capsys):
    """argmax takes NaN for class 0; a broken mode must not win an inference either."""
    config, folder, _ = trained
    file = folder / "model.safetensors"
    found, metadata = load_file(file), predictor.read_metadata(file)
    bias = found["method/0/output/bias"].copy()
    images = load_sequence(config).test.images[:4]
    np.savez(tmp_path / "in.npz", x=images)
    for bad in (np.nan, np.inf):
        bias[1, 0] = bad
        save_file(found | {"method/0/output/bias": bias}, tmp_path / "bad.safetensors", metadata)
        model = bpnjax.load(tmp_path / "bad.safetensors")
        assert np.isfinite(model.logits(images, [0, 2, 0, 2])).all()
        for ask in (lambda m: m(images, 1), lambda m: m(images, [0, 1, 2, 0]), lambda m: m(images)):
            with pytest.raises(
                UserError, match="NaN or infinite outputs in the mode of task 1; its"
            ):
                ask(model)
        flags = [f"--model={tmp_path / 'bad.safetensors'}", f"--input={tmp_path / 'in.npz'}"]
        assert predict.run([*flags, f"--output={tmp_path / 'out.csv'}", "--task=2"]) == 2
        assert "bpnjax: --model: " in capsys.readouterr().err
        assert not (tmp_path / "out.csv").exists()


def test_repr_is_short(trained):
    config, folder, _ = trained
    text = repr(bpnjax.load(folder))
    assert text.startswith(f"Predictor({config.method}, 3 tasks, ") and len(text) < 100


def test_keys_are_drawn_once(trained, monkeypatch):
    """With the keys of all tasks at hand, or drawn for each answer: the same bit for bit."""
    config, folder, _ = trained
    images = load_sequence(config).test.images[:30]
    task = np.arange(30) % 3
    at_hand, each_time = bpnjax.load(folder), bpnjax.load(folder)
    logits = at_hand.logits(images, task)
    seeds = [s for s in jax.tree.leaves(at_hand.state, is_leaf=is_seed) if is_seed(s)]
    assert (at_hand.answering_state is at_hand.state) == (not seeds)
    monkeypatch.setattr(predictor, "_KEYS", 0)
    np.testing.assert_array_equal(logits, each_time.logits(images, task))
    assert each_time.answering_state is each_time.state
