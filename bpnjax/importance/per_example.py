"""Sums over examples of element-wise functions of each one's gradient, in one backward pass.

For a Dense layer called once, with inputs ``a`` [n, d] and output gradients ``delta`` [n, k] of one
batched backward pass, the gradient of example i with respect to the kernel is ``a_i delta_i^T``.
Its square is ``a_i^2 (delta_i^2)^T``, so the sum over examples is a matrix product and no array of
size n x parameters exists. Other layers fall back to `jax.vmap` of `jax.grad`, a chunk at a time.
"""

import contextlib

import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.errors import (
    ModifyScopeVariableError,
    ScopeCollectionNotFound,
    ScopeVariableNotFoundError,
)

from bpnjax.networks import linen


def one_pass_layers(layers: dict[str, linen.Layer]) -> dict[str, linen.Layer]:
    """Those that the outer-product identity covers: Dense, called once, on [n, d], not lifted.

    Args:
      layers: ``{path: Layer}`` as `bpnjax.networks.linen.find_layers` gives.

    Returns:
      The part of ``layers`` whose per-example gradients need not be formed.
    """
    return {
        path: layer
        for path, layer in layers.items()
        if layer.kind == "dense" and layer.calls == 1 and layer.rank == 2 and layer.plain
    }


@contextlib.contextmanager
def named_remedy():
    """What to do about a network that does not run on ``x`` alone, in words of this library.

    Raises:
      ValueError: in place of Flax's complaint about collections.
    """
    try:
        yield
    except (ModifyScopeVariableError, ScopeCollectionNotFound, ScopeVariableNotFoundError) as error:
        raise ValueError(
            "importance is a sum over single examples, so BatchNorm must use its running averages: "
            'pass {"params": ..., "batch_stats": ...} for params, or for the model '
            "modulation.fixed(model, variables, train=False), whatever its call names that "
            f"argument ({str(error).splitlines()[0]})"
        ) from error


@named_remedy()
def probe(model, params, mode, x):
    """What the outer-product identity needs of a batch.

    Args:
      model: a Linen module that maps ``x`` to logits ``[n, C]``.
      params: its parameters, a dict tree, or a dict of collections with a ``"params"`` entry.
      mode: as in `bpnjax.modulated_apply`, one task for the whole batch; ``{}`` for none.
      x: inputs ``[n, ...]``.

    Returns:
      Logits f32 ``[n, C]``; a function from a cotangent of them to ``{path: f32 [n, outputs]}``,
      the derivative for the output of each of `one_pass_layers`; and the layers' inputs,
      ``{path: ([n, d],)}``.
    """
    layers = one_pass_layers(linen.find_layers(model, params, x))
    probes = {path: jnp.zeros(layer.output_shape) for path, layer in layers.items()}

    def forward(probes):
        logits, inputs = linen.tapped_apply(model, params, mode, x, probes)
        return logits.astype(jnp.float32), inputs

    logits, backward, inputs = jax.vjp(forward, probes, has_aux=True)
    return logits, lambda cotangent: backward(cotangent)[0], inputs


def _dense_sums(model, params, mode, x, weights, magnitudes, element):
    """Sums over examples of ``element(gradient)`` for the covered Dense layers.

    ``element`` is a square or an absolute value, so that of an outer product is the outer product
    of those of its factors. ``magnitudes(logits, backward)`` gives element(delta) per layer.
    """
    logits, backward, inputs = probe(model, params, mode, x)
    sums = {}
    for path, size in magnitudes(logits, backward).items():
        weighted = weights[:, None] * size
        (layer_input,) = inputs[path]
        at = tuple(path.split("/")) if path else ()
        sums[(*at, "kernel")] = element(layer_input.astype(jnp.float32)).T @ weighted
        sums[(*at, "bias")] = weighted.sum(0)
    return sums


def _other_sums(model, params, mode, names, chunk, x, weights, labels, magnitude):
    """The same for the named leaves, by vmap of grad.

    ``magnitude(logits_of, free, label)`` gives element(gradient) of one example, where
    ``logits_of(free)`` are its logits as a function of the named leaves.
    """
    flat = traverse_util.flatten_dict(params)
    fixed = {name: leaf for name, leaf in flat.items() if name not in names}
    free = {name: flat[name] for name in names}

    def one_example(example):
        x_i, label, weight = example

        def logits_of(free):
            tree = traverse_util.unflatten_dict({**fixed, **free})
            logits = linen.modulated_apply(model, tree, mode, x_i[None])[0]
            return logits.astype(jnp.float32)

        return jax.tree.map(lambda m: weight * m, magnitude(logits_of, free, label))

    def one_chunk(sums, examples):
        return jax.tree.map(lambda s, m: s + m.sum(0), sums, jax.vmap(one_example)(examples)), None

    padded = in_pieces((x, labels, weights), chunk)
    sums, _ = jax.lax.scan(one_chunk, jax.tree.map(jnp.zeros_like, free), padded)
    return sums


def in_pieces(arrays, size):
    """Cuts a batch into pieces of equal size for `jax.lax.scan`.

    Args:
      arrays: a tuple of arrays ``[n, ...]``.
      size: of a piece.

    Returns:
      A tuple of arrays ``[pieces, size, ...]``; the last piece is padded with zeros.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.importance.per_example import in_pieces
      >>> in_pieces((jnp.array([1, 2, 3]),), 2)[0].tolist()
      [[1, 2], [3, 0]]
    """
    pad = -arrays[0].shape[0] % size
    return tuple(
        jnp.pad(a, [(0, pad)] + [(0, 0)] * (a.ndim - 1)).reshape((-1, size, *a.shape[1:]))
        for a in arrays
    )


def sums(model, params, mode, x, labels, weights, chunk, magnitudes, element, magnitude):
    """Sums over a batch of ``element(gradient)``, an element-wise function of single gradients.

    Args:
      model: a Linen module that maps ``x`` to logits ``[n, C]``.
      params: its parameters, a dict tree.
      mode: as in `bpnjax.modulated_apply`, one task for the whole batch.
      x: inputs ``[n, ...]``.
      labels: int ``[n]``, handed to ``magnitude``.
      weights: f32 ``[n]``, of the examples.
      chunk: examples at a time where a layer needs `jax.vmap` of `jax.grad`.
      magnitudes: ``(logits, backward) -> {path: f32 [n, outputs]}``, element(delta) of each of
        `one_pass_layers`; ``backward`` is that of `probe`.
      element: `jax.numpy.square` or `jax.numpy.abs`: that of a product is the product of those of
        its factors.
      magnitude: ``(logits_of, free, label) -> tree``, element(gradient) of one example for the
        leaves ``free`` of the other layers, whose logits are ``logits_of(free)``.

    Returns:
      A tree like the parameters, f32.
    """
    flat = traverse_util.flatten_dict(params)
    found = {
        name: value
        for name, value in _dense_sums(model, params, mode, x, weights, magnitudes, element).items()
        if name in flat  # a Dense layer without bias has no such leaf
    }
    rest = [name for name in flat if name not in found]
    if rest:
        chunk = min(chunk, x.shape[0])
        found |= _other_sums(model, params, mode, rest, chunk, x, weights, labels, magnitude)
    return traverse_util.unflatten_dict({k: found[k].astype(jnp.float32) for k in flat})
