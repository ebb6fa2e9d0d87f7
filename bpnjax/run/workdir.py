"""The folder of a run: checks whether this configuration may use it, and locks it."""

import json
import os
import pathlib
import shutil
import sys
from contextlib import AbstractContextManager
from typing import Any

from ml_collections import ConfigDict

from bpnjax.config import BEFORE, default, differences, fingerprint, flatten
from bpnjax.run import log_copies
from bpnjax.run.checkpoint import sha256, write_atomically
from bpnjax.run.writers import plain
from bpnjax.utils import locks
from bpnjax.utils.errors import UserError

LOCK = "run.lock"  # exists while a process works in the folder
MORE_SEEDS = "more_seeds"  # the subfolder in which added seeds are trained
_LEFT_BY_A_RUN = (
    "metrics.jsonl", "metrics.csv", "result.json", "accuracy.csv", "model.json",
    "model*.safetensors", "accuracy_matrix.png", "learning_curves.png",
)  # fmt: skip


def held(workdir: pathlib.Path) -> AbstractContextManager[None]:
    """Locks a folder for one process.

    Args:
      workdir: the folder; it is made if it does not exist.

    Returns:
      A context manager. Entering it raises `UserError` if another process holds the folder.
    """
    return locks.held(workdir / LOCK, f"--workdir: {workdir}")


def check(workdir: pathlib.Path, config: ConfigDict, overwrite: bool) -> bool:
    """Checks whether a run may use a folder. It only changes the folder to finish a `settle`.

    Args:
      workdir: the folder; it need not exist.
      config: the run's configuration.
      overwrite: whether an earlier run in it will be removed.

    Returns:
      True if the folder already holds this run and the run is complete.

    Raises:
      UserError: it is a file, cannot be written, or holds a run of another configuration. A
        complete run with fewer seeds is accepted: the missing ones can be added.
    """
    try:
        settle(workdir)
        places = (workdir, *workdir.absolute().parents)
        existing = next(place for place in places if place.exists())
        saved = (workdir / "config.json").exists()
        left = [
            n for n in ("checkpoints", "metrics.jsonl", "result.json") if (workdir / n).exists()
        ]
    except OSError as error:  # no access to a parent, or a name that is too long
        raise UserError(
            f"--workdir: cannot use {workdir} ({error.strerror}); name another folder"
        ) from error
    _refuse_source(workdir, config)
    if not existing.is_dir():
        raise UserError(f"--workdir: {existing} is a file; name a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--workdir: cannot write to {existing}; name another folder")
    if overwrite:
        return False
    if not saved:
        if left:  # of an unknown configuration; resuming could mix two
            raise UserError(
                f"--workdir: {workdir} holds {left[0]} but no config.json; name another folder, "
                "or pass --overwrite to start afresh"
            )
        return False
    try:
        old = flatten(json.loads((workdir / "config.json").read_text()))
    except OSError as error:
        raise UserError(
            f"--workdir: cannot read {workdir / 'config.json'} ({error.strerror}); make it "
            "readable, or name another folder"
        ) from error
    except (ValueError, AttributeError) as error:  # not JSON, or not a dict
        raise UserError(
            f"--workdir: {workdir / 'config.json'} is damaged ({error}); pass --overwrite to start "
            "afresh"
        ) from error
    # A missing field of an earlier version has the meaning of its default, or a known one.
    found = differences(flatten(default()) | BEFORE | old, flatten(config))
    complete = (workdir / "result.json").exists()
    if len(found) == 1 and found[0].startswith("num_seeds: "):
        _check_seeds(workdir, old["num_seeds"], config, complete)
        return False
    if found:
        raise UserError(
            f"--workdir: {workdir} holds a run of another configuration ({'; '.join(found)}); "
            "name another folder, or pass --overwrite"
        )
    if complete and (lacks := _lacks(workdir, config)):
        print(f"bpnjax: {workdir}: {lacks}; it is made again from the checkpoint", file=sys.stderr)
        return False
    return complete


