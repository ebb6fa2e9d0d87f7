"""Paths that users write."""

import os
import pathlib

from bpnjax.utils.errors import UserError

__all__ = ["expanded"]


def expanded(path: str | os.PathLike[str], field: str) -> pathlib.Path:
    """Replaces ``~`` and ``~user`` in a path by home folders.

    Args:
      path: as the user gave it.
      field: the field or flag that holds it, for the message.

    Returns:
      The path; it need not exist.

    Raises:
      UserError: the home folder is unknown, as in a container without this user.

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
