"""Tests a network on tasks, three ways: told the task, told and masked, not told.

- ``task_told``: the task's mode is active, the argmax runs over all classes.
- ``task_masked``: the same, restricted to the task's own classes.
- ``task_inferred``: nobody tells the task; of the modes learned so far the one of the highest
  score is taken (`bpnjax.evaluation.task_inference`: by default that of the lowest predictive entropy), per
  example (or per batch), then as task_told.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bpnjax.evaluation import task_inference
from bpnjax.networks import linen
from bpnjax.run.setup import Problem
from bpnjax.training import collectives
from bpnjax.training.epochs import TrainState, input_directions
from bpnjax.training.task_data import Data, make_view
from bpnjax.utils.heads import within_head


class Correct(NamedTuple):
    """How many test examples of each task were right, int32 ``[T]``; -1 where not tested.

    Counts and not shares, so that the division is done once, on the host, in double precision.
    """

    task_told: jax.Array
    task_masked: jax.Array
    task_inferred: jax.Array
    task_guess: jax.Array  # of those of task_inferred, how many were taken for their own task


KINDS = ("task_told", "task_masked", "task_inferred")


def accuracies(correct: Correct, count, inferred_examples: int = 0) -> dict[str, np.ndarray]:
    """Turns counts into accuracies.

    Args:
      correct: counts, int ``[..., T]``.
      count: int ``[T]``, test examples of each task.
      inferred_examples: how many of them task_inferred was measured on; 0 for all.

    Returns:
      ``{"task_told": float64 [..., T], ...}``, shares from 0 to 1, NaN where not tested, and as
      ``"task_guess"`` the share of examples whose task was inferred rightly.

    Example:
      >>> import numpy as np
      >>> from bpnjax.evaluation.accuracy import Correct, accuracies
      >>> accuracies(Correct(*np.array([[3, -1]] * 4)), count=[4, 4])["task_told"].tolist()
      [0.75, nan]
    """
    count = np.asarray(count, np.float64)
    limit = np.minimum(count, inferred_examples or np.inf)
    found = {}
    for name, hits in correct._asdict().items():
        hits = np.asarray(hits)
        of = limit if name in ("task_inferred", "task_guess") else count
        found[name] = np.where(hits < 0, np.nan, hits / of)
    return found


def evaluate(
    problem: Problem, key, state: TrainState, data: Data, row, infer, in_training=False, axis=None
) -> Correct:
    """Tests tasks 0 to ``row`` in one program.

    Args:
      problem: the static side of the run.
      key: the seed's typed PRNG key.
      state: the state to test.
      data: the sequence.
      row: int scalar, may be traced: the last task trained.
      infer: bool scalar, may be traced: whether to measure task_inferred, which costs a pass per
        mode and task.
      axis: name of the mapped device axis; each device takes its share of the test examples.
      in_training: static; the last task has not been stored yet, take its mode from ``learned``.

    Returns:
      `Correct`.
    """
    method, config = problem.method, problem.config
    kept = state.method
    if in_training:
        kept = method.store(state.core, state.learned, kept, row)
    split = data.test
    width = split.index.shape[1]
    batch = min(config.evaluate.batch_size, width)

    def logits_of(view, mode_task, x):
        core = state.core
        if not (in_training and not method.told_task):  # else as it stands: imm has yet to merge
            core = method.for_eval(core, kept, mode_task)
        mode = view.mode(method.mode(kept, mode_task))
        out = linen.modulated_apply(problem.model, view.params(core), mode, x)
        return out.astype(jnp.float32)

    def chunk(view, task, i, count, batch):
        within = i * batch + jnp.arange(batch)
        x, y = view.examples(split, task * width + jnp.minimum(within, width - 1))
        return x, y, within < count

    def told(task, correct_of):
        view = make_view(problem, key, data, task)
        count = split.count[task]

        def one(i, correct):
            x, y, real = chunk(view, task, i, count, batch)
            logits = logits_of(view, task, x)
            masked = jnp.where(data.classes[task], logits, -jnp.inf)
            hits = [jnp.sum(real & (jnp.argmax(z, -1) == y)) for z in (logits, masked)]
            return correct + jnp.array(hits)

        correct = collectives.sum_loop(axis, -(-count // batch), one, jnp.zeros(2, jnp.int32))
        return correct_of.at[:, task].set(correct)

    limit = min(config.evaluate.inferred_examples or width, width)
    infer_batch = min(batch, limit)
    rule = config.evaluate.rule
    directions = input_directions(problem, key, data) if problem.statistics else None

    def inferred(task, correct_of):
        view = make_view(problem, key, data, task)
        count = jnp.minimum(split.count[task], limit)

        def one(i, correct):
            x, y, real = chunk(view, task, i, count, infer_batch)
            z = view.project(x, directions) if problem.statistics else None

            def try_mode(mode_task, best):
                score, guess, answer = best
                logits = logits_of(view, mode_task, x)
                if view.multi_head:  # to try a mode is to try its head
                    logits = within_head(logits, data.classes[mode_task])
                if problem.statistics:
                    its = task_inference.log_likelihood(
                        *(s[mode_task] for s in state.statistics), z
                    )
                else:
                    its = task_inference.ANSWERS[rule](logits)
                if config.evaluate.infer == "batch":
                    its = jnp.broadcast_to(jnp.sum(its * real) / jnp.sum(real), its.shape)
                better = its > score
                answer = jnp.where(better, jnp.argmax(logits, -1), answer)
                guess = jnp.where(better, mode_task, guess)
                return jnp.where(better, its, score), guess, answer

            nothing = jnp.full(infer_batch, -1)
            start = (jnp.full(infer_batch, -jnp.inf), nothing, nothing)
            _, guess, answer = jax.lax.fori_loop(0, row + 1, try_mode, start)
            hits = [jnp.sum(real & right) for right in (answer == y, guess == task)]
            return correct + jnp.array(hits)

        correct = collectives.sum_loop(axis, -(-count // infer_batch), one, jnp.zeros(2, jnp.int32))
        return correct_of.at[:, task].set(correct)

    unknown = jnp.full((2, problem.num_tasks), -1, jnp.int32)
    right_told, right_masked = jax.lax.fori_loop(0, row + 1, told, unknown)
    if not method.told_task:
        # Every task gets the same network: not told is told, and costs no pass of its own.
        return Correct(right_told, right_masked, right_told, unknown[0])
    tested = jnp.where(infer, row + 1, 0)
    right_inferred, right_guess = jax.lax.fori_loop(0, tested, inferred, unknown)
    return Correct(right_told, right_masked, right_inferred, right_guess)
