"""The form in which every source hands over a set."""

from typing import Any, NamedTuple

import numpy as np


class Arrays(NamedTuple):
    """A whole set as arrays, decoded once; may be memory-mapped."""

    train_images: np.ndarray  # [n, ...], uint8 for pictures, f32 else
    train_labels: np.ndarray  # int32 [n]
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]
    maximum: float  # the largest value an image element can take
    version: str
    train_files: Any = None  # `bpnjax.data.crops.Files`, where training crops them at random
