"""Folders of images, with one folder per class, decoded once into the cache.

root/train/cat/1.png  root/train/dog/7.jpg  root/test/cat/2.png ...
root/cat/1.png  root/dog/7.jpg ...
"""

import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from bpnjax.data import cache, crops, labels
from bpnjax.data.arrays import Arrays, Source, checked, fingerprint
from bpnjax.utils.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg")
_NO_DATA = ("thumbs.db", "desktop.ini", "__macosx")  # files of operating systems, ignored
_GREY = ("1", "L", "LA")
_DEEP = ("I", "F")  # modes of PIL that begin like this have more than 8 bits
_NAMED = 3
_THREADS = 4


class _Part(NamedTuple):
    """The files of one part with their classes."""

    files: list[pathlib.Path]
    labels: np.ndarray  # int32 [n]

    def take(self, rows: np.ndarray) -> "_Part":
        return _Part([self.files[i] for i in np.flatnonzero(rows)], self.labels[rows])


class _Encoded:
    """The examples of a part for `bpnjax.data.crops`; each worker gets a copy."""

    def __init__(self, part: _Part) -> None:
        self.part = part

    def __len__(self) -> int:
        return len(self.part.files)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"image": self.part.files[i].read_bytes(), "label": self.part.labels[i]}


def load(
    root: pathlib.Path, dataset: Any, source: Source, look: crops.Look | None = None
) -> Arrays:
    """Reads a folder of images.

    Args:
      root: a folder with ``train/CLASS/FILE`` and ``test/CLASS/FILE``, or with ``CLASS/FILE``.
        Files are PNG or JPEG. Hidden files are ignored.
      dataset: `config.dataset`: `resize`, `test_share`, `cache_dir`, `workers`.
      source: for messages.
      look: how images are cropped, or None.

    Returns:
      `Arrays` uint8 ``[n, h, w, channels]``, memory-mapped, with one channel if all images are
      grey. Classes have the names of their folders, in the order of `bpnjax.data.labels.in_order`.

    Raises:
      UserError: there are no images, a file cannot be read, or sizes differ.
    """
    names, parts = _listed(root, source)
    if "test" not in parts:
        marked = labels.held_out(parts["train"].labels, dataset.test_share, names, str(source))
        whole = parts["train"]
        parts = {"train": whole.take(~marked), "test": whole.take(marked)}
    files = {who: crops.of_source(_Encoded(part), look) for who, part in parts.items() if look}
    folder = _cache_folder(root, parts, dataset, look)
    arrays = cache.read(folder)
    if arrays is None:
        arrays = _decoded(parts, names, dataset, files, source)
        cache.write(folder, arrays)
        arrays = cache.read(folder) or arrays
    version = bytes(arrays["version"]).decode()
    made = Arrays(
        arrays["train_images"],
        arrays["train_labels"],
        arrays["test_images"],
        arrays["test_labels"],
        names,
        255.0,
        version,
        files.get("train"),
    )
    return checked(made, source)


def _cache_folder(
    root: pathlib.Path, parts: dict[str, _Part], dataset: Any, look: crops.Look | None
) -> pathlib.Path:
    """The cache folder of a folder of images, by path, names, sizes and times of its files."""
    listed = [
        (who, str(file.relative_to(root)), file.stat().st_size, file.stat().st_mtime_ns)
        for who, part in parts.items()
        for file in part.files
    ]
    key = json.dumps([str(root.resolve()), listed])
    size = "x".join(map(str, dataset.resize)) or "as-is"
    name = f"{hashlib.sha256(key.encode()).hexdigest()[:16]}-{look.shorter if look else ''}-{size}"
    return cache.cache_root(dataset.cache_dir) / "folders" / name


def _decoded(
    parts: dict[str, _Part],
    names: tuple[str, ...],
    dataset: Any,
    files: dict[str, crops.Files],
    source: Source,
) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    every = [file for part in parts.values() for file in part.files]
    if files:
        _sizes(every, source)
        try:
            for who, of_part in files.items():
                found = crops.centre_crops(of_part, dataset.workers)
                arrays |= {f"{who}_{what}": array for what, array in found.items()}
        except Exception:  # of any kind; `_decode` names the files that cannot be read
            _decode(every, (1, 1, 3), source)
            raise
    else:
        images = stacked(every, dataset.resize, source)
        first = len(parts["train"].files)
        for (who, part), rows in zip(parts.items(), (images[:first], images[first:]), strict=True):
            arrays |= {f"{who}_images": rows, f"{who}_labels": part.labels}
    # A centre crop is only a part of a file, and the version must depend on all of it.
    whole = (file.read_bytes() for file in every) if files else ()
    order = ("train_images", "test_images", "train_labels", "test_labels")
    version = fingerprint([*(arrays[name] for name in order), *whole], names)
    return arrays | {"version": np.frombuffer(version.encode(), np.uint8)}


def _listed(root: pathlib.Path, source: Source) -> tuple[tuple[str, ...], dict[str, _Part]]:
    """Class names, and the files of each part; only the part train if there is no other."""
    folders = {f.name: f for f in _entries(root, source, "put each into the folder of its class")}
    if not {"train", "test"} & set(folders):
        whole = _classes(folders, source)
        names = tuple(labels.in_order(whole))
        return names, {"train": _part(whole, names)}
    if beside := sorted(set(folders) - {"train", "test"}):
        raise UserError(
            f"{source} has the folder {beside[0]!r} beside 'train' or 'test'; name the two parts "
            "train and test, or give one folder per class and none of these"
        )
    if "train" not in folders:
        raise UserError(
            f"{source} has 'test' but no 'train'; name the two parts train and test, or give one "
            "folder per class"
        )
    fix = "put each into the folder of its class"
    found = {
        who: _classes({f.name: f for f in _entries(folders[who], source, fix)}, source)
        for who in folders
    }
    names = tuple(labels.in_order(found["train"]))
    if unknown := sorted(set(found.get("test", ())) - set(names)):
        raise UserError(
            f"{source} has the class {unknown[0]!r} in 'test' and not in 'train'; add images of it "
            "there, or leave it out"
        )
    return names, {who: _part(found[who], names) for who in ("train", "test") if who in found}


