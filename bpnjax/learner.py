"""The learner joins a network, a method and an optimizer to pure functions of one state.

    network = networks.from_linen(model, x[:1])
    learner = bpnjax.learner(network, methods.bd_ewc(), optax.adam(3e-4), num_tasks=5)
    state = learner.init(jax.random.key(0))
    for task, (x, y) in enumerate(tasks):
        state = learner.begin_task(state, task)
        for batch in batches(x, y):
            state, metrics = learner.step(state, batch)
        state = learner.end_task(state, (x, y))
    logits = learner.apply(state, x, task=0)    # or one task id per example

The command runs the same functions. It compiles whole epochs of `Learner.update` into one loop.
"""

import dataclasses
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from bpnjax import importance, modes
from bpnjax.evaluation.mappers import Mapper
from bpnjax.evaluation.task_inference import ANSWERS, Guess, choose
from bpnjax.importance import kronecker, per_example
from bpnjax.methods import Batch, Context, Method, Setup, TaskData
from bpnjax.methods.inputs import checked_batch, checked_data, checked_examples, checked_losses
from bpnjax.modes.bank import check_task
from bpnjax.networks import Network
from bpnjax.optim.rates import at_rate, first_step, following_rate, has_schedule, scaled
from bpnjax.utils import arrays, collectives, prng
from bpnjax.utils.errors import UserError
from bpnjax.utils.heads import within_head

__all__ = ["Clock", "Learner", "State", "Totals", "learner"]

POLICIES = ("task", "shared", "frozen")
_IMPORTANCE_BATCH = 512


@struct.dataclass
class State:
    """Everything that a learner carries from step to step. Parts may have a leading seed axis.

    Attributes:
      params: the shared parameters.
      variables: what the network keeps beside its parameters, such as running statistics.
      task_variables: those of all tasks, leaves ``[T, ...]``, if each task has its own; else {}.
      task_params: parameters of the task in training (the factors of BD); zeros between tasks.
      optimizer: the state of the optimizer of the shared parameters.
      task_optimizer: the state of the optimizer of the task parameters.
      method: what the method stores: banks, anchors, importance, replayed examples.
      step_size: tree of f32 scalars like the parameters, the learning rate of each leaf at the
        first step. With a schedule each step computes its own.
      key: typed PRNG key of the seed; the source of all random numbers.
      task: int32 scalar, the task in training; -1 between tasks.
      step: int32 scalar, number of steps of that task so far.
    """

    params: Any
    variables: Any
    task_variables: Any
    task_params: Any
    optimizer: Any
    task_optimizer: Any
    method: Any
    step_size: Any
    key: jax.Array
    task: jax.Array
    step: jax.Array


@dataclasses.dataclass(frozen=True)
class Clock:
    """The place of a step in a run, which the command gives to the learner.

    Attributes:
      task: int scalar.
      step: int scalar, number of earlier steps of the task.
      rate: a factor on the learning rate of the shared parameters.
      task_rate: a factor on the learning rate of the task parameters. It does not scale BD's
        epsilon.
    """

    task: Any
    step: Any
    rate: Any = 1.0
    task_rate: Any = 1.0


