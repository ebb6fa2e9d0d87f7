"""Arrays that a user hands over: what cannot be trained on is refused in one line that names it."""

import warnings

import numpy as np
import pytest
from command import contents, one_line
from support import digits_config, encoded, write_prepared

from bpnjax.data import Arrays, builtin_sets, load_sequence
from bpnjax.data.arrays import checked
from bpnjax.utils.errors import UserError


def good(**changes):
    """A set of four classes of 8x8 images, with some parts replaced."""
    rng = np.random.default_rng(0)
    parts = {}
    for split, n in (("train", 80), ("test", 40)):
        parts[f"{split}_images"] = rng.integers(0, 256, (n, 8, 8, 1), np.uint8)
        parts[f"{split}_labels"] = np.arange(n, dtype=np.int32) % 4
    names = ("top", "upper", "lower", "bottom")
    return Arrays(**parts | {"class_names": names, "maximum": 255.0, "version": "1"} | changes)


WHOLE = good()


def with_bad(images, value, row):
    found = images.astype(np.float32)
    found[row, 3, 3] = value
    return found


REFUSED = {
    "labels from 1": (
        {"train_labels": WHOLE.train_labels + 1},
        "the training labels of 'mine' are 1 to 4 for 4 class_names; count them from 0, as labels",
    ),
    "test labels from 1": (
        {"test_labels": WHOLE.test_labels + 1}, "the test labels of 'mine' are 1 to 4 for 4",
    ),
    "a label of -1": (
        {"test_labels": np.full(40, -1)},
        "the test labels of 'mine' are -1 to -1 for 4 class_names; give class numbers from 0",
    ),
    "labels beyond the names": (
        {"class_names": ("a", "b", "c")},
        "the training labels of 'mine' are 0 to 3 for 3 class_names; give class numbers from 0",
    ),
    "text": (
        {"train_labels": np.array(["cat", "dog"] * 40)},
        "the training labels of 'mine' are text or objects, as 'cat', 'dog'; give class",
    ),
    "bytes": ({"test_labels": np.array([b"cat"] * 40)}, "labels of 'mine' are text or objects"),
    "objects": (
        {"train_labels": np.array([None, "dog"] * 40, object)}, "or objects, as None, 'dog'; give",
    ),
    "one-hot": (
        {"train_labels": np.eye(4)[WHOLE.train_labels]},
        "training labels of 'mine' have the shape (80, 4), as one-hot rows have; give one class "
        "number each, as labels.argmax(1)",
    ),
    "a column": (
        {"train_labels": WHOLE.train_labels[:, None]}, "labels of 'mine' have the shape (80, 1)",
    ),
    "floats": (
        {"test_labels": WHOLE.test_labels.astype(float)},
        "the test labels of 'mine' are of dtype float64; give class numbers of dtype int32",
    ),
    "bools": ({"train_labels": WHOLE.train_labels > 1}, "are of dtype bool; give class numbers"),
    "fewer labels": (
        {"train_labels": WHOLE.train_labels[:-1]},
        "the training labels of 'mine' have the shape (79,) for 80 examples; give one class number",
    ),
    "more labels": (
        {"test_images": WHOLE.test_images[:-3]}, "have the shape (40,) for 37 examples",
    ),
    "no labels": ({"train_labels": np.zeros(0, np.int32)}, "have the shape (0,) for 80 examples"),
    "no images": (
        {"test_images": WHOLE.test_images[:0], "test_labels": WHOLE.test_labels[:0]},
        "the test images of 'mine' have the shape (0, 8, 8, 1)",
    ),
    "NaN": (
        {"train_images": with_bad(WHOLE.train_images, np.nan, 17)},
        "the training images of 'mine' hold NaN or infinite numbers, the first in row 17; fix the "
        "data",
    ),
    "infinite": (
        {"train_images": WHOLE.train_images.astype(np.float32),
         "test_images": with_bad(WHOLE.test_images, -np.inf, 39)},
        "the test images of 'mine' hold NaN or infinite numbers, the first in row 39",
    ),
    "NaN far behind": (
        {"train_images": with_bad(np.zeros((2500, 8, 8, 1)), np.nan, 2400),
         "train_labels": np.arange(2500) % 4},
        "hold NaN or infinite numbers, the first in row 2400",
    ),
    "image objects": (
        {"train_images": WHOLE.train_images.astype(object)}, "images of 'mine' are of dtype object",
    ),
    "complex images": ({"test_images": WHOLE.test_images * 1j}, "are of dtype complex128"),
    "numbers only": (
        {"train_images": np.arange(80.0)}, "examples of 'mine' have the shape (80,); give [n, hei",
    ),
    "test images of another dtype": (
        {"test_images": WHOLE.test_images / 255},
        "the training images of 'mine' have the dtype uint8, its test images float64; give both",
    ),
    "test images of another shape": (
        {"test_images": WHOLE.test_images[:, :4]},
        "the training images of 'mine' have the shape (8, 8, 1), its test images (4, 8, 1)",
    ),
    "names that are one text": ({"class_names": "abcd"}, "class_names of 'mine' are 'abcd'; give"),
    "names that are numbers": ({"class_names": (0, 1, 2, 3)}, "class_names of 'mine' are (0, 1"),
    "no names": ({"class_names": ()}, "class_names of 'mine' are (); give the name of each class"),
}  # fmt: skip


