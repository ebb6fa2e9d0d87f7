"""Later tasks: a run that continues after the tasks of another run.

`resume_from` names the folder of a complete run, or one of its models. Its tasks come first in the
new, longer sequence and are not trained again. Their shared parameters, modes and the method's
state are copied into the first places of a fresh state, and training continues with the next task.

A model holds only what is needed to answer. What protects earlier tasks during later training (a
Fisher and its anchor, memories, teachers) is in the checkpoints of a run. A method with such a
protection needs the checkpoints.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from bpnjax.config import differences, flatten
from bpnjax.data import TaskSequence
from bpnjax.evaluation import task_inference
from bpnjax.methods import REGISTRY
from bpnjax.models.features import name_in_state
from bpnjax.run import checkpoint, predictor
from bpnjax.training import epochs, hosts
from bpnjax.training.epochs import RunState
from bpnjax.training.experiment import Experiment, make_experiment
from bpnjax.utils import arrays, prng
from bpnjax.utils.errors import UserError

# Fields that may differ in the new run, beside those that change no result. The classes of the
# tasks are compared directly, not through the fields that define them.
_MAY_DIFFER = (
    "resume_from", "name", "seed", "num_seeds", "devices", "parallel", "train", "evaluate",
    "sequence.num_tasks", "sequence.classes_per_task", "sequence.classes", "sequence.order_seed",
    "dataset.name", "dataset.path", "dataset.train_split", "bd.hidden_dim", "bd.epsilon",
    "bd.learning_rate", "plain_bias.learning_rate",
)  # fmt: skip


class Earlier(NamedTuple):
    """The tasks learned before, and what is known about them."""

    path: str  # as the user gave it
    num_tasks: int  # k
    config: Any  # ConfigDict of their run, with the fields of this version
    metadata: dict[str, Any]  # of its model
    state: RunState | None  # NumPy arrays, [num_seeds, ...] if several; None on other hosts

    def normalised(self, sequence: TaskSequence) -> TaskSequence:
        """The sequence with images scaled as in the earlier run."""
        scale, shift = (
            np.asarray(json.loads(self.metadata[name]), np.float32) for name in ("scale", "shift")
        )
        return dataclasses.replace(sequence, scale=scale, shift=shift)


def find(config: ConfigDict, sequence: TaskSequence) -> Earlier | None:
    """Reads what `resume_from` names, and checks that this run can continue from it.

    Args:
      config: a validated configuration of the longer sequence.
      sequence: the longer sequence.

    Returns:
      `Earlier`, or None if `resume_from` is empty.

    Raises:
      UserError: there is no such model, it does not fit, or it lacks what the method needs.
    """
    path = config.resume_from
    if not path:
        return None
    if REGISTRY[config.method].from_config(config).trains == "jointly":
        raise UserError(
            f"--resume_from: {config.method} trains on all tasks at once and learns none later; "
            "choose another method, or train the whole sequence anew"
        )
    metadata = hosts.first_asks(lambda: predictor.read_metadata(predictor.find_file(path)))
    if "merged" in metadata:
        raise UserError(
            f"--resume_from: {path} was merged from packs; go on from one of the runs that they "
            "come from, and pack its new tasks"
        )
    of_run = predictor.with_all_fields(json.loads(metadata["config"]))
    num_tasks = len(json.loads(metadata["outputs"]))
    earlier = Earlier(path, num_tasks, of_run, metadata, None)
    _check_fields(earlier, config)
    _check_sequence(earlier, config, sequence)
    state = None

    def read() -> Any:
        nonlocal state
        state = _read(earlier, config, sequence)

    hosts.first_asks(read)
    return earlier._replace(state=state)


def _check_fields(earlier: Earlier, config: ConfigDict) -> None:
    old, new = earlier.config, config
    skipped = [f for f in flatten(new) if any(f == m or f.startswith(m + ".") for m in _MAY_DIFFER)]
    found = differences(
        *({f: v for f, v in flatten(c).items() if f not in skipped} for c in (old, new))
    )
    for field in ("path",) if new.dataset.path or old.dataset.path else ("name",):
        texts = [c.dataset[field] for c in (old, new)]
        names = [[name.strip() for name in text.split(",")] for text in texts]
        several = new.sequence.kind == "datasets" or (field == "path" and len(names[1]) > 1)
        if names[0] != (names[1][: len(names[0])] if several else names[1]):
            found.append(f"dataset.{field}: {texts[0]!r} -> {texts[1]!r}")
    if found:
        raise UserError(
            f"--resume_from: {earlier.path} comes from a run with other settings "
            f"({'; '.join(found)}); set them as they were there"
        )
    told = REGISTRY[new.method].from_config(new).told_task
    if new.evaluate.rule in task_inference.MAPPERS and told:
        if new.evaluate.rule != old.evaluate.rule:
            raise UserError(
                f"--resume_from: {earlier.path} did not store what evaluate.rule="
                f"{new.evaluate.rule} needs; set it as in that run, {old.evaluate.rule}"
            )
        alone = new.evaluate.rule == "statistics"
        for field in ("statistics",) if alone else ("features", "clusters", "statistics"):
            if new.evaluate[field] != old.evaluate[field]:
                raise UserError(
                    f"--resume_from: {earlier.path} stored {new.evaluate.rule} of its tasks with "
                    f"evaluate.{field}={old.evaluate[field]}, and this run asks for "
                    f"{new.evaluate[field]}; set it as in that run"
                )
    of_file = int(earlier.metadata["seed"])
    first, last = of_file, of_file
    if pathlib.Path(earlier.path).is_dir():
        first, last = old.seed, old.seed + old.num_seeds - 1
    if not (first <= new.seed and new.seed + new.num_seeds - 1 <= last):
        has = f"seed {first}" if first == last else f"seeds {first} to {last}"
        raise UserError(
            f"--resume_from: {earlier.path} has {has}, this run asks for {new.num_seeds} from "
            f"{new.seed} on, and keys come from the seed; pass --config.seed={first} "
            f"--config.num_seeds={last - first + 1}"
        )


def _check_sequence(earlier: Earlier, config: ConfigDict, sequence: TaskSequence) -> None:
    k, path = earlier.num_tasks, earlier.path
    shape = tuple(json.loads(earlier.metadata["input_shape"]))
    if shape != sequence.train.images.shape[1:]:
        raise UserError(
            f"--resume_from: {path} reads images of shape {shape}, the set has "
            f"{sequence.train.images.shape[1:]}; name the set that it was trained on"
        )
    names = json.loads(earlier.metadata["class_names"])
    outputs = json.loads(earlier.metadata["outputs"])
    for task, (old, row) in enumerate(zip(outputs, sequence.classes, strict=False)):
        new = np.flatnonzero(row).tolist()
        was, now = [names[c] for c in old], [sequence.class_names[c] for c in new]
        if (old, was) != (new, now):
            raise UserError(
                f"--resume_from: task {task + 1} of {path} has the classes {', '.join(was)}, here "
                f"{', '.join(now)}; the tasks of the model come first, in their order"
            )
    if sequence.num_tasks <= k:
        raise UserError(
            f"--resume_from: {path} has {k} tasks and this sequence {sequence.num_tasks}; raise "
            f"sequence.num_tasks to {k + 1} or more"
        )
    chosen = config.sequence.classes or config.sequence.order_seed >= 0
    if config.dataset.validation and chosen and sequence.num_classes > len(names):
        raise UserError(
            f"dataset.validation: with {config.dataset.validation} and classes out of their order "
            "other examples of the earlier tasks would be held out than before; resume without it"
        )


def _abstract(earlier: Earlier, sequence: TaskSequence) -> tuple[Experiment, RunState]:
    """Experiment and state's shapes of one seed of the earlier run."""
    k, outputs = earlier.num_tasks, len(json.loads(earlier.metadata["class_names"]))
    experiment = make_experiment(
        earlier.config, dataclasses.replace(sequence, classes=sequence.classes[:k, :outputs])
    )
    return experiment, jax.eval_shape(partial(epochs.init_state, experiment), prng.key(0))


