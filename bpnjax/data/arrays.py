"""The form in which every source hands over a set."""

from typing import Any, NamedTuple

import numpy as np


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


class Joined:
    """Arrays one after another without a copy: rows are read from where they are, on disk say.

    Stands in for an array of images, as far as rows, lengths and shapes go.
    """

    def __init__(self, parts):
        self.parts = tuple(parts)
        self.starts = np.cumsum([0, *(len(part) for part in self.parts)])
        self.shape = (int(self.starts[-1]), *self.parts[0].shape[1:])
        self.dtype = np.result_type(*self.parts)
        self.nbytes = sum(part.nbytes for part in self.parts)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        rows = np.asarray(rows)
        found = np.empty((*rows.shape, *self.shape[1:]), self.dtype)
        for start, part in zip(self.starts, self.parts, strict=False):
            within = (rows >= start) & (rows < start + len(part))
            found[within] = part[rows[within] - start]
        return found

    def __array__(self, dtype=None, copy=None):
        return np.concatenate(self.parts).astype(dtype or self.dtype, copy=False)
