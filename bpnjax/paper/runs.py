"""The runs behind an artefact: ordinary runs of ordinary configurations, each in its folder."""

import json
import pathlib
import shlex
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from bpnjax import config as configuration
from bpnjax.evaluation.accuracy import KINDS
from bpnjax.run import train, workdir
from bpnjax.run.writers import number, plain_nan
from bpnjax.utils.errors import UserError


class Runner(NamedTuple):
    """Where runs go, and the user's changes to all of them."""

    folder: pathlib.Path
    configs: pathlib.Path  # the folder of configuration files
    num_seeds: int  # 0: the artefact's number
    overrides: dict[str, Any]  # {field: value}
    sequence: str = ""  # for table2


class Run(NamedTuple):
    """A complete run."""

    label: str
    result: dict[str, Any]  # result.json
    metrics: list[dict[str, Any]]  # metrics.jsonl
    folder: pathlib.Path
    command: str


def configured(
    runner: Runner, config_file: str, method: str, seeds: int, changes: dict[str, Any]
) -> ConfigDict:
    """Makes the configuration of a run: the file with the artefact's and the user's changes.

    Args:
      runner: its overrides come last; its number of seeds, if any, replaces ``seeds``.
      config_file: a file in the folder of configurations, such as ``"mnist.py"``.
      method: name of a method.
      seeds: number of seeds.
      changes: ``{field: value}``.

    Returns:
      A validated configuration.

    Raises:
      UserError: there is no such file or field, or a value is invalid.
    """
    config = configuration.load_file(str(runner.configs / config_file))
    config.method = method
    config.num_seeds = runner.num_seeds or seeds
    config = configuration.with_tuned(config)
    for field, value in (changes | runner.overrides).items():
        configuration.check_field(config, field)
        config.update_from_flattened_dict({field: value})
    configuration.validate(config)
    return config


def complete(
    runner: Runner, label: str, config_file: str, method: str, seeds: int, **fields: Any
) -> Run:
    """Runs a method on a configuration unless its folder holds that run already.

    Args:
      runner: where runs go, and changes to all of them.
      label: name of the run in tables.
      config_file: a file in the folder of configurations, such as ``"mnist.py"``.
      method: name of a method.
      seeds: number of seeds, unless the runner has one.
      **fields: further changes, such as ``gem__memories=10`` for ``gem.memories``.

    Returns:
      `Run`.

    Raises:
      UserError: there is no such configuration, or it cannot run.
    """
    changes = {name.replace("__", "."): value for name, value in fields.items()}
    config = configured(runner, config_file, method, seeds, changes)
    marks = [f"{k}={v}" for k, v in changes.items() if not k.startswith("evaluate.")]
    folder = runner.folder / config.name / "-".join([method, *marks]).replace("/", "_")
    if not workdir.check(folder, config, overwrite=False):
        train.train_and_evaluate(config, folder)
    flags = [f"--config.{name}={value}" for name, value in changes.items()]
    command = shlex.join(
        ["python", "-m", "bpnjax.main", f"--config=configs/{config_file}",
         f"--config.method={method}", f"--config.num_seeds={config.num_seeds}", *flags]
    )  # fmt: skip
    return read(folder, label, command)


def read(folder: pathlib.Path, label: str, command: str) -> Run:
    """Reads a complete run from its folder.

    Args:
      folder: of the run.
      label: name of the run in tables.
      command: the command that makes the run.

    Returns:
      `Run`.
    """
    result = json.loads((folder / "result.json").read_text())
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return Run(label, result, [json.loads(line) for line in lines], folder, command)


def matrix(run: Run, kind: str = "task_told") -> np.ndarray:
    """The accuracies of a run.

    Args:
      run: a complete run.
      kind: one of the three kinds of accuracy.

    Returns:
      float ``[seeds, T, T]``. Row i has the accuracies on all tasks after task i, NaN if untested.
    """
    return np.asarray(plain_nan(run.result["accuracy"][kind]), float)


def by_epoch(run: Run, kind: str = "task_told") -> tuple[np.ndarray, np.ndarray]:
    """The accuracies after each epoch of the sequence.

    Args:
      run: a run with ``evaluate.every_epochs=1``.
      kind: one of the three kinds of accuracy.

    Returns:
      The epochs, int ``[E]``, counted from 1 through all tasks; and float ``[E, seeds, T]``.

    Raises:
      UserError: the run was not tested after each epoch.
    """
    lines = [m for m in run.metrics if m["kind"] == "evaluate" and not m["task_finished"]]
    if not lines:
        raise UserError(f"{run.folder}: was not tested after each epoch; run the artefact again")
    values = np.array([plain_nan(line[kind]) for line in lines], float)
    return np.arange(1, len(lines) + 1), values


def averages(run: Run) -> list[str]:
    """The results of a run after all tasks, over seeds, for a row of the ledger.

    Args:
      run: a complete run.

    Returns:
      Accuracy of task 1 told, and the averages told, masked and inferred, as ``mean ± sd``.
    """
    summary = run.result["summary"]
    found = [summary["task_told"]["first_task_accuracy"]]
    found += [summary[kind]["average_accuracy"] for kind in KINDS]
    return [number(each["mean"], each["sd"]) for each in found]


def seconds(runs: Iterable[Run]) -> float:
    """Training, testing and compile time of several runs together.

    Args:
      runs: complete runs.

    Returns:
      Seconds.
    """
    names = ("train_seconds", "evaluate_seconds", "compile_seconds")
    return sum(run.result["time"][name] for run in runs for name in names)
