"""The beneficial step of BPN and its controls, as optax transformations."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr

from bpnjax.optim.partition import partition_by_path

__all__ = [
    "DIRECTIONS",
    "OPTIMIZERS",
    "STEPS",
    "beneficial_perturbation",
    "beneficial_sign",
    "falling",
    "matched_step",
    "relative_step",
]

STEPS = ("relative", "absolute")
DIRECTIONS = ("sign", "gradient")
_MEASURE = r"(^|/)measure(/value)?$"

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
    epsilon = _checked(epsilon)
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


def _checked(epsilon: Any) -> Any:
    if isinstance(epsilon, (int, float)) and not 0 <= epsilon < float("inf"):
        raise ValueError(
            f"epsilon: {epsilon} is not a step length; give a finite number of 0 or more"
        )
    return epsilon


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
        return jax.tree.map(lambda g: _against_sign(g, size), updates)

    return _of_epsilon(step, epsilon)


def _along(g: jax.Array, size: Any) -> jax.Array:
    """A step against a gradient, as long as one of ``size`` against its sign."""
    # Scaled first: squares of small or bf16 gradients would vanish or lose their digits.
    most = jnp.max(jnp.abs(g), initial=0.0)
    unit = g.astype(jnp.float32) / jnp.where(most == 0, 1.0, most)
    length = jnp.sqrt(jnp.sum(jnp.square(unit)))
    unit = unit / jnp.where(length == 0, 1.0, length)
    return (-size * g.size**0.5 * unit).astype(g.dtype)


def _against_sign(g: jax.Array, size: Any) -> jax.Array:
    return (-size * jnp.sign(g)).astype(g.dtype)


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
        return jax.tree.map(lambda g: _along(g, size), updates)

    return _of_epsilon(step, epsilon)


def falling(size: float | jax.Array) -> optax.Schedule:
    r"""A schedule that does not need the number of steps: a size over the square root of the count.

    .. math:: s_t = s / \sqrt{1 + t}

    Args:
      size: s, the first step.

    Returns:
      A schedule: step count from 0 to a scalar.

    Example:
      >>> from bpnjax import optim
      >>> round(float(optim.falling(0.1)(3)), 4)
      0.05

    Source: the usual rate of stochastic subgradient methods (Nemirovski et al. 2009).
    """
    return lambda count: size * jax.lax.rsqrt(1.0 + jnp.asarray(count, jnp.float32))


def relative_step(
    size: float | jax.Array | optax.Schedule = 0.2, direction: str = "sign"
) -> optax.GradientTransformation:
    r"""The beneficial step relative to the size of the layer's outputs.

    One size serves all networks.

    .. math:: u = -\frac{s}{\sqrt{1 + t}} \, r_l \, \mathrm{sign}(g), \quad
              r_l = \sqrt{m_0 / m_1}

    with t the steps so far and :math:`r_l` the root mean square of the outputs of layer l on the
    batch of this step, before the bias is added. It comes as the gradient of a leaf named
    ``measure`` beside the leaves of the layer, see `bpnjax.networks.measured`. So the rule keeps
    nothing but a count of steps, and asks for no forward pass of its own. If all outputs of a layer
    are multiplied by a number, its biases and their steps are, too.

    Args:
      size: s, without a unit. A schedule of the step count replaces all of s / sqrt(1 + t).
      direction: ``"sign"``, or ``"gradient"`` for a step along the gradient that is as long, as in
        `matched_step`.

    Returns:
      An `optax.GradientTransformation` for trees in which each leaf has a leaf ``measure`` beside
      it, f32 ``[2]``; the updates of these are 0. Where a layer was not measured the updates are
      NaN.

    Raises:
      ValueError: a negative size, another direction, or at ``init`` a leaf without a ``measure``.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax import optim
      >>> tx = optim.relative_step(0.5)
      >>> params = {"out": {"M": jnp.zeros((1, 2)), "measure": jnp.zeros(2)}}
      >>> grads = {"out": {"M": jnp.array([[7.0, -1.0]]), "measure": jnp.array([8.0, 2.0])}}
      >>> tx.update(grads, tx.init(params))[0]["out"]["M"].tolist()  # 0.5 sqrt(8 / 2)
      [[-1.0, 1.0]]

    Source: ours. Variant of Wen et al. 2020 (arXiv 2009.13954), Alg. 2, whose step is an absolute
    number.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction: unknown value {direction!r}; use sign or gradient")
    move = _against_sign if direction == "sign" else _along

    def step(updates: Any, size: Any) -> Any:
        scale = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
            if re.search(_MEASURE, _name(path)):
                scale[_layer(path)] = jnp.sqrt(leaf[0] / leaf[1])

        def one(path: Any, leaf: jax.Array) -> jax.Array:
            if re.search(_MEASURE, _name(path)):
                return jnp.zeros_like(leaf)
            return move(leaf, size * scale[_layer(path)])

        return jax.tree_util.tree_map_with_path(one, updates)

    inner = _of_epsilon(step, size if callable(size) else falling(_checked(size)))

    def init(params: Any) -> Any:
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        known = {_layer(path) for path in paths if re.search(_MEASURE, _name(path))}
        bare = [_name(path) for path in paths if _layer(path) not in known]
        if bare:
            raise ValueError(
                f"no leaf 'measure' beside {', '.join(bare)}; add one, jnp.zeros(2), and pass the "
                "layer's output through bpnjax.networks.measured"
            )
        return inner.init(params)

    return optax.GradientTransformation(init, inner.update)


