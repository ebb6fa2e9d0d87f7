"""What a run knows besides its state while it lasts, and what it says of itself at its end."""

import importlib.metadata
import platform
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from bpnjax.data import TaskSequence
from bpnjax.evaluation import metrics
from bpnjax.evaluation.accuracy import KINDS
from bpnjax.run import byte_counts, writers
from bpnjax.training.experiment import Experiment


def new_record(config: ConfigDict, num_tasks: int) -> dict[str, Any]:
    """What a run knows besides its state: accuracies so far and times.

    Args:
      config: a run configuration.
      num_tasks: T.

    Returns:
      A dict: ``accuracy`` float64 ``[num_seeds, T, T]`` of each kind, NaN; times in seconds,
      examples, steps and the length of the log in bytes, all 0.
    """
    empty = np.full((config.num_seeds, num_tasks, num_tasks), np.nan)
    return {
        "accuracy": {kind: empty.copy() for kind in KINDS},
        "task_guess": empty.copy(),
        "train_seconds": 0.0,
        "evaluate_seconds": 0.0,
        "compile_seconds": 0.0,
        "examples": 0.0,
        "total_steps": 0,
        "metrics_length": 0,
    }


def from_json(stored: dict[str, Any]) -> dict[str, Any]:
    """A record as it was before it went into a checkpoint's manifest.

    Args:
      stored: of `new_record`, gone through `bpnjax.run.writers.plain` and JSON.

    Returns:
      It with float64 arrays again, NaN where nothing was tested.
    """
    arrays = {
        kind: np.array(writers.plain_nan(matrix), float)
        for kind, matrix in stored["accuracy"].items()
    }
    guess = np.array(writers.plain_nan(stored["task_guess"]), float)
    return stored | {"accuracy": arrays, "task_guess": guess}


def make(
    config: ConfigDict, experiment: Experiment, sequence: TaskSequence, record: dict[str, Any]
) -> dict[str, Any]:
    """The result of a run, the content of ``result.json``.

    Args:
      config: of the run.
      experiment: its static side.
      sequence: what was learned.
      record: at its end.

    Returns:
      A dict whose arrays become lists in the file: settings, versions, device, the accuracy matrix
      of each kind and its summary, how often the task was inferred rightly, memory, the paper's
      figures, times.
    """
    return {
        "name": config.name,
        "method": config.method,
        "seed": config.seed,
        "num_seeds": config.num_seeds,
        "config": config.to_dict(),
        "versions": versions(),
        "device": device_name(),
        "accuracy": record["accuracy"],
        "summary": {k: metrics.summarise(m) for k, m in record["accuracy"].items()},
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
    """How the task was inferred, and how often rightly; None for methods without modes."""
    if not experiment.told_task:
        return None
    return {
        "rule": config.evaluate.rule,
        "per": config.evaluate.infer,
        "task_accuracy": right,
        "summary": {"task_accuracy": metrics.mean_and_sd(right[:, -1].mean(-1))},
    }


def versions() -> dict[str, str]:
    """Versions of what a result depends on.

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


def device_name() -> str:
    """The devices of this host in words.

    Returns:
      Such as ``2 x cpu``.
    """
    return f"{jax.local_device_count()} x {jax.devices()[0].device_kind}"
