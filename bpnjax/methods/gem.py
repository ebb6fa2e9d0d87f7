r"""GEM and A-GEM: the gradient must not raise the loss on examples kept of earlier tasks.

.. math:: \min_{g'} \frac{1}{2} |g' - g|^2 \quad \text{so that} \quad
          g'^T g_k \ge 0 \text{ for all } k < t

At each step GEM computes the gradient g_k of every earlier task's memory and projects the step's
own gradient g onto what none of them forbids (`bpnjax.optim.projection.gem`, with a margin); A-GEM takes
one gradient on a batch drawn from all memories (`bpnjax.optim.projection.agem`).

The memory of a task is the last examples of its stream: `gem.memories` of them, or of each class
with ``gem.per="class"`` (the BPN paper's GEM(n)). It is filled when the task ends; until then it
is not used.

Source: Lopez-Paz and Ranzato 2017 (arXiv 1706.08840), Eq. 8; Chaudhry et al. 2019 (arXiv
1812.00420), Eq. 11. Variant: the authors' ring counter carries over from task to task, ours starts
anew for each.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bpnjax.methods.base import Ended, Method
from bpnjax.optim import projection


class Memory(NamedTuple):
    """The examples that GEM and A-GEM keep of each task, by their slots."""

    slots: jax.Array  # int32 [T, M]
    real: jax.Array  # f32 [T, M], 0 where a task has fewer examples


def init(key, core, spec):
    """The hook `init` of `Method`: an empty `Memory` for all tasks."""
    del key, core
    options = spec.config.gem
    classes = int(spec.classes.sum(1).max()) if options.per == "class" else 1
    shape = (spec.num_tasks, options.memories * classes)
    return Memory(jnp.zeros(shape, jnp.int32), jnp.zeros(shape))


def last_examples(ended: Ended, size: int, per_class: int, num_classes: int):
    """Chooses what is kept of a task: the last examples of its stream.

    Args:
      ended: the task; its ``slots`` int32 ``[N]`` are in the order of the last epoch.
      size: M, places in the memory.
      per_class: if above 0, at most so many of each class.
      num_classes: C, outputs of the network.

    Returns:
      Slots int32 ``[M]`` in the order of the stream, and f32 ``[M]``, 0 for places left empty.

    Source: Lopez-Paz and Ranzato 2017 (arXiv 1706.08840), Sec. 3, the last m examples of each task.
    """
    position = jnp.arange(ended.slots.shape[0])
    chosen = (position < ended.count) & (position >= ended.count - size)
    if per_class:
        labels = ended.examples.labels(ended.slots)
        is_class = jax.nn.one_hot(labels, num_classes, dtype=jnp.int32)
        is_class = is_class * (position < ended.count)[:, None]
        from_end = jnp.cumsum(is_class[::-1], axis=0)[::-1]  # 1 for the last of a class
        rank = jnp.take_along_axis(from_end, labels[:, None], axis=1)[:, 0]
        chosen = (position < ended.count) & (rank <= per_class)
    places = jnp.argsort(~chosen, stable=True)[:size]
    short = size - places.shape[0]  # a memory larger than any task
    slots, real = ended.slots[places], chosen[places].astype(jnp.float32)
    return jnp.pad(slots, (0, short)), jnp.pad(real, (0, short))


def consolidate(core, state, task, ended, spec):
    """The hook `consolidate` of `Method`: keeps the task's `last_examples`."""
    del core
    options = spec.config.gem
    per_class = options.memories if options.per == "class" else 0
    slots, real = last_examples(ended, state.slots.shape[1], per_class, spec.classes.shape[1])
    return Memory(state.slots.at[task].set(slots), state.real.at[task].set(real))


def _memory_gradient(core, step, slots, weight):
    def loss(core):
        losses = step.examples.losses(core, slots)
        return jnp.sum(weight * losses) / jnp.maximum(jnp.sum(weight), 1.0)

    return ravel_pytree(jax.grad(loss)(core))[0]


def _gem_gradient(grads, core, state, step):
    flat, restore = ravel_pytree(grads)
    tasks = state.slots.shape[0]

    def row(k, rows):
        return rows.at[k].set(_memory_gradient(core, step, state.slots[k], state.real[k]))

    rows = jax.lax.fori_loop(0, step.task, row, jnp.zeros((tasks, flat.size)))
    options = step.spec.config.gem
    earlier = jnp.arange(tasks) < step.task
    return restore(projection.gem(flat, rows, earlier, options.margin, options.damping))


def draw(memory: Memory, earlier, key, size: int):
    """Draws examples of earlier tasks' memories, none twice.

    Args:
      memory: all tasks' memories.
      earlier: bool ``[T]``, which tasks to draw from.
      key: typed PRNG key.
      size: how many.

    Returns:
      Slots int32 ``[n]`` and f32 ``[n]``, 0 for places beyond what the memories hold; n is `size`,
      or all places if there are fewer.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from bpnjax.methods import gem
      >>> memory = gem.Memory(jnp.array([[7, 8], [9, 0]]), jnp.array([[1.0, 1.0], [1.0, 0.0]]))
      >>> slots, real = gem.draw(memory, jnp.array([True, False]), jax.random.key(0), size=3)
      >>> sorted(slots[:2].tolist()), real.tolist()
      ([7, 8], [1.0, 1.0, 0.0])
    """
    real = (memory.real * earlier[:, None]).reshape(-1)
    # The places with the largest of independent numbers: one number a place, not one a draw.
    lots = jnp.where(real > 0, jax.random.uniform(key, real.shape), -1.0)
    places = jax.lax.top_k(lots, min(size, real.shape[0]))[1]
    return memory.slots.reshape(-1)[places], real[places]


def _agem_gradient(grads, core, state, step):
    flat, restore = ravel_pytree(grads)
    earlier = jnp.arange(state.real.shape[0]) < step.task
    slots, weight = draw(state, earlier, step.key, step.spec.config.gem.batch_size)
    reference = _memory_gradient(core, step, slots, weight)  # zero while nothing is kept
    return restore(projection.agem(flat, reference))


GEM = Method(
    name="gem",
    paper="Lopez-Paz and Ranzato 2017, arXiv 1706.08840",
    init=init,
    gradient=_gem_gradient,
    consolidate=consolidate,
    examples_kept=lambda state: state.slots.size,
    renumber=lambda state, slots: state._replace(slots=slots(state.slots)),
)
AGEM = Method(
    name="agem",
    paper="Chaudhry et al. 2019, arXiv 1812.00420",
    init=init,
    gradient=_agem_gradient,
    consolidate=consolidate,
    examples_kept=lambda state: state.slots.size,
    renumber=lambda state, slots: state._replace(slots=slots(state.slots)),
)
