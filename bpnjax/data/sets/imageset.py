"""The description of a set of images in archives, for its builder."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from bpnjax.data import archives
from bpnjax.data.archives import Archive, Path
from bpnjax.utils.errors import UserError


class Config(NamedTuple):
    """One way to read a set: its archives, its number of classes, and a description."""

    archives: tuple[Archive, ...]
    classes: int
    about: str


class Example(NamedTuple):
    """The place of an image and what it shows."""

    member: str  # in the archive of images
    file_name: str  # from the set's own lists; unique in a split
    label: int


class Reading(NamedTuple):
    """The contents of the small files of a set: everything but the images."""

    path: Any  # the archive of images
    class_names: list[str]
    splits: dict[str, list[Example]]
    cut_rows: int = 0  # rows at the bottom of each image that do not belong to it


class ImageSet(NamedTuple):
    """A set of images that TFDS lacks."""

    version: str
    configs: dict[str, Config]  # the first is the default; {"": ...} for a set without configs
    read: Callable[[dict[str, Any], str], Reading]  # ({file name: path}, config) -> Reading
    about: str
    homepage: str
    licence: str
    citation: str


def examples(reading: Reading, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the examples of a split for TFDS, in the order of the archive.

    Args:
        reading: Of the set.
        split: A name in ``reading.splits``.

    Yields:
        A key, and a dict of ``image``, ``label`` and ``file_name``.

    Raises:
        UserError: An image is missing or cannot be decoded.
    """
    wanted = {example.member: example for example in reading.splits[split]}
    for name, data in archives.members(reading.path, wanted.__contains__):
        example = wanted.pop(name, None)
        if example is None:
            raise archives.malformed(reading.path, f"has the member {name} twice")
        image = archives.image_file(reading.path, name, data, reading.cut_rows)
        yield (
            example.file_name,
            {"image": image, "label": example.label, "file_name": example.file_name},
        )
    if wanted:
        raise lacking(reading.path, wanted)


def lacking(path: Path, names: Collection[str]) -> UserError:
    """An error that names some of the members that an archive lacks, and their number.

    Args:
        path: The archive.
        names: Names of all missing members.

    Returns:
        The `UserError`, to be raised.
    """
    first = ", ".join(sorted(names)[:3])
    return archives.malformed(path, f"lacks {len(names)} member(s), as {first}")


def texts(
    path: Path, wanted: Callable[[str], bool], needed: Iterable[str] = ()
) -> dict[str, bytes]:
    """Reads the small members of an archive, by name.

    Args:
        path: The archive.
        wanted: Whether to read the member with a name.
        needed: Names that must be among them.

    Returns:
        A dict of name to contents.

    Raises:
        UserError: The archive cannot be unpacked, or a needed member is missing.
    """
    found = dict(archives.members(path, wanted))
    if missing := set(needed) - set(found):
        raise lacking(path, missing)
    return found


def check_classes(path: Path, what: str, names: Collection[str], count: int) -> None:
    """Checks that a list has as many classes as the set.

    Args:
        path: The archive, for the message.
        what: The name of the list, for the message.
        names: The classes that were found.
        count: The number of classes in the set.

    Raises:
        UserError: There are more or fewer.
    """
    if len(names) != count:
        raise archives.malformed(path, f"{what} has {len(names)} classes, not {count}")


def check_splits(path: Path, class_names: Sequence[str], splits: dict[str, list[Example]]) -> None:
    """Checks that every class has images in every split.

    Args:
        path: The archive, for the message.
        class_names: Names of the classes, by label.
        splits: The examples of each split.

    Raises:
        UserError: A class has no image in a split.
    """
    for split, found in splits.items():
        present = {example.label for example in found}
        absent = [name for i, name in enumerate(class_names) if i not in present]
        if absent:
            raise archives.malformed(path, f"the split {split} has no image of {absent[0]!r}")
