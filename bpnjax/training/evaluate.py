"""Tests a run's network on its tasks, as one compiled program."""

from typing import Any

import jax
import jax.numpy as jnp

from bpnjax.evaluation import task_inference
from bpnjax.evaluation.accuracy import Correct
from bpnjax.training.epochs import RunState, input_directions, vectors_of
from bpnjax.training.experiment import Experiment
from bpnjax.training.task_data import Data, Reader, make_reader
from bpnjax.utils import collectives
from bpnjax.utils.heads import within_head


def evaluate(
    experiment: Experiment,
    state: RunState,
    data: Data,
    row: Any,
    infer: Any,
    in_training: bool = False,
    axis: str | None = None,
) -> Correct:
    """Tests tasks 0 to ``row`` in one program.

    Args:
      experiment: what does not change during the run.
      state: the state to test.
      data: the sequence.
      row: int scalar, may be traced: the last task trained.
      infer: bool scalar, may be traced; whether to measure task_inferred, which takes a forward
        pass for each mode and task.
      axis: name of the mapped device axis; each device takes its share of the test examples.
      in_training: static; says that the last task is still in training, its mode not stored yet.

    Returns:
      `Correct`.
    """
    learner, config = experiment.learner, experiment.config
    key, split = state.learner.key, data.test
    width = split.index.shape[1]
    batch = min(config.evaluate.batch_size, width)

    answering = learner.prepared(state.learner)

    def logits_of(mode_task: Any, x: Any) -> jax.Array:
        return learner.answer(answering, x, mode_task, between_tasks=not in_training)

    def chunk(
        reader: Reader, task: Any, i: Any, count: Any, batch: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        within = i * batch + jnp.arange(batch)
        x, y = reader.take(split, task * width + jnp.minimum(within, width - 1))
        return x, y, within < count

    def told(task: Any, correct_of: jax.Array) -> jax.Array:
        reader = make_reader(experiment, key, data, task)
        count = split.count[task]

        def one(i: Any, correct: jax.Array) -> jax.Array:
            x, y, real = chunk(reader, task, i, count, batch)
            logits = logits_of(task, x)
            masked = jnp.where(data.classes[task], logits, -jnp.inf)
            real &= ~jnp.any(jnp.isnan(logits), -1)  # argmax would call them class 0
            hits = [
                jnp.sum(real & (jnp.argmax(z, -1) == y), dtype=jnp.int32) for z in (logits, masked)
            ]
            return correct + jnp.array(hits)

        correct = collectives.sum_loop(axis, -(-count // batch), one, jnp.zeros(2, jnp.int32))
        return correct_of.at[:, task].set(correct)

    limit = min(config.evaluate.inferred_examples or width, width)
    infer_batch = min(batch, limit)
    rule, mapper, features = config.evaluate.rule, experiment.mapper, experiment.features
    directions = input_directions(experiment, key)

    def vectors(x: Any, mode_task: Any) -> Any:
        return vectors_of(learner, features, state.learner, x, mode_task, directions)

    def inferred(task: Any, correct_of: jax.Array) -> jax.Array:
        reader = make_reader(experiment, key, data, task)
        count = jnp.minimum(split.count[task], limit)

        def one(i: Any, correct: jax.Array) -> jax.Array:
            x, y, real = chunk(reader, task, i, count, infer_batch)
            # Where they do not depend on the mode, once for all modes.
            same = None if mapper is None or features == "mode" else vectors(x, None)

            def try_mode(mode_task: Any, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                score, guess, answer = best
                logits = logits_of(mode_task, x)
                if learner.setup.multi_head:  # to try a mode is to try its head
                    logits = within_head(logits, data.classes[mode_task])
                if mapper is not None:
                    z = vectors(x, mode_task) if same is None else same
                    its = mapper.score(state.statistics, mode_task, z)
                else:
                    its = task_inference.ANSWERS[rule](logits)
                if config.evaluate.infer == "batch":
                    its = jnp.broadcast_to(jnp.sum(its * real) / jnp.sum(real), its.shape)
                better = its > score
                own = jnp.argmax(logits, -1).astype(jnp.int32)
                own = jnp.where(jnp.any(jnp.isnan(logits), -1), -1, own)  # as where it is told
                answer = jnp.where(better, own, answer)
                guess = jnp.where(better, jnp.asarray(mode_task, jnp.int32), guess)
                return jnp.where(better, its, score), guess, answer

            nothing = jnp.full(infer_batch, -1, jnp.int32)
            start = (jnp.full(infer_batch, -jnp.inf, jnp.float32), nothing, nothing)
            _, guess, answer = jax.lax.fori_loop(0, row + 1, try_mode, start)
            hits = [
                jnp.sum(real & right, dtype=jnp.int32) for right in (answer == y, guess == task)
            ]
            return correct + jnp.array(hits)

        correct = collectives.sum_loop(axis, -(-count // infer_batch), one, jnp.zeros(2, jnp.int32))
        return correct_of.at[:, task].set(correct)

    unknown = jnp.full((2, experiment.num_tasks), -1, jnp.int32)
    right_told, right_masked = jax.lax.fori_loop(0, row + 1, told, unknown)
    if not experiment.told_task:
        # Every task gets the same network: not told is told, and costs no pass of its own.
        return Correct(right_told, right_masked, right_told, unknown[0])
    tested = jnp.where(infer, row + 1, 0)
    right_inferred, right_guess = jax.lax.fori_loop(0, tested, inferred, unknown)
    return Correct(right_told, right_masked, right_inferred, right_guess)
