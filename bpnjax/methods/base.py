"""The definition of a continual-learning method as a few pure functions, and their composition.

All state is an argument and a return value. What a method stores per task has a leading axis
``[T, ...]`` that is allocated once, and the task is a traced integer. So a sequence of any length
compiles its programs once. Every hook works under `jax.jit` and `jax.vmap` (over seeds).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bpnjax import modes
from bpnjax.networks import Network
from bpnjax.utils.errors import UserError

__all__ = ["Batch", "Context", "Method", "Setup", "TaskData", "chain", "output_leaves"]


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """Facts that a method can use when it allocates its state. It holds no traced values.

    Attributes:
      network: the network.
      num_tasks: T.
      num_outputs: C, length of the last axis of the outputs.
      classes: the outputs that belong to each task, bool ``[T, C]``; None if not given.
      multi_head: whether each task uses its own outputs only, also in training.
      loss: ``(outputs, labels) -> losses [n]``; None for cross-entropy.
      label: shape and dtype of one label.
      told_task: whether the method, including all parts of a composition, needs to know the task.
    """

    network: Network
    num_tasks: int
    num_outputs: int
    classes: np.ndarray | None
    multi_head: bool
    loss: Callable[[Any, Any], jax.Array] | None
    label: jax.ShapeDtypeStruct
    told_task: bool

    def known_classes(self, who: str) -> np.ndarray:
        """The classes of each task, bool ``[T, C]``; `UserError` if they were not given."""
        if self.classes is None:
            raise UserError(
                f"classes: {who} needs to know which outputs belong to which task; pass "
                "bpnjax.learner(..., classes=[[0, 1], [2, 3], ...])"
            )
        return self.classes

    def need_cross_entropy(self, who: str) -> None:
        """Raises an error for another loss than cross-entropy, for methods that need classes."""
        if self.loss is not None:
            raise UserError(
                f"loss: {who} is defined for cross-entropy on class labels only; leave loss out, "
                "or choose another method"
            )
        if self.label.shape:
            raise UserError(
                f"label: {who} is defined for one class label per example, not for labels of shape "
                f"{self.label.shape}; choose another method"
            )

    def stored_example(self, who: str) -> jax.ShapeDtypeStruct:
        """Shape and dtype of one example, ``[...]``; `UserError` if they are not known."""
        if self.network.example is None:
            raise UserError(
                f"x: {who} must know the shape of an example; pass a batch to the function "
                "that made the network, as networks.from_function(..., x=x[:1])"
            )
        return jax.ShapeDtypeStruct(self.network.example.shape[1:], self.network.example.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """The examples of one step, from all devices.

    Attributes:
      x: stored examples, ``[n, ...]``.
      y: labels ``[n, ...]``, int32 ``[n]`` for classes.
      weight: f32 ``[n]``, 0 for padding; not all 0.
      task: int32 ``[n]``, the task of each example.
    """

    x: jax.Array
    y: jax.Array
    weight: jax.Array
    task: jax.Array


@dataclasses.dataclass(frozen=True)
class TaskData:
    """The data of the task that just ended, and importance measures over them.

    Attributes:
      take: ``positions int32 [m] -> (x [m, ...], y [m, ...])``, the examples at these positions of
        the last epoch.
      size: number of positions; static.
      count: number of examples before the padding begins; int scalar, may be traced.
      fisher: ``(kind, examples) -> tree``, as `bpnjax.importance.fisher`, of the first ``examples``
        examples (0 for all).
      factors: ``(examples, params) -> {path: Factors}``, as `bpnjax.importance.kronecker.factors`.
        None stands for the parameters at the end of training, which the other measures always use.
      sensitivity: ``() -> tree``, as `bpnjax.importance.sensitivity`.
      neurons: ``(of) -> {path: f32 [outputs]}``, as `bpnjax.importance.neurons`.
      sums: ``(add, like) -> tree``, sums over all examples in one pass, shared by the devices:
        ``add(total, positions int32 [n], x, y, weights) -> total`` adds those of a batch, in which
        examples of weight 0 must add nothing; ``like`` is a tree of their shapes.
    """

    take: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
    size: int
    count: Any
    fisher: Callable[..., Any]
    factors: Callable[..., Any]
    sensitivity: Callable[[], Any]
    neurons: Callable[[str], dict[str, jax.Array]]
    sums: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Context:
    """The place in training where a hook is called, and functions of examples.

    ``outputs``, ``losses``, ``features`` and ``losses_from`` run each example in the mode of its
    own task. In a composition they use the whole method, not only the part that calls them. They
    can be differentiated with respect to ``params``. On several devices every device computes them
    for all examples that it is given.

    Attributes:
      setup: facts that do not change in a run.
      task: the task of the examples in `Method.forward`: int scalar, or int ``[n]``, one per
        example.
      current: the task in training, int scalar; None if there is none.
      training: whether `Method.forward` is called for a training step of the current task.
      key: typed PRNG key of this step, or of this task's end. None outside of hooks, when the model
        answers (`bpnjax.learner.Learner.answer`).
      step: int scalar, number of earlier steps of the current task; at its end the number of all.
      step_size: tree of f32 scalars like the parameters, the current learning rate of each leaf.
      outputs: ``(params, x, task) -> f32 [n, ...]``.
      losses: ``(params, x, y, task) -> f32 [n]``, the losses that training minimises.
      features: ``(params, x, task, paths) -> {path: f32 [n, ...]}``, the inputs of these layers.
      losses_from: ``(params, x, y, task, path, features) -> f32 [n]``, with the input of one layer
        replaced.
      trained: ``(params, x, task) -> (f32 [n, ...], variables)``, outputs as in training, with
        dropout and the statistics of this batch, and the network's variables afterwards.
      loss_of: ``(outputs, y, task) -> f32 [n]``, the losses of given outputs.
      observe: ``(variables, share) -> None``, adds these to the running statistics that all tasks
        share, with the weight ``share``; the batch of the step has the weight 1.
    """

    setup: Setup
    task: Any
    current: Any
    training: bool
    key: Any = None
    step: Any = None
    step_size: Any = None
    outputs: Callable[..., jax.Array] = None  # type: ignore[assignment]
    losses: Callable[..., jax.Array] = None  # type: ignore[assignment]
    features: Callable[..., dict[str, jax.Array]] = None  # type: ignore[assignment]
    losses_from: Callable[..., jax.Array] = None  # type: ignore[assignment]
    trained: Callable[..., tuple[jax.Array, Any]] = None  # type: ignore[assignment]
    loss_of: Callable[..., jax.Array] = None  # type: ignore[assignment]
    observe: Callable[[Any, Any], None] = lambda variables, share: None

    @property
    def answering(self) -> bool:
        """Whether the model answers, outside of training and of hooks."""
        return self.key is None

    def stored_or_current(self, current: Any, stored: Any) -> Any:
        """Takes the current tree for examples of the task in training, else the stored one.

        Args:
          current: tree of the task in training, leaves ``[...]``.
          stored: the same tree for the tasks in ``task``, leaves ``[...]`` or ``[n, ...]``.

        Returns:
          ``stored``, with ``current`` where the task is the one in training.
        """
        if self.current is None:
            return stored
        if self.training and jnp.ndim(self.task) == 0:
            return current
        # Between two tasks ``current`` is -1, which no task has.
        is_current = (jnp.asarray(self.task) == self.current) & (self.current >= 0)

        def one(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(is_current.reshape(is_current.shape + (1,) * new.ndim), new, old)

        return jax.tree.map(one, current, stored)


def _begin_task(key: Any, params: Any, state: Any, ctx: Context) -> tuple[Any, Any, Any]:
    del key, ctx
    return params, state, ()


@dataclasses.dataclass(frozen=True)
class Method:
    """A continual-learning method. With all defaults it is plain fine-tuning.

    ``params`` are the shared parameters. ``task_params`` exist only while their task is trained
    (such as the factors of BD). ``state`` is what the method stores, any pytree of arrays.

    Attributes:
      name: its name in the registry.
      paper: where it was published.
      told_task: whether it acts differently for each task, so that it must know or infer the task.
      trains: ``"in turn"``; ``"afresh"`` for a fresh network per task (stl); ``"jointly"`` for one
        training on all tasks together (joint). The last two are upper bounds.
      check: ``(setup) -> None``; raises `UserError` for an unsuitable network or sequence.
      init: ``(key, params, setup) -> state``, allocated for all tasks.
      begin_task: ``(key, params, state, ctx) -> (params, state, task_params)``, with fresh task
        parameters. Their structure is the same for all tasks.
      forward: ``(params, task_params, state, ctx) -> (params, mode)``, the parameters and the mode
        for the tasks ``ctx.task``. Training, tests and loaded models all answer through it.
      gradient: ``(grads, params, state, batch, ctx) -> grads``, from the gradient of the mean loss
        of the batch to the one that the optimizer gets.
      end_step: ``(old, new, grads, state, batch, ctx) -> (params, state)``, after the optimizer:
        parameters before and after its step, and the gradient of the mean loss of the batch.
      end_task: ``(params, task_params, state, data, ctx) -> (params, state)``: freezes the mode,
        measures importance, keeps examples. ``data`` is a `TaskData`.
      output_layer: ``(state, features, ctx) -> f32 [n, C]``, replaces the network's output layer;
        the features are the inputs of that layer, f32 ``[n, d]``. None keeps the network's own
        layer. With a replaced layer the running statistics stay those of ``init``.
      prepare: ``(state, setup) -> state``, computes once what ``output_layer`` would compute for
        each batch, before many batches are answered; ``output_layer`` takes both states.
      optimizer: ``tx -> tx``, from the learner's optimizer to that of ``task_params``.
      learning_rate: the learning rate of ``task_params``; None takes that of the shared parameters.
    """

    name: str = "method"
    paper: str = ""
    told_task: bool = False
    trains: str = "in turn"
    check: Callable[[Setup], None] = lambda setup: None
    init: Callable[[Any, Any, Setup], Any] = lambda key, params, setup: ()
    begin_task: Callable[[Any, Any, Any, Context], tuple[Any, Any, Any]] = _begin_task
    forward: Callable[[Any, Any, Any, Context], tuple[Any, Any]] = (
        lambda params, task_params, state, ctx: (params, {})
    )
    gradient: Callable[[Any, Any, Any, Batch, Context], Any] = (
        lambda grads, params, state, batch, ctx: grads
    )
    end_step: Callable[[Any, Any, Any, Any, Batch, Context], tuple[Any, Any]] = (
        lambda old, new, grads, state, batch, ctx: (new, state)
    )
    end_task: Callable[[Any, Any, Any, TaskData, Context], tuple[Any, Any]] = (
        lambda params, task_params, state, data, ctx: (params, state)
    )
    output_layer: Callable[[Any, jax.Array, Context], jax.Array] | None = None
    prepare: Callable[[Any, Setup], Any] = lambda state, setup: state
    optimizer: Callable[[optax.GradientTransformation], optax.GradientTransformation] = lambda tx: (
        tx
    )
    learning_rate: float | None = None


def chain(*methods: Method, name: str = "", paper: str = "") -> Method:
    """Composes methods. Modes and task parameters are merged; gradients pass from left to right.

    Biases of one layer add up, and keys of one layer multiply (`bpnjax.modes.merge`). Each part
    sees only its own state, and has its own PRNG key.

    Args:
      *methods: the parts; their states form a tuple, in this order.
      name: the name of the composition; by default the names of the parts, joined by ``+``.
      paper: where it was published.

    Returns:
      A `Method`. It is told the task if one of its parts is.

    Raises:
      UserError: two parts do not go together: an upper bound or a method with its own output layer
        with any other, or two parts with different learning rates of their task parameters.

    Example:
      >>> from bpnjax import methods
      >>> method = methods.chain(methods.bd(hidden_dim=50), methods.ewc())
      >>> method.name, method.told_task
      ('bd+ewc', True)

    Source: Wen et al. 2020 (arXiv 2009.13954), Sec. V, which combines BD with EWC or with PSP.
    """
    bounds = [m.name for m in methods if m.trains != "in turn"]
    if bounds and len(methods) > 1:
        raise UserError(
            f"chain: {bounds[0]} is an upper bound that trains its networks by itself and cannot "
            "be a part of another method; leave it out"
        )
    heads = [m.name for m in methods if m.output_layer is not None]
    if heads and len(methods) > 1:
        raise UserError(
            f"chain: {heads[0]} has its own output layer on a frozen network and cannot be a part "
            "of another method; leave it out"
        )
    rates = {m.learning_rate for m in methods if m.learning_rate is not None}
    if len(rates) > 1:
        raise UserError(
            f"chain: parts ask for different learning rates of their task parameters ({rates}); "
            "give them the same"
        )
    parts = tuple(enumerate(methods))

    def check(setup: Setup) -> None:
        for method in methods:
            method.check(setup)

    def init(key: Any, params: Any, setup: Setup) -> Any:
        return tuple(m.init(jax.random.fold_in(key, i), params, setup) for i, m in parts)

    def begin_task(key: Any, params: Any, states: Any, ctx: Context) -> tuple[Any, Any, Any]:
        kept, fresh = [], []
        for i, m in parts:
            folded = jax.random.fold_in(key, i)
            params, state, task_params = m.begin_task(folded, params, states[i], ctx)
            kept.append(state)
            fresh.append(task_params)
        return params, tuple(kept), tuple(fresh)

    def forward(params: Any, task_params: Any, states: Any, ctx: Context) -> tuple[Any, Any]:
        found = []
        for i, m in parts:
            params, mode = m.forward(params, task_params[i], states[i], ctx)
            found.append(mode)
        return params, modes.merge(*found)

    def gradient(grads: Any, params: Any, states: Any, batch: Batch, ctx: Context) -> Any:
        for i, m in parts:
            grads = m.gradient(grads, params, states[i], batch, _own_key(ctx, i))
        return grads

    def end_step(
        old: Any, new: Any, grads: Any, states: Any, batch: Batch, ctx: Context
    ) -> tuple[Any, Any]:
        kept = []
        for i, m in parts:
            new, state = m.end_step(old, new, grads, states[i], batch, _own_key(ctx, i))
            kept.append(state)
        return new, tuple(kept)

    def end_task(
        params: Any, task_params: Any, states: Any, data: TaskData, ctx: Context
    ) -> tuple[Any, Any]:
        kept = []
        for i, m in parts:
            params, state = m.end_task(params, task_params[i], states[i], data, _own_key(ctx, i))
            kept.append(state)
        return params, tuple(kept)

    def optimizer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
        each = [optax.with_extra_args_support(m.optimizer(tx)) for m in methods]

        def start(task_params: Any) -> Any:
            return tuple(t.init(p) for t, p in zip(each, task_params, strict=True))

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            found = [
                t.update(u, s, None if params is None else params[i], **extra)
                for i, (t, u, s) in enumerate(zip(each, updates, state, strict=True))
            ]
            return tuple(u for u, _ in found), tuple(s for _, s in found)

        return optax.GradientTransformationExtraArgs(start, update)

    return Method(
        name=name or "+".join(m.name for m in methods),
        paper=paper,
        told_task=any(m.told_task for m in methods),
        check=check,
        init=init,
        begin_task=begin_task,
        forward=forward,
        gradient=gradient,
        end_step=end_step,
        end_task=end_task,
        output_layer=methods[0].output_layer if len(methods) == 1 else None,
        prepare=methods[0].prepare if len(methods) == 1 else lambda state, setup: state,
        optimizer=optimizer,
        learning_rate=next(iter(rates), None),
    )


def _own_key(ctx: Context, part: int) -> Context:
    """The context of one part of a composition, with its own random numbers."""
    return dataclasses.replace(ctx, key=jax.random.fold_in(ctx.key, part))


def output_leaves(params: Any, setup: Setup) -> Any:
    """Marks the parameters of the output layer, which is the last layer that the network calls.

    Args:
      params: the shared parameters, or their shapes.
      setup: of the learner.

    Returns:
      A tree like ``params`` of f32 scalars: 1.0 for parameters of the output layer, else 0.0.

    Raises:
      UserError: the layers of the network are not known.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn, optax, bpnjax
      >>> from bpnjax import methods, networks
      >>> net = networks.from_linen(nn.Sequential([nn.Dense(3), nn.Dense(2)]), jnp.ones((1, 4)))
      >>> setup = bpnjax.learner(net, methods.sgd(), optax.sgd(0.1), num_tasks=2).setup
      >>> params, _ = net.init(jax.random.key(0))
      >>> found = methods.output_leaves(params, setup)
      >>> float(found["layers_0"]["bias"]), float(found["layers_1"]["bias"])
      (0.0, 1.0)
    """
    if not setup.network.layers:
        raise UserError(
            f"network: the layers of {setup.network.name} are not known, and the method needs to "
            "know the output layer; build it with networks.from_linen or networks.from_nnx"
        )
    *_, output = setup.network.layers

    def is_output(path: Any, _: Any) -> jax.Array:
        joined = jax.tree_util.keystr(path, simple=True, separator="/")
        return jnp.float32(not output or joined.startswith(f"{output}/"))

    return jax.tree_util.tree_map_with_path(is_output, params)
