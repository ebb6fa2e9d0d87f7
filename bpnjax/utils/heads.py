"""Answers restricted to some outputs, the head of a task."""

import chex
import jax
import jax.numpy as jnp

FAR_BELOW = -1e9  # for logits that must not count; finite, so that 0 times it is 0


def within_head(logits: jax.Array, classes: jax.Array | None) -> jax.Array:
    """Lowers the logits outside a head so far that softmax gives them 0.

    Args:
      logits: f32 ``[..., C]``.
      classes: bool ``[C]``, or ``[..., C]`` where examples have heads of their own; None for all
        outputs.

    Returns:
      f32 ``[..., C]``.

    Raises:
      AssertionError: ``classes`` has another number of outputs, or more axes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from bpnjax.utils.heads import within_head
      >>> jax.nn.softmax(within_head(jnp.zeros(3), jnp.array([True, False, True]))).tolist()
      [0.5, 0.0, 0.5]

    Source: Zenke et al. 2017 (arXiv 1703.04200), Sec. 4.1, the multi-head setup.
    """
    if classes is None:
        return logits
    chex.assert_equal_shape_suffix([logits, classes], 1)
    chex.assert_is_broadcastable(classes.shape, logits.shape)
    return jnp.where(classes, logits, FAR_BELOW)
