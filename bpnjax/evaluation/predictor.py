"""A trained model in use: told the task, one task for each picture, or not told.

    predictor = bpnjax.load("runs/mnist/bd_ewc")
    predictor(images, task=3)
    predictor(images, task=task_ids)
    predictor(images)

Tasks count from 0, as in all functions of the package.
"""

import json
import pathlib
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict
from safetensors import SafetensorError, safe_open

from bpnjax import models
from bpnjax.data.permutation import pixel_order
from bpnjax.evaluation import task_inference
from bpnjax.modes.keys import GateSeeds, KeySeeds
from bpnjax.networks import linen
from bpnjax.utils import prng
from bpnjax.utils.errors import UserError
from bpnjax.utils.heads import within_head

BATCH = 1000
FORMATS = ("bpnjax-2",)


class Guess(NamedTuple):
    """Answers of a model that nobody told the task."""

    task: np.ndarray  # int32 [n], of the mode taken, from 0
    outputs: np.ndarray  # int32 [n], the answers in that mode
    scores: np.ndarray  # f32 [n, T], of each mode by the rule; the highest is taken


class Predictor(NamedTuple):
    """A trained network and its modes. Calling it answers pictures.

    Tasks count from 0 here, as in all functions of the package.
    """

    model: Any  # the Linen module
    core: Any  # its shared parameters
    bank: dict  # the modes of all tasks
    cores: Any  # one network for each task instead, leading axis [T] (stl); else None
    orders: Any  # int32 [T, inputs], each task's order of pixels; None where they keep theirs
    outputs: np.ndarray  # bool [T, C], the outputs of each task's classes
    class_names: tuple[str, ...]  # of the outputs
    restricted: bool  # does a task's mode answer with its own outputs only (heads, masks)?
    input_shape: tuple[int, ...]  # of one picture
    scale: np.ndarray  # f32 [channels]; the network sees picture * scale + shift
    shift: np.ndarray
    metadata: dict[str, str]  # of the file: method, seed, configuration, ...
    rule: str = (
        "entropy"  # of `bpnjax.evaluation.task_inference.RULES`, by which the run inferred the task
    )
    statistics: Any = None  # `bpnjax.evaluation.task_inference.Statistics`, where the run kept them
    directions: Any = None  # f32 [inputs, r], on which they project the input
    features: bool = False  # is that input what frozen convolutions make of a picture?

    @property
    def num_tasks(self) -> int:
        """How many tasks the model has modes for, T."""
        return self.outputs.shape[0]

    def permuted(self, images, task) -> np.ndarray:
        """Pictures as a sequence of permuted pixels shows them in a task.

        The order of the pixels belongs to the data, not to the modes: a picture that comes as its
        task shows it needs no permutation, and `infer` is not told of any.

        Args:
          images: ``[n, ...]`` as the set stores them.
          task: int, or int ``[n]``, from 0.

        Returns:
          ``[n, ...]``; the pictures themselves where the tasks do not permute.
        """
        images, task = self._checked(images, task)
        if self.orders is None:
            return images
        flat = images.reshape(len(images), -1)
        return np.take_along_axis(flat, np.asarray(self.orders)[task], 1).reshape(images.shape)

    def logits(self, images, task) -> np.ndarray:
        """The network's outputs.

        Args:
          images: ``[n, ...]`` as the set stores them; of permuted pixels, as `permuted` gives them.
          task: int, or int ``[n]``, from 0.

        Returns:
          f32 ``[n, C]``; where a task answers with its own outputs only, the others are -1e9.

        Raises:
          ValueError: pictures of another shape, or a task that the model does not have.
        """
        images, task = self._checked(images, task)
        if self.cores is None:
            return _in_batches(partial(_logits, self), images, task)
        out = np.empty((len(images), self.outputs.shape[1]), np.float32)
        for one in np.unique(task):
            rows = np.flatnonzero(task == one)
            network = self._replace(core=jax.tree.map(lambda p, t=one: p[t], self.cores))
            out[rows] = _in_batches(partial(_logits, network), images[rows], task[rows])
        return out

    def probabilities(self, images, task) -> np.ndarray:
        """Softmax of `logits`.

        Args:
          images: as for `logits`.
          task: int, or int ``[n]``, from 0.

        Returns:
          f32 ``[n, C]``, rows that sum to 1.
        """
        return np.asarray(jax.nn.softmax(jnp.asarray(self.logits(images, task))))

    def infer(self, images, rule: str | None = None, per: str = "example") -> Guess:
        """Guesses the task, by what all modes say in one program, and answers in its mode.

        Args:
          images: as for `logits`.
          rule: a name of `bpnjax.evaluation.task_inference.RULES`; that of the run by default.
          per: ``"example"``, or ``"batch"``: all pictures are of one task.

        Returns:
          `Guess`.

        Raises:
          ValueError: as `logits`; an unknown rule, or one whose statistics the run did not keep.
        """
        rule = rule or self.rule
        if rule not in task_inference.RULES:
            raise ValueError(f"unknown rule {rule!r}; use one of {', '.join(task_inference.RULES)}")
        if rule == "statistics" and self.statistics is None:
            raise ValueError(
                "this model has no statistics; train it with --config.evaluate.rule=statistics"
            )
        images, nobody = self._checked(images, 0)
        scores = _in_batches(partial(_scores, self, rule), images, nobody)
        task = task_inference.choose(scores, per)
        return Guess(task, self(images, task), scores)

    def __call__(self, images, task=None) -> np.ndarray:
        """The answers, int32 ``[n]``, numbers in `class_names`; ``task`` None: it is inferred."""
        if task is None:
            return self.infer(images).outputs
        return self.logits(images, task).argmax(-1).astype(np.int32)

    def _checked(self, images, task):
        images = np.asarray(images)
        if images.shape[1:] != self.input_shape:
            raise ValueError(
                f"pictures of shape {images.shape[1:]}; this model reads {self.input_shape}"
            )
        task = np.broadcast_to(np.asarray(task, np.int32), (len(images),))
        if len(task) and not (task.min() >= 0 and task.max() < self.num_tasks):
            raise ValueError(
                f"task {task.min() if task.min() < 0 else task.max()}; this model has tasks 0 to "
                f"{self.num_tasks - 1}"
            )
        return images, task