def _parts_that_go_on(method: str) -> tuple[str, ...]:
    """The parts of a learner's state that do not start fresh at each task."""
    if REGISTRY[method]().trains == "afresh":  # a new network for each task
        return ("task_variables", "method")
    return ("params", "variables", "task_variables", "method")


def kept_elsewhere(experiment: Experiment) -> list[str]:
    """Names the parts of a state that protect earlier tasks and are not in a model.

    Args:
      experiment: the static facts of the run.

    Returns:
      Names of parts of the learner's state, without duplicates; empty if the model has all of it.
    """
    needed = experiment.learner.answering()
    missing = []
    for part in _parts_that_go_on(experiment.config.method):
        tree = getattr(needed, part)
        names = jax.tree.leaves(arrays.names_of(tree))
        for name, n in zip(names, jax.tree.leaves(tree), strict=True):
            if not n:
                words = (word for word in name.split("/") if not word.isdecimal())
                missing.append(next(words, part))
    return list(dict.fromkeys(missing))


def _read(earlier: Earlier, config: Any, sequence: TaskSequence) -> RunState:
    experiment, abstract = _abstract(earlier, sequence)
    seeds = range(config.seed, config.seed + config.num_seeds)
    lacking = kept_elsewhere(experiment)
    if not config.train.reset_optimizer:
        lacking.append("the optimizer's state (train.reset_optimizer=False)")
    if lacking:
        states = _from_checkpoint(earlier, abstract, seeds, lacking)
    else:
        states = [_from_model(earlier, abstract, seed) for seed in seeds]
    if config.num_seeds == 1:
        return states[0]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *states)