@pytest.fixture
def mine(monkeypatch):
    """The set ``mine`` of the command, as a function of what is replaced in it."""

    def put(**changes):
        sets = dict(builtin_sets.SETS) | {"mine": lambda: good(**changes)}
        monkeypatch.setattr(builtin_sets, "SETS", sets)

    return put


def config(**changes):
    return digits_config(
        "sgd", dataset__name="mine", sequence__num_tasks=2, train__batch_size=16, **changes
    )


@pytest.mark.parametrize(("changes", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_trained_on_is_refused(mine, changes, said):
    mine(**changes)
    with pytest.raises(UserError) as error:
        load_sequence(config())
    message = str(error.value)
    assert message.startswith("dataset.name: ") and "\n" not in message
    assert said in message, message
    assert "learning_rate" not in message


@pytest.mark.parametrize("what", ["labels from 1", "text", "one-hot", "fewer labels", "NaN"])
def test_the_command_says_so_and_writes_nothing(run, mine, tmp_path, what):
    """And never asks for another learning rate."""
    changes, said = REFUSED[what]
    mine(**changes)
    file = tmp_path / "mine.py"
    file.write_text(
        "from bpnjax.config import default\n\ndef get_config():\n    c = default()\n"
        "    c.dataset.name = 'mine'\n    c.sequence.num_tasks = 2\n    c.train.batch_size = 16\n"
        "    return c\n"
    )
    before = contents(tmp_path)
    for more in ([], ["--dry_run"]):
        code, out, err = run([f"--config={file}", "--workdir=run", *more])
        assert (code, out) == (2, "")
        one_line(err, "dataset.name: ", said)
        assert "learning_rate" not in err
    assert contents(tmp_path) == before


def test_what_is_no_arrays_is_refused(monkeypatch):
    for wrong in (tuple(WHOLE), None, {"images": WHOLE.train_images}):
        sets = {"mine": lambda wrong=wrong: wrong}
        monkeypatch.setattr(builtin_sets, "SETS", sets)
        with pytest.raises(UserError, match=r"'mine' gives \w+; return bpnjax.data.Arrays"):
            load_sequence(config())


@pytest.mark.parametrize("labels", [np.uint8, np.int64, list])
def test_labels_of_any_integers_are_class_numbers(mine, labels):
    """Small unsigned ones too, with which indices would wrap around."""
    reference = load_arrays(mine)
    convert = list if labels is list else (lambda a: a.astype(labels))
    found = load_arrays(
        mine,
        train_labels=convert(WHOLE.train_labels),
        test_labels=convert(WHOLE.test_labels),
        class_names=["top", "upper", "lower", "bottom"],
    )
    for split in ("train", "test"):
        one, other = getattr(found, split), getattr(reference, split)
        assert one.labels.dtype == np.int32
        np.testing.assert_array_equal(one.labels, other.labels)
        np.testing.assert_array_equal(one.index, other.index)
    assert found.class_names == reference.class_names


def load_arrays(mine, **changes):
    mine(**changes)
    return load_sequence(config())


def test_what_is_mapped_into_memory_stays_there(tmp_path):
    np.save(tmp_path / "images.npy", WHOLE.train_images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    assert checked(good(train_images=mapped), "mine").train_images is mapped


def test_another_scale_of_the_test_images_is_warned_of(mine):
    mine(test_images=(WHOLE.test_images / 255).astype(np.uint8))
    with pytest.warns(UserWarning, match=r"of 'mine' lie between 0 and 255, its test images betwe"):
        load_sequence(config())
    mine(test_images=WHOLE.test_images // 2)  # darker ones may be right
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_sequence(config())


def test_a_shape_that_is_not_that_of_the_set_is_refused(mine):
    """It was ignored, and written into the configuration all the same."""
    mine()
    with pytest.raises(UserError, match=r"dataset.resize: \(4, 4, 1\) is for sets of TFDS, and mi"):
        load_sequence(config(dataset__resize=(4, 4, 1)))
    assert load_sequence(config(dataset__resize=(8, 8, 1))).train.images.shape == (80, 8, 8, 1)


def test_unlabelled_test_images_of_a_prepared_set_are_refused(tmp_path):
    """TFDS gives -1 where a split has no labels; it would count as the last class."""
    rng = np.random.default_rng(0)

    def rows(labels):
        return [(encoded(rng.integers(0, 256, (8, 8, 3), np.uint8)), label) for label in labels]

    splits = {"train": rows([0, 1] * 10), "test": rows([-1] * 6)}
    write_prepared(tmp_path, "unlabelled", splits, classes=2)
    settings = digits_config(
        "sgd", dataset__name="unlabelled", dataset__data_dir=str(tmp_path), sequence__num_tasks=1,
        train__batch_size=8, dataset__cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"the test labels of 'unlabelled' are -1 to -1 for 2 clas"):
        load_sequence(settings)
