r"""Experience replay and its variants: examples from a reservoir of earlier ones join each step.

`er` trains on the batch together with a draw :math:`B_1` from the replay memory,

.. math:: \frac{1}{|B| + |B_1|} \sum_{b \in B \cup B_1} CE(z_b(\theta), y_b)

or, with ``combine="sum"``, on the sum of the two means. `der` and `derpp` add to the mean loss

.. math:: \alpha \frac{1}{|B_1| C} \sum_{b \in B_1} |z_b(\theta) - z_b|^2
          + \beta \frac{1}{|B_2|} \sum_{b \in B_2} CE(z_b(\theta), y_b)

where :math:`B_1, B_2` are two independent draws from the memory and :math:`z_b` the C outputs that
the network gave when the example entered it. `der` has :math:`\beta = 0`.

Examples enter the memory after the step that trained on them, with the outputs before that step in
training mode. A method with modes answers each stored example in the mode of its own task.

Source: Chaudhry et al. 2019 (arXiv 1902.10486) for ER on the union; Buzzega et al. 2020 (arXiv
2004.07211), Eq. 5 and 6, for DER and DER++. Variant: the squared difference is averaged over
outputs, as in the authors' code. The paper writes a norm, which is a sum, but its alphas were found
with that code.
"""

from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from bpnjax.methods import replay
from bpnjax.methods.base import Batch, Context, Method, Setup
from bpnjax.methods.settings import Range, Setting, register
from bpnjax.utils import prng

MemorySize = Annotated[int, Setting("number of examples in the replay memory", at_least=1)]
BatchSize = Annotated[int, Setting("number of stored examples in a step", at_least=1)]
Alpha = Annotated[
    float,
    Setting(
        "der, derpp: weight of the distance to the stored outputs",
        at_least=0,
        search=(Range(0.03, 3.0),),
    ),
]


class ReplayState(NamedTuple):
    """The state of ER, DER and DER++."""

    memory: replay.Reservoir
    alpha: jax.Array  # weight of the outputs, shape=()
    beta: jax.Array  # weight of the labels, shape=()


def _reservoir(setup: Setup, size: int, who: str, outputs: bool) -> replay.Reservoir:
    example = setup.stored_example(who)
    shape: tuple[int, ...] | None = None
    if outputs:
        network = setup.network
        params, variables = jax.eval_shape(network.init, prng.key(0))
        answer, _ = jax.eval_shape(
            lambda p, v, x: network.apply(p, {}, x, variables=v),
            params,
            variables,
            network.example,
        )
        shape = answer.shape[1:]
    return replay.empty(size, example, setup.label, shape)


def _replaying(
    who: str, memory_size: int, batch_size: int, alpha: float, beta: float, combine: str
) -> Method:
    keeps_outputs = who != "er"
    uses_labels = who != "der"

    def init(key: Any, params: Any, setup: Setup) -> ReplayState:
        del key, params
        memory = _reservoir(setup, memory_size, who, keeps_outputs)
        return ReplayState(memory, jnp.float32(alpha), jnp.float32(beta))

    def gradient(grads: Any, params: Any, state: ReplayState, batch: Batch, ctx: Context) -> Any:
        first, second = jax.random.split(jax.random.fold_in(ctx.key, 0))
        if keeps_outputs:
            drawn, there = replay.draw(state.memory, first, batch_size)

            def distance(answers: jax.Array) -> jax.Array:
                return jnp.mean(jnp.square(answers - drawn.outputs))

            more = replay.gradient(params, drawn, there, distance, ctx)
            grads = replay.add(grads, more, state.alpha * there)
        if uses_labels:
            labelled, there = replay.draw(state.memory, second, batch_size)

            def loss(answers: jax.Array) -> jax.Array:
                return ctx.loss_of(answers, labelled.y, labelled.task).mean()

            more = replay.gradient(params, labelled, there, loss, ctx)
            if combine == "union":
                share = there * batch_size / (batch.weight.sum() + there * batch_size)
                return jax.tree.map(lambda g, m: (1.0 - share) * g + share * m, grads, more)
            grads = replay.add(grads, more, state.beta * there)
        return grads

    def end_step(
        old: Any, new: Any, grads: Any, state: ReplayState, batch: Batch, ctx: Context
    ) -> tuple[Any, ReplayState]:
        del grads
        # As in training: early running statistics of BatchNorm would give outputs of a wrong size.
        answers = ctx.trained(old, batch.x, batch.task)[0] if keeps_outputs else None
        memory = replay.offer(state.memory, jax.random.fold_in(ctx.key, 1), batch, answers)
        return new, state._replace(memory=memory)

    return Method(init=init, gradient=gradient, end_step=end_step)


@register("er", group="replay", paper="Chaudhry et al. 2019, arXiv 1902.10486")
def er(
    memory_size: MemorySize = 500,
    batch_size: BatchSize = 128,
    combine: Annotated[
        str,
        Setting(
            "er: mean over batch and stored examples together (union), or the sum of both means",
            choices=("union", "sum"),
        ),
    ] = "union",
) -> Method:
    """Experience replay; see the top of this file for the formula."""
    return _replaying("er", memory_size, batch_size, 0.0, 1.0, combine)


@register("der", group="replay", paper="Buzzega et al. 2020, arXiv 2004.07211")
def der(memory_size: MemorySize = 500, batch_size: BatchSize = 128, alpha: Alpha = 1.0) -> Method:
    """Dark experience replay, which stores outputs; see the top of this file for the formula."""
    return _replaying("der", memory_size, batch_size, alpha, 0.0, "sum")


@register("derpp", group="replay", paper="Buzzega et al. 2020, arXiv 2004.07211")
def derpp(
    memory_size: MemorySize = 500,
    batch_size: BatchSize = 128,
    alpha: Alpha = 1.0,
    beta: Annotated[
        float,
        Setting(
            "derpp: weight of the cross-entropy of stored examples",
            at_least=0,
            search=(Range(0.1, 3.0),),
        ),
    ] = 0.5,
) -> Method:
    """DER++, which stores outputs and labels; see the top of this file for the formula."""
    return _replaying("derpp", memory_size, batch_size, alpha, beta, "sum")
