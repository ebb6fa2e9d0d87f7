"""A run that begins with the tasks of another: it equals one never parted."""

import dataclasses
import json
import pathlib
import shutil
from functools import partial

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from support import COMPOSED

import bpnjax
from bpnjax import main, methods
from bpnjax.data import load_sequence
from bpnjax.run import checkpoint, later_tasks, plots, train
from bpnjax.run.checkpoint import Position
from bpnjax.training import epochs
from bpnjax.training.experiment import make_experiment
from bpnjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("programs_once")

# The third task has no class of its own, so that outputs and normalisation stay.
TWO, THREE = "0,1;2,3", "0,1;2,3;0,2"
LARGER = "0,1;2,3;0,1,2,3"  # with it the table of examples grows as well
# One of each kind: nothing kept but modes; importance; a path integral; examples.
QUICK = ("bd_psp", "bd_ewc", "ewc", "si", "er", "gem")
IN_TURN = [name for name, make in methods.REGISTRY.items() if make().trains != "jointly"]


@pytest.fixture(scope="module")
def base():
    from bpnjax.config import default

    def config(method, classes="", **changes):
        made = default()
        made.update_from_flattened_dict(
            {"name": "tiny", "dataset.name": "digits", "sequence.classes": classes, "seed": 3,
             "model.hidden": (16,), "train.epochs": 1, "train.batch_size": 32,
             "train.learning_rate": 3e-3, "bd.hidden_dim": 8, "gem.memories": 20,
             "replay.memory_size": 40, "replay.batch_size": 16, "ebll.code": 4, "ebll.epochs": 1,
             "method": method}
            | {field.replace("__", "."): value for field, value in changes.items()}
        )  # fmt: skip
        return made

    return config


@pytest.fixture(scope="module")
def done(tmp_path_factory, base, compile_once):
    """Runs, each done once: the configuration's folder."""
    folders = {}

    def run(method, classes="", **changes):
        config = base(method, classes, **changes)
        name = json.dumps(config.to_dict(), sort_keys=True)
        if name not in folders:
            folder = tmp_path_factory.mktemp("run")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(plots, "draw", lambda workdir, result: [])
                train.train_and_evaluate(config, folder)
            folders[name] = folder
        return folders[name]

    return run


def accuracy(folder):
    found = json.loads((folder / "result.json").read_text())["accuracy"]
    return {kind: np.array(matrix, float) for kind, matrix in found.items()}


def assert_continues(continued, whole, learned=2):
    for name in sorted(path.name for path in whole.glob("*.safetensors")):
        old, new = load_file(whole / name), load_file(continued / name)
        assert {n: a.tobytes() for n, a in new.items()} == {n: a.tobytes() for n, a in old.items()}
    for kind, matrix in accuracy(whole).items():
        found = accuracy(continued)[kind]
        assert np.isnan(found[:, :learned]).all()
        np.testing.assert_array_equal(found[:, learned:], matrix[:, learned:])
        assert not np.isnan(found[:, -1]).any()


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in IN_TURN
        if name in QUICK or name not in COMPOSED
    ],
)
def test_two_tasks_and_one_later_are_three_at_once(done, method):
    """Bit for bit, in what answers and in every accuracy that the second run measures."""
    first = done(method, TWO)
    # Importance is summed in blocks as long as the longest task, up to 512, and rounded so.
    in_blocks = "ewc" in method or method in ("mas", "slnid", "imm_mode")
    classes = THREE if in_blocks else LARGER
    assert_continues(done(method, classes, resume_from=str(first)), done(method, classes))


def command(arguments, config):
    """Runs the command with the fields of a configuration."""
    file = pathlib.Path(__file__).resolve().parents[2] / "configs" / "digits.py"
    flatten, load = main.configuration.flatten, main.configuration.load_file
    of_file = flatten(load(str(file)))
    fields = [
        f"--config.{field}={value}"
        for field, value in flatten(config).items()
        if value != of_file.get(field, value)
    ]
    return main.run([f"--config={file}", *fields, *arguments])


