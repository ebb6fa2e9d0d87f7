"""Finding and opening prepared sets, known to TFDS or not, with no network."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest
from command import ROOT

from bpnjax.data import tfds_prepare
from bpnjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("no_network")


def toy_class(name, configs=()):
    """A set that TFDS does not know, as other tools write them."""
    import tensorflow_datasets as tfds

    def info(self):
        features = tfds.features.FeaturesDict({"label": tfds.features.ClassLabel(num_classes=3)})
        return tfds.core.DatasetInfo(builder=self, features=features)

    body = {
        "__module__": __name__,
        "name": name,
        "VERSION": tfds.core.Version("1.2.0"),
        "BUILDER_CONFIGS": [tfds.core.BuilderConfig(name=config) for config in configs],
        "_info": info,
        "_split_generators": lambda self, _: {"train": self._generate_examples()},
        "_generate_examples": lambda self: ((i, {"label": i % 3}) for i in range(9)),
    }
    with tfds.core.registered.skip_registration():
        return type(name, (tfds.core.GeneratorBasedBuilder,), body)


def write_toy(data_dir, name="toyset", config=None, configs=()):
    toy = toy_class(name, configs)(data_dir=data_dir, config=config, file_format="array_record")
    toy.download_and_prepare()
    return pathlib.Path(toy.data_dir)


def refused(*args, **kwargs):
    with pytest.raises(UserError) as caught:
        tfds_prepare.ensure_prepared(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["toyset", "toyset:1.2.0", "toyset:1.*.*", "Toyset"])
def test_prepared_set_opens_fast_and_read_only(tmp_path, name):
    folder = write_toy(tmp_path)
    start = time.monotonic()
    builder = tfds_prepare.ensure_prepared(name, tmp_path)
    assert time.monotonic() - start < 1
    assert type(builder).__name__ == "ReadOnlyBuilder"
    assert pathlib.Path(builder.data_dir) == folder
    assert [len(builder.as_data_source("train")), builder.info.version] == [9, "1.2.0"]


def test_configs(tmp_path):
    write_toy(tmp_path, config="b", configs=("a", "b"))
    assert tfds_prepare.ensure_prepared("toyset/b", tmp_path).info.config_name == "b"
    assert "toyset/b" in refused("toyset", tmp_path)  # the default is a, which is not there
    write_toy(tmp_path, config="a", configs=("a", "b"))
    assert tfds_prepare.ensure_prepared("toyset", tmp_path).info.config_name == "a"


def test_default_data_dir_and_lazy_imports(tmp_path):
    write_toy(tmp_path)
    code = (
        "import sys; from bpnjax.data import builders, tfds_prepare\n"
        "assert 'tensorflow_datasets' not in sys.modules\n"
        "print(tfds_prepare.ensure_prepared('toyset').data_dir)\n"
        "assert 'tensorflow' not in sys.modules"
    )
    environment = os.environ | {"TFDS_DATA_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    )
    assert found.stdout.strip() == str(tmp_path / "toyset" / "1.2.0")


def _spoil_info(folder):
    (folder / "dataset_info.json").write_text("{")


def _empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def _no_splits(folder):
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"splits": []}))


DAMAGES = {
    "unreadable info": (_spoil_info, ""),
    "empty folder": (_empty, "dataset_info.json"),
    "no splits": (_no_splits, "no splits"),
    "no features": (lambda folder: (folder / "features.json").unlink(), ""),
    "missing shard": (lambda folder: shard(folder).unlink(), "is missing"),
    "truncated shard": (lambda folder: os.truncate(shard(folder), 1000), "holds 0 of 9"),
}


def shard(folder):
    return next(folder.glob("*.array_record*"))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_prepared_set(tmp_path, damage):
    spoil, what = DAMAGES[damage]
    folder = write_toy(tmp_path)
    spoil(folder)
    message = refused("toyset", tmp_path)
    assert f"{folder}: damaged prepared set" in message
    assert what in message
    assert "delete the folder" in message


def test_format_that_needs_tensorflow(tmp_path):
    folder = write_toy(tmp_path)
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    assert f"{folder}: the set is prepared as tfrecord" in refused("toyset", tmp_path)
