"""Own data in files: what the command trains on by ``dataset.path``, and what it refuses."""

import csv
import json
import os
import pathlib
import shutil

import numpy as np
import pytest
from command import one_line
from PIL import Image
from support import digits_config

from bpnjax.data import builtin_sets, load_sequence, tasks
from bpnjax.data.files import paths_in
from bpnjax.utils.errors import UserError

DIGITS = builtin_sets.digits()
X, Y = DIGITS.train_images[:600] * 15, DIGITS.train_labels[:600]
TEST_X, TEST_Y = DIGITS.test_images[:200] * 15, DIGITS.test_labels[:200]
TINY = (
    "--config.sequence.num_tasks=2", "--config.model.hidden=(16,)", "--config.train.epochs=6",
    "--config.train.batch_size=32", "--config.train.learning_rate=1e-2", "--config.name=own",
    "--config.bd.hidden_dim=8",
)  # fmt: skip


def write_folder(root, x, y, names=str, suffix=".png"):
    """``root/CLASS/NUMBER.png`` for each image."""
    for i, (image, label) in enumerate(zip(x, y, strict=True)):
        folder = root / names(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze()).save(folder / f"{i:04d}{suffix}")
    return root


def write_table(path, columns):
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))
    else:
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.table(columns), path)
    return path


def pixels(x):
    return {f"p{i}": column.tolist() for i, column in enumerate(x.reshape(len(x), -1).T)}


def own_config(path, **changes):
    settings = {"sequence__num_tasks": 2, "train__batch_size": 2} | changes
    return digits_config("sgd", dataset__path=str(path), **settings)


def make(kind, folder):
    """Digits as a source of one kind; returns its path and the flags that it needs."""
    if kind == "folder":
        write_folder(folder / "set" / "train", X, Y)
        write_folder(folder / "set" / "test", TEST_X, TEST_Y)
        return folder / "set", []
    if kind == "npz":
        np.savez(folder / "set.npz", train_x=X, train_y=Y, test_x=TEST_X, test_y=TEST_Y)
        return folder / "set.npz", []
    columns = pixels(X) | {"digit": Y.tolist()}
    return write_table(folder / f"set.{kind}", columns), ["--config.dataset.label=digit"]


@pytest.mark.parametrize("method", ["bd_ewc", "er"])
@pytest.mark.parametrize("kind", ["folder", "npz", "csv", "parquet"])
def test_the_command_trains_on_it(run, tmp_path, compile_once, kind, method):
    path, flags = make(kind, tmp_path)
    where = [f"--config.dataset.path={path.name}", f"--config.method={method}", *flags]
    code, _, err = run(["--config=digits", *where, *TINY, "--workdir=run"])
    assert code == 0, err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["class_names"] == [["0", "1"], ["2", "3"]]
    assert result["config"]["dataset"]["path"] == path.name
    assert len(result["data_version"]) == 16
    assert result["summary"]["task_masked"]["average_accuracy"]["mean"] > 0.85
    assert path.name in err.splitlines()[0]


def test_the_same_data_from_anywhere_is_the_same_sequence(tmp_path):
    """A folder, an archive, arrays: equal to the last bit, by names that sort as numbers."""
    rows = np.argsort(Y, kind="stable")  # the order of folders
    x, labels = X[rows], Y[rows] + 5  # "10" is behind "9"
    write_folder(tmp_path / "folder", x, labels)
    np.savez(tmp_path / "set.npz", train_x=x, train_y=labels.astype(str))
    found = [
        load_sequence(own_config(tmp_path / name, sequence__num_tasks=5, dataset__validation=0.1))
        for name in ("folder", "set.npz")
    ]
    options = dict(num_tasks=5, validation=0.1)
    found += [tasks(tmp_path / name, **options) for name in ("folder", "set.npz")]
    found += [tasks((x, labels), **options), tasks((x[..., 0], labels.tolist()), **options)]
    first, *others = found
    assert first.class_names == tuple(map(str, range(5, 15)))
    for other in others:
        assert other.class_names == first.class_names and other.version == first.version
        for one, two in zip(_leaves(first), _leaves(other), strict=True):
            assert one.dtype == two.dtype
            np.testing.assert_array_equal(one, two)


