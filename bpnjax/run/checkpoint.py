"""Checkpoints that survive a kill at any moment: arrays written by Orbax, with a manifest each.

A checkpoint is a folder written by Orbax. Beside it, ``<name>.json`` holds the run's record
(position, accuracies so far, times) and the size and checksum of each file. This manifest is
written last and renamed into place. A checkpoint without a manifest is unfinished, and one that
does not match its manifest is damaged. In both cases the previous checkpoint is used.
"""

import errno
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import warnings
import zlib
from typing import Any, NamedTuple

import jax
import numpy as np

from bpnjax.utils import prng
from bpnjax.utils.errors import UserError


class Position(NamedTuple):
    """Where a run stands: the task, epoch and step that come next.

    All numbers begin at 0. After the last step of a task the position is step 0 of the next task.
    """

    task: int
    epoch: int
    step: int


_OURS = re.compile(r"\d{5}-\d{5}-\d{9}(\.orbax-checkpoint-tmp.*)?")


def _name(position: Position) -> str:
    return f"{position.task:05d}-{position.epoch:05d}-{position.step:09d}"


def _checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _files(folder: pathlib.Path) -> dict[str, list[int]]:
    return {
        str(path.relative_to(folder)): [path.stat().st_size, zlib.crc32(path.read_bytes())]
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _checkpointer() -> Any:
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)
    # Each host reads and writes by itself. Without this it would wait for all others.
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"host{me}"
    )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


# What TensorStore says where the system refuses to write, the specific words before the general.
_REFUSALS = {
    "No space left": errno.ENOSPC,
    "RESOURCE_EXHAUSTED": errno.ENOSPC,
    "PERMISSION_DENIED": errno.EACCES,
    "NOT_FOUND": errno.ENOENT,  # the folder is gone
    "Error writing": errno.EIO,
}


def save(
    folder: pathlib.Path, position: Position, state: Any, record: dict[str, Any], keep: int
) -> None:
    """Writes a checkpoint, then removes all others except the ``keep - 1`` before it.

    Args:
      folder: the run's checkpoint folder.
      position: where the run stands.
      state: any pytree of arrays.
      record: further data to store, as JSON.
      keep: number of checkpoints to keep.

    Raises:
      OSError: it could not be written; earlier checkpoints are not affected.
    """
    import orbax.checkpoint as ocp

    folder.mkdir(parents=True, exist_ok=True)
    target = (folder / _name(position)).resolve()
    state = prng.to_numbers(state)  # Orbax takes keys on a single host only
    if jax.process_count() > 1:  # Orbax would look for other hosts' parts of JAX arrays
        state = jax.tree.map(np.asarray, state)
    try:
        with _checkpointer() as checkpointer:
            checkpointer.save(target, args=ocp.args.StandardSave(state), force=True)
    except OSError:
        raise
    except Exception as error:  # Orbax reports what a disk refuses in the words of other libraries
        codes = [code for words, code in _REFUSALS.items() if words in str(error)]
        if not codes:
            raise
        raise OSError(codes[0], os.strerror(codes[0]), str(target)) from error
    manifest = {"position": position._asdict(), "record": record, "files": _files(target)}
    sealed_manifest = manifest | {"checksum": _checksum(manifest)}
    write_atomically(folder / f"{target.name}.json", json.dumps(sealed_manifest))
    # Later checkpoints are damaged, otherwise the run would have continued from them. They must
    # not count as some of those to keep.
    sealed = sorted(path.stem for path in folder.glob("*.json") if path.stem <= target.name)
    for path in folder.iterdir():
        ours = _OURS.fullmatch(path.name)  # other folders are not touched
        if path.is_dir() and ours and path.name not in sealed[-keep:]:
            (folder / f"{path.name}.json").unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)


def restore_latest(
    folder: pathlib.Path, abstract: Any
) -> tuple[Position, Any, dict[str, Any]] | None:
    """Reads the newest complete checkpoint, and warns of damaged or unfinished ones.

    Args:
      folder: the run's checkpoint folder.
      abstract: structure, shapes and dtypes of the state: a state, or `jax.eval_shape` of one.

    Returns:
      Position, state and record; None if no checkpoint was ever finished.

    Raises:
      UserError: there are checkpoints, but all are damaged.
    """
    if folder.is_dir():
        os.listdir(folder)  # glob would treat an unreadable folder as empty
    manifests = sorted(folder.glob("*.json"), reverse=True)
    for path in manifests:
        try:
            return _restore(path, abstract)
        except _DAMAGE as error:
            why = str(error).split("\n", 1)[0] or type(error).__name__
            warnings.warn(
                f"checkpoint {path.stem} is damaged ({why}); going back to the one before it",
                stacklevel=2,
            )
    if manifests:
        raise UserError(
            f"workdir: every checkpoint in {folder} is damaged; delete that folder or pass "
            "--overwrite to start afresh"
        )
    return None


_DAMAGE = (ValueError, KeyError, TypeError, OSError)


def _restore(manifest_path: pathlib.Path, abstract: Any) -> tuple[Position, Any, dict[str, Any]]:
    import orbax.checkpoint as ocp

    target = manifest_path.with_suffix("").resolve()
    manifest = json.loads(manifest_path.read_text())
    checksum = manifest.pop("checksum", None)  # earlier versions wrote no checksum
    if checksum is not None and checksum != _checksum(manifest):
        raise ValueError("its manifest is not what was written")
    if _files(target) != manifest["files"]:
        raise ValueError("its files are not what was written")
    position = Position(**manifest["position"])
    with warnings.catch_warnings(), _checkpointer() as checkpointer:
        warnings.simplefilter("ignore")  # the target gives the sharding
        restored = checkpointer.restore(target, args=ocp.args.StandardRestore(_stored(abstract)))
    return position, prng.from_numbers(restored, abstract), manifest["record"]


def _stored(abstract: Any) -> Any:
    """The stored form of a state: shapes and dtypes, all for the default device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
        jax.eval_shape(prng.to_numbers, abstract),
    )


def restore_at(folder: pathlib.Path, position: Position, abstract: Any) -> Any:
    """Reads the state of one checkpoint.

    Args:
      folder: the run's checkpoint folder.
      position: the position of the checkpoint.
      abstract: structure, shapes and dtypes of the state: a state, or `jax.eval_shape` of one.

    Returns:
      The state.

    Raises:
      UserError: the checkpoint does not exist or is damaged.
    """
    try:
        return _restore(folder / f"{_name(position)}.json", abstract)[1]
    except _DAMAGE as error:
        raise UserError(
            f"workdir: no whole checkpoint {_name(position)} in {folder}; delete that run's folder "
            "and run again"
        ) from error


def sha256(path: pathlib.Path) -> str:
    """The SHA-256 of a file.

    Args:
      path: of the file.

    Returns:
      64 hexadecimal digits.

    Raises:
      OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a file so that an interruption leaves either the old or the new content.

    Args:
      path: of the file; its folder must exist. ``.NAME.partial`` beside it is a temporary file.
      text: its content.

    Example:
      >>> import pathlib, tempfile
      >>> from bpnjax.run.checkpoint import write_atomically
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_atomically(pathlib.Path(folder, "a.txt"), "new")
      ...     pathlib.Path(folder, "a.txt").read_text(), len(list(pathlib.Path(folder).iterdir()))
      ('new', 1)
    """
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    partial.replace(path)