@struct.dataclass
class Totals:
    """Sums over the examples of a step: f32 scalars."""

    loss: jax.Array
    correct: jax.Array
    examples: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Learner:
    """Pure functions over one `State`. The function `learner` makes it.

    `init`, `begin_task`, `step`, `end_task` and `apply` check their arguments and are compiled.
    ``begin_task``, ``step`` and ``end_task`` consume their state (its buffers are donated).
    `start`, `update`, `consolidate` and `answer` are the same functions before `jax.jit`, for
    programs that compile whole epochs.

    Attributes:
      setup: network, number of tasks, classes and loss, for the method.
      method: the method.
      optimizer: of the shared parameters.
      task_optimizer: of the task parameters.
      batch_statistics: how the network's running statistics are kept, as in `learner`.
      reset_optimizer: whether a new task starts with a fresh optimizer state.
      axis: name of a mapped device axis over which a batch is split; None on one device.
      told_task: whether answers depend on the task, through the method's modes or running
        statistics per task.
    """

    setup: Setup
    method: Method
    optimizer: optax.GradientTransformationExtraArgs
    task_optimizer: optax.GradientTransformationExtraArgs
    batch_statistics: str = "task"
    reset_optimizer: bool = True
    axis: str | None = None
    told_task: bool = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        jitted = {
            "_init": jax.jit(self.first),
            "_begin_task": jax.jit(self.start, donate_argnums=0),
            "_step": jax.jit(self._counted_step, donate_argnums=0),
            "_end_task": jax.jit(self._end_of_arrays, donate_argnums=0),
            "_apply": jax.jit(self.answer),
            "_scores": jax.jit(self._scored, static_argnums=(2, 4)),
        }
        for name, function in jitted.items():
            object.__setattr__(self, name, function)
        abstract = jax.eval_shape(self.first, prng.key(0))
        object.__setattr__(self, "_shapes", [leaf.shape for leaf in jax.tree.leaves(abstract)])
        told = self.method.told_task or bool(jax.tree.leaves(abstract.task_variables))
        object.__setattr__(self, "told_task", told)

    @property
    def network(self) -> Network:
        """The network."""
        return self.setup.network

    @property
    def num_tasks(self) -> int:
        """T, the number of tasks that the state has room for."""
        return self.setup.num_tasks

    # Checked and compiled.

    def init(self, key: jax.Array) -> State:
        """Makes the state before the first task.

        Args:
          key: typed PRNG key, the source of all random numbers of the run.

        Returns:
          `State`. The method's part is allocated for all tasks.

        Raises:
          UserError: the key is not a typed PRNG key.
        """
        if not jax.dtypes.issubdtype(getattr(key, "dtype", None), jax.dtypes.prng_key):
            raise UserError("key: give a typed PRNG key, jax.random.key(0)")
        return self._init(key)  # type: ignore[attr-defined]

    def begin_task(self, state: State, task: int | jax.Array) -> State:
        """Starts a task with new task parameters and optimizer state; shared parameters stay.

        Args:
          state: the state before the task. It is consumed.
          task: int scalar from 0; may be traced.

        Returns:
          `State`.

        Raises:
          UserError: there is no such task, or the state belongs to another learner.
        """
        task = self._task(task)
        if task.ndim:
            raise UserError(f"task: {task.shape} ids; a learner trains one task at a time")
        return self._begin_task(self._checked(state), task)  # type: ignore[attr-defined]

    def step(self, state: State, batch: Any) -> tuple[State, dict[str, jax.Array]]:
        """Does one training step. It compiles once for all tasks, and works with vmap and pmap.

        Args:
          state: the state of a task in training. It is consumed.
          batch: ``(x, y)``, or ``(x, y, weight)`` with weight f32 ``[n]``, 0 for padding. A fourth
            item, int32 ``[n]``, gives each example's task, for joint training with heads. The
            statistics of BatchNorm include all given examples, even padding.

        Returns:
          The next state, and ``{"loss": mean, "accuracy": share, "examples": sum of weights}``, f32
          scalars. The accuracy is only there for cross-entropy.

        Raises:
          UserError: the batch does not fit the network or holds NaN (checked for NumPy arrays), or
            the state belongs to another learner.
        """
        _refuse_consumed(state)
        return self._step(state, *checked_batch(self.setup, batch))  # type: ignore[attr-defined]

    def end_task(self, state: State, data: Any) -> State:
        """Ends a task: freezes its mode, measures importance and stores examples.

        Args:
          state: the state after the task's last step. It is consumed.
          data: ``(x, y)``, the task's examples in the order of training, or an iterable of such
            batches, which are joined. In batches ``(x, y, weight)``, examples of weight 0 are left
            out. Importance is the mean over all of them, and memories keep the last ones. Under
            `jax.pmap` with ``axis`` each device gets a share, as in `step`.

        Returns:
          `State` with ``task`` -1.

        Raises:
          UserError: the data do not fit the network or hold NaN, or no task was begun.
        """
        x, y = checked_data(self.setup, data)
        state = self._checked(state)
        if not isinstance(state.task, jax.core.Tracer) and int(state.task) < 0:
            raise UserError(
                "state: no task is in training; call learner.begin_task before its steps"
            )
        return self._end_task(state, x, y)  # type: ignore[attr-defined]

    def apply(self, state: State, x: Any, task: Any) -> jax.Array:
        """Computes the network's outputs in the mode of a task, also during training.

        Args:
          state: any state.
          x: examples ``[n, ...]``.
          task: int scalar from 0, or int ``[n]``, one per example; may be traced.

        Returns:
          f32 ``[n, ...]``, logits for classes. A traced task that does not exist gives NaN if the
          method stores something per task.

        Raises:
          UserError: there is no such task, or the examples do not fit the network.
        """
        x = checked_examples(self.setup, x)
        task = self._task(task)
        if task.ndim and task.shape != (x.shape[0],):
            raise UserError(f"task: {task.shape} ids for {x.shape[0]} examples; give one each")
        return self._apply(self._checked(state), x, task)  # type: ignore[attr-defined]

    def infer(
        self,
        state: State,
        x: Any,
        rule: str | Mapper = "entropy",
        kept: Any = None,
        *,
        features: str = "core",
        per: str = "example",
        tasks: int | None = None,
    ) -> Guess:
        """Infers the task of each example, and answers in the mode of that task.

        Args:
          state: between two tasks.
          x: examples ``[n, ...]``.
          rule: ``"entropy"`` or ``"max_logit"``, or a mapper of `bpnjax.evaluation.mappers`.
          kept: what the mapper stored, fitted to `features` of each task.
          features: for a mapper: ``"core"`` or ``"mode"``, as when it was fitted.
          per: ``"example"``, or ``"batch"`` if all examples belong to one task.
          tasks: number of tasks, from the first one, that were learned so far; all by default.

        Returns:
          `Guess`: task int32 ``[n]``, outputs int32 ``[n]``, scores f32 ``[n, tasks]``.

        Raises:
          UserError: the rule is unknown, or the learner does not have so many ``tasks``.

        Example:
          >>> import jax, jax.numpy as jnp, flax.linen as nn, optax
          >>> import bpnjax
          >>> from bpnjax import methods, networks
          >>> from bpnjax.evaluation import mappers
          >>> x, y = jnp.eye(4), jnp.array([0, 1, 0, 1])
          >>> network = networks.from_linen(nn.Dense(2), x)
          >>> learner = bpnjax.learner(network, methods.psp(), optax.sgd(0.1), num_tasks=2)
          >>> state = learner.init(jax.random.key(0))
          >>> mapper = mappers.nearest_mean(clusters=4)
          >>> kept = mapper.empty(2, learner.width("nearest_mean"))
          >>> for task in range(2):
          ...     shown = x + task  # inputs of the second task are larger
          ...     state = learner.end_task(learner.begin_task(state, task), (shown, y))
          ...     z = learner.features(state, shown)
          ...     kept = mapper.fit(kept, task, jax.random.key(task), z, y, jnp.ones(4))
          >>> learner.infer(state, x + 1.0, mapper, kept).task.tolist()
          [1, 1, 1, 1]
        """
        if isinstance(rule, str) and rule not in ANSWERS:
            raise UserError(
                f"rule: {rule!r} needs what is kept of the tasks; give one of "
                f"{', '.join(ANSWERS)}, or a mapper of bpnjax.evaluation.mappers and kept="
            )
        learned = self.num_tasks if tasks is None else tasks
        if not 1 <= learned <= self.num_tasks:
            raise UserError(f"tasks: {learned}; this learner has 1 to {self.num_tasks}")
        if features not in ("core", "mode"):
            raise UserError(f"features: unknown value {features!r}; choose from: core, mode")
        x, state = checked_examples(self.setup, x), self._checked(state)
        scores = self._scores(state, x, rule, kept, features)  # type: ignore[attr-defined]
        scores = np.asarray(scores)[:, :learned]
        task = choose(scores, per)
        outputs = self.apply(state, x, task)
        return Guess(task, np.argmax(outputs, -1).astype(np.int32), scores)

    # The same functions before jax.jit.

    def first(self, key: jax.Array) -> State:
        """`init` without `jax.jit`."""
        params, variables = self.network.init(prng.fold(key, prng.INIT))
        kept = self.method.init(prng.fold(key, prng.METHOD), params, self.setup)
        ctx = Context(self.setup, jnp.int32(0), jnp.int32(0), True, prng.fold(key, prng.FRESH))
        _, _, task_params = self.method.begin_task(ctx.key, params, kept, ctx)
        task_params = jax.tree.map(jnp.zeros_like, task_params)
        bank: Any = {}
        if self._own_variables:
            room = (self.num_tasks,)
            bank = jax.tree.map(lambda v: jnp.broadcast_to(v, room + jnp.shape(v)), variables)
        return State(
            params=params,
            variables=variables,
            task_variables=bank,
            task_params=task_params,
            optimizer=self.optimizer.init(params),
            task_optimizer=self._start_of_task_optimizer(task_params),
            method=kept,
            step_size=first_step(self.optimizer, params),
            key=key,
            task=jnp.int32(-1),
            step=jnp.int32(0),
        )

    def start(self, state: State, task: Any) -> State:
        """`begin_task` without `jax.jit`."""
        task = jnp.asarray(task, jnp.int32)
        key = prng.fold(state.key, prng.FRESH, task)
        ctx = Context(self.setup, task, task, True, key)
        params, kept, task_params = self.method.begin_task(key, state.params, state.method, ctx)
        afresh = self.method.trains == "afresh"
        return state.replace(  # type: ignore[attr-defined]
            params=params,
            variables=self.network.init(key)[1] if afresh else state.variables,
            task_params=task_params,
            optimizer=self.optimizer.init(params)
            if afresh or self.reset_optimizer
            else state.optimizer,
            task_optimizer=self._start_of_task_optimizer(task_params),
            method=kept,
            task=task,
            step=jnp.int32(0),
        )

    def update(
        self, state: State, batch: Batch, clock: Clock, axis: str | None = None
    ) -> tuple[State, Totals]:
        """`step` without `jax.jit`, at a given place in the sequence.

        Args:
          state: of the task in training.
          batch: the examples; on several devices, this device's share of them.
          clock: the place of the step. It replaces the counters in the state, so that these are not
            batched when seeds are vmapped.
          axis: name of the mapped device axis, or None.

        Returns:
          The next state, and the `Totals` of the step over all devices.
        """
        key = prng.fold(state.key, prng.STEP, clock.task, clock.step)
        place = collectives.devices(axis)[1]  # so that each device has its own dropout mask
        whole = collectives.gather(batch, axis)
        step_size = self._step_size(state, clock)
        seen: list[tuple[Any, Any]] = []  # variables after the method's own passes
        ctx = self._context(
            state, clock, key, step_size, lambda variables, share: seen.append((variables, share))
        )
        frozen = self.batch_statistics == "frozen"

        def loss(both: Any) -> Any:
            params, task_params = both
            run, mode = self.method.forward(
                params, task_params, state.method, dataclasses.replace(ctx, training=True)
            )
            outputs, variables = self.network.apply(
                run, _weighted(mode, batch.weight), batch.x,
                variables=state.variables, train=True, freeze_statistics=frozen,
                key=prng.fold(key, prng.DROPOUT, place),
            )  # fmt: skip
            outputs = outputs.astype(jnp.float32)
            task = batch.task if self.method.trains == "jointly" else clock.task
            losses = self._losses(outputs, batch.y, task)
            right = jnp.sum(batch.weight * self._right(outputs, batch.y, task))
            return jnp.sum(batch.weight * losses), (right, variables)

        (total, (right, variables)), grads = jax.value_and_grad(loss, has_aux=True)(
            (state.params, state.task_params)
        )
        # Summed over devices before anything nonlinear in the gradient (the sign).
        total, right, count, grads = collectives.total(
            (total, right, jnp.sum(batch.weight), grads), axis
        )
        variables = collectives.mean(variables, axis)
        grads, task_grads = jax.tree.map(lambda g: (g / count).astype(g.dtype), grads)
        changed = self.method.gradient(grads, state.params, state.method, whole, ctx)
        if seen and self.batch_statistics == "shared" and not self._own_variables:
            variables = _weighted_mean([(variables, 1.0), *seen])
        # In the dtype of the parameters, so that the optimizer's state keeps its dtypes.
        changed = jax.tree.map(lambda new, g: new.astype(g.dtype), changed, grads)
        updates, optimizer = self.optimizer.update(
            changed, state.optimizer, state.params, rate=clock.rate
        )
        params = optax.apply_updates(state.params, updates)
        task_params, task_optimizer = state.task_params, state.task_optimizer
        if jax.tree.leaves(task_params):
            updates, task_optimizer = self.task_optimizer.update(
                task_grads, task_optimizer, task_params, rate=clock.task_rate
            )
            task_params = optax.apply_updates(task_params, updates)
        params, kept = self.method.end_step(state.params, params, grads, state.method, whole, ctx)
        state = state.replace(  # type: ignore[attr-defined]
            params=params,
            variables=variables,
            task_params=task_params,
            optimizer=optimizer,
            task_optimizer=task_optimizer,
            method=kept,
            step=jnp.asarray(clock.step + 1, jnp.int32),
        )
        return state, Totals(total, right, count)

    def consolidate(
        self,
        state: State,
        take: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
        size: int,
        count: Any,
        clock: Clock,
        axis: str | None = None,
    ) -> State:
        """`end_task` without `jax.jit`. It reads the examples by their positions in the data.

        Args:
          state: after the task's last step.
          take: a function ``positions int32 [m] -> (x, y)``, in the order of the last epoch.
          size: number of positions; static.
          count: number of examples before the padding begins; int scalar, may be traced.
          clock: the place after the task's last step.
          axis: name of the mapped device axis. Each device measures a share of the examples.

        Returns:
          `State` with task parameters of zero and ``task`` -1.
        """
        key = prng.fold(state.key, prng.ENDED, clock.task)
        ctx = self._context(state, clock, key, self._step_size(state, clock))
        measures = self._measures(state, take, size, count, ctx, axis)
        data = TaskData(take, size, count, *measures)
        params, kept = self.method.end_task(
            state.params, state.task_params, state.method, data, ctx
        )
        bank = state.task_variables
        if self._own_variables:
            bank = modes.store(bank, state.variables, clock.task)
        return state.replace(  # type: ignore[attr-defined]
            params=params,
            task_variables=bank,
            # The task parameters are not needed any more; zeros keep the state's structure.
            task_params=jax.tree.map(jnp.zeros_like, state.task_params),
            method=kept,
            task=jnp.int32(-1),
        )

    def answer(
        self, state: State, x: jax.Array, task: Any, between_tasks: bool = False
    ) -> jax.Array:
        """`apply` without `jax.jit`.

        Args:
          state: any state.
          x: examples ``[n, ...]``.
          task: int scalar or int ``[n]``, may be traced.
          between_tasks: whether no task is in training, static. Then parts of the state that only
            training needs are not read.

        Returns:
          f32 ``[n, ...]``.
        """
        current = None if between_tasks else state.task
        return self._outputs(state, state.params, x, jnp.asarray(task, jnp.int32), current)

    def prepared(self, state: State) -> State:
        """Computes once what `answer` would compute for each batch that it is given.

        Args:
          state: at any time.

        Returns:
          The state, to be answered with and for nothing else.
        """
        return dataclasses.replace(state, method=self.method.prepare(state.method, self.setup))

    def features(self, state: State, x: jax.Array, task: Any = None) -> jax.Array:
        """Computes the inputs of the network's output layer, between two tasks, without `jax.jit`.

        Args:
          state: between two tasks.
          x: examples ``[n, ...]``.
          task: int scalar, may be traced: the mode to use; None for the shared network without a
            mode.

        Returns:
          f32 ``[n, d]``.

        Raises:
          ValueError: the network does not give access to the inputs of its layers.
        """
        own, variables = state.params, state.variables
        mode: dict[str, Any] = {}
        if task is not None:
            task = jnp.asarray(task, jnp.int32)
            own, mode = self.method.forward(
                own, state.task_params, state.method, Context(self.setup, task, None, False)
            )
            variables = self._variables(state, task, None)
        path = next(reversed(self.network.layers), "")
        found = self.network.features(own, mode, x, (path,), variables=variables)[path]
        return found.reshape(x.shape[0], -1).astype(jnp.float32)

    def width(self, who: str) -> int:
        """The number of features that `features` returns for an example.

        Args:
          who: the name of the caller, for the error message.

        Returns:
          d.

        Raises:
          UserError: the network does not give access to the inputs of its layers.
        """
        abstract = jax.eval_shape(self.first, prng.key(0))
        try:
            return int(jax.eval_shape(self.features, abstract, self.network.example).shape[1])
        except ValueError as error:
            raise UserError(f"{who}: {error}") from error

    # Later tasks, and files.

    def grow(self, state: State, num_tasks: int, classes: Any = None) -> tuple["Learner", State]:
        """Makes room for more tasks.

        Args:
          state: between two tasks.
          num_tasks: the new T, at least the present one.
          classes: as in `learner`, for all tasks; needed if they were given before.

        Returns:
          A learner of ``num_tasks`` tasks and its state. Earlier tasks are answered as before.

        Raises:
          UserError: ``num_tasks`` is smaller than before.
        """
        self._checked(state)
        _check_num_tasks(num_tasks)
        if num_tasks < self.num_tasks:
            raise UserError(f"num_tasks: {num_tasks} is below the {self.num_tasks} there are")
        table = _class_table(classes, num_tasks, self.setup.num_outputs)
        if table is None and self.setup.classes is not None:
            raise UserError("classes: give those of all tasks, as they were given to learner")
        setup = dataclasses.replace(self.setup, num_tasks=num_tasks, classes=table)
        grown = dataclasses.replace(self, setup=setup)
        return grown, arrays.put_in_corner(grown.init(state.key), state)

    def save(self, state: State, path: Any) -> None:
        """Writes a state to one ``.safetensors`` file, without pickle.

        Args:
          state: of this learner, of one seed.
          path: of the file.

        Raises:
          UserError: the state belongs to another learner, or has several seeds.
        """
        names = {"format": "bpnjax-state-1", "method": self.method.name,
                 "network": self.network.name, "num_tasks": str(self.num_tasks)}  # fmt: skip
        arrays.write(path, arrays.flatten(self._checked(state)), names)

    def load(self, path: Any) -> State:
        """Reads a state from `save`.

        Args:
          path: of the file.

        Returns:
          `State`, the same arrays bit for bit.

        Raises:
          UserError: there is no such file, or it has another network, method or number of tasks.
        """
        found, names = arrays.read(path)
        if names.get("format") != "bpnjax-state-1":
            raise UserError(f"{path}: no state that learner.save wrote; name such a file")
        abstract = jax.eval_shape(self.first, prng.key(0))
        try:
            for what, own in (("method", self.method.name), ("network", self.network.name)):
                if names.get(what) != own:
                    raise ValueError(f"another {what}")
            return arrays.unflatten(found, abstract)
        except ValueError as error:
            raise UserError(
                f"{path}: a state of the method {names.get('method')} on the network "
                f"{names.get('network')} with {names.get('num_tasks')} tasks, not of "
                f"{self.method.name} on {self.network.name} with {self.num_tasks} ({error}); build "
                "the learner as it was"
            ) from error

    def answering(self, state: State | None = None) -> Any:
        """Finds the leaves of a state that `answer` reads, which are needed to answer tasks.

        Args:
          state: a state or its shapes; by default those of `init`.

        Returns:
          A tree of bools with the structure of the state. Leaves with False serve training only.
        """
        abstract = jax.eval_shape(self.first, prng.key(0)) if state is None else state
        self.setup.stored_example("learner.answering")
        example = self.network.example
        task = jax.ShapeDtypeStruct((), jnp.int32)
        return arrays.used(
            lambda s, x, t: self.answer(s, x, t, between_tasks=True), abstract, example, task
        )

    # What the functions above consist of.

    def _scored(self, state: State, x: Any, rule: Any, kept: Any, features: str) -> jax.Array:
        """How well each task fits each example, f32 [n, T], one task after another."""

        def one(task: jax.Array) -> jax.Array:
            if isinstance(rule, Mapper):
                entering = self.features(state, x, task if features == "mode" else None)
                return rule.score(kept, task, entering)
            logits = self.answer(state, x, task, between_tasks=True)
            return ANSWERS[rule](self._head(logits, task))

        return jax.lax.map(one, jnp.arange(self.num_tasks)).T

    def _start_of_task_optimizer(self, task_params: Any) -> Any:
        # An optimizer with a tree of labels has none for no parameters.
        return self.task_optimizer.init(task_params) if jax.tree.leaves(task_params) else ()

    def _step_size(self, state: State, clock: Clock) -> Any:
        size = state.step_size
        if has_schedule(self.optimizer, state.params):
            size = first_step(self.optimizer, state.params, state.optimizer)
        return scaled(size, clock.rate)

    @property
    def _own_variables(self) -> bool:
        return self.batch_statistics == "task" or self.method.trains == "afresh"

    def _variables(self, state: State, task: Any, current: Any) -> Any:
        if not self._own_variables or not state.variables:
            return state.variables
        stored = modes.select(state.task_variables, task)
        if current is None:
            return stored
        is_current = (task == current) & (current >= 0)
        return jax.tree.map(lambda now, s: jnp.where(is_current, now, s), state.variables, stored)

    def _run(
        self, state: State, params: Any, x: Any, task: Any, current: Any,
        train: bool = False, key: Any = None,
    ) -> tuple[jax.Array, Any]:  # fmt: skip
        """Outputs of a batch in the mode of its task or tasks, f32, and the variables after it."""
        ctx = Context(self.setup, task, current, train, key)
        own, mode = self.method.forward(params, state.task_params, state.method, ctx)
        variables = state.variables if train else self._variables(state, task, current)
        if self.method.output_layer is not None and not train:
            path = next(reversed(self.network.layers))
            entering = self.network.features(own, mode, x, (path,), variables=variables)[path]
            return self.method.output_layer(
                state.method, entering.astype(jnp.float32), ctx
            ), variables
        outputs, variables = self.network.apply(
            own, mode, x, variables=variables, train=train, key=key,
            freeze_statistics=self.batch_statistics == "frozen",
        )  # fmt: skip
        return outputs.astype(jnp.float32), variables

    def _one_mode_per_batch(self, task: Any) -> bool:
        """Whether the network is a plain function, which takes one mode per batch only."""
        return jnp.ndim(task) == 1 and self.network.tapped is None and self.method.told_task

    def _outputs(
        self, state: State, params: Any, x: Any, task: Any, current: Any, key: Any = None
    ) -> jax.Array:
        """Outputs of examples in the mode of their tasks, f32; calls from hooks pass a key."""

        def run(x: Any, task: Any) -> jax.Array:
            return self._run(state, params, x, task, current, False, key)[0]

        own = jnp.ndim(task) == 1 and self._own_variables and bool(state.variables)
        if jnp.ndim(task) == 1 and self.method.trains == "afresh":
            # With one network per task, examples are answered one by one.
            return jax.lax.map(lambda one: run(one[0][None], one[1])[0], (x, task))
        if own or self._one_mode_per_batch(task):
            return jax.vmap(lambda x, t: run(x[None], t)[0])(x, task)
        return run(x, task)

    def _trained(
        self, state: State, params: Any, x: Any, task: Any, current: Any, key: Any
    ) -> tuple[jax.Array, Any]:
        """Outputs of examples as in training, in the mode of their tasks, and the variables."""
        if self._one_mode_per_batch(task):
            one = jax.vmap(
                lambda x, t: self._run(state, params, x[None], t, current, True, key)[0][0]
            )
            return one(x, task), state.variables
        return self._run(state, params, x, task, current, True, key)

    def _losses(self, outputs: jax.Array, y: Any, task: Any) -> jax.Array:
        if self.setup.loss is not None:
            losses = checked_losses(self.setup.loss, outputs, y)
        else:
            losses = optax.softmax_cross_entropy_with_integer_labels(self._head(outputs, task), y)
        return losses.reshape(losses.shape[0], -1).mean(-1)

    def _head(self, outputs: jax.Array, task: Any) -> jax.Array:
        if not self.setup.multi_head:
            return outputs
        classes = jnp.asarray(self.setup.known_classes("a head per task"))[task]
        return within_head(outputs, classes)

    def _right(self, outputs: jax.Array, y: Any, task: Any) -> jax.Array:
        if self.setup.loss is not None:
            return jnp.zeros(outputs.shape[0], jnp.float32)
        right = jnp.argmax(self._head(outputs, task), -1) == y
        return right.reshape(right.shape[0], -1).mean(-1, dtype=jnp.float32)

    def _context(
        self, state: State, clock: Clock, key: Any, step_size: Any,
        observe: Callable[[Any, Any], None] = lambda variables, share: None,
    ) -> Context:  # fmt: skip
        current = clock.task

        draw = prng.fold(key, prng.REPLAY)

        def outputs(params: Any, x: Any, task: Any) -> jax.Array:
            return self._outputs(state, params, x, task, current, draw)

        def trained(params: Any, x: Any, task: Any) -> tuple[jax.Array, Any]:
            return self._trained(state, params, x, task, current, draw)

        def losses(params: Any, x: Any, y: Any, task: Any) -> jax.Array:
            return self._losses(outputs(params, x, task), y, task)

        def tapped(params: Any, x: Any, task: Any) -> Any:
            ctx = Context(self.setup, task, current, False, key)
            run, mode = self.method.forward(params, state.task_params, state.method, ctx)
            return run, mode, self._variables(state, task, current)

        def features(params: Any, x: Any, task: Any, paths: Sequence[str]) -> dict[str, jax.Array]:
            run, mode, variables = tapped(params, x, task)
            found = self.network.features(run, mode, x, paths, variables=variables)
            return {path: feature.astype(jnp.float32) for path, feature in found.items()}

        def losses_from(
            params: Any, x: Any, y: Any, task: Any, path: str, feature: jax.Array
        ) -> jax.Array:
            run, mode, variables = tapped(params, x, task)
            assert self.network.tapped is not None
            out, _ = self.network.tapped(
                run, mode, x, variables=variables, replaced={path: feature}
            )
            return self._losses(out.astype(jnp.float32), y, task)

        return Context(
            self.setup, current, current, False, key, clock.step, step_size,
            outputs, losses, features, losses_from, trained, self._losses, observe,
        )  # fmt: skip

    def _measures(
        self, state: State, take: Any, size: int, count: Any, ctx: Context, axis: str | None
    ) -> tuple[Any, Any, Any, Any, Any]:
        """The functions of `bpnjax.importance`, bound to the data and the mode of a task."""
        task = ctx.current
        # In the network as it was trained, before its mode goes into the bank.
        answering = Context(self.setup, task, task, False, ctx.key)
        network = self.network.bind(state.variables)
        batch = min(_IMPORTANCE_BATCH, size)
        head = None
        if self.setup.multi_head:
            head = jnp.asarray(self.setup.known_classes("a head per task"))[task]
        loss = None
        if self.setup.loss is not None or self.setup.label.shape:

            def loss(outputs: Any, y: Any) -> jax.Array:
                return self._losses(outputs, y, task)

        def added(add: Any, zeros: Any, batch: int, limit: int, most: Any) -> Any:
            def one(i: Any, total: Any) -> Any:
                places = i * batch + jnp.arange(batch)
                x, y = take(jnp.minimum(places, limit - 1))
                weights = (places < most).astype(jnp.float32)
                return add(total, i, places, x, y, weights)

            return collectives.sum_loop(axis, -(-most // batch), one, zeros)

        def mean(sum_of_batch: Any, like: Any, examples: int = 0) -> Any:
            limit = min(examples or size, size)
            most = jnp.minimum(count, limit)

            def one(total: Any, i: Any, places: Any, *of_batch: Any) -> Any:
                return jax.tree.map(jnp.add, total, sum_of_batch(i, *of_batch))

            zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), like)
            sums = added(one, zeros, batch, limit, most)
            # Explicitly, because XLA does this in some programs of the same function and not in
            # others.
            reciprocal = 1.0 / most
            return jax.tree.map(lambda s: s * reciprocal, sums)

        def run(params: Any) -> Any:
            params = state.params if params is None else params
            return self.method.forward(params, state.task_params, state.method, answering)

        def fisher(kind: str, examples: int = 0, params: Any = None) -> Any:
            own, mode = run(params)

            def one(i: Any, x: Any, y: Any, weights: Any) -> Any:
                return importance.fisher_sum(
                    network, own, mode, x, y, kind=kind, weights=weights, classes=head, loss=loss,
                    key=prng.fold(state.key, prng.FISHER, task, i),
                )  # fmt: skip

            return mean(one, own, examples)

        def factors(examples: int = 0, params: Any = None) -> Any:
            own, mode = run(params)

            def one(i: Any, x: Any, y: Any, weights: Any) -> Any:
                return kronecker.factors_sum(
                    network, own, mode, x, y, weights=weights, classes=head, loss=loss
                )

            return mean(one, kronecker.empty_factors(self.network.layers), examples)

        def sensitivity(params: Any = None) -> Any:
            own, mode = run(params)

            def one(i: Any, x: Any, y: Any, weights: Any) -> Any:
                return importance.sensitivity_sum(
                    network, own, mode, x, weights=weights, classes=head
                )

            return mean(one, own)

        def neurons(of: str, params: Any = None) -> dict[str, jax.Array]:
            own, mode = run(params)

            def one(i: Any, x: Any, y: Any, weights: Any) -> Any:
                return importance.neurons_sum(
                    network, own, mode, x, y, of=of, weights=weights, classes=head, loss=loss
                )

            covered = per_example.one_pass_layers(self.network.layers)
            like = {path: jnp.zeros(layer.outputs, jnp.float32) for path, layer in covered.items()}
            return mean(one, like)

        def sums(add: Callable[..., Any], like: Any) -> Any:
            def one(total: Any, i: Any, *of_examples: Any) -> Any:
                return add(total, *of_examples)

            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
            # Blocks of one size, so that the sums do not depend on the length of other tasks.
            return added(one, zeros, _IMPORTANCE_BATCH, size, count)

        return fisher, factors, sensitivity, neurons, sums

    def _counted_step(
        self, state: State, x: Any, y: Any, weight: Any, task: Any
    ) -> tuple[State, dict[str, jax.Array]]:
        state = self._checked(state)  # runs while it is traced, so once
        tasks = jnp.full(x.shape[0], state.task, jnp.int32) if task is None else task
        batch = Batch(x, y, jnp.ones(x.shape[0], jnp.float32) if weight is None else weight, tasks)
        clock = Clock(state.task, state.step)
        state, totals = self.update(state, batch, clock, self.axis)
        metrics = {"loss": totals.loss / totals.examples, "examples": totals.examples}
        if self.setup.loss is None:
            metrics["accuracy"] = totals.correct / totals.examples
        return state, metrics

    def _end_of_arrays(self, state: State, x: Any, y: Any) -> State:
        x, y = collectives.gather((x, y), self.axis)
        n = x.shape[0]
        return self.consolidate(
            state, lambda places: (x[places], y[places]), n, jnp.int32(n),
            Clock(state.task, state.step), self.axis,
        )  # fmt: skip

    def _checked(self, state: Any) -> State:
        """The state, or an error if it does not belong to this learner."""
        if isinstance(state, State):
            _refuse_consumed(state)
            found = [leaf.shape for leaf in jax.tree.leaves(state)]
            if found == self._shapes:  # type: ignore[attr-defined]
                return state
        raise UserError(
            f"state: not one that learner.init of {self.method.name} on {self.network.name} with "
            f"{self.num_tasks} tasks gives; states of several seeds need jax.vmap, others their "
            "own learner"
        )

    def _task(self, task: Any) -> jax.Array:
        try:
            return check_task(task, self.num_tasks)
        except ValueError as error:
            raise UserError(
                f"task: {error}; this learner was made for num_tasks={self.num_tasks}, "
                "learner.grow makes room for more"
            ) from error


