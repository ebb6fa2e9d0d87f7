"""Class numbers for labels of any kind: integers, text or booleans, from arrays or names."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from bpnjax.utils.errors import UserError

_WHOLE = re.compile(r"-?\d+")


def in_order(names: Iterable[str]) -> list[str]:
    """Sorts class names by value if all are whole numbers, else as text.

    Args:
      names: distinct names in any order.

    Returns:
      The sorted names.

    Example:
      >>> from bpnjax.data.labels import in_order
      >>> in_order(["10", "9"]), in_order(["10", "9", "a"])
      (['9', '10'], ['10', '9', 'a'])
    """
    names = list(names)
    if all(_WHOLE.fullmatch(name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def numbered(
    parts: Sequence[Any], whats: Sequence[str], class_names: Sequence[str] | None = None
) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """Maps the labels of the parts of a set to class numbers, and names the classes.

    Args:
      parts: labels ``[n]`` of each part: integers, text, booleans, or whole numbers stored as
        floats.
      whats: name of each part for messages, beginning with the field.
      class_names: in the order of the outputs. Integer labels then count these names from 0. None
        takes the labels of the first part, in the order of `in_order`.

    Returns:
      The class names, and int32 ``[n]`` for each part.

    Raises:
      UserError: a label is missing, invalid or not in the first part.

    Example:
      >>> from bpnjax.data.labels import numbered
      >>> names, (train, test) = numbered([["cat", "dog", "cat"], ["dog"]], ["train", "test"])
      >>> names, train.tolist(), test.tolist()
      (('cat', 'dog'), [0, 1, 0], [1])
    """
    found = [_texts(part, what) for part, what in zip(parts, whats, strict=True)]
    if isinstance(class_names, str):
        raise UserError(f"class_names: {class_names!r} is one text; give a list of names")
    if class_names is not None:
        given = tuple(map(str, class_names))
        if all(_WHOLE.fullmatch(text) for texts, _ in found for text in texts):
            return given, [np.array(texts, np.int64)[at].astype(np.int32) for texts, at in found]
        source = "class_names"
    else:
        given, source = tuple(in_order(found[0][0])), "the training examples"
    place = {name: i for i, name in enumerate(given)}
    numbers = []
    for (texts, at), what in zip(found, whats, strict=True):
        if unknown := [text for text in texts if text not in place]:
            raise UserError(
                f"{what} hold {unknown[0]!r}, which is not among the classes of {source} "
                f"({_listed(given)}); leave these examples out, or add the class there"
            )
        numbers.append(np.array([place[text] for text in texts], np.int32)[at])
    return given, numbers


def _texts(labels: Any, what: str) -> tuple[list[str], np.ndarray]:
    """The distinct labels as text, and the place of each example's label among them."""
    try:
        labels = labels if isinstance(labels, np.ndarray) else np.asarray(labels)
    except ValueError as error:  # lists of different lengths
        raise UserError(f"{what} differ in shape; give one integer or text each") from error
    if labels.ndim == 2:
        raise UserError(
            f"{what} have the shape {labels.shape}, as one-hot rows have; give one label each, as "
            "labels.argmax(1)"
        )
    if labels.ndim != 1 or labels.dtype.kind not in "biufUSO":
        raise UserError(
            f"{what} have the shape {labels.shape} and the dtype {labels.dtype}; give one integer "
            "or text for each example"
        )
    if labels.dtype.kind == "f":
        broken = ~np.isfinite(labels)
        for bad, why in (
            (broken, "missing"),
            (~broken & _fractional(labels), "not a whole number"),
        ):
            if bad.any():
                row = int(bad.argmax())
                raise UserError(
                    f"{what} are numbers, and the one in row {row} is {why} ({labels[row]}); give "
                    "one integer or text for each example"
                )
        labels = labels.astype(np.int64)
    if labels.dtype.kind in "SO":
        labels = np.array([_text(label, row, what) for row, label in enumerate(labels)], np.str_)
    values, at = np.unique(labels, return_inverse=True)
    if labels.dtype.kind == "U" and "" in values:
        row = int((labels == "").argmax())
        raise UserError(f"{what} are empty in row {row}; give a label, or leave that example out")
    return [str(value) for value in values], at.reshape(-1)


