"""Trials of one method: settings in, accuracies out.

If a whole run fits into one program, all trials share it: it is compiled once, and numbers are its
arguments. Settings that shapes or the program depend on (an integer, a choice) have their own
programs. Other runs (augmented or streamed images, all tasks at once, early stopping) are ordinary
runs in a folder, which an interrupted trial resumes.
"""

import json
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from bpnjax.config import validate
from bpnjax.run import sweep, train
from bpnjax.search.spaces import Axis
from bpnjax.training import compilation

__all__ = ["Measured", "Stopped", "Trials"]

Hopeless = Callable[[int, float], bool]


class Measured(NamedTuple):
    """The result of a trial."""

    value: float | None  # average accuracy after the last task; None if the run diverged
    steps: int
    seconds: float


class Stopped(Exception):
    """A trial was stopped early.

    Attributes:
      steps: number of steps that it ran.
    """

    def __init__(self, steps: int) -> None:
        super().__init__(steps)
        self.steps = steps


class Trials:
    """Runs trials of a method."""

    def __init__(
        self, config: ConfigDict, axes: Sequence[Axis], folder: pathlib.Path, at_once: bool
    ) -> None:
        """Reads and compiles nothing yet.

        Args:
          config: configuration of the trials, validated. Its ``search.objective`` is what they
            maximise.
          axes: the searched settings.
          folder: for ordinary runs, each in its own subfolder.
          at_once: whether several trials are one `jax.vmap`.
        """
        self._config, self._folder, self._at_once = config, folder, at_once
        self._traced = {axis.field for axis in axes if axis.traced}
        self._programs: dict[Any, sweep.WholeRuns] = {}
        self._whole = True

    def forget(self) -> None:
        """Releases compiled programs and their data."""
        self._programs.clear()

    def configured(self, values: Mapping[str, Any]) -> ConfigDict:
        """Makes the configuration of a trial.

        Args:
          values: ``{field: value}``.

        Returns:
          A validated copy.

        Raises:
          UserError: the values do not fit together.
        """
        config = self._config.copy_and_resolve_references()
        config.update_from_flattened_dict(dict(values))
        validate(config)
        return config

    def measure(
        self, several: Sequence[Mapping[str, Any]], places: Sequence[int], hopeless: Hopeless | None
    ) -> list[Measured]:
        """Runs trials.

        Args:
          several: the values ``{field: value}`` of each trial.
          places: the place of each trial, which names its folder.
          hopeless: called with the number of tasks learned and the average accuracy on them; True
            stops the trial. It makes the trial an ordinary run, because only those can call it.

        Returns:
          `Measured` of each trial.

        Raises:
          UserError: a trial cannot run.
          Stopped: ``hopeless`` returned True.
        """
        for values in several:
            self.configured(values)
        if hopeless is None and self._whole:
            try:
                return self._measure_whole(several)
            except sweep.NotWhole:
                self._whole = False
        return [self._run(v, n, hopeless) for v, n in zip(several, places, strict=True)]

    def _measure_whole(self, several: Sequence[Mapping[str, Any]]) -> list[Measured]:
        """Measures by whole-run programs; trials that share a program run together."""
        groups: dict[Any, list[int]] = {}
        for i, values in enumerate(several):
            own = {f: v for f, v in values.items() if f not in self._traced}
            groups.setdefault(tuple(sorted(own.items())), []).append(i)
        found: dict[int, Measured] = {}
        for static, members in groups.items():
            started = time.perf_counter()
            numbers = {f: np.array([several[i][f] for i in members]) for f in self._traced}
            program = self._program(static)
            try:
                accuracy, diverged = program(numbers)
            except (TypeError, ValueError) as error:
                if not self._traced or not _from_tracing(error):
                    raise
                self._traced = set()  # a user's own method may need the values of its numbers
                self._programs.clear()
                return self._measure_whole(several)
            kind = self._config.search.objective
            values = accuracy[kind][:, :, -1].mean((1, 2))
            seconds = (time.perf_counter() - started) / len(members)
            for i, value, bad in zip(members, values, np.any(diverged, 1).tolist(), strict=True):
                found[i] = Measured(None if bad else float(value), program.steps, seconds)
        return [found[i] for i in range(len(several))]

    def _program(self, static: tuple[tuple[str, Any], ...]) -> sweep.WholeRuns:
        if static not in self._programs:
            config = self.configured(dict(static))
            compilation.keep(config)
            self._programs[static] = sweep.WholeRuns(
                config, sorted(self._traced), self._at_once,
                inferred=config.search.objective == "task_inferred",
            )  # fmt: skip
        return self._programs[static]

    def _run(self, values: Mapping[str, Any], place: int, hopeless: Hopeless | None) -> Measured:
        """Measures by an ordinary run, which resumes after an interruption."""
        config = self.configured(values)
        if hopeless is not None:
            config.evaluate.every_tasks = 1
        kind, steps = config.search.objective, 0
        folder = self._folder / f"{place:04d}"

        def look(line: dict[str, Any]) -> None:
            nonlocal steps
            steps = line.get("total_steps", steps)
            if hopeless is not None and line["kind"] == "evaluate" and line["task_finished"]:
                told = np.asarray(line[kind], float)
                if np.isnan(told).all():  # task_inferred is measured at the end only
                    told = np.asarray(line["task_told"], float)
                if hopeless(line["task"], float(np.nanmean(told))):
                    raise Stopped(steps)

        started = time.perf_counter()
        try:
            result = train.train_and_evaluate(config, folder, on_log=look)
            value: float | None = float(np.asarray(result["accuracy"][kind], float)[:, -1].mean())
            lines = (folder / "metrics.jsonl").read_text().splitlines()
            steps = json.loads(lines[-1])["total_steps"]
        except train.LossNotFinite:
            value = None
        except Stopped:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)  # the results are in the storage
        return Measured(value, steps, time.perf_counter() - started)


def _from_tracing(error: Exception) -> bool:
    """Whether a program failed because it needs the value of a number during compilation."""
    kinds = (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError,
             jax.errors.TracerIntegerConversionError)  # fmt: skip
    return isinstance(error, kinds) or "racer" in str(error) or "metadata fields" in str(error)