@pytest.mark.parametrize(
    ("method", "source"),
    [("bd_psp", "model.safetensors"), ("ewc", ""), ("er", ""), ("gem", "")],
)
def test_the_command_goes_on(done, base, tmp_path, capsys, monkeypatch, method, source):
    """From the file of a model, moved away from its run; or from a run with its checkpoints."""
    monkeypatch.setattr(plots, "draw", lambda workdir, result: [])
    first = tmp_path / "first"
    shutil.copytree(done(method, TWO), first)
    if source:
        (tmp_path / "alone").mkdir()
        source = str(shutil.move(first / source, tmp_path / "alone" / source))
        shutil.rmtree(first)
    else:
        source = str(first)
    capsys.readouterr()
    flags = [f"--resume_from={source}", f"--workdir={tmp_path / 'later'}"]
    assert command(flags, base(method, THREE)) == 0
    out, err = capsys.readouterr()
    assert err.splitlines()[1] == f"tasks 1 to 2 are those of {source}; going on at task 3"
    assert "\ntask 3/3 (0, 2) done" in err and "\ntask 2/3" not in err
    assert [line.split()[0] for line in out.splitlines()[2:5]] == ["1", "2", "3"]
    assert_continues(tmp_path / "later", done(method, THREE))
    # Complete, it says so; with another source it is another run.
    assert command(flags, base(method, THREE)) == 0
    assert "complete" in capsys.readouterr().out
    assert command(flags[1:], base(method, THREE)) == 2
    assert "resume_from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "rule"),
    [
        pytest.param("", "statistics", marks=pytest.mark.slow),
        ("model.safetensors", "statistics"),
        ("model.safetensors", "mahalanobis"),
    ],
)
def test_statistics_of_the_earlier_tasks_go_on(done, file, rule):
    same = {"evaluate__rule": rule, "evaluate__statistics": 8}
    first, whole = done("bd_psp", TWO, **same), done("bd_psp", THREE, **same)
    assert_continues(done("bd_psp", THREE, resume_from=str(first / file), **same), whole)


@pytest.mark.slow
def test_seeds_and_the_optimizer_go_on(done):
    same = {"num_seeds": 2, "train__reset_optimizer": False}
    first = done("bd_psp_ewc", TWO, **same)
    continued = done("bd_psp_ewc", THREE, resume_from=str(first), **same)
    whole = done("bd_psp_ewc", THREE, **same)
    assert len(list(whole.glob("*.safetensors"))) == 2
    assert_continues(continued, whole)


def assert_near(folder, whole, name):
    """A seed alone rounds as it does among others, or nearly so."""
    old, new = load_file(whole / name), load_file(folder / "model.safetensors")
    for path, array in old.items():
        difference = np.abs(new[path].astype(float) - array.astype(float)).max()
        assert difference < 1e-4, (path, difference)