def _leaves(sequence):
    splits = [getattr(s, n) for s in (sequence.train, sequence.test)
              for n in ("images", "labels", "index", "count")]  # fmt: skip
    others = [getattr(sequence, n) for n in ("classes", "scale", "shift", "columns")]
    return [np.asarray(leaf) for leaf in splits + others]


def test_a_table_is_the_same_as_its_arrays(tmp_path):
    columns = pixels(X) | {"label": [f"digit {y}" for y in Y]}
    names = np.array(columns["label"])
    expected = tasks((X.reshape(600, -1).astype(float), names), num_tasks=5)
    for suffix in (".csv", ".parquet"):
        found = tasks(write_table(tmp_path / f"set{suffix}", columns), num_tasks=5)
        assert found.version == expected.version
        assert found.names_of(0) == ("digit 0", "digit 1")
        np.testing.assert_array_equal(found.scale, expected.scale)
        # No more than the memory of what never changes: those columns stay as they are.
        x, _ = found.train_examples(0)
        assert np.abs(x).max() < 60 and x.shape[1:] == (64,)
    constant = X.reshape(600, -1).std(0) == 0
    assert constant.any() and (expected.scale[constant] == 1).all()


def test_a_column_that_says_train_or_test(tmp_path):
    columns = {
        "a": [float(i) for i in range(12)], "split": ["train"] * 8 + ["test"] * 4,
        "label": ["u", "v"] * 6,
    }  # fmt: skip
    sequence = tasks(write_table(tmp_path / "t.csv", columns), num_tasks=1)
    assert np.asarray(sequence.train.images).ravel().tolist() == list(range(8))
    assert np.asarray(sequence.test.images).ravel().tolist() == list(range(8, 12))


def test_several_paths_are_a_task_each(tmp_path):
    """Classes of equal name are the same output; with a head per task they are not."""
    for name, rows in (("a", slice(0, 200)), ("b", slice(200, 400))):
        write_folder(tmp_path / name, X[rows][Y[rows] < 3], Y[rows][Y[rows] < 3])
    write_folder(tmp_path / "c", X[400:][Y[400:] > 1], Y[400:][Y[400:] > 1])
    paths = ", ".join(str(tmp_path / name) for name in "abc")
    sequence = load_sequence(own_config(paths))
    assert sequence.class_names == tuple("0123456789")
    assert sequence.names_of(1) == tuple("012") and sequence.names_of(2) == tuple("23456789")
    for task, label in ((0, 2), (1, 2), (2, 2)):
        x, y = sequence.train_examples(task)
        assert (y == label).any() and len(x) == sequence.train.count[task]
    # No task sees the examples of another, though they share outputs.
    index = [set(sequence.train.index[t, : sequence.train.count[t]].tolist()) for t in range(3)]
    assert not index[0] & index[1] and not index[1] & index[2]
    own = load_sequence(own_config(paths, sequence__heads="multi"))
    assert own.num_classes == 3 + 3 + 8 and not (own.classes.sum(0) > 1).any()


def test_classes_are_spelled_by_name_or_number(tmp_path):
    write_folder(tmp_path, X[:100], Y[:100], names=lambda y: ["cat", "dog", "fish"][y % 3])
    by_name = load_sequence(own_config(tmp_path, sequence__classes="fish,cat;dog"))
    by_number = load_sequence(own_config(tmp_path, sequence__classes="2,0;1"))
    assert by_name.class_names == by_number.class_names == ("fish", "cat", "dog")
    with pytest.raises(UserError, match=r"class bird does not exist; the classes are cat, dog, f"):
        load_sequence(own_config(tmp_path, sequence__classes="cat,bird;dog"))