def _logits(predictor: Predictor, images, task):
    return _run(
        predictor.model, predictor.restricted, predictor.core, predictor.bank, predictor.outputs,
        predictor.scale, predictor.shift, images, task,
    )  # fmt: skip


@partial(jax.jit, static_argnums=(0, 1))
def _run(model, restricted, core, bank, outputs, scale, shift, images, task):
    x = images.astype(jnp.float32) * scale + shift
    mode = linen.select(bank, task)
    logits = linen.modulated_apply(model, core, mode, x).astype(jnp.float32)
    return within_head(logits, outputs[task] if restricted else None)


def _scores(predictor: Predictor, rule, images, _):
    p = predictor
    if rule == "statistics":
        before = p.model if p.features else None
        return _compare(before, p.core, p.statistics, p.directions, p.scale, p.shift, images)
    return _try_all(
        p.model, p.restricted, task_inference.ANSWERS[rule], p.core, p.cores, p.bank, p.outputs,
        p.scale, p.shift, images,
    )  # fmt: skip


@partial(jax.jit, static_argnums=0)
def _compare(before, core, statistics, directions, scale, shift, images):
    """Log-densities f32 [n, T] of the network's inputs under each task's."""
    x = images.astype(jnp.float32) * scale + shift
    if before is not None:
        x = before.apply({"params": core}, x, features=True)
    z = x.reshape(x.shape[0], -1) @ directions
    return jax.vmap(task_inference.log_likelihood, (0, 0, None), 1)(*statistics, z)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _try_all(model, restricted, score, core, cores, bank, outputs, scale, shift, images):
    """Scores of all modes f32 [n, T], one mode after another: memory is that of one."""
    x = images.astype(jnp.float32) * scale + shift

    def one(task):
        network = core if cores is None else jax.tree.map(lambda p: p[task], cores)
        mode = linen.select(bank, task)
        logits = linen.modulated_apply(model, network, mode, x).astype(jnp.float32)
        return score(within_head(logits, outputs[task] if restricted else None))

    return jax.lax.map(one, jnp.arange(outputs.shape[0])).T


def _in_batches(answer, images, task) -> np.ndarray:
    """Answers batches of one size, the last one padded, so that one program serves them all."""
    size = min(BATCH, 1 << max(len(images) - 1, 0).bit_length())
    parts = []
    for start in range(0, len(images), size):
        x, t = images[start : start + size], task[start : start + size]
        pad = size - len(x)
        x = np.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1))
        parts.append(np.asarray(answer(x, np.pad(t, (0, pad))))[: size - pad])
    return np.concatenate(parts)


