"""Gradient transformations for anyone's JAX code: the beneficial sign step, the quadratic anchor.

Both are plain optax transformations and may be chained, partitioned and jitted as any other.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

__all__ = [
    "OPTIMIZERS",
    "add_quadratic_anchor",
    "anchor_gradient",
    "anchor_penalty",
    "beneficial_perturbation",
    "beneficial_sign",
    "layer_rates",
    "matched_step",
    "parse_rates",
    "partition_by_path",
]

OPTIMIZERS = {
    "adam": optax.adam,
    "adamw": optax.adamw,
    "adagrad": optax.adagrad,
    "momentum": lambda learning_rate: optax.sgd(learning_rate, momentum=0.9),
    "rmsprop": optax.rmsprop,
    "sgd": optax.sgd,
}


class EpsilonState(NamedTuple):
    """State of `beneficial_sign` and `matched_step` with a schedule."""

    count: jax.Array  # shape=(), dtype=jnp.int32


def _of_epsilon(step, epsilon) -> optax.GradientTransformation:
    """The transformation ``step(updates, size)`` with a fixed size or a schedule of it."""
    if not callable(epsilon):
        return optax.stateless(lambda updates, params: step(updates, epsilon))

    def init(params):
        del params
        return EpsilonState(jnp.zeros([], jnp.int32))

    def update(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        return step(updates, epsilon(state.count)), EpsilonState(count)

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
      stays 0 and NaN stays NaN.

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

    def step(updates, size):
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

    def step(updates, size):
        def one(g):
            # Scaled first: squares of small or bf16 gradients would vanish or lose their digits.
            most = jnp.max(jnp.abs(g), initial=0.0)
            unit = g.astype(jnp.float32) / jnp.where(most == 0, 1.0, most)
            length = jnp.sqrt(jnp.sum(jnp.square(unit)))
            unit = unit / jnp.where(length == 0, 1.0, length)
            return (-size * g.size**0.5 * unit).astype(g.dtype)

        return jax.tree.map(one, updates)

    return _of_epsilon(step, epsilon)


def _path_string(path) -> str:
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def partition_by_path(
    rules: Sequence[tuple[str, optax.GradientTransformation]],
) -> optax.GradientTransformationExtraArgs:
    """Gives each leaf of a parameter tree the transformation whose pattern its path matches.

    Args:
      rules: pairs of a regular expression and a transformation. The expression is searched in
        the leaf's path, its keys joined by ``/``.

    Returns:
      An `optax.partition` over the rules.

    Raises:
      ValueError: at ``init``, if a leaf matches no rule or more than one; lists their paths.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from bpnjax import optim
      >>> params = {"layer": {"M": jnp.zeros((1, 2)), "W": jnp.ones((2, 3))}}
      >>> rules = [("/M$", optim.beneficial_sign(0.1)), ("/W$", optax.sgd(1.0))]
      >>> tx = optim.partition_by_path(rules)
      >>> _ = tx.init(params)
      >>> optim.partition_by_path([("/M$", optax.sgd(1.0))]).init(params)
      Traceback (most recent call last):
      ...
      ValueError: every leaf must match exactly one rule; layer/W matches none of '/M$'
    """
    patterns = [re.compile(pattern) for pattern, _ in rules]

    def label(params):
        wrong = []

        def one(path, _):
            name = _path_string(path)
            hits = [i for i, pattern in enumerate(patterns) if pattern.search(name)]
            if len(hits) != 1:
                which = ", ".join(repr(patterns[i].pattern) for i in hits or range(len(patterns)))
                wrong.append(f"{name} matches {'' if hits else 'none of '}{which}")
            return str(hits[0]) if hits else ""

        labels = jax.tree_util.tree_map_with_path(one, params)
        if wrong:
            raise ValueError("every leaf must match exactly one rule; " + "; ".join(wrong))
        return labels

    return optax.partition({str(i): tx for i, (_, tx) in enumerate(rules)}, label)


def parse_rates(text: str) -> list[tuple[str, float]]:
    """Reads the rules of `layer_rates` from one line.

    Args:
      text: ``PATTERN=FACTOR``, several separated by semicolons; "" is no rule.

    Returns:
      Pairs of a pattern and a factor.

    Raises:
      ValueError: a part has another form, no regular expression or no number of at least 0.

    Example:
      >>> from bpnjax import optim
      >>> optim.parse_rates("conv_.*=0; output=10")
      [('conv_.*', 0.0), ('output', 10.0)]
    """
    rules = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        pattern, _, number = part.rpartition("=")
        try:
            factor = float(number)
            re.compile(pattern)
        except (ValueError, re.error) as error:
            raise ValueError(
                f"{part!r} is no rule ({error}); write PATTERN=FACTOR, as 'conv_.*=0;output=10'"
            ) from error
        if not pattern or not 0 <= factor < float("inf"):
            raise ValueError(f"{part!r} needs a pattern and a factor of 0 or more")
        rules.append((pattern, factor))
    return rules


def layer_rates(rules: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
    r"""Gives layers learning rates of their own; put it after the optimizer in `optax.chain`.

    .. math:: u'_l = c_l u_l

    A factor of 0 freezes a layer: its update is 0 whatever its gradient is, NaN included.

    Args:
      rules: pairs of a pattern and a factor c. The pattern has to match the whole path of a layer,
        its keys joined by ``/``, as in `bpnjax.modulation.matching`; of several the first counts,
        and a layer that none matches keeps its rate.

    Returns:
      An `optax.GradientTransformation` for trees whose leaves are named ``LAYER/kernel``.

    Raises:
      ValueError: at ``init``, if a pattern matches no layer; lists those there are.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from bpnjax import optim
      >>> params = {"conv_0": {"kernel": jnp.ones(1)}, "output": {"kernel": jnp.ones(1)}}
      >>> tx = optax.chain(optax.sgd(0.5), optim.layer_rates([("conv_.*", 0.0), ("output", 4.0)]))
      >>> updates, _ = tx.update(params, tx.init(params))  # gradients = params here
      >>> updates["conv_0"]["kernel"].tolist(), updates["output"]["kernel"].tolist()
      ([0.0], [-2.0])

    Source: the usual fine-tuning of pretrained networks, a larger rate for a new output layer.
    """
    patterns = [re.compile(pattern) for pattern, _ in rules]

    def init(params):
        layers = dict.fromkeys(
            _path_string(path[:-1]) for path, _ in jax.tree_util.tree_leaves_with_path(params)
        )
        for pattern in patterns:
            if not any(pattern.fullmatch(layer) for layer in layers):
                raise ValueError(
                    f"{pattern.pattern!r} matches no layer; there are: {', '.join(layers)}"
                )
        return optax.EmptyState()

    def one(path, update):
        layer = _path_string(path[:-1])
        hits = (c for p, (_, c) in zip(patterns, rules, strict=True) if p.fullmatch(layer))
        factor = next(hits, 1.0)
        return (factor * update).astype(update.dtype) if factor else jnp.zeros_like(update)

    def update(updates, state, params=None):
        del params
        return jax.tree_util.tree_map_with_path(one, updates), state

    return optax.GradientTransformation(init, update)


def beneficial_perturbation(
    tx: optax.GradientTransformation,
    epsilon: float | jax.Array | optax.Schedule,
    factor: str = r"(^|/)M$",
) -> optax.GradientTransformationExtraArgs:
    """Trains a parameter tree with `tx`, but its factors ``M`` with the beneficial sign step.

    Args:
      tx: any optax optimizer, for every leaf that is not a factor.
      epsilon: as in `beneficial_sign`.
      factor: regular expression, searched in a leaf's path (keys joined by ``/``), that the
        factors match.

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

    def init(params):
        paths = [_path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        if not any(re.search(factor, path) for path in paths):
            raise ValueError(f"no leaf matches the factor pattern {factor!r} among {paths}")
        return both.init(params)

    return optax.GradientTransformationExtraArgs(init, both.update)


def _absent(node) -> bool:
    """Is this a parameter without a gradient: None, or left out by `optax.masked`?"""
    return node is None or isinstance(node, optax.MaskedNode)


def anchor_penalty(params, anchor, importance, strength) -> jax.Array:
    r"""The quadratic anchor as a loss term.

    .. math:: \frac{\lambda}{2} \sum_j F_j (\theta_j - \theta^*_j)^2

    Args:
      params: parameters, any tree.
      anchor: the parameters to stay near, same tree; None for a leaf that is free.
      importance: non-negative weights, same tree (Fisher for EWC, omega for SI and MAS).
      strength: lambda, a scalar.

    Returns:
      The penalty, f32 scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax import optim
      >>> float(optim.anchor_penalty(jnp.array([3.0]), jnp.array([1.0]), jnp.array([0.5]), 10.0))
      10.0

    Source: Kirkpatrick et al. 2017, Eq. 3. Variant: with the factor 1/2 (Wen et al. 2020, Alg. 2,
    writes it without: their strength is half of ours).
    """

    def one(p, a, f):
        if _absent(p) or a is None or f is None:
            return jnp.float32(0)
        return jnp.sum(f * jnp.square(p - a), dtype=jnp.float32)

    terms = jax.tree.map(one, params, anchor, importance, is_leaf=_absent)
    return 0.5 * strength * jax.tree.reduce(jnp.add, terms, jnp.float32(0))


def anchor_gradient(grads, params, anchor, importance, strength, step_size=0.0):
    r"""Adds the gradient of the quadratic anchor to a gradient, in one pass over the parameters.

    .. math:: g'_j = \frac{g_j + \lambda F_j (\theta_j - \theta^*_j)}{1 + \eta \lambda F_j}

    With ``step_size`` 0 this is the gradient of loss + `anchor_penalty`, under any optimizer
    (the **explicit** form). With the learning rate as ``step_size`` it is the **proximal** form:
    under plain SGD the step that follows, ``theta - eta * g'``, is exactly

    .. math:: \arg\min_z \; g \cdot z + \frac{1}{2 \eta} |z - \theta|^2 + \frac{\lambda}{2} \sum_j
              F_j (z_j - \theta^*_j)^2

    that is, implicit in the penalty. Its factor on ``theta - theta*`` lies in (0, 1) for every
    strength, where the explicit form multiplies by ``1 - eta lambda F`` and explodes beyond
    ``eta lambda F = 2``. Both have the same fixed points. Under Adam the division is a constant
    scale per parameter, which Adam takes out again, so there the forms nearly agree.

    Under Adam the pull in the gradient is not what it is under SGD: it passes through the moments,
    and each parameter moves by about the learning rate however strong its pull is (as L2
    regularisation does, compared with decoupled weight decay). `add_quadratic_anchor` after
    `optax.scale_by_adam` is the decoupled form.

    Args:
      grads: gradient of the task's loss, any tree.
      params: parameters, same tree.
      anchor: same tree; None for a leaf that is free.
      importance: same tree, non-negative; None for a leaf that is free.
      strength: lambda, a scalar.
      step_size: eta, a scalar: 0 for the explicit form, the learning rate for the proximal one.

    Returns:
      The new gradient, same tree and dtypes; hand it to the optimizer.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax import optim
      >>> at = dict(params=jnp.array([3.0]), anchor=jnp.array([1.0]), importance=jnp.array([1.0]))
      >>> float(optim.anchor_gradient(jnp.zeros(1), **at, strength=2000.0)[0])
      4000.0
      >>> g = optim.anchor_gradient(jnp.zeros(1), **at, strength=2000.0, step_size=0.1)
      >>> round(float(3.0 - 0.1 * g[0]), 2)  # lands close to the anchor instead of at -397
      1.01

    Source: Kirkpatrick et al. 2017, Eq. 3 (the penalty); Parikh and Boyd 2014, Sec. 4.2 (the
    proximal gradient method).
    """

    def one(g, p, a, f):
        if _absent(g) or a is None or f is None:
            return g
        pull = strength * f
        return ((g + pull * (p - a)) / (1.0 + step_size * pull)).astype(g.dtype)

    return jax.tree.map(one, grads, params, anchor, importance, is_leaf=_absent)


def add_quadratic_anchor(strength, step_size=0.0) -> optax.GradientTransformationExtraArgs:
    r"""`anchor_gradient` as a transformation; put it before the optimizer in `optax.chain`.

    Before the optimizer it is the same as `anchor_penalty` in the loss, under any optimizer. Under
    one that rescales gradients, such as Adam, it matters where it stands, as for weight decay:

    - ``chain(add_quadratic_anchor(s), adam(eta))``: the pull goes through Adam's moments, which
      take its size out (L2 in the gradient, the loss term; what `ewc` here does).
    - ``chain(scale_by_adam(), add_quadratic_anchor(s), scale(-eta))``: decoupled, as AdamW; the
      parameters move by ``-eta s F (theta - anchor)`` whatever the gradients are.

    Under SGD both are one. Leaves that `optax.masked` or `optax.partition` leave out are not
    pulled, and ``anchor`` and ``importance`` may be the trees of all parameters there.

    Args:
      strength: lambda, a scalar.
      step_size: 0 for the explicit form, the learning rate for the proximal one.

    Returns:
      A stateless transformation whose ``update`` needs ``params`` and the keyword arguments
      ``anchor`` and ``importance``.

    Raises:
      ValueError: ``update`` was called without ``params``.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from bpnjax import optim
      >>> tx = optax.chain(optim.add_quadratic_anchor(10.0), optax.sgd(0.125))
      >>> theta = jnp.array([3.0])
      >>> updates, _ = tx.update(
      ...     jnp.zeros(1), tx.init(theta), theta, anchor=jnp.array([1.0]), importance=jnp.ones(1)
      ... )
      >>> updates.tolist()
      [-2.5]

    Source: as `anchor_gradient`.
    """

    def update(updates, state, params=None, *, anchor, importance, **extra):
        del extra
        if params is None:
            raise ValueError("add_quadratic_anchor needs params: tx.update(grads, state, params)")
        return anchor_gradient(updates, params, anchor, importance, strength, step_size), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
