"""Preparing sets: from a folder, through the download manager, and every refusal in one line."""

import contextlib
import gzip
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.request

import pytest
import requests
from command import ROOT

from bpnjax.data import builders, tfds_prepare
from bpnjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("no_network")


def write_mnist(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count in (("train", 6), ("t10k", 4)):
        images = struct.pack(">4I", 2051, count, 28, 28) + bytes(range(196)) * 4 * count
        labels = struct.pack(">2I", 2049, count) + bytes(range(count))
        for kind, data in (("images-idx3", images), ("labels-idx1", labels)):
            (folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(data, 1))
    return folder


def refused(*args, **kwargs):
    with pytest.raises(UserError) as caught:
        tfds_prepare.ensure_prepared(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_prepare_from_archives_then_read_without_them(tmp_path, capsys):
    archives = write_mnist(tmp_path / "archives")
    builder = tfds_prepare.ensure_prepared("mnist:3.0.1", tmp_path / "data", archives, verify=False)
    assert capsys.readouterr().out == ""
    shutil.rmtree(archives)
    again = tfds_prepare.ensure_prepared("mnist", tmp_path / "data", archives)
    assert builder.data_dir == again.data_dir
    labels = [example["label"] for example in again.as_data_source("test")]
    assert sorted(labels) == [0, 1, 2, 3]


# Names.


def test_unknown_dataset(tmp_path):
    (tmp_path / "toyset" / "1.2.0").mkdir(parents=True)
    message = refused("mnits", tmp_path)
    assert "'mnits': unknown dataset" in message
    assert "did you mean mnist" in message
    assert str(tmp_path) in message
    assert "did you mean toyset" in refused("toy_set", tmp_path)
    assert "check the name" in refused("zzzzzzzzzz", tmp_path)
    assert "has toyset:1.2.0" in refused("toyset:2.0.0", tmp_path)


@pytest.mark.parametrize("name", ["", "a b", "huggingface:mnist", "mnist/x=1", None])
def test_not_a_name(tmp_path, name):
    assert f"dataset.name={name!r}: not a TFDS name" in refused(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("cifar10:3.0.0", "cifar10:3.0.2"),
        ("cifar10/x", "no such config"),
        ("cifar10_1/v9", "write cifar10_1/v4 or cifar10_1/v6"),
        ("cifar10_1:9.0.0", "only: 1.1.0"),
        ("smallnorb/x", "write smallnorb"),
    ],
)
def test_no_such_config_or_version(tmp_path, name, what):
    message = refused(name, tmp_path)
    assert f"dataset.name={name!r}" in message
    assert what in message


# The network.


@pytest.mark.parametrize("name", [*builders.NAMES, "smallnorb", "cifar10_1/v6"])
def test_unreachable_in_one_line_with_remedies(tmp_path, monkeypatch, name):
    asked = []
    monkeypatch.setattr(tfds_prepare, "unreachable", lambda urls: asked.extend(urls) or "no route")
    start = time.monotonic()
    message = refused(name, tmp_path)
    assert time.monotonic() - start < 10
    assert asked[0] in message and "(no route)" in message
    if name in builders.NAMES:
        assert asked == [builders.ARCHIVES[name][0].url]
        for archive in builders.ARCHIVES[name]:
            assert archive.filename in message
    for remedy in ("(1)", "config.dataset.manual_dir=DIR", "(2)", "TFDS_DATA_DIR", "(3)"):
        assert remedy in message
    assert not list(tmp_path.iterdir())


def test_probe_is_bounded_however_long_the_opener_hangs(monkeypatch):
    release = threading.Event()

    def hang(*_, **__):
        release.wait(60)
        raise TimeoutError

    monkeypatch.setattr(urllib.request, "urlopen", hang)
    start = time.monotonic()
    assert "no answer within 0.2 s" in tfds_prepare.unreachable(["http://a/x", "http://b/x"], 0.2)
    assert time.monotonic() - start < 2
    release.set()


def test_probe_answers(monkeypatch):
    def opener(request, **_):
        answer = {"a": None, "b": 404, "c": 503, "d": OSError("no\nroute")}[request.host]
        if isinstance(answer, int):
            raise urllib.error.HTTPError(request.full_url, answer, "", {}, None)
        if answer:
            raise answer
        return contextlib.nullcontext()

    monkeypatch.setattr(urllib.request, "urlopen", opener)
    assert tfds_prepare.unreachable(["http://a/x"]) == ""
    assert tfds_prepare.unreachable(["http://b/x"]) == ""
    assert tfds_prepare.unreachable(["http://c/x"]) == "HTTP status 503"
    assert tfds_prepare.unreachable(["http://d/x"]) == "no route"
    assert tfds_prepare.unreachable(["http://d/x", "http://a/x"]) == ""


def serve(monkeypatch, folder, status=200):
    """Makes the download manager of TFDS read a folder in place of the network."""

    class Session:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def mount(self, *_):
            pass

        def get(self, url, **_):
            data = (folder / url.rsplit("/", 1)[-1]).read_bytes()
            reply = types.SimpleNamespace(url=url, headers={}, status_code=status)
            reply.iter_content = lambda chunk_size: iter([data])
            return contextlib.nullcontext(reply)

    monkeypatch.setattr(requests, "Session", Session)


def test_download_is_verified(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_prepare, "unreachable", lambda urls: "")
    serve(monkeypatch, folder := write_mnist(tmp_path / "served"), status=404)
    assert "HTTP code: 404" in refused("mnist", tmp_path / "data")
    serve(monkeypatch, folder)
    message = refused("mnist", tmp_path / "data")
    assert "wrong checksum" in message and "(3)" in message
    small = [
        published(archive, folder / archive.filename) for archive in builders.ARCHIVES["mnist"]
    ]
    monkeypatch.setitem(builders.ARCHIVES, "mnist", tuple(small))
    assert tfds_prepare.ensure_prepared("mnist", tmp_path / "data").info.full_name == "mnist/3.0.1"
    # The archives are cached: to prepare again asks nobody.
    shutil.rmtree(tmp_path / "data" / "mnist")
    monkeypatch.setattr(tfds_prepare, "unreachable", lambda urls: pytest.fail("asked"))
    tfds_prepare.ensure_prepared("mnist", tmp_path / "data")


def published(archive, path):
    from tensorflow_datasets.core.download import checksums

    info = checksums.compute_url_info(path)
    return archive._replace(size=int(info.size), sha256=info.checksum)


# Archives in a folder.


def test_manual_dir_lacks_archives(tmp_path):
    archives = write_mnist(tmp_path / "archives")
    (archives / "t10k-labels-idx1-ubyte.gz").unlink()
    message = refused("mnist", tmp_path / "data", archives)
    assert f"manual_dir={str(archives)!r}: lacks t10k-labels-idx1-ubyte.gz" in message
    assert "smallnorb-5x46789x9x18x6x2x96x96-training-dat.mat" in refused(
        "smallnorb", tmp_path / "data", archives
    )
    assert "ILSVRC2012_img_train.tar" in refused("imagenet2012", tmp_path / "data")
    assert not (tmp_path / "data").exists()


# Failures on the way.


def test_interrupted_preparation_leaves_nothing(tmp_path):
    archives = write_mnist(tmp_path / "archives")
    code = f"""import os
from bpnjax.data import builders
from bpnjax.data import tfds_prepare
png, count = builders._png, [0]
def dying(image):
    count[0] += 1
    return png(image) if count[0] < 8 else os._exit(9)  # in the second split
builders._png = dying
tfds_prepare.ensure_prepared("mnist", {str(tmp_path / "data")!r}, {str(archives)!r}, verify=False)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    killed = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert killed.returncode == 9
    left = list((tmp_path / "data").rglob("*array_record*"))
    assert left and all("incomplete." in str(path) for path in left)
    assert "lacks" in refused("mnist", tmp_path / "data", tmp_path)
    builder = tfds_prepare.ensure_prepared("mnist", tmp_path / "data", archives, verify=False)
    assert len(builder.as_data_source("train")) == 6


def test_another_process_was_faster(tmp_path):
    archives = write_mnist(tmp_path / "archives")
    other = tfds_prepare.ensure_prepared("mnist", tmp_path / "other", archives, verify=False)

    def meanwhile(image, png=builders._png):
        shutil.copytree(other.data_dir, tmp_path / "data/mnist/3.0.1", dirs_exist_ok=True)
        return png(image)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builders, "_png", meanwhile)
        builder = tfds_prepare.ensure_prepared("mnist", tmp_path / "data", archives, verify=False)
    assert pathlib.Path(builder.data_dir) == tmp_path / "data/mnist/3.0.1"


def test_data_dir_that_cannot_be_written(tmp_path):
    archives = write_mnist(tmp_path / "archives")
    (tmp_path / "file").write_text("")
    message = refused("mnist", tmp_path / "file", archives, verify=False)
    assert f"cannot be prepared in {tmp_path / 'file'}" in message


def toy_class(name, examples):
    """Stands in for a builder of TFDS."""
    import tensorflow_datasets as tfds

    def info(self):
        features = tfds.features.FeaturesDict({"label": tfds.features.ClassLabel(num_classes=3)})
        return tfds.core.DatasetInfo(builder=self, features=features)

    body = {
        "__module__": __name__,
        "name": name,
        "VERSION": tfds.core.Version("1.2.0"),
        "_info": info,
        "_split_generators": lambda self, _: {"train": self._generate_examples()},
        "_generate_examples": examples,
    }
    with tfds.core.registered.skip_registration():
        return type(name, (tfds.core.GeneratorBasedBuilder,), body)


def test_builder_that_needs_tensorflow(tmp_path, monkeypatch, capsys):
    def examples(self):
        from tensorflow_datasets.core.utils.lazy_imports_utils import tensorflow as tf

        yield 0, {"label": int(tf.constant(0))}

    monkeypatch.setitem(sys.modules, "tensorflow", None)
    monkeypatch.setattr(tfds_prepare, "tfds_class", lambda name: toy_class(name, examples))
    message = refused("toyset", tmp_path)
    assert "to prepare (not to read) this set TFDS needs tensorflow" in message
    assert "pip install tensorflow, or copy a prepared set" in message
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.rglob("dataset_info.json"))


def test_builder_of_tfds_writes_array_record(tmp_path, monkeypatch):
    toy = toy_class("toyset", lambda self: ((i, {"label": i}) for i in range(3)))
    monkeypatch.setattr(tfds_prepare, "tfds_class", lambda name: toy)
    builder = tfds_prepare.ensure_prepared("toyset", tmp_path)
    assert builder.info.file_format.value == "array_record"
    assert sorted(example["label"] for example in builder.as_data_source("train")) == [0, 1, 2]
