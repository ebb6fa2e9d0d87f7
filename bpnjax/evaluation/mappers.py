r"""Task mappers keep statistics of each task, and later guess the task of an example from them.

A `Mapper` sees every example as a vector z: random projections of the input, or the features that
enter the network's output layer, of the shared network (``core``) or of the network in a task's
mode (``mode``). When a task ends it is fitted to the vectors of the task's examples, of at most
`bpnjax.evaluation.task_inference.EXAMPLES`; these are dropped again, and no image is kept. The
score of a task says how well an example fits it. The task with the highest score is taken.

Features of ``core`` and ``mode`` tell tasks apart only as long as the shared parameters of the
network do not change.

- `statistics`: one Gaussian of full covariance per task.
- `gmm`: a mixture of k Gaussians of diagonal covariance per task.
- `nearest_mean`: k means per task (k-means); the nearest one's task is taken.
- `mahalanobis`: a mean per class and task, and one covariance of all of them.

Source: Rios and Itti 2020 (arXiv 2011.04783), who put nearest means and Gaussian mixtures on top of
PSP and BD networks; Ge et al. 2023 (SKILL, arXiv 2305.15591), who compare a diagonal mixture of 25
components with the Mahalanobis distance of a shared precision on a frozen network.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bpnjax.evaluation import task_inference
from bpnjax.evaluation.task_inference import Statistics

__all__ = [
    "Mapper",
    "Means",
    "Mixture",
    "TiedMeans",
    "gmm",
    "k_means",
    "mahalanobis",
    "make",
    "mixture",
    "mixture_log_likelihood",
    "nearest_mean",
    "spread_means",
    "squared_distances",
    "statistics",
]

FEATURES = ("core", "mode", "input")
_ROUNDS = 30  # of k-means, and of EM after it


@dataclasses.dataclass(frozen=True, eq=False)
class Mapper:
    """A rule that tells tasks apart by vectors, as pure functions of what it keeps.

    Attributes:
      name: the name of the rule.
      empty: ``(T, d) -> kept``, room for all tasks.
      fit: ``(kept, task, key, z, group, weight) -> kept`` at the end of a task, from its vectors
        f32 ``[n, d]``, the number of each one's class among those of the task, int32 ``[n]``, and
        weights f32 ``[n]``, 0 for padding.
      score: ``(kept, task, z) -> f32 [n]``.
    """

    name: str
    empty: Callable[[int, int], Any]
    fit: Callable[..., Any]
    score: Callable[[Any, Any, jax.Array], jax.Array]


class Mixture(NamedTuple):
    """Gaussians of diagonal covariance; the weights of a mixture sum to 1."""

    mean: jax.Array  # f32 [T, k, d]
    precision: jax.Array  # f32 [T, k, d]
    weight: jax.Array  # f32 [T, k]


class Means(NamedTuple):
    """Means of each task."""

    mean: jax.Array  # f32 [T, k, d]


class TiedMeans(NamedTuple):
    """Means of each task's classes, and the scatter of all examples around theirs."""

    mean: jax.Array  # f32 [T, K, d]
    there: jax.Array  # f32 [T, K], 1 where the task has such a class
    scatter: jax.Array  # f32 [d, d]
    examples: jax.Array  # f32 scalar, how many these are
    precision: jax.Array  # f32 [d, d], from the scatter


def make(name: str, clusters: int, classes: int) -> Mapper:
    """Makes the mapper of a rule.

    Args:
      name: ``"statistics"``, ``"gmm"``, ``"nearest_mean"`` or ``"mahalanobis"``.
      clusters: k, components or means of each task.
      classes: K, the most classes that a task has.

    Returns:
      `Mapper`.

    Example:
      >>> from bpnjax.evaluation import mappers
      >>> mapper = mappers.make("gmm", clusters=3, classes=2)
      >>> mapper.empty(5, 8).mean.shape
      (5, 3, 8)
    """
    made: dict[str, Callable[[], Mapper]] = {
        "statistics": statistics,
        "gmm": partial(gmm, clusters),
        "nearest_mean": partial(nearest_mean, clusters),
        "mahalanobis": partial(mahalanobis, classes),
    }
    return made[name]()