def test_colours_sizes_and_suffixes(tmp_path):
    """Grey images have one channel, a coloured one among them gives all three."""
    write_folder(tmp_path, X[:40], Y[:40] % 2, suffix=".PNG")
    (tmp_path / "0" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "0" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / ".hidden").mkdir()
    assert tasks(tmp_path, num_tasks=1).train.images.shape == (32, 8, 8, 1)
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "0" / "red.jpeg")
    assert tasks(tmp_path, num_tasks=1).train.images.shape[1:] == (8, 8, 3)
    Image.new("L", (9, 7)).save(tmp_path / "1" / "large.png")
    with pytest.raises(UserError, match=r"differ in size .*0000.PNG has 8 x 8 pixels, .*large.png "
                                        r"has 9 x 7 .* as resize=\(32, 32, 3\)"):  # fmt: skip
        tasks(tmp_path, num_tasks=1)
    assert tasks(tmp_path, num_tasks=1, resize=(4, 5, 3)).train.images.shape[1:] == (4, 5, 3)


def test_a_folder_is_decoded_once_and_again_when_it_changes(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "set", X[:40], Y[:40] % 2)
    settings = own_config(root, sequence__num_tasks=1, dataset__cache_dir=str(tmp_path / "cache"))
    first = load_sequence(settings)
    assert isinstance(first.train.images, np.memmap)
    os.utime(root / "0")  # of the folder, not of a file
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", None)
        assert load_sequence(settings).version == first.version
    file = sorted((root / "1").iterdir())[0]
    os.utime(file, (1, 1))
    assert load_sequence(settings).version == first.version  # other times, the same content
    Image.fromarray(255 - X[0, ..., 0]).save(file)
    assert load_sequence(settings).version != first.version


def test_crops_of_a_folder(run, tmp_path, compile_once):
    """Images of any size, decoded as they are needed; the version is that of whole files."""
    rng = np.random.default_rng(0)
    for i in range(48):
        folder = tmp_path / "set" / ("dark", "light")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        image = rng.integers(0, 100, (20, 12 + i % 5, 3), np.uint8) + np.uint8(100 * (i % 2))
        Image.fromarray(image).save(folder / f"{i}.png")
    flags = [
        "--config=digits", "--config.dataset.path=set", "--config.dataset.augment=crop_flip",
        "--config.dataset.resize=(8, 8, 3)", "--config.dataset.resize_shorter=10", *TINY,
        "--config.sequence.num_tasks=1", "--config.train.batch_size=16", "--config.method=bd_ewc",
    ]  # fmt: skip
    code, _, err = run([*flags, "--workdir=run"])
    assert code == 0, err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["accuracy"]["task_told"][0][0][0] > 0.9
    settings = own_config(
        "set", sequence__num_tasks=1, dataset__augment="crop_flip", dataset__resize=(8, 8, 3),
        dataset__resize_shorter=10,
    )  # fmt: skip
    assert load_sequence(settings).version == result["data_version"]
    file = tmp_path / "set" / "dark" / "0.png"
    image = Image.open(file)
    image.putpixel((0, 0), (1, 2, 3))  # in the corner
    image.save(file)
    assert load_sequence(settings).version != result["data_version"]
    file.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"1 image cannot be read: set/dark/0.png \(cannot identi"):
        load_sequence(settings)


def test_a_run_does_not_go_on_with_other_data(run, tmp_path, compile_once):
    path, _ = make("npz", tmp_path)
    flags = ["--config=digits", f"--config.dataset.path={path.name}", "--config.method=sgd", *TINY]
    assert run([*flags, "--workdir=run"])[0] == 0
    result = tmp_path / "run" / "result.json"
    was = result.read_text()
    result.unlink()
    np.savez_compressed(path, train_x=X, train_y=Y, test_x=TEST_X, test_y=TEST_Y)
    assert run([*flags, "--workdir=run"])[0] == 0  # written anew, the same content
    assert json.loads(result.read_text())["data_version"] == json.loads(was)["data_version"]
    np.savez(path, train_x=X, train_y=Y, test_x=TEST_X[::-1], test_y=TEST_Y[::-1])
    code, _, err = run([*flags, "--workdir=run", "--config.num_seeds=2"])
    assert code == 2 and "changed since the run in run began" in err
    result.unlink()
    before = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    code, _, err = run([*flags, "--workdir=run"])
    assert code == 2
    one_line(err.splitlines(keepends=True)[-1], "dataset.path: 'set.npz' changed", "--overwrite")
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == before
    assert run([*flags, "--workdir=run", "--overwrite"])[0] == 0


