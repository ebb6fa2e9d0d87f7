"""Small archives in the layouts of the official ones, and the images that are in them."""

import io
import tarfile

import numpy as np
from PIL import Image

from bpnjax.data.sets import voc2012_actions

RNG = np.random.default_rng(5)


def encoded(pixels, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return file.getvalue()


def smooth(height, width):
    """An image that JPEG keeps nearly as it is, unlike any other one made here."""
    corners = Image.fromarray(RNG.integers(0, 256, (2, 2, 3), np.uint8))
    return np.asarray(corners.resize((width, height), Image.Resampling.BILINEAR))


def write_tar(path, contents, mode="w:gz"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def text(rows):
    return ("\n".join(rows) + "\n").encode()


class Layout(dict):
    """Members of an archive; ``expected`` is {split: {file name: (label, pixels)}}."""

    def __init__(self):
        super().__init__()
        self.expected = {"train": {}, "test": {}}

    def add(self, split, member, file_name, label, pixels, data):
        self[member] = data
        if split:
            self.expected[split][file_name] = (label, pixels)


def scenes():
    """67 folders, two images each to train and one to test, one in no list."""
    layout, listed = Layout(), {"train": [], "test": []}
    for label in reversed(range(67)):
        room = f"room_{label:02d}"
        for i, split in enumerate(("train", "train", "test", "")):
            pixels = smooth(9, 8)
            name = f"{room}/image {i}.jpg"
            layout.add(split, f"Images/{name}", name, label, pixels, encoded(pixels))
            if split:
                listed[split].append(name)
    grey = RNG.integers(0, 256, (5, 7), np.uint8)  # some of the official images are grey
    name = listed["train"][0]
    layout.add("train", f"Images/{name}", name, 66, np.stack([grey] * 3, -1), encoded(grey))
    return layout, {f"{k.title()}Images.txt": text(rows) for k, rows in listed.items()}


def write_scenes(folder, change=lambda layout, lists: None):
    layout, lists = scenes()
    change(layout, lists)
    write_tar(folder / "indoorCVPR_09.tar", layout, "w")
    for name, data in lists.items():
        (folder / name).write_bytes(data)
    return layout.expected


def aircraft():
    """70 families of 100 variants; an image of each variant in each of the three lists."""
    layout, lists = Layout(), {}
    families = [f"Family {i}/{i}" for i in range(70)]
    variants = [f"Variant {i}" for i in range(100)]
    data = "fgvc-aircraft-2013b/data/"
    for label in range(100):
        for i, part in enumerate(("train", "val", "test")):
            image = f"{10 * label + i:07d}"
            pixels = smooth(30, 16)
            split = "test" if part == "test" else "train"
            where = f"{data}images/{image}.jpg"
            # The image above, random pixels as the banner below.
            banner = RNG.integers(0, 256, (20, 16, 3), np.uint8)
            jpeg = encoded(np.concatenate([pixels, banner]), "JPEG")
            labels = {"variant": label, "family": label % 70}
            layout.add(split, where, f"{image}.jpg", labels, pixels, jpeg)
            rows = {"variant": variants[label], "family": families[label % 70]}
            for level, name in rows.items():
                lists.setdefault(f"images_{level}_{part}.txt", []).append(f"{image} {name}")
    lists |= {"families.txt": families, "variants.txt": variants}
    layout |= {data + name: text(rows) for name, rows in lists.items()}
    return layout


def write_aircraft(folder, change=lambda layout: None):
    layout = aircraft()
    change(layout)
    write_tar(folder / "fgvc-aircraft-2013b.tar.gz", layout)
    return layout.expected


def note(*persons):
    """An annotation as VOC writes it; a person is the set of what is done, None if unmarked."""
    rows = ["<annotation><folder>VOC2012</folder>"]
    for person in persons:
        rows.append("<object><name>person</name><bndbox><xmax>9</xmax></bndbox>")
        if person is not None:
            flags = (*voc2012_actions.ACTIONS, "other")
            marks = "".join(f"<{f}>{int(f in person)}</{f}>" for f in flags)
            rows.append(f"<actions>{marks}</actions>")
        rows.append("</object>")
    return ("\n".join(rows) + "</annotation>").encode()


def actions():
    """Each action once to train and to test, and images that belong to none."""
    layout, lists = Layout(), {"train": [], "val": []}
    folder = "VOCdevkit/VOC2012/"

    def add(split, stem, label, *persons):
        pixels = smooth(10, 12)
        layout[f"{folder}Annotations/{stem}.xml"] = note(*persons)
        where = f"{folder}JPEGImages/{stem}.jpg"
        kept = {"train": "train", "val": "test"}[split] if label is not None else ""
        layout.add(kept, where, f"{stem}.jpg", label, pixels, encoded(pixels, "JPEG"))
        lists[split].append(stem)

    for label, action in enumerate(voc2012_actions.ACTIONS):
        add("train", f"2010_{label:06d}", label, {action})
        add("val", f"2011_{label:06d}", label, {action}, {action}, None)
    nothing = [({"other"},), ({"jumping", "phoning"},), ({"jumping"}, {"phoning"}), (set(),)]
    nothing += [({"jumping"}, {"other"}), ({"jumping"}, set()), (), (None,)]
    for i, persons in enumerate(nothing):
        add("train", f"2012_{i:06d}", None, *persons)
    lists["train"][0] += " 1"  # a line may name the person
    for split, rows in lists.items():
        layout[f"{folder}ImageSets/Action/{split}.txt"] = text(rows)
    layout[f"{folder}ImageSets/Main/train.txt"] = text(["2008_000001"])
    layout[f"{folder}Annotations/2008_000001.xml"] = b"not of this task, and never parsed"
    return layout


def write_actions(folder, change=lambda layout: None):
    layout = actions()
    change(layout)
    write_tar(folder / "VOCtrainval_11-May-2012.tar", layout, "w")
    return layout.expected


def letters(config="natural"):
    """Eight images of each of 62 classes: the seventh by name is to test."""
    layout = Layout()
    for label in range(62):
        sample = f"Sample{label + 1:03d}"
        for i in reversed(range(8)):
            name = f"{sample}/img{label + 1:03d}-{i + 1:05d}.png"
            # "Bad" sorts before "Good".
            kind = "BadImag" if i < 5 else "GoodImg"
            where = f"Fnt/{name}" if config == "fonts" else f"Img/{kind}/Bmp/{name}"
            pixels = RNG.integers(0, 256, (6, 5, 3), np.uint8)
            if config == "fonts":  # they are grey
                pixels = np.repeat(pixels[..., :1], 3, -1)
            data = encoded(pixels[..., 0] if config == "fonts" else pixels)
            layout.add(
                "test" if i == 6 else "train", f"English/{where}", where, label, pixels, data
            )
            if config == "natural":
                layout[f"English/Img/{kind}/Msk/{name}"] = encoded(pixels)
    layout["English/Img/all.txt~"] = b""
    return layout


def write_letters(folder, change=lambda layout: None, config="natural"):
    layout = letters(config)
    change(layout)
    file = {"natural": "EnglishImg.tgz", "fonts": "EnglishFnt.tgz"}[config]
    write_tar(folder / file, layout)
    return layout.expected


WRITE = {
    "mit_indoor67": write_scenes,
    "fgvc_aircraft": write_aircraft,
    "voc2012_actions": write_actions,
    "chars74k_letters": write_letters,
}
