"""Images of mixed sizes, decoded, resized and cropped by grain when they are needed.

This is the usual treatment of photographs: the shorter side is resized, then a part is cut out, in
training at a random place and sometimes mirrored, in evaluation from the centre. The crop of an
example depends only on (seed, task, epoch, place in the epoch). So an interrupted run continues at
any step without replaying earlier ones, with any number of workers.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from bpnjax.utils.errors import UserError

_THREADS = 4  # of a process without workers; Python's lock is free while JPEGs are decoded
_AHEAD = 2  # number of batches that a process prepares ahead


class Look(NamedTuple):
    """How images get the shape of the network's input."""

    shorter: int  # length in pixels to which the shorter side is resized
    shape: tuple[int, int, int]  # height, width and channels of the crop


class Files(NamedTuple):
    """The encoded images of a split."""

    sources: tuple[Any, ...]  # from `tfds.data_source`, without decoded images
    which: np.ndarray  # int32 [n], the source of each row
    record: np.ndarray  # int32 [n], the place in its source
    look: Look

    def take(self, rows: np.ndarray) -> "Files":
        """Selects some rows."""
        return self._replace(which=self.which[rows], record=self.record[rows])


class Draws(NamedTuple):
    """What a random crop depends on, beside the epoch and place of an example."""

    seed: int
    task: int
    epoch: int  # of the first row of the plan
    places: int  # number of rows of the plan per epoch


def of_source(source: Any, look: Look) -> Files:
    """The images of one source."""
    rows = np.arange(len(source), dtype=np.int32)
    return Files((source,), np.zeros_like(rows), rows, look)


def join(parts: list[Files]) -> Files:
    """The images of several splits, one after another."""
    which = [np.full_like(part.which, i) for i, part in enumerate(parts)]
    return Files(
        tuple(part.sources[0] for part in parts),
        np.concatenate(which),
        np.concatenate([part.record for part in parts]),
        parts[0].look,
    )


def resized(encoded: bytes, look: Look) -> np.ndarray:
    """Resizes the shorter side of an image, bilinear with antialiasing.

    Args:
      encoded: a PNG or JPEG.
      look: `Look`.

    Returns:
      uint8 ``[h, w, channels]``. The longer side keeps the aspect ratio, rounded down.

    Source: ``Resize(int)`` of torchvision on PIL images.
    """
    from PIL import Image

    image = Image.open(io.BytesIO(encoded)).convert("RGB" if look.shape[2] == 3 else "L")
    short = min(image.size)
    width, height = (int(look.shorter * side / short) for side in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(height, width, look.shape[2])


def random_crop(image: np.ndarray, shape: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """Cuts out a random part of an image and mirrors it with probability 1/2.

    Args:
      image: ``[H, W, channels]``.
      shape: height and width of the part, and channels.
      rng: the generator; three numbers are drawn.

    Returns:
      ``[h, w, channels]``.

    Source: ``RandomCrop`` and ``RandomHorizontalFlip`` of torchvision.
    """
    height, width, _ = shape
    top = rng.integers(image.shape[0] - height + 1)
    left = rng.integers(image.shape[1] - width + 1)
    part = image[top : top + height, left : left + width]
    return part[:, ::-1] if rng.random() < 0.5 else part


def centre_crop(image: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Cuts out the centre of an image.

    Args:
      image: ``[H, W, channels]``.
      shape: height and width of the part, and channels.

    Returns:
      ``[h, w, channels]``.

    Example:
      >>> import numpy as np
      >>> from bpnjax.data import crops
      >>> crops.centre_crop(np.arange(7).reshape(1, 7, 1), (1, 4, 1)).ravel().tolist()
      [2, 3, 4, 5]

    Source: ``CenterCrop`` of torchvision, which rounds a half to the even place.
    """
    height, width, _ = shape
    top, left = round((image.shape[0] - height) / 2), round((image.shape[1] - width) / 2)
    return image[top : top + height, left : left + width]


def random_numbers(draws: Draws, place: int) -> np.random.Generator:
    """The random generator for one row of a plan."""
    epoch, within = divmod(place, draws.places)
    return np.random.default_rng([draws.seed, draws.task, draws.epoch + epoch, within])


def _example(files: Files, draws: Draws | None, place: int, row: Any) -> dict[str, Any]:
    """One input and its label; an empty image where the plan has -1."""
    if row < 0:
        return {"image": np.zeros(files.look.shape, np.uint8), "label": np.int32(-1)}
    example = files.sources[files.which[row]][int(files.record[row])]
    image = resized(example["image"], files.look)
    if draws is None:
        image = centre_crop(image, files.look.shape)
    else:
        image = random_crop(image, files.look.shape, random_numbers(draws, place))
    return {"image": np.ascontiguousarray(image), "label": np.int32(example["label"])}


@contextlib.contextmanager
def batches(
    files: Files,
    plan: np.ndarray,
    size: int,
    draws: Draws | None = None,
    start: int = 0,
    workers: int = 0,
) -> Iterator[Iterator[dict[str, Any]]]:
    """Reads images ahead in a given order; use it in a ``with`` statement.

    Args:
      files: of the split.
      plan: rows int ``[m]``; -1 is an empty image that fills up a batch.
      size: number of examples in a batch.
      draws: what random crops depend on; None for centre crops.
      start: number of the first batch.
      workers: number of processes that decode; 0 for threads of this process.

    Yields:
      An iterator of ``{"image": uint8 [size, h, w, channels], "label": int32 [size]}``, the last
      one smaller where ``size`` does not divide m.

    Raises:
      UserError: grain is not installed.
    """
    grain = _grain()
    if workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # the workers need grain's flags, but we parse our own
            flags.FLAGS.mark_as_parsed()
    dataset = grain.MapDataset.source(np.asarray(plan, np.int32))
    dataset = dataset.map_with_index(partial(_example, files, draws)).batch(size)[start:]
    threads = 1 if workers else _THREADS
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, _AHEAD))
    dataset = dataset.to_iter_dataset(options)
    if workers:
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_AHEAD)
        )
    iterator = iter(dataset)
    try:
        yield iterator
    finally:
        iterator.close()


def centre_crops(files: Files, workers: int = 0) -> dict[str, np.ndarray]:
    """Returns all images of a split, cropped at the centre.

    Args:
      files: of the split.
      workers: as in `batches`.

    Returns:
      ``images`` uint8 ``[n, h, w, channels]`` and ``labels`` int32 ``[n]``.
    """
    count, at = len(files.record), 0
    images = np.empty((count, *files.look.shape), np.uint8)
    labels = np.empty(count, np.int32)
    with batches(files, np.arange(count), 64, workers=workers) as found:
        for batch in found:
            stop = at + len(batch["label"])
            images[at:stop], labels[at:stop] = batch["image"], batch["label"]
            at = stop
    return {"images": images, "labels": labels}


def _grain() -> Any:
    try:
        import grain
    except ImportError as error:
        raise UserError(
            f"dataset.augment: its images are read by grain, which cannot be imported ({error}); "
            "pip install grain, or set --config.dataset.augment=none"
        ) from error
    return grain
