"""Your own data in Python: arrays, batches, columns and files become a sequence of tasks."""

import os
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from bpnjax.data import files, image_folders
from bpnjax.data.arrays import Arrays, Source, check_classes, from_pairs
from bpnjax.data.labels import chosen
from bpnjax.data.sequence import Cut, TaskSequence, assemble, class_groups, join
from bpnjax.data.sources import load_arrays
from bpnjax.utils.errors import UserError

__all__ = ["tasks"]


def tasks(
    source: Any,
    test: Any = None,
    *,
    classes: Sequence[Sequence[Any]] | None = None,
    num_tasks: int | None = None,
    classes_per_task: int | None = None,
    order_seed: int = -1,
    kind: str = "class_split",
    heads: str = "single",
    first_identity: bool = True,
    examples_per_task: int = 0,
    class_names: Sequence[str] | None = None,
    label: str = "label",
    test_share: float = 0.2,
    validation: float = 0.0,
    on: str = "test",
    normalize: str = "standard",
    resize: tuple[int, ...] = (),
    data_dir: str = "",
    cache_dir: str = "",
) -> TaskSequence:
    """Makes a sequence of tasks from any data.

    A source is one of

    - a pair ``(x, y)`` of arrays (NumPy, JAX, PyTorch, pandas, lists): examples ``[n, ...]``, uint8
      for images, and labels ``[n]``, integers or text;
    - an iterable of batches ``(x, y)``, such as a generator or a PyTorch DataLoader, which is read
      once into memory;
    - a Dataset of Hugging Face's `datasets`, a DatasetDict with train and test, or anything else
      with ``column_names`` whose columns can be indexed;
    - a mapping with train_x, train_y, test_x, test_y, or with one source as train and one as test;
    - a path as for `dataset.path`, see `bpnjax.data.files.load`: a `pathlib.Path`, or a text that
      ends in .npz, .csv or .parquet, begins with ``.``, ``~`` or ``/``, or is an existing path;
    - any other text: the name of a set, as for `dataset.name`.

    One source is cut into tasks by its classes. A list of sources has one source per task. Classes
    with the same name are then the same output unless ``heads="multi"``.

    Args:
      source: one source, or a list of sources.
      test: the examples to test on, of the same kind. Without them, and if the source has no test
        part, a share of each class is held out.
      classes: labels or class numbers of each task: ``[["cat", "dog"], ["bird", "fish"]]``.
      num_tasks: number of tasks, each with the same number of classes, in their order.
      classes_per_task: number of classes per task, instead of ``num_tasks``.
      order_seed: seed that shuffles the classes; -1 keeps their order.
      kind: class_split, or permuted: ``num_tasks`` tasks with all classes, each with its own
        permutation of the input.
      heads: single (all tasks share the outputs), multi (each task has its own).
      first_identity: permuted: whether the first task is not permuted.
      examples_per_task: number of training examples per task, drawn once; 0 for all.
      class_names: in the order of the outputs. Integer labels then count these names from 0. None
        takes the sorted labels of the training examples.
      label: name of the column of labels, for sources with columns.
      test_share: share of each class that is held out for testing.
      validation: share of each class's training examples that is held out for validation.
      on: the part that is tested: test or validation.
      normalize: standard, imagenet, unit, symmetric or none, as `dataset.normalize`.
      resize: ``(height, width, channels)`` for images of other or mixed sizes.
      data_dir: folder of the prepared TFDS sets.
      cache_dir: the folder of decoded images.

    Returns:
      `TaskSequence`. Examples are uint8 or f32, and classes are named by their labels as text.

    Raises:
      UserError: the data are not suitable for training, or do not allow these tasks.

    Example:
      >>> import numpy as np
      >>> from bpnjax import data
      >>> x = np.random.default_rng(0).normal(size=(60, 3))
      >>> y = np.array(["cat", "dog", "bird", "fish"])[np.arange(60) % 4]
      >>> sequence = data.tasks((x, y), classes=[["cat", "dog"], ["bird", "fish"]])
      >>> sequence.names_of(0), sequence.train_examples(0)[0].shape
      (('cat', 'dog'), (24, 3))
      >>> len(data.tasks([(x, y), (-x, y)])), data.tasks([(x, y), (-x, y)]).class_names
      (2, ('bird', 'cat', 'dog', 'fish'))
    """
    _check_choices(kind=kind, heads=heads, on=on, normalize=normalize)
    for name, share in (("test_share", test_share), ("validation", validation)):
        if not (0 < share < 1 or (share == 0 and name == "validation")):
            raise UserError(f"{name}: {share} is not a share; give a number between 0 and 1")
    if on == "validation" and not validation:
        raise UserError("validation: 0 leaves nothing to test on, but on is 'validation'; give 0.1")
    dataset = SimpleNamespace(
        label=label, test_share=test_share, resize=tuple(resize), data_dir=data_dir, manual_dir="",
        cache_dir=cache_dir, augment="none", resize_shorter=0, workers=0,
    )  # fmt: skip
    cut = Cut(
        heads, kind == "permuted", first_identity, examples_per_task, validation, on, normalize
    )
    if isinstance(source, (list, tuple)) and not _is_pair(source):
        asked = {
            "classes": classes, "num_tasks": num_tasks, "classes_per_task": classes_per_task,
            "kind": kind if kind != "class_split" else None,
        }  # fmt: skip
        if given := [name for name, value in asked.items() if value is not None]:
            raise UserError(f"{given[0]}: is for one source; a list has a source for each task")
        return _of_several(source, test, dataset, class_names, cut)
    arrays = _read(source, test, dataset, class_names, Source("source", "source"))
    check_classes([arrays], "source")
    groups = _groups(arrays, classes, num_tasks, classes_per_task, order_seed, cut.permuted)
    return assemble(arrays, groups, cut)


