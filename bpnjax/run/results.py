"""The record of a run while it lasts, and its result at the end."""

import importlib.metadata
import json
import pathlib
import platform
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from bpnjax.config import fingerprint
from bpnjax.data import TaskSequence
from bpnjax.evaluation import metrics
from bpnjax.evaluation.accuracy import KINDS
from bpnjax.run import byte_counts, doubts, export, writers
from bpnjax.run.checkpoint import sha256
from bpnjax.training.epochs import RunState
from bpnjax.training.experiment import Experiment
from bpnjax.utils import prng
from bpnjax.utils.errors import UserError


def new_record(config: ConfigDict, num_tasks: int, data_version: str = "") -> dict[str, Any]:
    """The record of a run beside its state: accuracies so far, and times.

    Args:
      config: a run configuration.
      num_tasks: T.
      data_version: of the sequence.

    Returns:
      A dict: hashes of the configuration and of what is drawn at random here, ``data_version``;
      ``accuracy`` float64 ``[num_seeds, T, T]`` of each kind, NaN; and times in seconds, examples,
      steps and the length of the log in bytes, all 0.
    """
    empty = np.full((config.num_seeds, num_tasks, num_tasks), np.nan)
    return {
        "config_hash": fingerprint(config),
        "draws": prng.fingerprint(),
        "data_version": data_version,
        "accuracy": {kind: empty.copy() for kind in KINDS},
        "task_guess": empty.copy(),
        "train_seconds": 0.0,
        "evaluate_seconds": 0.0,
        "compile_seconds": 0.0,
        "examples": 0.0,
        "total_steps": 0,
        "metrics_length": 0,
    }


def check_data(
    stored: dict[str, Any], config: ConfigDict, sequence: TaskSequence, workdir: pathlib.Path
) -> None:
    """Checks that a resumed run still has its configuration, data and random numbers.

    Args:
      stored: its record or result so far; earlier versions wrote less.
      config: a run configuration.
      sequence: the data now.
      workdir: the run's folder.

    Raises:
      UserError: one of them differs.
    """
    own = fingerprint(config)
    if stored.get("config_hash", own) != own:
        raise UserError(
            f"--workdir: {workdir} holds a run of the configuration {stored['config_hash']}, and "
            f"this run has {own}; name another folder, or pass --overwrite"
        )
    if stored.get("draws", prng.fingerprint()) != prng.fingerprint():
        raise UserError(
            f"--workdir: the run in {workdir} drew other random numbers than JAX does here; set "
            "jax_threefry_partitionable as it was, or pass --overwrite"
        )
    was = stored.get("data_version", sequence.version)
    if was != sequence.version:
        field = "path" if config.dataset.path else "name"
        raise UserError(
            f"dataset.{field}: {config.dataset[field]!r} changed since the run in {workdir} began "
            f"(from version {was!r} to {sequence.version!r}); bring the data back, name another "
            "--workdir, or pass --overwrite"
        )


def from_json(stored: dict[str, Any]) -> dict[str, Any]:
    """Restores a record from a checkpoint's manifest.

    Args:
      stored: from `new_record`, after `bpnjax.run.writers.plain` and JSON.

    Returns:
      The record with float64 arrays again, NaN where nothing was tested.
    """
    arrays = {
        kind: np.array(writers.plain_nan(matrix), float)
        for kind, matrix in stored["accuracy"].items()
    }
    guess = np.array(writers.plain_nan(stored["task_guess"]), float)
    return stored | {"accuracy": arrays, "task_guess": guess}


