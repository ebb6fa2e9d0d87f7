"""Builders of sets that TFDS lacks: small archives in the official layouts in, the images out."""

import io
import json
import pathlib
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from official_archives import (
    RNG,
    WRITE,
    encoded,
    note,
    smooth,
    write_actions,
    write_letters,
)
from PIL import Image

from bpnjax.config import default
from bpnjax.data import archives, sets, tfds_prepare
from bpnjax.data.sets import chars74k_letters, voc2012_actions
from bpnjax.data.sources import load_arrays
from bpnjax.utils.errors import UserError

NAMES = ("mit_indoor67", "fgvc_aircraft", "voc2012_actions", "chars74k_letters")
CASES = [
    ("mit_indoor67", None), ("fgvc_aircraft", "family"), ("fgvc_aircraft", "variant"),
    ("voc2012_actions", None), ("chars74k_letters", "natural"), ("chars74k_letters", "fonts"),
]  # fmt: skip
COUNTS = {  # to train, to test
    "mit_indoor67": (134, 67), "fgvc_aircraft": (200, 100), "voc2012_actions": (10, 10),
    "chars74k_letters": (434, 62),
}  # fmt: skip

READ_BACK = """
import sys
import tensorflow_datasets as tfds
source = tfds.builder_from_directory(sys.argv[1]).as_data_source("test")
print(len(source), source[0]["image"].shape)
assert "tensorflow" not in sys.modules, "tensorflow was imported"
assert not [m for m in sys.modules if m.split(".")[0] == "bpnjax"], "bpnjax was imported"
"""


@pytest.mark.parametrize(("name", "config"), CASES)
def test_images_labels_and_splits(tmp_path, name, config):
    write = WRITE[name]
    fonts = {"config": "fonts"} if config == "fonts" else {}
    expected = write(tmp_path / "archives", **fonts)
    full = f"{name}/{config}" if config else name
    builder = tfds_prepare.ensure_prepared(
        full, tmp_path / "data", tmp_path / "archives", verify=bool("fgvc" in name)
    )
    assert builder.info.full_name == f"{full}/1.0.0"
    classes = builder.info.features["label"].names
    assert len(classes) == sets.SETS[name].configs[config or ""].classes
    assert "tensorflow" not in sys.modules
    for split, count in zip(("train", "test"), COUNTS[name], strict=True):
        source = builder.as_data_source(split)
        assert len(source) == count == len(expected[split])
        for example in source:
            label, pixels = expected[split].pop(example["file_name"].decode())
            assert example["label"] == (label[config] if isinstance(label, dict) else label)
            assert example["image"].shape == pixels.shape
            exact = name in ("mit_indoor67", "chars74k_letters")
            away = np.abs(example["image"].astype(int) - pixels)
            assert away.max() == 0 if exact else away[:24].mean() < 6
        assert not expected[split]
    assert [classes[0], classes[-1]] == {
        "mit_indoor67": ["room_00", "room_66"],
        "fgvc_aircraft/family": ["Family 0/0", "Family 69/69"],
        "fgvc_aircraft/variant": ["Variant 0", "Variant 99"],
        "voc2012_actions": ["jumping", "walking"],
    }.get(full, ["0", "z"])
    if full == "mit_indoor67":  # another process, without this package
        command = [sys.executable, "-I", "-c", READ_BACK, builder.data_dir]
        said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        assert said.stdout.strip() == "67 (9, 8, 3)"


def test_a_cut_jpeg_keeps_its_quantization():
    pixels = np.concatenate([smooth(32, 24), RNG.integers(0, 256, (20, 24, 3), np.uint8)])
    data = encoded(pixels, "JPEG")
    cut = Image.open(archives.image_file("a", "b", data, cut_rows=20))
    whole = Image.open(io.BytesIO(data))
    assert cut.format == "JPEG" and cut.size == (24, 32)
    assert cut.quantization == whole.quantization
    # As in the whole image, but for rounding.
    away = np.asarray(cut).astype(int) - np.asarray(whole)[:32]
    assert np.abs(away).mean() < 1
    assert archives.image_file("a", "b", data).getvalue() == data