def _check_choices(**given: str) -> None:
    choices = {
        "kind": ("class_split", "permuted"), "heads": ("single", "multi"),
        "on": ("test", "validation"),
        "normalize": ("standard", "imagenet", "unit", "symmetric", "none"),
    }  # fmt: skip
    for name, value in given.items():
        if value not in choices[name]:
            raise UserError(f"{name}: {value!r} is not one of {', '.join(choices[name])}")


def _groups(
    arrays: Arrays,
    classes: Sequence[Sequence[Any]] | None,
    num_tasks: int | None,
    classes_per_task: int | None,
    order_seed: int,
    permuted: bool,
) -> list[np.ndarray]:
    """The classes of each task, given by one of three arguments."""
    available = len(arrays.class_names)
    if permuted and num_tasks is None:
        raise UserError("num_tasks: permuted inputs make any number of tasks; give it")
    if classes is None and num_tasks is None and classes_per_task is None:
        raise UserError(
            f"num_tasks: how do {available} classes become tasks? give num_tasks, classes_per_task "
            "or classes"
        )
    if classes is not None:
        if num_tasks is not None or classes_per_task is not None or permuted:
            raise UserError("classes: says all; leave out num_tasks, classes_per_task and kind")
        return [chosen(group, arrays.class_names, f"classes: {list(group)}") for group in classes]
    for name, number in (("num_tasks", num_tasks), ("classes_per_task", classes_per_task)):
        if number is not None and not (1 <= number <= available or (permuted and number > 0)):
            raise UserError(f"{name}: {number}, and there are {available} classes; give 1 to that")
    wanted = SimpleNamespace(
        classes="",
        num_tasks=num_tasks or available // (classes_per_task or 1),
        classes_per_task=classes_per_task or available // (num_tasks or 1),
        order_seed=order_seed,
    )
    return class_groups(wanted, arrays.class_names, "the source", permuted)


def _of_several(
    sources: Sequence[Any],
    test: Any,
    dataset: Any,
    class_names: Sequence[str] | None,
    cut: Cut,
) -> TaskSequence:
    tests = [None] * len(sources) if test is None else test
    if not isinstance(tests, (list, tuple)) or len(tests) != len(sources):
        raise UserError(f"test: give a list of {len(sources)}, as there are sources")
    if not sources:
        raise UserError("source: the list is empty; give a source for each task")
    names = [f"source[{i}]" for i in range(len(sources))]
    if all(_is_path(source) for source in sources) and test is None:
        sets = files.load([os.fspath(source) for source in sources], dataset, field="source")
    else:
        sets = [
            _read(one, other, dataset, class_names, Source("source", name))
            for one, other, name in zip(sources, tests, names, strict=True)
        ]
    apart = all(isinstance(source, str) and not _is_path(source) for source in sources)
    if apart:
        names = list(sources)
    check_classes(sets, "source")
    return join(sets, names, cut, "source", apart)


def _is_path(source: Any) -> bool:
    if not isinstance(source, str):
        return isinstance(source, os.PathLike)
    # A TFDS name may contain a separator too: fgvc_aircraft/family.
    plainly = source.endswith(files.SUFFIXES) or source.startswith((".", "~", os.sep))
    return plainly or (os.sep in source and os.path.exists(source))


def _is_array(value: Any) -> bool:
    return isinstance(value, list) or hasattr(value, "__array__")


def _is_pair(value: Any) -> bool:
    """Whether these are examples and labels, instead of two sources."""
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(map(_is_array, value)):
        return False
    first = value[1][:1]  # one label, possibly one-hot
    return not isinstance(first, list) or not first or np.ndim(first[0]) == 0


