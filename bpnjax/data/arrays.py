"""The form in which every source returns a data set."""

import hashlib
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from bpnjax.data import labels as label_kinds
from bpnjax.utils.errors import UserError

_EXAMINED = 1000  # number of examples whose range is compared


class Arrays(NamedTuple):
    """A whole set as decoded arrays, which may be memory-mapped.

    "Images" stands for any examples. The rows of a table are ``[n, columns]``.
    """

    train_images: np.ndarray  # [n, ...], uint8 for images, f32 otherwise
    train_labels: np.ndarray  # int32 [n]
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]
    maximum: float  # the largest possible value of an image element
    version: str
    train_files: Any = None  # `bpnjax.data.crops.Files` if training crops them at random


class Source(NamedTuple):
    """The origin of a set, for messages."""

    field: str  # of the configuration, or an argument
    name: str  # the text for messages, already quoted

    def __str__(self) -> str:
        return f"{self.field}: {self.name}"

    def option(self, name: str) -> str:
        """The name of a data setting for a user of this source."""
        return f"dataset.{name}" if self.field.startswith("dataset.") else name

    def setting(self, name: str, value: Any) -> str:
        """The text that sets a data setting, for a user of this source."""
        if self.field.startswith("dataset."):
            return f"--config.dataset.{name}='{value}'"
        return f"{name}={value!r}"


def fingerprint(parts: Iterable[Any], texts: Sequence[str] = ()) -> str:
    """A hash of contents, which changes with any number, shape, dtype or text.

    Args:
      parts: arrays, or bytes.
      texts: further texts, such as class names.

    Returns:
      16 hexadecimal digits.

    Example:
      >>> import numpy as np
      >>> from bpnjax.data.arrays import fingerprint
      >>> fingerprint([np.arange(3)]) == fingerprint([np.arange(3)])
      True
    """
    digest = hashlib.blake2b("\0".join(texts).encode(), digest_size=8)
    for part in parts:
        if isinstance(part, bytes):
            digest.update(part)
            continue
        digest.update(f"{part.shape} {part.dtype.str}".encode())
        for start in range(0, len(part), _EXAMINED):  # a memory-mapped part stays on disk
            digest.update(np.ascontiguousarray(part[start : start + _EXAMINED]).data)
    return digest.hexdigest()


def from_pairs(
    train: tuple[Any, Any],
    test: tuple[Any, Any] | None,
    source: Source,
    test_share: float,
    class_names: Sequence[str] | None = None,
) -> Arrays:
    """Makes a set of examples and labels of any kind.

    Args:
      train: examples ``[n, ...]`` and labels ``[n]``. uint8 stays uint8, and gets an axis of
        channels if it is ``[n, h, w]``; all other numbers become f32.
      test: the same for testing; None holds out a part of the training examples.
      source: for messages.
      test_share: share of each class that is held out if ``test`` is None.
      class_names: as in `bpnjax.data.labels.numbered`.

    Returns:
      `Arrays`, checked.

    Raises:
      UserError: the examples or labels are not suitable for training.
    """
    pairs = {"training": train} if test is None else {"training": train, "test": test}
    whats = [f"{source.field}: the {who} labels of {source.name}" for who in pairs]
    examples = []
    for who, (x, _) in pairs.items():
        what = f"{source.field}: the {who} {{}} of {source.name}"
        x = _examples(x, what.format("examples"))
        _check_images(x, what.format(_noun(x)))  # here, where row numbers are the user's
        examples.append(x)
    names, numbers = label_kinds.numbered([y for _, y in pairs.values()], whats, class_names)
    for x, y, what in zip(examples, numbers, whats, strict=True):
        _check_labels(y, len(x), len(names), what)
    if test is None:
        marked = label_kinds.held_out(numbers[0], test_share, names, str(source))
        examples = [examples[0][~marked], examples[0][marked]]
        numbers = [numbers[0][~marked], numbers[0][marked]]
    most = 255.0
    if examples[0].dtype != np.uint8:
        most = max(abs(float(examples[0].min())), abs(float(examples[0].max()))) or 1.0
    version = fingerprint([*examples, *numbers], names)
    (x, test_x), (y, test_y) = examples, numbers
    return checked(Arrays(x, y, test_x, test_y, names, most, version), source)


