"""Task sequences: which examples, classes and pixel orders make each task.

Images are never copied per task: a task is a row of example indices. Index sets are chosen
first and shuffled later, so no shuffle can leak an example from one task into another.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from bpnjax.data import crops
from bpnjax.data.arrays import Arrays, Joined
from bpnjax.data.sources import load_arrays
from bpnjax.utils.errors import UserError

# Mean and standard deviation of ImageNet's red, green and blue between 0 and 1, as those who
# publish networks trained on it divide by.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
KINDS = ("class_split", "permuted", "datasets")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Split:
    """The examples of one split of a sequence: arrays of NumPy on the host, of JAX on a device.

    Attributes:
      images: ``[n, ...]``, as they are stored, uint8 for images.
      labels: int32 ``[n]``, one of the K classes that the sequence uses.
      index: int32 ``[T, N]``, example numbers of each task, padded with 0.
      count: int32 ``[T]``, how many of a row are real.
    """

    images: Any
    labels: Any
    index: Any
    count: Any


class Extractor(NamedTuple):
    """The frozen layers whose answers stand in a sequence for its images."""

    params: dict[str, Any]  # of those layers
    shape: tuple[int, ...]  # of an image
    scale: np.ndarray  # f32 [channels], of images
    shift: np.ndarray
    dtype: np.dtype  # of the images, as they are stored


class TaskSequence(NamedTuple):
    """A sequence of T tasks with C outputs: all their classes, or a head of its own for each."""

    train: Split
    test: Split  # the validation part where evaluate.on is "validation"
    classes: np.ndarray  # bool [T, C], the outputs of each task's classes
    class_names: tuple[str, ...]  # [C]
    scale: np.ndarray  # f32 [channels]; the network's input is image * scale + shift
    shift: np.ndarray
    columns: np.ndarray  # int32 [T, K], the output that stands for a class of the sets in a task
    permuted: bool  # does each task see the pixels in an order of its own?
    extractor: Extractor | None = None  # what made the images, if they are features
    files: Any = None  # `crops.Files` of the training rows, where they are cropped at random

    @property
    def num_tasks(self) -> int:
        """T, the number of tasks."""
        return self.classes.shape[0]

    @property
    def num_classes(self) -> int:
        """C, the number of outputs."""
        return self.classes.shape[1]


def set_names(config: ConfigDict) -> list[str]:
    """The sets that a configuration names."""
    return [name.strip() for name in config.dataset.name.split(",") if name.strip()]


def load_sequence(config: ConfigDict) -> TaskSequence:
    """Loads the sets that a configuration names and cuts them into its sequence of tasks.

    Args:
      config: a validated run configuration.

    Returns:
      `TaskSequence`, host arrays. Its ``test`` is the validation part where `evaluate.on` says so;
      examples held out for validation are in no training set.

    Raises:
      UserError: sets that cannot be had, or a sequence that they do not allow.

    Example:
      >>> from bpnjax import config, data
      >>> settings = config.default()
      >>> settings.dataset.name, settings.sequence.classes = "gaussians", "0,1;0,2"
      >>> sequence = data.load_sequence(settings)
      >>> sequence.classes.tolist(), sequence.train.count.tolist()
      ([[True, True, False], [True, False, True]], [1000, 1000])
    """
    kind = config.sequence.kind
    names = set_names(config)
    if kind == "datasets":
        if len(names) < 2:
            raise UserError(
                f"dataset.name: {config.dataset.name!r} names {len(names)} set; sequence.kind "
                "'datasets' needs several, separated by commas"
            )
        splits = _train_splits(config.dataset.train_split, names)
        loaded = map(load_arrays, names, [config.dataset] * len(names), splits)
        arrays, sizes = _concatenate(names, list(loaded))
        groups = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    else:
        if len(names) != 1:
            raise UserError(
                f"dataset.name: {config.dataset.name!r} must name one set; several need "
                "--config.sequence.kind=datasets"
            )
        splits = _train_splits(config.dataset.train_split, names)
        arrays = load_arrays(names[0], config.dataset, *splits)
        available = len(arrays.class_names)
        if kind == "permuted":
            groups = [np.arange(available)] * config.sequence.num_tasks
        else:
            groups = _class_groups(config.sequence, available, names[0])
    return _assemble(arrays, groups, config, permuted=kind == "permuted")


def _train_splits(text: str, names: Sequence[str]) -> list[str]:
    splits = [split.strip() for split in text.split(",")]
    if len(splits) == 1:
        splits *= len(names)
    if len(splits) != len(names) or not all(splits):
        raise UserError(
            f"dataset.train_split: {text!r} names {len(splits)} splits for {len(names)} set(s); "
            "give one for all, or one per set, separated by commas"
        )
    return splits


def _concatenate(names: Sequence[str], sets: list[Arrays]) -> tuple[Arrays, list[int]]:
    """Several sets as one, and how many classes each has."""
    shapes = {name: s.train_images.shape[1:] for name, s in zip(names, sets, strict=True)}
    if len(set(shapes.values())) > 1:
        raise UserError(
            f"dataset.resize: the sets differ in shape ({shapes}); give one, for example "
            "--config.dataset.resize='(32, 32, 3)'"
        )
    sizes = [len(s.class_names) for s in sets]
    offsets = np.cumsum([0, *sizes[:-1]])
    joined: dict[str, Any] = {}
    for split in ("train", "test"):
        images = [getattr(s, f"{split}_images") for s in sets]
        labels = [getattr(s, f"{split}_labels") for s in sets]
        joined[f"{split}_images"] = Joined(images)
        joined[f"{split}_labels"] = np.concatenate(
            [own + np.int32(offset) for own, offset in zip(labels, offsets, strict=True)]
        )
    class_names = tuple(
        f"{name}/{c}" for name, s in zip(names, sets, strict=True) for c in s.class_names
    )
    version = ",".join(s.version for s in sets)
    files = [s.train_files for s in sets]
    joined["train_files"] = crops.join(files) if all(files) else None
    arrays = Arrays(**joined, class_names=class_names, maximum=sets[0].maximum, version=version)
    return arrays, sizes


def _class_groups(sequence: Any, available: int, name: str) -> list[np.ndarray]:
    if sequence.classes:
        try:
            groups = [
                np.array([int(c) for c in part.split(",")], np.int64)
                for part in sequence.classes.split(";")
            ]
        except ValueError as error:
            raise UserError(
                f"sequence.classes: {sequence.classes!r} is not a list of class numbers; write "
                "tasks separated by ';' and classes by ',', as in '0,1;0,2'"
            ) from error
        wrong = sorted({int(c) for g in groups for c in g if not 0 <= c < available})
        if wrong:
            raise UserError(
                f"sequence.classes: class {wrong[0]} does not exist; {name} has classes 0 to "
                f"{available - 1}"
            )
        return groups
    tasks, per_task = sequence.num_tasks, sequence.classes_per_task
    if tasks * per_task > available:
        raise UserError(
            f"sequence.num_tasks: {tasks} tasks x {per_task} classes_per_task = "
            f"{tasks * per_task} classes, but {name} has {available}; lower one of the two"
        )
    order = np.arange(available)
    if sequence.order_seed >= 0:
        order = np.random.default_rng(sequence.order_seed).permutation(available)
    return list(order[: tasks * per_task].reshape(tasks, per_task))


def _assemble(
    arrays: Arrays, groups: Sequence[np.ndarray], config: ConfigDict, permuted: bool
) -> TaskSequence:
    used = list(dict.fromkeys(int(c) for group in groups for c in group))
    renumber = np.full(len(arrays.class_names), -1, np.int32)
    renumber[used] = np.arange(len(used))
    members = np.zeros((len(groups), len(used)), bool)  # [T, K]
    for task, group in enumerate(groups):
        members[task, renumber[group]] = True
    classes, columns, output_class = _outputs(members, config.sequence.heads)

    train = np.flatnonzero(renumber[arrays.train_labels] >= 0)
    fraction = config.dataset.validation
    held_out = _stratified(arrays.train_labels[train], fraction) if fraction else None
    if config.evaluate.on == "validation":
        if held_out is None:
            raise UserError(
                "dataset.validation: 0.0 leaves no validation part, but evaluate.on is "
                "'validation'; set --config.dataset.validation=0.1"
            )
        test_images, test_labels, test = arrays.train_images, arrays.train_labels, train[held_out]
    else:
        test_images, test_labels = arrays.test_images, arrays.test_labels
        test = np.flatnonzero(renumber[test_labels] >= 0)
    if held_out is not None:
        train = train[~held_out]
        if not np.isin(used, arrays.train_labels[train]).all():
            raise UserError(
                f"dataset.validation: {fraction} leaves a class no training examples; lower it"
            )

    scale, shift = _normalisation(arrays, train, config.dataset.normalize)
    sequence = TaskSequence(
        train=_split(
            arrays.train_images,
            arrays.train_labels,
            train,
            renumber,
            members,
            config.sequence.examples_per_task,
        ),
        test=_split(test_images, test_labels, test, renumber, members),
        classes=classes,
        class_names=tuple(arrays.class_names[used[c]] for c in output_class),
        columns=columns,
        scale=scale,
        shift=shift,
        permuted=permuted,
        files=arrays.train_files and arrays.train_files.take(train),
    )
    smallest = int(sequence.train.count.min())
    if config.train.batch_size > smallest:
        task = int(sequence.train.count.argmin())
        raise UserError(
            f"train.batch_size: {config.train.batch_size} is larger than task {task + 1}, which "
            f"has {smallest} training examples; use at most that"
        )
    return sequence


def _stratified(labels: np.ndarray, fraction: float) -> np.ndarray:
    """Marks the same share of each class, the same examples in every run."""
    rng = np.random.default_rng(0)
    marked = np.zeros(len(labels), bool)
    for c in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == c))
        marked[members[: max(1, round(fraction * len(members)))]] = True
    return marked


def _outputs(members: np.ndarray, heads: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lays out the outputs for a table of which tasks have which classes, bool [T, K].

    Returns the outputs of each task bool [T, C], the output of a class in a task int32 [T, K], and
    the class of each output int [C].
    """
    tasks, used = members.shape
    if heads == "single":
        return members, np.tile(np.arange(used, dtype=np.int32), (tasks, 1)), np.arange(used)
    task_of, class_of = np.nonzero(members)
    classes = task_of == np.arange(tasks)[:, None]
    columns = np.zeros(members.shape, np.int32)
    columns[task_of, class_of] = np.arange(len(task_of))
    return classes, columns, class_of


