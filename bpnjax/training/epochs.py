"""The programs of a run as pure functions of one seed's state: begin a task, run steps, end it.

They join the functions of the learner and the data of the run, and run many steps in one compiled
loop. The task, the epoch and the range of steps are traced, so each program compiles once for a
sequence of any length. The caller adds `jax.vmap` over seeds, `jax.pmap` over devices, and
`jax.jit`.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from bpnjax.data.sequence import Split, TaskSequence
from bpnjax.evaluation import task_inference
from bpnjax.learner import Clock, State
from bpnjax.methods import Batch
from bpnjax.training import schedule
from bpnjax.training.experiment import Experiment
from bpnjax.training.task_data import Data, make_reader
from bpnjax.utils import collectives, prng


@struct.dataclass
class RunState:
    """All that a run carries from step to step, for one seed.

    Attributes:
      learner: the state of the learner.
      statistics: what the mapper of the rule keeps of the tasks, as `bpnjax.evaluation.mappers`
        says; () where the rule needs nothing.
    """

    learner: State
    statistics: Any = ()


@struct.dataclass
class Sums:
    """Sums over a range of steps.

    Attributes:
      loss: f32 scalar, summed over examples.
      correct: f32 scalar.
      examples: f32 scalar.
      bad_step: int32 scalar, the first step after which a value is not finite, or -1.
    """

    loss: jax.Array
    correct: jax.Array
    examples: jax.Array
    bad_step: jax.Array


def init_state(experiment: Experiment, key: jax.Array) -> RunState:
    """The state before the first task.

    Args:
      experiment: what does not change during the run.
      key: the seed's typed PRNG key.

    Returns:
      `RunState`; what the method keeps is allocated for all tasks.
    """
    statistics: Any = ()
    if experiment.mapper:
        statistics = experiment.mapper.empty(experiment.num_tasks, experiment.width)
    return RunState(experiment.learner.first(key), statistics)


def begin_task(experiment: Experiment, state: RunState, task: Any) -> RunState:
    """Starts a task with new task parameters and optimizer states; shared parameters stay.

    Args:
      experiment: what does not change during the run.
      state: after the last task; may be donated.
      task: int scalar, may be traced.

    Returns:
      `RunState`.
    """
    started = experiment.learner.start(state.learner, task)
    return dataclasses.replace(state, learner=started)


def run_steps(
    experiment: Experiment,
    state: RunState,
    data: Data,
    task: Any,
    epoch: Any,
    start: Any,
    stop: Any,
    axis: str | None = None,
) -> tuple[RunState, Sums]:
    """Runs the steps ``start`` to ``stop - 1`` of an epoch, without a return to the host.

    The loop has traced bounds, unlike a scan of fixed length. Tasks of different sizes, epochs that
    checkpoints cut and runs that resume in mid-epoch therefore all use the same compiled program,
    and a resumed run equals one that was never stopped, bit for bit.

    Args:
      experiment: what does not change during the run.
      state: the state before the steps; may be donated.
      data: the sequence.
      task: int scalar, may be traced, as all that follow.
      epoch: int scalar.
      start: int scalar, first step.
      stop: int scalar, one past the last step.
      axis: name of the mapped device axis; each device takes its share of every batch.

    Returns:
      The state after, and `Sums` over the steps.
    """
    size = experiment.config.train.batch_size
    devices, place = collectives.devices(axis)
    share = -(-size // devices)
    key = state.learner.key
    slots, count = epoch_order(experiment, key, data.train, task, epoch)
    reader = make_reader(experiment, key, data, None if experiment.jointly else task)
    rates = schedule.rates(experiment, task, epoch)
    before = epoch * -(-count // size)

    def step(i: Any, carry: tuple[State, Sums]) -> tuple[State, Sums]:
        learner, sums = carry
        offset = place * share + jnp.arange(share)
        position = i * size + offset
        weight = ((offset < size) & (position < count)).astype(jnp.float32)
        mine = slots[jnp.minimum(position, slots.shape[0] - 1)]
        x, y = reader.take(data.train, mine)
        batch = Batch(x, y, weight, mine // data.train.index.shape[1])
        clock = Clock(task, before + i, *rates)
        learner, totals = experiment.learner.update(learner, batch, clock, axis)
        bad = jnp.where((sums.bad_step < 0) & ~jnp.isfinite(totals.loss), i, sums.bad_step)
        return learner, Sums(
            sums.loss + totals.loss,
            sums.correct + totals.correct,
            sums.examples + totals.examples,
            bad,
        )

    zero = jnp.float32(0)
    learner, sums = jax.lax.fori_loop(
        start, stop, step, (state.learner, Sums(zero, zero, zero, jnp.int32(-1)))
    )
    # The last update may have broken what its loss does not show yet.
    leaves = jax.tree.leaves(learner.params)
    finite = jnp.all(jnp.array([jnp.all(jnp.isfinite(p)) for p in leaves]))
    bad = jnp.where((sums.bad_step < 0) & ~finite, stop - 1, sums.bad_step)
    return (
        dataclasses.replace(state, learner=learner),
        dataclasses.replace(sums, bad_step=bad),
    )


def end_task(
    experiment: Experiment, state: RunState, data: Data, task: Any, axis: str | None = None
) -> RunState:
    """Freezes the task's mode, drops what was learned for it, and updates the protection.

    Args:
      experiment: what does not change during the run.
      state: after the task's last step; may be donated.
      data: the sequence; importance passes over the task's training examples.
      task: int scalar, may be traced.
      axis: name of the mapped device axis; each device takes its share of the examples.

    Returns:
      `RunState`, its task parameters zero.
    """
    key = state.learner.key
    epochs = schedule.look_up(experiment.epochs, task)
    slots, count = epoch_order(experiment, key, data.train, task, epochs - 1)
    reader = make_reader(experiment, key, data, None if experiment.jointly else task)
    steps = epochs * -(-count // experiment.config.train.batch_size)
    clock = Clock(task, steps, *schedule.rates(experiment, task, epochs - 1))

    def take(places: jax.Array) -> tuple[jax.Array, jax.Array]:
        return reader.take(data.train, slots[places])

    learner = experiment.learner.consolidate(
        state.learner, take, slots.shape[0], count, clock, axis
    )
    statistics = state.statistics
    if experiment.mapper:
        z, group, weight = _vectors(experiment, learner, task, take, slots.shape[0], count, axis)
        own = prng.fold(key, prng.STATISTICS, task)
        statistics = experiment.mapper.fit(statistics, task, own, z, group, weight)
    return RunState(learner, statistics)


def input_directions(experiment: Experiment, key: jax.Array) -> jax.Array | None:
    """The directions f32 ``[inputs, r]`` of a seed, where the mapper looks at inputs; else None."""
    if experiment.features != "input":
        return None
    example = experiment.learner.network.example
    assert example is not None
    inputs = math.prod(example.shape)
    return task_inference.directions(prng.fold(key, prng.STATISTICS), inputs, experiment.width)


def vectors_of(
    learner: Any, features: str, state: State, x: Any, task: Any, directions: Any
) -> Any:
    """The features from which a mapper guesses the task.

    Args:
      learner: of the run.
      features: of `bpnjax.evaluation.mappers.FEATURES`.
      state: of the learner, between two tasks.
      x: examples as they are stored.
      task: the task whose mode is active, if the features depend on the mode.
      directions: of `input_directions`.

    Returns:
      f32 ``[n, d]``.
    """
    if features == "input":
        x = learner.network.prepare(x)
        return x.reshape(x.shape[0], -1) @ directions
    return learner.features(state, x, task if features == "mode" else None)


def _vectors(
    experiment: Experiment, state: State, task: Any, take: Any, size: int, count: Any,
    axis: str | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """What the mapper is fitted to, of the first examples of a task's last epoch.

    The vectors f32 [n, d], the number of each one's class among those of the task, and weights.
    """
    directions = input_directions(experiment, state.key)
    limit = min(task_inference.EXAMPLES, size)
    batch, count = min(512, limit), jnp.minimum(count, limit)
    room = -(-limit // batch) * batch
    classes = jnp.asarray(experiment.learner.setup.known_classes("evaluate.rule"))[task]
    number = jnp.cumsum(classes) - 1

    def add(i: Any, sums: Any) -> Any:
        within = i * batch + jnp.arange(batch)
        x, y = take(jnp.minimum(within, limit - 1))
        z = vectors_of(experiment.learner, experiment.features, state, x, task, directions)
        # Each device fills in its own blocks; their sum is the whole.
        kept = (within < count)[:, None]
        vectors = sums[0].at[within].set(jnp.where(kept, z, 0.0), mode="drop")
        return vectors, sums[1].at[within].set(number[y], mode="drop")

    zeros = (jnp.zeros((room, experiment.width), jnp.float32), jnp.zeros(room, number.dtype))
    z, group = collectives.sum_loop(axis, -(-count // batch), add, zeros)
    return z, group, jnp.asarray(jnp.arange(room) < count, jnp.float32)


def steps_per_epoch(experiment: Experiment, sequence: TaskSequence, task: int) -> int:
    """The number of batches in an epoch of a task. The last batch may be smaller.

    Args:
      experiment: what does not change during the run.
      sequence: the sets on the host.
      task: int; a joint method's epoch takes the examples of all tasks.

    Returns:
      An int.
    """
    count = sequence.train.count
    examples = int(count.sum() if experiment.jointly else count[task])
    return -(-examples // experiment.config.train.batch_size)


def epoch_order(
    experiment: Experiment, key: jax.Array, split: Split, task: Any, epoch: Any
) -> tuple[jax.Array, jax.Array]:
    """The order of the examples in an epoch.

    Args:
      experiment: what does not change during the run.
      key: the seed's typed PRNG key.
      split: the training set; only ``index`` and ``count`` are looked at.
      task: int scalar, may be traced.
      epoch: int scalar, may be traced.

    Returns:
      Slots (places in the flat index table) int32 ``[N]``, shuffled, padding last; and how many
      are real, int scalar.
    """
    tasks, width = split.index.shape
    if experiment.jointly:
        slots = jnp.arange(tasks * width, dtype=jnp.int32)
        real = slots % width < jnp.asarray(split.count)[slots // width]
    else:
        slots = task * width + jnp.arange(width, dtype=jnp.int32)
        real = jnp.arange(width) < jnp.asarray(split.count)[task]
    bits = jax.random.bits(prng.fold(key, prng.ORDER, task, epoch), slots.shape, jnp.uint32)
    draws = jnp.where(real, bits >> 1, jnp.uint32(0xFFFFFFFF))
    return slots[jnp.argsort(draws)], jnp.sum(real)
