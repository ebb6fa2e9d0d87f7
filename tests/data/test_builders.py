"""The builders without TensorFlow: small archives in, the same images and labels out."""

import gzip
import hashlib
import io
import json
import pathlib
import struct
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from bpnjax.data import builders
from bpnjax.utils.errors import UserError

COUNTS = {"train": 7, "test": 3}
MNIST_LIKE = ("mnist", "fashion_mnist")
CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-bin/", "cifar100": "cifar-100-binary/"}
CIFAR_ARCHIVES = {"cifar10": "cifar-10-binary.tar.gz", "cifar100": "cifar-100-binary.tar.gz"}


def idx(array):
    header = struct.pack(f">{1 + array.ndim}I", 2048 + array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def mnist_files(rng):
    files, arrays = {}, {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = rng.integers(0, 256, (COUNTS[split], 28, 28), np.uint8)
        labels = rng.integers(0, 10, COUNTS[split])
        files[f"{prefix}-images-idx3-ubyte.gz"] = idx(images)
        files[f"{prefix}-labels-idx1-ubyte.gz"] = idx(labels)
        arrays[split] = {"image": images[..., None], "label": labels}
    return files, arrays


def cifar_members(name, rng):
    if name == "cifar100":
        columns, batches = (
            {"coarse_label": 20, "label": 100},
            {"train": ["train"], "test": ["test"]},
        )
        members = {"fine_label_names.txt": names_text("fine", 100)}
        members["coarse_label_names.txt"] = names_text("coarse", 20)
    else:
        train = [f"data_batch_{i}" for i in range(5, 0, -1)]  # no order of names in archives
        columns, batches = {"label": 10}, {"train": train, "test": ["test_batch"]}
        members = {"batches.meta.txt": names_text("class", 10)}
    arrays = {}
    for split, files in batches.items():
        count = COUNTS[split] * len(files)
        images = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
        labels = {key: rng.integers(0, n, count) for key, n in columns.items()}
        arrays[split] = {"image": images, **labels}
        planes = images.transpose(0, 3, 1, 2).reshape(count, -1)
        records = np.concatenate([np.stack(list(labels.values()), 1).astype(np.uint8), planes], 1)
        parts = np.split(records, len(files))
        members |= {f: part.tobytes() for f, part in zip(files, parts[::-1], strict=True)}
    return {f if "." in f else f + ".bin": data for f, data in members.items()}, arrays


def names_text(prefix, count):
    return "".join(f"{prefix}_{i}\n" for i in range(count)).encode() + b"\n"


def write_mnist(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(gzip.compress(data, 1))
    return folder


def write_cifar(folder, name, members, extra=()):
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / CIFAR_ARCHIVES[name], "w:gz", compresslevel=1) as tar:
        for member in extra:
            tar.addfile(member)
        for file, data in members.items():
            member = tarfile.TarInfo(CIFAR_FOLDERS[name] + file)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return folder


def write_archives(folder, name):
    rng = np.random.default_rng(3)
    contents, arrays = mnist_files(rng) if name in MNIST_LIKE else cifar_members(name, rng)
    write_mnist(folder, contents) if name in MNIST_LIKE else write_cifar(folder, name, contents)
    return arrays


READ_BACK = """
import json, sys
import numpy as np
import tensorflow_datasets as tfds
data_dir, out = sys.argv[1:]
arrays, facts = {}, {}
for name in ("mnist", "fashion_mnist", "cifar10", "cifar100"):
    builder = tfds.builder(name, data_dir=data_dir)
    features = builder.info.features
    facts[name] = {k: features[k].names for k in features if k.endswith("label")}
    assert type(builder).__module__.startswith("tensorflow_datasets.")
    for split in ("train", "test"):
        source = tfds.data_source(name, data_dir=data_dir, split=split)
        for key in features:
            arrays[f"{name}/{split}/{key}"] = np.stack([np.asarray(e[key]) for e in source])
assert "tensorflow" not in sys.modules, "tensorflow was imported"
assert not [m for m in sys.modules if m.split(".")[0] == "bpnjax"], "bpnjax was imported"
np.savez(out, facts=json.dumps(facts), **arrays)
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The four sets, written here and read by TFDS alone in another process."""
    root = tmp_path_factory.mktemp("prepared")
    expected = {}
    for name in builders.NAMES:
        expected[name] = write_archives(root / "archives" / name, name)
        builder = builders.builder(name, root / "data", root / "archives" / name, verify=False)
        builder.download_and_prepare()
    command = [sys.executable, "-I", "-c", READ_BACK, root / "data", root / "read.npz"]
    subprocess.run(command, check=True, timeout=120)
    with np.load(root / "read.npz") as read:
        return expected, dict(read), json.loads(str(read["facts"])), root / "data"


@pytest.mark.parametrize("name", builders.NAMES)
def test_read_back_by_tfds_alone(prepared, name):
    expected, read = prepared[:2]
    for split, arrays in expected[name].items():
        order = match(read[f"{name}/{split}/image"], arrays["image"])
        assert sorted(order) == list(range(len(arrays["image"])))
        for key, array in arrays.items():
            np.testing.assert_array_equal(read[f"{name}/{split}/{key}"], array[order])
        if name not in MNIST_LIKE:
            ids = [f"{split}_{i:05d}".encode() for i in order]
            assert read[f"{name}/{split}/id"].tolist() == ids


def match(found, wanted):
    """For each image found, its place among those wanted: TFDS shuffles what it writes."""
    places = {image.tobytes(): i for i, image in enumerate(wanted)}
    return [places[image.tobytes()] for image in found]


def test_class_names(prepared):
    names = prepared[2]
    assert names["cifar10"]["label"] == names_text("class", 10).decode().split()
    assert names["cifar100"]["label"] == names_text("fine", 100).decode().split()
    assert names["cifar100"]["coarse_label"] == names_text("coarse", 20).decode().split()
    assert names["fashion_mnist"]["label"][::9] == ["T-shirt/top", "Ankle boot"]
    assert names["mnist"]["label"] == [str(i) for i in range(10)]


@pytest.mark.parametrize("name", builders.NAMES)
def test_same_facts_as_the_official_builder(name, tmp_path):
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import checksums

    published = tfds.core.utils.tfds_path() / "url_checksums" / f"{name}.txt"
    ours = {a.url: (a.size, a.sha256, a.filename) for a in builders.ARCHIVES[name]}
    assert ours == {
        url: (info.size, info.checksum, info.filename)
        for url, info in checksums.load_url_infos(published).items()
    }
    mine = builders.builder(name, tmp_path)
    official_class = tfds.builder_cls(name)
    official = official_class(data_dir=str(tmp_path))
    assert mine.url_infos == official.url_infos
    assert mine.info.full_name == official.info.full_name
    assert mine.info.supervised_keys == official.info.supervised_keys
    assert mine.info.features.to_json() == official.info.features.to_json()
    assert mine.info.features["label"].names == official.info.features["label"].names
    assert mine.info.file_format.value == "array_record"
    assert official_class.__module__.startswith("tensorflow_datasets.")


def test_images_are_png(prepared):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(prepared[3] / "mnist" / "3.0.1")
    source = builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})
    assert bytes(source[0]["image"]).startswith(b"\x89PNG")


