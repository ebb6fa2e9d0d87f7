"""Packs: files with the part of a model that belongs to some of its tasks.

    packs.pack("runs/ada/bd_psp", [0, 1], "ada.pack")     # on one machine
    packs.pack("runs/bob/bd_psp", [0, 1], "bob.pack")     # on another
    packs.merge("pretrained/model.safetensors", ["ada.pack", "bob.pack"], "both.safetensors")
    predictor = bpnjax.load("both.safetensors")           # four tasks

Two runs on one frozen network differ only in what their tasks own: biases, keys and gates, running
statistics, the statistics that infer the task, and with ``sequence.heads=multi`` the columns of the
output layer. A pack holds only these. Of everything shared it has a hash, so that `merge` can check
that packs fit a network and each other.

The owner of an array is found from shapes: an axis that grows by one with one more task is an axis
of tasks, and an axis that grows by two with two more outputs is an axis of outputs.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bpnjax.config import flatten
from bpnjax.config.fields import entries
from bpnjax.evaluation import task_inference
from bpnjax.models.features import name_in_state
from bpnjax.modes.keys import key_of_task
from bpnjax.run import predictor as models
from bpnjax.run.predictor import Predictor
from bpnjax.run.stablehlo import check_place
from bpnjax.utils import arrays, prng
from bpnjax.utils.errors import UserError

__all__ = ["Pack", "Task", "merge", "pack", "unpack"]

FORMAT = "bpnjax-pack-1"
_SAID = ("agreement", "shared", "fields", "input_range")  # entries of a pack's metadata
_PROBES = 4  # examples on which a merged model must answer like the original model of a task
# Common fields that answers depend on, beside those of the method. Of the network all but these.
_FIELDS = (
    "sequence.kind", "sequence.heads", "evaluate.rule", "evaluate.statistics",
    "evaluate.features", "evaluate.clusters",
)  # fmt: skip
_TRAINING = ("model.pretrained", "model.dropout", "model.kernel_init")


class Task(NamedTuple):
    """A task of a pack."""

    classes: tuple[str, ...]  # names of its classes, one for each of its outputs
    outputs: tuple[int, ...]  # their places if tasks share the output layer; otherwise ()
    arrays: dict[str, np.ndarray]  # named as in a model, without their axis of tasks
    probe: np.ndarray  # f32 [4, K], its outputs for examples that are drawn from a fixed seed
    identity: str  # SHA-256 of everything but the probe, in hexadecimal digits


@dataclasses.dataclass(frozen=True)
class Pack:
    """Tasks without the network that they were learned on.

    Attributes:
      path: of its file.
      tasks: in the order of their class names.
      agreement: what packs must have in common to be merged, by name.
      shared: for each array that the tasks share, by name, 32 hexadecimal digits of its SHA-256.
      fields: the configuration fields that answers depend on, with their values.
      input_range: the smallest and largest number in the examples of its run, or None if unknown.
    """

    path: str
    tasks: tuple[Task, ...]
    agreement: dict[str, Any]
    shared: dict[str, str]
    fields: dict[str, Any]
    input_range: list[float] | None

    @property
    def network(self) -> str:
        """SHA-256 of ``shared`` in hexadecimal digits, which identifies the shared network."""
        return hashlib.sha256(json.dumps(self.shared, sort_keys=True).encode()).hexdigest()

    def __repr__(self) -> str:
        tasks = "; ".join(", ".join(task.classes) for task in self.tasks)
        return f"Pack({self.agreement['method']}, network {self.network[:12]}, tasks: {tasks})"


class _Part(NamedTuple):
    """Which parts of an array belong to single tasks."""

    tasks: bool  # whether its first axis is that of tasks
    output: int | None  # its axis of outputs if these belong to tasks, without the axis of tasks
    key: bool  # whether it is one PRNG key of all tasks, or one per task

    @property
    def shared(self) -> bool:
        return self == (False, None, False)

    def columns(self, outputs: Any) -> tuple[Any, ...]:
        """The index of some outputs in a task's array."""
        return (slice(None),) * (self.output or 0) + (outputs,)