def load(path, seed: int | None = None) -> Predictor:
    """Loads a trained model.

    Args:
      path: the folder of a run, or one of its ``.safetensors`` files.
      seed: of the folder's models, the one of this seed; the first by default.

    Returns:
      A `Predictor`.

    Raises:
      UserError: there is no model, or it was not written by this package.
    """
    from bpnjax.methods import REGISTRY

    file = find_file(path, seed)
    metadata = read_metadata(file)
    with safe_open(file, "np") as tensors:
        arrays = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    config = ConfigDict(json.loads(metadata["config"]))
    method = REGISTRY[config.method]
    trees = {
        group: traverse_util.unflatten_dict(
            {n.split("/", 1)[1]: a for n, a in arrays.items() if n.startswith(f"{group}/")},
            sep="/",
        )
        for group in ("core", "cores")
    }
    groups = json.loads(metadata["outputs"])
    names = json.loads(metadata["class_names"])
    outputs = np.zeros((len(groups), len(names)), bool)
    for row, group in zip(outputs, groups, strict=True):
        row[group] = True
    shape = tuple(json.loads(metadata["input_shape"]))
    key = jax.random.key(int(metadata["seed"]))
    rule, statistics, directions = config.evaluate.get("rule", "entropy"), None, None
    if rule == "statistics" and not method.told_task:
        rule = "entropy"  # all modes are the same network
    model, features = models.build(config.model, len(names)), config.train.get("features_once")
    if "statistics/mean" in arrays:
        statistics = task_inference.Statistics(
            *(jnp.asarray(arrays[f"statistics/{n}"]) for n in task_inference.Statistics._fields)
        )
        x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
        if features:
            x = jax.eval_shape(partial(model.apply, features=True), {"params": trees["core"]}, x)
        seed, r = prng.fold(key, prng.STATISTICS), statistics.mean.shape[1]
        directions = task_inference.directions(seed, int(np.prod(x.shape)), r)
    orders = None
    if config.sequence.kind == "permuted":
        pixels = prng.fold(key, prng.PIXELS)
        orders = jax.vmap(
            lambda t: pixel_order(pixels, t, int(np.prod(shape)), config.sequence.first_identity)
        )(jnp.arange(len(groups)))
    return Predictor(
        model=model,
        core=jax.tree.map(jnp.asarray, trees["core"]),
        bank=_bank(arrays, trees["core"], config),
        cores=jax.tree.map(jnp.asarray, trees["cores"]) or None,
        orders=orders,
        outputs=outputs,
        class_names=tuple(names),
        restricted=method.masks_outputs or config.sequence.heads == "multi",
        input_shape=shape,
        scale=np.asarray(json.loads(metadata["scale"]), np.float32),
        shift=np.asarray(json.loads(metadata["shift"]), np.float32),
        metadata=metadata,
        rule=rule,
        statistics=statistics,
        directions=directions,
        features=bool(features),
    )


def find_file(path, seed: int | None = None) -> pathlib.Path:
    """The model in the folder of a run, or the file itself; arguments and errors as of `load`."""
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
    """What a model says of itself; `UserError` where it was not written by this package."""
    metadata = _metadata(file)
    if metadata.get("format") not in FORMATS:
        raise UserError(
            f"{file} has the format {metadata.get('format')!r}; this version reads "
            f"{', '.join(FORMATS)}: run the training again"
        )
    return metadata


def _metadata(file) -> dict[str, str]:
    try:
        with safe_open(file, "np") as tensors:
            return tensors.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is no safetensors file ({error}); train again") from error


def _bank(arrays, core, config) -> dict:
    """The modes in a file: biases as they are, keys and gates drawn from their seeds again."""
    flat = traverse_util.flatten_dict(core, sep="/")
    bank: dict[str, dict] = {}
    for name, array in arrays.items():
        if not name.startswith("bank/"):
            continue
        path, what = name.removeprefix("bank/").rsplit("/", 1)
        layer = bank.setdefault(path, {})
        if what == "key_seed":
            seed = jax.random.wrap_key_data(jnp.asarray(array))
            width = flat[f"{path}/kernel"].shape[-2]
            gates = config.method.startswith("xdg")
            layer["key"] = (
                GateSeeds(seed, width, config.xdg.gated) if gates else KeySeeds(seed, width)
            )
        else:
            layer[what] = jnp.asarray(array)
    return bank
