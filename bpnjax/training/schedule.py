"""How long each task is trained, and when its learning rate drops.

Both are tables, so that the task may be a traced number."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bpnjax.utils.errors import UserError


def epochs_per_task(config: Any, num_tasks: int, joint: bool = False) -> list[int]:
    """The number of epochs of each task.

    Args:
      config: a run configuration.
      num_tasks: T.
      joint: whether all tasks are trained at once, for as many epochs as the longest has.

    Returns:
      T numbers.

    Raises:
      UserError: `train.epochs_per_task` does not have one number per task.
    """
    given = tuple(config.train.epochs_per_task)
    if not given:
        return [config.train.epochs] * num_tasks
    if len(given) != num_tasks:
        raise UserError(
            f"train.epochs_per_task: {given} has {len(given)} numbers for {num_tasks} tasks; give "
            "one per task, or () for train.epochs in each"
        )
    return [max(given)] * num_tasks if joint else list(given)


def look_up(table: Any, task: Any) -> jax.Array:
    """The entry of a task. The task may be traced."""
    return jnp.asarray(np.array(table, np.int32))[task]


def dropped(config: Any, epochs: Any, task: Any, epoch: Any) -> jax.Array:
    r"""The factor to which drops have reduced a task's learning rate in an epoch.

    .. math:: f^{-d}, \quad d = |\{s : epoch \ge s \cdot epochs_t\}|

    with the shares s of `train.rate_drops`, the factor f, and epochs counted from 0; a drop that
    falls into an epoch waits for the next one.

    Args:
      config: a run configuration.
      epochs: of each task, as `epochs_per_task` gives them.
      task: int scalar, may be traced.
      epoch: int scalar, may be traced.

    Returns:
      A factor on the rate, f32 scalar.

    Example:
      >>> from bpnjax import config
      >>> from bpnjax.training import schedule
      >>> c = config.default()
      >>> c.train.rate_drops = (0.75, 0.9)
      >>> [float(schedule.dropped(c, [60], 0, epoch)) for epoch in (44, 45)]
      [1.0, 0.10000000149011612]

    Source: Aljundi et al. 2018 (arXiv 1711.09601) and their code: a tenth at fixed epochs.
    """
    shares = config.train.rate_drops
    # In integers on the host: a share of f32 epochs might round to the epoch after.
    first = np.ceil(np.outer(epochs, shares) - 1e-9).astype(np.int32)
    left = [config.train.rate_drop_factor**-count for count in range(len(shares) + 1)]
    drops = jnp.sum(jnp.asarray(epoch) >= jnp.asarray(first)[task])
    return jnp.asarray(left, jnp.float32)[drops]


def rates(experiment: Any, task: Any, epoch: Any) -> tuple[Any, Any]:
    r"""Factors on the learning rates in an epoch of a task.

    .. math:: \frac{f^{-d}}{1 + c t}, \quad f^{-d}

    with c ``train.rate_decay`` and the drops of `dropped`. Upper bounds (stl, joint) train every
    network afresh, so their rate does not fall from task to task.

    Args:
      experiment: what does not change during the run.
      task: t, int scalar, may be traced.
      epoch: int scalar, may be traced.

    Returns:
      The factor for the shared parameters and the one for the task parameters; 1.0 where nothing
      changes.
    """
    config = experiment.config
    left: Any = 1.0
    if config.train.rate_drops:
        left = dropped(config, experiment.epochs, task, epoch)
    if not config.train.rate_decay or experiment.learner.method.trains != "in turn":
        return left, left
    return left / (1.0 + config.train.rate_decay * jnp.asarray(task, jnp.float32)), left