def statistics() -> Mapper:
    """One Gaussian per task; see `bpnjax.evaluation.task_inference.gaussian`."""

    def fit(kept: Statistics, task: Any, key: Any, z: Any, group: Any, weight: Any) -> Statistics:
        del key, group
        real = jnp.where(weight[:, None] > 0, z, 0.0)
        found = task_inference.gaussian(weight.sum(), real.sum(0), real.T @ real)
        return Statistics(*(old.at[task].set(new) for old, new in zip(kept, found, strict=True)))

    def score(kept: Statistics, task: Any, z: jax.Array) -> jax.Array:
        return task_inference.log_likelihood(kept.mean[task], kept.whitener[task], z)

    return Mapper("statistics", task_inference.empty, fit, score)


def gmm(clusters: int) -> Mapper:
    """A mixture of diagonal Gaussians per task, by EM from k-means.

    Args:
      clusters: k.

    Returns:
      `Mapper` whose score is `mixture_log_likelihood`. A hundredth of the mean variance is added to
      all, so that a feature which never varied in training rules nothing out.
    """

    def empty(num_tasks: int, width: int) -> Mixture:
        room = jnp.zeros((num_tasks, clusters, width), jnp.float32)
        return Mixture(
            room, jnp.ones_like(room), jnp.full((num_tasks, clusters), 1.0 / clusters, jnp.float32)
        )

    def fit(kept: Mixture, task: Any, key: Any, z: Any, group: Any, weight: Any) -> Mixture:
        del group
        mean = k_means(z, weight, spread_means(key, z, weight, clusters))
        count = jnp.maximum(weight.sum(), 1.0)
        middle = weight @ z / count
        floor = 0.01 * jnp.mean(weight @ (z - middle) ** 2 / count) + 1e-12
        found = mixture(z, weight, mean, floor)
        return Mixture(*(old.at[task].set(new) for old, new in zip(kept, found, strict=True)))

    def score(kept: Mixture, task: Any, z: jax.Array) -> jax.Array:
        return mixture_log_likelihood(Mixture(*(leaf[task] for leaf in kept)), z)

    return Mapper("gmm", empty, fit, score)


def nearest_mean(clusters: int) -> Mapper:
    """Means of each task by k-means; the score is minus the squared distance to the nearest.

    Args:
      clusters: k.

    Returns:
      `Mapper`.
    """

    def empty(num_tasks: int, width: int) -> Means:
        return Means(jnp.zeros((num_tasks, clusters, width), jnp.float32))

    def fit(kept: Means, task: Any, key: Any, z: Any, group: Any, weight: Any) -> Means:
        del group
        found = k_means(z, weight, spread_means(key, z, weight, clusters))
        return Means(kept.mean.at[task].set(found))

    def score(kept: Means, task: Any, z: jax.Array) -> jax.Array:
        return -jnp.min(squared_distances(z, kept.mean[task]), 1)

    return Mapper("nearest_mean", empty, fit, score)


