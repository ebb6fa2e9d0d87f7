"""Decoded images are kept whole or not at all, and what is damaged is said."""

import os
import shutil
import time
import types

import numpy as np
import pytest
from command import half

from bpnjax import main
from bpnjax.data import cache, tfds_prepare
from bpnjax.run import train

pytestmark = pytest.mark.usefixtures("compile_once")


class FakeBuilder:
    """What `bpnjax.data.sources` asks of a TFDS builder: random images of ten classes."""

    name = "fakeset"

    def __init__(self, folder):
        folder.mkdir(exist_ok=True)
        (folder / "dataset_info.json").write_text("{}")
        self.data_dir = folder
        self.decoded = []
        names = [f"class {i}" for i in range(10)]
        self.info = types.SimpleNamespace(
            features={"image": None, "label": types.SimpleNamespace(names=names)},
            splits={
                "train": types.SimpleNamespace(num_examples=400),
                "test": types.SimpleNamespace(num_examples=100),
            },
            version="1.0.0",
        )

    def as_data_source(self, split):
        self.decoded.append(split)
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (self.info.splits[split].num_examples, 4, 4, 1), np.uint8)

        class Source(list):
            def __getitems__(self, rows):
                return [self[row] for row in rows]

        return Source({"image": image, "label": i % 10} for i, image in enumerate(images))


@pytest.fixture
def cached(tmp_path, monkeypatch, tiny_flags):
    """A decoded set in its cache: the builder, the train split's folder, and flags that use it."""
    builder = FakeBuilder(tmp_path / "prepared")
    monkeypatch.setattr(tfds_prepare, "ensure_prepared", lambda *args: builder)
    flags = tiny_flags(dataset__name="fakeset", dataset__cache_dir=tmp_path / "cache")
    config, _, _ = main.parse(flags)
    train.load_sequence(config)
    assert builder.decoded == ["train", "test"]
    train.load_sequence(config)
    assert builder.decoded == ["train", "test"]  # the second time from the cache
    (split,) = (tmp_path / "cache").rglob("train-as-is")
    return builder, split, flags


def test_cache_serves_what_was_decoded(cached):
    builder, split, _ = cached
    arrays = cache.read(split)
    source = builder.as_data_source("train")
    np.testing.assert_array_equal(arrays["images"], [e["image"] for e in source])
    np.testing.assert_array_equal(arrays["labels"], [e["label"] for e in source])
    assert (arrays["images"].dtype, arrays["labels"].dtype) == (np.uint8, np.int32)
    assert not arrays["images"].flags.writeable


def flip_last_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated images": lambda split: half(split / "images.npy"),
    "empty images": lambda split: (split / "images.npy").write_bytes(b""),
    "one bit of the labels": lambda split: flip_last_byte(split / "labels.npy"),
    "no labels": lambda split: (split / "labels.npy").unlink(),
    "no manifest": lambda split: (split / "manifest.json").unlink(),
    "truncated manifest": lambda split: half(split / "manifest.json"),
    "manifest of another kind": lambda split: (split / "manifest.json").write_text("[1]"),
    "manifest of nothing": lambda split: (split / "manifest.json").write_text("{}"),
    "file for folder": lambda split: (shutil.rmtree(split), split.write_text("x")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cache(refused, cached, damage):
    builder, split, flags = cached
    DAMAGES[damage](split)
    refused(flags, "dataset.cache_dir", str(split), "damaged", "delete")
    assert builder.decoded == ["train", "test"]
    shutil.rmtree(split) if split.is_dir() else split.unlink()  # the fix that it names
    train.load_sequence(main.parse(flags)[0])
    assert builder.decoded == ["train", "test", "train"]


def test_cache_write_is_whole_or_not_at_all(tmp_path, monkeypatch):
    arrays = {"images": np.arange(12, dtype=np.uint8).reshape(3, 4), "labels": np.arange(3)}
    assert cache.read(tmp_path / "set" / "train") is None
    with monkeypatch.context() as patch:

        def full(path, array):
            raise OSError(28, "No space left on device")

        patch.setattr(np, "save", full)
        with pytest.raises(OSError):
            cache.write(tmp_path / "set" / "train", arrays)
    assert list((tmp_path / "set").iterdir()) == []
    cache.write(tmp_path / "set" / "train", arrays)
    cache.write(tmp_path / "set" / "train", arrays)  # as where another run was first
    assert [p.name for p in (tmp_path / "set").iterdir()] == ["train"]
    found = cache.read(tmp_path / "set" / "train")
    assert sorted(found) == ["images", "labels"]
    np.testing.assert_array_equal(found["images"], arrays["images"])


def test_what_a_killed_process_left_in_the_cache_goes_after_a_day(tmp_path):
    arrays = {"labels": np.arange(3)}
    for name, age in ((".partial-old", 2 * 86400), (".partial-now", 60), ("other", 2 * 86400)):
        (tmp_path / name).mkdir()
        then = time.time() - age
        os.utime(tmp_path / name, (then, then))
    cache.write(tmp_path / "train", arrays)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".partial-now", "other", "train"]


def test_cache_that_cannot_be_written(refused, cached, tmp_path):
    *_, flags = cached
    (tmp_path / "file").write_text("mine")
    cache_dir = f"--config.dataset.cache_dir={tmp_path / 'file'}"
    refused([*flags, cache_dir], "dataset.cache_dir", "file", "--config.dataset.cache_dir=DIR")