def _name(path: Any) -> str:
    return keystr(path, simple=True, separator="/")


def _layer(path: Any) -> str:
    """What a leaf lies in; the ``value`` of an NNX variable is no level of its own."""
    parts = _name(path).split("/")
    return "/".join(parts[: -2 if parts[-1] == "value" else -1])


def beneficial_perturbation(
    tx: optax.GradientTransformation,
    epsilon: float | jax.Array | optax.Schedule,
    factor: str = r"(^|/)M(/value)?$",
    step: str = "absolute",
    direction: str = "sign",
) -> optax.GradientTransformationExtraArgs:
    """Trains a parameter tree with `tx`, but its factors ``M`` with the beneficial step.

    Args:
      tx: any optax optimizer, for every leaf that is not a factor.
      epsilon: as in `beneficial_sign`; with ``step="relative"`` the size of `relative_step`.
      factor: regular expression, searched in a leaf's path (keys joined by ``/``), that the
        factors match; by default a leaf named ``M``, also as the value of an `nnx.Param`.
      step: ``"absolute"`` as in the paper, or ``"relative"`` to the outputs of the layer, which
        needs a leaf ``measure`` beside each factor.
      direction: ``"sign"``, or ``"gradient"`` for steps of the same length along it.

    Returns:
      A `partition_by_path` with these two rules.

    Raises:
      ValueError: another step or direction; at ``init``, if no leaf matches ``factor`` (then
        nothing would be beneficial) or a factor has no ``measure`` beside it.

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
    if step not in STEPS:
        raise ValueError(f"step: unknown value {step!r}; use relative or absolute")
    if direction not in DIRECTIONS:
        raise ValueError(f"direction: unknown value {direction!r}; use sign or gradient")
    moved = factor
    if step == "relative":
        moved, rule = f"(?:{factor})|(?:{_MEASURE})", relative_step(epsilon, direction)
    else:
        rule = beneficial_sign(epsilon) if direction == "sign" else matched_step(epsilon)
    both = partition_by_path([(moved, rule), (f"^(?!.*(?:{moved}))", tx)])

    def init(params: Any) -> Any:
        paths = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        if not any(re.search(factor, path) for path in paths):
            raise ValueError(f"no leaf matches the factor pattern {factor!r} among {paths}")
        return both.init(params)

    return optax.GradientTransformationExtraArgs(init, both.update)