def test_later_tasks_may_come_from_further_files(run, tmp_path, compile_once):
    for name, classes in (("a", (0, 1)), ("b", (2, 3))):
        rows = np.isin(Y, classes)
        np.savez(tmp_path / f"{name}.npz", train_x=X[rows], train_y=Y[rows])
    base = ["--config=digits", "--config.method=bd_ewc", *TINY]
    one = ["--config.dataset.path=a.npz", "--config.sequence.num_tasks=1"]
    assert run([*base, *one, "--workdir=one"])[0] == 0
    more = ["--config.dataset.path=a.npz,b.npz", "--resume_from=one", "--workdir=two"]
    code, out, err = run([*base, *more])
    assert code == 0, err
    assert "0, 1" in out and "2, 3" in out
    code, _, err = run([*base, "--config.dataset.path=b.npz,a.npz", *more[1:2], "--workdir=three"])
    assert code == 2 and "dataset.path: 'a.npz' -> 'b.npz,a.npz'" in err


def square(folder, name="x.png", size=(8, 8), mode="L"):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(folder / name)


def good_folder(root):
    for name in "ab":
        for i in range(5):
            square(root / name, f"{i}.png")


def damaged(root):
    good_folder(root)
    file = root / "b" / "3.png"
    file.write_bytes(file.read_bytes()[:40])


def other_file(root):
    good_folder(root)
    (root / "a" / "notes.txt").write_text("x")


def deeper(root):
    good_folder(root)
    square(root / "a" / "more")


def no_test_class(root):
    good_folder(root / "train")
    good_folder(root / "test")
    square(root / "test" / "c")


def beside(root):
    good_folder(root / "train")
    good_folder(root / "val")


FOLDERS = {
    "empty": (lambda root: root.mkdir(), "holds no folders of images; give train/CLASS/FILE.png"),
    "no images": (lambda root: (root / "a").mkdir(parents=True), "/a holds no images; remove it"),
    "one class": (lambda root: [square(root / "a", f"{i}.png") for i in range(9)],
                  "all examples are of one class, 'a'; give at least two"),
    "images above": (lambda root: square(root), "has images beside its folders, as x.png; put"),
    "another file": (other_file, "/a/notes.txt in a class folder is a file that is not one"),
    "a folder deeper": (deeper, "/a/more in a class folder is a folder; keep only images"),
    "damaged": (damaged, "1 image cannot be read: "),
    "sizes": (lambda root: [good_folder(root), square(root / "a", size=(9, 8))],
              "differ in size ", "has 9 x 8 pixels", "--config.dataset.resize='(32, 32, 1)'"),
    "16 bits": (lambda root: [good_folder(root), square(root / "b", mode="I;16")],
                "/b/x.png has pixels of more than 8 bits"),
    "too few": (lambda root: [good_folder(root), square(root / "c")],
                "class 'c' has 1 example, of which test_share=0.2 leaves none to train on"),
    "class only in test": (no_test_class, "has the class 'c' in 'test' and not in 'train'"),
    "val for test": (beside, "has the folder 'val' beside 'train' or 'test'"),
    "test only": (lambda root: good_folder(root / "test"), "has 'test' but no 'train'"),
}  # fmt: skip


@pytest.mark.parametrize("what", FOLDERS)
def test_folders_that_cannot_be_trained_on(refused, tmp_path, what):
    write, *words = FOLDERS[what]
    write(tmp_path / "set")
    refused(
        ["--config=digits", "--config.dataset.path=set", *TINY, "--config.train.batch_size=1"],
        "dataset.path: 'set'" if what != "one class" else "dataset.path: ", *words,
    )  # fmt: skip


class Runs:
    """Would be run by a pickle that is loaded."""

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("was_run"),)