def _split(
    images: Any,
    labels: np.ndarray,
    rows: np.ndarray,
    renumber: np.ndarray,
    classes: np.ndarray,
    most: int = 0,
) -> Split:
    # Only what the sequence uses goes to the device; the whole set stays as it is, uncopied.
    if len(rows) < len(images):
        images, labels = images[rows], labels[rows]
    labels = renumber[labels]
    members = [np.flatnonzero(row[labels]).astype(np.int32) for row in classes]
    if most:
        members = [_draw(task, m, most) for task, m in enumerate(members)]
    count = np.array([len(m) for m in members], np.int32)
    index = np.zeros((len(members), count.max()), np.int32)
    for row, m in zip(index, members, strict=True):
        row[: len(m)] = m
    return Split(images, labels, index, count)


def _draw(task: int, members: np.ndarray, most: int) -> np.ndarray:
    if most > len(members):
        raise UserError(
            f"sequence.examples_per_task: {most}, but task {task + 1} has {len(members)} training "
            "examples; use at most that"
        )
    return np.sort(np.random.default_rng([task]).permutation(members)[:most])


def _normalisation(arrays: Arrays, rows: np.ndarray, how: str) -> tuple[np.ndarray, np.ndarray]:
    channels = arrays.train_images.shape[-1]
    if how == "none":
        return np.ones(channels, np.float32), np.zeros(channels, np.float32)
    if how == "unit":
        return np.full(channels, 1 / arrays.maximum, np.float32), np.zeros(channels, np.float32)
    if how == "imagenet":
        if channels != 3:
            raise UserError(
                f"dataset.normalize: 'imagenet' needs images of 3 channels, not of {channels}; "
                "use 'standard', or give a dataset.resize in colour"
            )
        mean, std = np.array(_IMAGENET)
        return (1 / (arrays.maximum * std)).astype(np.float32), (-mean / std).astype(np.float32)
    total, squares, n = np.zeros(channels), np.zeros(channels), 0
    for start in range(0, len(rows), 5000):
        block = arrays.train_images[rows[start : start + 5000]].reshape(-1, channels)
        block = block.astype(np.float64)
        total, squares, n = total + block.sum(0), squares + (block**2).sum(0), n + len(block)
    mean = total / n
    std = np.sqrt(np.maximum(squares / n - mean**2, 1e-12))
    return (1 / std).astype(np.float32), (-mean / std).astype(np.float32)