def _weighted(mode: Any, weight: jax.Array) -> Any:
    """The mode, with the weights of the examples for the layers whose outputs it measures."""
    return {
        path: {**vectors, "weight": weight} if "measure" in vectors else vectors
        for path, vectors in mode.items()
    }


def _weighted_mean(trees: Sequence[tuple[Any, Any]]) -> Any:
    """The weighted mean of trees. Leaves that are not floats come from the first tree."""
    total = sum(weight for _, weight in trees)
    shares = [weight / total for _, weight in trees]

    def one(first: Any, *leaves: Any) -> Any:
        if not jnp.issubdtype(jnp.result_type(first), jnp.inexact):
            return first
        both = zip(shares, (first, *leaves), strict=True)
        return jnp.asarray(sum(share * leaf for share, leaf in both), first.dtype)

    return jax.tree.map(one, *(tree for tree, _ in trees))


def _refuse_consumed(state: Any) -> None:
    """Explains what JAX would report as a deleted buffer."""
    first = next(iter(jax.tree.leaves(getattr(state, "params", None))), None)
    if isinstance(first, jax.core.Tracer):
        return
    if isinstance(first, jax.Array) and first.is_deleted():
        raise UserError(
            "state: an earlier call has consumed it; continue with the state that it returned"
        )


