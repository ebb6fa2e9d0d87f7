"""How much memory there is, and how much a compressed file would take."""

import pathlib
import zipfile

import jax

__all__ = ["available", "too_large"]


def available() -> int | None:
    """The memory that arrays of the default device can take.

    Returns:
      Bytes; on a CPU the least of what the system has left and of the limits of this process's
      control group. None where nothing can be known.

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
    """The least of what the system has left and of the limit of this process; None if unknown."""
    known = [number for number in (_system(), _limit()) if number is not None]
    return min(known) if known else None


def _system() -> int | None:
    """What Linux says is available; None elsewhere."""
    try:
        for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    return None


def _limit() -> int | None:
    """What is left of the limit of the control group; None without one."""
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
    """Whether the members of a zip archive, as ``.npz`` files are, would not fit when unpacked.

    Args:
      path: of the archive.

    Returns:
      How large they are, in words; "" where they fit, or where nothing can be known.

    Raises:
      OSError: it cannot be read.
      zipfile.BadZipFile: it is no archive.

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
