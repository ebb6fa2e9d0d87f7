"""A whole run as one pure function of its key, and many such runs in one program.

The command's loop returns to the host after each epoch to test, write and save. A run here never
returns to the host. Runs that differ in numbers (a strength, a learning rate) share one compiled
program, and may be one `jax.vmap` over numbers and seeds.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from numpy.typing import ArrayLike

from bpnjax.evaluation.accuracy import Correct, accuracies
from bpnjax.methods import REGISTRY
from bpnjax.run import frozen_features
from bpnjax.run.train import seed_keys
from bpnjax.training import epochs, schedule, streaming
from bpnjax.training.epochs import RunState
from bpnjax.training.evaluate import evaluate
from bpnjax.training.experiment import Experiment, make_experiment
from bpnjax.training.task_data import Data, put_on_device
from bpnjax.utils.errors import UserError


class NotWhole(UserError):
    """The run would have to return to the host before its end."""


class Whole(NamedTuple):
    """The output of a whole run."""

    correct: Correct  # int32 [T, T]: correct answers in row i after task i, -1 where not tested
    diverged: jax.Array  # bool scalar: whether a loss or a parameter was not finite


def whole_run(
    experiment: Experiment,
    key: jax.Array,
    data: Data,
    steps: jax.Array,
    change: Callable[[RunState], RunState] = lambda state: state,
    inferred: bool = False,
) -> Whole:
    """Trains all tasks in order and tests them according to ``evaluate.every_tasks``.

    It is a pure function. Wrap it in `jax.jit`, and in `jax.vmap` over keys and over what
    ``change`` uses.

    Args:
      experiment: the static facts of the run.
      key: the seed's typed PRNG key.
      data: the sequence.
      steps: int32 ``[T]``, batches in an epoch of each task; see
        `bpnjax.training.epochs.steps_per_epoch`.
      change: a function that is applied to the state at the start of each task.
      inferred: whether task_inferred is measured after the last task for methods that are told the
        task. For others it always is.

    Returns:
      `Whole`.
    """
    last = experiment.num_tasks - 1

    def not_tested(state: RunState) -> Correct:
        return Correct(*[jnp.full(experiment.num_tasks, -1, jnp.int32)] * len(Correct._fields))

    def one_task(state: RunState, task: Any) -> Any:
        state = change(epochs.begin_task(experiment, state, task))

        def one_epoch(epoch: Any, carry: Any) -> Any:
            state, diverged = carry
            state, sums = epochs.run_steps(experiment, state, data, task, epoch, 0, steps[task])
            return state, diverged | (sums.bad_step >= 0)

        many = schedule.look_up(experiment.epochs, task)
        state, diverged = jax.lax.fori_loop(0, many, one_epoch, (state, jnp.bool_(False)))
        state = epochs.end_task(experiment, state, data, task)

        def test(state: RunState) -> Correct:
            return evaluate(experiment, state, data, task, (task == last) & inferred)

        tested = (task == last) | ((task + 1) % experiment.config.evaluate.every_tasks == 0)
        return state, (jax.lax.cond(tested, test, not_tested, state), diverged)

    start = epochs.init_state(experiment, key)
    correct, diverged = jax.lax.scan(one_task, start, jnp.arange(experiment.num_tasks))[1]
    return Whole(correct, jnp.any(diverged))


class WholeRuns:
    """Runs of one configuration that differ in some numbers, compiled once for all of them.

    Attributes:
      steps: number of steps of one run, an int.
    """

    def __init__(
        self,
        config: ConfigDict,
        fields: Collection[str],
        at_once: bool,
        inferred: bool = False,
        change: Callable[[RunState, jax.Array], RunState] | None = None,
    ) -> None:
        """Reads the data. Nothing is compiled yet.

        Args:
          config: a validated configuration; all its ``num_seeds`` seeds are run.
          fields: names of fields of its method, or ``train.learning_rate``. No shape may depend on
            their values.
          at_once: whether values are one `jax.vmap`; otherwise they run one after another.
          inferred: as in `whole_run`.
          change: (state at the start of a task, the only value) -> state. Then ``fields`` is one
            name that need not be a field.

        Raises:
          NotWhole: the host reads data during the run, or the method trains on all tasks at once.
          UserError: the data cannot be read.
        """
        if config.dataset.augment != "none":
            raise NotWhole(
                f"dataset.augment: {config.dataset.augment!r} reads images on the host, which a "
                "sweep never returns to; set none"
            )
        self._seeds = jnp.atleast_1d(seed_keys(config))
        self._fields, self._at_once = tuple(fields), at_once
        config, sequence = frozen_features.load(config)
        self._count = sequence.test.count
        most = streaming.most_bytes(config)
        if most is not None and sequence.train.images.nbytes > most:
            raise NotWhole(
                f"dataset.device_mb: {sequence.train.images.nbytes / 1e6:.1f} MB of examples stream"
                " from the host, which a sweep never returns to; raise it"
            )
        experiment = make_experiment(config, sequence)
        if experiment.jointly:
            raise NotWhole(f"method: {config.method} has no tasks one after another to sweep over")
        per_epoch = [epochs.steps_per_epoch(experiment, sequence, t) for t in range(len(sequence))]
        steps = jnp.array(per_epoch)
        self.steps = sum(n * e for n, e in zip(per_epoch, experiment.epochs, strict=True))
        self._data = put_on_device(sequence)

        def one(key: jax.Array, values: dict[str, jax.Array], data: Data) -> Whole:
            if change is not None:
                (value,) = values.values()
                begun = partial(_changed, change, value)
                return whole_run(experiment, key, data, steps, begun, inferred)
            settings = config.to_dict()
            for field, value in values.items():
                group, name = field.split(".")
                settings[group][name] = value
            method = REGISTRY[config.method].from_config(settings)
            own = make_experiment(ConfigDict(settings), sequence, method)
            return whole_run(own, key, data, steps, inferred=inferred)

        over_seeds = jax.vmap(one, (0, None, None))
        self._program = jax.jit(jax.vmap(over_seeds, (None, 0, None)) if at_once else over_seeds)

    def __call__(self, values: Mapping[str, ArrayLike]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Runs all values and seeds.

        Args:
          values: ``{field: numbers [V]}`` for each of the fields.

        Returns:
          ``{"task_told": float64 [V, seeds, T, T], ...}``, NaN where not tested; and bool
          ``[V, seeds]``, whether a run diverged.
        """
        numbers = {field: jnp.asarray(values[field], jnp.float32) for field in self._fields}
        if self._at_once:
            found = self._program(self._seeds, numbers, self._data)
        else:
            length = len(next(iter(numbers.values()))) if numbers else 1
            each = [
                self._program(self._seeds, {f: v[i] for f, v in numbers.items()}, self._data)
                for i in range(length)
            ]
            found = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
        return accuracies(found.correct, self._count), np.asarray(found.diverged)