def learner(
    network: Network,
    method: Method,
    optimizer: optax.GradientTransformation,
    num_tasks: int,
    *,
    loss: Callable[[Any, Any], jax.Array] | None = None,
    classes: Any = None,
    heads: str = "single",
    label: Any = None,
    batch_statistics: str = "task",
    task_optimizer: optax.GradientTransformation | None = None,
    reset_optimizer: bool = True,
    axis: str | None = None,
) -> Learner:
    """Joins a network, a method and an optimizer.

    Args:
      network: from `bpnjax.networks.from_linen`, `from_nnx` or `from_function`.
      method: from `bpnjax.methods`, or your own `bpnjax.methods.Method`.
      optimizer: any optax optimizer, for the shared parameters.
      num_tasks: T, the number of tasks that the state has room for.
      loss: ``(outputs, labels) -> losses [n]``; by default softmax cross-entropy on integer labels.
      classes: the outputs that belong to each task, a list of T lists or bool ``[T, C]``; needed by
        some methods and by ``heads="multi"``.
      heads: ``"single"``, one output layer for all tasks; ``"multi"``, each task is trained on its
        own outputs only.
      label: an array of labels, or shape and dtype of a batch of them, ``[n, ...]``, if labels are
        not integers ``[n]``.
      batch_statistics: for networks with BatchNorm: ``"task"``, each task has its own running
        statistics as part of its mode; ``"shared"``, all tasks update the same statistics;
        ``"frozen"``, the statistics of ``init`` never change.
      task_optimizer: for task parameters that follow their gradient (W of BD, plain biases). By
        default ``optimizer``, at the method's own learning rate if it has one.
      reset_optimizer: whether a new task starts with a fresh optimizer state.
      axis: name of a mapped device axis, for ``jax.pmap(learner.step, axis_name=axis)`` where each
        device gets a share of the batch, and likewise for ``end_task``.

    Returns:
      `Learner`.

    Raises:
      UserError: network, method and loss do not fit together; the message says why.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, optax
      >>> import bpnjax
      >>> from bpnjax import methods, networks
      >>> x, y = jnp.eye(4), jnp.array([0, 1, 0, 1])
      >>> network = networks.from_linen(nn.Dense(2), x)
      >>> method = methods.bd_ewc()
      >>> learner = bpnjax.learner(network, method, optax.sgd(0.1), num_tasks=2)
      >>> state = learner.init(jax.random.key(0))
      >>> for task in range(2):
      ...     state = learner.begin_task(state, task)
      ...     for _ in range(3):
      ...         state, metrics = learner.step(state, (x, y))
      ...     state = learner.end_task(state, (x, y))
      >>> learner.apply(state, x, task=0).shape
      (4, 2)
      >>> learner.apply(state, x, jnp.array([0, 1, 1, 0])).shape  # one task id per example
      (4, 2)
      >>> sorted(metrics)
      ['accuracy', 'examples', 'loss']
    """
    if not isinstance(network, Network):
        raise UserError(
            f"network: {type(network).__name__} is not a bpnjax.networks.Network; pass "
            "networks.from_linen(module, x[:1]), networks.from_nnx(module, x[:1]) or "
            "networks.from_function(...)"
        )
    if not isinstance(method, Method):
        wanted = getattr(method, "name", "bd_ewc")
        raise UserError(
            f"method: {type(method).__name__} is not a method; call the function that makes one, "
            f"as methods.{wanted}()"
        )
    if not isinstance(optimizer, optax.GradientTransformation):
        raise UserError(
            f"optimizer: {type(optimizer).__name__} is not an optax optimizer; pass one, as "
            "optax.adam(3e-4)"
        )
    _check_num_tasks(num_tasks)
    for name, value, allowed in (
        ("heads", heads, ("single", "multi")), ("batch_statistics", batch_statistics, POLICIES)
    ):  # fmt: skip
        if value not in allowed:
            raise UserError(f"{name}: unknown value {value!r}; choose from: {', '.join(allowed)}")
    outputs = _num_outputs(network)
    table = _class_table(classes, num_tasks, outputs)
    if label is None:
        shape = jax.ShapeDtypeStruct((), jnp.int32)
    else:
        dtype = label.dtype if hasattr(label, "dtype") else jnp.result_type(label)
        whole = jnp.issubdtype(dtype, jnp.integer)
        shape = jax.ShapeDtypeStruct(np.shape(label)[1:], jnp.int32 if whole else jnp.float32)
    if loss is None and not jnp.issubdtype(shape.dtype, jnp.integer):
        raise UserError(
            f"label: {dtype} labels have no cross-entropy; pass bpnjax.learner(..., loss=...), "
            "(outputs, labels) -> losses [n]"
        )
    setup = Setup(
        network, int(num_tasks), outputs, table, heads == "multi", loss, shape, method.told_task
    )
    if heads == "multi":
        setup.known_classes("a head per task (heads='multi')")
        setup.need_cross_entropy("a head per task (heads='multi')")
    method.check(setup)
    if task_optimizer is None:
        task_optimizer = optimizer
        if method.learning_rate is not None:
            task_optimizer = at_rate(optimizer, method.learning_rate)
    return Learner(
        setup=setup,
        method=method,
        optimizer=following_rate(optimizer),
        task_optimizer=optax.with_extra_args_support(
            method.optimizer(following_rate(task_optimizer))
        ),
        batch_statistics="frozen" if method.output_layer is not None else batch_statistics,
        reset_optimizer=reset_optimizer,
        axis=axis,
    )


