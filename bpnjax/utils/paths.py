"""Paths as users write them."""

import os
import pathlib

from bpnjax.utils.errors import UserError

__all__ = ["expanded"]


def expanded(path: str | os.PathLike[str], field: str) -> pathlib.Path:
    """A path with ``~`` and ``~user`` replaced by home folders.

    Args:
      path: as it was given.
      field: where it was given, for the message.

    Returns:
      The path; it need not exist.

    Raises:
      UserError: nobody knows that home folder, as in a container without a user of this number.

    Example:
      >>> from bpnjax.utils.paths import expanded
      >>> expanded("runs/digits", "--workdir").name
      'digits'
    """
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{field}: {os.fspath(path)!r} names no home folder; give a whole path"
        ) from error
