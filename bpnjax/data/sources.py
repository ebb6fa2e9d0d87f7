"""The sets of images: built-in ones, and sets of TFDS decoded once into cached arrays."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from bpnjax.data import builtin_sets, cache, crops
from bpnjax.data.arrays import Arrays, checked
from bpnjax.utils.errors import UserError

_DECODE_BLOCK = 2000


def load_arrays(name: str, dataset: Any, train_split: str = "train") -> Arrays:
    """Loads a set by name.

    A TFDS set is decoded once into arrays in the cache folder. Later calls memory-map them.

    Args:
      name: a built-in set (``digits``, ``gaussians``) or any TFDS image classification set.
      dataset: `config.dataset`: folders of prepared sets, archives and the cache, the shape to
        resize to (bilinear interpolation), and how images are cropped.
      train_split: the split to train on, as TFDS names it: ``train+validation``, ``train[:50%]``.

    Returns:
      `Arrays`. Those of TFDS sets are memory-mapped, read-only uint8 ``[n, h, w, channels]``. With
      `dataset.augment` the images are centre crops, and ``train_files`` has the encoded training
      images.

    Raises:
      UserError: the set is unknown, unreachable, damaged or unsuitable.

    Example:
      >>> from bpnjax import config, data
      >>> data.load_arrays("gaussians", config.default().dataset).class_names
      ('black', 'red', 'light blue')
    """
    look = look_of(dataset)
    if name in builtin_sets.SETS:
        if look or train_split != "train":
            field, value = ("augment", look) if look else ("train_split", train_split)
            value = dataset.augment if look else value
            raise UserError(
                f"dataset.{field}: {value!r} is for sets of TFDS, and {name} is built in; leave "
                "it out"
            )
        found = checked(builtin_sets.SETS[name](), name)
        shape = found.train_images.shape[1:]
        if dataset.resize and tuple(dataset.resize) != shape:
            raise UserError(
                f"dataset.resize: {tuple(dataset.resize)} is for sets of TFDS, and {name} is built "
                f"in with the shape {shape}; leave it out"
            )
        return found
    from bpnjax.data.tfds_prepare import ensure_prepared

    builder = ensure_prepared(name, dataset.data_dir, dataset.manual_dir)
    features = builder.info.features
    for needed in ("image", "label"):
        if needed not in features:
            raise UserError(
                f"dataset.name: {name!r} has no feature {needed!r} (it has "
                f"{', '.join(features)}); use an image classification set"
            )
    for split in ("train", "test"):
        if split not in builder.info.splits:
            raise UserError(
                f"dataset.name: {name!r} has no split {split!r} (it has "
                f"{', '.join(builder.info.splits)}); use a set with train and test"
            )
    try:
        if builder.info.splits[train_split].num_examples == 0:
            raise ValueError("it is empty")
    except (KeyError, ValueError, AssertionError) as error:
        raise UserError(
            f"dataset.train_split: {name!r} has no {train_split!r} (it has "
            f"{', '.join(builder.info.splits)}); join some by +, as train+validation"
        ) from error
    names = {"train": train_split, "test": "test"}
    splits = {s: _split(builder, names[s], dataset, look) for s in names}
    arrays = Arrays(
        splits["train"]["images"],
        splits["train"]["labels"],
        splits["test"]["images"],
        splits["test"]["labels"],
        tuple(features["label"].names),
        255.0,
        str(builder.info.version),
        crops.of_source(_encoded(builder, train_split), look) if look else None,
    )
    return checked(arrays, name)


def look_of(dataset: Any) -> crops.Look | None:
    """How images are cropped according to `dataset.augment`.

    Args:
      dataset: `config.dataset`.

    Returns:
      `bpnjax.data.crops.Look`, or None if they are not cropped.
    """
    shape = tuple(dataset.resize)
    return crops.Look(dataset.resize_shorter, shape) if dataset.augment != "none" else None


def _split(
    builder: Any, split: str, dataset: Any, look: crops.Look | None
) -> dict[str, np.ndarray]:
    prepared = pathlib.Path(str(builder.data_dir))
    shape = tuple(dataset.resize)
    size = "x".join(map(str, shape)) or "as-is"
    if look:
        size = f"{look.shorter}-{size}"
    folder = (
        cache.cache_root(dataset.cache_dir)
        / builder.name
        / f"{builder.info.version}-{cache.fingerprint(prepared)}"
        / f"{split}-{size}"
    )
    cached = cache.read(folder)
    if cached is None:
        with _readable(builder, split):
            if look:
                files = crops.of_source(_encoded(builder, split), look)
                arrays = crops.centre_crops(files, dataset.workers)
            else:
                arrays = _decode(builder, split, shape)
        cache.write(folder, arrays)
        cached = cache.read(folder) or arrays
    return cached


def _encoded(builder: Any, split: str) -> Any:
    """The examples of a split, with images as the bytes of their files."""
    import tensorflow_datasets as tfds

    image_features = [
        k for k, f in builder.info.features.items() if isinstance(f, tfds.features.Image)
    ]
    left = dict.fromkeys(image_features, tfds.decode.SkipDecoding())
    return builder.as_data_source(split=split, decoders=left)


@contextlib.contextmanager
def _readable(builder: Any, split: str) -> Iterator[None]:
    """Turns errors while a damaged or unsuitable set is read into a `UserError`."""
    try:
        yield
    except (ValueError, OSError, IndexError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        if "broadcast" in str(error) or "inhomogeneous" in str(error):
            raise UserError(
                f"dataset.resize: the images of {builder.name} differ in size; give one shape, "
                "for example --config.dataset.resize='(32, 32, 3)'"
            ) from error
        raise UserError(
            f"dataset.data_dir: cannot read {split} of {builder.name} in {builder.data_dir} "
            f"({str(error).splitlines()[0]}); delete that folder and prepare the set again"
        ) from error


def _decode(builder: Any, split: str, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    source = builder.as_data_source(split=split)
    count = len(source)
    images, labels = np.empty(0, np.uint8), np.empty(count, np.int32)
    for start in range(0, count, _DECODE_BLOCK):
        stop = min(start + _DECODE_BLOCK, count)
        examples = source.__getitems__(list(range(start, stop)))
        resized = [_resized(e["image"], shape) for e in examples]
        if start == 0:
            images = np.empty((count, *resized[0].shape), np.uint8)
        images[start:stop] = resized
        labels[start:stop] = [e["label"] for e in examples]
    return {"images": images, "labels": labels}


def _resized(pixels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if not shape or pixels.shape == shape:
        return pixels
    from PIL import Image

    height, width, channels = shape
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    image = image.convert("RGB" if channels == 3 else "L")
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(shape)