GOOD = {"train_x": X[:50], "train_y": Y[:50]}
ARCHIVES = {
    "objects": ({"train_x": X[:50], "train_y": np.array([Runs()] * 50)}, "holds Python objects"),
    "keys": ({"x": X, "y": Y}, "lacks train_x (it has x, y); name the arrays train_x, train_y"),
    "half a test": (GOOD | {"test_x": X[:5]}, "lacks test_y (it has test_x, train_x, train_y)"),
    "lengths": (GOOD | {"train_y": Y[:49]}, "have the shape (49,) for 50 examples"),
    "NaN": (
        GOOD | {"train_x": np.where(np.arange(150).reshape(50, 3) == 100, np.nan, 1.0)},
        "the training examples of 'set.npz' hold NaN or infinite numbers, the first in row 33, "
        "column 1",
    ),
    "too large": (GOOD | {"train_x": np.full((50, 3), 1e300)}, "NaN or infinite numbers"),
    "text": (GOOD | {"train_x": np.array([["a"]] * 50)}, "are of dtype <U1; give numbers"),
    "labels": (GOOD | {"train_y": Y[:50] + 0.5}, "the one in row 0 is not a whole number"),
    "missing label": (GOOD | {"train_y": np.where(Y[:50] == 3, np.nan, Y[:50])}, "is missing"),
    "one-hot": (GOOD | {"train_y": np.eye(10)[Y[:50]]}, "as one-hot rows have; give one label"),
    "empty label": (GOOD | {"train_y": np.array(["a", ""] * 25)}, "are empty in row 1"),
    "unknown class": (
        GOOD | {"test_x": X[:2], "test_y": np.array([3, 77])},
        "the test labels of 'set.npz' hold '77', which is not among the classes",
    ),
    "dtypes": (GOOD | {"test_x": X[:50] / 255, "test_y": Y[:50]}, "the dtype uint8, its test"),
    "one class": (GOOD | {"train_y": np.zeros(50, int)}, "all examples are of one class, '0'"),
}


@pytest.mark.parametrize("what", ARCHIVES)
def test_archives_that_cannot_be_trained_on(refused, tmp_path, what):
    arrays, said = ARCHIVES[what]
    np.savez(tmp_path / "set.npz", **arrays)
    refused(["--config=digits", "--config.dataset.path=set.npz", *TINY], "dataset.path: ", said)
    assert not (tmp_path / "was_run").exists()


def columns(**changes):
    n = 20
    return {
        "a": [float(i) for i in range(n)], "b": [i % 7 for i in range(n)], "label": ["u", "v"] * 10
    } | changes  # fmt: skip


def replaced(value, row, like=float):
    values = [like(i) for i in range(20)]
    values[row] = value
    return values


TABLE = {
    "missing": (columns(a=replaced(None, 4)), "column 'a' has no value in row 5 (1 such"),
    "missing label": (columns(label=replaced(None, 2, str)), "column 'label' has no value in ro"),
    "text": (columns(b=replaced("?", 6, str)), "column 'b' is string, not numbers, as '?' in"),
    "infinite": (columns(a=replaced(float("inf"), 9)), "column 'a' is inf in row 10; fix it"),
    "label": (
        {"x": [1.0] * 20, "species": ["u", "v"] * 10},
        "has no column 'label'; it has 'x', 'species'; name the column of labels, as "
        "--config.dataset.label='species'",
    ),
    "real labels": (columns(label=[i / 2 for i in range(20)]), "column 'label' is 0.5 in row 2"),
    "index": (columns(**{"": list(range(20))}), "column 4 has no name, as an index of pandas"),
    "no numbers": ({"label": ["u", "v"] * 10}, "has no columns but 'label'"),
    "split": (columns(split=["train", "valid"] * 10), "column 'split' holds 'valid'; write train"),
    "split all": (columns(split=["train"] * 20), "column 'split' says test nowhere; leave it out"),
    "too few": (columns(label=["u", "v"] * 9 + ["w", "u"]), "class 'w' has 1 example, of which"),
}


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("what", TABLE)
def test_tables_that_cannot_be_trained_on(tmp_path, monkeypatch, what, suffix):
    monkeypatch.chdir(tmp_path)
    found, said = TABLE[what]
    write_table(pathlib.Path(f"set{suffix}"), found)
    with pytest.raises(UserError) as error:
        load_sequence(own_config(f"set{suffix}", sequence__num_tasks=1))
    message = str(error.value)
    assert message.startswith("dataset.") and "\n" not in message
    assert said in message
    assert f"set{suffix}" in message