def test_loads_as_arrays(tmp_path):
    """The path of a run: name in, arrays of one shape out."""
    write_actions(tmp_path / "archives")
    tfds_prepare.ensure_prepared("voc2012_actions", tmp_path / "data", tmp_path / "archives", False)
    dataset = default().dataset
    dataset.data_dir, dataset.resize = str(tmp_path / "data"), (16, 16, 3)
    arrays = load_arrays("voc2012_actions", dataset)
    assert arrays.train_images.shape == (10, 16, 16, 3) and arrays.test_labels.shape == (10,)
    assert arrays.class_names == voc2012_actions.ACTIONS


# The sets that TFDS has: it prepares them, with TensorFlow; to read them takes none.


@pytest.mark.parametrize(
    "name", ["oxford_flowers102", "caltech_birds2011", "cars196", "svhn_cropped"]
)
def test_prepared_sets_of_tfds_are_read(tmp_path, name):
    import tensorflow_datasets as tfds

    features = tfds.builder_cls(name)(data_dir=str(tmp_path / "other")).info.features
    size = (32, 32) if name == "svhn_cropped" else (9, 11)
    more = {
        "bbox": tfds.features.BBox(0.0, 0.0, 1.0, 1.0),
    }

    def examples(_):
        for i in range(4):
            example = {
                "image": io.BytesIO(encoded(smooth(*size))),
                "label": features["label"].num_classes - 1 - i,
            }
            if "segmentation_mask" in features:
                example["segmentation_mask"] = io.BytesIO(encoded(np.ones(size, np.uint8)))
            example |= {k: more.get(k, f"text {i}") for k in set(features) - set(example)}
            yield i, example

    body = {
        "__module__": __name__, "name": name, "VERSION": tfds.core.Version("3.0.0"),
        "_info": lambda self: tfds.core.DatasetInfo(builder=self, features=features),
        "_split_generators": lambda self, _: {"train": examples(0), "test": examples(1)},
        "_generate_examples": None,
    }  # fmt: skip
    with tfds.core.registered.skip_registration():
        stand_in = type(name, (tfds.core.GeneratorBasedBuilder,), body)
    stand_in(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    dataset = default().dataset
    dataset.data_dir, dataset.resize = str(tmp_path), (12, 12, 3)
    arrays = load_arrays(name, dataset)
    assert arrays.train_images.shape == (4, 12, 12, 3)
    last = len(arrays.class_names) - 1
    assert sorted(arrays.train_labels) == [last - 3, last - 2, last - 1, last]
    assert last == {"oxford_flowers102": 101, "caltech_birds2011": 199, "cars196": 195}.get(name, 9)


@pytest.mark.parametrize("name", [*NAMES, "fgvc_aircraft/variant", "cars196", "svhn_cropped"])
def test_what_to_do_where_a_set_is_missing(tmp_path, monkeypatch, name):
    monkeypatch.setattr(tfds_prepare, "unreachable", lambda urls: "no route")
    message = refused(name, tmp_path / "data", "")
    for remedy in ("(1)", "manual_dir=DIR", "(2)", "TFDS_DATA_DIR", "(3)", "(no route)"):
        assert remedy in message
    files = {
        "mit_indoor67": ("indoorCVPR_09.tar, TrainImages.txt, TestImages.txt",),
        "voc2012_actions": ("VOCtrainval_11-May-2012.tar",),
        "chars74k_letters": ("EnglishImg.tgz",),
        "cars196": ("taken the set down", "cars_test.tgz", "cars_test_annos_withlabels.mat"),
        "svhn_cropped": ("test_32x32.mat",),
    }.get(name, ("fgvc-aircraft-2013b.tar.gz",))
    assert all(file in message for file in files)
    assert not (tmp_path / "data").exists()


# Refusals.


def refused(name, data_dir, manual_dir, verify=False):
    with pytest.raises(UserError) as caught:
        tfds_prepare.ensure_prepared(name, data_dir, manual_dir, verify)
    assert not list(pathlib.Path(data_dir).rglob("dataset_info.json"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_missing_cut_and_foreign_archives(tmp_path, name):
    message = refused(name, tmp_path / "data", tmp_path)
    archive = next(iter(sets.SETS[name].configs.values())).archives[0]
    assert f"lacks {archive.filename}" in message and archive.url in message
    WRITE[name](tmp_path / "a")
    path = tmp_path / "a" / archive.filename
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], b"<html>not found</html>"):
        path.write_bytes(data)
        message = refused(name, tmp_path / "data", tmp_path / "a")
        assert message.startswith(f"{path}: ") and "official archive" in message
    if archive.md5 or archive.sha256:
        path.write_bytes(whole)
        message = refused(name, tmp_path / "data", tmp_path / "a", verify=True)
        assert (archive.sha256 or archive.md5) in message and archive.url in message


def drop(*words):
    def change(layout, *more):
        for part in (layout, *more):
            for name in [n for n in part if all(word in n for word in words)]:
                del part[name]

    return change


def put(name, data):
    def change(layout, lists=None):
        part = lists if lists is not None and name in lists else layout
        part[name] = data(part[name]) if callable(data) else data

    return change


VOC, FGVC = "VOCdevkit/VOC2012/", "fgvc-aircraft-2013b/data/"
IMAGE = "English/Img/GoodImg/Bmp/Sample003/img003-00007.png"
LAYOUTS = {
    "an image": (
        "mit_indoor67",
        drop("room_13", "image 1"),
        "lacks 1 member(s), as Images/room_13",
    ),
    "a folder around": (
        "mit_indoor67",
        lambda layout, lists: [layout.update({"x/" + n: layout.pop(n)}) for n in list(layout)],
        "lacks 134 member(s)",
    ),
    "66 classes": (
        "mit_indoor67",
        put(
            "TrainImages.txt",
            lambda d: b"\n".join(r for r in d.splitlines() if b"room_07" not in r),
        ),
        "it has 66 classes, not 67",
    ),
    "nothing to test": (
        "mit_indoor67",
        put("TestImages.txt", lambda d: b"\n".join(d.splitlines()[1:])),
        "the split test has no image of 'room_66'",
    ),
    "no list": (
        "mit_indoor67",
        put("TestImages.txt", b"<html>moved</html>\n"),
        "'<html>moved</html>' is",
    ),
    "binary list": ("mit_indoor67", put("TestImages.txt", b"\xff\xfe\x00"), "not text in UTF-8"),
    "no image": (
        "mit_indoor67",
        put("Images/room_05/image 0.jpg", b"\xff\xd8\xff"),
        "room_05/image 0.jpg is not a readable image",
    ),
    "no families": (
        "fgvc_aircraft",
        drop("families.txt"),
        "lacks 1 member(s), as fgvc-aircraft-2013b/data/families.txt",
    ),
    "few families": (
        "fgvc_aircraft",
        put(f"{FGVC}families.txt", lambda d: d[12:]),
        "families.txt has 69 classes, not 70",
    ),
    "family": (
        "fgvc_aircraft",
        put(f"{FGVC}images_family_val.txt", b"0000001 Airbus\n"),
        "'0000001 Airbus', of no class in families.txt",
    ),
    "aircraft": ("fgvc_aircraft", drop("images/0000010"), "images/0000010.jpg"),
    "all banner": (
        "fgvc_aircraft",
        put(f"{FGVC}images/0000010.jpg", encoded(smooth(20, 9), "JPEG")),
        "has 20 rows, 20 of them below",
    ),
    "annotation": (
        "voc2012_actions",
        drop("2010_000003.xml"),
        "lacks VOCdevkit/VOC2012/Annotations/2010_000003.xml",
    ),
    "cut annotation": (
        "voc2012_actions",
        put(f"{VOC}Annotations/2010_000003.xml", lambda d: d[:-20]),
        "2010_000003.xml is not an annotation of VOC",
    ),
    "flag": (
        "voc2012_actions",
        put(f"{VOC}Annotations/2010_000003.xml", lambda d: d.replace(b">1<", b">yes<")),
        "2010_000003.xml is not an annotation",
    ),
    "action list": (
        "voc2012_actions",
        drop("Action/val.txt"),
        "lacks 1 member(s), as VOCdevkit/VOC2012/ImageSets/Action/val.txt",
    ),
    "action": (
        "voc2012_actions",
        put(f"{VOC}Annotations/2011_000009.xml", note({"other"})),
        "the split test has no image of 'walking'",
    ),
    "class of letters": (
        "chars74k_letters",
        drop("Sample030"),
        "has images of 61 classes, not of the 62",
    ),
    "few letters": ("chars74k_letters", drop("Sample030", "00002"), None),
    "fewer letters": (
        "chars74k_letters",
        lambda layout: [drop("Sample030", f"0000{i}")(layout) for i in (1, 2)],
        "the split test has no image of 'T'",
    ),
    "spoilt letter": (
        "chars74k_letters",
        put(IMAGE, lambda d: d[:40]),
        "img003-00007.png is not a readable image",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wrong_layouts(tmp_path, layout):
    name, change, what = LAYOUTS[layout]
    WRITE[name](tmp_path / "a", change)
    if what is None:  # seven are enough
        assert tfds_prepare.ensure_prepared(name, tmp_path / "data", tmp_path / "a", False)
        return
    message = refused(name, tmp_path / "data", tmp_path / "a")
    assert what in message
    assert "replace it with the official archive" in message


def test_links_are_not_followed(tmp_path):
    write_letters(tmp_path / "a", drop("Sample001"))
    path = tmp_path / "a" / "EnglishImg.tgz"
    with tarfile.open(path) as tar:
        contents = {m.name: tar.extractfile(m).read() for m in tar}
    with tarfile.open(path, "w:gz") as tar:
        link = tarfile.TarInfo("English/Img/GoodImg/Bmp/Sample001/img001-00001.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
        for name, data in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert "61 classes" in refused("chars74k_letters", tmp_path / "data", tmp_path / "a")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("fgvc_aircraft/maker", "no config 'maker'; write fgvc_aircraft/family or"),
        ("mit_indoor67/x", "'mit_indoor67/x': no config 'x'; write mit_indoor67"),
        ("chars74k_letters/natural:2.0.0", "no such version; the one there is is 1.0.0"),
        ("mit_indor67", "did you mean mit_indoor67"),
    ],
)
def test_names(tmp_path, name, what):
    assert what in refused(name, tmp_path / "data", "")


def test_known_facts_agree_with_tfds():
    """Where TFDS publishes the checksum of an archive, it is ours."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import checksums

    published = tfds.core.utils.tfds_path() / "url_checksums" / "voc.txt"
    infos = checksums.load_url_infos(published).values()
    (archive,) = sets.SETS["voc2012_actions"].configs[""].archives
    assert (archive.size, archive.sha256) in {(i.size, i.checksum) for i in infos}
    assert len(chars74k_letters.CLASS_NAMES) == 62
    assert not {*NAMES} & set(tfds.list_builders(with_community_datasets=False))


def test_every_set_says_where_it_is_from(tmp_path):
    assert set(sets.SETS) == set(NAMES)
    builder = sets.builder("fgvc_aircraft", None, tmp_path)
    info = json.loads(builder.info.as_json)
    assert info["configName"] == "family"
    assert "Maji" in info["citation"] and "non-commercial" in json.dumps(info)


def test_a_sequence_of_sets(tmp_path):
    """As `configs/eight_tasks.py` has it: a head each, ImageNet's mean and deviation."""
    from bpnjax.data import load_sequence

    for write in WRITE.values():
        write(tmp_path / "archives")
    for name in NAMES:
        tfds_prepare.ensure_prepared(name, tmp_path / "data", tmp_path / "archives", verify=False)
    config = default()
    config.dataset.name = ",".join(NAMES)
    config.dataset.data_dir, config.dataset.resize = str(tmp_path / "data"), (8, 8, 3)
    config.dataset.normalize = "imagenet"
    config.sequence.kind, config.sequence.heads = "datasets", "multi"
    config.train.batch_size = 8
    sequence = load_sequence(config)
    assert sequence.train.count.tolist() == [COUNTS[name][0] for name in NAMES]
    assert sequence.test.count.tolist() == [COUNTS[name][1] for name in NAMES]
    assert sequence.classes.sum(1).tolist() == [67, 70, 10, 62]
    assert sequence.class_names[67] == "fgvc_aircraft/Family 0/0"
    white = 255 * sequence.scale + sequence.shift
    np.testing.assert_allclose(white, [0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225], rtol=1e-6)
    np.testing.assert_allclose(sequence.shift[0], -0.485 / 0.229, rtol=1e-6)
    config.dataset.resize = (8, 8, 1)
    with pytest.raises(UserError, match="dataset.normalize: 'imagenet' needs images of 3"):
        load_sequence(config)