def refused(name, data_dir, manual_dir, verify=False):
    """The one line with which preparing is refused; nothing is left that reads as prepared."""
    with pytest.raises(UserError) as caught:
        builders.builder(name, data_dir, manual_dir, verify).download_and_prepare()
    assert not list(pathlib.Path(data_dir).rglob("dataset_info.json"))
    assert not list(pathlib.Path(data_dir).rglob("*.array_record*"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
MNIST_DAMAGES = {
    "magic": (IMAGES, lambda d: b"\0\0\x08\x05" + d[4:], "magic"),
    "shape": (IMAGES, lambda d: d[:8] + struct.pack(">2I", 14, 56) + d[16:], "shape"),
    "short": (IMAGES, lambda d: d[:-1], "bytes for 7 items"),
    "long": (IMAGES, lambda d: d + b"\0", "bytes for 7 items"),
    "header": (IMAGES, lambda d: d[:9], "too few"),
    "empty": (LABELS, lambda d: d[:4] + bytes(4), "0 items"),
    "label": (LABELS, lambda d: d[:-1] + b"\x0a", "label 10 is out of range 0..9"),
    "count": (LABELS, lambda d: idx(np.zeros(6)), "6 labels for 7 images"),
    "magic of labels": (LABELS, lambda d: b"\0\0\x08\x03" + d[4:], "magic"),
}


@pytest.mark.parametrize("damage", MNIST_DAMAGES)
def test_malformed_idx(tmp_path, damage):
    file, change, what = MNIST_DAMAGES[damage]
    files, _ = mnist_files(np.random.default_rng(0))
    files[file] = change(files[file])
    message = refused("mnist", tmp_path / "data", write_mnist(tmp_path / "a", files))
    assert str(tmp_path / "a" / file) in message
    assert what in message
    assert "official archive" in message


@pytest.mark.parametrize("name", builders.NAMES)
def test_truncated_and_foreign_archives(tmp_path, name):
    write_archives(tmp_path / "a", name)
    path = tmp_path / "a" / builders.ARCHIVES[name][0].filename
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    message = refused(name, tmp_path / "data", tmp_path / "a")
    assert f"{path}: the gzip file is truncated" in message
    for content in (b"<html>not found</html>", gzip.compress(b"no tar" * 200)):
        path.write_bytes(content)
        message = refused(name, tmp_path / "data", tmp_path / "a")
        assert f"{path}: " in message and ("unpacked" in message or "magic" in message)


CIFAR_DAMAGES = {
    "missing": ("cifar10", "data_batch_3.bin", lambda d: None, "lacks the member"),
    "length": ("cifar10", "test_batch.bin", lambda d: d[:-5], "not a multiple of 3073"),
    "empty": ("cifar10", "data_batch_1.bin", lambda d: b"", "0 bytes"),
    "label": ("cifar10", "test_batch.bin", lambda d: b"\x0a" + d[1:], "label 10 is out of"),
    "names": ("cifar10", "batches.meta.txt", lambda d: d[8:], "9 class names, not 10"),
    "coarse": ("cifar100", "train.bin", lambda d: b"\x14" + d[1:], "label 20 is out of"),
    "fine": ("cifar100", "test.bin", lambda d: d[:1] + b"\x64" + d[2:], "label 100 is out of"),
    "length 100": ("cifar100", "train.bin", lambda d: d + b"\0", "not a multiple of 3074"),
    "same names": ("cifar100", "fine_label_names.txt", lambda d: d[:7] * 100, "names, not 100"),
}


@pytest.mark.parametrize("damage", CIFAR_DAMAGES)
def test_malformed_cifar(tmp_path, damage):
    name, file, change, what = CIFAR_DAMAGES[damage]
    members, _ = cifar_members(name, np.random.default_rng(0))
    members[file] = change(members[file])
    members = {key: data for key, data in members.items() if data is not None}
    message = refused(name, tmp_path / "data", write_cifar(tmp_path / "a", name, members))
    assert str(tmp_path / "a" / CIFAR_ARCHIVES[name]) in message
    assert file in message
    assert what in message


def test_members_count_by_exact_name_and_are_not_extracted(tmp_path):
    members = cifar_members("cifar10", np.random.default_rng(0))[0]
    del members["test_batch.bin"]
    link = tarfile.TarInfo(CIFAR_FOLDERS["cifar10"] + "test_batch.bin")
    link.type, link.linkname = tarfile.SYMTYPE, "data_batch_1.bin"
    outside = tarfile.TarInfo("../" + CIFAR_FOLDERS["cifar10"] + "test_batch.bin")
    folder = write_cifar(tmp_path / "a", "cifar10", members, [link, outside])
    message = refused("cifar10", tmp_path / "data", folder)
    assert "lacks the member(s) cifar-10-batches-bin/test_batch.bin" in message
    assert not list(tmp_path.rglob("*.bin"))


def test_missing_archives_are_named(tmp_path):
    files, _ = mnist_files(np.random.default_rng(0))
    del files[LABELS], files["t10k-images-idx3-ubyte.gz"]
    message = refused("mnist", tmp_path / "data", write_mnist(tmp_path / "a", files))
    assert f"{LABELS}, t10k-images-idx3-ubyte.gz" in message
    assert IMAGES not in message
    assert "https://storage.googleapis.com/cvdf-datasets/mnist/" + LABELS in message


def test_checksums_of_manual_archives(tmp_path, monkeypatch):
    write_archives(tmp_path / "a", "cifar10")
    path = tmp_path / "a" / CIFAR_ARCHIVES["cifar10"]
    message = refused("cifar10", tmp_path / "data", tmp_path / "a", verify=True)
    assert f"{path}: {path.stat().st_size} bytes" in message
    assert builders.ARCHIVES["cifar10"][0].sha256 in message
    good = builders.ARCHIVES["cifar10"][0]._replace(size=path.stat().st_size)
    monkeypatch.setitem(builders.ARCHIVES, "cifar10", (good,))
    assert good.url in refused("cifar10", tmp_path / "data", tmp_path / "a", verify=True)


def test_unknown_name(tmp_path):
    with pytest.raises(UserError, match=r"'kmnist'.*cifar100"):
        builders.builder("kmnist", tmp_path)


def test_gzip_files_count_by_their_content(tmp_path, monkeypatch):
    """Debian's Fashion-MNIST has other gzip headers, without a name; a changed label is refused."""
    files, _ = mnist_files(np.random.default_rng(0))
    folder = write_mnist(tmp_path, files)
    official = [
        archive._replace(content=hashlib.sha256(files[archive.filename]).hexdigest())
        for archive in builders.ARCHIVES["fashion_mnist"]
    ]
    assert all(len(archive.content) == 64 for archive in builders.ARCHIVES["mnist"])
    monkeypatch.setitem(builders.ARCHIVES, "fashion_mnist", tuple(official))
    builders.builder("fashion_mnist", tmp_path / "data", folder)
    for level, name in ((9, ""), (1, LABELS)):
        with gzip.GzipFile(name, "wb", level, (folder / LABELS).open("wb"), mtime=5) as file:
            file.write(files[LABELS])
        builders.builder("fashion_mnist", tmp_path / "data", folder)
    other = files[LABELS][:-1] + bytes([9 - files[LABELS][-1]])
    (folder / LABELS).write_bytes(gzip.compress(other))
    assert "the official archive of fashion_mnist has" in refused(
        "fashion_mnist", tmp_path / "data", folder, verify=True
    )
    (folder / LABELS).write_bytes(b"<html>")
    refused("fashion_mnist", tmp_path / "data", folder, verify=True)