def pack(
    path: str | os.PathLike[str],
    tasks: int | Sequence[int] | None,
    out: str | os.PathLike[str],
    *,
    seed: int | None = None,
    statistics: bool = True,
) -> Pack:
    """Writes the part of a model that belongs to some tasks to a file of a few KB.

    Args:
      path: the folder of a run, or one of its ``.safetensors`` files.
      tasks: numbers from 0; None for all.
      out: the file to write.
      seed: which model to use of a run with several seeds.
      statistics: whether the pack includes what the run's ``evaluate.rule`` stores per task.
        Without it the merged model infers tasks by entropy.

    Returns:
      `Pack`, as from `unpack`.

    Raises:
      UserError: the model or a task does not exist, or nothing in it belongs to single tasks.

    Example:
      >>> import pathlib, tempfile
      >>> import bpnjax
      >>> from bpnjax import config, packs
      >>> settings = config.default()
      >>> settings.dataset.name, settings.sequence.classes = "gaussians", "0,1;0,2"
      >>> settings.sequence.heads, settings.model.hidden, settings.train.epochs = "multi", (8,), 1
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     run, first, second = (f"{folder}/{name}" for name in ("run", "1.pack", "2.pack"))
      ...     _ = bpnjax.train(settings, pathlib.Path(run))
      ...     made = packs.pack(run, 0, first), packs.pack(run, 1, second)
      ...     merged = packs.merge(run, [second, first], f"{folder}/both.safetensors")
      >>> [task.classes for task in made[1].tasks], sorted(made[1].shared)
      ([('black', 'light blue')], ['params/hidden_0/bias', 'params/hidden_0/kernel'])
      >>> merged.num_tasks, merged.class_names[2:]
      (2, ('black', 'red'))
    """
    file = models.find_file(path, seed)
    check_place(pathlib.Path(out), file)
    metadata = models.read_metadata(file)
    found, _ = arrays.read(file)
    source = models.predictor_of(file, metadata, found)
    if tasks is None:
        tasks = range(source.num_tasks)
    chosen = [tasks] if isinstance(tasks, (int, np.integer)) else list(tasks)
    for task in chosen:
        if not isinstance(task, (int, np.integer)) or not 0 <= task < source.num_tasks:
            raise UserError(
                f"tasks: {file} has no task {task!r}, but 0 to {source.num_tasks - 1} (on the "
                f"command line 1 to {source.num_tasks})"
            )
    if not chosen or len(set(chosen)) < len(chosen):
        raise UserError(f"tasks: {chosen}; name at least one, and each once")
    if source.learner.method.trains == "afresh":
        raise UserError(
            f"{file}: {metadata['method']} keeps a whole network for each task, and packs hold "
            "what tasks add to a shared one; use another method"
        )
    if statistics and source.statistics is not None and source.rule == "mahalanobis":
        raise UserError(
            f"{file}: evaluate.rule=mahalanobis keeps one precision of all tasks, which belongs to "
            "no single one; pack without statistics (statistics=False), or train by another rule"
        )
    if not statistics or source.statistics is None:
        found = {n: a for n, a in found.items() if not n.startswith("statistics/")}
    parts = _parts(file, metadata, found)
    owned = [_task(source, found, parts, int(task)) for task in chosen]
    if not any(task.arrays for task in owned):
        raise UserError(
            f"{file}: nothing in it belongs to single tasks; train with sequence.heads=multi, or "
            "by a method with a mode per task, such as bd_psp"
        )
    shared = {n: _digest(found[n]) for n, a in parts.items() if a.shared}
    limits = source.input_range
    made = Pack(
        str(out), _in_order(owned), _agreement(source, found, parts), shared,
        _fields(source, statistics), None if limits is None else list(limits),
    )  # fmt: skip
    _write(pathlib.Path(out), made)
    return made