def test_files_that_are_no_tables_or_archives(refused, tmp_path):
    (tmp_path / "set.csv").write_text("a,b,label\n1,2,u\n1,v\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "header.csv").write_text("a,label\n")
    (tmp_path / "semicolon.csv").write_text("a;label\n1;2\n")
    (tmp_path / "twice.csv").write_text("a,a,label\n1,2,u\n")
    for name in ("set.parquet", "set.npz", "notes.txt"):
        (tmp_path / name).write_bytes(b"nothing of that kind")
    np.savez(tmp_path / "cut.npz", train_x=X, train_y=Y)
    with (tmp_path / "cut.npz").open("r+b") as file:
        file.seek(500)
        file.write(b"\0" * 500)
    np.save(tmp_path / "array.npy", X[:3])
    shutil.move(tmp_path / "array.npy", tmp_path / "array.npz")
    for name, said in {
        "set.csv": "cannot be read (CSV parse error: Expected 3 columns, got 2: 1,v)",
        "empty.csv": "cannot be read (Empty CSV file",
        "header.csv": "has no rows; add some",
        "semicolon.csv": "it has 'a;label' (separate columns by commas)",
        "twice.csv": "has the column 'a' twice",
        "set.parquet": "cannot be read (",
        "set.npz": "is not an archive of NumPy; write it by np.savez",
        "cut.npz": "cannot be read (",
        "array.npz": "is not an archive of NumPy; write it by np.savez",
        "notes.txt": "is of no kind that can be read; name a folder of images, or a file ending",
        "none.csv": "does not exist; name a folder",
    }.items():
        refused(["--config=digits", f"--config.dataset.path={name}", *TINY], f"'{name}'", said)


def test_settings_that_do_not_go_together(tmp_path):
    for name, x in (("a", X), ("b", X[:, :4]), ("c", X / 255)):
        np.savez(tmp_path / f"{name}.npz", train_x=x, train_y=Y)
    one, other, floats = (str(tmp_path / f"{name}.npz") for name in "abc")
    write_table(tmp_path / "a.csv", columns())
    write_table(tmp_path / "b.csv", columns(c=[1] * 20))
    tables = f"{tmp_path / 'a.csv'},{tmp_path / 'b.csv'}"
    for path, changes, said in (
        (one, {"dataset__resize": (4, 4, 1)}, r"dataset.resize: \(4, 4, 1\) is for folders of im"),
        (one, {"dataset__augment": "crop_flip", "dataset__resize": (4, 4, 1)}, "dataset.augment"),
        (one, {"dataset__train_split": "train+test"}, "dataset.train_split: .* not for dataset.p"),
        (one, {"sequence__kind": "datasets"}, "names 1 set; sequence.kind 'datasets' needs"),
        (f"{one},{one}", {"sequence__kind": "permuted"}, "sequence.kind: 'permuted' is for one"),
        (f"{one},{one}", {"sequence__classes": "0;1"}, "sequence.classes: '0;1' is for one source"),
        (f"{one},{other}", {}, r"the sets differ in shape .*a.npz: \(8, 8, 1\), .*: \(4, 8, 1\)"),
        (f"{one},{floats}", {}, r"the sets differ in dtype .*a.npz: uint8, .*c.npz: float32\)"),
        (tables, {}, "and the first table differ in the column 'c'; give all the same"),
        (one, {"sequence__num_tasks": 20}, "sequence.num_tasks: 20 tasks x 2 .*a.npz has 10"),
    ):
        with pytest.raises(UserError, match=said):
            load_sequence(own_config(path, **changes))
    with pytest.raises(UserError, match=r"dataset.test_share: 0"):
        own_config(one, dataset__test_share=0.0)
    swapped = {name: columns()[name] for name in ("b", "label", "a")}
    write_table(tmp_path / "b.csv", swapped)
    first, second = (tasks(path, num_tasks=1) for path in tables.split(","))
    both = load_sequence(own_config(tables))
    rows = np.asarray(both.train.images[np.arange(len(both.train.images))])
    np.testing.assert_array_equal(rows[:16], first.train.images)
    np.testing.assert_array_equal(rows[16:], np.asarray(second.train.images)[:, ::-1])


def test_commas_in_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert paths_in("a,b") == ["a", "b"]
    pathlib.Path("a,b").mkdir()
    assert paths_in("a,b") == ["a,b"]
