"""Sums over examples of element-wise functions of per-example gradients, in one backward pass.

Consider a Dense layer that is called once, with inputs ``a`` [n, d] and output gradients ``delta``
[n, k] from one batched backward pass. The kernel's gradient for example i is ``a_i delta_i^T``. Its
square is ``a_i^2 (delta_i^2)^T``, so the sum over examples is a matrix product, and no array of
size n x parameters is needed. Other layers use `jax.vmap` of `jax.grad`, a chunk at a time.
"""

from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from bpnjax.networks import Layer, Network
from bpnjax.utils.arrays import names_of

Backward = Callable[[jax.Array], dict[str, jax.Array]]  # cotangent of outputs -> {layer: ...}
Loss = Callable[[jax.Array, jax.Array], jax.Array]  # (outputs, labels) -> losses [n]


def check_labels(outputs: Any, labels: Any) -> None:
    """Raises an error for labels that are not classes; a softmax would give a wrong finite result.

    Args:
      outputs: of the network, or their shape; ``[n, C]`` for classes.
      labels: int ``[n]``. Their range is checked unless they are traced.

    Raises:
      ValueError: the shapes do not fit, labels are not integers, or one is outside 0 to C - 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.importance.per_example import check_labels
      >>> check_labels(jnp.zeros((1, 3)), jnp.array([3]))
      Traceback (most recent call last):
      ...
      ValueError: label 3 is not a class of 3 outputs; labels are 0 to 2
    """
    whole = jnp.issubdtype(jnp.result_type(labels), jnp.integer)
    if len(outputs.shape) != 2 or jnp.shape(labels) != outputs.shape[:1] or not whole:
        raise ValueError(
            f"outputs {tuple(outputs.shape)} and labels {jnp.shape(labels)} of "
            f"{jnp.result_type(labels)} have no cross-entropy of classes, [n, C] and int [n]; "
            "pass loss="
        )
    if not isinstance(labels, jax.core.Tracer):
        known = np.asarray(labels)
        for label in (known.min(), known.max()):
            if not 0 <= label < outputs.shape[1]:
                raise ValueError(
                    f"label {label} is not a class of {outputs.shape[1]} outputs; labels are 0 to "
                    f"{outputs.shape[1] - 1}"
                )


def check_batch(x: Any, weights: Any, classes: Any = None, labels: Any = None) -> None:
    """Raises an error for arrays that do not fit the batch but would broadcast against it.

    Args:
      x: inputs ``[n, ...]``.
      weights: of the examples, ``[n]``.
      classes: ``[C]``, or None.
      labels: ``[n, ...]``, or None where `check_labels` checks them.

    Raises:
      AssertionError: an array has another rank or another number of examples.
    """
    chex.assert_rank(weights, 1)
    chex.assert_equal_shape_prefix([x, weights], 1)
    if classes is not None:
        chex.assert_rank(classes, 1)
    if labels is not None:
        chex.assert_equal_shape_prefix([x, labels], 1)


