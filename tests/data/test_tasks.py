"""`bpnjax.data.tasks`: any data in Python as a sequence of tasks."""

import json

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from PIL import Image
from support import digits_config

import bpnjax
from bpnjax import data, methods, networks
from bpnjax.data import builtin_sets, load_sequence, own
from bpnjax.data.permutation import pixel_order
from bpnjax.run.train import train_and_evaluate
from bpnjax.utils import prng
from bpnjax.utils.errors import UserError

DIGITS = builtin_sets.digits()
X, Y = DIGITS.train_images[:300], DIGITS.train_labels[:300]
TEST = DIGITS.test_images[:100], DIGITS.test_labels[:100]
FLAT = X.reshape(300, 64).astype(np.float32)


class Columns:
    """A Dataset as Hugging Face's: columns by name, features that name classes."""

    def __init__(self, columns, names=None):
        self.columns, self.column_names = columns, list(columns)
        self.features = {"label": type("ClassLabel", (), {"names": names})()} if names else {}

    def __getitem__(self, name):
        return self.columns[name]


class InTurn(Columns):
    """One that can be read from its beginning only."""

    __getitem__ = property()

    def __iter__(self):
        for i in range(len(self.columns["label"])):
            yield {name: values[i] for name, values in self.columns.items()}


def batches(x, y, size=32):
    for start in range(0, len(x), size):
        yield x[start : start + size], y[start : start + size]


def images():
    return [Image.fromarray(image.squeeze()) for image in X]


SAME = {
    "pair": lambda: data.tasks((X, Y), TEST, num_tasks=5),
    "without channels": lambda: data.tasks((X[..., 0], Y), (TEST[0][..., 0], TEST[1]), num_tasks=5),
    "jax": lambda: data.tasks((jax.numpy.asarray(X), jax.numpy.asarray(Y)), TEST, num_tasks=5),
    "batches": lambda: data.tasks(batches(X, Y), batches(*TEST), num_tasks=5),
    "reader": lambda: data.tasks(list(batches(X, Y)).__iter__(), TEST, num_tasks=5),
    "columns": lambda: data.tasks(
        {"train": Columns({"image": images(), "label": Y.tolist(), "file": ["x"] * 300}),
         "test": TEST}, num_tasks=5),
    "in turn": lambda: data.tasks(InTurn({"image": images(), "label": Y}), TEST, num_tasks=5),
    "mapping": lambda: data.tasks(
        dict(train_x=X, train_y=Y, test_x=TEST[0], test_y=TEST[1]), classes_per_task=2),
    "text": lambda: data.tasks((X, Y.astype(str)), (TEST[0], TEST[1].astype("S")), num_tasks=5),
    "objects": lambda: data.tasks((X, Y.astype(object)), TEST, num_tasks=5),
    "whole floats": lambda: data.tasks((X, Y.astype(float)), TEST, num_tasks=5),
    "class lists": lambda: data.tasks(
        (X, Y), TEST, classes=[[0, 1], ["2", 3], [4, 5], [6, 7], ["8", "9"]]),
    "names": lambda: data.tasks((X, Y), TEST, num_tasks=5, class_names=list("0123456789")),
}  # fmt: skip


@pytest.mark.parametrize("form", SAME)
def test_all_forms_give_the_same_sequence(form):
    expected = data.tasks((X, Y), TEST, classes_per_task=2)
    found = SAME[form]()
    assert found.version == expected.version and found.class_names == tuple("0123456789")
    for one, other in zip(jax.tree.leaves((expected.train, expected.test)),
                          jax.tree.leaves((found.train, found.test)), strict=True):  # fmt: skip
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    assert found.train.images.shape == (300, 8, 8, 1)


def test_it_is_what_the_command_makes_of_the_same_set():
    config = digits_config("sgd", sequence__num_tasks=5, sequence__order_seed=3)
    expected = load_sequence(config)
    found = data.tasks("digits", num_tasks=5, order_seed=3)
    assert (found.version, found.class_names) == (expected.version, expected.class_names)
    np.testing.assert_array_equal(found.train.index, expected.train.index)
    np.testing.assert_array_equal(found.scale, expected.scale)


