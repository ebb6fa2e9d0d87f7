"""One process per folder: a lock file names the process that holds it."""

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
      ``"host:pid:start"``, or "" where the system does not give it. The start time distinguishes
      this process from a later one with the same number.

    Example:
      >>> from bpnjax.utils import locks
      >>> locks.is_alive(locks.me())
      True
    """
    return f"{socket.gethostname()}:{os.getpid()}:{_start(os.getpid())}"


def is_alive(owner: str) -> bool:
    """Whether a process still exists.

    Args:
      owner: as `me` returns it.

    Returns:
      False if it is of this host and has ended. True for other hosts, where it cannot be known.

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
    except OSError:  # the process belongs to another user
        pass
    return not start or _start(int(pid)) in ("", start)


def _start(pid: int) -> str:
    """The start time of a process in ticks since boot; "" where it cannot be read."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


@contextlib.contextmanager
def held(path: pathlib.Path, what: str) -> Iterator[None]:
    """Holds a lock file while the block runs; takes over the lock of a process that has ended.

    Args:
      path: of the file. Its folder is made if it does not exist.
      what: the flag and its value, for messages, such as ``"--workdir: runs/a"``.

    Yields:
      Nothing.

    Raises:
      Locked: a running process holds it, or one of another host.
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
            # Renamed first: if two processes see a dead owner, only one can rename the file.
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
    """Creates the lock file in one step, complete; returns False if it exists already."""
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
