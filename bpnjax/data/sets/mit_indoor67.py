"""MIT Indoor Scenes: 67 kinds of rooms.

Disputed: the set has 15,620 images, the number that Wen et al. 2020 give, but the authors' lists,
with 80 training and 20 test images per class, name 5,360 and 1,340. These lists are used here, as
in most works. The paper does not say what it did with the other images.
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
)

_CLASSES = 67
_IMAGES = "indoorCVPR_09.tar"
_LISTS = {"train": "TrainImages.txt", "test": "TestImages.txt"}
_ARCHIVES = (
    Archive(f"http://groups.csail.mit.edu/vision/LabelMe/NewImages/{_IMAGES}", _IMAGES),
    *(Archive(f"http://web.mit.edu/torralba/www/{file}", file) for file in _LISTS.values()),
)


def read(files: Mapping[str, Any], config: str) -> Reading:
    """Reads the two lists, with lines such as ``bakery/0001.jpg``.

    Args:
        files: {file name: path} of the set's archives.
        config: Not used; the set has only one.

    Returns:
        A `Reading`: classes, examples of each split, and where the images are.

    Raises:
        UserError: An archive is malformed, or lacks a name that it should have.
    """
    del config
    listed = {split: lines(files[f], f, files[f].read_bytes()) for split, f in _LISTS.items()}
    for split, names in listed.items():
        for name in names:
            if name.count("/") != 1:
                raise malformed(files[_LISTS[split]], f"{name!r} is not a CLASS/IMAGE")
    class_names = sorted({name.split("/")[0] for name in listed["train"]})
    check_classes(files[_LISTS["train"]], "it", class_names, _CLASSES)
    number = {name: i for i, name in enumerate(class_names)}
    splits = {}
    for split, names in listed.items():
        unknown = [name for name in names if name.split("/")[0] not in number]
        if unknown:
            raise malformed(files[_LISTS[split]], f"{unknown[0]!r} is of no class to train on")
        splits[split] = [Example(f"Images/{n}", n, number[n.split("/")[0]]) for n in names]
        check_splits(files[_LISTS[split]], class_names, {split: splits[split]})
    return Reading(files[_IMAGES], class_names, splits)


MIT_INDOOR67 = ImageSet(
    version="1.0.0",
    configs={"": Config(_ARCHIVES, _CLASSES, "The lists of 80 and 20 images per class.")},
    read=read,
    about="Images of 67 kinds of indoor scenes; 5,360 to train and 1,340 to test.",
    homepage="http://web.mit.edu/torralba/www/indoor.html",
    licence="For research purposes only (its page).",
    citation="A. Quattoni and A. Torralba, Recognizing Indoor Scenes, CVPR 2009.",
)
