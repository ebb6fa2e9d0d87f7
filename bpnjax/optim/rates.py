"""Learning rates: changed in one place, and found out of any optimizer."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bpnjax.utils.errors import UserError

__all__ = ["at_rate", "first_step", "following_rate", "scaled"]


def following_rate(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The transformation with its updates times ``rate``, an argument of each update.

    The one place where a learning rate changes from step to step or from task to task.

    Args:
      tx: any optax transformation.

    Returns:
      A transformation whose ``update`` takes ``rate``, a scalar that may be traced; 1.0 by default.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from bpnjax.optim.rates import following_rate
      >>> tx = following_rate(optax.sgd(1.0))
      >>> tx.update(jnp.ones(1), tx.init(jnp.ones(1)), rate=0.5)[0].tolist()
      [-0.5]
    """
    inner = optax.with_extra_args_support(tx)

    def update(
        updates: Any, state: Any, params: Any = None, *, rate: Any = 1.0, **more: Any
    ) -> Any:
        updates, state = inner.update(updates, state, params, **more)
        return scaled(updates, rate), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def scaled(tree: Any, rate: Any) -> Any:
    """A tree times a factor; the tree itself for the float 1.0."""
    if isinstance(rate, float) and rate == 1.0:
        return tree
    return jax.tree.map(lambda leaf: jnp.asarray(rate).astype(leaf.dtype) * leaf, tree)


def first_step(tx: optax.GradientTransformation, params: Any) -> Any:
    """The learning rate of each leaf: how far the optimizer's first step goes on a gradient of 1.

    It is exact for SGD and the optimizers that divide by a gradient's size (Adam, RMSprop up to
    their constants), whatever they are chained or partitioned with.

    Args:
      tx: any optax optimizer.
      params: the parameters, or a tree like them.

    Returns:
      A tree of f32 scalars.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from bpnjax.optim.rates import first_step
      >>> round(float(first_step(optax.adam(3e-4), jnp.zeros(2))), 6)
      0.0003
    """
    zeros = jax.tree.map(jnp.zeros_like, params)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(ones, tx.init(zeros), zeros)
    return jax.tree.map(lambda u: jnp.abs(jnp.mean(u.astype(jnp.float32))), updates)


def at_rate(tx: optax.GradientTransformation, rate: float) -> optax.GradientTransformation:
    """The same optimizer at another learning rate, by the length of its first step.

    Args:
      tx: any optax optimizer that does not look at the names of leaves.
      rate: the new learning rate.

    Returns:
      An `optax.GradientTransformation`.

    Raises:
      UserError: the first step of the optimizer is not known, or 0.
    """
    try:
        with jax.ensure_compile_time_eval():
            now = float(first_step(tx, jnp.zeros(1)))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"optimizer: its learning rate cannot be changed to the method's {rate} "
            f"({type(error).__name__}: it acts on named leaves); pass "
            "bpnjax.learner(..., task_optimizer=...)"
        ) from error
    if not now > 0:
        raise UserError(
            f"optimizer: its first step is 0, so it cannot be brought to the method's rate {rate}; "
            "pass bpnjax.learner(..., task_optimizer=...)"
        )
    return optax.chain(tx, optax.scale(rate / now))
