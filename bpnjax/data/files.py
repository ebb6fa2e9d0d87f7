"""Your own data in files: folders of images, NumPy archives, tables."""

import pathlib
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bpnjax.data import crops, image_folders
from bpnjax.data.arrays import Arrays, Source, from_pairs
from bpnjax.utils import memory
from bpnjax.utils.errors import UserError
from bpnjax.utils.paths import expanded

TABLES = (".csv", ".parquet")
SUFFIXES = (".npz", *TABLES)
_KINDS = "a folder of images, or a file ending in .npz, .csv or .parquet"
_KEYS = ("train_x", "train_y", "test_x", "test_y")
_INDEX = "__index_level_0__"  # name that pandas gives to an unnamed index
_SPLIT = "split"


def paths_in(text: str) -> list[str]:
    """The paths that `dataset.path` names.

    Args:
      text: one path, or several separated by commas. An existing path may contain commas.

    Returns:
      The paths as they were written.

    Example:
      >>> from bpnjax.data.files import paths_in
      >>> paths_in("one.csv, two.csv"), paths_in("")
      (['one.csv', 'two.csv'], [])
    """
    if text and expanded(text, "dataset.path").exists():
        return [text]
    return [path.strip() for path in text.split(",") if path.strip()]


def complaint(path: str) -> str | None:
    """What is wrong with a path to your own data, before it is read.

    Args:
      path: of a folder or a file.

    Returns:
      A text that begins with the path, or None if it can be read.
    """
    there = expanded(path, "dataset.path")
    if not there.exists():
        return f"{path!r} does not exist; name {_KINDS}"
    if not there.is_dir() and there.suffix.lower() not in SUFFIXES:
        return f"{path!r} is of no kind that can be read; name {_KINDS}"
    return None


def load(
    paths: Sequence[str], dataset: Any, look: crops.Look | None = None, field: str = "dataset.path"
) -> list[Arrays]:
    """Reads your own data, one set from each path.

    Args:
      paths: folders of images (`bpnjax.data.image_folders`), ``.npz`` files with the arrays
        train_x, train_y and optionally test_x, test_y, or ``.csv`` and ``.parquet`` tables of
        numbers with a column of labels and optionally a column split that says train or test.
      dataset: `config.dataset`: `resize`, `label`, `test_share`, `cache_dir`, `workers`.
      look: how images are cropped, or None.
      field: for messages.

    Returns:
      `Arrays` for each path. The columns of all tables are in the order of the first table.

    Raises:
      UserError: data cannot be read or trained on; the message has the file, row and column.
    """
    found, columns = [], None
    for path in paths:
        there, source = expanded(path, "dataset.path"), Source(field, repr(path))
        if wrong := complaint(path):
            raise UserError(f"{field}: {wrong}")
        if there.is_dir():
            found.append(image_folders.load(there, dataset, source, look))
            continue
        for name, value in (("augment", "crop_flip" if look else ""), ("resize", dataset.resize)):
            if value:
                raise UserError(
                    f"{source.option(name)}: {value!r} is for folders of images and sets of TFDS, "
                    f"not for {path}; leave it out"
                )
        if there.suffix.lower() == ".npz":
            train, test = _archive(there, source)
        else:
            train, test, columns = _table(there, dataset.label, source, columns)
        found.append(from_pairs(train, test, source, dataset.test_share))
    return found


def _archive(path: pathlib.Path, source: Source) -> tuple[Any, Any]:
    """The pairs of a NumPy archive. Pickled objects in it are never loaded."""
    if not zipfile.is_zipfile(path):
        raise UserError(f"{source} is not an archive of NumPy; write it by np.savez")
    try:
        if size := memory.too_large(path):
            raise UserError(f"{source} is too large ({size}); cut it into several files")
        with np.load(path, allow_pickle=False) as archive:
            return pairs_of(archive, source)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, UserError):
            raise
        if "Object arrays" in str(error):
            raise UserError(
                f"{source} holds Python objects, which are not read since that could run a "
                "stranger's code; save arrays of numbers, and labels of numbers or text"
            ) from error
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{source} cannot be read ({why}); write it by np.savez") from error


def pairs_of(arrays: Mapping[str, Any], source: Source) -> tuple[Any, Any]:
    """Selects training and test examples with labels from named arrays.

    Args:
      arrays: train_x, train_y, test_x, test_y; the last two are optional.
      source: for messages.

    Returns:
      ``(train_x, train_y)``, and ``(test_x, test_y)`` or None.

    Raises:
      UserError: arrays are missing.
    """
    missing = [key for key in _KEYS if key not in arrays]
    if missing not in ([], list(_KEYS[2:])):
        raise UserError(
            f"{source} lacks {missing[0]} (it has {', '.join(sorted(arrays)) or 'nothing'}); name "
            "the arrays train_x, train_y and, if there is a test part, test_x, test_y"
        )
    train, test = (
        [arrays[key] for key in keys] if keys[0] not in missing else None
        for keys in (_KEYS[:2], _KEYS[2:])
    )
    return train, test


