"""Official archives: finds them in a folder, checks them and reads them without unpacking."""

import contextlib
import gzip
import hashlib
import io
import os
import pathlib
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile, get_sampling

from bpnjax.utils.errors import UserError
from bpnjax.utils.paths import expanded

Path = str | os.PathLike[str]


class Archive(NamedTuple):
    """An official archive: its address, and what is known about its contents.

    ``size`` is in bytes. A checksum "" is unknown and not compared. ``content`` is the sha256 of
    the unpacked contents of a gzip file, which does not depend on the header.
    """

    url: str
    filename: str
    size: int | None = None
    sha256: str = ""
    md5: str = ""
    content: str = ""


def malformed(path: Path, what: str) -> UserError:
    """An error that says what is wrong with an archive, and what to do.

    Args:
        path: The archive.
        what: What is wrong, without a full stop.

    Returns:
        The `UserError`, to be raised.
    """
    return UserError(f"{os.fspath(path)}: {what}; replace it with the official archive")


@contextlib.contextmanager
def unpacking(path: Path) -> Iterator[None]:
    """Turns any error while an archive is unpacked into a `UserError`.

    Args:
        path: The archive, for messages.

    Raises:
        UserError: The archive is truncated or cannot be unpacked.
    """
    try:
        yield
    except EOFError as error:
        raise malformed(path, "the gzip file is truncated") from error
    except (tarfile.TarError, OSError, zlib.error) as error:
        raise malformed(path, f"cannot be unpacked ({' '.join(str(error).split())})") from error


def find(
    name: str, archives: Sequence[Archive], manual_dir: Path, verify: bool = True
) -> dict[str, pathlib.Path]:
    """Finds the official archives of a set in a folder.

    Args:
        name: The name of the set, for messages.
        archives: The archives of the set.
        manual_dir: The folder that holds them under their official file names.
        verify: Whether to `check` them.

    Returns:
        A dict of file name to path.

    Raises:
        UserError: The folder or an archive is missing, or an archive is not the official one.
    """
    folder = expanded(manual_dir, "dataset.manual_dir")
    paths = {archive.filename: folder / archive.filename for archive in archives}
    if missing := [a for a in archives if not paths[a.filename].is_file()]:
        raise UserError(
            f"dataset.manual_dir={os.fspath(manual_dir)!r}: lacks"
            f" {', '.join(a.filename for a in missing)} of dataset {name!r};"
            f" download there {' '.join(a.url for a in missing)}"
        )
    for archive in archives if verify else ():
        check(name, archive, paths[archive.filename])
    return paths


def check(name: str, archive: Archive, path: pathlib.Path) -> None:
    """Compares a file with the known size and checksum of an archive, or its content.

    Args:
        name: The name of the set, for messages.
        archive: The known facts.
        path: The file.

    Raises:
        UserError: They differ.
    """
    kind = "sha256" if archive.sha256 else "md5"
    wanted = getattr(archive, kind)
    if not wanted:
        return
    with path.open("rb") as file:
        found = path.stat().st_size, hashlib.file_digest(file, kind).hexdigest()
    if found != (archive.size or found[0], wanted) and not _same_content(archive, path):
        has = f"{archive.size} and {wanted}" if archive.size else f"{kind} {wanted}"
        raise UserError(
            f"{path}: {found[0]} bytes with {kind} {found[1]}, the official archive of {name}"
            f" has {has}; download it again from {archive.url}"
        )


def _same_content(archive: Archive, path: pathlib.Path) -> bool:
    """Whether a gzip file has the official content, even if it was compressed differently."""
    if not archive.content:
        return False
    with unpacking(path), gzip.open(path) as file:
        return hashlib.file_digest(cast(Any, file), "sha256").hexdigest() == archive.content


def contents(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """The bytes of a regular file in an archive.

    Args:
        tar: The archive.
        member: A regular file in it.

    Returns:
        Its bytes.
    """
    file = tar.extractfile(member)
    assert file is not None  # None is for directories and links
    return file.read()


def members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Reads regular files of a tar archive, compressed or not, in one pass in memory.

    Args:
        path: The archive.
        wanted: Whether to read the member with a name, given without a leading "./".

    Yields:
        Names and contents, in the order of the archive. Links are not followed.

    Raises:
        UserError: The archive cannot be unpacked.
    """
    with unpacking(path), tarfile.open(os.fspath(path), "r:*") as tar:
        for member in tar:
            name = member.name.removeprefix("./")
            if member.isreg() and wanted(name):
                yield name, contents(tar, member)


def lines(path: Path, name: str, data: bytes) -> list[str]:
    r"""The lines of a text file that are not empty, without duplicates and surrounding white space.

    Args:
        path: The archive that holds it, for messages.
        name: The name of the member.
        data: Its bytes, in UTF-8.

    Returns:
        The lines in their order.

    Raises:
        UserError: The file is not UTF-8.

    Example:
        >>> from bpnjax.data.archives import lines
        >>> lines("a.tgz", "list.txt", b" b.jpg\n\na.jpg\nb.jpg\n")
        ['b.jpg', 'a.jpg']
    """
    try:
        stripped = [line.strip() for line in data.decode().splitlines()]
    except UnicodeDecodeError as error:
        raise malformed(path, f"{name} is not text in UTF-8") from error
    return list(dict.fromkeys(line for line in stripped if line))


def image_file(path: Path, name: str, data: bytes, cut_rows: int = 0) -> io.BytesIO:
    """Converts an image to the form in which a prepared set stores it.

    Args:
        path: The archive that holds it, for messages.
        name: The name of the member.
        data: Its bytes.
        cut_rows: The number of rows to cut off at the bottom.

    Returns:
        The same bytes if they are a JPEG or PNG file in RGB; any other image as PNG in RGB. A cut
        JPEG file keeps its quantization, so that the remaining blocks hardly change.

    Raises:
        UserError: The image cannot be decoded, or has too few rows.
    """
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise malformed(path, f"{name} is not a readable image") from error
    width, height = image.size
    if height <= cut_rows:
        raise malformed(path, f"{name} has {height} rows, {cut_rows} of them below the image")
    if image.mode == "RGB" and image.format in ("JPEG", "PNG") and not cut_rows:
        return io.BytesIO(data)
    options: dict[str, Any] = {"format": "PNG"}
    if image.mode == "RGB" and image.format == "JPEG" and isinstance(image, JpegImageFile):
        options = {"format": "JPEG", "qtables": image.quantization}
        if (sampling := get_sampling(image)) >= 0:  # the encoder supports it
            options["subsampling"] = sampling
    out = io.BytesIO()
    image.convert("RGB").crop((0, 0, width, height - cut_rows)).save(out, **options)
    out.seek(0)
    return out
