"""Answers examples with a trained model: with one task, one task per example, or inferred tasks.

    predictor = bpnjax.load("runs/mnist/bd_ewc")
    predictor(x, task=3)
    predictor(x, task=task_ids)
    predictor(x)

Tasks count from 0, as in all functions of the package.
"""

import dataclasses
import json
import os
import pathlib
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from safetensors import SafetensorError, safe_open

from bpnjax import models, modes
from bpnjax.config import BEFORE, default, flatten
from bpnjax.data.permutation import pixel_order
from bpnjax.data.sequence import Extractor, Split, TaskSequence
from bpnjax.evaluation import task_inference
from bpnjax.evaluation.mappers import Mapper
from bpnjax.evaluation.task_inference import Guess
from bpnjax.learner import Learner, State
from bpnjax.methods import REGISTRY
from bpnjax.models.features import make_extractor
from bpnjax.training.epochs import vectors_of
from bpnjax.training.experiment import Experiment, make_experiment
from bpnjax.utils import arrays, prng
from bpnjax.utils.errors import UserError
from bpnjax.utils.heads import within_head

BATCH = 1000
FORMATS = ("bpnjax-3",)
# The environment variable that lists which networks of model.factory may be imported; unset: any.
TRUSTED = "BPNJAX_TRUSTED_FACTORIES"
_KEYS = 2**26  # bytes of keys that are drawn only once; larger ones are drawn for each answer


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A trained network with its modes. Calling it answers examples.

    Tasks count from 0, as in all functions of the package.

    Attributes:
      learner: network and method.
      state: the state of the learner; parts that only training needs are zero.
      outputs: bool ``[T, C]``, the outputs of each task's classes.
      class_names: the names of the outputs.
      input_shape: the shape of one example.
      input_dtype: the dtype of the training examples.
      input_range: the smallest and largest number in them; None if unknown.
      orders: int32 ``[T, inputs]``, the permutation of each task's input; None if not permuted.
      metadata: of the file: method, seed, configuration, ...
      rule: how the run inferred the task, one of `bpnjax.evaluation.task_inference.RULES`.
      mapper: `bpnjax.evaluation.mappers.Mapper` of the run's rule, if the rule has one.
      features: the features of the mapper, one of `bpnjax.evaluation.mappers.FEATURES`.
      statistics: what the mapper stored about the tasks.
      directions: f32 ``[inputs, r]``, on which the input is projected if the mapper uses it.
      extract: ``images -> features``, the frozen layers before the network; None if the network
        reads images itself.
    """

    learner: Learner
    state: State
    outputs: np.ndarray
    class_names: tuple[str, ...]
    input_shape: tuple[int, ...]
    input_dtype: np.dtype[Any]
    input_range: tuple[float, float] | None
    orders: Any
    metadata: dict[str, str]
    rule: str = "entropy"
    mapper: Mapper | None = None
    features: str = ""
    statistics: Any = None
    directions: Any = None
    extract: Any = None

    def __repr__(self) -> str:
        seed = "merged from packs" if "merged" in self.metadata else f"seed {self.metadata['seed']}"
        return (
            f"Predictor({self.metadata['method']}, {self.num_tasks} tasks, "
            f"{len(self.class_names)} outputs, inputs "
            f"{self.input_dtype}{list(self.input_shape)}, {seed})"
        )

    @cached_property
    def answering_state(self) -> State:
        """Draws the keys of all tasks in advance, unless they take much memory."""
        seeds = [s for s in jax.tree.leaves(self.state, is_leaf=modes.is_seed) if modes.is_seed(s)]
        if not seeds or 4 * self.num_tasks * sum(s.width for s in seeds) > _KEYS:
            return self.state
        with jax.ensure_compile_time_eval():  # also if a caller traces an answer
            return modes.drawn(self.state, self.num_tasks)

    @property
    def num_tasks(self) -> int:
        """T, the number of tasks that the model has modes for."""
        return self.outputs.shape[0]

    def permuted(self, x: Any, task: Any) -> np.ndarray:
        """Permutes examples as the sequence permutes them in a task.

        The permutation belongs to the data, not to the modes. Examples that are permuted already
        need no further permutation, and `infer` knows nothing about permutations.

        Args:
          x: stored examples ``[n, ...]``.
          task: int, or int ``[n]``, from 0.

        Returns:
          ``[n, ...]``; the examples themselves if the tasks are not permuted.
        """
        x, task = self._checked(x, task)
        if self.orders is None:
            return x
        flat = x.reshape(len(x), -1)
        return np.take_along_axis(flat, np.asarray(self.orders)[task], 1).reshape(x.shape)

    def logits(self, x: Any, task: Any) -> np.ndarray:
        """Computes the network's outputs.

        A batch may mix tasks. Each example is answered in the mode of its own task, in one program,
        as fast as a batch of one task. Only `stl`, with a network per task, answers one task after
        another.

        Args:
          x: stored examples ``[n, ...]``; for permuted inputs the result of `permuted`.
          task: int, or int ``[n]``, from 0.

        Returns:
          f32 ``[n, C]``. If a task answers with its own outputs only, the others are -1e9.

        Raises:
          ValueError: examples have another shape, or the model does not have the task.
          UserError: an output is NaN or infinite.
        """
        x, task = self._checked(x, task)
        ids = np.unique(task)
        answer = partial(_logits, self)
        if len(ids) == 1:
            out = _in_batches(answer, x, ids[0])
        elif self.learner.method.trains == "afresh":
            out = np.empty((len(x), self.outputs.shape[1]), np.float32)
            for one in ids:
                out[task == one] = _in_batches(answer, x[task == one], one)
        else:
            out = _in_batches(answer, x, task)
        _refuse_not_finite(out, task)
        return out

    def probabilities(self, x: Any, task: Any) -> np.ndarray:
        """Softmax of `logits`.

        Args:
          x: as in `logits`.
          task: int, or int ``[n]``, from 0.

        Returns:
          f32 ``[n, C]``, rows that sum to 1.
        """
        return np.asarray(jax.nn.softmax(jnp.asarray(self.logits(x, task))))

    def infer(self, x: Any, rule: str | None = None, per: str = "example") -> Guess:
        """Infers the task from the answers in all modes, and answers in the mode of that task.

        Args:
          x: as in `logits`.
          rule: a name of `bpnjax.evaluation.task_inference.RULES`; by default that of the run.
          per: ``"example"``, or ``"batch"`` if all examples belong to one task.

        Returns:
          `Guess`.

        Raises:
          ValueError: as in `logits`; or the rule is unknown, or the run did not store its
            statistics.
          UserError: a mode's score is NaN or infinite.
        """
        rule = rule or self.rule
        if rule not in task_inference.RULES:
            raise ValueError(f"unknown rule {rule!r}; use one of {', '.join(task_inference.RULES)}")
        if complaint := self.cannot_infer_by(rule):
            raise ValueError(f"this model {complaint}")
        x, _ = self._checked(x, 0)
        scores = _in_batches(lambda x, _: _scores(self, rule, x), x, np.int32(0))
        _refuse_not_finite(scores.T, np.arange(self.num_tasks))
        task = task_inference.choose(scores, per)
        return Guess(task, self(x, task), scores)

    def cannot_infer_by(self, rule: str) -> str:
        """Says why a rule cannot distinguish the tasks of this model; empty if it can."""
        kept = "" if self.mapper is None or self.statistics is None else self.mapper.name
        if rule not in task_inference.MAPPERS or rule == kept:
            return ""
        return f"has no {rule} of its tasks; train it with --config.evaluate.rule={rule}"

    def __call__(self, x: Any, task: Any = None) -> np.ndarray:
        """The answers, int32 ``[n]``, numbers in `class_names`. Without ``task`` it is inferred."""
        if task is None:
            return self.infer(x).outputs
        return self.logits(x, task).argmax(-1).astype(np.int32)

    def _checked(self, x: Any, task: Any) -> tuple[np.ndarray, np.ndarray]:
        x = np.asarray(x)
        if x.shape[1:] != self.input_shape:
            raise ValueError(
                f"examples of shape {x.shape[1:]}; this model reads {self.input_shape}"
            )
        if not len(x):
            raise ValueError("no examples; give at least one")
        was, now = self.input_dtype, x.dtype
        if now.kind not in "uif" or (was.kind == "f") != (now.kind == "f"):
            raise ValueError(
                f"examples of dtype {now}; this model was trained on {was}. Give them as they were "
                "in training, with the same scale"
            )
        if np.issubdtype(now, np.floating) and not np.isfinite(x).all():
            raise ValueError("the examples hold NaN or infinite numbers; fix the data")
        self._warn_of_range(x)
        ids = np.asarray(task)
        if not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"task ids of dtype {ids.dtype}; give integers from 0")
        if ids.size and not (ids.min() >= 0 and ids.max() < self.num_tasks):
            raise ValueError(
                f"task {ids.min() if ids.min() < 0 else ids.max()}; this model has tasks 0 to "
                f"{self.num_tasks - 1}"
            )
        if ids.shape not in ((), (len(x),)):
            raise ValueError(f"task ids of shape {ids.shape} for {len(x)} examples; one each")
        return x, np.broadcast_to(ids.astype(np.int32), (len(x),))

    def _warn_of_range(self, x: np.ndarray) -> None:
        if self.input_range is None:
            return
        least, most = self.input_range
        width, here = most - least, float(x.max()) - float(x.min())
        if x.size >= 100 and width > 0 and not width / 8 <= here <= 8 * width:
            warnings.warn(
                f"the examples lie between {x.min():g} and {x.max():g}, those that the "
                f"model was trained on between {least:g} and {most:g}: are they scaled alike?",
                stacklevel=4,
            )

    def _features(self, x: Any) -> Any:
        return x if self.extract is None else self.extract(x)


def _logits(predictor: Predictor, x: Any, task: Any) -> Any:
    p = predictor
    return _run(p.learner, p.answering_state, p.outputs, p._features(x), task)


def _refuse_not_finite(numbers: np.ndarray, task: np.ndarray) -> None:
    """Raises an error for NaN and infinity, since argmax would take NaN for class 0."""
    wrong = ~np.isfinite(numbers).all(1)
    if wrong.any():
        raise UserError(
            f"the model gives NaN or infinite outputs in the mode of task {task[wrong][0]}; its "
            "weights are broken, train it again (with a lower train.learning_rate)"
        )


@partial(jax.jit, static_argnums=0)
def _run(learner: Learner, state: State, outputs: Any, x: Any, task: Any) -> jax.Array:
    logits = learner.answer(state, x, task, between_tasks=True)
    return within_head(logits, outputs[task] if learner.setup.multi_head else None)


def _scores(predictor: Predictor, rule: str, x: Any) -> Any:
    p, x = predictor, predictor._features(x)
    if rule in task_inference.MAPPERS:
        return _compare(
            p.learner, p.mapper, p.features, p.answering_state, p.statistics, p.directions, x
        )
    return _try_all(p.learner, task_inference.ANSWERS[rule], p.answering_state, p.outputs, x)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _compare(
    learner: Learner, mapper: Any, features: str, state: State, kept: Any, directions: Any, x: Any
) -> jax.Array:
    """Scores f32 [n, T] from a mapper, one task after another."""
    same = None
    if features != "mode":
        same = vectors_of(learner, features, state, x, None, directions)

    def one(task: Any) -> jax.Array:
        z = vectors_of(learner, features, state, x, task, None) if same is None else same
        return mapper.score(kept, task, z)

    return jax.lax.map(one, jnp.arange(learner.num_tasks)).T


@partial(jax.jit, static_argnums=(0, 1))
def _try_all(learner: Learner, score: Any, state: State, outputs: Any, x: Any) -> jax.Array:
    """Scores in all modes f32 [n, T], one mode after another to save memory."""

    def one(task: Any) -> jax.Array:
        logits = learner.answer(state, x, task, between_tasks=True)
        return score(within_head(logits, outputs[task] if learner.setup.multi_head else None))

    return jax.lax.map(one, jnp.arange(outputs.shape[0])).T


def _in_batches(answer: Callable[[np.ndarray, Any], Any], x: np.ndarray, task: Any) -> np.ndarray:
    """Answers in batches of one size, with the last one padded, so one program serves all."""
    size = min(BATCH, 1 << max(len(x) - 1, 0).bit_length())
    parts = []
    for start in range(0, len(x), size):
        batch = [a[start : start + size] if a.ndim else a for a in (x, task)]
        here = len(batch[0])
        if here < size:
            batch = [
                np.pad(a, [(0, size - here)] + [(0, 0)] * (a.ndim - 1)) if a.ndim else a
                for a in batch
            ]
        parts.append(np.asarray(answer(*batch))[:here])
    return np.concatenate(parts)


def load(path: str | os.PathLike[str], seed: int | None = None) -> Predictor:
    """Loads a trained model.

    A network of one's own (``model.factory`` of the run) is imported and called. Of a model of
    others, name in the environment variable ``BPNJAX_TRUSTED_FACTORIES`` what may be imported.

    Args:
      path: the folder of a run, or one of its ``.safetensors`` files.
      seed: which of the folder's models to load; by default the first.

    Returns:
      A `Predictor`.

    Raises:
      UserError: there is no model, it was not written by this package, or its network is not among
        the trusted ones.
    """
    file = find_file(path, seed)
    metadata = read_metadata(file)
    found, _ = arrays.read(file)
    return predictor_of(file, metadata, found)


def predictor_of(file: Any, metadata: dict[str, str], found: dict[str, np.ndarray]) -> Predictor:
    """Makes the predictor of a model from the contents of its file.

    Args:
      file: its name, for messages.
      metadata: of the file.
      found: its arrays by name.

    Returns:
      A `Predictor`.

    Raises:
      UserError: the metadata do not describe a model, or the arrays do not belong to it.
    """
    try:
        return _predictor_of(file, metadata, found)
    except UserError as error:
        if str(error).startswith(str(file)):
            raise
        raise UserError(f"{file}: {error}") from error  # for example, of a user's own network
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{file}: its metadata describe no model ({type(error).__name__}: {error}); it was "
            "written by something else, train again"
        ) from error


class Description(NamedTuple):
    """What the metadata say about a model."""

    config: ConfigDict  # with the fields of this version
    outputs: np.ndarray  # bool [T, C], the outputs of each task's classes
    names: tuple[str, ...]  # of the outputs
    shape: tuple[int, ...]  # of one example
    dtype: np.dtype[Any]
    scale: np.ndarray  # f32 [channels]; the network's input is x * scale + shift
    shift: np.ndarray


def described(file: Any, metadata: dict[str, str]) -> Description:
    """Reads the metadata of a model.

    Args:
      file: its name, for messages.
      metadata: of the file.

    Returns:
      `Description`.

    Raises:
      UserError: the method is not registered, or the user does not trust the network.
      ValueError: or another error of Python, if they do not describe a model.
    """
    config = with_all_fields(json.loads(metadata["config"]))
    factory, trusted = config.model.factory, os.environ.get(TRUSTED)
    if factory and trusted is not None and factory not in map(str.strip, trusted.split(",")):
        raise UserError(
            f"{file}: its network is model.factory={factory}, code that {TRUSTED}={trusted!r} does "
            "not name; add it there if you trust it"
        )
    if config.method not in REGISTRY:
        raise UserError(
            f"{file}: it was trained by the method {config.method!r}, which is not registered; run "
            "the file that registers it (python -m bpnjax.predict takes it as --config=FILE)"
        )
    config.model.pretrained = config.model.mapping = ""  # was read when the run began
    config.train.rates = ""
    groups, names = json.loads(metadata["outputs"]), json.loads(metadata["class_names"])
    outputs = np.zeros((len(groups), len(names)), bool)
    for row, group in zip(outputs, groups, strict=True):
        row[group] = True
    shape = tuple(json.loads(metadata["input_shape"]))
    dtype = np.dtype(metadata["input_dtype"])
    scale, shift = (np.asarray(json.loads(metadata[n]), np.float32) for n in ("scale", "shift"))
    for name, array in (("scale", scale), ("shift", shift)):
        if array.shape not in ((1,), shape[-1:]):
            raise ValueError(f"{name} of shape {array.shape} for inputs {shape}")
    return Description(config, outputs, tuple(names), shape, dtype, scale, shift)


def experiment_of(
    description: Description, extractor: dict[str, np.ndarray]
) -> tuple[Experiment, tuple[int, ...], Any]:
    """Builds the network and the method of a model again, without arrays.

    Args:
      description: of the model.
      extractor: frozen layers that the run computed once, by name; {} for most models.

    Returns:
      The experiment, the shape of its network's input, and the function ``x -> features`` before
      it, or None.
    """
    config, outputs, names, shape, dtype, scale, shift = description
    extract = before = None
    if extractor:
        before = Extractor(extractor, shape, scale, shift, dtype)
        module = models.build(config.model, len(names), shape)
        extract = make_extractor(module, extractor, scale, shift)
        images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
        shape, dtype = jax.eval_shape(extract, images).shape[1:], np.dtype(np.float32)
        scale, shift = np.ones(1, np.float32), np.zeros(1, np.float32)
    config.evaluate.statistics = min(config.evaluate.statistics, int(np.prod(shape)))
    sequence = _empty_sequence(outputs, names, shape, dtype, scale, shift, before)
    return make_experiment(config, sequence), shape, extract


def _predictor_of(file: Any, metadata: dict[str, str], found: dict[str, np.ndarray]) -> Predictor:
    if metadata.get("draws", prng.fingerprint()) != prng.fingerprint():
        raise UserError(
            f"{file}: JAX draws other random numbers here than where it was trained, so that keys "
            "and permutations would be others; set jax_threefry_partitionable as it was"
        )
    description = described(file, metadata)
    config, outputs, names, shape, dtype, *_ = description
    experiment, trained_shape, extract = experiment_of(description, group(found, "extractor"))
    inputs = int(np.prod(trained_shape))
    key = prng.key(int(metadata["seed"]))
    rule, statistics, directions = config.evaluate.rule, None, None
    if rule in task_inference.MAPPERS and not experiment.told_task:
        rule = "entropy"  # all modes are the same network
    mapper = experiment.mapper
    if (kept := group(found, "statistics")) and mapper is not None:
        empty = jax.eval_shape(partial(mapper.empty, len(outputs), experiment.width))
        statistics = type(empty)(**{n: jnp.asarray(kept[n]) for n in empty._fields})
        if experiment.features == "input":
            directions = task_inference.directions(
                prng.fold(key, prng.STATISTICS), inputs, experiment.width
            )
    orders: Any = found.get("orders")
    if orders is None and config.sequence.kind == "permuted":
        pixels, first_identity = prng.fold(key, prng.PIXELS), config.sequence.first_identity
        orders = jax.vmap(lambda t: pixel_order(pixels, t, int(np.prod(shape)), first_identity))(
            jnp.arange(len(outputs))
        )
    limits = json.loads(metadata["input_range"])
    return Predictor(
        learner=experiment.learner,
        state=_answering_state(experiment, found, file, "merged" in metadata),
        outputs=outputs,
        class_names=names,
        input_shape=shape,
        input_dtype=dtype,
        input_range=None if limits is None else (limits[0], limits[1]),
        orders=orders,
        metadata=metadata,
        rule=rule,
        mapper=mapper,
        features=experiment.features,
        statistics=statistics,
        directions=directions,
        extract=extract,
    )


def with_all_fields(stored: dict[str, Any]) -> ConfigDict:
    """A stored configuration with the fields of this version, at values that keep its meaning."""
    config = default()
    known = flatten(config)
    for field, value in (BEFORE | flatten(stored)).items():
        if field in known and value is not None:
            group, _, name = field.rpartition(".")
            value = tuple(value) if isinstance(known[field], tuple) else value
            (config[group] if group else config)[name] = value
    return config


def group(found: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """The arrays whose names begin with a word and ``/``, by the rest of their names."""
    start = f"{name}/"
    return {n.removeprefix(start): a for n, a in found.items() if n.startswith(start)}


def _empty_sequence(
    outputs: np.ndarray,
    names: Sequence[str],
    shape: tuple[int, ...],
    dtype: Any,
    scale: np.ndarray,
    shift: np.ndarray,
    extractor: Extractor | None,
) -> TaskSequence:
    """A sequence without examples, with what a learner must know about the training data."""
    tasks = len(outputs)
    split = Split(
        np.zeros((0, *shape), dtype), np.zeros(0, np.int32),
        np.zeros((tasks, 1), np.int32), np.zeros(tasks, np.int32),
    )  # fmt: skip
    columns = np.zeros((tasks, 1), np.int32)
    return TaskSequence(
        split, split, outputs, tuple(names), scale, shift, columns, permuted=False,
        extractor=extractor,
    )  # fmt: skip


def _answering_state(
    experiment: Experiment, found: dict[str, np.ndarray], file: Any, merged: bool
) -> State:
    """A state with the arrays of a file; parts that only training needs are zero."""
    learner = experiment.learner
    abstract = jax.eval_shape(learner.first, prng.key(0))
    if merged:  # a merged model has one PRNG key per task, a run has one for all
        abstract = jax.tree.map(
            lambda node: _seeds_of_tasks(node, experiment.num_tasks),
            abstract,
            is_leaf=modes.is_seed,
        )
    names = jax.tree.leaves(arrays.names_of(abstract))
    needed = jax.tree.leaves(learner.answering(abstract))
    others = ("statistics/", "extractor/", "orders")
    if more := [name for name in found if name not in names and not name.startswith(others)]:
        raise UserError(
            f"{file}: {more[0]} is not part of its model; the file was written by something else, "
            "train again"
        )
    filled = dict(found)
    for name, leaf, n in zip(names, jax.tree.leaves(abstract), needed, strict=True):
        if name in found:
            continue
        if n:
            raise UserError(
                f"{file}: {name} is missing; the file was written by something else, train again"
            )
        like = jax.eval_shape(prng.to_numbers, leaf)
        # A broadcast of one element, so that nothing is allocated for what only training needs.
        filled[name] = np.broadcast_to(np.zeros((), like.dtype), like.shape)
    filled["task"] = np.array(-1, np.int32)  # no task is in training
    try:
        return arrays.unflatten({name: filled[name] for name in names}, abstract)
    except ValueError as error:
        raise UserError(
            f"{file}: {error}, by its own settings; it was written by something else, train again"
        ) from error


def _seeds_of_tasks(node: Any, num_tasks: int) -> Any:
    if not modes.is_seed(node):
        return node
    return node.replace(seed=jax.ShapeDtypeStruct((num_tasks,), node.seed.dtype))


def find_file(path: str | os.PathLike[str], seed: int | None = None) -> pathlib.Path:
    """The model in the folder of a run, or the file itself; arguments and errors as in `load`."""
    file = pathlib.Path(path)
    if file.is_dir():
        first = file / "model.safetensors"
        file = first if seed is None else file / f"model_seed_{seed}.safetensors"
        if seed is not None and first.is_file() and _metadata(first).get("seed") == str(seed):
            file = first
    if not file.is_file():
        raise UserError(f"no model {file}; name the folder of a complete run, or its .safetensors")
    return file


def read_metadata(file: pathlib.Path) -> dict[str, str]:
    """The metadata of a model; `UserError` if this package did not write it."""
    metadata = _metadata(file)
    if metadata.get("format") not in FORMATS:
        raise UserError(
            f"{file} has the format {metadata.get('format')!r}; this version reads "
            f"{', '.join(FORMATS)}: run the training again"
        )
    return metadata


def _metadata(file: pathlib.Path) -> dict[str, str]:
    try:
        with safe_open(file, "np") as tensors:
            metadata = dict(tensors.metadata() or {})
            metadata.pop(arrays.CHECKSUM, None)  # `arrays.read` compares it with the file
            return metadata
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a safetensors file ({error}); train again") from error