def _lacks(workdir: pathlib.Path, config: ConfigDict) -> str:
    """What is missing or damaged in a complete run, as text; "" if nothing is.

    Raises `UserError` if the result belongs to another configuration.
    """
    try:
        result = json.loads((workdir / "result.json").read_text())
        summary, models = result["summary"], result.get("models", {})
        if not isinstance(summary, dict) or not isinstance(models, dict):
            raise ValueError("it is not a result")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"result.json is damaged ({type(error).__name__}: {error})"
    own = fingerprint(config)
    if result.get("config_hash", own) != own:
        raise UserError(
            f"--workdir: result.json in {workdir} is of the configuration {result['config_hash']}, "
            f"and config.json beside it of {own}; name another folder, or pass --overwrite"
        )
    for name, digest in models.items():
        path = workdir / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256(path) != digest:
            return f"{name} is not what was written"
    return ""


def _check_seeds(workdir: pathlib.Path, there: Any, config: ConfigDict, complete: bool) -> None:
    """Raises an error for another number of seeds, unless a complete run gets more."""
    asked, fix = config.num_seeds, "name another --workdir, or pass --overwrite to start afresh"
    if not isinstance(there, int) or asked < there:
        raise UserError(
            f"num_seeds: {asked} asked for, and {workdir} holds {there}; seeds are added to a run "
            f"and not taken out of it: ask for {there} or more, {fix}"
        )
    if not complete:
        raise UserError(
            f"num_seeds: {asked} asked for, and {workdir} holds a run of {there} that is not "
            f"complete; end it with --config.num_seeds={there} and ask for {asked} then, {fix}"
        )
    begun = more_seeds(workdir)
    if begun and begun[0] == config.seed + there and begun[1] != asked - there:
        total = there + begun[1]
        raise UserError(
            f"num_seeds: {asked} asked for, and {workdir} is being extended to {total}; end that "
            f"with --config.num_seeds={total}, or delete {workdir / MORE_SEEDS}"
        )


def more_seeds(workdir: pathlib.Path) -> tuple[int, int] | None:
    """The seeds that are being added to a run.

    Args:
      workdir: the run's folder.

    Returns:
      The first of them and their number; None if there are none.
    """
    try:
        config = json.loads((workdir / MORE_SEEDS / "config.json").read_text())
        return config["seed"], config["num_seeds"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def seeds_there(workdir: pathlib.Path) -> int:
    """The number of seeds of a complete run in a folder.

    Args:
      workdir: the folder.

    Returns:
      Their number; 0 if there is no complete run.
    """
    if not (workdir / "result.json").exists():
        return 0
    return json.loads((workdir / "config.json").read_text())["num_seeds"]


def settle(workdir: pathlib.Path) -> None:
    """Replaces a run by the same run with further seeds.

    The joined run is in ``more_seeds/joined``. Its ``result.json`` is moved last, so the move can
    be repeated until it succeeds.

    Args:
      workdir: the run's folder.
    """
    joined = workdir / MORE_SEEDS / "joined"
    if not (joined / "result.json").exists():
        return
    for path in sorted(joined.iterdir(), key=lambda path: path.name == "result.json"):
        target = workdir / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    shutil.rmtree(workdir / MORE_SEEDS)


def _refuse_source(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Raises an error if a run would overwrite the run that it resumes from."""
    source = pathlib.Path(config.resume_from)
    if config.resume_from and workdir.resolve() in (source.resolve(), source.resolve().parent):
        raise UserError(
            f"--workdir: {workdir} is the run that --resume_from names; give this one a --workdir "
            "of its own"
        )


def claim(workdir: pathlib.Path, config: ConfigDict, overwrite: bool) -> None:
    """Takes the folder for this configuration. Call it after all checks.

    Args:
      workdir: the folder; it is made if it does not exist.
      config: the run's configuration, written to ``config.json``.
      overwrite: whether to remove the files of an earlier run (and nothing else).

    Raises:
      UserError: it cannot be written.
    """
    _refuse_source(workdir, config)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if overwrite:
            # The old config.json is replaced last. So after a kill in between, no checkpoint of the
            # old run can be mistaken for one of the new configuration.
            for folder in ("checkpoints", log_copies.FOLDER, MORE_SEEDS):
                if (workdir / folder).exists():
                    shutil.rmtree(workdir / folder)
            for pattern in _LEFT_BY_A_RUN:
                for path in workdir.glob(pattern):
                    path.unlink()
        text = json.dumps(plain(config.to_dict()), indent=1) + "\n"
        write_atomically(workdir / "config.json", text)
    except OSError as error:
        raise UserError(
            f"--workdir: cannot write to {workdir} ({error.strerror}); name another folder"
        ) from error
