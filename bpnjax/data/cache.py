"""Decoded images on disk as memory-mapped arrays, keyed by set, version, split and content."""

import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import time
import zlib

import numpy as np

from bpnjax.utils.errors import UserError
from bpnjax.utils.paths import expanded

_ABANDONED = 86400.0  # seconds after which a partial folder belongs to no running process


def cache_root(cache_dir: str = "") -> pathlib.Path:
    """The folder of decoded sets: `dataset.cache_dir`, BPNJAX_CACHE_DIR, or the user's cache.

    Args:
      cache_dir: a folder, or "" for the default.

    Returns:
      A path with ``~`` expanded, which need not exist. The user's cache is ``bpnjax`` in
      XDG_CACHE_HOME or in ``~/.cache``.

    Raises:
      UserError: there is no home folder.

    Example:
      >>> from bpnjax.data.cache import cache_root
      >>> cache_root("decoded").name
      'decoded'
    """
    if cache_dir:
        return expanded(cache_dir, "dataset.cache_dir")
    if own := os.environ.get("BPNJAX_CACHE_DIR"):
        return expanded(own, "BPNJAX_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expanded(base, "BPNJAX_CACHE_DIR is not set, and") / "bpnjax"


def fingerprint(folder: pathlib.Path) -> str:
    """A hash of a prepared set: names, sizes and times of its files, and its info.

    Args:
      folder: of one version of a prepared set. Only ``dataset_info.json`` is read.

    Returns:
      12 hexadecimal digits.
    """
    parts = [
        (f.name, f.stat().st_size, f.stat().st_mtime_ns)
        for f in sorted(folder.iterdir())
        if f.is_file()
    ]
    info = (folder / "dataset_info.json").read_bytes()
    return hashlib.sha256(json.dumps(parts).encode() + info).hexdigest()[:12]


def _checksum(path: pathlib.Path) -> int:
    total = 0
    with path.open("rb") as f:
        while block := f.read(1 << 22):
            total = zlib.crc32(block, total)
    return total


def read(folder: pathlib.Path) -> dict[str, np.ndarray] | None:
    """Opens a cached split.

    It reads every byte once, for the checksums.

    Args:
      folder: the split's folder.

    Returns:
      Its arrays, memory-mapped and read-only; None if there is no such folder.

    Raises:
      UserError: the cache is damaged.
    """
    if not folder.exists():
        return None
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if not isinstance(manifest, dict) or not manifest:
            raise ValueError("its manifest lists no arrays")
        arrays = {}
        for name, checksum in manifest.items():
            path = folder / f"{name}.npy"
            if _checksum(path) != checksum:
                raise ValueError(f"{path.name} is not what was written")
            arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
        return arrays
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"dataset.cache_dir: the cached set in {folder} is damaged ({error}); "
            "delete that folder, it is decoded again at the next start"
        ) from error


def write(folder: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes a split to a temporary folder and renames it, so no partial cache can remain.

    Args:
      folder: the split's folder. If it exists already, it does not change.
      arrays: ``{name: array}``, written as ``NAME.npy``.

    Raises:
      UserError: the folder cannot be made.
      OSError: writing fails, for example on a full disk. Nothing is left behind.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(".partial-*"):  # left by a killed process
            if time.time() - left.stat().st_mtime > _ABANDONED:
                shutil.rmtree(left, ignore_errors=True)
        partial = pathlib.Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    except OSError as error:
        raise UserError(
            f"dataset.cache_dir: cannot write to {folder.parent} ({error.strerror}); name another "
            "folder with --config.dataset.cache_dir=DIR"
        ) from error
    try:
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array)
        manifest = {name: _checksum(partial / f"{name}.npy") for name in arrays}
        (partial / "manifest.json").write_text(json.dumps(manifest))
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another run wrote the same first
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