def _fractional(labels: np.ndarray) -> np.ndarray:
    labels = labels.astype(np.float64)  # a half float cannot hold the limit
    with np.errstate(invalid="ignore"):
        return (labels % 1 != 0) | (np.abs(labels) >= 2**53)  # larger floats skip integers


def _text(label: Any, row: int, what: str) -> str:
    if isinstance(label, bytes):
        return label.decode("utf-8", "replace")
    if isinstance(label, np.generic):
        label = label.item()
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if not isinstance(label, (str, int)):
        missing = label is None or label != label
        raise UserError(
            f"{what} are {'missing' if missing else repr(label)} in row {row}; give one integer or "
            "text for each example"
        )
    return str(label)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def chosen(wanted: Sequence[Any], names: Sequence[str], what: str) -> np.ndarray:
    """Looks up the numbers of classes that a user lists by name or number.

    If all classes are named by whole numbers, as digits are, a number means the name.

    Args:
      wanted: texts or integers.
      names: of the classes.
      what: the field and its value, for messages.

    Returns:
      int64 ``[k]``.

    Raises:
      UserError: a class does not exist.

    Example:
      >>> from bpnjax.data.labels import chosen
      >>> chosen(["dog", "cat"], ["cat", "dog"], "classes").tolist()
      [1, 0]
      >>> chosen(["0", 1], ["cat", "dog"], "classes").tolist()
      [0, 1]
    """
    texts = [str(one).strip() for one in wanted]
    place = {name: i for i, name in enumerate(names)}
    by_name = all(_WHOLE.fullmatch(name) for name in names) or not all(
        _WHOLE.fullmatch(text) for text in texts
    )
    if not by_name or all(text in place for text in texts):
        found = [place[text] if by_name else int(text) for text in texts]
        wrong = [text for text, i in zip(texts, found, strict=True) if not 0 <= i < len(names)]
    else:
        wrong = [text for text in texts if text not in place]
    if wrong:
        raise UserError(f"{what}: class {wrong[0]} does not exist; {_range(names)}")
    return np.array(found, np.int64)


def _range(names: Sequence[str]) -> str:
    if list(names) == [str(i) for i in range(len(names))]:
        return f"there are classes 0 to {len(names) - 1}"
    return f"the classes are {_listed(names)} (0 to {len(names) - 1})"


def stratified(labels: np.ndarray, share: float) -> np.ndarray:
    """Marks the same share of each class, with the same examples in every run.

    Args:
      labels: int ``[n]``.
      share: between 0 and 1. At least one example per class is marked.

    Returns:
      bool ``[n]``.

    Example:
      >>> import numpy as np
      >>> from bpnjax.data.labels import stratified
      >>> labels = np.repeat([0, 1], [10, 20])
      >>> np.bincount(labels[stratified(labels, 0.2)]).tolist()
      [2, 4]
    """
    rng = np.random.default_rng(0)
    marked = np.zeros(len(labels), bool)
    for c in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == c))
        marked[members[: max(1, round(share * len(members)))]] = True
    return marked


def held_out(labels: np.ndarray, share: float, names: Sequence[str], what: str) -> np.ndarray:
    """Marks the examples to test on in a source without a test part.

    Args:
      labels: int ``[n]``.
      share: of each class.
      names: of the classes.
      what: the source, for messages, field first.

    Returns:
      bool ``[n]``.

    Raises:
      UserError: no training example is left of a class.
    """
    marked = stratified(labels, share)
    left, all_of = (np.bincount(rows, minlength=len(names)) for rows in (labels[~marked], labels))
    if (left == 0).any():
        c = int((left == 0).argmax())
        number = int(all_of[c])
        raise UserError(
            f"{what}: class {names[c]!r} has {number} example{'s' * (number != 1)}, of which "
            f"test_share={share:g} leaves none to train on; give more, or a test part"
        )
    return marked
