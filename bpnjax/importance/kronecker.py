r"""Fisher information of Dense layers as Kronecker factors, and the anchor made from them.

Let a be the input of a Dense layer, with a 1 appended for the bias, and d the derivative of the
loss for its output. The gradient of an example is the outer product of both, and its second
moments factor approximately:

.. math:: E[\mathrm{vec}(a d^T) \mathrm{vec}(a d^T)^T] \approx A \otimes G,\quad
   A = E[a a^T],\ G = E[d d^T]

A diagonal Fisher says which weights matter. This one also says which *directions of the input* a
layer has been used on. Source: Martens and Grosse 2015 (arXiv 1503.05671), Sec. 3; as an anchor
Ritter, Botev and Barber 2018 (arXiv 1805.07810).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from bpnjax.importance.per_example import (
    Loss,
    check_batch,
    check_labels,
    gradients_of_losses,
    one_pass_layers,
    probe,
)
from bpnjax.networks import Layer, Network
from bpnjax.utils.heads import within_head

__all__ = [
    "Basis",
    "Factors",
    "diagonalise",
    "empty_factors",
    "factors",
    "factors_sum",
    "pull_back",
]


class Factors(NamedTuple):
    """Second moments of one layer, or sums of them."""

    inputs: jax.Array  # A, f32 [d + 1, d + 1]; the last row and column belong to the bias
    outputs: jax.Array  # G, f32 [k, k]


class Basis(NamedTuple):
    """The directions in which ``A (x) G`` of a layer is diagonal."""

    inputs: jax.Array  # f32 [d + 1, d + 1], eigenvectors of A as columns
    outputs: jax.Array  # f32 [k, k], eigenvectors of G as columns
    curvature: jax.Array  # f32 [d + 1, k], products of the eigenvalues, not negative


def empty_factors(layers: Mapping[str, Layer]) -> dict[str, Factors]:
    """Factors of zero for every Dense layer that is called once.

    Args:
      layers: ``{path: Layer}`` as in `Network.layers`.

    Returns:
      ``{path: Factors}``, f32 ``[inputs + 1, inputs + 1]`` and ``[outputs, outputs]``.
    """
    return {
        path: Factors(
            jnp.zeros((layer.inputs + 1,) * 2, jnp.float32),
            jnp.zeros((layer.outputs,) * 2, jnp.float32),
        )
        for path, layer in one_pass_layers(layers).items()
    }


def factors_sum(
    network: Network,
    params: Any,
    mode: Any,
    x: jax.Array,
    labels: jax.Array,
    *,
    weights: jax.Array | None = None,
    classes: jax.Array | None = None,
    loss: Loss | None = None,
) -> dict[str, Factors]:
    """Sums both factors of each layer over a batch; see `factors`.

    Args:
      network: a `bpnjax.networks.Network` that maps ``x`` to logits ``[n, C]``.
      params: its parameters.
      mode: of one task for the whole batch; ``{}`` for none.
      x: inputs ``[n, ...]``.
      labels: int ``[n]``.
      weights: f32 ``[n]``, 0 for examples that are padding; all 1 by default.
      classes: bool ``[C]``, the outputs that belong to the softmax; all by default.
      loss: ``(outputs, labels) -> losses [n]``; cross-entropy by default.

    Returns:
      ``{path: Factors}`` for every Dense layer that is called once on ``[n, d]``.
    """
    weights = jnp.ones(x.shape[0], jnp.float32) if weights is None else weights
    check_batch(x, weights, classes, None if loss is None else labels)
    logits, backward, inputs = probe(network, params, mode, x)
    if loss is not None:
        deltas = backward(gradients_of_losses(loss, logits, labels))
    else:
        check_labels(logits, labels)
        p = jax.nn.softmax(within_head(logits, classes))
        deltas = backward(p - jax.nn.one_hot(labels, p.shape[-1], dtype=p.dtype))
    sums = {}
    for path, delta in deltas.items():
        (a,) = inputs[path]
        a = jnp.pad(a.astype(jnp.float32), [(0, 0), (0, 1)], constant_values=1.0)
        sums[path] = Factors((weights[:, None] * a).T @ a, (weights[:, None] * delta).T @ delta)
    return sums


def factors(
    network: Network, params: Any, mode: Any, x: jax.Array, labels: jax.Array
) -> dict[str, Factors]:
    r"""Both Kronecker factors of the empirical Fisher of each Dense layer.

    .. math:: A = \frac{1}{n} \sum_b a_b a_b^T, \quad G = \frac{1}{n} \sum_b d_b d_b^T

    ``a_b`` is the layer's input with a 1 appended (after the key, if the task has one). ``d_b`` is
    the derivative of the negative log-likelihood of the label for the layer's output.

    Args:
      network: a `bpnjax.networks.Network` that maps ``x`` to logits ``[n, C]``.
      params: its parameters.
      mode: of the task; ``{}`` for none.
      x: inputs ``[n, ...]``.
      labels: int ``[n]``.

    Returns:
      ``{path: Factors}`` for every Dense layer that is called once on ``[n, d]``.

    Example:
      >>> import jax.numpy as jnp, flax.linen as nn
      >>> from bpnjax import networks
      >>> from bpnjax.importance import kronecker
      >>> net = networks.from_linen(nn.Dense(2), jnp.ones((1, 1)))
      >>> params = {"kernel": jnp.zeros((1, 2)), "bias": jnp.zeros(2)}  # p = (0.5, 0.5)
      >>> found = kronecker.factors(net, params, {}, jnp.array([[3.0]]), jnp.array([0]))[""]
      >>> found.inputs.tolist()
      [[9.0, 3.0], [3.0, 1.0]]
      >>> found.outputs.tolist()
      [[0.25, -0.25], [-0.25, 0.25]]

    Source: Martens and Grosse 2015, Eq. 1. Variant: empirical, with the data's labels.
    """
    sums = factors_sum(network, params, mode, x, labels)
    return {path: Factors(*(s / x.shape[0] for s in both)) for path, both in sums.items()}


def diagonalise(total: Factors, scale: float | jax.Array = 1.0) -> Basis:
    """Eigenvectors of both factors, and the curvature ``scale * A (x) G`` along each pair.

    Args:
      total: factors of one layer.
      scale: a factor on the curvature, scalar.

    Returns:
      `Basis`.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.importance import kronecker
      >>> both = kronecker.Factors(jnp.diag(jnp.array([2.0, 3.0])), jnp.eye(1))
      >>> kronecker.diagonalise(both).curvature.tolist()
      [[2.0], [3.0]]
    """
    a, inputs = jnp.linalg.eigh(total.inputs)
    g, outputs = jnp.linalg.eigh(total.outputs)
    # Rounding makes some eigenvalues of a positive semidefinite matrix slightly negative.
    curvature = scale * jnp.maximum(a, 0.0)[:, None] * jnp.maximum(g, 0.0)
    return Basis(inputs, outputs, curvature)


def pull_back(
    weights: jax.Array, anchor: jax.Array, basis: Basis, strength: float | jax.Array
) -> jax.Array:
    r"""The proximal step of the anchor: moves weights to it, most along important directions.

    .. math:: \arg\min_Z \frac{1}{2} |Z - \theta|^2 + \frac{s}{2} \mathrm{tr}\big(
              (Z - \theta^*)^T A (Z - \theta^*) G\big)

    In the basis of both factors each coefficient of ``theta - theta*`` is divided by ``1 + s``
    times its curvature, so the step does not overshoot at any strength.

    Args:
      weights: theta, f32 ``[d + 1, k]``, the bias in the last row.
      anchor: theta*, of the same shape.
      basis: from `diagonalise`.
      strength: s, the strength of the anchor times the length of the gradient steps since the last
        pull.

    Returns:
      f32 ``[d + 1, k]``.

    Raises:
      AssertionError: weights, anchor and basis differ in shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.importance import kronecker
      >>> flat = kronecker.Basis(jnp.eye(2), jnp.eye(1), jnp.array([[0.0], [1.0]]))
      >>> kronecker.pull_back(jnp.full((2, 1), 8.0), jnp.zeros((2, 1)), flat, 3.0).tolist()
      [[8.0], [2.0]]

    Source: Ritter et al. 2018, Eq. 7-9, for the penalty; Parikh and Boyd 2014, Sec. 4.2, for the
    proximal step that replaces its gradient.
    """
    chex.assert_equal_shape([weights, anchor, basis.curvature])
    moved = basis.inputs.T @ (weights - anchor) @ basis.outputs
    return anchor + basis.inputs @ (moved / (1.0 + strength * basis.curvature)) @ basis.outputs.T