def unpack(path: str | os.PathLike[str]) -> Pack:
    """Reads a pack.

    Args:
      path: of a file from `pack`.

    Returns:
      `Pack`.

    Raises:
      UserError: the file does not exist or is not a pack.
    """
    found, metadata = arrays.read(path)
    if metadata.get("format") != FORMAT:
        what = "a model; packs.pack makes one of it" if "config" in metadata else "something else"
        raise UserError(f"{path} is not a pack but {what}")
    try:
        listed = json.loads(metadata["tasks"])
        tasks = []
        for number, entry in enumerate(listed):
            own = models.group(found, str(number))
            probe = own.pop("probe")
            task = Task(tuple(entry["classes"]), tuple(entry["outputs"]), own, probe, "")
            tasks.append(task._replace(identity=_identity(task)))
        made = Pack(str(path), tuple(tasks), *(json.loads(metadata[name]) for name in _SAID))
        for known in (made.agreement["per task"], made.shared, made.fields):
            known.items()
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"{path}: damaged ({type(error).__name__}: {error}); make the pack again"
        ) from error
    for task, entry in zip(made.tasks, listed, strict=True):
        if task.identity != entry.get("identity"):
            raise UserError(
                f"{path}: task {', '.join(task.classes)} is not as it was packed; make the pack "
                "again"
            )
    return made


def merge(
    path: str | os.PathLike[str],
    packs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
) -> Predictor:
    """Merges tasks that were learned separately, on the same frozen network, into one model.

    The result depends only on the network and the tasks. Tasks are in the order of their class
    names, whatever the order of the packs, and the file is the same byte for byte.

    Args:
      path: a model with the network that all packs share: the one that their runs started from,
        or the model of one of the runs. Its own tasks are included only if they are packed.
      packs: files from `pack`.
      out: the model to write, a ``.safetensors`` file that `bpnjax.load` opens.

    Returns:
      The merged model, loaded.

    Raises:
      UserError: a pack belongs to another network or names another ``model.factory``, packs do not
        fit together, or a task is there twice. The message names the difference.
    """
    file = models.find_file(path)
    read = [unpack(one) for one in packs]
    if not read:
        raise UserError("packs: none given; name at least one")
    for source in (file, *packs):
        check_place(pathlib.Path(out), source)
    for other in read[1:]:
        _check_agreement(read[0], other)
    shared = _shared_arrays(file, read)
    sources: dict[str, Pack] = {}  # the pack of each task, by the task's identity
    for one in read:
        for task in one.tasks:
            if before := sources.get(task.identity):
                raise UserError(
                    f"packs: the task {', '.join(task.classes)} of {one.path} is also in "
                    f"{before.path}; leave one of them out"
                )
            sources[task.identity] = one
    tasks = _in_order([task for one in read for task in one.tasks])
    read = [sources[task.identity] for task in tasks]
    metadata = _metadata(tasks, read)
    # To build the network is to import it, and a pack may come from anybody.
    if (factory := _factory(metadata)) not in ("", _factory(models.read_metadata(file))):
        raise UserError(
            f"{read[0].path}: its network is model.factory={factory}, code that {file} does not "
            "name; merge with a model of that network"
        )
    found = _assembled(out, metadata, shared, tasks)
    merged = models.predictor_of(out, metadata, found)
    for number, (task, one) in enumerate(zip(tasks, read, strict=True)):
        _check_probe(merged, number, task, one, read[0])
    arrays.write(out, found, metadata)
    return merged


# Which arrays belong to single tasks.


def _parts(
    file: Any, metadata: dict[str, str], found: Mapping[str, np.ndarray]
) -> dict[str, _Part]:
    """Which parts of the arrays of a model belong to single tasks, by name."""
    description = models.described(file, metadata)
    tasks, outputs = description.outputs.shape
    more = 2 if description.config.sequence.heads == "multi" else 0
    table = np.zeros((tasks + 1, outputs + more), bool)
    table[:tasks, :outputs] = description.outputs
    table[tasks] = np.arange(outputs + more) >= outputs if more else table[0]
    grown = description._replace(
        outputs=table, names=(*description.names, "", "")[: outputs + more]
    )
    extractor = models.group(dict(found), "extractor")

    def shapes(of: models.Description) -> dict[str, tuple[tuple[int, ...], bool]]:
        learner = models.experiment_of(of, extractor)[0].learner
        abstract = jax.eval_shape(learner.first, prng.key(0))
        names = jax.tree.leaves(arrays.names_of(abstract))
        leaves, needed = jax.tree.leaves(abstract), jax.tree.leaves(learner.answering(abstract))
        return {
            name: (leaf.shape, jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key))
            for name, leaf, n in zip(names, leaves, needed, strict=True)
            if n
        }

    after = shapes(grown)
    parts = {n: _Part(False, None, False) for n in found if n.startswith("extractor/")}
    for name, (shape, key) in shapes(description).items():
        steps = [b - a for a, b in zip(shape, after[name][0], strict=True)]
        of_tasks = steps[:1] == [1]
        steps = steps[of_tasks:]
        if any(step not in (0, 2) for step in steps) or steps.count(2) > 1:
            raise UserError(
                f"{file}: {name} grows with tasks or outputs in a way that cannot be taken apart; "
                "its model cannot be packed"
            )
        parts[name] = _Part(of_tasks, steps.index(2) if 2 in steps else None, key)
    return parts