def check_classes(sets: Sequence[Arrays], field: str) -> None:
    """Checks that the sets of a sequence have at least two classes.

    Args:
      sets: all sets of a sequence.
      field: the field that names them, for messages.

    Raises:
      UserError: they have one class only.
    """
    names = {name for one in sets for name in one.class_names}
    if len(names) < 2:
        raise UserError(
            f"{field}: all examples are of one class, {min(names)!r}; give at least two classes"
        )


def _examples(x: Any, what: str) -> np.ndarray:
    """Examples in the form in which they are stored, uint8 or f32."""
    try:
        x = x if isinstance(x, np.ndarray) else np.asarray(x)
    except ValueError as error:  # lists of different lengths
        raise UserError(f"{what} differ in shape; give one array [n, ...]") from error
    if x.dtype == np.uint8:
        return x[..., None] if x.ndim == 3 else x
    if x.dtype.kind not in "biuf":
        raise UserError(
            f"{what} are of dtype {x.dtype}; give numbers: uint8 for images, float32 for other data"
        )
    with np.errstate(over="ignore"):  # infinite values are refused later
        return x.astype(np.float32, copy=False)


def checked(arrays: Arrays, source: Source | str) -> Arrays:
    """Checks that a set is as `Arrays` describes it. Every set is checked here once, when loaded.

    Args:
      arrays: from a source, or made by a user.
      source: for messages; a text is the name of a set.

    Returns:
      The set with labels int32 ``[n]`` and unchanged numbers. Images that are NumPy arrays, also
      memory-mapped ones, stay the same objects.

    Raises:
      UserError: images or labels are not suitable for training; the message says which.

    Warns:
      UserWarning: the test images have another scale than the training images.

    Example:
      >>> import numpy as np
      >>> from bpnjax.data.arrays import Arrays, checked
      >>> images, labels = np.zeros((4, 8, 8, 1), np.uint8), np.array([1, 2, 1, 2])
      >>> checked(Arrays(images, labels, images, labels, ("a", "b"), 255.0, "1"), "mine")
      Traceback (most recent call last):
      ...
      bpnjax.utils.errors.UserError: dataset.name: the training labels of 'mine' are 1 to 2 for 2 \
class_names; count them from 0, as labels - 1
    """
    field, name = source if isinstance(source, Source) else ("dataset.name", repr(source))
    if not isinstance(arrays, Arrays):
        raise UserError(f"{field}: {name} gives {type(arrays).__name__}; return bpnjax.data.Arrays")
    names = arrays.class_names
    if isinstance(names, str) or not names or not all(isinstance(n, str) for n in names):
        raise UserError(
            f"{field}: class_names of {name} are {names!r}; give the name of each class, as "
            "('cat', 'dog')"
        )
    found: dict[str, Any] = {"class_names": tuple(names)}
    for split, who in (("train", "training"), ("test", "test")):
        images = np.asanyarray(getattr(arrays, f"{split}_images"))
        _check_images(images, f"{field}: the {who} {_noun(images)} of {name}")
        labels = np.asanyarray(getattr(arrays, f"{split}_labels"))
        what = f"{field}: the {who} labels of {name}"
        _check_labels(labels, len(images), len(names), what)
        found |= {f"{split}_images": images, f"{split}_labels": labels.astype(np.int32, copy=False)}
    _check_alike(found["train_images"], found["test_images"], field, name)
    return arrays._replace(**found)


def _noun(x: np.ndarray) -> str:
    """What to call the examples, judged by their shape."""
    return "images" if x.ndim == 4 else "examples"


