r"""Guesses the task of an example: each task gets a score, and the highest is taken.

`entropy` and `max_logit` ask how sure the network is in each mode. The third rule, ``statistics``,
asks how well an example's input fits what each task's inputs were: a Gaussian of r fixed random
projections of the input (`directions`), fitted when the task ends (`gaussian`), compared by
`log_likelihood`. It uses the input of the network and not of deeper layers, which change as the
network goes on learning. It uses the input before any key, so that all tasks are compared in one
space.

Further rules of this kind are in `bpnjax.evaluation.mappers`.

If all examples of a batch belong to one task, their scores are summed (`choose`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

__all__ = [
    "ANSWERS",
    "MAPPERS",
    "RULES",
    "Guess",
    "Statistics",
    "choose",
    "directions",
    "empty",
    "entropy",
    "gaussian",
    "log_likelihood",
    "max_logit",
]

EXAMPLES = 5000  # of a task, at most, that its mapper is fitted to


def entropy(logits: jax.Array) -> jax.Array:
    r"""Minus the predictive entropy: how sure the network is in a mode.

    .. math:: s = \sum_c p_c \log p_c, \quad p = softmax(z)

    Args:
      logits: f32 ``[..., C]``.

    Returns:
      f32 ``[...]``, nats, at most 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.evaluation import task_inference
      >>> task_inference.entropy(jnp.array([[0.0, 0.0], [9.0, 0.0]])).round(3).tolist()
      [-0.6930000185966492, -0.0010000000474974513]

    Source: Wortsman et al. 2020 (SupSup, arXiv 2006.14769), Sec. 3.3, who follow its gradient.
    """
    log_p = jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(log_p) * log_p, -1)


def max_logit(logits: jax.Array) -> jax.Array:
    r"""The largest logit.

    .. math:: s = \max_c z_c

    Args:
      logits: f32 ``[..., C]``.

    Returns:
      f32 ``[...]``.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.evaluation import task_inference
      >>> task_inference.max_logit(jnp.array([[1.0, 3.0]])).tolist()
      [3.0]

    Source: Hendrycks et al. 2019 (arXiv 1911.11132), there to detect foreign examples.
    """
    return jnp.max(logits, -1)


ANSWERS = {"entropy": entropy, "max_logit": max_logit}  # rules on the answers in each mode
MAPPERS = ("statistics", "gmm", "nearest_mean", "mahalanobis")  # rules on what is kept per task
RULES = (*ANSWERS, *MAPPERS)


class Guess(NamedTuple):
    """Answers when the task was not told."""

    task: np.ndarray  # int32 [n], of the mode taken, from 0
    outputs: np.ndarray  # int32 [n], the answers in that mode
    scores: np.ndarray  # f32 [n, T], of each mode by the rule; the highest is taken


class Statistics(NamedTuple):
    """A Gaussian of each task's projected inputs; zeros until the task has ended."""

    mean: jax.Array  # f32 [T, r]
    whitener: jax.Array  # f32 [T, r (r + 1) / 2], rows of the lower triangle that `gaussian` gives


def empty(num_tasks: int, projections: int) -> Statistics:
    """Room for the statistics of all tasks.

    Args:
      num_tasks: T.
      projections: r.

    Returns:
      `Statistics` of zeros.
    """
    triangle = projections * (projections + 1) // 2
    return Statistics(
        jnp.zeros((num_tasks, projections), jnp.float32),
        jnp.zeros((num_tasks, triangle), jnp.float32),
    )


def directions(key: jax.Array, inputs: int, projections: int) -> jax.Array:
    """Random directions on which inputs are projected, the same for all tasks, never stored.

    Args:
      key: typed PRNG key.
      inputs: numbers in one input, d.
      projections: r.

    Returns:
      f32 ``[d, r]``, each element +-1/sqrt(d).

    Source: Achlioptas 2003 (signs); Dasgupta 1999, "Learning mixtures of Gaussians", for telling
    Gaussians apart after a random projection.
    """
    # Not `jax.random.rademacher`, which draws other numbers where 64-bit floats are on.
    positive = jax.random.uniform(key, (inputs, projections), jnp.float32) < 0.5
    return jnp.where(positive, 1.0, -1.0).astype(jnp.float32) * jnp.float32(inputs**-0.5)


