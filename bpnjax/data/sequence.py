"""Task sequences: which examples, classes and permutations make each task.

Images are never copied per task: a task is a row of example indices. These sets of indices are
chosen first and shuffled later, so no shuffle can move an example from one task into another.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from bpnjax.data import crops, files
from bpnjax.data.arrays import Arrays, Joined, check_classes
from bpnjax.data.labels import chosen, stratified
from bpnjax.data.permutation import pixel_order
from bpnjax.data.sources import load_arrays, look_of
from bpnjax.utils import prng
from bpnjax.utils.errors import UserError

# Mean and standard deviation of ImageNet's red, green and blue on a scale from 0 to 1, which
# published networks are trained with.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Split:
    """The examples of one split of a sequence, as NumPy arrays or as JAX arrays on a device.

    Attributes:
      images: ``[n, ...]`` in their stored form, uint8 for images.
      labels: int32 ``[n]``, numbers of the K classes that the sequence uses.
      index: int32 ``[T, N]``, example numbers of each task, padded with 0.
      count: int32 ``[T]``, number of examples in each row.
    """

    images: Any
    labels: Any
    index: Any
    count: Any


class Extractor(NamedTuple):
    """Frozen layers whose outputs replace the images of a sequence."""

    arrays: dict[str, np.ndarray]  # parameters and statistics of those layers, by path
    shape: tuple[int, ...]  # of an image
    scale: np.ndarray  # f32 [channels], for images
    shift: np.ndarray
    dtype: np.dtype  # of the stored images


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TaskSequence:
    """A sequence of T tasks with C outputs, which tasks share or which are one head per task.

    `bpnjax.data.tasks` makes one from any data. Its ``len`` is T.

    Attributes:
      train: the examples to train on.
      test: the examples to test on; the validation part if evaluate.on is "validation".
      classes: bool ``[T, C]``, the outputs of each task's classes.
      class_names: ``[C]``.
      scale: f32 ``[channels]``; the network's input is ``image * scale + shift``.
      shift: f32 ``[channels]``.
      columns: int32 ``[T, K]``, the output of each class of the sets in each task.
      permuted: whether each task has its own permutation of the input.
      extractor: the frozen layers that computed the images, if they are features.
      files: `bpnjax.data.crops.Files` of the training rows if these are cropped at random.
      heads: single (all tasks share the outputs), multi (each has its own).
      first_identity: if permuted, whether the first task is not.
      version: identifies the data: the version of a set, or a fingerprint of other data.
    """

    train: Split
    test: Split
    classes: np.ndarray
    class_names: tuple[str, ...]
    scale: np.ndarray
    shift: np.ndarray
    columns: np.ndarray
    permuted: bool
    extractor: Extractor | None = None
    files: Any = None
    heads: str = "single"
    first_identity: bool = True
    version: str = ""

    def __len__(self) -> int:
        return self.num_tasks

    def __repr__(self) -> str:
        counts = (f"{int(s.count.sum()):,}" for s in (self.train, self.test))
        shape = tuple(self.train.images.shape[1:])
        return (
            f"TaskSequence({self.num_tasks} tasks, {self.num_classes} outputs, inputs "
            f"{self.train.images.dtype}{list(shape)}, {' training and '.join(counts)} test "
            f"examples, version {self.version!r})"
        )

    @property
    def num_tasks(self) -> int:
        """T, the number of tasks."""
        return self.classes.shape[0]

    @property
    def num_classes(self) -> int:
        """C, the number of outputs."""
        return self.classes.shape[1]

    def names_of(self, task: int) -> tuple[str, ...]:
        """The classes of a task, in the order of their outputs.

        Args:
          task: from 0.

        Returns:
          Their names.
        """
        return tuple(self.class_names[c] for c in np.flatnonzero(self.classes[task]))

    def normalise(self, x: Any) -> Any:
        """Normalises examples for the network.

        Args:
          x: stored examples, ``[n, ...]``; also a JAX array under `jax.jit`.

        Returns:
          f32 ``[n, ...]``: ``x * scale + shift``.
        """
        return x.astype(np.float32) * self.scale + self.shift

    def train_examples(self, task: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """All training examples of a task.

        Args:
          task: from 0.
          seed: of the run; only permuted inputs need it.

        Returns:
          Normalised examples f32 ``[n, ...]``, and their outputs int32 ``[n]``.
        """
        return self._examples(self.train, task, slice(None), seed)

    def test_examples(self, task: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """All test examples of a task.

        Args:
          task: from 0.
          seed: as in `train_examples`.

        Returns:
          As in `train_examples`.
        """
        return self._examples(self.test, task, slice(None), seed)

    def batches(
        self, task: int, batch_size: int, epoch: int = 0, seed: int = 0
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the training examples of a task in shuffled batches; drops an incomplete last one.

        Args:
          task: from 0.
          batch_size: number of examples in a batch.
          epoch: each epoch has its own order.
          seed: of the run.

        Yields:
          As in `train_examples`, with n = ``batch_size``.

        Raises:
          UserError: the task has fewer examples.

        Example:
          >>> import numpy as np
          >>> from bpnjax import data
          >>> x, y = np.arange(40.0).reshape(20, 2), np.arange(20) % 4
          >>> sequence = data.tasks((x, y), classes_per_task=2)
          >>> [len(y) for _, y in sequence.batches(task=0, batch_size=3)]
          [3, 3]
        """
        count = int(self.train.count[task])
        if not 0 < batch_size <= count:
            raise UserError(
                f"batch_size: {batch_size}, but task {task} has {count} training examples; use 1 "
                "to that"
            )
        order = np.random.default_rng([seed, task, epoch]).permutation(count)
        for start in range(0, count - batch_size + 1, batch_size):
            yield self._examples(self.train, task, order[start : start + batch_size], seed)

    def _examples(
        self, split: Split, task: int, which: Any, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= task < self.num_tasks:
            raise UserError(f"task: {task}; there are tasks 0 to {self.num_tasks - 1}")
        rows = split.index[task, : split.count[task]][which]
        x = np.asarray(split.images[rows])
        if self.permuted:
            key = prng.fold(prng.key(seed), prng.PIXELS)
            order = pixel_order(key, task, x[0].size, self.first_identity)
            x = x.reshape(len(x), -1)[:, np.asarray(order)].reshape(x.shape)
        return self.normalise(x), self.columns[task, split.labels[rows]]


class Cut(NamedTuple):
    """How a set is cut into tasks, except for their classes; see the fields of `sequence`."""

    heads: str = "single"
    permuted: bool = False
    first_identity: bool = True
    examples_per_task: int = 0
    validation: float = 0.0
    on: str = "test"
    normalize: str = "standard"


def set_names(config: ConfigDict) -> list[str]:
    """The names of the sets in a configuration; empty if it has a path to own data."""
    if config.dataset.path:
        return []
    return [name.strip() for name in config.dataset.name.split(",") if name.strip()]


def load_sequence(config: ConfigDict) -> TaskSequence:
    """Loads the sets that a configuration names and cuts them into its sequence of tasks.

    Args:
      config: a validated run configuration.

    Returns:
      `TaskSequence` of NumPy arrays. Its ``test`` is the validation part if `evaluate.on` says so.
      Examples held out for validation are in no training set.

    Raises:
      UserError: a set cannot be loaded, or does not allow this sequence.

    Example:
      >>> from bpnjax import config, data
      >>> settings = config.default()
      >>> settings.dataset.name, settings.sequence.classes = "gaussians", "0,1;0,2"
      >>> sequence = data.load_sequence(settings)
      >>> sequence.classes.tolist(), sequence.train.count.tolist()
      ([[True, True, False], [True, False, True]], [1000, 1000])
    """
    paths = files.paths_in(config.dataset.path)
    names = paths or set_names(config)
    field = "dataset.path" if paths else "dataset.name"
    _check_kind(config, names, field)
    splits = _train_splits(config.dataset.train_split, names)
    if paths:
        if set(splits) != {"train"}:
            raise UserError(
                f"dataset.train_split: {config.dataset.train_split!r} is for sets of TFDS, not for "
                "dataset.path; leave it out"
            )
        sets = files.load(paths, config.dataset, look_of(config.dataset))
        check_classes(sets, field)
    else:
        sets = list(map(load_arrays, names, [config.dataset] * len(names), splits))
    permuted = config.sequence.kind == "permuted"
    cut = Cut(
        config.sequence.heads, permuted, config.sequence.first_identity,
        config.sequence.examples_per_task, config.dataset.validation, config.evaluate.on,
        config.dataset.normalize,
    )  # fmt: skip
    if len(sets) > 1:
        sequence = join(sets, names, cut, field, apart=not paths)
    else:
        groups = class_groups(config.sequence, sets[0].class_names, names[0], permuted)
        sequence = assemble(sets[0], groups, cut)
    check_batch_size(config, sequence)
    return sequence


def _check_kind(config: ConfigDict, names: Sequence[str], field: str) -> None:
    """Checks for one set, or one per task; several paths imply one per task."""
    kind, given, group = config.sequence.kind, config.dataset[field.split(".")[1]], "sequence"
    if kind == "datasets" and len(names) < 2:
        raise UserError(
            f"{field}: {given!r} names {len(names)} set; sequence.kind 'datasets' needs several, "
            "separated by commas"
        )
    if len(names) > 1 and field == "dataset.path":
        for name, value in (("kind", kind == "permuted"), ("classes", config[group].classes)):
            if value:
                raise UserError(
                    f"sequence.{name}: {config[group][name]!r} is for one source, and dataset.path "
                    f"names {len(names)}, a task each; leave it out"
                )
    elif len(names) != 1 and kind != "datasets":
        raise UserError(
            f"{field}: {given!r} must name one set; several need --config.sequence.kind=datasets"
        )


def check_batch_size(config: ConfigDict, sequence: TaskSequence) -> None:
    """Checks that each task fills at least one batch.

    Args:
      config: a run configuration.
      sequence: the data of the run.

    Raises:
      UserError: a task has too few examples.
    """
    smallest = int(sequence.train.count.min())
    if config.train.batch_size > smallest:
        task = int(sequence.train.count.argmin())
        raise UserError(
            f"train.batch_size: {config.train.batch_size} is larger than task {task + 1}, which "
            f"has {smallest} training examples; use at most that"
        )


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


def join(
    sets: Sequence[Arrays], names: Sequence[str], cut: Cut, field: str, apart: bool
) -> TaskSequence:
    """Makes a sequence from several sets, with one task per set.

    Args:
      sets: the sets, all of one shape.
      names: the names of the sets, for messages.
      cut: how they become a sequence.
      field: the field that names them, for messages.
      apart: whether classes of two sets are different outputs even if their names are equal; they
        are then named `set/class`. Otherwise they are one output if all tasks share the outputs.

    Returns:
      `TaskSequence`.

    Raises:
      UserError: the sets differ in shape or dtype.
    """
    for what in ("shape", "dtype"):
        found = {
            name: getattr(s.train_images[:1], what) for name, s in zip(names, sets, strict=True)
        }
        if what == "shape":
            found = {name: shape[1:] for name, shape in found.items()}
        if len(set(found.values())) > 1:
            shown = ", ".join(f"{name}: {value}" for name, value in found.items())
            fix = "give them all the same"
            if what == "shape" and all(len(shape) == 3 for shape in found.values()):
                fix = "give one, for example --config.dataset.resize='(32, 32, 3)'"
                field = "dataset.resize" if field.startswith("dataset.") else field
            raise UserError(f"{field}: the sets differ in {what} ({shown}); {fix}")
    sizes = [len(s.class_names) for s in sets]
    starts = np.cumsum([0, *sizes])
    joined: dict[str, Any] = {}
    for split in ("train", "test"):
        joined[f"{split}_images"] = Joined([getattr(s, f"{split}_images") for s in sets])
        joined[f"{split}_labels"] = np.concatenate(
            [
                getattr(s, f"{split}_labels") + np.int32(start)
                for s, start in zip(sets, starts, strict=False)
            ]
        )
    of_files = [s.train_files for s in sets]
    joined["train_files"] = crops.join(of_files) if all(of_files) else None
    class_names = tuple(
        f"{name}/{c}" if apart else c
        for name, s in zip(names, sets, strict=True)
        for c in s.class_names
    )
    arrays = Arrays(
        **joined,
        class_names=class_names,
        maximum=max(s.maximum for s in sets),
        version=",".join(s.version for s in sets),
    )
    return assemble(arrays, np.split(np.arange(starts[-1]), starts[1:-1]), cut, shared=not apart)


def class_groups(
    sequence: Any, class_names: Sequence[str], name: str, permuted: bool
) -> list[np.ndarray]:
    """Chooses the classes of each task from the classes of one set.

    Args:
      sequence: `config.sequence`: `num_tasks`, `classes_per_task`, `order_seed`, `classes`.
      class_names: of the set.
      name: of the set, for messages.
      permuted: whether each task has all classes.

    Returns:
      int64 ``[k]`` for each task.

    Raises:
      UserError: the set does not have so many or such classes.
    """
    available = len(class_names)
    if permuted:
        return [np.arange(available)] * sequence.num_tasks
    if sequence.classes:
        what = f"sequence.classes: {sequence.classes!r}"
        return [chosen(part.split(","), class_names, what) for part in sequence.classes.split(";")]
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


def assemble(
    arrays: Arrays, groups: Sequence[np.ndarray], cut: Cut, shared: bool = False
) -> TaskSequence:
    """Cuts a set into a sequence.

    Args:
      arrays: the set.
      groups: class numbers of each task.
      cut: how it is cut.
      shared: whether classes with the same name are one output if all tasks share the outputs.

    Returns:
      `TaskSequence`.

    Raises:
      UserError: a task has no examples, or there can be no validation part.
    """
    used = list(dict.fromkeys(int(c) for group in groups for c in group))
    renumber = np.full(len(arrays.class_names), -1, np.int32)
    renumber[used] = np.arange(len(used))
    members = np.zeros((len(groups), len(used)), bool)  # [T, K]
    for task, group in enumerate(groups):
        members[task, renumber[group]] = True
    names = [arrays.class_names[c] for c in used]
    classes, columns, output_class = _outputs(members, cut.heads, names if shared else used)

    train = np.flatnonzero(renumber[arrays.train_labels] >= 0)
    fraction = cut.validation
    held_out = stratified(arrays.train_labels[train], fraction) if fraction else None
    if cut.on == "validation":
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

    for what, labels, rows in (
        ("training", arrays.train_labels, train),
        ("test", test_labels, test),
    ):
        lacking = ~members[:, np.unique(renumber[labels[rows]])].any(1)
        if lacking.any():
            task = int(lacking.argmax())
            shown = ", ".join(names[c] for c in np.flatnonzero(members[task])[:6])
            raise UserError(
                f"sequence.classes: task {task + 1} ({shown}) has no {what} examples; add some, or "
                "choose other classes"
            )
    scale, shift = _normalisation(arrays, train, cut.normalize)
    return TaskSequence(
        train=_split(
            arrays.train_images,
            arrays.train_labels,
            train,
            renumber,
            members,
            cut.examples_per_task,
        ),
        test=_split(test_images, test_labels, test, renumber, members),
        classes=classes,
        class_names=tuple(names[c] for c in output_class),
        columns=columns,
        scale=scale,
        shift=shift,
        permuted=cut.permuted,
        files=arrays.train_files and arrays.train_files.take(train),
        heads=cut.heads,
        first_identity=cut.first_identity,
        version=arrays.version,
    )


def _outputs(
    members: np.ndarray, heads: str, same: Sequence[Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lays out the outputs for a table of the classes of each task, bool [T, K].

    Classes with an equal entry in ``same`` are one output unless each task has its own outputs.
    Returns the outputs of each task bool [T, C], the output of each class in a task int32 [T, K],
    and one class of each output int [C].
    """
    tasks = members.shape[0]
    if heads == "single":
        places = {one: i for i, one in enumerate(dict.fromkeys(same))}
        output = np.array([places[one] for one in same], np.int32)
        classes = np.zeros((tasks, len(places)), bool)
        task_of, class_of = np.nonzero(members)
        classes[task_of, output[class_of]] = True
        return classes, np.tile(output, (tasks, 1)), np.unique(output, return_index=True)[1]
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
    # Only the examples that the sequence uses go to the device. The set itself is not copied.
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
    if how == "symmetric":
        return np.full(channels, 2 / arrays.maximum, np.float32), np.full(channels, -1, np.float32)
    if how == "imagenet":
        if channels != 3:
            raise UserError(
                f"dataset.normalize: 'imagenet' needs images of 3 channels, not of {channels}; "
                "use 'standard', or give a dataset.resize in colour"
            )
        mean, std = np.array(_IMAGENET)
        return (1 / (arrays.maximum * std)).astype(np.float32), (-mean / std).astype(np.float32)
    # The first row of floats is subtracted before squares are summed. Otherwise a mean far from
    # 0 would take all digits of a small deviation.
    first = np.asarray(arrays.train_images[rows[:1]], np.float64).reshape(-1, channels)[0]
    if arrays.train_images.dtype.kind != "f":
        first = np.zeros(channels)
    total, squares, n = np.zeros(channels), np.zeros(channels), 0
    least, most = np.full(channels, np.inf), np.full(channels, -np.inf)
    for start in range(0, len(rows), 5000):
        block = arrays.train_images[rows[start : start + 5000]].reshape(-1, channels)
        least, most = np.minimum(least, block.min(0)), np.maximum(most, block.max(0))
        block = block.astype(np.float64) - first
        total, squares, n = total + block.sum(0), squares + (block**2).sum(0), n + len(block)
    mean = total / n
    std = np.sqrt(np.maximum(squares / n - mean**2, 0))
    mean += first
    # A constant, or what f32 cannot distinguish from one, must not be scaled up.
    std[(least == most) | (std <= np.finfo(np.float32).eps * np.abs(mean))] = 1
    scale = (1 / std).astype(np.float32)
    return scale, (-mean * scale.astype(np.float64)).astype(np.float32)
