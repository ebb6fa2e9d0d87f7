"""Where pictures come from: embedded sets and TFDS, decoded once into cached arrays."""

import pathlib

import numpy as np

from bpnjax.data import cache, embedded
from bpnjax.data.arrays import Arrays
from bpnjax.errors import UserError

_DECODE_BLOCK = 2000


def load_arrays(name: str, dataset) -> Arrays:
    """Loads a set by name.

    A set of TFDS is decoded once, into arrays in the cache folder; later calls map them into
    memory.

    Args:
      name: an embedded set (``digits``, ``gaussians``) or any TFDS image classification set.
      dataset: `config.dataset`: where prepared sets, archives and the cache are, and the shape to
        resize to, if any, by bilinear interpolation.

    Returns:
      `Arrays`; those of TFDS sets are memory-mapped, read-only uint8 ``[n, h, w, channels]``.

    Raises:
      UserError: unknown, unreachable, damaged or unsuitable set.

    Example:
      >>> from bpnjax import config, data
      >>> data.load_arrays("gaussians", config.default().dataset).class_names
      ('black', 'red', 'light blue')
    """
    if name in embedded.SETS:
        return embedded.SETS[name]()
    from bpnjax.data.prepare import ensure_prepared

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
    shape = tuple(dataset.resize)
    splits = {s: _split(builder, s, shape, dataset.cache_dir) for s in ("train", "test")}
    return Arrays(
        splits["train"]["images"],
        splits["train"]["labels"],
        splits["test"]["images"],
        splits["test"]["labels"],
        tuple(features["label"].names),
        255.0,
        str(builder.info.version),
    )


def _split(builder, split, shape, cache_dir) -> dict[str, np.ndarray]:
    prepared = pathlib.Path(str(builder.data_dir))
    size = "x".join(map(str, shape)) or "as-is"
    folder = (
        cache.cache_root(cache_dir)
        / builder.name
        / f"{builder.info.version}-{cache.fingerprint(prepared)}"
        / f"{split}-{size}"
    )
    cached = cache.read(folder)
    if cached is None:
        cache.write(folder, _decode(builder, split, shape))
        cached = cache.read(folder)
    return cached


def _decode(builder, split, shape) -> dict[str, np.ndarray]:
    try:
        source = builder.as_data_source(split=split)
        count = len(source)
        images = labels = None
        for start in range(0, count, _DECODE_BLOCK):
            stop = min(start + _DECODE_BLOCK, count)
            examples = source.__getitems__(list(range(start, stop)))
            pictures = [_resized(e["image"], shape) for e in examples]
            if images is None:
                images = np.empty((count, *pictures[0].shape), np.uint8)
                labels = np.empty(count, np.int32)
            images[start:stop] = pictures
            labels[start:stop] = [e["label"] for e in examples]
    except (ValueError, OSError, IndexError, RuntimeError) as error:
        if "broadcast" in str(error) or "inhomogeneous" in str(error):
            raise UserError(
                f"dataset.resize: the pictures of {builder.name} differ in size; give one shape, "
                "for example --config.dataset.resize='(32, 32, 3)'"
            ) from error
        raise UserError(
            f"dataset.data_dir: cannot read {split} of {builder.name} in {builder.data_dir} "
            f"({str(error).splitlines()[0]}); delete that folder and prepare the set again"
        ) from error
    return {"images": images, "labels": labels}


def _resized(picture: np.ndarray, shape) -> np.ndarray:
    if not shape or picture.shape == shape:
        return picture
    from PIL import Image

    height, width, channels = shape
    image = Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture)
    image = image.convert("RGB" if channels == 3 else "L")
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(shape)
