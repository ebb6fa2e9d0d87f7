r"""GEM and A-GEM: a step must not raise the loss on stored examples of earlier tasks.

.. math:: \min_{g'} \frac{1}{2} |g' - g|^2 \quad \text{so that} \quad
          g'^T g_k \ge 0 \text{ for all } k < t

In each step GEM computes the gradient g_k on the memory of every earlier task, and projects the
step's gradient g so that it conflicts with none of them (`bpnjax.optim.projection.gem`, with a
margin). A-GEM uses one gradient on a batch drawn from all memories
(`bpnjax.optim.projection.agem`).

The memory of a task holds the last examples of its stream: ``memories`` of them, or as many of each
class with ``per="class"`` (GEM(n) in the BPN paper). It is filled when the task ends.

Source: Lopez-Paz and Ranzato 2017 (arXiv 1706.08840), Eq. 8; Chaudhry et al. 2019 (arXiv
1812.00420), Eq. 11. Variant: the authors' ring counter continues from task to task; here it starts
anew for each task.
"""

from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bpnjax.methods.base import Batch, Context, Method, Setup, TaskData
from bpnjax.methods.settings import Range, Setting, register
from bpnjax.optim import projection

Memories = Annotated[int, Setting("number of examples stored per task, or per class", at_least=1)]
Per = Annotated[
    str,
    Setting(
        "what gem.memories counts for: task (as in GEM's code) or class (GEM(n) of the BPN paper)",
        choices=("task", "class"),
    ),
]


class Memory(NamedTuple):
    """The stored examples of each task, in their own dtype."""

    x: jax.Array  # [T, M, ...]
    y: jax.Array  # [T, M, ...]
    real: jax.Array  # f32 [T, M], 0 for empty places


def last_examples(data: TaskData, size: int, per_class: int, num_classes: int) -> Any:
    """Chooses the examples to store: the last ones of a task's stream.

    Args:
      data: of the task that ended, in the order of its last epoch.
      size: M, places in the memory.
      per_class: if above 0, the largest number per class.
      num_classes: C, outputs of the network.

    Returns:
      Examples ``[M, ...]`` and labels ``[M, ...]`` in the order of the stream, and f32 ``[M]``, 0
      for empty places.

    Source: Lopez-Paz and Ranzato 2017 (arXiv 1706.08840), Sec. 3, the last m examples of each task.
    """
    position = jnp.arange(data.size)
    chosen = (position < data.count) & (position >= data.count - size)
    if per_class:
        labels = data.take(position)[1]
        is_class = jax.nn.one_hot(labels, num_classes, dtype=jnp.int32)
        is_class = is_class * (position < data.count)[:, None]
        from_end = jnp.cumsum(is_class[::-1], axis=0)[::-1]  # 1 for the last of a class
        rank = jnp.take_along_axis(from_end, labels[:, None], axis=1)[:, 0]
        chosen = (position < data.count) & (rank <= per_class)
    places = jnp.argsort(~chosen, stable=True)[:size]
    real = chosen[places].astype(jnp.float32)
    short = size - places.shape[0]  # a memory larger than any task
    x, y = data.take(jnp.pad(places, (0, short)))
    return x, y, jnp.pad(real, (0, short))


def draw(memory: Memory, earlier: jax.Array, key: Any, size: int) -> Any:
    """Draws examples from the memories of earlier tasks, without replacement.

    Args:
      memory: of all tasks.
      earlier: bool ``[T]``, the tasks to draw from.
      key: typed PRNG key.
      size: number of examples.

    Returns:
      Examples ``[n, ...]``, labels ``[n, ...]``, their tasks int32 ``[n]``, and f32 ``[n]``, 0 for
      places that could not be filled. n is ``size``, or the number of all places if that is less.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from bpnjax.methods.gem import Memory, draw
      >>> x = jnp.array([[7, 8], [9, 0]])
      >>> memory = Memory(x, x, jnp.array([[1.0, 1.0], [1.0, 0.0]]))
      >>> x, y, task, real = draw(memory, jnp.array([True, False]), jax.random.key(0), size=3)
      >>> sorted(x[:2].tolist()), real.tolist()
      ([7, 8], [1.0, 1.0, 0.0])
    """
    tasks, places = memory.real.shape
    real = (memory.real * earlier[:, None]).reshape(-1)
    # Draws one random number per place and takes the largest ones.
    lots = jnp.where(real > 0, jax.random.uniform(key, real.shape, jnp.float32), -1.0)
    chosen = jax.lax.top_k(lots, min(size, tasks * places))[1]
    row, column = chosen // places, chosen % places
    return memory.x[row, column], memory.y[row, column], row, real[chosen]