def _part(classes: dict[str, list[pathlib.Path]], names: Sequence[str]) -> _Part:
    files = [file for name in names for file in classes.get(name, ())]
    counts = [len(classes.get(name, ())) for name in names]
    return _Part(files, np.repeat(np.arange(len(names), dtype=np.int32), counts))


def _visible(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    for entry in sorted(folder.iterdir()):
        if not entry.name.startswith(".") and entry.name.lower() not in _NO_DATA:
            yield entry


def _entries(folder: pathlib.Path, source: Source, fix: str) -> Iterator[pathlib.Path]:
    """The folders in a folder, which must not hold images itself."""
    for entry in _visible(folder):
        if entry.is_dir():
            yield entry
        elif entry.suffix.lower() in SUFFIXES:
            raise UserError(f"{source} has images beside its folders, as {entry.name}; {fix}")


def _classes(folders: dict[str, pathlib.Path], source: Source) -> dict[str, list[pathlib.Path]]:
    """The image files of each class."""
    found = {}
    for name, folder in folders.items():
        found[name] = list(_visible(folder))
        for file in found[name]:
            if file.is_dir() or file.suffix.lower() not in SUFFIXES:
                what = "a folder" if file.is_dir() else f"a file that is not one of {SUFFIXES}"
                raise UserError(
                    f"{source}: {file} in a class folder is {what}; keep only images there, as "
                    "CLASS/FILE.png"
                )
        if not found[name]:
            raise UserError(
                f"{source}: the class folder {folder} holds no images; remove it, or add some"
            )
    if not found:
        raise UserError(
            f"{source} holds no folders of images; give train/CLASS/FILE.png and "
            "test/CLASS/FILE.png, or CLASS/FILE.png"
        )
    return found


def stacked(images: Sequence[Any], shape: Sequence[int], source: Source) -> np.ndarray:
    """Decodes images into one array.

    Args:
      images: images of PIL, or the paths of their files.
      shape: height, width and channels to resize to; () keeps the size.
      source: for messages.

    Returns:
      uint8 ``[n, h, w, channels]``, with one channel if all are grey and no shape is given.

    Raises:
      UserError: an image cannot be read or has more than 8 bits, or sizes differ.
    """
    sizes, grey = _sizes(images, source)
    channels = 1 if grey else 3
    if not shape:
        if other := [i for i, size in enumerate(sizes) if size != sizes[0]]:
            both = ", ".join(
                f"{_name(images, i)} has {' x '.join(map(str, sizes[i]))} pixels"
                for i in (0, other[0])
            )
            raise UserError(
                f"{source}: the images differ in size ({both}); give one shape (height, width, "
                f"channels), as {source.setting('resize', (32, 32, channels))}"
            )
        shape = (sizes[0][1], sizes[0][0], channels)
    return _decode(images, tuple(shape), source)


def _opened(image: Any) -> Image.Image:
    return Image.open(image) if isinstance(image, pathlib.Path) else image


def _name(images: Sequence[Any], i: int) -> str:
    return str(images[i]) if isinstance(images[i], pathlib.Path) else f"image {i}"


def _each(images: Sequence[Any], function: Callable[[int], Any], source: Source) -> list[Any]:
    """Calls a function with the number of each image; reports the images for which it fails."""

    def tried(i: int) -> Any:
        try:
            return function(i)
        except Exception as error:  # PIL may raise anything for a damaged file
            return error

    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(tried, range(len(images))))
    if bad := [i for i, one in enumerate(found) if isinstance(one, Exception)]:
        more = ", ..." if len(bad) > _NAMED else ""
        shown = ", ".join(_name(images, i) for i in bad[:_NAMED]) + more
        raise UserError(
            f"{source}: {len(bad)} image{'s' * (len(bad) > 1)} cannot be read: {shown} "
            f"({' '.join(str(found[bad[0]]).split())}); remove or replace them"
        )
    return found


def _sizes(images: Sequence[Any], source: Source) -> tuple[list[tuple[int, int]], bool]:
    """Width and height of each image, and whether all are grey, without decoding."""

    def look(i: int) -> tuple[tuple[int, int], str]:
        image = _opened(images[i])
        return image.size, image.mode

    seen = _each(images, look, source)
    for i, (_, mode) in enumerate(seen):
        if mode.startswith(_DEEP):
            raise UserError(
                f"{source}: {_name(images, i)} has pixels of more than 8 bits (mode {mode}); "
                "convert the images to 8 bits per channel"
            )
    return [size for size, _ in seen], all(mode in _GREY for _, mode in seen)


def _decode(images: Sequence[Any], shape: tuple[int, ...], source: Source) -> np.ndarray:
    height, width, channels = shape
    out = np.empty((len(images), *shape), np.uint8)

    def put(i: int) -> None:
        image = _opened(images[i]).convert("RGB" if channels == 3 else "L")
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        out[i] = np.asarray(image).reshape(shape)

    _each(images, put, source)
    return out
