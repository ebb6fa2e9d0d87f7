"""Adds seeds to a complete run.

The missing seeds run in the subfolder ``more_seeds``, as a run that can be interrupted and resumed.
Then both runs are joined into what one run of all seeds would have written.
"""

import copy
import json
import pathlib
from functools import partial
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from bpnjax.config import fingerprint
from bpnjax.data import TaskSequence
from bpnjax.run import checkpoint, log_copies, results, workdir, writers
from bpnjax.training import epochs
from bpnjax.training.epochs import RunState
from bpnjax.training.experiment import Experiment
from bpnjax.utils import prng
from bpnjax.utils.errors import UserError


def missing(config: ConfigDict, there: int) -> ConfigDict:
    """The configuration of the seeds that a run lacks.

    Args:
      config: of the run with all seeds.
      there: number of seeds that the run has, which are the first ones.

    Returns:
      A configuration of the missing seeds.

    Example:
      >>> from bpnjax import config
      >>> from bpnjax.run import more_seeds
      >>> settings = config.default()
      >>> settings.num_seeds = 5
      >>> others = more_seeds.missing(settings, 3)
      >>> others.seed, others.num_seeds
      (3, 2)
    """
    others = copy.deepcopy(config)
    others.seed, others.num_seeds = config.seed + there, config.num_seeds - there
    return others


def last_state(
    folder: pathlib.Path, experiment: Experiment, num_seeds: int
) -> tuple[RunState, dict[str, Any]]:
    """Reads the state and record of a complete run.

    Args:
      folder: of the run.
      experiment: its static facts.
      num_seeds: its number of seeds.

    Returns:
      The state with a leading axis of seeds, even for one seed; and the record.

    Raises:
      UserError: the last checkpoint is missing or damaged.
    """
    abstract = jax.eval_shape(partial(epochs.init_state, experiment), prng.key(0))
    if num_seeds > 1:
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((num_seeds, *leaf.shape), leaf.dtype), abstract
        )
    found = checkpoint.restore_latest(folder / "checkpoints", abstract)
    if found is None or found[0] != (experiment.num_tasks, 0, 0):
        raise UserError(
            f"num_seeds: seeds are added to the last checkpoint of a run, and {folder} has none "
            "that is whole; name another --workdir, or pass --overwrite to start afresh"
        )
    state = found[1]
    if num_seeds == 1:
        state = jax.tree.map(lambda leaf: leaf[None], state)
    return state, results.from_json(found[2])


def join(
    folder: pathlib.Path,
    config: ConfigDict,
    experiment: Experiment,
    sequence: TaskSequence,
    earlier: tuple[RunState, dict[str, Any]],
) -> dict[str, Any]:
    """Joins a run with the seeds that were added to it, and replaces the run by the result.

    Args:
      folder: of the run. Its subfolder ``more_seeds`` has the complete run of the other seeds.
      config: of the run with all seeds.
      experiment: its static facts.
      sequence: the tasks of the run.
      earlier: the run without the added seeds, from `last_state`.

    Returns:
      The result, see `bpnjax.run.results.make`.
    """
    added = folder / workdir.MORE_SEEDS
    there = len(earlier[1]["task_guess"])
    later = last_state(added, experiment, config.num_seeds - there)
    numbers = [prng.to_numbers(state) for state, _ in (earlier, later)]
    joined_numbers = jax.tree.map(lambda *leaves: np.concatenate(leaves), *numbers)
    state = prng.from_numbers(joined_numbers, earlier[0])
    record = results.join([earlier[1], later[1]])
    record |= {"config_hash": fingerprint(config), "draws": prng.fingerprint()}

    joined = added / "joined"
    workdir.claim(joined, config, overwrite=True)
    lines = [
        [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        for place in (folder, added)
    ]
    text = "".join(f"{json.dumps(line)}\n" for line in join_lines(*lines))
    checkpoint.write_atomically(joined / "metrics.jsonl", text)
    copies = log_copies.open_copies(config.log, joined, config.seed)
    log = writers.MetricsLog(joined / "metrics.jsonl", len(text.encode()), copies)
    log.close()
    record["metrics_length"] = log.length
    checkpoint.save(
        joined / "checkpoints",
        checkpoint.Position(experiment.num_tasks, 0, 0),
        state,
        writers.plain(record),
        config.checkpoint.keep,
    )
    result = results.write_all(joined, config, experiment, sequence, state, record)
    workdir.settle(folder)
    return result


def join_lines(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Joins the lines of ``metrics.jsonl`` of two runs of the same tasks with different seeds.

    Args:
      first: lines. Lists in them have one entry per seed.
      second: lines of the seeds that follow.

    Returns:
      Lines whose lists have the entries of all seeds. Checkpoints and device memory determine where
      lines are written; if only one run has a line at some place, the entries of the other are
      None.

    Example:
      >>> from bpnjax.run.more_seeds import join_lines
      >>> line = {"kind": "train", "total_steps": 7, "loss": [0.5], "examples_per_second": 100.0}
      >>> join_lines([line], [line | {"loss": [0.25, 0.75]}])[0]["loss"]
      [0.5, 0.25, 0.75]
    """
    sides = [{_place(line): line for line in lines} for lines in (first, second)]
    seeds = [len(_entries(next(iter(side.values())))) for side in sides]
    found = []
    for place in sorted({*sides[0], *sides[1]}):
        one, other = (side.get(place) for side in sides)
        line = dict(one or other or {})
        for name, value in line.items():
            if isinstance(value, list):
                halves = [
                    half[name] if half else [_nothing(value[0])] * n
                    for half, n in zip((one, other), seeds, strict=True)
                ]
                line[name] = halves[0] + halves[1]
        if one and other and "examples_per_second" in line:
            rates = [half["examples_per_second"] for half in (one, other)]
            seconds = sum(n / rate for n, rate in zip(seeds, rates, strict=True))
            line["examples_per_second"] = sum(seeds) / seconds
        found.append(line)
    return found


def _place(line: dict[str, Any]) -> tuple[Any, ...]:
    """The place of a line in a run, for sorting."""
    return line["total_steps"], line["kind"] != "train", line.get("task_finished", False)


def _entries(line: dict[str, Any]) -> list[Any]:
    return next(value for value in line.values() if isinstance(value, list))


def _nothing(like: Any) -> Any:
    return [_nothing(value) for value in like] if isinstance(like, list) else None
