"""How much each parameter matters: Fisher information, exact per example, in one backward pass.

For a Dense layer called once, with inputs ``a`` [n, d] and output gradients ``delta`` [n, k] of one
batched backward pass, the gradient of example i with respect to the kernel is ``a_i delta_i^T``.
Its square is ``a_i^2 (delta_i^2)^T``, so the sum over examples is a matrix product and no array of
size n x parameters exists. Other layers fall back to `jax.vmap` of `jax.grad`, a chunk at a time.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from bpnjax import modulation

__all__ = ["FISHER_KINDS", "fisher", "fisher_sum"]

FISHER_KINDS = ("empirical", "true", "sampled")


def _one_pass_layers(model, params, x) -> dict[str, modulation.Layer]:
    """The layers that the outer-product identity covers: Dense, called once, on [n, d]."""
    layers = modulation.find_layers(model, params, x)
    return {
        path: layer
        for path, layer in layers.items()
        if layer.kind == "dense" and layer.calls == 1 and layer.rank == 2
    }


def _square_sums(model, params, mode, x, labels, weights, kind, key):
    """Sums of squared per-example gradients of the covered Dense layers."""
    layers = _one_pass_layers(model, params, x)
    probes = {path: jnp.zeros(layer.output_shape) for path, layer in layers.items()}

    def forward(probes):
        logits, inputs = modulation.tapped_apply(model, params, mode, x, probes)
        return logits.astype(jnp.float32), inputs

    logits, backward, inputs = jax.vjp(forward, probes, has_aux=True)
    probabilities = jax.nn.softmax(logits)

    # d(-log p_y)/d logits = p - onehot(y); everything upstream of the logits is linear in it.
    if kind == "true":

        def accumulate(c, sums):
            (deltas,) = backward(probabilities - jax.nn.one_hot(c, logits.shape[-1]))
            share = probabilities[:, c, None]
            return jax.tree.map(lambda s, d: s + share * jnp.square(d), sums, deltas)

        squares = jax.lax.fori_loop(0, logits.shape[-1], accumulate, probes)
    else:
        if kind == "sampled":
            labels = jax.random.categorical(key, logits)
        (deltas,) = backward(probabilities - jax.nn.one_hot(labels, logits.shape[-1]))
        squares = jax.tree.map(jnp.square, deltas)

    sums = {}
    for path, square in squares.items():
        weighted = weights[:, None] * square
        (layer_input,) = inputs[path]
        prefix = f"{path}/" if path else ""
        sums[f"{prefix}kernel"] = jnp.square(layer_input.astype(jnp.float32)).T @ weighted
        sums[f"{prefix}bias"] = weighted.sum(0)
    return sums


def _square_sums_by_vmap(model, params, mode, x, labels, weights, kind, key, names, chunk):
    """Sums of squared per-example gradients of the named leaves, by vmap of grad."""
    flat = traverse_util.flatten_dict(params, sep="/")
    fixed = {name: leaf for name, leaf in flat.items() if name not in names}
    free = {name: flat[name] for name in names}
    if kind == "sampled":
        logits = modulation.modulated_apply(model, params, mode, x)
        labels = jax.random.categorical(key, logits)

    def negative_log_likelihood(free, example, label):
        tree = traverse_util.unflatten_dict({**fixed, **free}, sep="/")
        logits = modulation.modulated_apply(model, tree, mode, example[None])[0]
        return -jax.nn.log_softmax(logits.astype(jnp.float32))[label], logits

    gradient = jax.grad(negative_log_likelihood, has_aux=True)

    def squares(example):
        x_i, label, weight = example
        if kind != "true":
            grads, _ = gradient(free, x_i, label)
            return jax.tree.map(lambda g: weight * jnp.square(g), grads)
        _, logits = negative_log_likelihood(free, x_i, label)
        probabilities = jax.nn.softmax(logits.astype(jnp.float32))

        def accumulate(c, sums):
            grads, _ = gradient(free, x_i, c)
            share = weight * probabilities[c]
            return jax.tree.map(lambda s, g: s + share * jnp.square(g), sums, grads)

        return jax.lax.fori_loop(
            0, probabilities.shape[0], accumulate, jax.tree.map(jnp.zeros_like, free)
        )

    def one_chunk(sums, examples):
        per_example = jax.vmap(squares)(examples)
        return jax.tree.map(lambda s, g: s + g.sum(0), sums, per_example), None

    pad = -x.shape[0] % chunk
    padded = [
        jnp.pad(a, [(0, pad)] + [(0, 0)] * (a.ndim - 1)).reshape((-1, chunk, *a.shape[1:]))
        for a in (x, labels, weights)
    ]
    sums, _ = jax.lax.scan(one_chunk, jax.tree.map(jnp.zeros_like, free), tuple(padded))
    return sums


def fisher_sum(
    model, params, mode, x, labels, *, kind="empirical", weights=None, key=None, chunk=32
) -> Any:
    """Sum over a batch of squared per-example gradients of the log-likelihood; see `fisher`.

    Args:
      model: a Linen module that maps ``x`` to logits ``[n, C]``.
      params: its parameters, a dict tree.
      mode: as in `bpnjax.modulated_apply`, one task for the whole batch; ``{}`` for none.
      x: inputs ``[n, ...]``.
      labels: int ``[n]``; read by ``kind="empirical"`` only.
      kind: ``"empirical"``, ``"true"`` or ``"sampled"``.
      weights: f32 ``[n]``, 0 for examples that are padding; all 1 by default.
      key: typed PRNG key; needed by ``kind="sampled"``.
      chunk: examples at a time where a layer needs `jax.vmap` of `jax.grad`.

    Returns:
      A tree like ``params``, f32.

    Raises:
      ValueError: unknown ``kind``, or ``"sampled"`` without a key.
    """
    if kind not in FISHER_KINDS:
        raise ValueError(f"unknown Fisher kind {kind!r}; use one of {', '.join(FISHER_KINDS)}")
    if kind == "sampled" and key is None:
        raise ValueError("the sampled Fisher draws labels: pass key=jax.random.key(...)")
    weights = jnp.ones(x.shape[0]) if weights is None else weights
    flat = traverse_util.flatten_dict(params, sep="/")
    sums = {
        name: value
        for name, value in _square_sums(model, params, mode, x, labels, weights, kind, key).items()
        if name in flat  # a Dense layer without bias has no such leaf
    }
    rest = [name for name in flat if name not in sums]
    if rest:
        sums |= _square_sums_by_vmap(
            model, params, mode, x, labels, weights, kind, key, rest, min(chunk, x.shape[0])
        )
    sums = {name: sums[name].astype(jnp.float32) for name in flat}
    return traverse_util.unflatten_dict(sums, sep="/")


def fisher(
    model, params, mode, x, labels, *, kind="empirical", key=None, batch_size=512, chunk=32
) -> Any:
    r"""Diagonal of the Fisher information, exact per example.

    .. math:: F_j = \frac{1}{n} \sum_i \Big( \frac{\partial \log p(y_i | x_i)}{\partial \theta_j}
              \Big)^2

    The kinds differ in the label: ``"empirical"`` takes the label of the data, ``"true"`` the
    expectation over the model's own labels, :math:`\sum_c p(c | x_i) (\cdot)^2`, and ``"sampled"``
    one label drawn from the model per example. It is never the square of a batch-mean gradient,
    which many codes call Fisher and which is too small by about the batch size.

    Args:
      model: a Linen module that maps ``x`` to logits ``[n, C]``.
      params: its parameters, a dict tree.
      mode: as in `bpnjax.modulated_apply`; ``{}`` for none.
      x: inputs ``[n, ...]``.
      labels: int ``[n]``; read by ``kind="empirical"`` only.
      kind: ``"empirical"``, ``"true"`` or ``"sampled"``.
      key: typed PRNG key; needed by ``kind="sampled"``.
      batch_size: examples in one pass.
      chunk: examples at a time where a layer needs `jax.vmap` of `jax.grad`.

    Returns:
      A tree like ``params``, f32, non-negative.

    Raises:
      ValueError: unknown ``kind``, or ``"sampled"`` without a key.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn
      >>> from bpnjax import importance
      >>> net = nn.Dense(2, use_bias=False)
      >>> params = {"kernel": jnp.zeros((1, 2))}  # p = 1/2, gradient = x * (p - onehot)
      >>> f = importance.fisher(net, params, {}, jnp.array([[2.0]]), jnp.array([0]))
      >>> f["kernel"].tolist()
      [[1.0, 1.0]]

    Source: Kirkpatrick et al. 2017 (EWC); van de Ven 2025 (arXiv 2502.11756) for the kinds.
    """
    n = x.shape[0]
    batch_size = min(batch_size, n)
    pad = -n % batch_size
    weights = (jnp.arange(n + pad) < n).astype(jnp.float32).reshape(-1, batch_size)
    batched = [
        jnp.pad(a, [(0, pad)] + [(0, 0)] * (a.ndim - 1)).reshape((-1, batch_size, *a.shape[1:]))
        for a in (x, labels)
    ]

    def one_batch(sums, batch):
        i, x_i, labels_i, weights_i = batch
        batch_key = None if key is None else jax.random.fold_in(key, i)
        more = fisher_sum(
            model, params, mode, x_i, labels_i,
            kind=kind, weights=weights_i, key=batch_key, chunk=chunk,
        )  # fmt: skip
        return jax.tree.map(jnp.add, sums, more), None

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    sums, _ = jax.lax.scan(one_batch, zeros, (jnp.arange(weights.shape[0]), *batched, weights))
    return jax.tree.map(lambda s: s / n, sums)