def test_what_an_own_loop_needs():
    sequence = data.tasks((FLAT, Y), num_tasks=5, test_share=0.25)
    assert len(sequence) == sequence.num_tasks == 5
    assert repr(sequence) == (
        "TaskSequence(5 tasks, 10 outputs, inputs float32[64], 226 training and 74 test examples, "
        f"version '{sequence.version}')"
    )
    assert sequence.names_of(4) == ("8", "9")
    rows = np.isin(Y, [2, 3])
    x, y = sequence.train_examples(1)
    held_x, held_y = sequence.test_examples(1)
    assert sorted(np.unique(y)) == sorted(np.unique(held_y)) == [2, 3]
    assert len(x) + len(held_x) == rows.sum()
    assert {tuple(row) for row in np.concatenate([x, held_x]).round(3).tolist()} == {
        tuple(row) for row in sequence.normalise(FLAT[rows]).round(3).tolist()
    }
    epochs = [list(sequence.batches(1, 10, epoch)) for epoch in (0, 0, 1)]
    first, again, other = (np.concatenate([x for x, _ in epoch]) for epoch in epochs)
    assert all(len(x) == len(y) == 10 for epoch in epochs for x, y in epoch)
    np.testing.assert_array_equal(first, again)
    assert not (first == other).all()
    assert len(epochs[0]) == len(x) // 10
    assert len({tuple(row) for row in first.tolist()}) == len(np.unique(first, axis=0))
    for wrong in (-1, 5):
        with pytest.raises(UserError, match=r"there are tasks 0 to 4"):
            sequence.train_examples(wrong)
    with pytest.raises(UserError, match=f"batch_size: 999, but task 1 has {len(x)} training"):
        next(sequence.batches(1, 999))


def test_an_own_loop_learns_from_it():
    sequence = data.tasks((FLAT, np.array([f"digit {y}" for y in Y])), num_tasks=2)
    network = networks.from_linen(nn.Dense(sequence.num_classes), sequence.train_examples(0)[0][:1])
    learner = bpnjax.learner(
        network, methods.er(), optax.adam(1e-2), len(sequence), classes=sequence.classes
    )
    state = learner.init(jax.random.key(0))
    for task in range(len(sequence)):
        state = learner.begin_task(state, task)
        for epoch in range(20):
            for batch in sequence.batches(task, 16, epoch):
                state, _ = learner.step(state, batch)
        state = learner.end_task(state, sequence.train_examples(task))
    for task in range(len(sequence)):
        x, y = sequence.test_examples(task)
        assert (learner.apply(state, x, task).argmax(-1) == y).mean() > 0.7


def test_permuted_inputs_are_those_of_the_command():
    config = digits_config("sgd", sequence__kind="permuted", sequence__num_tasks=3)
    sequence = data.tasks("digits", kind="permuted", num_tasks=3)
    np.testing.assert_array_equal(sequence.train.index, load_sequence(config).train.index)
    plain = sequence.normalise(DIGITS.train_images)
    np.testing.assert_array_equal(sequence.train_examples(0)[0], plain)
    order = pixel_order(prng.fold(jax.random.key(4), prng.PIXELS), 2, 64, True)
    found, y = sequence.train_examples(2, seed=4)
    np.testing.assert_array_equal(found.reshape(-1, 64), plain.reshape(-1, 64)[:, order])
    np.testing.assert_array_equal(y, DIGITS.train_labels)


def test_a_source_for_each_task():
    halves = [(X[:150], Y[:150]), (255 - X[150:], Y[150:])]
    sequence = data.tasks(halves, [TEST, (255 - TEST[0], TEST[1])])
    assert (len(sequence), sequence.num_classes) == (2, 10)
    np.testing.assert_array_equal(sequence.train_examples(1)[1], Y[150:])
    x, _ = sequence.test_examples(1)
    np.testing.assert_array_equal(x, sequence.normalise(255 - TEST[0]))
    own = data.tasks([batches(*half) for half in halves], heads="multi")
    assert own.num_classes == 20 and own.heads == "multi"
    assert own.train_examples(1)[1].min() == 10
    mixed = data.tasks([Columns({"image": images(), "label": Y}), (X, Y + 5), "digits"])
    assert mixed.class_names == tuple(map(str, range(15)))  # as they come: earlier outputs first
    # Sets with a name of their own keep their classes apart, as in the command.
    assert data.tasks(["digits", "digits"]).num_classes == 20