def join(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Joins the records of several runs of the same tasks with different seeds.

    Args:
      records: from `new_record`.

    Returns:
      One record: accuracies along the axis of seeds, seconds and examples added, the steps of one.
    """
    first = records[0]
    joined = {
        name: sum(record[name] for record in records)
        for name, value in first.items()
        if isinstance(value, float)
    }
    return (
        first
        | joined
        | {
            "accuracy": {
                kind: np.concatenate([record["accuracy"][kind] for record in records])
                for kind in first["accuracy"]
            },
            "task_guess": np.concatenate([record["task_guess"] for record in records]),
        }
    )


def read(workdir: pathlib.Path) -> dict[str, Any]:
    """Reads the result of a complete run.

    Args:
      workdir: its folder.

    Returns:
      The content of ``result.json``, with lists where `make` has arrays.

    Raises:
      UserError: there is no result, or it is damaged.
    """
    path = workdir / "result.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--workdir: cannot read {path} ({error}); pass --overwrite") from error


def write_all(
    workdir: pathlib.Path,
    config: ConfigDict,
    experiment: Experiment,
    sequence: TaskSequence,
    state: RunState,
    record: dict[str, Any],
) -> dict[str, Any]:
    """Writes models, figures and results to a folder that has ``metrics.jsonl``.

    Args:
      workdir: the folder.
      config: of the run.
      experiment: the static facts of the run.
      sequence: the tasks of the run.
      state: after the last task, with a leading axis of seeds if there are several.
      record: at the end.

    Returns:
      The result, see `make`.
    """
    from bpnjax.run import plots

    result = make(config, experiment, sequence, record)
    models = export.save_models(workdir, experiment, state, config.num_seeds, sequence)
    result["doubts"] = doubts.found(record["accuracy"], sequence, state, experiment.told_task)
    for doubt in result["doubts"]:
        print(f"bpnjax: warning: {doubt}", file=sys.stderr, flush=True)
    result["models"] = {path.name: sha256(path) for path in models}
    try:
        plots.draw(workdir, writers.plain(result))
    except Exception as error:  # figures can be drawn again; the result must not be lost
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"bpnjax: no figures ({why}); draw them with bpnjax plots {workdir}", file=sys.stderr)
    writers.write_result(workdir, result)
    return result


def make(
    config: ConfigDict, experiment: Experiment, sequence: TaskSequence, record: dict[str, Any]
) -> dict[str, Any]:
    """Makes the result of a run, the content of ``result.json``.

    Args:
      config: of the run.
      experiment: the static facts of the run.
      sequence: the tasks of the run.
      record: at its end.

    Returns:
      A dict, whose arrays become lists in the file: settings, versions, device, the accuracy matrix
      of each kind and its summary, how often the task was inferred correctly, memory, the figures
      of the paper, times.
    """
    return {
        "name": config.name,
        "method": config.method,
        "seed": config.seed,
        "num_seeds": config.num_seeds,
        "config": config.to_dict(),
        "config_hash": record["config_hash"],
        "draws": record["draws"],
        "data_version": sequence.version,
        "versions": versions(),
        "device": device_name(),
        "accuracy": record["accuracy"],
        "summary": {
            kind: metrics.summarise(matrices, sequence.test.count)
            for kind, matrices in record["accuracy"].items()
        },
        "inference": _inference(config, experiment, record["task_guess"]),
        "memory": byte_counts.report(experiment),
        "paper": dict(config.paper.get(config.method, {})),
        "time": {
            "train_seconds": record["train_seconds"],
            "evaluate_seconds": record["evaluate_seconds"],
            "compile_seconds": record["compile_seconds"],
            "examples_per_second": record["examples"] / max(record["train_seconds"], 1e-9),
        },
        "class_names": [
            [sequence.class_names[c] for c in np.flatnonzero(row)] for row in sequence.classes
        ],
    }


def _inference(
    config: ConfigDict, experiment: Experiment, right: np.ndarray
) -> dict[str, Any] | None:
    """How the task was inferred, and how often correctly; None for methods without modes."""
    if not experiment.told_task:
        return None
    return {
        "rule": config.evaluate.rule,
        "per": config.evaluate.infer,
        "task_accuracy": right,
        "summary": {"task_accuracy": metrics.mean_and_sd(right[:, -1].mean(-1))},
    }


def versions() -> dict[str, str]:
    """The versions of Python and packages that a result depends on.

    Returns:
      ``{"python": ..., "jax": ..., ...}``.
    """
    names = ("bpnjax", "jax", "jaxlib", "flax", "optax", "numpy", "tensorflow-datasets")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def commit() -> str:
    """The commit of this code, for result files.

    Returns:
      Ten digits of its hash, with ``" and changes"`` if files were changed since; or a text that
      says that the code is not in a clone.
    """
    home = pathlib.Path(__file__).resolve().parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=home, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + (
            " and changes" if git("status", "--porcelain", "--", "..") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "not from a clone"


def device_name() -> str:
    """Describes the devices of this host.

    Returns:
      A text such as ``2 x cpu``.
    """
    return f"{jax.local_device_count()} x {jax.devices()[0].device_kind}"
