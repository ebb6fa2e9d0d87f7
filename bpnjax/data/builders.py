"""TFDS builders of mnist, fashion_mnist, cifar10 and cifar100 that do not need TensorFlow.

Prepared sets have the name, version, features and splits of the official TFDS builders. So
`tfds.data_source(name, data_dir=..., split=...)` reads them without this package.
"""

import gzip
import io
import os
import pathlib
import struct
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from bpnjax.data import archives
from bpnjax.data.archives import Archive, Path, malformed, unpacking
from bpnjax.utils.errors import UserError

# Address, then file name, size and sha256 of each archive, as in url_checksums/ of TFDS.
_PUBLISHED = {
    "mnist": """\
https://storage.googleapis.com/cvdf-datasets/mnist/
train-images-idx3-ubyte.gz 9912422 440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609
train-labels-idx1-ubyte.gz 28881 3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c
t10k-images-idx3-ubyte.gz 1648877 8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6
t10k-labels-idx1-ubyte.gz 4542 f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6
""",
    "fashion_mnist": """\
http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/
train-images-idx3-ubyte.gz 26421880 3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84
train-labels-idx1-ubyte.gz 29515 a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845
t10k-images-idx3-ubyte.gz 4422102 346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073
t10k-labels-idx1-ubyte.gz 5148 67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5
""",
    "cifar10": """\
https://www.cs.toronto.edu/~kriz/
cifar-10-binary.tar.gz 170052171 c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd
""",
    "cifar100": """\
https://www.cs.toronto.edu/~kriz/
cifar-100-binary.tar.gz 168513733 58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec
""",
}
# sha256 of the unpacked gzip files above, in their order. Some distributors, such as Debian's
# dataset-fashion-mnist, have the same contents with other gzip headers.
_CONTENTS = {
    "mnist": """\
ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db
65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5
0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7
ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2
""",
    "fashion_mnist": """\
c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888
bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9
5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b
0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34
""",
}


def _published(name: str) -> Iterator[Archive]:
    base, *rows = _PUBLISHED[name].split()
    contents = _CONTENTS.get(name, "").split() or [""] * (len(rows) // 3)
    for *row, content in zip(rows[::3], rows[1::3], rows[2::3], contents, strict=True):
        file, size, sha256 = row
        yield Archive(base + file, file, int(size), sha256, content=content)


ARCHIVES = {name: tuple(_published(name)) for name in _PUBLISHED}
NAMES = tuple(ARCHIVES)

_VERSIONS = {"mnist": "3.0.1", "fashion_mnist": "3.0.1", "cifar10": "3.0.2", "cifar100": "3.0.2"}
_FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
Labels = dict[str, tuple[int, str]]
# Folder, files of each split, and {feature: (classes, file of their names)}, in the order of
# the label bytes of a record.
_CIFAR: dict[str, tuple[str, dict[str, list[str]], Labels]] = {
    "cifar10": (
        "cifar-10-batches-bin/",
        {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]},
        {"label": (10, "batches.meta.txt")},
    ),
    "cifar100": (
        "cifar-100-binary/",
        {"train": ["train.bin"], "test": ["test.bin"]},
        {"coarse_label": (20, "coarse_label_names.txt"), "label": (100, "fine_label_names.txt")},
    ),
}


def _read_idx(path: Path, magic: int, dims: tuple[int, ...]) -> np.ndarray:
    """The array in a gzipped idx file of bytes; `dims` are the dimensions after the first."""
    with unpacking(path), gzip.open(os.fspath(path)) as file:
        data = file.read()
    header = struct.Struct(f">{2 + len(dims)}I")
    if len(data) < header.size:
        raise malformed(path, f"{len(data)} bytes are too few for an idx header")
    found, count, *shape = header.unpack_from(data)
    if found != magic or tuple(shape) != dims:
        raise malformed(path, f"idx magic and item shape are {found} {shape}, not {magic} {dims}")
    expected = header.size + count * int(np.prod(dims, dtype=int))
    if not count or len(data) != expected:
        raise malformed(path, f"{len(data)} bytes for {count} items, not {expected}")
    return np.frombuffer(data, np.uint8, offset=header.size).reshape(count, *dims)


def _check_labels(path: Path, labels: np.ndarray, classes: int) -> None:
    if labels.max() >= classes:
        raise malformed(path, f"label {labels.max()} is out of range 0..{classes - 1}")


def _png(image: np.ndarray) -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    file.seek(0)
    return file


