"""What a continual-learning method is: a NamedTuple of pure functions, and how to compose them.

All state is an argument and a return value. Whatever a method keeps per task has a leading axis
``[T, ...]`` allocated once, and ``task`` is a traced integer, so that a sequence of any length
compiles its programs once. Every hook works under `jax.jit` and `jax.vmap` (over seeds).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bpnjax.networks import linen


class Spec(NamedTuple):
    """What a method may know of the network and the sequence when it allocates its state."""

    num_tasks: int
    classes: Any  # bool [T, C], the classes of each task; host array
    layers: dict[str, linen.Layer]
    init: Callable[[jax.Array], Any]  # PRNG key -> fresh shared parameters
    config: Any  # the run's ConfigDict


class Examples(NamedTuple):
    """What a hook may ask about examples of the sequence, of any tasks, named by slots.

    All answers are those of the plain network with the shared parameters ``core``; they can be
    differentiated for ``core``.
    """

    labels: Callable[[jax.Array], jax.Array]
    """(slots) -> int32 [m], the output that stands for the example's class."""
    logits: Callable[[Any, jax.Array], jax.Array]
    """(core, slots) -> f32 [m, C]."""
    losses: Callable[[Any, jax.Array], jax.Array]
    """(core, slots) -> f32 [m], the cross-entropy that training minimises, within its head."""
    features: Callable[[Any, jax.Array, tuple[str, ...]], dict[str, jax.Array]]
    """(core, slots, paths) -> the input of each of these layers, f32 [m, ...]."""
    losses_from: Callable[[Any, jax.Array, str, jax.Array], jax.Array]
    """(core, slots, path, features) -> as losses, with the input of a layer replaced."""


class Step(NamedTuple):
    """One step of training, as the hooks see it. Examples are named by slots, not copied."""

    task: jax.Array  # int scalar
    epoch: jax.Array  # int scalar
    index: jax.Array  # int scalar, of the step in its epoch
    key: jax.Array  # PRNG key of this step
    rate: jax.Array  # the learning rate of the shared parameters at this step
    size: Any  # the learning rate for the proximal form of an anchor, 0 for the explicit one
    slots: jax.Array  # int32 [n], the whole batch
    weight: jax.Array  # f32 [n], 0 where the batch is not full
    examples: Examples
    spec: Spec


class Ended(NamedTuple):
    """The task that just ended: importance over its data, and the data themselves."""

    fisher: Callable[..., Any]  # (kind, of how many examples) -> as `bpnjax.importance.fisher`
    factors: Callable[
        ..., Any
    ]  # (of how many examples) -> as `bpnjax.importance.kronecker.factors`
    sensitivity: Callable[[], Any]  # as `bpnjax.importance.sensitivity`
    neurons: Callable[[str], dict[str, jax.Array]]  # as `bpnjax.importance.neurons`
    slots: jax.Array  # int32 [N], its examples in the order of the last epoch, padding last
    count: jax.Array  # int scalar, how many are real
    examples: Examples
    key: jax.Array  # PRNG key of this task's end


class Method(NamedTuple):
    """One method. The defaults are identities: plain fine-tuning.

    ``core`` stands for the shared parameters, ``learned`` for the parameters that exist only
    while their task is trained, ``state`` for whatever the method itself keeps, any pytree.
    """

    name: str
    paper: str = ""
    told_task: bool = False  # does it act differently for each task, hence must be told (or infer)?
    masks_outputs: bool = False  # is it told by a mask on the outputs of other tasks?
    joint: bool = False  # trains once, on all tasks together
    restarts: bool = False  # starts each task from fresh shared parameters
    layer_fields: tuple[str, ...] = ()  # groups of the configuration with a pattern `layers`

    check: Callable = lambda spec: None
    """(spec) -> None; raises `UserError` for a network or sequence that it cannot serve."""
    init: Callable = lambda key, core, spec: ()
    """(key, core, spec) -> state, allocated for all tasks."""
    fresh: Callable = lambda key, spec: {}
    """(key, spec) -> learned, fresh for each task."""
    rules: Callable = lambda config, optimizer: ()
    """(config, optimizer) -> ((path pattern, optax transform), ...) for the leaves of learned."""
    mode: Callable = lambda state, task: {}
    """(state, task) -> the stored mode of a task; ``{}`` is the plain network."""
    train_core: Callable = lambda core, state, task, key: core
    """(core, state, task, key of the step) -> the shared parameters that the loss is taken of."""
    train_mode: Callable = lambda learned, mode: mode
    """(learned, mode) -> the mode while the task is trained; differentiated for learned."""
    gradient: Callable = lambda grads, core, state, step: grads
    """(gradient of the task's loss for core, core, state, `Step`) -> gradient."""
    after_update: Callable = lambda core, state, step: core
    """(core after the optimizer's update, state, `Step`) -> core."""
    after_step: Callable = lambda state, old, new, grads, step: state
    """(state, core before, core after, gradient of the task's loss, `Step`) -> state."""
    store: Callable = lambda core, learned, state, task: state
    """(core, learned, state, task) -> state with the mode of the task frozen in it."""
    consolidate: Callable = lambda core, state, task, ended, spec: state
    """(core, state, task, `Ended`, spec) -> state, after a task."""
    for_eval: Callable = lambda core, state, task: core
    """(core, state, task) -> the shared parameters to answer a task with."""
    examples_kept: Callable = lambda state: 0
    """(state) -> how many training examples its memory has room for."""
    renumber: Callable = lambda state, slots: state
    """(state, slots -> slots) -> state, with the examples that it names named anew."""
    stored: Callable = lambda state: {}
    """(state) -> what must be kept to answer tasks later, a dict of trees: a ``bank``, ..."""


