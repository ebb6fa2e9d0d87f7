"""Answers restricted to some outputs: the head of a task."""

import jax
import jax.numpy as jnp

FAR_BELOW = -1e9  # instead of a logit that must not count; finite, so that 0 times it is 0


def within_head(logits: jax.Array, classes: jax.Array | None) -> jax.Array:
    """Puts the logits outside a head so far below that softmax gives them 0.

    Args:
      logits: f32 ``[..., C]``.
      classes: bool, broadcasts against them; None for all outputs.

    Returns:
      f32 ``[..., C]``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from bpnjax.utils.heads import within_head
      >>> jax.nn.softmax(within_head(jnp.zeros(3), jnp.array([True, False, True]))).tolist()
      [0.5, 0.0, 0.5]

    Source: Zenke et al. 2017 (arXiv 1703.04200), Sec. 4.1, the multi-head setup.
    """
    return logits if classes is None else jnp.where(classes, logits, FAR_BELOW)
