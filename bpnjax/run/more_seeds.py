"""More seeds for a run that is complete.

The missing seeds run in the folder ``more_seeds`` of the run's, as a run that can be cut and goes
on. When they are done, both are joined into what one run of all seeds would have left.
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
      there: how many it has, the first ones.

    Returns:
      A configuration of the others.

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
    """What a complete run knew at its end.

    Args:
      folder: of the run.
      experiment: its static side.
      num_seeds: of the run.

    Returns:
      The state with a leading axis of seeds, also for one; and the record.

    Raises:
      UserError: the last checkpoint is not there, or damaged.
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
    """Joins a run and the seeds that were added to it, and puts the whole into its place.

    Args:
      folder: of the run; the other seeds lie complete in its folder ``more_seeds``.
      config: of the run with all seeds.
      experiment: its static side.
      sequence: what was learned.
      earlier: of the run without the added seeds, as `last_state` gives it.

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
    """The lines of ``metrics.jsonl`` of two runs of the same tasks with other seeds, as of one.

    Args:
      first: lines; lists in them have an entry for each seed.
      second: the same of the seeds that follow.

    Returns:
      Lines whose lists have the entries of all seeds. Where only one run has a line of a place
      (checkpoints and memory of the device decide how long the stretches are), the entries of the
      other are None.

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
    """Where in a run a line belongs, in the order of lines."""
    return line["total_steps"], line["kind"] != "train", line.get("task_finished", False)


def _entries(line: dict[str, Any]) -> list[Any]:
    return next(value for value in line.values() if isinstance(value, list))


def _nothing(like: Any) -> Any:
    return [_nothing(value) for value in like] if isinstance(like, list) else None