def mahalanobis(classes: int) -> Mapper:
    r"""A mean per class and task, and one precision of all.

    .. math:: s_t = -\min_c (z - \mu_{tc})^T \Lambda (z - \mu_{tc}), \quad
              \Lambda^{-1} = (1 - a) \Sigma + a \frac{tr \Sigma}{d} I, \quad a = \frac{d}{d + n}

    with the covariance of all n examples so far around the means of their classes.

    Args:
      classes: K, the most classes that a task has.

    Returns:
      `Mapper`.

    Source: Lee et al. 2018 (arXiv 1807.03888), Eq. 1-2, there to detect foreign examples; Ge et al.
    2023 (arXiv 2305.15591), Sec. 3, for tasks. Variant: all examples, where SKILL shares five
    images of each class.
    """

    def empty(num_tasks: int, width: int) -> TiedMeans:
        return TiedMeans(
            jnp.zeros((num_tasks, classes, width), jnp.float32),
            jnp.zeros((num_tasks, classes), jnp.float32),
            jnp.zeros((width, width), jnp.float32),
            jnp.float32(0),
            jnp.eye(width, dtype=jnp.float32),
        )

    def fit(kept: TiedMeans, task: Any, key: Any, z: Any, group: Any, weight: Any) -> TiedMeans:
        del key
        own = jax.nn.one_hot(group, classes, dtype=jnp.float32) * weight[:, None]
        number = own.sum(0)
        mean = own.T @ z / jnp.maximum(number, 1.0)[:, None]
        away = jnp.where(weight[:, None] > 0, z - own @ mean, 0.0)
        scatter, count = kept.scatter + away.T @ away, kept.examples + weight.sum()
        width = z.shape[1]
        covariance, share = scatter / count, width / (width + count)
        size = jnp.maximum(jnp.trace(covariance) / width, 1e-12)
        shrunk = (1 - share) * covariance + (share + 1e-6) * size * jnp.eye(
            width, dtype=jnp.float32
        )
        factor = jax.scipy.linalg.cho_factor(shrunk)
        return TiedMeans(
            kept.mean.at[task].set(mean),
            kept.there.at[task].set(jnp.asarray(number > 0, jnp.float32)),
            scatter,
            count,
            jax.scipy.linalg.cho_solve(factor, jnp.eye(width, dtype=jnp.float32)),
        )

    def score(kept: TiedMeans, task: Any, z: jax.Array) -> jax.Array:
        # Around the middle of all means, which takes no digits. What depends on the example alone
        # is the same for all tasks, and a compiler may compute it once.
        there = kept.there[..., None]
        middle = jnp.sum(kept.mean * there, (0, 1)) / jnp.maximum(there.sum(), 1.0)
        away, mean = z - middle, kept.mean[task] - middle
        turned = away @ kept.precision
        distances = (
            jnp.sum(away * turned, 1)[:, None]
            - 2.0 * turned @ mean.T
            + jnp.sum(mean @ kept.precision * mean, 1)
        )
        # A task without any class, not learned yet, is infinitely far.
        return -jnp.min(jnp.where(kept.there[task] > 0, distances, jnp.inf), 1)

    return Mapper("mahalanobis", empty, fit, score)


def squared_distances(z: jax.Array, mean: jax.Array) -> jax.Array:
    """Squared Euclidean distances.

    Args:
      z: f32 ``[n, d]``.
      mean: f32 ``[k, d]``.

    Returns:
      f32 ``[n, k]``.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.evaluation.mappers import squared_distances
      >>> squared_distances(jnp.array([[3.0, 4.0]]), jnp.array([[0.0, 0.0], [3.0, 3.0]])).tolist()
      [[25.0, 1.0]]
    """
    # One mean after another: the differences of all would be k times as large as z.
    return jax.lax.map(lambda one: jnp.sum((z - one) ** 2, 1), mean).T