def test_which_texts_are_paths(tmp_path, monkeypatch):
    """Names of TFDS have separators, too."""
    monkeypatch.chdir(tmp_path)
    for text in ("a.csv", "./digits", "~/photos", "/data/photos", "../a"):
        assert own._is_path(text), text
    for text in ("digits", "fgvc_aircraft/family", "cifar10:3.0.2"):
        assert not own._is_path(text), text
    (tmp_path / "my" / "photos").mkdir(parents=True)
    assert own._is_path("my/photos") and own._is_path(tmp_path)


def test_lists_are_arrays():
    expected = data.tasks((FLAT, Y), num_tasks=5)
    assert data.tasks([FLAT.tolist(), Y.tolist()], num_tasks=5).version == expected.version
    assert data.tasks((list(FLAT), list(Y)), num_tasks=5).version == expected.version


def test_labels_of_any_kind_become_names():
    def names(labels, **more):
        return data.tasks((FLAT[: len(labels)], labels), num_tasks=1, **more).class_names

    assert names(np.array([10, 9, -1] * 4)) == ("-1", "9", "10")
    assert names(np.array([True, False] * 4)) == ("False", "True")
    assert names(np.array([7, 300] * 4, np.uint16)) == ("7", "300")
    assert names(["b", "a10", "a9"] * 4) == ("a10", "a9", "b")
    assert names([3.0, 12.0] * 4) == ("3", "12")
    assert names(np.array([0, 1] * 4), class_names=("cat", "dog")) == ("cat", "dog")
    assert names(["dog", "cat"] * 4, class_names=("dog", "cat")) == ("dog", "cat")
    columns = Columns({"x": FLAT[:8].tolist(), "label": [1, 0] * 4}, names=["cat", "dog"])
    sequence = data.tasks(columns, classes=[["dog", "cat"]])
    assert sequence.class_names == ("dog", "cat")
    x, y = sequence.train_examples(0)
    assert (sequence.normalise(FLAT[0]) == x[0]).all() and y[0] == 0


def test_every_class_is_held_out_alike_in_every_run():
    for share in (0.1, 0.5):
        one, two = (data.tasks((FLAT, Y), num_tasks=5, test_share=share) for _ in range(2))
        np.testing.assert_array_equal(one.test.images, two.test.images)
        for split, part in ((one.test, share), (one.train, 1 - share)):
            counts = np.bincount(np.asarray(split.labels), minlength=10)
            np.testing.assert_allclose(counts, part * np.bincount(Y), atol=0.51)


def test_columns_are_normalised_each_by_itself():
    """To mean 0 and deviation 1, however far from 0 or small; a constant keeps its scale."""
    rng = np.random.default_rng(0)
    x = np.stack(
        [rng.normal(size=400), 1e-6 * rng.normal(size=400), 1e4 + rng.normal(size=400),
         np.full(400, 3.7), np.full(400, 1e9), 1e30 * rng.normal(size=400)], 1,
    )  # fmt: skip
    sequence = data.tasks((x, np.arange(400) % 2), num_tasks=1)
    found, _ = sequence.train_examples(0)
    varied = [0, 1, 2, 5]
    np.testing.assert_allclose(found[:, varied].mean(0), 0, atol=0.05)
    np.testing.assert_allclose(found[:, varied].std(0), 1, atol=0.05)
    np.testing.assert_allclose(found[:, [3, 4]], 0, atol=1e-6)
    assert sequence.scale[3] == sequence.scale[4] == 1
    grey = np.repeat(rng.integers(0, 255, (40, 4, 4, 1), np.uint8), 3, -1)
    grey[..., 2] = 200
    assert data.tasks((grey, np.arange(40) % 2), num_tasks=1).scale[2] == 1


