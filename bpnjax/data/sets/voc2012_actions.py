"""PASCAL VOC 2012 Actions: what people in an image do, 10 actions.

Disputed: the set marks each person with any number of 10 actions, or as "other". Works on sequences
of sets give each image one label, each in its own way: Wen et al. 2020 have 3,334 images of 10
classes, others 11 classes with "other". Here an image belongs to an action if each person marked in
it does that action and no other one. Images with "other", with several actions or with persons who
do different things are left out. The whole image is used, without cutting out persons. The official
test set has no public labels, so the training list is for training and the validation list for
testing.
"""

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from typing import Any

from bpnjax.data.archives import Archive, Path, lines, malformed
from bpnjax.data.sets.imageset import Config, Example, ImageSet, Reading, check_splits, texts

ACTIONS = (
    "jumping", "phoning", "playinginstrument", "reading", "ridingbike",
    "ridinghorse", "running", "takingphoto", "usingcomputer", "walking",
)  # fmt: skip
_FOLDER = "VOCdevkit/VOC2012/"
_LISTS = {
    "train": f"{_FOLDER}ImageSets/Action/train.txt",
    "test": f"{_FOLDER}ImageSets/Action/val.txt",
}
_NOTES = f"{_FOLDER}Annotations/"
_ARCHIVE = Archive(
    "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
    "VOCtrainval_11-May-2012.tar",
    1999639040,
    "e14f763270cf193d0b5f74b169f44157a4b0c6efa708f4dd0ff78ee691763bcb",
)


def image_label(path: Path, name: str, note: bytes) -> int | None:
    """Finds the action of an image.

    Args:
        path: The archive, for messages.
        name: The name of the annotation, for messages.
        note: The annotation, XML.

    Returns:
        The number of its action in `ACTIONS`; None if its persons do not all do the same one.

    Raises:
        UserError: The annotation is malformed.

    Example:
        >>> from bpnjax.data.sets.voc2012_actions import image_label
        >>> person = "<object><actions><jumping>0</jumping><reading>1</reading></actions></object>"
        >>> image_label("x.tar", "a.xml", f"<annotation>{person}</annotation>".encode())
        3
    """
    try:
        root = ET.fromstring(note)
        # The flags are written as 0 and 1.
        persons = [
            {flag.tag for flag in actions if float(flag.text or "")}
            for actions in root.iterfind("object/actions")
        ]
    except (ET.ParseError, TypeError, ValueError) as error:
        raise malformed(path, f"{name} is not an annotation of VOC ({error})") from error
    done = set().union(*persons)
    if len(done) != 1 or any(person != done for person in persons):
        return None
    (action,) = done
    return ACTIONS.index(action) if action in ACTIONS else None


def read(files: Mapping[str, Any], config: str) -> Reading:
    """Reads the lists of images and their annotations.

    Args:
        files: {file name: path} of the set's archives.
        config: Not used; the set has only one.

    Returns:
        A `Reading`: classes, examples of each split, and where the images are.

    Raises:
        UserError: An archive is malformed, or lacks a name that it should have.
    """
    del config
    path = files[_ARCHIVE.filename]
    small = set(_LISTS.values())
    found = texts(path, lambda name: name in small or name.startswith(_NOTES), small)
    splits: dict[str, list[Example]] = {split: [] for split in _LISTS}
    for split, listed in _LISTS.items():
        # A line may continue with the number of a person.
        for stem in dict.fromkeys(line.split()[0] for line in lines(path, listed, found[listed])):
            note = f"{_NOTES}{stem}.xml"
            if note not in found:
                raise malformed(path, f"lacks {note}, of an image in {listed}")
            label = image_label(path, note, found[note])
            if label is not None:
                member = f"{_FOLDER}JPEGImages/{stem}.jpg"
                splits[split].append(Example(member, f"{stem}.jpg", label))
    check_splits(path, ACTIONS, splits)
    return Reading(path, list(ACTIONS), splits)


VOC2012_ACTIONS = ImageSet(
    version="1.0.0",
    configs={"": Config((_ARCHIVE,), len(ACTIONS), "One action per image.")},
    read=read,
    about="Images of people who all do the same one of 10 actions.",
    homepage="http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
    licence="Images from Flickr, under its terms of use.",
    citation="M. Everingham, L. Van Gool, C. K. I. Williams, J. Winn and A. Zisserman, The PASCAL "
    "Visual Object Classes Challenge 2012.",
)
