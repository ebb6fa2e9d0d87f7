"""How much each parameter matters: Fisher information (EWC), sensitivity (MAS), units (SLNID).

All are exact per example and take one backward pass, see `bpnjax.importance.per_example`.

The network runs in evaluation, so that an example does not depend on the others of its batch.
Variables such as the running statistics of BatchNorm are constants:
``fisher(network.bind(variables), ...)``.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from bpnjax.importance import per_example
from bpnjax.importance.per_example import Backward, Loss
from bpnjax.networks import Network
from bpnjax.utils.heads import within_head

__all__ = [
    "FISHER_KINDS",
    "NEURON_KINDS",
    "fisher",
    "fisher_sum",
    "neurons",
    "neurons_sum",
    "sensitivity",
    "sensitivity_sum",
]

FISHER_KINDS = ("empirical", "true", "sampled")
NEURON_KINDS = ("loss", "output_norm")


def fisher_sum(
    network: Network,
    params: Any,
    mode: Any,
    x: jax.Array,
    labels: jax.Array,
    *,
    kind: str = "empirical",
    weights: jax.Array | None = None,
    key: jax.Array | None = None,
    chunk: int = 32,
    classes: jax.Array | None = None,
    loss: Loss | None = None,
) -> Any:
    """Sum over a batch of squared per-example gradients of the log-likelihood; see `fisher`.

    Args:
      network: a `bpnjax.networks.Network` that maps ``x`` to logits ``[n, C]``.
      params: its parameters.
      mode: of one task for the whole batch; ``{}`` for none.
      x: inputs ``[n, ...]``.
      labels: int ``[n]``; only ``kind="empirical"`` reads them.
      kind: ``"empirical"``, ``"true"`` or ``"sampled"``.
      weights: f32 ``[n]``, 0 for examples that are padding; all 1 by default.
      key: typed PRNG key; ``kind="sampled"`` needs it.
      chunk: number of examples at a time where a layer needs `jax.vmap` of `jax.grad`.
      classes: bool ``[C]``, the outputs that belong to the softmax; all by default.
      loss: ``(outputs, labels) -> losses [n]``, whose gradients ``kind="empirical"`` squares;
        cross-entropy by default.

    Returns:
      A tree like the parameters, f32.

    Raises:
      ValueError: ``kind`` is unknown, ``"sampled"`` has no key, a kind that draws labels from a
        softmax has another loss than cross-entropy, or a label is not a class.

    Example:
      >>> import jax.numpy as jnp, flax.linen as nn
      >>> from bpnjax import importance, networks
      >>> params = {"kernel": jnp.zeros((1, 2)), "bias": jnp.zeros(2)}  # softmax gives 1/2 each
      >>> x, labels = jnp.array([[2.0], [4.0], [9.0]]), jnp.array([0, 1, 0])
      >>> weights = jnp.array([1.0, 1.0, 0.0])  # the last one is padding
      >>> network = networks.from_linen(nn.Dense(2), x)
      >>> found = importance.fisher_sum(network, params, {}, x, labels, weights=weights)
      >>> found["kernel"].tolist(), found["bias"].tolist()  # (2 / 2)^2 + (4 / 2)^2
      ([[5.0, 5.0]], [0.5, 0.5])
    """
    if kind not in FISHER_KINDS:
        raise ValueError(f"unknown Fisher kind {kind!r}; use one of {', '.join(FISHER_KINDS)}")
    if loss is not None and kind != "empirical":
        raise ValueError(
            f"the {kind} Fisher takes its labels from a softmax, and the loss is another than "
            "cross-entropy; use the empirical Fisher"
        )
    weights = jnp.ones(x.shape[0], jnp.float32) if weights is None else weights
    per_example.check_batch(x, weights, classes, None if loss is None else labels)

    if kind == "sampled":
        if key is None:
            raise ValueError("the sampled Fisher draws labels: pass key=jax.random.key(...)")
        answers = network.apply(params, mode, x)[0].astype(jnp.float32)
        labels = jax.random.categorical(key, within_head(answers, classes))

    def magnitudes(logits: jax.Array, backward: Backward) -> dict[str, jax.Array]:
        if loss is not None:
            gradients = per_example.gradients_of_losses(loss, logits, labels)
            return jax.tree.map(jnp.square, backward(gradients))
        read = labels if kind == "empirical" else jnp.zeros(x.shape[0], jnp.int32)
        per_example.check_labels(logits, read)
        # d(-log p_y)/d logits = p - onehot(y), and the backward pass is linear in it.
        p, width = jax.nn.softmax(within_head(logits, classes)), logits.shape[-1]
        if kind != "true":
            return jax.tree.map(
                jnp.square, backward(p - jax.nn.one_hot(labels, width, dtype=p.dtype))
            )

        def add(c: jax.Array, sums: Any) -> Any:
            deltas = backward(p - jax.nn.one_hot(c, width, dtype=p.dtype))
            return jax.tree.map(lambda s, d: s + p[:, c, None] * jnp.square(d), sums, deltas)

        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(backward, p))
        return jax.lax.fori_loop(0, width, add, zeros)

    def magnitude(logits_of: Callable[[Any], jax.Array], free: Any, label: jax.Array) -> Any:
        if loss is not None:
            gradient = jax.grad(lambda f: loss(logits_of(f)[None], label[None])[0])(free)
            return jax.tree.map(jnp.square, gradient)

        def squares(y: jax.Array) -> Any:
            return jax.tree.map(
                jnp.square,
                jax.grad(lambda f: jax.nn.log_softmax(within_head(logits_of(f), classes))[y])(free),
            )

        if kind != "true":
            return squares(label)
        p = jax.nn.softmax(within_head(logits_of(free), classes))

        def add(c: jax.Array, sums: Any) -> Any:
            return jax.tree.map(lambda s, q: s + p[c] * q, sums, squares(c))

        return jax.lax.fori_loop(0, p.shape[0], add, jax.tree.map(jnp.zeros_like, free))

    return per_example.sums(
        network, params, mode, x, labels, weights, chunk, magnitudes, jnp.square, magnitude
    )


def fisher(
    network: Network,
    params: Any,
    mode: Any,
    x: jax.Array,
    labels: jax.Array,
    *,
    kind: str = "empirical",
    key: jax.Array | None = None,
    batch_size: int = 512,
    chunk: int = 32,
    loss: Loss | None = None,
) -> Any:
    r"""Diagonal of the Fisher information, exact per example.

    .. math:: F_j = \frac{1}{n} \sum_i \Big( \frac{\partial \log p(y_i | x_i)}{\partial \theta_j}
              \Big)^2

    The kinds differ in the label. ``"empirical"`` takes the label of the data. ``"true"`` takes the
    expectation over the model's own labels, :math:`\sum_c p(c | x_i) (\cdot)^2`. ``"sampled"``
    draws one label from the model per example. The square of a batch-mean gradient, which many
    codes call Fisher, is something else: it is too small by about the batch size.

    Args:
      network: a `bpnjax.networks.Network` that maps ``x`` to logits ``[n, C]``.
      params: its parameters.
      mode: of the task; ``{}`` for none.
      x: inputs ``[n, ...]``.
      labels: int ``[n]``; only ``kind="empirical"`` reads them.
      kind: ``"empirical"``, ``"true"`` or ``"sampled"``.
      key: typed PRNG key; ``kind="sampled"`` needs it.
      batch_size: number of examples in one pass.
      chunk: number of examples at a time where a layer needs `jax.vmap` of `jax.grad`.
      loss: as in `fisher_sum`.

    Returns:
      A tree like the parameters, f32, non-negative.

    Raises:
      ValueError: as in `fisher_sum`.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn
      >>> from bpnjax import importance, networks
      >>> network = networks.from_linen(nn.Dense(2, use_bias=False), jnp.ones((1, 1)))
      >>> params = {"kernel": jnp.zeros((1, 2))}  # p = 1/2, gradient = x * (p - onehot)
      >>> f = importance.fisher(network, params, {}, jnp.array([[2.0]]), jnp.array([0]))
      >>> f["kernel"].tolist()
      [[1.0, 1.0]]

    Source: Kirkpatrick et al. 2017 (EWC); van de Ven 2025 (arXiv 2502.11756) for the kinds.
    """

    if loss is None and kind == "empirical":
        outputs, _ = jax.eval_shape(lambda: network.apply(params, mode, x))
        per_example.check_labels(outputs, labels)

    def one_batch(i: jax.Array, x: jax.Array, labels: jax.Array, weights: jax.Array) -> Any:
        draw = None if key is None else jax.random.fold_in(key, i)
        return fisher_sum(
            network, params, mode, x, labels,
            kind=kind, weights=weights, key=draw, chunk=chunk, loss=loss,
        )  # fmt: skip

    return _mean(one_batch, params, x, labels, batch_size)


def _mean(
    sum_of_batch: Callable[..., Any], params: Any, x: jax.Array, labels: jax.Array, batch_size: int
) -> Any:
    n = x.shape[0]
    x, labels, weights = per_example.in_pieces(
        (x, labels, jnp.ones(n, jnp.float32)), min(batch_size, n)
    )

    def add(sums: Any, batch: tuple[jax.Array, ...]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, sum_of_batch(*batch)), None

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    sums, _ = jax.lax.scan(add, zeros, (jnp.arange(len(x)), x, labels, weights))
    return jax.tree.map(lambda s: s / n, sums)


def sensitivity_sum(
    network: Network,
    params: Any,
    mode: Any,
    x: jax.Array,
    *,
    weights: jax.Array | None = None,
    chunk: int = 32,
    classes: jax.Array | None = None,
) -> Any:
    """Sums absolute per-example gradients of the squared output norm over a batch.

    Args:
      network: a `bpnjax.networks.Network` that maps ``x`` to outputs ``[n, C]``.
      params: its parameters.
      mode: of one task for the whole batch; ``{}`` for none.
      x: inputs ``[n, ...]``.
      weights: f32 ``[n]``, 0 for examples that are padding; all 1 by default.
      chunk: number of examples at a time where a layer needs `jax.vmap` of `jax.grad`.
      classes: bool ``[C]``, the outputs that count; all by default.

    Returns:
      A tree like the parameters, f32.
    """
    weights = jnp.ones(x.shape[0], jnp.float32) if weights is None else weights
    per_example.check_batch(x, weights, classes)
    counted = 1.0 if classes is None else classes.astype(jnp.float32)

    def magnitudes(outputs: jax.Array, backward: Backward) -> dict[str, jax.Array]:
        if classes is not None:
            chex.assert_equal_shape_suffix([outputs, classes], 1)
        return jax.tree.map(jnp.abs, backward(2.0 * counted * outputs))

    def magnitude(outputs_of: Callable[[Any], jax.Array], free: Any, _: Any) -> Any:
        gradient = jax.grad(lambda f: jnp.sum(counted * jnp.square(outputs_of(f))))(free)
        return jax.tree.map(jnp.abs, gradient)

    labels = jnp.zeros(x.shape[0], jnp.int32)  # MAS does not use them
    return per_example.sums(
        network, params, mode, x, labels, weights, chunk, magnitudes, jnp.abs, magnitude
    )


def sensitivity(
    network: Network,
    params: Any,
    mode: Any,
    x: jax.Array,
    *,
    batch_size: int = 512,
    chunk: int = 32,
) -> Any:
    r"""MAS importance: how much the squared norm of the output depends on each parameter.

    .. math:: \Omega_j = \frac{1}{n} \sum_i \Big| \frac{\partial \|F(x_i)\|_2^2}{\partial
              \theta_j} \Big|

    ``F`` are the logits. No labels are used. The absolute value is taken per example. The authors'
    code by default takes it of the gradient summed over a batch, where signs cancel.

    Args:
      network: a `bpnjax.networks.Network` that maps ``x`` to outputs ``[n, C]``.
      params: its parameters.
      mode: of the task; ``{}`` for none.
      x: inputs ``[n, ...]``.
      batch_size: number of examples in one pass.
      chunk: number of examples at a time where a layer needs `jax.vmap` of `jax.grad`.

    Returns:
      A tree like the parameters, f32, non-negative.

    Example:
      >>> import jax.numpy as jnp, flax.linen as nn
      >>> from bpnjax import importance, networks
      >>> params = {"kernel": jnp.array([[3.0]])}  # F = 3 x, d F^2 / d w = 2 F x
      >>> x = jnp.array([[1.0], [-1.0]])
      >>> network = networks.from_linen(nn.Dense(1, use_bias=False), x)
      >>> importance.sensitivity(network, params, {}, x)["kernel"].tolist()
      [[6.0]]

    Source: Aljundi et al. 2018 (MAS), Eq. 2-3.
    """
    labels = jnp.zeros(x.shape[0], jnp.int32)
    return _mean(
        lambda _, x, __, weights: sensitivity_sum(
            network, params, mode, x, weights=weights, chunk=chunk
        ),
        params, x, labels, batch_size,
    )  # fmt: skip


def neurons_sum(
    network: Network,
    params: Any,
    mode: Any,
    x: jax.Array,
    labels: jax.Array,
    *,
    of: str = "output_norm",
    weights: jax.Array | None = None,
    classes: jax.Array | None = None,
    loss: Loss | None = None,
) -> dict[str, jax.Array]:
    """Sums absolute gradients for the inputs of units over a batch; see `neurons`.

    Args:
      network: a `bpnjax.networks.Network` that maps ``x`` to logits ``[n, C]``.
      params: its parameters.
      mode: of one task for the whole batch; ``{}`` for none.
      x: inputs ``[n, ...]``.
      labels: int ``[n]``; only ``of="loss"`` reads them.
      of: ``"output_norm"`` or ``"loss"``.
      weights: f32 ``[n]``, 0 for examples that are padding; all 1 by default.
      classes: bool ``[C]``, the outputs that count; all by default.
      loss: ``(outputs, labels) -> losses [n]`` for ``of="loss"``; cross-entropy by default.

    Returns:
      ``{path: f32 [outputs]}`` for every Dense layer that is called once on ``[n, d]``.

    Raises:
      ValueError: ``of`` is unknown.
      AssertionError: weights, classes or losses have a wrong shape that would still broadcast.
    """
    if network.tapped is None:
        raise ValueError(
            f"the units of {network.name} are not known; build it with networks.from_linen or "
            "networks.from_nnx"
        )
    if of not in NEURON_KINDS:
        raise ValueError(f"unknown importance {of!r}; use one of {', '.join(NEURON_KINDS)}")
    weights = jnp.ones(x.shape[0], jnp.float32) if weights is None else weights
    per_example.check_batch(x, weights, classes, None if loss is None else labels)
    logits, backward, _ = per_example.probe(network, params, mode, x)
    if of == "output_norm":
        if classes is not None:
            chex.assert_equal_shape_suffix([logits, classes], 1)
        cotangent = 2.0 * logits * (1.0 if classes is None else classes)
    elif loss is not None:
        cotangent = per_example.gradients_of_losses(loss, logits, labels)
    else:
        per_example.check_labels(logits, labels)
        p = jax.nn.softmax(within_head(logits, classes))
        cotangent = p - jax.nn.one_hot(labels, p.shape[-1], dtype=p.dtype)
    return {path: weights @ jnp.abs(delta) for path, delta in backward(cotangent).items()}


def neurons(
    network: Network,
    params: Any,
    mode: Any,
    x: jax.Array,
    labels: jax.Array,
    *,
    of: str = "output_norm",
) -> dict[str, jax.Array]:
    r"""Importance of units: how much a measured quantity depends on the input of each unit.

    .. math:: a_i = \frac{1}{n} \sum_b \Big| \frac{\partial s(x_b)}{\partial z_i} \Big|

    ``z_i`` is the input of the nonlinearity of unit i of a Dense layer. ``of="output_norm"`` takes
    ``s = ||F(x)||^2`` (as MAS), ``of="loss"`` the negative log-likelihood of the label (as EWC).

    Args:
      network: a `bpnjax.networks.Network` that maps ``x`` to logits ``[n, C]``.
      params: its parameters.
      mode: of the task; ``{}`` for none.
      x: inputs ``[n, ...]``.
      labels: int ``[n]``; only ``of="loss"`` reads them.
      of: ``"output_norm"`` or ``"loss"``.

    Returns:
      ``{path: f32 [outputs]}`` for every Dense layer that is called once on ``[n, d]``.

    Raises:
      ValueError: ``of`` is unknown.

    Example:
      >>> import jax.numpy as jnp, flax.linen as nn
      >>> from bpnjax import importance, networks
      >>> params = {"kernel": jnp.array([[3.0]]), "bias": jnp.zeros(1)}
      >>> x = jnp.array([[1.0], [-1.0]])
      >>> network = networks.from_linen(nn.Dense(1), x)
      >>> importance.neurons(network, params, {}, x, jnp.zeros(2, int))[""].tolist()  # |2 z| = 6
      [6.0]

    Source: Aljundi et al. 2019 (arXiv 1806.05421), Sec. 4.2: the importance of neurons in SLNID.
    """
    sums = neurons_sum(network, params, mode, x, labels, of=of)
    return {path: s / x.shape[0] for path, s in sums.items()}