@pytest.mark.slow
def test_one_of_the_seeds_goes_on(done):
    """The second of two, from their checkpoint."""
    same = {"num_seeds": 2, "train__reset_optimizer": False}
    first, whole = done("bd_psp_ewc", TWO, **same), done("bd_psp_ewc", THREE, **same)
    same = {"seed": 4, "train__reset_optimizer": False}
    continued = done("bd_psp_ewc", THREE, resume_from=str(first), **same)
    assert_near(continued, whole, "model_seed_4.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("file", ["", "model_seed_4.safetensors"])
def test_one_of_the_seeds_goes_on_from_its_model(done, file):
    first, whole = done("bd_psp", TWO, num_seeds=2), done("bd_psp", THREE, num_seeds=2)
    continued = done("bd_psp", THREE, resume_from=str(first / file), seed=4)
    assert_near(continued, whole, "model_seed_4.safetensors")


@pytest.mark.slow
def test_permuted_pixels_go_on(done):
    """Orders of pixels come from the seed."""
    changes = {"sequence__kind": "permuted", "sequence__examples_per_task": 200}
    first = done("bd_ewc", sequence__num_tasks=1, **changes)
    more = changes | {"sequence__num_tasks": 2}
    continued = done("bd_ewc", resume_from=str(first), **more)
    assert_continues(continued, done("bd_ewc", **more), learned=1)


def test_cut_and_gone_on_again(done, base, tmp_path, monkeypatch):
    """Its own checkpoint is newer than what it came from."""
    first = done("bd_ewc", TWO)
    config = base("bd_ewc", "0,1;2,3;0,2;1,3", resume_from=str(first))
    monkeypatch.setattr(plots, "draw", lambda workdir, result: [])
    real = train._Run.save

    def cutting(run):
        real(run)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train._Run, "save", cutting)
        train.train_and_evaluate(config, tmp_path / "cut")
    with monkeypatch.context() as patch:
        patch.setattr(later_tasks, "put_first", None)
        train.train_and_evaluate(config, tmp_path / "cut")
    whole = done("bd_ewc", "0,1;2,3;0,2;1,3", resume_from=str(first))
    assert_continues(tmp_path / "cut", whole)


@pytest.mark.parametrize(
    ("method", "heads"),
    [
        ("bd_psp", "single"),
        *(
            pytest.param(method, heads, marks=pytest.mark.slow)
            for method, heads in (
                ("bd_psp", "multi"), ("bd_ewc", "multi"), ("psp", "single"), ("stl", "single"),
            )
        ),
    ],
)  # fmt: skip
def test_earlier_modes_are_left_alone(done, base, method, heads):
    """Two tasks of two digits, then a third with outputs of its own.

    The earlier modes are in the new model bit for bit; with the earlier shared weights they give
    what they gave; and a task costs the bytes that result.json and the documentation name.
    """
    shared = {"sequence__heads": heads}
    first = done(method, TWO, **shared)
    later = done(method, "0,1;2,3;4,5", resume_from=str(first), **shared)
    old, new = (load_file(folder / "model.safetensors") for folder in (first, later))
    assert set(old) == set(new)
    for name, array in old.items():
        if name.endswith("/key/seed"):
            np.testing.assert_array_equal(new[name], array, err_msg=name)
        elif not name.startswith("params/"):
            corner = new[name][tuple(slice(length) for length in array.shape)]
            assert corner.tobytes() == array.tobytes(), name
            assert new[name].shape[0] == 3 and new[name][2].any(), name

    before, after = bpnjax.load(first), bpnjax.load(later)
    images = load_sequence(base(method, TWO)).test.images[:40]
    task = np.arange(40) % 2
    if method != "stl":  # whose networks are its modes
        params = jax.tree.map(in_front, before.state.params, after.state.params)
        after = dataclasses.replace(after, state=dataclasses.replace(after.state, params=params))
    there = after.logits(images, task)
    np.testing.assert_array_equal(there[:, :4], before.logits(images, task))
    for name in ("scale", "shift", "input_dtype", "input_shape"):
        assert after.metadata[name] == before.metadata[name]

    bytes_per_task = json.loads((later / "result.json").read_text())["memory"]["bytes_per_task"]
    of_network = 4 * (64 * 16 + 16 + 16 * 6 + 6)
    biases = 4 * (16 + 6)  # the hidden units and the outputs, as floats
    assert bytes_per_task == {"psp": 0, "stl": of_network}.get(method, biases)
    per_task = [
        array
        for name, array in new.items()
        if not name.startswith("params/") and not name.endswith("/key/seed")
    ]
    assert sum(array.nbytes for array in per_task) == 3 * bytes_per_task


def in_front(old, new):
    """The earlier shared parameters in the shape of the later ones, zero behind."""
    padded = np.zeros(new.shape, new.dtype)
    padded[tuple(slice(length) for length in old.shape)] = old
    return padded