def head_mask(core, spec: Spec):
    """Which leaves belong to the output layer, the last that the network calls.

    Args:
      core: the shared parameters, or their shapes.
      spec: of the run.

    Returns:
      A tree like ``core`` of f32 scalars: 1.0 for the leaves of the output layer, else 0.0.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.networks.layers import Layer
      >>> from bpnjax.methods.base import Spec, head_mask
      >>> layers = {name: Layer("dense", 2, 2, 1, 2, (1, 2)) for name in ("hidden_0", "output")}
      >>> spec = Spec(1, None, layers, None, None)
      >>> core = {name: {"kernel": jnp.ones((2, 2))} for name in layers}
      >>> {name: float(leaf["kernel"]) for name, leaf in head_mask(core, spec).items()}
      {'hidden_0': 0.0, 'output': 1.0}
    """
    *_, output = spec.layers

    def is_head(path, _):
        joined = "/".join(str(part.key) for part in path)
        return jnp.float32(joined.startswith(f"{output}/"))

    return jax.tree_util.tree_map_with_path(is_head, core)


def chain(name: str, *methods: Method, paper: str = "") -> Method:
    """Composes methods: modes and learned parameters merge, gradients pass left to right.

    Biases of one layer add up and keys of one layer multiply (`bpnjax.networks.linen.merge`). Each part
    sees its own state only, and draws from a PRNG key of its own.

    Args:
      name: the name of the composition.
      *methods: the parts; their states form a tuple, in this order.
      paper: where it was published.

    Returns:
      A `Method`. ``for_eval`` applies left to right as well. It is told the task, trains jointly or
      restarts if one part does; ``masks_outputs`` is not taken over.

    Example:
      >>> from bpnjax.methods import bd, chain, ewc
      >>> method = chain("mine", bd.BD, ewc.EWC)
      >>> method.name, method.told_task, method.layer_fields
      ('mine', True, ('bd',))

    Source: Wen et al. 2020 (arXiv 2009.13954), Sec. V, where BD goes with EWC or with PSP.
    """

    def each(hook, *args):
        return tuple(getattr(method, hook)(*args) for method in methods)

    def check(spec):
        each("check", spec)

    def init(key, core, spec):
        return tuple(m.init(jax.random.fold_in(key, i), core, spec) for i, m in enumerate(methods))

    def fresh(key, spec):
        parts = (m.fresh(jax.random.fold_in(key, i), spec) for i, m in enumerate(methods))
        return {name: part for parts_of in parts for name, part in parts_of.items()}

    def rules(config, optimizer):
        return sum(each("rules", config, optimizer), ())

    def mode(states, task):
        return linen.merge(*(m.mode(s, task) for m, s in zip(methods, states, strict=True)))

    def train_core(core, states, task, key):
        for method, state in zip(methods, states, strict=True):
            core = method.train_core(core, state, task, key)
        return core

    def train_mode(learned, mode):
        for method in methods:
            mode = method.train_mode(learned, mode)
        return mode

    def gradient(grads, core, states, step):
        for method, state in zip(methods, states, strict=True):
            grads = method.gradient(grads, core, state, step)
        return grads

    def after_update(core, states, step):
        for method, state in zip(methods, states, strict=True):
            core = method.after_update(core, state, step)
        return core

    def after_step(states, old, new, grads, step):
        return tuple(
            m.after_step(s, old, new, grads, step) for m, s in zip(methods, states, strict=True)
        )

    def store(core, learned, states, task):
        return tuple(m.store(core, learned, s, task) for m, s in zip(methods, states, strict=True))

    def consolidate(core, states, task, ended, spec):
        return tuple(
            m.consolidate(core, s, task, ended, spec) for m, s in zip(methods, states, strict=True)
        )

    def for_eval(core, states, task):
        for method, state in zip(methods, states, strict=True):
            core = method.for_eval(core, state, task)
        return core

    def renumber(states, slots):
        return tuple(m.renumber(s, slots) for m, s in zip(methods, states, strict=True))

    def stored(states):
        kept = {}
        for method, state in zip(methods, states, strict=True):
            for name, tree in method.stored(state).items():
                kept[name] = linen.merge(kept.get(name, {}), tree)
        return kept

    return Method(
        name=name,
        paper=paper,
        told_task=any(m.told_task for m in methods),
        joint=any(m.joint for m in methods),
        restarts=any(m.restarts for m in methods),
        layer_fields=sum((m.layer_fields for m in methods), ()),
        check=check,
        init=init,
        fresh=fresh,
        rules=rules,
        mode=mode,
        train_core=train_core,
        train_mode=train_mode,
        gradient=gradient,
        after_update=after_update,
        after_step=after_step,
        store=store,
        consolidate=consolidate,
        for_eval=for_eval,
        examples_kept=lambda states: sum(
            m.examples_kept(s) for m, s in zip(methods, states, strict=True)
        ),
        renumber=renumber,
        stored=stored,
    )
