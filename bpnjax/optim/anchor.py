"""The quadratic anchor of EWC, SI and MAS: as a loss term, on a gradient, as a transformation."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

__all__ = ["add_quadratic_anchor", "anchor_gradient", "anchor_penalty", "pull_to_anchor"]


def _absent(node: Any) -> bool:
    """Is this a parameter without a gradient: None, or left out by `optax.masked`?"""
    return node is None or isinstance(node, optax.MaskedNode)


def anchor_penalty(
    params: Any, anchor: Any, importance: Any, strength: float | jax.Array
) -> jax.Array:
    r"""The quadratic anchor as a loss term.

    .. math:: \frac{\lambda}{2} \sum_j F_j (\theta_j - \theta^*_j)^2

    Args:
      params: parameters, any tree.
      anchor: the parameters to stay near, same tree; None for a leaf that is free.
      importance: non-negative weights, same tree (Fisher for EWC, omega for SI and MAS).
      strength: lambda, a scalar.

    Returns:
      The penalty, f32 scalar.

    Raises:
      AssertionError: leaves that stand for one parameter differ in shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax import optim
      >>> float(optim.anchor_penalty(jnp.array([3.0]), jnp.array([1.0]), jnp.array([0.5]), 10.0))
      10.0

    Source: Kirkpatrick et al. 2017, Eq. 3. Variant: with the factor 1/2 (Wen et al. 2020, Alg. 2,
    writes it without: their strength is half of ours).
    """

    def one(p: Any, a: Any, f: Any) -> jax.Array:
        if _absent(p) or a is None or f is None:
            return jnp.float32(0)
        chex.assert_equal_shape([p, a, f])
        return jnp.sum(f * jnp.square(p - a), dtype=jnp.float32)

    terms = jax.tree.map(one, params, anchor, importance, is_leaf=_absent)
    return 0.5 * strength * jax.tree.reduce(jnp.add, terms, jnp.float32(0))


def anchor_gradient(
    grads: Any,
    params: Any,
    anchor: Any,
    importance: Any,
    strength: float | jax.Array,
    step_size: Any = 0.0,
) -> Any:
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
      step_size: eta: 0 for the explicit form, the learning rate for the proximal one; a scalar, or
        a tree of scalars like ``params`` where leaves have rates of their own.

    Returns:
      The new gradient, same tree and dtypes; hand it to the optimizer.

    Raises:
      AssertionError: leaves that stand for one parameter differ in shape, or a strength or step
        size is no scalar.

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

    def one(g: Any, p: Any, a: Any, f: Any, eta: Any = step_size) -> Any:
        if _absent(g) or a is None or f is None:
            return g
        chex.assert_equal_shape([g, p, a, f])
        chex.assert_rank([strength, eta], 0)
        pull = strength * f
        return ((g + pull * (p - a)) / (1.0 + eta * pull)).astype(g.dtype)

    each = [] if jax.tree_util.treedef_is_leaf(jax.tree.structure(step_size)) else [step_size]
    return jax.tree.map(one, grads, params, anchor, importance, *each, is_leaf=_absent)


def add_quadratic_anchor(
    strength: float | jax.Array, step_size: Any = 0.0
) -> optax.GradientTransformationExtraArgs:
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

    def update(
        updates: Any, state: Any, params: Any = None, *, anchor: Any, importance: Any, **extra: Any
    ) -> tuple[Any, Any]:
        del extra
        if params is None:
            raise ValueError("add_quadratic_anchor needs params: tx.update(grads, state, params)")
        return anchor_gradient(updates, params, anchor, importance, strength, step_size), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def pull_to_anchor(params: Any, anchor: Any, importance: Any, strength: float | jax.Array) -> Any:
    r"""Takes a share of the way back to the anchor, after the optimizer's step.

    .. math:: \theta'_j = \theta_j - \frac{\kappa G_j}{1 + \kappa G_j} (\theta_j - \theta^*_j)

    It is the proximal step of the penalty in the metric in which :math:`\kappa G_j` is the product
    of step size and curvature. The share lies in [0, 1) for every strength, and it has no unit: it
    does not depend on the size of the loss, nor on what the optimizer does to gradients.

    Args:
      params: parameters after the optimizer's step, any tree.
      anchor: the parameters to stay near, same tree.
      importance: G, same tree, not negative.
      strength: kappa, a scalar; where G is 1 a parameter that the optimizer moves on by d in each
        step comes to rest d / kappa from the anchor.

    Returns:
      The parameters, same tree and dtypes.

    Raises:
      AssertionError: leaves that stand for one parameter differ in shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax import optim
      >>> theta, anchor, importance = jnp.array([3.0, 3.0]), jnp.ones(2), jnp.array([1.0, 0.0])
      >>> optim.pull_to_anchor(theta, anchor, importance, 1.0).tolist()
      [2.0, 3.0]

    Source: Parikh and Boyd 2014, Sec. 4.2 (the proximal operator of a quadratic); decoupled from
    the optimizer as the weight decay of Loshchilov and Hutter 2019 (arXiv 1711.05101).
    """

    def one(p: jax.Array, a: jax.Array, g: jax.Array) -> jax.Array:
        chex.assert_equal_shape([p, a, g])
        pull = strength * g
        return (p - pull / (1.0 + pull) * (p - a)).astype(p.dtype)

    return jax.tree.map(one, params, anchor, importance)