def gradients_of_losses(loss: Loss, outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """The derivative of each example's loss for its outputs.

    Args:
      loss: ``(outputs, labels) -> losses [n]``.
      outputs: f32 ``[n, ...]``.
      labels: ``[n, ...]``.

    Returns:
      f32 like the outputs.

    Raises:
      AssertionError: the loss is not a vector ``[n]``, as when labels ``[n]`` broadcast against
        outputs ``[n, 1]`` to ``[n, n]``.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.importance.per_example import gradients_of_losses
      >>> squares = lambda outputs, labels: jnp.square(outputs - labels).sum(1)
      >>> gradients_of_losses(squares, jnp.array([[3.0]]), jnp.array([[1.0]])).tolist()
      [[4.0]]
    """

    def total(outputs: jax.Array) -> jax.Array:
        losses = loss(outputs, labels)
        chex.assert_shape(losses, outputs.shape[:1])
        return jnp.sum(losses)

    return jax.grad(total)(outputs)


def one_pass_layers(layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """The layers that one backward pass covers: Dense, called once, on [n, d], not lifted.

    Args:
      layers: ``{path: Layer}`` as in `Network.layers`.

    Returns:
      The part of ``layers`` that needs no per-example gradients.
    """
    return {
        path: layer
        for path, layer in layers.items()
        if layer.kind == "dense" and layer.calls == 1 and layer.rank == 2 and layer.plain
    }


def probe(
    network: Network, params: Any, mode: Any, x: jax.Array
) -> tuple[jax.Array, Backward, dict[str, list[jax.Array]]]:
    """Runs the network and returns what the outer-product identity needs.

    Args:
      network: maps ``x`` to outputs ``[n, ...]``.
      params: its parameters.
      mode: of one task for the whole batch; ``{}`` for none.
      x: inputs ``[n, ...]``.

    Returns:
      Outputs f32 ``[n, ...]``; a function from their cotangent to ``{path: f32 [n, outputs]}``, the
      derivative for the output of each of `one_pass_layers`; and the layers' inputs,
      ``{path: [[n, d]]}``.
    """
    tapped = network.tapped
    if tapped is None:
        outputs, _ = network.apply(params, mode, x)
        return outputs.astype(jnp.float32), lambda cotangent: {}, {}
    layers = one_pass_layers(network.layers)
    probes = {
        path: jnp.zeros((x.shape[0], layer.outputs), jnp.float32) for path, layer in layers.items()
    }

    def forward(probes: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        outputs, inputs = tapped(params, mode, x, probes=probes, record=tuple(layers))
        return outputs.astype(jnp.float32), inputs

    outputs, backward, inputs = jax.vjp(forward, probes, has_aux=True)
    return outputs, lambda cotangent: backward(cotangent)[0], inputs


def _dense_sums(
    network: Network,
    params: Any,
    mode: Any,
    x: jax.Array,
    weights: jax.Array,
    magnitudes: Callable[[jax.Array, Backward], dict[str, jax.Array]],
    element: Callable[[jax.Array], jax.Array],
) -> dict[str, jax.Array]:
    """Sums ``element(gradient)`` over examples for the layers of `one_pass_layers`.

    ``element`` is a square or an absolute value, so ``element`` of an outer product is the outer
    product of ``element`` of its factors. ``magnitudes(logits, backward)`` gives element(delta).
    """
    logits, backward, inputs = probe(network, params, mode, x)
    sums = {}
    for path, size in magnitudes(logits, backward).items():
        weighted = weights[:, None] * size
        (layer_input,) = inputs[path]
        at = f"{path}/" if path else ""
        sums[f"{at}kernel"] = element(layer_input.astype(jnp.float32)).T @ weighted
        sums[f"{at}bias"] = weighted.sum(0)
    return sums


def _other_sums(
    network: Network,
    params: Any,
    mode: Any,
    places: list[int],
    chunk: int,
    x: jax.Array,
    weights: jax.Array,
    labels: jax.Array,
    magnitude: Callable[..., Any],
) -> list[jax.Array]:
    """Sums ``element(gradient)`` over examples for the other parameters, by vmap of grad.

    ``magnitude(logits_of, free, label)`` gives element(gradient) of one example, where
    ``logits_of(free)`` are its logits as a function of these parameters.
    """
    leaves, structure = jax.tree.flatten(params)
    # Gradients of bf16 parameters are squared and summed in f32.
    free = [leaves[place].astype(jnp.float32) for place in places]

    def one_example(example: tuple[jax.Array, ...]) -> Any:
        x_i, label, weight = example

        def logits_of(free: Any) -> jax.Array:
            every = list(leaves)
            for place, leaf in zip(places, free, strict=True):
                every[place] = leaf.astype(leaves[place].dtype)
            outputs, _ = network.apply(jax.tree.unflatten(structure, every), mode, x_i[None])
            return outputs[0].astype(jnp.float32)

        return jax.tree.map(lambda m: weight * m, magnitude(logits_of, free, label))

    def one_chunk(sums: Any, examples: tuple[jax.Array, ...]) -> tuple[Any, None]:
        return jax.tree.map(lambda s, m: s + m.sum(0), sums, jax.vmap(one_example)(examples)), None

    padded = in_pieces((x, labels, weights), chunk)
    sums: list[jax.Array]
    sums, _ = jax.lax.scan(one_chunk, jax.tree.map(jnp.zeros_like, free), padded)
    return sums


def in_pieces(arrays: tuple[jax.Array, ...], size: int) -> tuple[jax.Array, ...]:
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


def sums(
    network: Network,
    params: Any,
    mode: Any,
    x: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    chunk: int,
    magnitudes: Callable[[jax.Array, Backward], dict[str, jax.Array]],
    element: Callable[[jax.Array], jax.Array],
    magnitude: Callable[..., Any],
) -> Any:
    """Sums ``element(gradient)``, an element-wise function of per-example gradients, over a batch.

    Args:
      network: maps ``x`` to outputs ``[n, ...]``.
      params: its parameters.
      mode: of one task for the whole batch; ``{}`` for none.
      x: inputs ``[n, ...]``.
      labels: of the examples, ``[n, ...]``, passed to ``magnitude``.
      weights: f32 ``[n]``, of the examples.
      chunk: number of examples at a time where a layer needs `jax.vmap` of `jax.grad`.
      magnitudes: ``(logits, backward) -> {path: f32 [n, outputs]}``, element(delta) of each of
        `one_pass_layers`; ``backward`` comes from `probe`.
      element: `jax.numpy.square` or `jax.numpy.abs`.
      magnitude: ``(logits_of, free, label) -> tree``, element(gradient) of one example for the
        parameters ``free`` of the other layers, whose logits are ``logits_of(free)``.

    Returns:
      A tree like the parameters, f32.
    """
    covered = _dense_sums(network, params, mode, x, weights, magnitudes, element)
    structure = jax.tree.structure(params)
    # A Dense layer without bias has no such parameter.
    found: list[Any] = [covered.get(name) for name in jax.tree.leaves(names_of(params))]
    rest = [place for place, value in enumerate(found) if value is None]
    if rest:
        chunk = min(chunk, x.shape[0])
        others = _other_sums(network, params, mode, rest, chunk, x, weights, labels, magnitude)
        for place, value in zip(rest, others, strict=True):
            found[place] = value
    return jax.tree.unflatten(structure, [value.astype(jnp.float32) for value in found])
