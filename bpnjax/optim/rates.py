"""Learning rates: how to change them, and how to find the rate of any optimizer."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bpnjax.utils.errors import UserError

__all__ = ["at_rate", "first_step", "following_rate", "has_schedule", "scaled"]


def following_rate(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Multiplies the updates of a transformation by ``rate``, an argument of each update.

    All changes of a learning rate from step to step or task to task are made here.

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
    """Multiplies a tree by a factor. For the float 1.0 it returns the tree itself."""
    if isinstance(rate, float) and rate == 1.0:
        return tree
    return jax.tree.map(lambda leaf: jnp.asarray(rate).astype(leaf.dtype) * leaf, tree)


_PROBE = 1e-2  # size of the gradient that an optimizer is tried with


def first_step(tx: optax.GradientTransformation, params: Any, state: Any = None) -> Any:
    """The learning rate of each leaf, found by trying an optimizer on a small gradient.

    An optimizer whose step grows with the gradient (SGD) moves by the rate times the gradient; one
    that divides by the gradient's size (Adam, RMSprop, sign) moves by the rate.

    Args:
      tx: any optax optimizer, chained, partitioned or scheduled.
      params: the parameters, or a tree like them.
      state: of the optimizer, for the rate at its point of a schedule (of optax or
        `optax.inject_hyperparams`); by default that of its first step.

    Returns:
      A tree of f32 scalars.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from bpnjax.optim.rates import first_step
      >>> [round(float(first_step(tx(3e-4), jnp.zeros(2))), 6) for tx in (optax.adam, optax.sgd)]
      [0.0003, 0.0003]
    """
    # One element per leaf: the same rules apply to it, and a bound on the norm is not met.
    zeros = jax.tree.map(lambda p: jnp.zeros((1,) * p.ndim, p.dtype), params)

    def step(size: float) -> Any:
        fresh = tx.init(zeros)
        if state is not None:
            fresh = jax.tree.map(_now, fresh, state, is_leaf=_is_schedule)
        gradient = jax.tree.map(lambda p: jnp.full_like(p, size), zeros)
        return tx.update(gradient, fresh, zeros)[0]

    def rate(once: jax.Array, twice: jax.Array) -> jax.Array:
        once, twice = (jnp.abs(u.astype(jnp.float32)).reshape(()) for u in (once, twice))
        return jnp.where(twice > 1.5 * once, once / _PROBE, once)

    return jax.tree.map(rate, step(_PROBE), step(2 * _PROBE))


def _is_schedule(node: Any) -> bool:
    """Is this the state of a schedule: a count of steps, or hyper-parameters that may change?"""
    return isinstance(node, optax.ScaleByScheduleState) or hasattr(node, "hyperparams")


def _now(fresh: Any, current: Any) -> Any:
    if not _is_schedule(fresh):
        return fresh
    if isinstance(fresh, optax.ScaleByScheduleState):
        return current
    return current._replace(inner_state=fresh.inner_state)


def has_schedule(tx: optax.GradientTransformation, params: Any) -> bool:
    """Says whether the learning rate of an optimizer may change from step to step.

    Args:
      tx: any optax optimizer.
      params: the parameters or their shapes.

    Returns:
      True or False, by the structure of the optimizer's state.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from bpnjax.optim.rates import has_schedule
      >>> schedule = optax.cosine_decay_schedule(1.0, 10)
      >>> [has_schedule(optax.sgd(rate), jnp.zeros(1)) for rate in (1.0, schedule)]
      [False, True]
    """
    state = jax.eval_shape(tx.init, params)
    return any(map(_is_schedule, jax.tree.leaves(state, is_leaf=_is_schedule)))


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