def _check_num_tasks(num_tasks: Any) -> None:
    if not isinstance(num_tasks, numbers.Integral) or isinstance(num_tasks, bool) or num_tasks < 1:
        raise UserError(
            f"num_tasks: {num_tasks!r} is not a number of tasks; give an integer from 1"
        )


def _num_outputs(network: Network) -> int:
    if network.example is None:
        return 0
    params, variables = jax.eval_shape(network.init, prng.key(0))
    outputs, _ = jax.eval_shape(
        lambda p, v, x: network.apply(p, {}, x, variables=v), params, variables, network.example
    )
    if not hasattr(outputs, "shape") or outputs.ndim < 1:
        raise UserError(
            f"network: {network.name} returns {type(outputs).__name__}; it must return one array "
            "of outputs, [n, ...]"
        )
    return int(outputs.shape[-1])


def _class_table(classes: Any, num_tasks: int, num_outputs: int) -> np.ndarray | None:
    """The outputs that belong to each task, bool [T, C]."""
    if classes is None:
        return None
    if not num_outputs:
        raise UserError(
            "x: the number of outputs is not known, and classes are outputs; pass a batch to the "
            "function that made the network, as networks.from_function(..., x=x[:1])"
        )
    if isinstance(classes, np.ndarray) and classes.dtype == bool:
        if classes.shape != (num_tasks, num_outputs):
            raise UserError(
                f"classes: shape {classes.shape}; give bool [{num_tasks}, {num_outputs}]"
            )
        return classes
    if len(classes) != num_tasks:
        raise UserError(f"classes: {len(classes)} lists for {num_tasks} tasks; give one each")
    table = np.zeros((num_tasks, num_outputs), bool)
    for row, own in zip(table, classes, strict=True):
        wrong = [c for c in own if not 0 <= int(c) < num_outputs]
        if wrong:
            raise UserError(
                f"classes: {wrong[0]} is not an output of the network; it has {num_outputs}, from 0"
            )
        row[list(own)] = True
    return table
