"""Images of mixed sizes, cropped and mirrored at random to train, from the middle to test."""

import shutil
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from support import encoded, write_prepared

from bpnjax import config as configuration
from bpnjax.data import crops, load_sequence
from bpnjax.data.crops import Draws, Look
from bpnjax.run import plots, results, train
from bpnjax.training import epochs
from bpnjax.utils import errors

pytest.importorskip("grain", reason="grain is not installed")
pytestmark = pytest.mark.usefixtures("compile_once")
LOOK = Look(12, (8, 10, 3))
SIZES = [(12, 16), (24, 18), (30, 47), (13, 12), (9, 40), (64, 48)]  # (height, width)


def noise(rng, height, width):
    return rng.integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A prepared set of three classes, JPEGs of mixed sizes, 5 + 3 to train and 3 to test each."""
    root, rng = tmp_path_factory.mktemp("prepared"), np.random.default_rng(0)

    def rows(number):
        sizes = [SIZES[i % len(SIZES)] for i in range(3 * number)]
        return [(encoded(noise(rng, *size), "JPEG"), i % 3) for i, size in enumerate(sizes)]

    write_prepared(
        root, "mixed", {"train": rows(5), "validation": rows(3), "test": rows(3)}, classes=3
    )
    return root


@pytest.fixture
def config(mixed):
    c = configuration.default()
    c.update_from_flattened_dict(
        {
            "name": "mixed", "method": "sgd", "dataset.name": "mixed",
            "dataset.data_dir": str(mixed), "dataset.resize": LOOK.shape,
            "dataset.augment": "crop_flip", "dataset.resize_shorter": LOOK.shorter,
            "sequence.num_tasks": 3, "sequence.classes_per_task": 1, "model.hidden": (6,),
            "train.batch_size": 2, "train.epochs": 2,
        }
    )  # fmt: skip
    return c


def source(root, split):
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(root / "mixed" / "3.0.0").as_data_source(split)


def enlarged(image):
    """By hand: 12 pixels the shorter side, the other one in proportion, rounded down."""
    height, width, _ = image.shape
    size = (12 * width // height, 12) if height < width else (12, 12 * height // width)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))


def test_the_shorter_side_is_resized():
    rng = np.random.default_rng(1)
    for height, width in SIZES:
        image = noise(rng, height, width)
        found = crops.resized(encoded(image), LOOK)
        np.testing.assert_array_equal(found, enlarged(image))
        assert min(found.shape[:2]) == 12
    grey = np.asarray(Image.fromarray(image).convert("L").resize((12, 16), 2))
    found = crops.resized(encoded(image), Look(12, (8, 8, 1)))
    np.testing.assert_array_equal(found, grey[..., None])


def test_random_crops_are_every_part_and_both_ways():
    """Of 4 x 3 places and two directions each as often; nothing else."""
    image = np.arange(11 * 12 * 3).reshape(11, 12, 3)
    wanted = {}
    for top in range(4):
        for left in range(3):
            part = np.stack([row[left : left + 10] for row in image[top : top + 8]])
            wanted[part.tobytes()] = wanted[part[:, ::-1].tobytes()] = 0
    assert len(wanted) == 24
    rng = np.random.default_rng(0)
    for _ in range(2400):
        wanted[np.ascontiguousarray(crops.random_crop(image, (8, 10, 3), rng)).tobytes()] += 1
    assert len(wanted) == 24 and min(wanted.values()) > 60 and max(wanted.values()) < 140


def test_an_example_of_an_epoch_has_a_crop_of_its_own():
    def drawn(seed=0, task=1, epoch=2, places=6, place=3):
        return crops.random_numbers(Draws(seed, task, epoch, places), place).integers(1 << 40)

    others = [drawn(seed=1), drawn(task=2), drawn(epoch=3), drawn(place=4)]
    assert len({drawn(), *others}) == 5
    assert drawn(epoch=1, place=9) == drawn()  # the place 3 of the next epoch


@pytest.mark.parametrize("split", ["train", "test"])
def test_what_is_stored_are_the_middles(config, mixed, split):
    stored = getattr(load_sequence(config), split)
    examples = list(source(mixed, split))
    assert len(examples) == len(stored.images)
    for example, found, label in zip(examples, stored.images, stored.labels, strict=True):
        large = enlarged(example["image"])
        top, left = round((len(large) - 8) / 2), round((large.shape[1] - 10) / 2)
        np.testing.assert_array_equal(found, large[top : top + 8, left : left + 10])
        assert example["label"] == label


def fed(config, workers=0, start=(0, 0), task=1):
    """The batches that training of a task gets, from some epoch and step on."""
    config.dataset.workers = workers
    config.dataset.device_mb = 8 * 10 * 3 * 2 * 4 * 2.5 / 2**20  # two steps a chunk
    run = train._Run(config, None, train.prepare(config))
    run.position = train.Position(task, *start)
    found = {}
    for (epoch, first, stop), data in zip(
        list(run.ranges(task)), run.feed(task, list(run.ranges(task))), strict=True
    ):
        slots, count = epochs.epoch_order(run.experiment, run.keys, run.data.train, task, epoch)
        slots = np.asarray(slots)[: int(count)][2 * first : 2 * stop]
        rows = np.asarray(data.train.index).reshape(-1)[slots]
        found[epoch, first] = slots, np.asarray(data.train.images)[rows]
    return run, found


def test_training_gets_the_crops_that_are_drawn_for_it(config, mixed):
    """By hand, from the images of the set, in the order of the epoch; 3 tasks of 5 images."""
    run, found = fed(config)
    assert list(found) == [(0, 0), (0, 2), (1, 0), (1, 2)]
    examples = list(source(mixed, "train"))
    table = np.asarray(run.sequence.train.index).reshape(-1)
    for (epoch, first), (slots, images) in found.items():
        assert len(slots) == (4 if first == 0 else 1)
        for i, (slot, image) in enumerate(zip(slots, images, strict=True)):
            example = examples[table[slot]]
            assert example["label"] == 1
            np.testing.assert_array_equal(image, cropped(example, 1, epoch, 2 * first + i))


def cropped(example, task, epoch, place):
    """By hand: the part of an image that an epoch of a task takes, at its place in the order."""
    large = enlarged(example["image"])
    rng = np.random.default_rng([0, task, epoch, place])
    top, left = rng.integers(len(large) - 7), rng.integers(large.shape[1] - 9)
    part = large[top : top + 8, left : left + 10]
    return part[:, ::-1] if rng.random() < 0.5 else part


@pytest.mark.parametrize("method", ["er", "gem"])
def test_memories_keep_what_was_trained_on_or_the_middles(
    config, mixed, method, tmp_path, monkeypatch
):
    """ER keeps all that its steps saw; GEM chooses among the middles at the end of a task."""
    config.method, config.replay.memory_size, config.gem.memories = method, 40, 4
    run, _ = fed(config)
    states = []
    monkeypatch.setattr(plots, "draw", lambda workdir, result: [])
    monkeypatch.setattr(results.export, "save_models", lambda *args: states.append(args[2]) or [])
    train.train_and_evaluate(config, tmp_path)
    kept_by_run = states[0].learner.method
    examples, train_split = list(source(mixed, "train")), run.sequence.train
    seen, kept = [], []
    for task in range(3):
        for epoch in range(2):
            slots, _ = epochs.epoch_order(run.experiment, run.keys, run.data.train, task, epoch)
            rows = np.asarray(train_split.index).reshape(-1)[np.asarray(slots)]
            seen += [cropped(examples[row], task, epoch, i) for i, row in enumerate(rows)]
        kept.append(train_split.images[rows[-4:]])
    if method == "er":
        assert int(kept_by_run.memory.seen) == 30
        np.testing.assert_array_equal(kept_by_run.memory.x[:30], seen)
    else:
        np.testing.assert_array_equal(kept_by_run.x, kept)


def test_workers_and_the_place_to_start_change_nothing(config):
    _, whole = fed(config)
    _, by_worker = fed(config, workers=1)
    _, later = fed(config, start=(1, 2))
    assert list(later) == [(1, 2)]
    for other in (by_worker, later):
        for at, (_, images) in other.items():
            np.testing.assert_array_equal(images, whole[at][1])


def test_a_run_that_was_cut_goes_on_the_same(config, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "draw", lambda workdir, result: [])
    config.checkpoint.every_steps, config.checkpoint.keep = 4, 100
    config.dataset.device_mb = 8 * 10 * 3 * 2 * 4 * 2.5 / 2**20
    seen = []
    monkeypatch.setattr(crops, "batches", spy(crops.batches, seen))
    first = train.train_and_evaluate(config, tmp_path / "run")
    assert [start for start in seen] == [0, 0, 0]
    whole = load_file(tmp_path / "run" / "model.safetensors")
    for path in (tmp_path / "run" / "checkpoints").iterdir():  # back to epoch 2, step 2 of task 2
        if path.name.split(".")[0] > "00001-00001-000000001":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (tmp_path / "run" / "result.json").unlink()
    seen.clear()
    second = train.train_and_evaluate(config, tmp_path / "run")
    assert seen == [1, 0]
    again = load_file(tmp_path / "run" / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, whole, again)
    for kind, accuracy in first["accuracy"].items():
        np.testing.assert_array_equal(accuracy, second["accuracy"][kind])


def spy(function, starts):
    def spied(files, plan, size, draws=None, start=0, workers=0):
        if draws is not None:
            starts.append(start)
        return function(files, plan, size, draws, start, workers)

    return spied


def test_a_part_held_out_is_of_the_middles_and_leaves_the_rest_to_train(config, mixed):
    config.dataset.validation, config.evaluate.on = 0.4, "validation"
    sequence = load_sequence(config)
    examples = list(source(mixed, "train"))
    assert sequence.train.count.tolist() == [3, 3, 3] and len(sequence.test.images) == 6
    for row, (image, label) in enumerate(
        zip(sequence.train.images, sequence.train.labels, strict=True)
    ):
        example = examples[sequence.files.record[row]]
        assert example["label"] == label
        middle = crops.centre_crop(enlarged(example["image"]), LOOK.shape)
        np.testing.assert_array_equal(image, middle)


def test_several_sets_and_splits(config, mixed, tmp_path):
    rng = np.random.default_rng(4)
    shutil.copytree(mixed / "mixed", tmp_path / "mixed")
    rows = [(encoded(noise(rng, 20, 15)), i % 2) for i in range(4)]
    write_prepared(tmp_path, "other", {"train": rows, "test": rows}, classes=2)
    config.dataset.data_dir, config.dataset.name = str(tmp_path), "mixed,other"
    config.dataset.train_split = "train+validation,train"
    config.sequence.kind = "datasets"
    sequence = load_sequence(config)
    assert sequence.train.count.tolist() == [24, 4] and sequence.test.count.tolist() == [9, 4]
    for row in (3, 17, 25):
        which, record = sequence.files.which[row], sequence.files.record[row]
        image = sequence.files.sources[which][int(record)]["image"]
        middle = crops.centre_crop(crops.resized(image, LOOK), LOOK.shape)
        np.testing.assert_array_equal(sequence.train.images[row], middle)
    assert [sequence.files.which[row] for row in (0, 23, 24)] == [0, 0, 1]


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"dataset.resize": ()}, "dataset.resize: () leaves open what dataset.augment cuts out"),
        ({"dataset.resize_shorter": 9}, "dataset.resize_shorter: 9 is below the 10 pixels of"),
        ({"num_seeds": 2}, "num_seeds: 2 seeds draw crops of their own; with dataset.augment run"),
        ({"dataset.augment": "flip"}, "dataset.augment: unknown value 'flip'; did you mean"),
        ({"dataset.name": "digits"}, "dataset.augment: 'crop_flip' is for sets of TFDS, and digi"),
        ({"dataset.train_split": "train+val"}, "dataset.train_split: 'mixed' has no 'train+val'"),
        ({"dataset.train_split": "train,test"}, "dataset.train_split: 'train,test' names 2 splits"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(config, tmp_path, fields, words):
    config.update_from_flattened_dict(fields)
    with pytest.raises(errors.UserError) as refused:
        configuration.validate(config)
        train.train_and_evaluate(config, tmp_path)
    assert str(refused.value).startswith(words)


def test_without_grain_it_says_what_to_do(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    config.dataset.resize_shorter = 13  # not in the cache
    with pytest.raises(errors.UserError, match="pip install grain, or set --config.dataset.augm"):
        load_sequence(config)