def spread_means(key: Any, z: jax.Array, weight: jax.Array, clusters: int) -> jax.Array:
    """Chooses vectors far from each other, from which k-means starts (k-means++).

    Args:
      key: typed PRNG key.
      z: f32 ``[n, d]``.
      weight: f32 ``[n]``, 0 for vectors that must not be taken.
      clusters: k.

    Returns:
      f32 ``[k, d]``: the first by chance, each further one with a probability in proportion to its
      squared distance to the nearest of those before.

    Source: Arthur and Vassilvitskii 2007, "k-means++: the advantages of careful seeding".
    """

    z, weight = jnp.asarray(z), jnp.asarray(weight)

    def take(i: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        means, nearest = carry
        # Where all vectors are means already any one will do.
        share = jnp.where(jnp.sum(nearest * weight) > 0, nearest * weight, weight)
        place = jax.random.categorical(jax.random.fold_in(key, i), jnp.log(share))
        away = jnp.sum((z - z[place]) ** 2, 1)
        return means.at[i].set(z[place]), jnp.where(i > 0, jnp.minimum(nearest, away), away)

    start = (jnp.zeros((clusters, z.shape[1]), jnp.float32), jnp.zeros(z.shape[0], jnp.float32))
    return jax.lax.fori_loop(0, clusters, take, start)[0]


def k_means(z: jax.Array, weight: jax.Array, mean: jax.Array, rounds: int = _ROUNDS) -> jax.Array:
    """k-means by Lloyd's algorithm.

    Args:
      z: f32 ``[n, d]``.
      weight: f32 ``[n]``, 0 for padding.
      mean: f32 ``[k, d]``, to start from.
      rounds: how often vectors are assigned and means taken.

    Returns:
      f32 ``[k, d]``; a mean to which no vector is nearest stays where it was.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.evaluation.mappers import k_means
      >>> z = jnp.array([[0.0], [2.0], [10.0], [99.0]])
      >>> k_means(z, jnp.array([1.0, 1.0, 1.0, 0.0]), jnp.array([[1.5], [2.5]])).tolist()
      [[1.0], [10.0]]

    Source: Lloyd 1982.
    """

    def one(_: Any, mean: jax.Array) -> jax.Array:
        nearest = jnp.argmin(squared_distances(z, mean), 1)
        own = jax.nn.one_hot(nearest, mean.shape[0], dtype=jnp.float32) * weight[:, None]
        number = own.sum(0)[:, None]
        return jnp.where(number > 0, own.T @ z / jnp.maximum(number, 1e-12), mean)

    return jax.lax.fori_loop(0, rounds, one, mean)


def mixture(
    z: jax.Array, weight: jax.Array, mean: jax.Array, floor: Any, rounds: int = _ROUNDS
) -> Mixture:
    """Fits a mixture of diagonal Gaussians by EM, starting from the nearest mean of each vector.

    Args:
      z: f32 ``[n, d]``.
      weight: f32 ``[n]``, 0 for padding; not all 0.
      mean: f32 ``[k, d]``, to start from.
      floor: added to all variances, above 0.
      rounds: of EM after the start.

    Returns:
      `Mixture` of one task: leaves without the axis T.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.evaluation.mappers import mixture
      >>> z = jnp.array([[-1.0], [1.0], [49.0], [51.0]])
      >>> found = mixture(z, jnp.ones(4), jnp.array([[0.0], [50.0]]), floor=1.0)
      >>> [[round(float(v), 3) for v in leaf.ravel()] for leaf in found]
      [[0.0, 50.0], [0.5, 0.5], [0.5, 0.5]]

    Source: Dempster et al. 1977; the floor is scikit-learn's ``reg_covar``.
    """
    clusters = mean.shape[0]

    def maximise(share: jax.Array) -> Mixture:
        share = share * weight[:, None]
        number = share.sum(0) + 1e-6  # of a component without vectors, too
        mean = share.T @ z / number[:, None]

        def variance(of: tuple[jax.Array, ...]) -> jax.Array:
            share, mean, number = of
            return share @ (z - mean) ** 2 / number

        found = jax.lax.map(variance, (share.T, mean, number))
        return Mixture(mean, 1.0 / (found + floor), number / number.sum())

    def one(_: Any, now: Mixture) -> Mixture:
        return maximise(jax.nn.softmax(_log_shares(now, z), 1))

    start = maximise(
        jax.nn.one_hot(jnp.argmin(squared_distances(z, mean), 1), clusters, dtype=jnp.float32)
    )
    return jax.lax.fori_loop(0, rounds, one, start)


def _log_shares(of_task: Mixture, z: jax.Array) -> jax.Array:
    """Log-density of each vector under each component times its weight, f32 [n, k]."""

    def one(of: tuple[jax.Array, ...]) -> jax.Array:
        mean, precision, weight = of
        square = jnp.sum((z - mean) ** 2 * precision, 1)
        scale = jnp.sum(jnp.log(precision)) - z.shape[1] * np.log(2 * np.pi)
        return jnp.log(weight) + 0.5 * (scale - square)

    return jax.lax.map(one, tuple(of_task)).T


def mixture_log_likelihood(of_task: Mixture, z: jax.Array) -> jax.Array:
    r"""The log-density of vectors under a mixture of diagonal Gaussians.

    .. math:: s = \log \sum_k w_k \prod_i \sqrt{\frac{p_{ki}}{2 \pi}}
              e^{-p_{ki} (z_i - \mu_{ki})^2 / 2}

    Args:
      of_task: `Mixture` of one task: leaves without the axis T.
      z: f32 ``[n, d]``.

    Returns:
      f32 ``[n]``.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.evaluation.mappers import Mixture, mixture_log_likelihood
      >>> normal = Mixture(jnp.zeros((1, 1)), jnp.ones((1, 1)), jnp.ones(1))
      >>> round(float(mixture_log_likelihood(normal, jnp.zeros((1, 1)))[0]), 4)
      -0.9189
    """
    return jax.nn.logsumexp(_log_shares(of_task, z), axis=1)
