"""The form in which every source hands over a set."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from bpnjax.utils.errors import UserError

_EXAMINED = 1000  # images, first ones, whose numbers are compared


class Arrays(NamedTuple):
    """A whole set as arrays, decoded once; may be memory-mapped."""

    train_images: np.ndarray  # [n, ...], uint8 for images, f32 otherwise
    train_labels: np.ndarray  # int32 [n]
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]
    maximum: float  # the largest value an image element can take
    version: str
    train_files: Any = None  # `bpnjax.data.crops.Files`, where training crops them at random


def checked(arrays: Arrays, name: str) -> Arrays:
    """Makes sure that a set is what `Arrays` says; every set passes here once, when it is loaded.

    Args:
      arrays: of a source, or made by a user.
      name: of the set, for messages.

    Returns:
      The set with labels int32 ``[n]``, its numbers unchanged. Images that are NumPy arrays, mapped
      into memory or not, stay the same objects.

    Raises:
      UserError: images or labels that cannot be trained on: the message says which and the mend.

    Warns:
      UserWarning: the test images are on another scale than the training images.

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
    if not isinstance(arrays, Arrays):
        raise UserError(
            f"dataset.name: {name!r} gives {type(arrays).__name__}; return bpnjax.data.Arrays"
        )
    names = arrays.class_names
    if isinstance(names, str) or not names or not all(isinstance(n, str) for n in names):
        raise UserError(
            f"dataset.name: class_names of {name!r} are {names!r}; give the name of each class, as "
            "('cat', 'dog')"
        )
    found: dict[str, Any] = {"class_names": tuple(names)}
    for split, who in (("train", "training"), ("test", "test")):
        images = np.asanyarray(getattr(arrays, f"{split}_images"))
        _check_images(images, f"the {who} images of {name!r}")
        labels = np.asanyarray(getattr(arrays, f"{split}_labels"))
        what = f"the {who} labels of {name!r}"
        _check_labels(labels, len(images), len(names), what)
        found |= {f"{split}_images": images, f"{split}_labels": labels.astype(np.int32, copy=False)}
    _check_alike(found["train_images"], found["test_images"], name)
    return arrays._replace(**found)


def _check_images(images: np.ndarray, what: str) -> None:
    if images.dtype.kind not in "uif":
        raise UserError(
            f"dataset.name: {what} are of dtype {images.dtype}; give uint8 for images, float32 for "
            "other data"
        )
    if images.ndim < 2 or not images.size:
        raise UserError(
            f"dataset.name: {what} have the shape {images.shape}; give [n, height, width, "
            "channels], or [n, ..., channels] for other data"
        )
    if images.dtype.kind != "f":
        return
    for start in range(0, len(images), _EXAMINED):
        bad = ~np.isfinite(images[start : start + _EXAMINED])
        if bad.any():
            row = start + int(bad.reshape(len(bad), -1).any(1).argmax())
            raise UserError(
                f"dataset.name: {what} hold NaN or infinite numbers, the first in row {row}; mend "
                "the data, or leave these rows out"
            )


def _check_labels(labels: np.ndarray, images: int, classes: int, what: str) -> None:
    if labels.ndim == 2 and labels.shape[0] == images:
        raise UserError(
            f"dataset.name: {what} have the shape {labels.shape}, as one-hot rows have; give one "
            "class number each, as labels.argmax(1)"
        )
    if labels.dtype.kind in "USO":
        shown = ", ".join(map(repr, labels.ravel()[:2].tolist()))
        raise UserError(
            f"dataset.name: {what} are text or objects, as {shown}; give class numbers from 0, as "
            "np.unique(labels, return_inverse=True)[1], and class_names in that order"
        )
    if labels.dtype.kind not in "ui":
        raise UserError(
            f"dataset.name: {what} are of dtype {labels.dtype}; give class numbers of dtype int32"
        )
    if labels.shape != (images,):
        raise UserError(
            f"dataset.name: {what} have the shape {labels.shape} for {images} images; give one "
            "class number for each image"
        )
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or most >= classes:
        mend = "give class numbers from 0, and class_names one name for each"
        if least == 1 and most == classes:
            mend = "count them from 0, as labels - 1"
        raise UserError(
            f"dataset.name: {what} are {least} to {most} for {classes} class_names; {mend}"
        )


def _check_alike(train: np.ndarray, test: np.ndarray, name: str) -> None:
    for what, one, other in (
        ("shape", train.shape[1:], test.shape[1:]), ("dtype", train.dtype, test.dtype)
    ):  # fmt: skip
        if one != other:
            raise UserError(
                f"dataset.name: the training images of {name!r} have the {what} {one}, its test "
                f"images {other}; give both the same"
            )
    some = [np.asarray(images[:_EXAMINED]) for images in (train, test)]
    (least, most), (lowest, highest) = ((float(x.min()), float(x.max())) for x in some)
    width, here = most - least, highest - lowest
    if width > 0 and not width / 8 <= here <= 8 * width:
        warnings.warn(
            f"the training images of {name!r} lie between {least:g} and {most:g}, its test images "
            f"between {lowest:g} and {highest:g}: are they scaled alike?",
            stacklevel=4,
        )


class Joined:
    """Arrays one after another without a copy: rows are read from where they are, on disk say.

    Stands in for an array of images, as far as rows, lengths and shapes go.
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