def test_the_version_tells_data_apart():
    def version(x=FLAT, y=Y, test=None, **more):
        return data.tasks((x, y), test, num_tasks=5, **more).version

    changed = FLAT.copy()
    changed[-1, -1] += 1
    different = [
        version(), version(x=changed), version(y=np.roll(Y, 1)), version(x=FLAT.reshape(300, 8, 8)),
        version(class_names=[f"digit {i}" for i in range(10)]), version(test=(FLAT, Y)),
    ]  # fmt: skip
    assert len(set(different)) == len(different)
    assert version() == version(x=FLAT.astype(float)) == version(normalize="none")
    assert data.tasks("gaussians", num_tasks=1).version == "1"


def test_a_sequence_trains_as_the_command_does(tmp_path, compile_once):
    """What is handed over counts, whatever the configuration says of data."""
    config = digits_config("bd_ewc", train__epochs=2)
    expected = train_and_evaluate(config, tmp_path / "command")
    sequence = data.tasks("digits", num_tasks=3, classes_per_task=2)
    config.dataset.name, config.sequence.num_tasks = "cifar10", 7
    found = train_and_evaluate(config, tmp_path / "given", sequence=sequence)
    for kind in expected["accuracy"]:
        np.testing.assert_array_equal(found["accuracy"][kind], expected["accuracy"][kind])
    written = json.loads((tmp_path / "given" / "config.json").read_text())
    assert (written["dataset"]["name"], written["sequence"]["num_tasks"]) == ("given", 3)
    assert bpnjax.load(tmp_path / "given").num_tasks == 3
    (tmp_path / "given" / "result.json").unlink()
    x, y = 255 - DIGITS.train_images, DIGITS.train_labels
    with pytest.raises(UserError, match=r"another configuration .sequence.num_tasks: 3 -> 5"):
        other = data.tasks((x, y), num_tasks=5)
        train_and_evaluate(config, tmp_path / "given", sequence=other)
    same_tasks = data.tasks((x, y), classes=[[0, 1], [2, 3], [4, 5]])
    config.train.batch_size = 16
    with pytest.raises(UserError, match="another configuration"):
        train_and_evaluate(config, tmp_path / "given", sequence=same_tasks)
    config.train.batch_size = 48
    with pytest.raises(UserError, match=r"dataset.name: 'given' changed since the run in"):
        train_and_evaluate(config, tmp_path / "given", sequence=same_tasks)
    config.train.batch_size = 600
    with pytest.raises(UserError, match=r"train.batch_size: 600 is larger than task "):
        train_and_evaluate(config, tmp_path / "new", sequence=same_tasks)
    assert not (tmp_path / "new").exists()


def test_a_sequence_with_heads_and_a_table_is_trained(tmp_path, compile_once):
    """The layout of outputs is that of the sequence; features of a table fit the network."""
    sequence = data.tasks([(FLAT[:150], Y[:150]), (FLAT[150:], Y[150:])], heads="multi")
    config = digits_config("er", train__epochs=1)
    result = train_and_evaluate(config, tmp_path, sequence=sequence)
    assert result["config"]["sequence"]["heads"] == "multi"
    predictor = bpnjax.load(tmp_path)
    assert predictor.input_shape == (64,) and len(predictor.class_names) == 20