def _memory_gradient(params: Any, ctx: Context, x: Any, y: Any, task: Any, weight: Any) -> Any:
    def loss(params: Any) -> jax.Array:
        losses = ctx.losses(params, x, y, task)
        return jnp.sum(weight * losses) / jnp.maximum(jnp.sum(weight), 1.0)

    return ravel_pytree(jax.grad(loss)(params))[0]


def _remembering(who: str, memories: int, per: str, gradient: Any) -> Method:
    def check(setup: Setup) -> None:
        if per == "class":
            setup.known_classes(f"{who} with memories per class")

    def init(key: Any, params: Any, setup: Setup) -> Memory:
        del key, params
        classes = 1
        if per == "class":
            classes = int(setup.known_classes(who).sum(1).max())
        shape, example = (setup.num_tasks, memories * classes), setup.stored_example(who)
        return Memory(
            jnp.zeros((*shape, *example.shape), example.dtype),
            jnp.zeros((*shape, *setup.label.shape), setup.label.dtype),
            jnp.zeros(shape, jnp.float32),
        )

    def end_task(
        params: Any, task_params: Any, state: Memory, data: TaskData, ctx: Context
    ) -> tuple[Any, Memory]:
        del task_params
        per_class = memories if per == "class" else 0
        found = last_examples(data, state.real.shape[1], per_class, ctx.setup.num_outputs)
        kept = [s.at[ctx.current].set(f) for s, f in zip(state, found, strict=True)]
        return params, Memory(*kept)

    return Method(check=check, init=init, gradient=gradient, end_task=end_task)


@register("gem", paper="Lopez-Paz and Ranzato 2017, arXiv 1706.08840")
def gem(
    memories: Memories = 256,
    per: Per = "task",
    margin: Annotated[
        float,
        Setting(
            "gem: smallest weight of a task's gradient when any gradient conflicts",
            at_least=0,
            search=(Range(0.0, 1.0, "linear"),),
        ),
    ] = 0.5,
    damping: Annotated[
        float, Setting("gem: number added to the diagonal of the dual problem", at_least=0)
    ] = 1e-3,
) -> Method:
    """GEM; see the top of this file for the formula."""

    def gradient(grads: Any, params: Any, state: Memory, batch: Batch, ctx: Context) -> Any:
        del batch
        flat, restore = ravel_pytree(grads)
        tasks = state.real.shape[0]

        def row(k: Any, rows: jax.Array) -> jax.Array:
            found = _memory_gradient(params, ctx, state.x[k], state.y[k], k, state.real[k])
            return rows.at[k].set(found)

        rows = jax.lax.fori_loop(0, ctx.current, row, jnp.zeros((tasks, flat.size), jnp.float32))
        earlier = jnp.arange(tasks) < ctx.current
        return restore(projection.gem(flat, rows, earlier, margin, damping))

    return _remembering("gem", memories, per, gradient)


@register("agem", group="gem", paper="Chaudhry et al. 2019, arXiv 1812.00420")
def agem(
    memories: Memories = 256,
    per: Per = "task",
    batch_size: Annotated[
        int, Setting("agem: stored examples in the reference gradient", at_least=1)
    ] = 256,
) -> Method:
    """A-GEM; see the top of this file for the formula."""

    def gradient(grads: Any, params: Any, state: Memory, batch: Batch, ctx: Context) -> Any:
        del batch
        flat, restore = ravel_pytree(grads)
        earlier = jnp.arange(state.real.shape[0]) < ctx.current
        x, y, task, weight = draw(state, earlier, ctx.key, batch_size)
        # Zero while the memory is empty.
        reference = _memory_gradient(params, ctx, x, y, task, weight)
        return restore(projection.agem(flat, reference))

    return _remembering("agem", memories, per, gradient)
