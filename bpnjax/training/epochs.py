"""The programs of a run as pure functions of one seed's state: begin a task, run steps, end it.

They are those of the learner, with the data of the run: whole ranges of steps in one compiled loop.
The task, the epoch and the range of steps are traced, so each compiles once for a sequence of any
length; whoever calls them adds `jax.vmap` over seeds, `jax.pmap` over devices, and `jax.jit`.
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
      statistics: `bpnjax.evaluation.task_inference.Statistics` of each task, where the rule asks
        for them; else ().
    """

    learner: State
    statistics: Any = ()


@struct.dataclass
class Sums:
    """What a range of steps adds up.

    Attributes:
      loss: f32 scalar, summed over examples.
      correct: f32 scalar.
      examples: f32 scalar.
      bad_step: int32 scalar, the first step after which something is not finite, else -1.
    """

    loss: jax.Array
    correct: jax.Array
    examples: jax.Array
    bad_step: jax.Array


def init_state(experiment: Experiment, key: jax.Array) -> RunState:
    """The state before the first task.

    Args:
      experiment: the static side.
      key: the seed's typed PRNG key.

    Returns:
      `RunState`; what the method keeps is allocated for all tasks.
    """
    statistics: Any = ()
    if experiment.statistics:
        statistics = task_inference.empty(experiment.num_tasks, experiment.statistics)
    return RunState(experiment.learner.first(key), statistics)


def begin_task(experiment: Experiment, state: RunState, task: Any) -> RunState:
    """Fresh task parameters and optimizer states; the shared parameters go on.

    Args:
      experiment: the static side.
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

    A loop with traced bounds rather than a scan of fixed length: tasks of different size, an
    epoch cut by checkpoints and a run taken up in mid-epoch all use the same compiled program and
    execute the same step, so a resumed run equals one never stopped, bit for bit.

    Args:
      experiment: the static side.
      state: before; may be donated.
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
      experiment: the static side.
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
    if experiment.statistics:
        found = _input_statistics(experiment, key, take, slots.shape[0], count, axis)
        statistics = jax.tree.map(lambda kept, new: kept.at[task].set(new), statistics, found)
    return RunState(learner, statistics)


def input_directions(experiment: Experiment, key: jax.Array) -> jax.Array:
    """The directions of the statistics of a seed, f32 ``[inputs, r]``."""
    example = experiment.learner.network.example
    assert example is not None
    inputs = math.prod(example.shape)
    return task_inference.directions(prng.fold(key, prng.STATISTICS), inputs, experiment.statistics)


def project(experiment: Experiment, x: jax.Array, directions: jax.Array) -> jax.Array:
    """Examples times `input_directions`, as the network sees them, f32 ``[n, r]``."""
    x = experiment.learner.network.prepare(x)
    return x.reshape(x.shape[0], -1) @ directions


def _input_statistics(
    experiment: Experiment, key: Any, take: Any, size: int, count: Any, axis: str | None
) -> task_inference.Statistics:
    """The Gaussian of a task's projected inputs, of the first examples of its last epoch."""
    r = experiment.statistics
    directions = input_directions(experiment, key)
    limit = min(task_inference.EXAMPLES, size)
    batch, count = min(512, limit), jnp.minimum(count, limit)

    def add(i: Any, sums: Any) -> Any:
        within = i * batch + jnp.arange(batch)
        x, _ = take(jnp.minimum(within, limit - 1))
        mine = jnp.where((within < count)[:, None], project(experiment, x, directions), 0.0)
        return sums[0] + mine.sum(0), sums[1] + mine.T @ mine

    zeros = (jnp.zeros(r, jnp.float32), jnp.zeros((r, r), jnp.float32))
    sums = collectives.sum_loop(axis, -(-count // batch), add, zeros)
    return task_inference.Statistics(*task_inference.gaussian(count.astype(jnp.float32), *sums))


def steps_per_epoch(experiment: Experiment, sequence: TaskSequence, task: int) -> int:
    """Batches in an epoch of a task, the last one not full if it does not divide.

    Args:
      experiment: the static side.
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
    """The order in which an epoch takes its examples.

    Args:
      experiment: the static side.
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
