"""One process per folder: a lock file that says which process holds it."""

import contextlib
import os
import pathlib
import socket
from collections.abc import Iterator

from bpnjax.utils.errors import UserError

__all__ = ["Locked", "held", "is_alive", "me"]


class Locked(UserError):
    """Another process holds the folder."""


def me() -> str:
    """This process as a lock file names it.

    Returns:
      ``"host:pid:start"``, the last of which tells it from a later process of the same number; ""
      where the system does not say.

    Example:
      >>> from bpnjax.utils import locks
      >>> locks.is_alive(locks.me())
      True
    """
    return f"{socket.gethostname()}:{os.getpid()}:{_start(os.getpid())}"


def is_alive(owner: str) -> bool:
    """Whether a process is there.

    Args:
      owner: as `me` gives it.

    Returns:
      False if it is of this host and gone. Of another host nothing can be known: True.

    Example:
      >>> import socket
      >>> from bpnjax.utils import locks
      >>> locks.is_alive(f"{socket.gethostname()}:4194305:0"), locks.is_alive("elsewhere:7:1")
      (False, True)
    """
    host, _, rest = owner.partition(":")
    pid, _, start = rest.partition(":")
    if host != socket.gethostname():
        return bool(host)
    if not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is somebody else's
        pass
    return not start or _start(int(pid)) in ("", start)


def _start(pid: int) -> str:
    """When a process began, in ticks since the system did; "" where that cannot be read."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


@contextlib.contextmanager
def held(path: pathlib.Path, what: str) -> Iterator[None]:
    """Holds a lock file while the block runs; one that a dead process left is taken over.

    Args:
      path: of the file; its folder is made if it is not there.
      what: the flag and what it names, for messages, as ``"--workdir: runs/a"``.

    Yields:
      Nothing.

    Raises:
      Locked: a process that is there holds it, or one of another host.
      UserError: the file cannot be written.

    Example:
      >>> import pathlib, tempfile
      >>> from bpnjax.utils import locks
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "lock")
      ...     with locks.held(path, "--workdir: here"):
      ...         path.exists()
      ...     path.exists()
      True
      False
    """
    own = me()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while not _taken(path, own):
            owner = _read(path)
            if is_alive(owner):
                host, pid = owner.split(":")[:2]
                raise Locked(
                    f"{what} is in use by process {pid} of {host}; wait for it or name another "
                    f"folder (if that process is gone, delete {path})"
                )
            # Moved away first: of two that see a dead owner one alone can move it.
            aside = path.with_name(f"{path.name}.{os.getpid()}")
            with contextlib.suppress(FileNotFoundError):
                path.rename(aside)
                aside.unlink()
    except OSError as error:
        raise UserError(f"{what} cannot be written ({error.strerror}); name another") from error
    try:
        yield
    finally:
        if _read(path) == own:
            path.unlink(missing_ok=True)


def _taken(path: pathlib.Path, own: str) -> bool:
    """Makes the lock file, whole from its first moment on; whether it was not there."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(own)
    try:
        os.link(fresh, path)
    except FileExistsError:
        return False
    finally:
        fresh.unlink()
    return True


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