def gaussian(
    count: jax.Array | float, total: jax.Array, products: jax.Array
) -> tuple[jax.Array, jax.Array]:
    r"""Computes the Gaussian of examples from their sums, in the form that `log_likelihood` takes.

    .. math:: \Sigma' = (1 - a) \Sigma + a \frac{tr \Sigma}{r} I, \quad a = \frac{r}{r + n},
              \quad W = L^{-1}, \ \Sigma' = L L^T

    The covariance is shrunk a little towards a multiple of the identity, so that it has an inverse
    for any number of examples.

    Args:
      count: n, f32 scalar.
      total: sum of the examples, f32 ``[r]``.
      products: sum of their outer products, f32 ``[r, r]``.

    Returns:
      The mean f32 ``[r]`` and the lower triangle of W by rows, f32 ``[r (r + 1) / 2]``.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.evaluation import task_inference
      >>> z = jnp.array([[-1.0], [5.0]])  # mean 2, variance 9: W = 1/3
      >>> mean, whitener = task_inference.gaussian(2.0, z.sum(0), z.T @ z)
      >>> mean.tolist(), round(float(whitener[0]), 4)
      ([2.0], 0.3333)
    """
    r = total.shape[0]
    mean = total / count
    covariance = products / count - jnp.outer(mean, mean)
    share = r / (r + count)
    size = jnp.maximum(jnp.trace(covariance) / r, 1e-12)  # of inputs that are all the same
    covariance = (1 - share) * covariance + (share * size + 1e-6 * size) * jnp.eye(
        r, dtype=jnp.float32
    )
    lower = jnp.linalg.cholesky(covariance)
    whitener = jax.scipy.linalg.solve_triangular(lower, jnp.eye(r, dtype=jnp.float32), lower=True)
    return mean, whitener[np.tril_indices(r)]


def log_likelihood(mean: jax.Array, whitener: jax.Array, z: jax.Array) -> jax.Array:
    r"""The log-density of projected inputs under a task's Gaussian, up to a constant of all tasks.

    .. math:: s = -\tfrac12 |W (z - \mu)|^2 + \sum_i \log W_{ii}

    Args:
      mean: f32 ``[r]``.
      whitener: f32 ``[r (r + 1) / 2]``, as `gaussian` gives it.
      z: f32 ``[n, r]``, inputs times `directions`.

    Returns:
      f32 ``[n]``.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.evaluation import task_inference
      >>> z = jnp.array([[2.0], [4.0]])  # W = 1/2: -(0, 1)/2 - log 2
      >>> s = task_inference.log_likelihood(jnp.array([2.0]), jnp.array([0.5]), z)
      >>> (s + jnp.log(2.0)).round(4).tolist()
      [0.0, -0.5]
    """
    r = mean.shape[0]
    w = jnp.zeros((r, r), jnp.float32).at[np.tril_indices(r)].set(whitener)
    return jnp.sum(jnp.log(jnp.diag(w))) - 0.5 * jnp.sum(((z - mean) @ w.T) ** 2, -1)


def choose(scores: ArrayLike, per: str = "example") -> np.ndarray:
    """The task of the highest score.

    Args:
      scores: f32 ``[n, T]``; NaN is never the highest.
      per: ``"example"``, or ``"batch"`` if all n belong to one task; their scores are then summed.

    Returns:
      int32 ``[n]``.

    Raises:
      ValueError: another ``per``, or an example whose every score is NaN.

    Example:
      >>> from bpnjax.evaluation import task_inference
      >>> scores = [[0.0, 1.0], [9.0, 0.0]]
      >>> task_inference.choose(scores).tolist(), task_inference.choose(scores, "batch").tolist()
      ([1, 0], [0, 0])
    """
    scores = np.asarray(scores)
    if per not in ("example", "batch"):
        raise ValueError(f"per {per!r}; tasks are inferred per 'example' or per 'batch'")
    if per == "batch":
        scores = np.broadcast_to(scores.sum(0), scores.shape)
    broken = np.isnan(scores)
    if (nowhere := broken.all(1)).any():
        raise ValueError(f"the scores of example {int(nowhere.argmax())} are NaN in every mode")
    return np.where(broken, -np.inf, scores).argmax(1).astype(np.int32)
