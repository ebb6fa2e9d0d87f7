"""Task sequences: no example in two tasks, none lost, right classes, clear refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bpnjax import config as configuration
from bpnjax import models
from bpnjax.config import fields
from bpnjax.data import builtin_sets, cache, load_sequence
from bpnjax.data.arrays import Arrays, Joined
from bpnjax.utils.errors import UserError


def config_for(name="digits", **changes):
    config = configuration.default()
    config.dataset.name = name
    config.train.batch_size = 16
    for field, value in changes.items():
        group, last = field.split("__")
        config[group][last] = value
    return config


def rows(split, task):
    return split.index[task, : split.count[task]]


def test_class_split_covers_every_example_once():
    sequence = load_sequence(config_for())
    for split, total in ((sequence.train, 1400), (sequence.test, 397)):
        seen = np.concatenate([rows(split, t) for t in range(5)])
        assert sorted(seen) == list(range(total))
        for task in range(5):
            assert set(split.labels[rows(split, task)]) == {2 * task, 2 * task + 1}
    assert sequence.classes.sum() == 10 and sequence.class_names[3] == "3"


def test_unused_classes_are_left_out_and_renumbered():
    sequence = load_sequence(config_for(sequence__classes="7,2;2,9"))
    assert sequence.class_names == ("7", "2", "9")
    assert sequence.classes.tolist() == [[True, True, False], [False, True, True]]
    raw = builtin_sets.digits()
    assert len(sequence.train.labels) == np.isin(raw.train_labels, [7, 2, 9]).sum()
    shared = set(rows(sequence.train, 0)) & set(rows(sequence.train, 1))
    assert len(shared) == (raw.train_labels == 2).sum()  # class 2 belongs to both tasks


def test_class_order_is_fixed_or_seeded():
    fixed = load_sequence(config_for()).class_names
    one = load_sequence(config_for(sequence__order_seed=1)).class_names
    two = load_sequence(config_for(sequence__order_seed=2)).class_names
    assert fixed == tuple("0123456789")
    assert len({fixed, one, two}) == 3 and sorted(one) == sorted(fixed)
    assert one == load_sequence(config_for(sequence__order_seed=1)).class_names


def test_validation_part_is_stratified_disjoint_and_never_the_test_set():
    plain = load_sequence(config_for())
    train = load_sequence(config_for(dataset__validation=0.2))
    held = load_sequence(config_for(dataset__validation=0.2, evaluate__on="validation"))
    assert len(train.train.labels) + len(held.test.labels) == 1400
    np.testing.assert_array_equal(train.test.images, plain.test.images)
    np.testing.assert_array_equal(held.train.images, train.train.images)
    both = np.concatenate([held.train.images, held.test.images]).reshape(1400, -1)
    whole = plain.train.images.reshape(1400, -1)
    np.testing.assert_array_equal(np.unique(both, axis=0), np.unique(whole, axis=0))
    share = np.bincount(held.test.labels) / np.bincount(plain.train.labels)
    assert (abs(share - 0.2) < 0.01).all()


@pytest.mark.parametrize("how", ["standard", "unit", "symmetric", "none"])
def test_normalisation(how):
    sequence = load_sequence(config_for(dataset__normalize=how))
    x = sequence.train.images * sequence.scale + sequence.shift
    if how == "standard":
        np.testing.assert_allclose([x.mean(), x.std()], [0, 1], atol=1e-5)
    else:
        assert (x.min(), x.max()) == {"unit": (0, 1), "symmetric": (-1, 1), "none": (0, 16)}[how]


@pytest.mark.parametrize("on", ["test", "validation"])
def test_normalisation_never_sees_the_part_held_out(on):
    """Mean 0 and deviation 1 are those of what is trained on, not of the whole training set."""
    whole = load_sequence(config_for())
    held = load_sequence(config_for(dataset__validation=0.5, evaluate__on=on))
    x = held.train.images * held.scale + held.shift
    np.testing.assert_allclose([x.mean(), x.std()], [0, 1], atol=1e-5)
    assert abs(float(held.scale[0] / whole.scale[0]) - 1) > 1e-4  # so the line above can fail


def test_permuted_tasks_share_the_images():
    sequence = load_sequence(config_for(sequence__kind="permuted", sequence__num_tasks=4))
    assert sequence.train.images.shape[0] == 1400 and sequence.train.index.shape == (4, 1400)
    assert sequence.classes.all() and sequence.num_classes == 10


def test_a_list_of_sets_has_classes_of_its_own(monkeypatch):
    def few(name, dataset, train_split="train"):
        images = np.zeros((40, 8, 8, 1), np.uint8)
        labels = np.arange(40, dtype=np.int32) % 2
        return Arrays(images, labels, images[:20], labels[:20], ("a", "b"), 255.0, "1")

    monkeypatch.setattr("bpnjax.data.sequence.load_arrays", few)
    sequence = load_sequence(config_for("one, two,three", sequence__kind="datasets"))
    assert sequence.num_tasks == 3
    assert sequence.class_names == ("one/a", "one/b", "two/a", "two/b", "three/a", "three/b")
    assert set(sequence.train.labels[rows(sequence.train, 2)]) == {4, 5}


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(sequence__num_tasks=6), "sequence.num_tasks: 6 tasks x 2 .* digits has 10"),
        (dict(sequence__classes="0,11"), "sequence.classes: '0,11': class 11 does not exist"),
        (dict(sequence__classes="0,x"), "class x does not exist; there are classes 0 to 9"),
        (dict(train__batch_size=277), "train.batch_size: 277 is larger than task 2, .* 276"),
        (dict(evaluate__on="validation"), "dataset.validation: 0.0 leaves no validation part"),
        (dict(dataset__name="digits,gaussians"), "must name one set"),
        (dict(sequence__kind="datasets"), "names 1 set"),
        (
            dict(sequence__kind="datasets", dataset__name="digits,gaussians"),
            "dataset.name: the sets differ in shape",
        ),
    ],
)  # fmt: skip
def test_impossible_sequences_say_what_to_change(changes, message):
    config = config_for()
    for field, value in changes.items():
        group, last = field.split("__")
        config[group][last] = value
    with pytest.raises(UserError, match=message) as caught:
        load_sequence(config)
    assert "\n" not in str(caught.value)


def test_cache_returns_what_was_written_and_notices_damage(tmp_path):
    folder = tmp_path / "set" / "train"
    assert cache.read(folder) is None
    arrays = {"images": np.arange(60, dtype=np.uint8).reshape(5, 3, 4, 1), "labels": np.arange(5)}
    cache.write(folder, arrays)
    read = cache.read(folder)
    assert isinstance(read["images"], np.memmap)
    np.testing.assert_array_equal(read["images"], arrays["images"])
    assert [p.name for p in folder.parent.iterdir()] == ["train"]  # nothing partial is left
    (folder / "images.npy").write_bytes((folder / "images.npy").read_bytes()[:-1])
    with pytest.raises(UserError, match="damaged .* delete that folder"):
        cache.read(folder)


@pytest.mark.parametrize("kind", ["class_split", "permuted"])
def test_so_many_examples_of_each_task(kind):
    whole = load_sequence(config_for(sequence__kind=kind))
    few = load_sequence(config_for(sequence__kind=kind, sequence__examples_per_task=50))
    assert few.train.count.tolist() == [50] * 5 and few.train.index.shape == (5, 50)
    for task in range(5):
        chosen = rows(few.train, task)
        assert len(set(chosen)) == 50 and set(chosen) <= set(rows(whole.train, task))
    if kind == "permuted":  # each task draws its own
        assert set(rows(few.train, 0)) != set(rows(few.train, 1))
    np.testing.assert_array_equal(few.test.count, whole.test.count)
    again = load_sequence(config_for(sequence__kind=kind, sequence__examples_per_task=50))
    np.testing.assert_array_equal(few.train.index, again.train.index)


def test_more_examples_than_a_task_has_are_refused():
    with pytest.raises(UserError, match="sequence.examples_per_task: 300, but task 1 has 2.. tr"):
        load_sequence(config_for(sequence__examples_per_task=300))


def test_the_kernels_start_as_chosen():
    """Their spread against the variance in the initializer's name: 1/in, 2/in, 2/(in + out)."""
    variance = {"lecun": 1 / 50, "he": 2 / 50, "glorot": 2 / 80}
    for name in fields.entries()["model.kernel_init"].setting.choices:
        config = configuration.default().model
        config.kernel_init, config.hidden = name, (30,)
        params = models.build(config, 4).init(jax.random.key(0), jnp.zeros((1, 50)))["params"]
        spread = float(params["hidden_0"]["kernel"].std())
        assert spread == pytest.approx(variance[name.split("_")[0]] ** 0.5, rel=0.1), name


def test_joined_sets_read_like_one_array():
    parts = [np.arange(12, dtype=np.uint8).reshape(3, 2, 2), np.ones((2, 2, 2), np.uint8)]
    joined, whole = Joined(parts), np.concatenate(parts)
    assert (joined.shape, joined.dtype, joined.nbytes) == (whole.shape, whole.dtype, whole.nbytes)
    for rows in (4, slice(1, 4), np.array([4, 0, 3, 3]), np.array([[2, 4], [3, 0]])):
        np.testing.assert_array_equal(joined[rows], whole[rows])
    np.testing.assert_array_equal(np.asarray(joined), whole)
