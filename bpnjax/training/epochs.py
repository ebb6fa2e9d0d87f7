"""The programs of a run as pure functions of one seed: begin a task, run steps, end it.

Each takes the seed's PRNG key and the state and returns the new state. `task`, `epoch` and the
range of steps are traced, so each compiles once for a sequence of any length; whoever calls them
adds `jax.vmap` over seeds, `jax.pmap` over devices, and `jax.jit`.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bpnjax import importance
from bpnjax.data.sequence import Split, TaskSequence
from bpnjax.evaluation import task_inference
from bpnjax.importance import kronecker, per_example
from bpnjax.methods import Ended, Step
from bpnjax.networks import linen
from bpnjax.run.setup import Problem
from bpnjax.training import collectives, schedule
from bpnjax.training.recall import make_examples
from bpnjax.training.task_data import Data, make_view
from bpnjax.utils import prng


class TrainState(NamedTuple):
    """All that a run carries from step to step, for one seed."""

    core: Any  # shared parameters
    learned: Any  # parameters of the task in training (BD's factors), {} for most methods
    core_optimizer: Any
    learned_optimizer: Any
    method: Any  # what the method keeps: bank, anchors
    statistics: Any = ()  # `bpnjax.evaluation.task_inference.Statistics` of each task, where the rule asks for them


class Sums(NamedTuple):
    """What a range of steps adds up."""

    loss: jax.Array  # f32 scalar, summed over examples
    correct: jax.Array  # f32 scalar
    examples: jax.Array  # f32 scalar
    bad_step: jax.Array  # int32 scalar, first step after which something is not finite, else -1


def init_state(problem: Problem, key) -> TrainState:
    """The state before the first task.

    Args:
      problem: the static side.
      key: the seed's typed PRNG key.

    Returns:
      `TrainState`; what the method keeps is allocated for all tasks.
    """
    core = problem.spec.init(prng.fold(key, prng.INIT))
    learned = problem.method.fresh(prng.fold(key, prng.FRESH), problem.spec)
    return TrainState(
        core=core,
        learned=learned,
        core_optimizer=problem.core_optimizer.init(core),
        learned_optimizer=problem.learned_optimizer.init(learned),
        method=problem.method.init(prng.fold(key, prng.METHOD), core, problem.spec),
        statistics=task_inference.empty(problem.num_tasks, problem.statistics)
        if problem.statistics
        else (),
    )


def begin_task(problem: Problem, key, state: TrainState, task) -> TrainState:
    """Fresh task parameters and optimizer states; the shared parameters go on.

    Args:
      problem: the static side.
      key: the seed's typed PRNG key.
      state: after the last task; may be donated.
      task: int scalar, may be traced.

    Returns:
      `TrainState`. The state of the shared parameters' optimizer goes on unless
      `train.reset_optimizer`; stl starts from fresh shared parameters, too.
    """
    method = problem.method
    learned = method.fresh(prng.fold(key, prng.FRESH, task), problem.spec)
    core, core_optimizer = state.core, state.core_optimizer
    if method.restarts:
        core = problem.spec.init(prng.fold(key, prng.INIT, task))
    if method.restarts or problem.config.train.reset_optimizer:
        core_optimizer = problem.core_optimizer.init(core)
    return state._replace(
        core=core,
        learned=learned,
        core_optimizer=core_optimizer,
        learned_optimizer=problem.learned_optimizer.init(learned),
    )


def run_steps(
    problem: Problem, key, state: TrainState, data: Data, task, epoch, start, stop, axis=None
) -> tuple[TrainState, Sums]:
    """Runs the steps ``start`` to ``stop - 1`` of an epoch, without a return to the host.

    A loop with traced bounds rather than a scan of fixed length: tasks of different size, an
    epoch cut by checkpoints and a run taken up in mid-epoch all use the same compiled program and
    execute the same step, so a resumed run equals one never stopped, bit for bit.

    Args:
      problem: the static side.
      key: the seed's typed PRNG key.
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
    config, method = problem.config, problem.method
    batch = config.train.batch_size
    devices, me = collectives.devices(axis)
    share = -(-batch // devices)
    first = me * share
    slots, count = epoch_order(problem, key, data.train, task, epoch)
    view = make_view(problem, key, data, task)
    mode = view.mode(method.mode(state.method, task))

    def loss(params, mine, weight, kept, step_key):
        core, learned = params
        core = method.train_core(core, kept, task, step_key)
        x, y = view.examples(data.train, mine)
        logits = linen.modulated_apply(
            problem.model, view.params(core), method.train_mode(learned, mode), x,
            rngs={"dropout": prng.fold(step_key, prng.DROPOUT, me)},  # a mask a device
        ).astype(jnp.float32)  # fmt: skip
        logits = view.within_head(data.train, mine, logits)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        correct = jnp.sum(weight * (jnp.argmax(logits, -1) == y))
        return jnp.sum(weight * losses), correct

    slower = 1.0 / (1.0 + config.train.rate_decay * jnp.asarray(task, jnp.float32))
    left = schedule.dropped(config, problem.epochs, task, epoch)
    slower = slower * left
    rate = config.train.learning_rate * slower
    step_size = rate if config.ewc.form == "proximal" else 0.0
    epoch_key = prng.fold(key, prng.STEP, task, epoch)
    examples = make_examples(problem, key, data)

    def whole_batch(i):
        position = i * batch + jnp.arange(batch)
        weight = (position < count).astype(jnp.float32)
        return slots[jnp.minimum(position, slots.shape[0] - 1)], weight

    def step(i, carry):
        state, sums = carry
        offset = first + jnp.arange(share)
        position = i * batch + offset
        weight = ((offset < batch) & (position < count)).astype(jnp.float32)
        mine = slots[jnp.minimum(position, slots.shape[0] - 1)]
        step_key = prng.fold(epoch_key, i)
        (total, correct), grads = jax.value_and_grad(loss, has_aux=True)(
            (state.core, state.learned), mine, weight, state.method, step_key
        )
        # Sum over devices before anything that is not linear in the gradient (the sign).
        total, correct, count_here, grads = collectives.total(
            (total, correct, jnp.sum(weight), grads), axis
        )
        core_grads, learned_grads = jax.tree.map(lambda g: g / count_here, grads)
        seen = Step(
            task, epoch, i, step_key, rate, step_size, *whole_batch(i), examples, problem.spec
        )
        core_updates, core_optimizer = problem.core_optimizer.update(
            method.gradient(core_grads, state.core, state.method, seen),
            state.core_optimizer,
            state.core,
        )
        if config.train.rate_decay or config.train.rate_drops:
            core_updates = jax.tree.map(lambda u: slower.astype(u.dtype) * u, core_updates)
        core = optax.apply_updates(state.core, core_updates)
        core = method.after_update(core, state.method, seen)
        learned_updates, learned_optimizer = problem.learned_optimizer.update(
            learned_grads, state.learned_optimizer, state.learned, rate_left=left
        )
        bad = jnp.where((sums.bad_step < 0) & ~jnp.isfinite(total), i, sums.bad_step)
        state = state._replace(
            core=core,
            learned=optax.apply_updates(state.learned, learned_updates),
            core_optimizer=core_optimizer,
            learned_optimizer=learned_optimizer,
            method=method.after_step(state.method, state.core, core, core_grads, seen),
        )
        sums = Sums(sums.loss + total, sums.correct + correct, sums.examples + count_here, bad)
        return state, sums

    zero = jnp.float32(0)
    state, sums = jax.lax.fori_loop(
        start, stop, step, (state, Sums(zero, zero, zero, jnp.int32(-1)))
    )
    # The last update may have broken what its loss does not show yet.
    finite = jnp.all(jnp.array([jnp.all(jnp.isfinite(p)) for p in jax.tree.leaves(state.core)]))
    bad = jnp.where((sums.bad_step < 0) & ~finite, stop - 1, sums.bad_step)
    return state, sums._replace(bad_step=bad)


def end_task(problem: Problem, key, state: TrainState, data: Data, task, axis=None) -> TrainState:
    """Freezes the task's mode, drops what was learned for it, and updates the protection.

    Args:
      problem: the static side.
      key: the seed's typed PRNG key.
      state: after the task's last step; may be donated.
      data: the sequence; importance passes over the task's training examples.
      task: int scalar, may be traced.
      axis: name of the mapped device axis; each device takes its share of the examples.

    Returns:
      `TrainState`, its ``learned`` all zero.
    """
    method = problem.method
    # Importance is that of the network as it was trained, before its mode goes into the bank.
    mode = method.train_mode(state.learned, method.mode(state.method, task))
    kept = method.store(state.core, state.learned, state.method, task)

    last_epoch = schedule.look_up(problem.epochs, task) - 1
    slots, count = epoch_order(problem, key, data.train, task, last_epoch)
    measures = _task_importance(problem, key, state.core, mode, data, task, slots, axis)
    examples = make_examples(problem, key, data)
    ended = Ended(*measures, slots, count, examples, prng.fold(key, prng.ENDED, task))
    kept = method.consolidate(state.core, kept, task, ended, problem.spec)
    # The factors have done their work; zeros keep the state's structure.
    dropped = jax.tree.map(jnp.zeros_like, state.learned)
    statistics = state.statistics
    if problem.statistics:
        found = _input_statistics(problem, key, data, task, slots, count, axis)
        statistics = jax.tree.map(lambda kept, new: kept.at[task].set(new), statistics, found)
    return state._replace(learned=dropped, method=kept, statistics=statistics)


def input_directions(problem: Problem, key, data: Data) -> jax.Array:
    """The directions of the statistics of a seed, f32 ``[inputs, r]``."""
    inputs = math.prod(data.train.images.shape[1:])
    return task_inference.directions(prng.fold(key, prng.STATISTICS), inputs, problem.statistics)


def _input_statistics(problem: Problem, key, data: Data, task, slots, count, axis):
    """The Gaussian of a task's projected inputs, of the first examples of its last epoch."""
    view, r = make_view(problem, key, data, task), problem.statistics
    directions = input_directions(problem, key, data)
    limit = min(task_inference.EXAMPLES, slots.shape[0])
    batch, count = min(512, limit), jnp.minimum(count, limit)

    def add(i, sums):
        within = i * batch + jnp.arange(batch)
        x, _ = view.examples(data.train, slots[jnp.minimum(within, limit - 1)])
        z = view.project(x, directions)
        mine = jnp.where((within < count)[:, None], z, 0.0)
        return sums[0] + mine.sum(0), sums[1] + mine.T @ mine

    zeros = (jnp.zeros(r), jnp.zeros((r, r)))
    sums = collectives.sum_loop(axis, -(-count // batch), add, zeros)
    return task_inference.Statistics(*task_inference.gaussian(count.astype(jnp.float32), *sums))


def steps_per_epoch(problem: Problem, sequence: TaskSequence, task: int) -> int:
    """Batches in an epoch of a task, the last one not full if it does not divide.

    Args:
      problem: the static side.
      sequence: the sets on the host.
      task: int; a joint method's epoch takes the examples of all tasks.

    Returns:
      An int.
    """
    count = sequence.train.count
    examples = int(count.sum() if problem.method.joint else count[task])
    return -(-examples // problem.config.train.batch_size)


def epoch_order(problem: Problem, key, split: Split, task, epoch):
    """The order in which an epoch takes its examples.

    Args:
      problem: the static side.
      key: the seed's typed PRNG key.
      split: the training set; only ``index`` and ``count`` are looked at.
      task: int scalar, may be traced.
      epoch: int scalar, may be traced.

    Returns:
      Slots (places in the flat index table) int32 ``[N]``, shuffled, padding last; and how many
      are real, int scalar.
    """
    tasks, width = split.index.shape
    if problem.method.joint:
        slots = jnp.arange(tasks * width, dtype=jnp.int32)
        real = slots % width < jnp.asarray(split.count)[slots // width]
    else:
        slots = task * width + jnp.arange(width, dtype=jnp.int32)
        real = jnp.arange(width) < jnp.asarray(split.count)[task]
    bits = jax.random.bits(prng.fold(key, prng.ORDER, task, epoch), slots.shape)
    draws = jnp.where(real, bits >> 1, jnp.uint32(0xFFFFFFFF))
    return slots[jnp.argsort(draws)], jnp.sum(real)


def _task_importance(problem: Problem, key, core, mode, data: Data, task, slots, axis):
    """The functions of `bpnjax.importance`, bound to the data and the mode of a task."""
    view = make_view(problem, key, data, task)
    params, mode = view.params(core), view.mode(mode)
    split = data.train
    batch = min(512, slots.shape[0])
    head = data.classes[task] if view.multi_head else None

    def mean(sum_of_batch, like=core, examples=0):
        limit = min(examples or slots.shape[0], slots.shape[0])
        count = jnp.minimum(split.count[task], limit)

        def add(i, sums):
            within = i * batch + jnp.arange(batch)
            x, y = view.examples(split, slots[jnp.minimum(within, limit - 1)])
            weights = (within < count).astype(jnp.float32)
            return jax.tree.map(jnp.add, sums, sum_of_batch(i, x, y, weights))

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), like)
        sums = collectives.sum_loop(axis, -(-count // batch), add, zeros)
        # By hand: XLA does this in some programs of the same function and not in others.
        reciprocal = 1.0 / count
        return jax.tree.map(lambda s: s * reciprocal, sums)

    def fisher(kind, examples=0):
        def one(i, x, y, weights):
            draw = prng.fold(key, prng.FISHER, task, i)
            return importance.fisher_sum(
                problem.model, params, mode, x, y,
                kind=kind, weights=weights, key=draw, classes=head,
            )  # fmt: skip

        return view.restore(mean(one, examples=examples))

    def factors(examples=0):
        def one(i, x, y, weights):
            return kronecker.factors_sum(
                problem.model, params, mode, x, y, weights=weights, classes=head
            )

        empty = kronecker.empty_factors(problem.spec.layers)
        return view.restore_factors(mean(one, empty, examples))

    def sensitivity():
        def one(i, x, y, weights):
            return importance.sensitivity_sum(
                problem.model, params, mode, x, weights=weights, classes=head
            )

        return view.restore(mean(one))

    def neurons(of):
        def one(i, x, y, weights):
            return importance.neurons_sum(
                problem.model, params, mode, x, y, of=of, weights=weights, classes=head
            )

        covered = per_example.one_pass_layers(problem.spec.layers)
        return mean(one, {path: jnp.zeros(layer.outputs) for path, layer in covered.items()})

    return fisher, factors, sensitivity, neurons
