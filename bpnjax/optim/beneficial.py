"""The beneficial step of BPN and its control, as optax transformations."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr

from bpnjax.optim.partition import partition_by_path

__all__ = ["OPTIMIZERS", "beneficial_perturbation", "beneficial_sign", "matched_step"]

OPTIMIZERS = {
    "adam": optax.adam,
    "adamw": optax.adamw,
    "adagrad": optax.adagrad,
    "momentum": lambda learning_rate: optax.sgd(learning_rate, momentum=0.9),
    "rmsprop": optax.rmsprop,
    "sgd": optax.sgd,
}


def _of_epsilon(
    step: Callable[[Any, Any], Any], epsilon: float | jax.Array | optax.Schedule
) -> optax.GradientTransformation:
    """The transformation ``step(updates, size)`` with a fixed size or a schedule of it."""
    if isinstance(epsilon, (int, float)) and not 0 <= epsilon < float("inf"):
        raise ValueError(f"epsilon: {epsilon} is no step length; give a finite number of 0 or more")
    if not callable(epsilon):
        return optax.stateless(lambda updates, params: step(updates, epsilon))

    def init(params: Any) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(jnp.zeros([], jnp.int32))

    def update(
        updates: Any, state: Any, params: Any = None
    ) -> tuple[Any, optax.ScaleByScheduleState]:
        del params
        count = optax.safe_increment(state.count)
        return step(updates, epsilon(state.count)), optax.ScaleByScheduleState(count)

    return optax.GradientTransformation(init, update)


def beneficial_sign(epsilon: float | jax.Array | optax.Schedule) -> optax.GradientTransformation:
    r"""The beneficial step: a fixed distance against the sign of the gradient.

    .. math:: u = -\epsilon \, \mathrm{sign}(g)

    It is FGSM with the sign reversed, applied to the factors ``M`` of the task biases: the
    direction that makes the true class more likely. This is the whole update; no learning rate
    multiplies it. The sign must be taken of the gradient of the whole batch: across devices,
    average gradients first, since the sign of a mean is not the mean of signs.

    Args:
      epsilon: the step; a positive float, a scalar array, or a schedule of the step count.

    Returns:
      An `optax.GradientTransformation`. Updates have the dtype of the gradients; a gradient of 0
      stays 0 and NaN stays NaN. It is `optax.sign_sgd` at the learning rate epsilon, under the name
      and with the meaning of the paper.

    Raises:
      ValueError: a negative epsilon, which would be the adversarial direction.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax import optim
      >>> tx = optim.beneficial_sign(0.125)
      >>> updates, _ = tx.update(jnp.array([3.0, -0.001, 0.0]), tx.init(jnp.zeros(3)))
      >>> updates.tolist()
      [-0.125, 0.125, -0.0]

    Source: Wen et al. 2020 (arXiv 2009.13954), Sec. V and Alg. 2. Variant: the paper calls
    ``epsilon * sign`` a gradient and does not say which optimizer it is handed to (the lab's
    prototype of a later paper multiplies it by the learning rate); here it is the update.
    """

    def step(updates: Any, size: Any) -> Any:
        return jax.tree.map(lambda g: (-size * jnp.sign(g)).astype(g.dtype), updates)

    return _of_epsilon(step, epsilon)


def matched_step(epsilon: float | jax.Array | optax.Schedule) -> optax.GradientTransformation:
    r"""A step along the gradient, as long as `beneficial_sign`'s: the control for its direction.

    .. math:: u = -\epsilon \sqrt{n} \, g / |g|_2

    per leaf, with n its number of elements, so that ``|u|`` is that of ``epsilon * sign(g)``.

    Args:
      epsilon: the step of the `beneficial_sign` to be matched; a schedule as there.

    Returns:
      An `optax.GradientTransformation`; a gradient of 0 stays 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax import optim
      >>> tx = optim.matched_step(0.5)
      >>> tx.update(jnp.array([3.0, 0.0, 0.0, 4.0]), tx.init(jnp.zeros(4)))[0].round(3).tolist()
      [-0.6000000238418579, -0.0, -0.0, -0.800000011920929]

    Source: ours; the paper's GD+EWC confounds the direction with the length of the step.
    """

    def step(updates: Any, size: Any) -> Any:
        def one(g: jax.Array) -> jax.Array:
            # Scaled first: squares of small or bf16 gradients would vanish or lose their digits.
            most = jnp.max(jnp.abs(g), initial=0.0)
            unit = g.astype(jnp.float32) / jnp.where(most == 0, 1.0, most)
            length = jnp.sqrt(jnp.sum(jnp.square(unit)))
            unit = unit / jnp.where(length == 0, 1.0, length)
            return (-size * g.size**0.5 * unit).astype(g.dtype)

        return jax.tree.map(one, updates)

    return _of_epsilon(step, epsilon)


def beneficial_perturbation(
    tx: optax.GradientTransformation,
    epsilon: float | jax.Array | optax.Schedule,
    factor: str = r"(^|/)M(/value)?$",
) -> optax.GradientTransformationExtraArgs:
    """Trains a parameter tree with `tx`, but its factors ``M`` with the beneficial sign step.

    Args:
      tx: any optax optimizer, for every leaf that is not a factor.
      epsilon: as in `beneficial_sign`.
      factor: regular expression, searched in a leaf's path (keys joined by ``/``), that the
        factors match; by default a leaf named ``M``, also as the value of an `nnx.Param`.

    Returns:
      A `partition_by_path` with these two rules.

    Raises:
      ValueError: at ``init``, if no leaf matches ``factor``: then nothing would be beneficial.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from bpnjax import optim
      >>> params = {"core": jnp.ones(2), "bd": {"M": jnp.zeros((1, 2)), "W": jnp.ones((2, 3))}}
      >>> tx = optim.beneficial_perturbation(optax.sgd(0.5), epsilon=0.125)
      >>> updates, _ = tx.update(params, tx.init(params), params)  # gradients = params here
      >>> updates["core"].tolist(), updates["bd"]["M"].tolist()
      ([-0.5, -0.5], [[-0.0, -0.0]])

    Source: Wen et al. 2020 (arXiv 2009.13954), Alg. 2.
    """
    both = partition_by_path([(factor, beneficial_sign(epsilon)), (f"^(?!.*(?:{factor}))", tx)])

    def init(params: Any) -> Any:
        paths = [
            keystr(path, simple=True, separator="/")
            for path, _ in jax.tree_util.tree_leaves_with_path(params)
        ]
        if not any(re.search(factor, path) for path in paths):
            raise ValueError(f"no leaf matches the factor pattern {factor!r} among {paths}")
        return both.init(params)

    return optax.GradientTransformationExtraArgs(init, both.update)
