"""Describes a run without training: its settings, tasks, network, memory and time."""

import math
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from bpnjax import config as configuration
from bpnjax import models
from bpnjax.data import TaskSequence, builtin_sets, set_names
from bpnjax.methods import REGISTRY
from bpnjax.run import byte_counts, train
from bpnjax.training import parallel, streaming
from bpnjax.training.experiment import Experiment
from bpnjax.utils import prng
from bpnjax.utils.errors import UserError

_SHARE = 0.4  # share of the matrix product rate that training and tests reach (benchmarks/)


def describe(config: ConfigDict) -> str:
    """Reads the data and shapes of a run and describes it.

    Nothing is trained or written to the run's folder. Some matrix products are timed on the device.

    Args:
      config: a validated configuration.

    Returns:
      Lines of text.

    Raises:
      UserError: the run could not start.
    """
    parallel.choose_layout(config)  # checks the devices before the slow parts
    _check_prepared(config)
    layout, sequence, experiment, earlier, stages, per_epoch = train.prepare(config)
    counts = byte_counts.report(experiment)
    steps = sum(experiment.epochs[task] * steps for task, steps in per_epoch.items())
    lines = [f"{name} = {value!r}" for name, value in configuration.flatten(config).items()]
    lines += ["", f"method    {config.method} ({REGISTRY[config.method].paper or 'baseline'})"]
    learned = f", 1 to {earlier.num_tasks} learned in {earlier.path}" if earlier else ""
    lines += [f"tasks     {sequence.num_tasks}{learned}"]
    for task, row in enumerate(sequence.classes):
        names = [sequence.class_names[c] for c in row.nonzero()[0]]
        shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
        lines.append(
            f"  {task + 1:3d}  {int(sequence.train.count[task]):,} training and "
            f"{int(sequence.test.count[task]):,} test examples of {len(names)} classes: {shown}"
        )
    network = models.find(config.model).described(config.model)
    lines.append(f"network   {network}, input {sequence.train.images.shape[1:]}")
    for path, layer in experiment.learner.network.layers.items():
        lines.append(f"  {path}: {layer.kind}, {layer.inputs} -> {layer.outputs}")
    held = sequence.train.images.nbytes + sequence.test.images.nbytes
    most = streaming.most_bytes(config)
    streams = most is not None and sequence.train.images.nbytes > most
    lines += [
        f"memory    {counts['core_parameters']:,} shared parameters",
        f"  {counts['parameters_per_task']:,} numbers ({counts['bytes_per_task']:,} bytes) kept "
        "per task",
        f"  {config.num_seeds * counts['training_bytes'] / 1e6:,.1f} MB of state in training, "
        f"{config.num_seeds} seed{'s' * (config.num_seeds > 1)}",
        f"  {held / 1e6:,.1f} MB of examples{', which stream' if streams else ''}",
        f"devices   {layout.number} of {jax.device_count()} x {jax.devices()[0].device_kind}",
        f"steps     {steps:,} of {config.train.batch_size} examples",
        f"time      about {duration(_seconds(experiment, sequence, stages))} on one such "
        "device, by its rate of matrix products; rough, compiling not counted",
    ]
    return "\n".join(lines)


def cost(config: ConfigDict) -> tuple[int, float]:
    """Estimates the cost of a run, from some matrix products that it times on the device.

    Args:
      config: a validated configuration.

    Returns:
      The number of steps, and roughly the seconds that they and the tests take on one device.

    Raises:
      UserError: the run could not start, or sets are not prepared.
    """
    _check_prepared(config)
    _, sequence, experiment, _, stages, per_epoch = train.prepare(config)
    steps = sum(experiment.epochs[task] * steps for task, steps in per_epoch.items())
    return steps, _seconds(experiment, sequence, stages)


def check(config: ConfigDict) -> None:
    """Raises an error for a run that cannot start, as far as known before data are prepared.

    Args:
      config: a validated configuration.

    Raises:
      UserError: the run cannot start. Sets that are not prepared are not checked.
    """
    if not _unprepared(config):
        train.prepare(config)


def _unprepared(config: ConfigDict) -> dict[str, list[str]]:
    """The sets that a run would have to prepare first, and their archives."""
    names = [name for name in set_names(config) if name not in builtin_sets.SETS]
    if not names:
        return {}
    from bpnjax.data.tfds_prepare import unprepared

    return unprepared(names, config.dataset.data_dir)


def _check_prepared(config: ConfigDict) -> None:
    """Raises an error for sets that are not prepared, since a dry run prepares none."""
    absent = _unprepared(config)
    if not absent:
        return
    listed = "; ".join(
        name + (f" ({', '.join(files[:4])}{', ...' if len(files) > 4 else ''})" if files else "")
        for name, files in absent.items()
    )
    raise UserError(
        f"dataset.name: {len(absent)} of {len(set_names(config))} sets are not prepared, and a dry"
        f" run prepares none: {listed}; the command without --dry_run downloads and prepares them,"
        " or takes these archives from --config.dataset.manual_dir=DIR; sets prepared elsewhere are"
        " read from --config.dataset.data_dir=DIR"
    )


def _seconds(experiment: Experiment, sequence: TaskSequence, stages: Sequence[int]) -> float:
    """From the number of multiplications in training and in the tests after each task."""
    core, _ = jax.eval_shape(experiment.learner.network.init, prng.key(0))
    multiplications = 0
    for path, layer in experiment.learner.network.layers.items():
        kernel = core
        for name in path.split("/"):
            kernel = kernel.get(name, {}) if isinstance(kernel, dict) else {}
        size = kernel["kernel"].size if "kernel" in kernel else layer.inputs * layer.outputs
        # The whole kernel is multiplied at every place of the output: pixels or patches.
        places = math.prod(layer.output_shape[1:]) // layer.outputs
        multiplications += layer.calls * places * size
    tested = 0.0
    for row in stages:
        of_row = int(sequence.test.count[: row + 1].sum())
        modes = row + 1 if experiment.told_task else 0  # used for task_inferred
        every = experiment.config.evaluate.inferred_rows == "all" or row == stages[-1]
        limit = experiment.config.evaluate.inferred_examples
        share = min(1.0, limit * (row + 1) / of_row) if limit else 1.0
        tested += of_row * (1 + every * share * modes)
    epochs = experiment.epochs
    count = sequence.train.count
    if experiment.jointly:
        trained = epochs[0] * int(count.sum())
    else:
        trained = sum(epochs[task] * int(count[task]) for task in stages)
    work = experiment.config.num_seeds * 2.0 * multiplications * (3 * trained + tested)
    return work / (_SHARE * _matrix_rate())


def _matrix_rate(size: int = 1024) -> float:
    a = jnp.ones((size, size))
    multiply = jax.jit(jnp.matmul)
    jax.block_until_ready(multiply(a, a))
    started = time.perf_counter()
    for _ in range(5):
        jax.block_until_ready(multiply(a, a))
    return 5 * 2.0 * size**3 / (time.perf_counter() - started)


def duration(seconds: float) -> str:
    """A duration as text.

    Args:
      seconds: any number.

    Returns:
      A text such as ``"12 s"``, ``"3 min"`` or ``"2.5 h"``.

    Example:
      >>> from bpnjax.run import dry_run
      >>> dry_run.duration(200)
      '3 min'
    """
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
