"""Images of mixed sizes, decoded, resized and cropped by grain as they are needed.

The usual treatment of images from the web: the shorter side is resized, then a part of it is cut
out, to train at random and perhaps mirrored, to test from the middle. What an example of an epoch
looks like is a function of (seed, task, epoch, place in the epoch), so a run that was cut goes on
at any step without replaying those before it, with any number of workers.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from bpnjax.utils.errors import UserError

_THREADS = 4  # of a process without workers; JPEGs are decoded outside Python's lock
_AHEAD = 2  # batches that a process has ready


class Look(NamedTuple):
    """How images become inputs of one shape."""

    shorter: int  # the side that is resized to this many pixels
    shape: tuple[int, int, int]  # height, width and channels of the part cut out


class Files(NamedTuple):
    """Where the images of a split are, encoded."""

    sources: tuple[Any, ...]  # of `tfds.data_source`, images not decoded
    which: np.ndarray  # int32 [n], the source of a row
    record: np.ndarray  # int32 [n], its place there
    look: Look

    def take(self, rows: np.ndarray) -> "Files":
        """Those of some rows."""
        return self._replace(which=self.which[rows], record=self.record[rows])


class Draws(NamedTuple):
    """What random crops are drawn from, beside an example's epoch and place."""

    seed: int
    task: int
    epoch: int  # of the first row of the plan
    places: int  # rows of the plan that an epoch takes


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
    """An image with its shorter side resized, bilinear with antialiasing.

    Args:
      encoded: a PNG or JPEG.
      look: `Look`.

    Returns:
      uint8 ``[h, w, channels]``; the longer side keeps the aspect, rounded down.

    Source: ``Resize(int)`` of torchvision, on PIL images.
    """
    from PIL import Image

    image = Image.open(io.BytesIO(encoded)).convert("RGB" if look.shape[2] == 3 else "L")
    short = min(image.size)
    width, height = (int(look.shorter * side / short) for side in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(height, width, look.shape[2])


def random_crop(image: np.ndarray, shape: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """A part of an image at a random place, mirrored with probability 1/2.

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
    """The middle of an image.

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
    """The generator of one row of a plan."""
    epoch, within = divmod(place, draws.places)
    return np.random.default_rng([draws.seed, draws.task, draws.epoch + epoch, within])


def _example(files: Files, draws: Draws | None, place: int, row: Any) -> dict[str, Any]:
    """One input and its label; nothing where the plan has -1."""
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
    """Reads images ahead, in an order that is given; use it in a ``with`` statement.

    Args:
      files: of the split.
      plan: rows int ``[m]``; -1 is an empty image, which fills a batch.
      size: of a batch.
      draws: what crops are drawn from; None cuts out the middle.
      start: the batch to begin with.
      workers: processes that decode; 0 leaves it to threads of this one.

    Yields:
      An iterator of ``{"image": uint8 [size, h, w, channels], "label": int32 [size]}``, the last
      one smaller where ``size`` does not divide m.

    Raises:
      UserError: grain is not installed.
    """
    grain = _grain()
    if workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():  # the workers ask for grain's flags; we define our own
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
    """All images of a split, cut out of the middle.

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