def _task(
    source: Predictor,
    found: Mapping[str, np.ndarray],
    parts: Mapping[str, _Part],
    task: int,
) -> Task:
    """Collects what belongs to one task."""
    multi = source.learner.setup.multi_head
    outputs = np.flatnonzero(source.outputs[task])
    own = {}
    for name, where in parts.items():
        array = found[name]
        if where.key:
            seed = jax.random.wrap_key_data(jnp.asarray(array))
            own[name] = np.asarray(jax.random.key_data(key_of_task(seed, task)))
        elif not where.shared:
            array = array[task] if where.tasks else array
            own[name] = array if where.output is None else array[where.columns(outputs)]
    for name in found:
        if name.startswith("statistics/"):
            own[name] = found[name][task]
    if source.orders is not None:
        order = np.asarray(source.orders[task])
        own["orders"] = order.astype(np.min_scalar_type(order.size))
    made = Task(
        tuple(source.class_names[c] for c in outputs), () if multi else tuple(outputs.tolist()),
        own, _probe(source, task, source.input_range), "",
    )  # fmt: skip
    return made._replace(identity=_identity(made))


def _fields(source: Predictor, statistics: bool) -> dict[str, Any]:
    """The configuration fields that answers depend on, with their values."""
    config = models.with_all_fields(json.loads(source.metadata["config"]))
    if not statistics and config.evaluate.rule in task_inference.MAPPERS:
        config.evaluate.rule = "entropy"
    known, values = entries(), flatten(config)
    kept = {"method": config.method}
    for field, value in values.items():
        methods = known[field].methods if field in known else ()
        common = not methods and (field in _FIELDS or field.startswith("model."))
        if (common and field not in _TRAINING) or config.method in methods:
            kept[field] = value
    return kept


def _agreement(
    source: Predictor, found: Mapping[str, np.ndarray], parts: Mapping[str, _Part]
) -> dict[str, Any]:
    """What tasks must have in common to be answered by one model."""
    multi = source.learner.setup.multi_head
    owned = {}
    for name, where in parts.items():
        if where.key:
            owned[name] = "key"
        elif not where.shared:
            shape: list[Any] = list(found[name].shape)[where.tasks :]
            if where.output is not None:
                shape[where.output] = "outputs"
            owned[name] = f"{found[name].dtype}{shape}"
    kept = None
    if (mean := found.get("statistics/mean")) is not None:
        # Only the random directions on which inputs are projected depend on the seed.
        seed = int(source.metadata["seed"]) if source.features == "input" else 0
        kept = {"seed": seed, "projections": mean.shape[-1]}
    return {
        "method": source.metadata["method"],
        "sequence.heads": "multi" if multi else "single",
        "inputs": f"{source.input_dtype}{list(source.input_shape)}",
        "dataset.normalize": [json.loads(source.metadata[n]) for n in ("scale", "shift")],
        "classes": None if multi else list(source.class_names),
        "permuted": source.orders is not None,
        "evaluate.statistics": kept,
        "per task": owned,
    }