def _mnist_examples(images_path: Path, labels_path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    images = _read_idx(images_path, 2051, (28, 28))
    labels = _read_idx(labels_path, 2049, ())
    if len(images) != len(labels):
        raise malformed(labels_path, f"{len(labels)} labels for {len(images)} images")
    _check_labels(labels_path, labels, 10)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield index, {"image": _png(image), "label": int(label)}


def _read_members(path: Path, names: Iterable[str]) -> dict[str, bytes]:
    """The contents of the named regular files in a tar.gz, read in one pass in memory."""
    found = {}
    with unpacking(path), tarfile.open(os.fspath(path), "r:gz") as tar:
        for member in tar:
            # Links are not followed: only a member with exactly this name counts.
            if member.name in names and member.isreg():
                found[member.name] = archives.contents(tar, member)
    if missing := sorted(set(names) - set(found)):
        raise malformed(path, f"lacks the member(s) {', '.join(missing)}")
    return found


def _class_names(path: Path, member: str, data: bytes, classes: int) -> list[str]:
    names = [line for line in data.decode("utf-8", "replace").split("\n") if line]
    if len(names) != classes or len(set(names)) != classes:
        raise malformed(path, f"{member} has {len(set(names))} class names, not {classes}")
    return names


def _cifar_records(path: Path, member: str, data: bytes, labels: Labels) -> np.ndarray:
    size = len(labels) + 3 * 32 * 32
    if not data or len(data) % size:
        raise malformed(path, f"{member} has {len(data)} bytes, not a multiple of {size}")
    records = np.frombuffer(data, np.uint8).reshape(-1, size)
    for column, (classes, _) in enumerate(labels.values()):
        _check_labels(f"{os.fspath(path)}: {member}", records[:, column], classes)
    return records


def _cifar_examples(
    split: str, parts: Sequence[np.ndarray], labels: Labels
) -> Iterator[tuple[int, dict[str, Any]]]:
    index = 0
    for records in parts:
        images = records[:, len(labels) :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        for record, image in zip(records, images, strict=True):
            example: dict[str, Any] = {feature: int(record[i]) for i, feature in enumerate(labels)}
            example |= {"id": f"{split}_{index:05d}", "image": _png(np.ascontiguousarray(image))}
            yield index, example
            index += 1


def _cifar_splits(
    name: str, files: Mapping[str, Any], features: Any
) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
    """The splits of a CIFAR set; writes the class names of the archive into `features`."""
    folder, parts, labels = _CIFAR[name]
    (path,) = files.values()
    wanted = [file for _, file in labels.values()] + parts["train"] + parts["test"]
    members = _read_members(path, {folder + file for file in wanted})
    for feature, (classes, file) in labels.items():
        features[feature].names = _class_names(path, file, members[folder + file], classes)
    return {
        split: _cifar_examples(
            split, [_cifar_records(path, n, members[folder + n], labels) for n in names], labels
        )
        for split, names in parts.items()
    }


def _features(name: str, features: Any) -> dict[str, Any]:
    if name in _CIFAR:
        labels = {
            label: features.ClassLabel(num_classes=classes)
            for label, (classes, _) in _CIFAR[name][2].items()
        }
        return {"id": features.Text(), "image": features.Image(shape=(32, 32, 3)), **labels}
    classes = {"names": _FASHION_CLASSES} if name == "fashion_mnist" else {"num_classes": 10}
    return {"image": features.Image(shape=(28, 28, 1)), "label": features.ClassLabel(**classes)}


def manual_archives(name: str, manual_dir: Path, verify: bool = True) -> dict[str, pathlib.Path]:
    """Finds the official archives of a set in a folder.

    Args:
        name: One of `NAMES`.
        manual_dir: The folder that holds them under their official file names.
        verify: Whether to compare size and sha256 with those that TFDS publishes.

    Returns:
        A dict of file name to path.

    Raises:
        UserError: The folder or an archive is missing, or an archive is not the official one.
    """
    return archives.find(name, ARCHIVES[name], manual_dir, verify)


def builder(name: str, data_dir: Path, manual_dir: Path = "", verify: bool = True) -> Any:
    """Makes the builder, without TensorFlow, of one of the four sets.

    It writes array_record. It is not registered in TFDS: `tfds.builder(name)` stays the official
    one.

    Args:
        name: One of `NAMES`.
        data_dir: The folder of prepared sets; "" is the TFDS default.
        manual_dir: A folder that holds the official archives; "" downloads them with the
            download manager of TFDS, which verifies their checksums.
        verify: Whether to verify the checksums of the archives in `manual_dir` too. False allows
          small archives of the same layout.

    Returns:
        A `tfds.core.DatasetBuilder`.

    Raises:
        UserError: The name is unknown, or archives in `manual_dir` are missing or not official.

    Source:
        image_classification/mnist.py, image_classification/cifar.py and url_checksums/ of
        https://github.com/tensorflow/datasets
    """
    if name not in ARCHIVES:
        raise UserError(f"dataset.name={name!r}: no builder here; use one of {', '.join(NAMES)}")
    paths = manual_archives(name, manual_dir, verify) if manual_dir else None

    import tensorflow_datasets as tfds  # here, because its import is slow
    from tensorflow_datasets.core.download.checksums import UrlInfo

    def info(self: Any) -> Any:
        features = tfds.features.FeaturesDict(_features(name, tfds.features))
        keys = ("image", "label")
        return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=keys)

    def split_generators(self: Any, dl_manager: Any) -> dict[str, Any]:
        files = paths or dl_manager.download({a.filename: a.url for a in ARCHIVES[name]})
        if name in _CIFAR:
            return _cifar_splits(name, files, self.info.features)
        # ARCHIVES lists images and labels for training, then those for testing.
        files = [files[archive.filename] for archive in ARCHIVES[name]]
        return {"train": _mnist_examples(*files[:2]), "test": _mnist_examples(*files[2:])}

    body = {
        "__module__": __name__,
        "name": name,
        "VERSION": tfds.core.Version(_VERSIONS[name]),
        "url_infos": {a.url: UrlInfo(a.size, a.sha256, a.filename) for a in ARCHIVES[name]},
        "_info": info,
        "_split_generators": split_generators,
        "_generate_examples": None,  # abstract in TFDS; here the splits hold their generators
    }
    with tfds.core.registered.skip_registration():
        builder_class = type(name, (tfds.core.GeneratorBasedBuilder,), body)
    return builder_class(data_dir=data_dir or None, file_format="array_record")