def _table(
    path: pathlib.Path, label: str, source: Source, columns: Sequence[str] | None
) -> tuple[Any, Any, list[str]]:
    """The pairs of a table, and the names of its columns of numbers."""
    import pyarrow as pa
    from pyarrow import csv, parquet

    try:
        table = csv.read_csv(path) if path.suffix.lower() == ".csv" else parquet.read_table(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"{source} cannot be read ({why}); write it as a table again") from error
    return pairs_in(table, label, source, columns)


def pairs_in(
    table: Any, label: str, source: Source, columns: Sequence[str] | None = None
) -> tuple[Any, Any, list[str]]:
    """Selects training and test examples with labels from a table.

    Args:
      table: a table of pyarrow.
      label: name of the column of labels.
      source: for messages.
      columns: names of the columns of numbers, in order; None for all except the labels.

    Returns:
      ``(x, y)`` for training; ``(x, y)`` for testing, or None without a column split; and the names
      of the columns of x.

    Raises:
      UserError: a column or value is not suitable for training.
    """
    _check_columns(table, label, source)
    names = [name for name in table.column_names if name not in (label, _SPLIT)]
    if columns is not None and sorted(columns) != sorted(names):
        other = sorted(set(columns) ^ set(names))
        raise UserError(
            f"{source} and the first table differ in the column {other[0]!r}; give all the same"
        )
    names = list(columns or names)
    x = np.stack([_numbers(table[name], name, source) for name in names], 1)
    y = _values(table[label], label, source)
    if y.dtype.kind == "f" and (odd := ~(np.isfinite(y) & (y % 1 == 0))).any():
        row = int(odd.argmax())
        raise UserError(
            f"{source}: column {label!r} is {y[row]} in row {row + 1}; labels are text or whole "
            "numbers: name another column, or number the classes"
        )
    if _SPLIT not in table.column_names:
        return (x, y), None, names
    said = [str(value) for value in _values(table[_SPLIT], _SPLIT, source)]
    rows = {who: np.array([one == who for one in said]) for who in ("train", "test")}
    if unknown := sorted(set(said) - set(rows)):
        raise UserError(
            f"{source}: column {_SPLIT!r} holds {unknown[0]!r}; write train or test, or give the "
            "column another name if it says something else"
        )
    for who, some in rows.items():
        if not some.any():
            raise UserError(f"{source}: column {_SPLIT!r} says {who} nowhere; leave it out")
    return (x[rows["train"]], y[rows["train"]]), (x[rows["test"]], y[rows["test"]]), names


def _check_columns(table: Any, label: str, source: Source) -> None:
    names = table.column_names
    last = names[-1] if names else "label"
    shown = ", ".join(map(repr, names[:8])) + (", ..." if len(names) > 8 else "")
    if label not in names:
        hint = " (separate columns by commas)" if len(names) == 1 else ""
        raise UserError(
            f"{source.option('label')}: {source.name} has no column {label!r}; it has "
            f"{shown}{hint}; name the column of labels, as {source.setting('label', last)}"
        )
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{source} has the column {twice[0]!r} twice; give each a name of its own")
    if unnamed := [i for i, name in enumerate(names) if name in ("", _INDEX)]:
        raise UserError(
            f"{source}: column {unnamed[0] + 1} has no name, as an index of pandas that was "
            "written too; write the table without it (index=False), or name it"
        )
    if not set(names) - {label, _SPLIT}:
        raise UserError(f"{source} has no columns but {shown}; add columns of numbers")
    if not table.num_rows:
        raise UserError(f"{source} has no rows; add some")


def _values(column: Any, name: str, source: Source) -> np.ndarray:
    """The values of a column without gaps. Rows are numbered from 1, below the header."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    values = column.to_numpy()
    missing = column.is_null().to_numpy()
    if values.dtype.kind == "O":
        missing = missing | (values == "")
    if missing.any():
        raise UserError(
            f"{source}: column {name!r} has no value in row {missing.argmax() + 1} "
            f"({missing.sum()} such rows in all); fill them in, or leave these rows out"
        )
    return values


def _numbers(column: Any, name: str, source: Source) -> np.ndarray:
    """The values of a column as f32."""
    import pyarrow as pa

    values = _values(column, name, source)
    of = column.type
    if pa.types.is_decimal(of):
        values = values.astype(np.float64)
    if values.dtype.kind not in "biuf":
        text = [str(value) for value in values]
        at = next((i for i, value in enumerate(text) if not _is_number(value)), 0)
        raise UserError(
            f"{source}: column {name!r} is {of}, not numbers, as {text[at]!r} in row {at + 1}; "
            "turn it into numbers, leave it out, or name it as the labels by "
            f"{source.setting('label', name)}"
        )
    with np.errstate(over="ignore"):  # infinite values are refused later
        values = values.astype(np.float32)
    if not np.isfinite(values).all():
        row = int((~np.isfinite(values)).argmax())
        raise UserError(
            f"{source}: column {name!r} is {values[row]} in row {row + 1}; fix it, or leave that "
            "row out"
        )
    return values


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