def _of_extractor(name: str) -> bool:
    return name.startswith("extractor/")


def _from_model(earlier: Earlier, abstract: RunState, seed: int) -> RunState:
    file = predictor.find_file(earlier.path, seed)
    found, _ = arrays.read(file)
    # Layers that the earlier run computed once (train.features_once) are parameters like others.
    found |= {name_in_state(n.partition("/")[2]): a for n, a in found.items() if _of_extractor(n)}

    def filled(tree: Any, prefix: str) -> Any:
        """Fills a tree with the arrays of these names. PRNG keys are stored as their numbers."""

        def one(name: str, leaf: Any) -> np.ndarray:
            name = f"{prefix}/{name}" if name else prefix
            shape = jax.eval_shape(prng.to_numbers, leaf).shape
            if name not in found or found[name].shape != shape:
                raise UserError(
                    f"--resume_from: {name} of {file} is not what its settings say; it was "
                    "written by something else, train again"
                )
            return found[name]

        return jax.tree.map(one, arrays.names_of(tree), tree)

    names = _parts_that_go_on(earlier.config.method)
    parts = {name: filled(getattr(abstract.learner, name), name) for name in names}
    statistics = abstract.statistics
    if statistics:
        named = filled(statistics._asdict(), "statistics")
        statistics = type(statistics)(**named)
    return RunState(dataclasses.replace(abstract.learner, **parts), statistics)


def _from_checkpoint(
    earlier: Earlier, abstract: RunState, seeds: Any, lacking: list[str]
) -> list[RunState]:
    folder, old = pathlib.Path(earlier.path), earlier.config
    position = checkpoint.Position(earlier.num_tasks, 0, 0)
    if not (folder / "checkpoints").is_dir():
        where = "is one model" if folder.is_file() else "has no checkpoints"
        raise UserError(
            f"--resume_from: {old.method} goes on with more than a model holds "
            f"({', '.join(lacking)}) and {earlier.path} {where}; name the folder of the run, with "
            "its checkpoints"
        )
    if old.num_seeds > 1:
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((old.num_seeds, *leaf.shape), leaf.dtype), abstract
        )
    found = checkpoint.restore_at(folder / "checkpoints", position, abstract)
    found = jax.tree.map(np.asarray, prng.to_numbers(found))
    if old.num_seeds == 1:
        return [found]
    return [jax.tree.map(lambda leaf, s=s: leaf[s - old.seed], found) for s in seeds]


def put_first(fresh: RunState, earlier: Earlier, config: Any) -> RunState:
    """The state before the first new task.

    Every array of the earlier run is copied to the first places of the fresh state, along the axis
    of tasks and, if there are new outputs, along the axis of outputs. The other places stay fresh:
    new columns of an output layer are drawn as at the start of any run, modes and importance are
    zero.

    Args:
      fresh: of the longer sequence, from `bpnjax.training.epochs.init_state`.
      earlier: the tasks learned before.
      config: of the new run.

    Returns:
      The state.
    """
    old = earlier.state
    assert old is not None
    parts = {
        name: arrays.put_in_corner(getattr(fresh.learner, name), getattr(old.learner, name))
        for name in _parts_that_go_on(config.method)
    }
    if not config.train.reset_optimizer:
        try:
            parts["optimizer"] = arrays.put_in_corner(
                fresh.learner.optimizer, old.learner.optimizer
            )
        except (ValueError, IndexError) as error:
            raise UserError(
                f"train.optimizer: {config.train.optimizer} cannot go on with the state of "
                f"{earlier.config.train.optimizer}; set it and train.rates as they were, or "
                "--config.train.reset_optimizer=True"
            ) from error
    statistics = fresh.statistics
    if statistics:
        statistics = arrays.put_in_corner(statistics, old.statistics)
    return RunState(dataclasses.replace(fresh.learner, **parts), statistics)


def stages(experiment: Experiment, earlier: Earlier | None = None) -> Sequence[int]:
    """The tasks that a run trains, in order.

    Args:
      experiment: the static facts of the run.
      earlier: the tasks learned before, if any.

    Returns:
      A sequence of ints; joint trains all tasks in place of the last one.
    """
    if experiment.jointly:
        return [experiment.num_tasks - 1]
    return range(earlier.num_tasks if earlier else 0, experiment.num_tasks)
