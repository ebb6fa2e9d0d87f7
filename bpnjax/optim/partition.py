"""Transformations for parts of a parameter tree, chosen by patterns for their paths."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr

__all__ = ["layer_rates", "parse_rates", "partition_by_path"]


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

    def label(params: Any) -> Any:
        wrong = []

        def one(path: tuple[Any, ...], _: Any) -> str:
            name = keystr(path, simple=True, separator="/")
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
      text: ``PATTERN=FACTOR``, several separated by semicolons; "" is not a rule.

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
                f"{part!r} is not a rule ({error}); write PATTERN=FACTOR, as 'conv_.*=0;output=10'"
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
        its keys joined by ``/``, as in `bpnjax.networks.matching`; of several the first counts,
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

    def init(params: Any) -> optax.EmptyState:
        layers = dict.fromkeys(
            keystr(path[:-1], simple=True, separator="/")
            for path, _ in jax.tree_util.tree_leaves_with_path(params)
        )
        for pattern in patterns:
            if not any(pattern.fullmatch(layer) for layer in layers):
                raise ValueError(
                    f"{pattern.pattern!r} matches no layer; there are: {', '.join(layers)}"
                )
        return optax.EmptyState()

    def one(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
        layer = keystr(path[:-1], simple=True, separator="/")
        hits = (c for p, (_, c) in zip(patterns, rules, strict=True) if p.fullmatch(layer))
        factor = next(hits, 1.0)
        return (factor * update).astype(update.dtype) if factor else jnp.zeros_like(update)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return jax.tree_util.tree_map_with_path(one, updates), state

    return optax.GradientTransformation(init, update)