@pytest.mark.parametrize(
    ("method", "bytes_per_task"),
    [("bd_psp", 80), *(pytest.param(m, b, marks=pytest.mark.slow) for m, b in {"psp": 0}.items())],
)
def test_the_file_grows_by_the_bytes_of_a_task(done, method, bytes_per_task):
    """No new outputs: the 16 units and 4 outputs of one more mode as floats, and nothing else."""
    first = done(method, TWO)
    later = done(method, LARGER, resume_from=str(first))
    sizes = [
        sum(array.nbytes for array in load_file(folder / "model.safetensors").values())
        for folder in (first, later)
    ]
    memory = json.loads((later / "result.json").read_text())["memory"]
    assert memory["bytes_per_task"] == bytes_per_task == sizes[1] - sizes[0]
    # The file as a whole: the head of names and settings aside, the same.
    files = [folder / "model.safetensors" for folder in (first, later)]
    heads = [8 + int.from_bytes(path.read_bytes()[:8], "little") for path in files]
    on_disk = [path.stat().st_size - head for path, head in zip(files, heads, strict=True)]
    assert on_disk == sizes


@pytest.mark.parametrize("method", ["gem", "er"])
def test_examples_kept_are_the_same_examples(done, base, method):
    """A larger task makes the table of examples wider; memories hold the images themselves."""
    first = done(method, TWO)
    found = []
    for classes in (TWO, LARGER):
        sequence = load_sequence(base(method, classes))
        found.append(make_experiment(base(method, classes), sequence))
    narrow, wide = (
        jax.eval_shape(partial(epochs.init_state, experiment), jax.random.key(0))
        for experiment in found
    )
    old = checkpoint.restore_at(first / "checkpoints", Position(2, 0, 0), narrow)
    later = done(method, LARGER, resume_from=str(first))
    new = checkpoint.restore_at(later / "checkpoints", Position(3, 0, 0), wide)
    kept, after = (s.learner.method for s in (old, new))
    images = load_sequence(base(method, TWO)).train.images
    stored = {image.tobytes() for image in images}
    if method == "gem":
        np.testing.assert_array_equal(after.x[:2], kept.x)
        np.testing.assert_array_equal(after.y[:2], kept.y)
        assert np.asarray(after.real).all()
        kept_images = np.asarray(kept.x).reshape(-1, 8, 8, 1)
    else:
        kept, after = kept.memory, after.memory
        of_before = np.asarray(after.task) < 2
        # A reservoir goes on: what is left of the earlier tasks is where it was.
        np.testing.assert_array_equal(after.x[of_before], kept.x[of_before])
        np.testing.assert_array_equal(after.y[of_before], kept.y[of_before])
        assert 0 < of_before.sum() < len(of_before) and int(after.seen) > int(kept.seen)
        kept_images = np.asarray(kept.x)
    assert kept_images.dtype == np.uint8
    assert {image.tobytes() for image in kept_images} <= stored


# Refusals


@pytest.fixture
def refused(tmp_path, capsys):
    """The command, refused in one line with all the words; nothing is written."""

    def check(config, *words, workdir=None):
        capsys.readouterr()
        known = sorted(tmp_path.rglob("*"))
        assert command([f"--workdir={workdir or tmp_path / 'new'}"], config) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("bpnjax: ") and "\n" not in error
        for word in words:
            assert word in error, error
        assert sorted(tmp_path.rglob("*")) == known

    return check


