r"""The common part of methods with an analytic head: sums over features of a frozen network.

The features z of an example are the input of the network's output layer. A method of this kind
trains nothing: parameters and running statistics stay as they are, pretrained or random. When a
task ends, one pass over its examples adds to sums per class, and a head is solved from all sums so
far. This head replaces the output layer. Sums do not depend on the order of examples, and so
neither do the answers.

The training steps change nothing, so one epoch suffices (``train.epochs=1``). The loss and accuracy
that they report belong to the network's own output layer, which is never used to answer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bpnjax.methods.base import Batch, Context, Method, Setup, TaskData
from bpnjax.utils.errors import UserError
from bpnjax.utils.heads import FAR_BELOW

__all__ = [
    "AnalyticState",
    "ClassSums",
    "LinearHead",
    "analytic",
    "apart",
    "apply_linear",
    "class_sums",
    "empty_linear",
    "guessed_means",
    "linear_head",
    "product",
]

_FIRST = 512  # number of examples for the first guess of the class means


class LinearHead(NamedTuple):
    """A linear output layer. Classes that were never seen have a very low bias."""

    kernel: jax.Array  # f32 [d, C]
    bias: jax.Array  # f32 [C]


class AnalyticState(NamedTuple):
    """The state of a method with an analytic head."""

    sums: Any  # over the examples of all tasks so far
    head: Any  # solved from the sums; it gives the answers
    settings: Any  # arrays that the solution needs


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """A matrix product in full f32, also on accelerators, for sums that are inverted later.

    Args:
      a: f32 ``[m, k]``.
      b: f32 ``[k, n]``.

    Returns:
      f32 ``[m, n]``.
    """
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


class ClassSums(NamedTuple):
    """Sums per class."""

    examples: jax.Array  # f32 [C]
    total: jax.Array  # sum of the features, f32 [C, d]

    @property
    def means(self) -> jax.Array:
        """The mean features of each class, f32 ``[C, d]``; 0 for classes without examples."""
        return self.total / jnp.maximum(self.examples, 1.0)[:, None]

    @staticmethod
    def empty(classes: int, inputs: int) -> "ClassSums":
        """Sums without examples, for C classes and d features."""
        return ClassSums(jnp.zeros(classes, jnp.float32), jnp.zeros((classes, inputs), jnp.float32))


def class_sums(features: jax.Array, classes: jax.Array) -> ClassSums:
    """The sums of one batch.

    Args:
      features: f32 ``[n, d]``.
      classes: one-hot f32 ``[n, C]``, 0 in rows of padding.

    Returns:
      `ClassSums`.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.methods.analytic import class_sums
      >>> features, classes = jnp.array([[1.0], [3.0]]), jnp.array([[0.0, 1.0], [0.0, 1.0]])
      >>> class_sums(features, classes).means.tolist()
      [[0.0], [2.0]]
    """
    return ClassSums(classes.sum(0), product(classes.T, features))


def guessed_means(features: jax.Array, classes: jax.Array) -> jax.Array:
    r"""Means of classes from a few examples, to be subtracted before products are summed.

    A covariance from sums of products loses as many digits as the means take up. After the
    subtraction the means are small, and what is left of them is corrected exactly.

    Args:
      features: f32 ``[n, d]``.
      classes: one-hot f32 ``[n, C]``, 0 in rows of padding.

    Returns:
      f32 ``[C, d]``; the mean of all examples for classes without one.
    """
    sums = class_sums(features, classes)
    mean = sums.total.sum(0) / jnp.maximum(sums.examples.sum(), 1.0)
    return jnp.where(sums.examples[:, None] > 0, sums.means, mean)


def apart(old: ClassSums, new: ClassSums) -> tuple[jax.Array, jax.Array]:
    r"""The scatter that the different means of two sets of examples add.

    .. math:: S = S_a + S_b + w \, \delta \delta^T, \quad \delta = \mu_b - \mu_a, \quad
              w = \frac{n_a n_b}{n_a + n_b}

    Args:
      old: sums of the set a.
      new: sums of the set b.

    Returns:
      w f32 ``[C]``, 0 for classes that only one of them has, and delta f32 ``[C, d]``.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.methods.analytic import ClassSums, apart
      >>> one, other = (ClassSums(jnp.ones(1), jnp.array([[z]])) for z in (1.0, 5.0))
      >>> weight, delta = apart(one, other)  # the scatter of 1 and 5 is 2 x 2^2
      >>> (weight[:, None] * delta**2).tolist()
      [[8.0]]

    Source: Chan et al. 1979, "Updating formulae and a pairwise algorithm for computing sample
    variances".
    """
    weight = old.examples * new.examples / jnp.maximum(old.examples + new.examples, 1.0)
    return weight, new.means - old.means


def empty_linear(inputs: int, classes: int) -> LinearHead:
    """A linear head that has seen no class.

    Args:
      inputs: d.
      classes: C.

    Returns:
      `LinearHead`.
    """
    return LinearHead(
        jnp.zeros((inputs, classes), jnp.float32), jnp.full(classes, FAR_BELOW, jnp.float32)
    )


def linear_head(kernel: jax.Array, bias: jax.Array, count: jax.Array) -> LinearHead:
    """A linear head in which classes without examples cannot win.

    Args:
      kernel: f32 ``[d, C]``.
      bias: f32 ``[C]``.
      count: number of examples of each class so far, f32 ``[C]``.

    Returns:
      `LinearHead`.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.methods.analytic import apply_linear, linear_head
      >>> head = linear_head(jnp.ones((1, 2)), jnp.zeros(2), count=jnp.array([3.0, 0.0]))
      >>> apply_linear(head, jnp.ones((1, 1))).tolist()
      [[1.0, -1000000000.0]]
    """
    seen = count > 0
    return LinearHead(jnp.where(seen, kernel, 0.0), jnp.where(seen, bias, FAR_BELOW))


def apply_linear(head: LinearHead, features: jax.Array) -> jax.Array:
    """The outputs of a linear head.

    Args:
      head: `LinearHead`.
      features: f32 ``[n, d]``.

    Returns:
      f32 ``[n, C]``.
    """
    return product(features, head.kernel) + head.bias


def analytic(
    name: str,
    init: Callable[[Any, int, int], AnalyticState],
    learn: Callable[[AnalyticState, Callable[..., Any], Callable[[], Any]], AnalyticState],
    outputs: Callable[[AnalyticState, jax.Array], jax.Array],
    trains: str = "in turn",
    prepare: Callable[[AnalyticState, int], AnalyticState] = lambda state, inputs: state,
) -> Method:
    """Makes a method from sums over features and a head that is solved from them.

    Args:
      name: of the method, for messages.
      init: ``(key, d, C) -> state``, before the first task.
      learn: ``(state, sums, first) -> state`` at the end of a task. ``sums(add, like)`` runs
        ``add(total, places int32 [n], features f32 [n, d], classes f32 [n, C]) -> total`` over all
        examples, from zeros of the shapes of ``like``, and ``first()`` gives features and classes
        of a few. A row of ``classes`` is one-hot; rows of padding are 0, in ``features`` as well.
      outputs: ``(state, features f32 [n, d]) -> f32 [n, C]``.
      trains: as of `bpnjax.methods.Method`.
      prepare: ``(state, d) -> state``, otherwise the same.

    Returns:
      `Method`.
    """

    def check(setup: Setup) -> None:
        setup.need_cross_entropy(name)
        layers = setup.network.layers
        path = next(reversed(layers), "")
        if setup.network.tapped is None or not layers:
            raise UserError(
                f"network: {name} needs to know what enters the output layer, which "
                f"{setup.network.name} does not show; build it with networks.from_linen or "
                "networks.from_nnx"
            )
        output = layers[path]
        if output.kind != "dense" or output.rank != 2 or not output.plain:
            raise UserError(
                f"network: {name} takes the place of a dense output layer on features [n, d], and "
                f"the last layer of {setup.network.name}, {path!r}, is not one; let the network "
                "end in nn.Dense"
            )

    def inputs_of(setup: Setup) -> int:
        return setup.network.layers[next(reversed(setup.network.layers))].inputs

    def start(key: Any, params: Any, setup: Setup) -> AnalyticState:
        del params
        return init(key, inputs_of(setup), setup.num_outputs)

    def gradient(grads: Any, params: Any, state: Any, batch: Batch, ctx: Context) -> Any:
        # The gradient is not used, so the compiler drops the whole backward pass.
        del params, state, batch, ctx
        return jax.tree.map(jnp.zeros_like, grads)

    def end_step(
        old: Any, new: Any, grads: Any, state: Any, batch: Batch, ctx: Context
    ) -> tuple[Any, Any]:
        del new, grads, batch, ctx
        return old, state

    def end_task(
        params: Any, task_params: Any, state: AnalyticState, data: TaskData, ctx: Context
    ) -> tuple[Any, AnalyticState]:
        del task_params
        path = next(reversed(ctx.setup.network.layers))

        def entering(x: Any, y: Any, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
            features = ctx.features(params, x, ctx.current, (path,))[path]
            classes = jax.nn.one_hot(y, ctx.setup.num_outputs, dtype=jnp.float32) * weights[:, None]
            return jnp.where(weights[:, None] > 0, features, 0.0), classes

        def sums(add: Callable[..., Any], like: Any) -> Any:
            def one(total: Any, places: jax.Array, x: Any, y: Any, weights: jax.Array) -> Any:
                return add(total, places, *entering(x, y, weights))

            return data.sums(one, like)

        def first() -> tuple[jax.Array, jax.Array]:
            places = jnp.arange(_FIRST)
            x, y = data.take(jnp.minimum(places, data.size - 1))
            return entering(x, y, jnp.asarray(places < data.count, jnp.float32))

        return params, learn(state, sums, first)

    def output_layer(state: AnalyticState, features: jax.Array, ctx: Context) -> jax.Array:
        del ctx
        return outputs(state, features)

    return Method(
        trains=trains,
        check=check,
        init=start,
        gradient=gradient,
        end_step=end_step,
        end_task=end_task,
        output_layer=output_layer,
        prepare=lambda state, setup: prepare(state, inputs_of(setup)),
    )
