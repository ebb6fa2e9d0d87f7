"""A whole run as one pure function of its key, and many of them in one program.

The command's loop returns to the host after each epoch, to test, to write and to keep checkpoints.
Here nothing does: small runs that differ in a number (a strength, a width) and in their seed are
one `jax.vmap` over both.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from numpy.typing import ArrayLike

from bpnjax.evaluation.accuracy import Correct, accuracies
from bpnjax.methods import REGISTRY
from bpnjax.run import frozen_features
from bpnjax.run.train import seed_keys
from bpnjax.training import epochs, schedule
from bpnjax.training.epochs import RunState
from bpnjax.training.evaluate import evaluate
from bpnjax.training.experiment import Experiment, make_experiment
from bpnjax.training.task_data import Data, put_on_device
from bpnjax.utils.errors import UserError


def whole_run(
    experiment: Experiment,
    key: jax.Array,
    data: Data,
    steps: jax.Array,
    change: Callable[[RunState], RunState] = lambda state: state,
) -> Correct:
    """Trains all tasks one after another and tests the ones learned after each.

    A pure function: wrap it in `jax.jit`, and in `jax.vmap` over keys and over what ``change``
    uses.

    Args:
      experiment: the static side.
      key: the seed's typed PRNG key.
      data: the sequence.
      steps: int32 ``[T]``, batches in an epoch of each task; see
        `bpnjax.training.epochs.steps_per_epoch`.
      change: applied to the state at the start of each task.

    Returns:
      `Correct` of int32 ``[T, T]``: in row i how many test examples of each task were right after
      task i, -1 where not tested; task_inferred is not measured for methods that are told the task.
    """

    def one_task(state: RunState, task: Any) -> Any:
        state = change(epochs.begin_task(experiment, state, task))

        def one_epoch(epoch: Any, state: RunState) -> RunState:
            return epochs.run_steps(experiment, state, data, task, epoch, 0, steps[task])[0]

        many = schedule.look_up(experiment.epochs, task)
        state = jax.lax.fori_loop(0, many, one_epoch, state)
        state = epochs.end_task(experiment, state, data, task)
        return state, evaluate(experiment, state, data, task, False)

    start = epochs.init_state(experiment, key)
    return jax.lax.scan(one_task, start, jnp.arange(experiment.num_tasks))[1]


def sweep(
    config: ConfigDict,
    values: ArrayLike,
    change: str | Callable[[RunState, jax.Array], RunState],
) -> dict[str, np.ndarray]:
    """Runs a configuration for many values of a number, all values and seeds in one program.

    Args:
      config: a validated configuration; all its ``num_seeds`` seeds are run.
      values: numbers ``[V]``.
      change: a field of the method whose value no shape depends on, as ``"bd.epsilon"``; or (state
        at the start of a task, value) -> state, as `hidden_dim`.

    Returns:
      ``{"task_told": float64 [V, seeds, T, T], ...}``, NaN where not tested.

    Raises:
      UserError: the data cannot be read, the method trains on all tasks at once, or it has no such
        field.
    """
    factory = REGISTRY[config.method]
    if isinstance(change, str) and change not in factory.fields:
        raise UserError(f"{change}: no setting of {config.method}; sweep over one of its own")
    if config.dataset.augment != "none":
        raise UserError(
            f"dataset.augment: {config.dataset.augment!r} reads images on the host, which a "
            "sweep never returns to; set none"
        )
    config, sequence = frozen_features.load(config)
    experiment = make_experiment(config, sequence)
    if experiment.jointly:
        raise UserError(f"method: {config.method} has no tasks one after another to sweep over")
    tasks = range(sequence.num_tasks)
    steps = jnp.array([epochs.steps_per_epoch(experiment, sequence, t) for t in tasks])

    @jax.jit
    def program(keys: jax.Array, values: jax.Array, data: Data) -> Correct:
        def one(key: jax.Array, value: jax.Array) -> Correct:
            if not isinstance(change, str):
                return whole_run(experiment, key, data, steps, lambda state: change(state, value))
            settings = config.to_dict()
            group, name = change.split(".")
            settings[group][name] = value
            own = make_experiment(config, sequence, factory.from_config(settings))
            return whole_run(own, key, data, steps)

        over_seeds = jax.vmap(one, (0, None))
        return jax.vmap(over_seeds, (None, 0))(keys, values)

    keys = jnp.atleast_1d(seed_keys(config))
    correct = program(keys, jnp.asarray(values), put_on_device(sequence))
    return accuracies(correct, sequence.test.count)


def hidden_dim(state: RunState, value: Any) -> RunState:
    r"""The state at the start of a task with BD's factors cut to an inner width.

    .. math:: W_{hk} \leftarrow \sqrt{H_{max} / H} \, W_{hk} \text{ for } h \le H, \quad
              0 \text{ else}

    Rows of W beyond it are zero. They stay so: what leads to M there passes through W and is zero,
    what leads to W passes through M, which starts at zero and takes no step where its gradient
    has no sign. So factors of the largest width hold those of every smaller one.

    Args:
      state: of a method with BD, at the start of a task (M zero).
      value: H, scalar from 1 to `bd.hidden_dim`, may be traced.

    Returns:
      The state, W uniform in +-1/sqrt(H) in its first H rows.

    Example:
      >>> import jax, jax.numpy as jnp, optax, flax.linen as nn, bpnjax
      >>> from bpnjax import methods, networks
      >>> from bpnjax.run import sweep
      >>> from bpnjax.training.epochs import RunState
      >>> network = networks.from_linen(nn.Dense(1), jnp.ones((1, 3)))
      >>> learner = bpnjax.learner(network, methods.bd(hidden_dim=4), optax.sgd(0.1), num_tasks=2)
      >>> state = learner.begin_task(learner.init(jax.random.key(0)), 0)
      >>> W = sweep.hidden_dim(RunState(state), 1).learner.task_params[""]["W"][:, 0]
      >>> [bool(w) for w in W]
      [True, False, False, False]
    """

    def cut(factors: dict[str, jax.Array]) -> dict[str, jax.Array]:
        widest = factors["W"].shape[0]
        within = jnp.arange(widest)[:, None] < value
        # Uniform in +-1/sqrt(H), by the H that is left.
        return factors | {"W": within * factors["W"] * jnp.sqrt(widest / value)}

    def is_factors(node: Any) -> bool:
        return isinstance(node, dict) and {"M", "W"} <= set(node)

    def one(node: Any) -> Any:
        return cut(node) if is_factors(node) else node

    learned = jax.tree.map(one, state.learner.task_params, is_leaf=is_factors)
    return dataclasses.replace(
        state, learner=dataclasses.replace(state.learner, task_params=learned)
    )