def _changed(change: Callable[[RunState, Any], RunState], value: Any, state: RunState) -> RunState:
    """``change`` with its last argument first, for `functools.partial`."""
    return change(state, value)


def sweep(
    config: ConfigDict,
    values: ArrayLike,
    change: str | Callable[[RunState, jax.Array], RunState],
) -> dict[str, np.ndarray]:
    """Runs a configuration for many values of a number, all values and seeds in one program.

    Args:
      config: a validated configuration; all its ``num_seeds`` seeds are run.
      values: numbers ``[V]``.
      change: a field of the method that no shape depends on, such as ``"bd.epsilon"``; or (state at
        the start of a task, value) -> state, such as `hidden_dim`.

    Returns:
      ``{"task_told": float64 [V, seeds, T, T], ...}``, NaN where not tested.

    Raises:
      UserError: the data cannot be read, the method trains on all tasks at once, or it has no such
        field.
    """
    if not isinstance(change, str):
        return WholeRuns(config, ["value"], True, change=change)({"value": values})[0]
    if change not in REGISTRY[config.method].fields:
        raise UserError(f"{change}: no setting of {config.method}; sweep over one of its own")
    return WholeRuns(config, [change], True)({change: values})[0]


def hidden_dim(state: RunState, value: Any) -> RunState:
    r"""Cuts BD's factors to an inner width at the start of a task.

    .. math:: W_{hk} \leftarrow \sqrt{H_{max} / H} \, W_{hk} \text{ for } h \le H, \quad
              0 \text{ else}

    Rows of W beyond H are zero and stay zero: their gradient passes through M, which starts at
    zero, and M's gradient passes through them, so M takes no step there. So factors of the largest
    width include those of every smaller one.

    Args:
      state: of a method with BD, at the start of a task (M zero).
      value: H, scalar from 1 to `bd.hidden_dim`, may be traced.

    Returns:
      The state, with W uniform in +-1/sqrt(H) in its first H rows.

    Example:
      >>> import jax, jax.numpy as jnp, optax, flax.linen as nn, bpnjax
      >>> from bpnjax import methods, networks
      >>> from bpnjax.run import sweep
      >>> from bpnjax.training.epochs import RunState
      >>> network = networks.from_linen(nn.Dense(1), jnp.ones((1, 3)))
      >>> learner = bpnjax.learner(network, methods.bd(hidden_dim=4), optax.sgd(0.1), num_tasks=2)
      >>> state = learner.begin_task(learner.init(jax.random.key(0)), 0)
      >>> W = sweep.hidden_dim(RunState(state), 1).learner.task_params[""]["bias"]["W"][:, 0]
      >>> [bool(w) for w in W]
      [True, False, False, False]
    """

    def cut(factors: dict[str, jax.Array]) -> dict[str, jax.Array]:
        widest = factors["W"].shape[0]
        within = jnp.arange(widest).reshape(-1, *(1,) * (factors["W"].ndim - 1)) < value
        # Uniform in +-1/sqrt(H) for the remaining H rows.
        return factors | {"W": within * factors["W"] * jnp.sqrt(widest / value)}

    def is_factors(node: Any) -> bool:
        return isinstance(node, dict) and {"M", "W"} <= set(node)

    def one(node: Any) -> Any:
        return cut(node) if is_factors(node) else node

    learned = jax.tree.map(one, state.learner.task_params, is_leaf=is_factors)
    return dataclasses.replace(
        state, learner=dataclasses.replace(state.learner, task_params=learned)
    )
