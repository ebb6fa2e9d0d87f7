"""Chars74K, English: 0-9, A-Z and a-z, cut out of natural images or drawn from fonts.

Disputed: Wen et al. 2020 call it recognition in natural images and give 62,992 images of 62
classes, but 62,992 = 62 x 1,016 is the number of images drawn from fonts. The codes known to use
this sequence of sets take the natural images, good and bad ones together. The default config does
the same; the other config has the fonts. There is no official split of all images, since the
authors' lists have at most 15 images per class for training and 15 for testing. Here every seventh
image of a class, in the order of the names, is for testing. The paper calls the set Letters,
digits included.
"""

import re
import string
from collections.abc import Mapping
from typing import Any

from bpnjax.data import archives
from bpnjax.data.archives import Archive
from bpnjax.data.sets.imageset import Config, Example, ImageSet, Reading, check_splits

CLASS_NAMES = string.digits + string.ascii_uppercase + string.ascii_lowercase
EVERY = 7  # one of so many images is for testing
_ADDRESS = "http://www.ee.surrey.ac.uk/CVSSP/demos/chars74k/"
_ARCHIVES = {
    "natural": Archive(
        f"{_ADDRESS}EnglishImg.tgz", "EnglishImg.tgz", md5="85d157e0c58f998e1cda8def62bcda0d"
    ),
    "fonts": Archive(
        f"{_ADDRESS}EnglishFnt.tgz", "EnglishFnt.tgz", md5="f6710b1302a7e9693d904b16389d9d8a"
    ),
}
_FOLDERS = {"natural": "English/Img/(?:GoodImg|BadImag)/Bmp", "fonts": "English/Fnt"}


def read(files: Mapping[str, Any], config: str) -> Reading:
    """Reads the names of the images, such as ``.../Sample011/img011-00001.png`` for an A.

    Args:
        files: {file name: path} of the set's archives.
        config: ``natural`` or ``fonts``.

    Returns:
        A `Reading`: classes, examples of each split, and where the images are.

    Raises:
        UserError: An archive is malformed, or lacks a name that it should have.
    """
    path = files[_ARCHIVES[config].filename]
    pattern = re.compile(rf"{_FOLDERS[config]}/Sample(\d{{3}})/[^/]+\.png")
    by_class: dict[int, list[str]] = {}
    for name, _ in archives.members(path, lambda name: bool(pattern.fullmatch(name))):
        number = pattern.sub(r"\1", name)
        by_class.setdefault(int(number) - 1, []).append(name)
    if set(by_class) != set(range(len(CLASS_NAMES))):
        raise archives.malformed(path, f"has images of {len(by_class)} classes, not of the 62")
    splits: dict[str, list[Example]] = {"train": [], "test": []}
    for label, names in sorted(by_class.items()):
        for i, name in enumerate(sorted(names)):
            split = "test" if i % EVERY == EVERY - 1 else "train"
            splits[split].append(Example(name, name.removeprefix("English/"), label))
    check_splits(path, CLASS_NAMES, splits)
    return Reading(path, list(CLASS_NAMES), splits)


CHARS74K_LETTERS = ImageSet(
    version="1.0.0",
    configs={
        "natural": Config((_ARCHIVES["natural"],), 62, "Cut out of natural images."),
        "fonts": Config((_ARCHIVES["fonts"],), 62, "Drawn from 254 fonts in 4 styles each."),
    },
    read=read,
    about="Single characters, 0-9, A-Z and a-z; every seventh of a class is to test.",
    homepage="http://www.ee.surrey.ac.uk/CVSSP/demos/chars74k/",
    licence="For research; its page names no licence.",
    citation="T. E. de Campos, B. R. Babu and M. Varma, Character recognition in natural images, "
    "VISAPP 2009.",
)