def test_what_does_not_fit_is_refused(done, base, refused, tmp_path):
    first = str(done("bd_psp", TWO))
    later = {"resume_from": first}
    refused(base("bd_psp", TWO, **later), "has 2 tasks and this sequence 2", "to 3 or more")
    refused(base("bd_psp", "0,1;2,4;5,6", **later), "task 2", "classes 2, 3, here 2, 4")
    refused(base("bd_psp", "2,3;0,1;4,5", **later), "task 1", "classes 0, 1, here 2, 3")
    refused(base("bd_ewc", THREE, **later), "method: 'bd_psp' -> 'bd_ewc'", "set them as")
    refused(base("bd_psp", THREE, ewc__strength=1.0, **later), "ewc.strength: None -> 1.0")
    refused(base("bd_psp", THREE, dataset__normalize="unit", **later), "normalize: 'standard'")
    refused(base("bd_psp", THREE, sequence__heads="multi", **later), "sequence.heads: 'single'")
    refused(base("bd_psp", THREE, seed=5, **later), "has seed 3", "pass --config.seed=3")
    refused(base("bd_psp", THREE, num_seeds=2, **later), "has seed 3", "--config.num_seeds=1")
    refused(
        base("bd_psp", THREE, evaluate__rule="statistics", **later),
        "did not store what evaluate.rule=statistics",
    )
    kept = str(done("bd_psp", TWO, evaluate__rule="statistics", evaluate__statistics=8))
    other = {"resume_from": kept, "evaluate__rule": "statistics", "evaluate__statistics": 9}
    refused(base("bd_psp", THREE, **other), "evaluate.statistics=8, and this run asks for 9")
    refused(base("joint", THREE, **later), "joint trains on all tasks at once")
    refused(base("bd_psp", THREE, resume_from=str(tmp_path)), "no model", "of a complete run")
    refused(base("bd_psp", THREE, resume_from="nowhere"), "no model nowhere")
    refused(base("bd_psp", THREE, **later), "is the run that", workdir=first)
    of_file = base("bd_psp", THREE, resume_from=f"{first}/model.safetensors")
    refused(of_file, "--workdir", "is the run that --resume_from names", workdir=first)


def test_other_sets_are_refused(done, base, refused):
    first = done("bd_psp", TWO)
    config = base("bd_psp", "0,1;0,2", resume_from=str(first), dataset__name="gaussians")
    refused(config, "dataset.name: 'digits' -> 'gaussians'")


def test_a_part_held_out_by_other_draws_is_refused(done, base):
    metadata = bpnjax.load(done("bd_psp", TWO)).metadata
    earlier = later_tasks.Earlier("there", 2, None, metadata, None)
    config = base("bd_psp", "0,1;2,3;4,5", dataset__validation=0.2)
    with pytest.raises(UserError, match=r"dataset.validation: with 0.2 .* held out than before"):
        later_tasks._check_sequence(earlier, config, load_sequence(config))


def test_without_the_protection_a_method_is_refused(done, base, refused, tmp_path):
    first = done("bd_ewc", TWO)
    file = base("bd_ewc", THREE, resume_from=str(first / "model.safetensors"))
    refused(
        file, "bd_ewc goes on with more than a model holds", "importance, anchor", "is one model",
        "name the folder of the run, with its checkpoints",
    )  # fmt: skip
    copy = tmp_path / "copy"
    shutil.copytree(first, copy, ignore=shutil.ignore_patterns("checkpoints"))
    refused(base("bd_ewc", THREE, resume_from=str(copy)), "has no checkpoints")
    first = done("bd_psp", TWO)
    same_optimizer = {"train__reset_optimizer": False}
    file = base("bd_psp", THREE, resume_from=str(first / "model.safetensors"), **same_optimizer)
    refused(file, "the optimizer's state (train.reset_optimizer=False)", "is one model")


# Methods whose model holds all that goes on to later tasks.
ALONE = {
    "sgd", "stl", "psp", "xdg", "bd", "gd", "gd_matched", "plain_bias", "random_bias", "bd_psp",
    "frozen", "bd_frozen", "bias_frozen",
}  # fmt: skip


@pytest.mark.parametrize("method", IN_TURN)
def test_which_methods_need_more_than_a_model(base, method):
    config = base(method, TWO)
    experiment = make_experiment(config, load_sequence(config))
    assert (not later_tasks.kept_elsewhere(experiment)) == (method in ALONE)