def _probe(model: Predictor, task: int, limits: Sequence[float] | None) -> np.ndarray:
    """Outputs of a task f32 [4, K] for examples that are the same for all models of such inputs."""
    model = dataclasses.replace(model, input_range=None)  # other models may have another range
    least, most = limits or (0, 255 if model.input_dtype.kind in "ui" else 1)
    draws = np.random.default_rng(0).random((_PROBES, *model.input_shape))
    x = least + draws * (most - least)
    x = (np.round(x) if model.input_dtype.kind in "ui" else x).astype(model.input_dtype)
    return model.logits(x, task)[:, model.outputs[task]]


def _digest(array: np.ndarray) -> str:
    text = f"{array.dtype.str}{list(array.shape)}".encode()
    return hashlib.sha256(text + np.ascontiguousarray(array).tobytes()).hexdigest()[:32]


def _identity(task: Task) -> str:
    digests = {name: _digest(array) for name, array in task.arrays.items()}
    said = json.dumps([task.classes, task.outputs, digests], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def _in_order(tasks: Sequence[Task]) -> tuple[Task, ...]:
    return tuple(sorted(tasks, key=lambda task: (task.classes, task.identity)))


def _write(file: pathlib.Path, made: Pack) -> None:
    found: dict[str, np.ndarray] = {}
    for number, task in enumerate(made.tasks):
        own = task.arrays | {"probe": task.probe}
        found |= {f"{number}/{name}": array for name, array in own.items()}
    listed = [
        {"classes": t.classes, "outputs": t.outputs, "identity": t.identity} for t in made.tasks
    ]
    said = {"tasks": listed} | {name: getattr(made, name) for name in _SAID}
    texts = {name: json.dumps(value) for name, value in said.items()}
    arrays.write(file, found, {"format": FORMAT} | texts)


# One model of several packs.

_FIXES = {
    "method": "one model answers by one method; train both by it",
    "sequence.heads": "train both with the same",
    "inputs": "train both on examples of one dtype and shape (dataset.resize)",
    "dataset.normalize": "each run measured its own data; train both with dataset.normalize=unit, "
    "symmetric, none or imagenet",
    "classes": "tasks that share their outputs need the same classes; train both with "
    "sequence.heads=multi",
    "permuted": "train both on sequences of one kind (sequence.kind)",
    "evaluate.statistics": "train both with one seed and one number of projections, or pack "
    "without statistics (statistics=False)",
}


def _check_agreement(one: Pack, other: Pack) -> None:
    """Raises an error for packs that differ in what they must have in common."""
    for name, fix in _FIXES.items():
        a, b = (p.agreement.get(name) for p in (one, other))
        if a != b:
            raise UserError(
                f"packs: {name} is {_short(a)} in {one.path} and {_short(b)} in {other.path}; {fix}"
            )
    for what, a, b in (
        ("per task", one.agreement["per task"], other.agreement["per task"]),
        ("in the network that tasks share", one.shared, other.shared),
    ):
        if names := [n for n in sorted({*a, *b}) if a.get(n) != b.get(n)]:
            raise UserError(
                f"packs: {one.path} and {other.path} differ in what they have {what}: "
                f"{_list(names)}; {_FREEZE}"
            )


_FREEZE = (
    "packs fit where both runs started from one network and left it as it was (model.pretrained, "
    "train.rates='(?!output).*=0', sequence.heads=multi)"
)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _list(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _shared_arrays(file: pathlib.Path, read: Sequence[Pack]) -> dict[str, np.ndarray]:
    """The arrays that the packs share, from a model that has them."""
    models.read_metadata(file)
    found, _ = arrays.read(file)
    shared, wrong = {}, []
    # Frozen layers that a run computed once are stored beside the trained ones.
    whole = {_whole_name(n): array for n, array in found.items()}
    for name, digest in read[0].shared.items():
        array = whole.get(_whole_name(name))
        if array is None or _digest(array) != digest:
            wrong.append(f"{name} ({'missing' if array is None else 'other numbers'})")
        else:
            shared[name] = array
    if wrong:
        raise UserError(
            f"{file}: not the network of {read[0].path} ({read[0].network[:12]}), they differ in "
            f"{_list(wrong)}; {_FREEZE}"
        )
    return shared


def _factory(metadata: dict[str, str]) -> str:
    """The code that makes a model's network; "" where the package makes it."""
    try:
        return str(models.with_all_fields(json.loads(metadata["config"])).model.factory)
    except (KeyError, ValueError, TypeError, AttributeError):
        return ""  # they describe no model


def _whole_name(name: str) -> str:
    """The name of an array in a model of a run that trained the whole network."""
    start, _, rest = name.partition("/")
    return name_in_state(rest) if start == "extractor" else name


def _metadata(tasks: Sequence[Task], read: Sequence[Pack]) -> dict[str, str]:
    """The metadata of a merged model, from its tasks and the pack of each."""
    agreement, fields = read[0].agreement, dict(read[0].fields)
    if len({one.fields["evaluate.rule"] for one in read}) > 1:
        fields["evaluate.rule"] = "entropy"
    config: dict[str, Any] = {}
    for field, value in fields.items():
        group, _, name = field.rpartition(".")
        (config.setdefault(group, {}) if group else config)[name] = value
    ends = np.cumsum([len(task.classes) for task in tasks])
    outputs = [
        list(range(end - len(task.classes), end))
        for task, end in zip(tasks, ends.tolist(), strict=True)
    ]
    names = [name for task in tasks for name in task.classes]
    if agreement["classes"] is not None:
        outputs, names = [list(task.outputs) for task in tasks], agreement["classes"]
    limits = [one.input_range for one in read if one.input_range is not None]
    both = [min(a for a, _ in limits), max(b for _, b in limits)] if limits else None
    dtype, _, shape = agreement["inputs"].partition("[")
    scale, shift = agreement["dataset.normalize"]
    merged = [{"classes": task.classes, "identity": task.identity} for task in tasks]
    said = {
        "config": config,
        "outputs": outputs,
        "class_names": names,
        "input_shape": json.loads(f"[{shape}"),
        "input_range": both if len(limits) == len(tasks) else None,
        "scale": scale,
        "shift": shift,
        "merged": merged,
    }
    # Keys and permutations are stored per task, so the seed only determines the directions.
    kept = agreement["evaluate.statistics"]
    return {n: json.dumps(v, sort_keys=True) for n, v in said.items()} | {
        "format": models.FORMATS[-1],
        "method": agreement["method"],
        "num_tasks": str(len(tasks)),
        "input_dtype": dtype,
        "seed": str(kept["seed"] if kept else 0),
    }


def _assembled(
    out: Any,
    metadata: dict[str, str],
    shared: Mapping[str, np.ndarray],
    tasks: Sequence[Task],
) -> dict[str, np.ndarray]:
    """The arrays of a merged model."""
    found = dict(shared)
    parts = _parts(out, metadata, found)
    columns = json.loads(metadata["outputs"])
    width = len(json.loads(metadata["class_names"]))
    for name, first in tasks[0].arrays.items():
        rows = [task.arrays[name] for task in tasks]
        where = parts.get(name, _Part(True, None, False))  # statistics, permutations: in no state
        if where.output is None:
            found[name] = np.stack(rows)
            continue
        shape = [width if i == where.output else n for i, n in enumerate(first.shape)]
        whole = np.zeros([len(tasks)] * where.tasks + shape, first.dtype)
        for number, (row, own) in enumerate(zip(rows, columns, strict=True)):
            target = whole[number] if where.tasks else whole
            target[where.columns(own)] = row
        found[name] = whole
    if "orders" in found:
        found["orders"] = found["orders"].astype(np.int32)
    return found


def _check_probe(merged: Predictor, number: int, task: Task, one: Pack, first: Pack) -> None:
    """Raises an error if a merged model answers a task differently from its original model."""
    answers = _probe(merged, number, one.input_range)
    # Rounding depends on the device. Another network or setting differs by far more.
    if np.abs(answers - task.probe).max() <= 1e-2 * (1 + np.abs(task.probe).max()):
        return
    a, b = first.fields, one.fields
    differing = [
        f"{f} {a.get(f)!r} and {b.get(f)!r}" for f in sorted({*a, *b}) if a.get(f) != b.get(f)
    ]
    raise UserError(
        f"packs: in the merged model the task {', '.join(task.classes)} of {one.path} would have "
        f"other answers than in its own run; settings that differ: "
        f"{_list(differing) or 'none that are known'}; train both with the same"
    )