def _read(
    source: Any, test: Any, dataset: Any, class_names: Sequence[str] | None, where: Source
) -> Arrays:
    """Reads one source."""
    if isinstance(source, Mapping) and "train" in source:
        if test is None and "test" in source:
            test = source["test"]
        source = source["train"]
    if isinstance(source, (str, os.PathLike)):
        if test is not None or class_names is not None:
            raise UserError(
                f"{where}: {os.fspath(source)!r} has its own parts and classes; leave out test and "
                "class_names"
            )
        if not _is_path(source):
            return load_arrays(str(source), dataset)
        return files.load([os.fspath(source)], dataset, field=where.name)[0]
    if isinstance(source, Mapping):
        train, other = files.pairs_of(source, where)
        return from_pairs(train, other, where, dataset.test_share, class_names)
    train, names = _pair(source, dataset, where)
    other = None
    if test is not None:
        other, _ = _pair(test, dataset, Source("test", where.name.replace("source", "test")))
    names = names if class_names is None else class_names
    return from_pairs(train, other, where, dataset.test_share, names)


def _pair(source: Any, dataset: Any, where: Source) -> tuple[Any, Sequence[str] | None]:
    """Examples and labels of one part, and the names of its classes if it has any."""
    if hasattr(source, "column_names"):
        return _columns(source, dataset, where)
    if _is_pair(source):
        return (_stacked(source[0], dataset, where), source[1]), None
    if isinstance(source, Iterable) and not hasattr(source, "__array__"):
        return _batches(source, dataset, where), None
    raise UserError(
        f"{where} is {type(source).__name__}; give (x, y), batches of such, a Dataset with "
        "columns, a path or the name of a set"
    )


def _stacked(x: Any, dataset: Any, where: Source) -> Any:
    """Examples as one array. Images of PIL are decoded."""
    first = x[0] if isinstance(x, list) and x else None
    if hasattr(first, "convert") and hasattr(first, "mode"):
        return image_folders.stacked(x, dataset.resize, where)
    if dataset.resize:
        raise UserError(
            f"resize: {dataset.resize} is for images in files or of PIL, not for arrays; resize "
            f"{where.name} before"
        )
    return x


def _batches(source: Iterable[Any], dataset: Any, where: Source) -> tuple[Any, Any]:
    """Joins all batches of an iterable."""
    xs, ys = [], []
    for batch in source:
        if not isinstance(batch, (list, tuple)) or len(batch) != 2:
            raise UserError(
                f"{where} gives {type(batch).__name__}, not batches (x, y); make each a pair of "
                "examples and labels"
            )
        xs.append(np.asarray(_stacked(batch[0], dataset, where)))
        ys.append(np.asarray(batch[1]))
    if not xs:
        raise UserError(f"{where} gives no batches; was it read before? give a fresh one")
    try:
        return np.concatenate(xs), np.concatenate(ys)
    except ValueError as error:
        raise UserError(
            f"{where}: its batches differ in shape ({error}); give one shape"
        ) from error


def _columns(source: Any, dataset: Any, where: Source) -> tuple[Any, Sequence[str] | None]:
    """The pair of a Dataset: one column of images or arrays, or several columns of numbers."""
    names = list(source.column_names)
    if dataset.label not in names:
        raise UserError(
            f"label: {where.name} has no column {dataset.label!r}; it has "
            f"{', '.join(map(repr, names))}; name the column of labels"
        )
    columns = {name: _column(source, name) for name in names}
    labels = columns.pop(dataset.label)
    feature = (getattr(source, "features", None) or {}).get(dataset.label)
    class_names = getattr(feature, "names", None)
    wide = [name for name, values in columns.items() if values and _is_wide(values[0])]
    if len(wide) > 1:
        raise UserError(
            f"{where} has the columns {', '.join(map(repr, wide))} of images or arrays; keep one"
        )
    if wide:
        values = columns[wide[0]]
        x = _stacked(values, dataset, where)
        return (x if x is not values else _one_array(values, where), labels), class_names
    import pyarrow as pa

    (x, y), _, _ = files.pairs_in(
        pa.table(
            {name: list(values) for name, values in columns.items()} | {dataset.label: labels}
        ),
        dataset.label,
        where,
    )
    return (x, y), class_names


def _column(source: Any, name: str) -> list[Any]:
    if hasattr(source, "__getitem__"):
        return list(source[name])
    return [row[name] for row in source]  # a source that can only be iterated


def _is_wide(value: Any) -> bool:
    return hasattr(value, "convert") or (not isinstance(value, str) and np.ndim(value) > 0)


def _one_array(values: list[Any], where: Source) -> np.ndarray:
    try:
        return np.stack([np.asarray(value) for value in values])
    except ValueError as error:
        raise UserError(f"{where}: its arrays differ in shape; give one shape") from error
