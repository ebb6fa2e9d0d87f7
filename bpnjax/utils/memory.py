"""How much memory is available, and how much a compressed file needs."""

import pathlib
import zipfile

import jax

__all__ = ["available", "too_large"]


def available() -> int | None:
    """The memory available for arrays of the default device.

    Returns:
      Bytes, or None where it cannot be known. On a CPU it is the smaller of the free memory of the
      system and what the control group of this process allows.

    Example:
      >>> from bpnjax.utils import memory
      >>> free = memory.available()
      >>> free is None or free > 2**20
      True
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    if device.platform != "cpu":
        return None
    return _host()


def _host() -> int | None:
    """The smaller of the system's free memory and the limit of this process; None if unknown."""
    known = [number for number in (_system(), _limit()) if number is not None]
    return min(known) if known else None


def _system() -> int | None:
    """The memory that Linux reports as available; None elsewhere."""
    try:
        for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    return None


def _limit() -> int | None:
    """What is left of the control group's limit; None without one."""
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes",
         "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):  # fmt: skip
        try:
            most, taken = (int(pathlib.Path(path).read_text()) for path in (limit, used))
            return max(0, most - taken)
        except (OSError, ValueError):
            continue
    return None


def too_large(path: str | pathlib.Path) -> str:
    """Checks whether a zip archive, such as an ``.npz`` file, fits into memory when unpacked.

    Args:
      path: of the archive.

    Returns:
      A text with both sizes, or "" if it fits or nothing can be known.

    Raises:
      OSError: it cannot be read.
      zipfile.BadZipFile: it is not an archive.

    Example:
      >>> import pathlib, tempfile
      >>> import numpy as np
      >>> from bpnjax.utils import memory
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     np.savez_compressed(pathlib.Path(folder, "a.npz"), x=np.zeros(1000))
      ...     memory.too_large(pathlib.Path(folder, "a.npz"))
      ''
    """
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    free = _host()
    if free is None or size <= free:
        return ""
    return f"unpacked it takes {size / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are available"
