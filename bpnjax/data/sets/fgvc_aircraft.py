"""FGVC-Aircraft: 10,000 images of aircraft, in 70 families or 100 variants.

Disputed: Wen et al. 2020 give 70 classes, which are the families; others of the same sequence of
sets use the 100 variants. Both are here, as configs. The 10,200 images of the paper are mentioned
in the README of the set, with 102 variants; release 2013b has 10,000 images of 100 variants. Its
lists for training and validation together, 6,667 images, are for training, and 3,333 for testing.
The bottom 20 rows of each image are a banner with its author. They are cut off, as the README asks;
torchvision, for example, keeps them.
"""

from collections.abc import Mapping
from typing import Any

from bpnjax.data.archives import Archive, lines, malformed
from bpnjax.data.sets.imageset import (
    Config,
    Example,
    ImageSet,
    Reading,
    check_classes,
    check_splits,
    texts,
)

BANNER_ROWS = 20
_FOLDER = "fgvc-aircraft-2013b/data/"
_ARCHIVE = Archive(
    "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz",
    "fgvc-aircraft-2013b.tar.gz",
)
_NAMES = {"family": "families.txt", "variant": "variants.txt"}
_PARTS = {"train": ("train", "val"), "test": ("test",)}


def read(files: Mapping[str, Any], config: str) -> Reading:
    """Reads the names of the classes, and lists with lines such as ``1025794 Boeing 707``.

    Args:
        files: {file name: path} of the set's archives.
        config: ``family`` or ``variant``.

    Returns:
        A `Reading`: classes, examples of each split, and where the images are.

    Raises:
        UserError: An archive is malformed, or lacks a name that it should have.
    """
    path = files[_ARCHIVE.filename]
    listed = {split: [f"images_{config}_{part}.txt" for part in _PARTS[split]] for split in _PARTS}
    needed = [_FOLDER + f for f in (_NAMES[config], *listed["train"], *listed["test"])]
    found = {
        name.removeprefix(_FOLDER): lines(path, name, data)
        for name, data in texts(path, needed.__contains__, needed).items()
    }
    class_names = found[_NAMES[config]]
    check_classes(path, _NAMES[config], class_names, FGVC_AIRCRAFT.configs[config].classes)
    number = {name: i for i, name in enumerate(class_names)}

    def example(file: str, line: str) -> Example:
        image, _, name = line.partition(" ")
        if name not in number:
            raise malformed(path, f"{file} has {line!r}, of no class in {_NAMES[config]}")
        return Example(f"{_FOLDER}images/{image}.jpg", f"{image}.jpg", number[name])

    splits = {s: [example(f, line) for f in fs for line in found[f]] for s, fs in listed.items()}
    check_splits(path, class_names, splits)
    return Reading(path, class_names, splits, BANNER_ROWS)


FGVC_AIRCRAFT = ImageSet(
    version="1.0.0",
    configs={
        "family": Config((_ARCHIVE,), 70, "Families, as Boeing 737."),
        "variant": Config((_ARCHIVE,), 100, "Variants, as 737-700, the finest that look apart."),
    },
    read=read,
    about="Images of aircraft, without the banner below; 6,667 to train and 3,333 to test.",
    homepage="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
    licence="For non-commercial research only; the photographers keep the copyright.",
    citation="S. Maji, E. Rahtu, J. Kannala, M. Blaschko and A. Vedaldi, Fine-Grained Visual "
    "Classification of Aircraft, arXiv 1306.5151, 2013.",
)