def _check_images(images: np.ndarray, what: str) -> None:
    if images.dtype.kind not in "uif":
        raise UserError(
            f"{what} are of dtype {images.dtype}; give uint8 for images, float32 for other data"
        )
    if images.ndim < 2 or not images.size:
        raise UserError(
            f"{what} have the shape {images.shape}; give [n, height, width, "
            "channels] for images, [n, columns] for a table"
        )
    if images.dtype.kind != "f":
        return
    for start in range(0, len(images), _EXAMINED):
        bad = ~np.isfinite(images[start : start + _EXAMINED])
        if bad.any():
            row = start + int(bad.reshape(len(bad), -1).any(1).argmax())
            column = f", column {int(bad[row - start].argmax())}" if bad.ndim == 2 else ""
            raise UserError(
                f"{what} hold NaN or infinite numbers, the first in row {row}{column}; fix "
                "the data, or leave these rows out"
            )


def _check_labels(labels: np.ndarray, images: int, classes: int, what: str) -> None:
    if labels.ndim == 2 and labels.shape[0] == images:
        raise UserError(
            f"{what} have the shape {labels.shape}, as one-hot rows have; give one "
            "class number each, as labels.argmax(1)"
        )
    if labels.dtype.kind in "USO":
        shown = ", ".join(map(repr, labels.ravel()[:2].tolist()))
        raise UserError(
            f"{what} are text or objects, as {shown}; give class numbers from 0, as "
            "np.unique(labels, return_inverse=True)[1], and class_names in that order"
        )
    if labels.dtype.kind not in "ui":
        raise UserError(f"{what} are of dtype {labels.dtype}; give class numbers of dtype int32")
    if labels.shape != (images,):
        raise UserError(
            f"{what} have the shape {labels.shape} for {images} examples; give one "
            "class number for each"
        )
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or most >= classes:
        fix = "give class numbers from 0, and class_names one name for each"
        if least == 1 and most == classes:
            fix = "count them from 0, as labels - 1"
        raise UserError(f"{what} are {least} to {most} for {classes} class_names; {fix}")


def _check_alike(train: np.ndarray, test: np.ndarray, field: str, name: str) -> None:
    noun = _noun(train)
    for what, one, other in (
        ("shape", train.shape[1:], test.shape[1:]), ("dtype", train.dtype, test.dtype)
    ):  # fmt: skip
        if one != other:
            raise UserError(
                f"{field}: the training {noun} of {name} have the {what} {one}, its test "
                f"{noun} {other}; give both the same"
            )
    some = [np.asarray(images[:_EXAMINED]) for images in (train, test)]
    (least, most), (lowest, highest) = ((float(x.min()), float(x.max())) for x in some)
    width, here = most - least, highest - lowest
    if width > 0 and not width / 8 <= here <= 8 * width:
        warnings.warn(
            f"the training {noun} of {name} lie between {least:g} and {most:g}, its test {noun} "
            f"between {lowest:g} and {highest:g}: are they scaled alike?",
            stacklevel=4,
        )


class Joined:
    """Several arrays as one, without a copy. Rows are read where they are, such as on a disk.

    It replaces an array of images where only rows, lengths and shapes are needed.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = tuple(parts)
        self.starts = np.cumsum([0, *(len(part) for part in self.parts)])
        self.shape = (int(self.starts[-1]), *self.parts[0].shape[1:])
        self.dtype = np.result_type(*self.parts)
        self.nbytes = sum(part.nbytes for part in self.parts)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        rows = np.asarray(rows)
        found = np.empty((*rows.shape, *self.shape[1:]), self.dtype)
        for start, part in zip(self.starts, self.parts, strict=False):
            within = (rows >= start) & (rows < start + len(part))
            found[within] = part[rows[within] - start]
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate(self.parts).astype(dtype or self.dtype, copy=False)