REFUSED = {
    "an array": (lambda: data.tasks(X, num_tasks=1), "source is ndarray; give .x, y., batches"),
    "an array for a task": (lambda: data.tasks([X, Y, X]), r"source\[0\] is ndarray; give"),
    "no tasks": (lambda: data.tasks([]), "the list is empty"),
    "how many": (lambda: data.tasks((X, Y)), "num_tasks: how do 10 classes become tasks"),
    "too many": (lambda: data.tasks((X, Y), num_tasks=11), "num_tasks: 11, and there are 10"),
    "both": (lambda: data.tasks((X, Y), num_tasks=4, classes_per_task=3),
             "4 tasks x 3 classes_per_task = 12 classes, but the source has 10"),
    "classes and more": (lambda: data.tasks((X, Y), classes=[[0]], num_tasks=1), "classes: says"),
    "no class": (lambda: data.tasks((X, Y), classes=[[0, 12]]), r"classes: \[0, 12\]: class 12 do"),
    "for a list": (lambda: data.tasks([(X, Y)], num_tasks=3), "num_tasks: is for one source"),
    "tests": (lambda: data.tasks([(X, Y)] * 2, [TEST]), "test: give a list of 2, as there are"),
    "kind": (lambda: data.tasks((X, Y), kind="shuffled"), "kind: 'shuffled' is not one of"),
    "heads": (lambda: data.tasks((X, Y), heads="two"), "heads: 'two' is not one of single"),
    "share": (lambda: data.tasks((X, Y), num_tasks=1, test_share=1.0), "test_share: 1.0 is not a"),
    "validation": (lambda: data.tasks((X, Y), num_tasks=1, on="validation"), "validation: 0 leav"),
    "permuted": (lambda: data.tasks((X, Y), kind="permuted"), "num_tasks: permuted inputs make"),
    "lengths": (lambda: data.tasks((X, Y[:-1]), num_tasks=1),
                "source: the training labels of source have the shape .299,. for 300 examples"),
    "test labels": (lambda: data.tasks((X, Y), (X, Y + 1), num_tasks=1),
                    "the test labels of source hold '10', which is not among the classes of the"),
    "NaN": (lambda: data.tasks((np.where(FLAT > 15, np.nan, FLAT), Y), num_tasks=1),
            r"the training examples of source hold NaN .* the first in row \d+, column \d+"),
    "one class": (lambda: data.tasks((X, Y * 0), num_tasks=1), "examples are of one class, '0'"),
    "one-hot": (lambda: data.tasks((X, np.eye(10)[Y]), num_tasks=1), "as one-hot rows have; give"),
    "none": (lambda: data.tasks((X, [None] * 300), num_tasks=1), "are missing in row 0; give one"),
    "ragged": (lambda: data.tasks(([[1], [1, 2]], [0, 1]), num_tasks=1), "differ in shape; give"),
    "words": (lambda: data.tasks((np.array([["a"]] * 4), [0, 1] * 2), num_tasks=1), "dtype <U1"),
    "read": (lambda: data.tasks(iter(()), num_tasks=1), "gives no batches; was it read before"),
    "batch": (lambda: data.tasks(iter([{"x": X}]), num_tasks=1), "gives dict, not batches .x, y."),
    "batch shapes": (lambda: data.tasks(iter([(X, Y), (FLAT, Y)]), num_tasks=1), "batches differ"),
    "column": (lambda: data.tasks(Columns({"x": [1.0], "y": [0]}), num_tasks=1),
               "label: source has no column 'label'; it has 'x', 'y'; name the column of labels"),
    "two images": (lambda: data.tasks(Columns({"a": images(), "b": images(), "label": Y})),
                   "has the columns 'a', 'b' of images or arrays; keep one"),
    "words in a column": (
        lambda: data.tasks(Columns({"a": ["u", "v"] * 4, "label": [0, 1] * 4}), num_tasks=1),
        "column 'a' is string, not numbers, as 'u' in row 1; .* by label='a'"),
    "sizes": (
        lambda: data.tasks(([Image.new("L", (8, i)) for i in (8, 9, 8, 8)], [0, 1] * 2)),
        r"differ in size .image 0 has 8 x 8 pixels, image 1 has 8 x 9 .* resize=\(32, 32, 1\)"),
    "unlabelled": (
        lambda: data.tasks(Columns({"image": images(), "label": Y * 0 - 1}, list("abc"))),
        "are -1 to -1 for 3 class_names; give class numbers from 0"),
    "names": (lambda: data.tasks((X, Y), class_names="abc"), "class_names: 'abc' is one text"),
    "resize": (lambda: data.tasks((X, Y), resize=(4, 4, 1)), "resize: .* not for arrays; resize"),
    "path": (lambda: data.tasks("./nowhere.npz", num_tasks=1), "source: './nowhere.npz' does not"),
    "set and more": (lambda: data.tasks("digits", TEST, num_tasks=1), "has its own parts and"),
    "keys": (lambda: data.tasks({"x": X, "y": Y}, num_tasks=1), "lacks train_x .it has x, y."),
    "no test": (lambda: data.tasks((X, Y), (X[Y < 5], Y[Y < 5]), num_tasks=5),
                "sequence.classes: task 4 .6, 7. has no test examples; add some, or choose"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_makes_no_sequence_is_refused_in_one_line(what):
    call, said = REFUSED[what]
    with pytest.raises(UserError, match=said) as error:
        call()
    assert "\n" not in str(error.value)
