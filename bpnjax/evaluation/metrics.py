"""Summaries of an accuracy matrix: pure functions on float[T, T].

``matrix[i, j]`` is the accuracy on task j after training task i; NaN where it was not tested.
"""

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

__all__ = [
    "average_accuracy",
    "average_incremental_accuracy",
    "backward_transfer",
    "first_task_accuracy",
    "forgetting",
    "last_accuracy",
    "mean_and_sd",
    "summarise",
]


def average_accuracy(matrix: ArrayLike) -> float:
    r"""Mean accuracy over all tasks after the last one.

    .. math:: ACC = \frac{1}{T} \sum_j R_{T,j}

    Args:
      matrix: R, float ``[T, T]``: row i holds the accuracies on all tasks after task i, NaN where
        not tested.

    Returns:
      A float, a share from 0 to 1; NaN if the last row was not tested.

    Example:
      >>> from bpnjax.evaluation import metrics
      >>> metrics.average_accuracy([[1.0, float("nan")], [0.5, 0.75]])
      0.625

    Source: Lopez-Paz and Ranzato 2017 (GEM, arXiv 1706.08840), Eq. 2.
    """
    return float(np.mean(np.asarray(matrix, float)[-1]))


def first_task_accuracy(matrix: ArrayLike) -> float:
    """Accuracy on the first task after the last one, the figure of the BPN paper's Table I.

    .. math:: R_{T,1}

    Args:
      matrix: R, float ``[T, T]``.

    Returns:
      A float, a share from 0 to 1.

    Example:
      >>> from bpnjax.evaluation import metrics
      >>> metrics.first_task_accuracy([[1.0, float("nan")], [0.5, 0.75]])
      0.5

    Source: Wen et al. 2020 (arXiv 2009.13954), Table I.
    """
    return float(np.asarray(matrix, float)[-1, 0])


def backward_transfer(matrix: ArrayLike) -> float:
    r"""Mean change of a task's accuracy from its own training to the end; negative is forgetting.

    .. math:: BWT = \frac{1}{T-1} \sum_{j<T} (R_{T,j} - R_{j,j})

    Args:
      matrix: R, float ``[T, T]``.

    Returns:
      A float from -1 to 1; NaN for one task, or where the diagonal was not tested.

    Example:
      >>> from bpnjax.evaluation import metrics
      >>> metrics.backward_transfer([[1.0, float("nan")], [0.5, 0.75]])
      -0.5

    Source: Lopez-Paz and Ranzato 2017 (GEM, arXiv 1706.08840), Eq. 3.
    """
    matrix = np.asarray(matrix, float)
    if len(matrix) < 2:
        return math.nan
    return float(np.mean(matrix[-1, :-1] - np.diag(matrix)[:-1]))


def forgetting(matrix: ArrayLike) -> float:
    r"""Mean drop from the best accuracy a task ever had before the end.

    .. math:: F = \frac{1}{T-1} \sum_{j<T} (\max_{i<T} R_{i,j} - R_{T,j})

    Args:
      matrix: R, float ``[T, T]``; rows that were not tested are passed over.

    Returns:
      A float from -1 to 1; NaN for one task, or where a task was never tested before the end.

    Example:
      >>> from bpnjax.evaluation import metrics
      >>> metrics.forgetting([[1.0, float("nan")], [0.5, 0.75]])
      0.5

    Source: Chaudhry et al. 2018 (arXiv 1801.10112), Eq. 3. Variant: the maximum excludes the last
    row, as there, so that a task which improved counts as negative forgetting.
    """
    matrix = np.asarray(matrix, float)
    if len(matrix) < 2:
        return math.nan
    earlier, last = matrix[:-1, :-1], matrix[-1, :-1]
    if np.isnan(earlier).all(axis=0).any():
        return math.nan
    return float(np.mean(np.nanmax(earlier, axis=0) - last))


def _accuracy_so_far(row: np.ndarray, count: np.ndarray) -> float:
    """Accuracy on the test examples of all tasks that a row covers."""
    return float(row @ count / count.sum())


def _counts(matrix: np.ndarray, count: ArrayLike | None) -> np.ndarray:
    return np.ones(len(matrix)) if count is None else np.asarray(count, float)


def last_accuracy(matrix: ArrayLike, count: ArrayLike | None = None) -> float:
    r"""Accuracy on all classes after the last task, of all test examples together.

    .. math:: A_T = \frac{1}{\sum_j n_j} \sum_j n_j R_{T,j}

    It is `average_accuracy` where all tasks have as many test examples.

    Args:
      matrix: R, float ``[T, T]``.
      count: n, test examples of each task, ``[T]``; by default all tasks have as many.

    Returns:
      A float, a share from 0 to 1; NaN if the last row was not tested.

    Example:
      >>> from bpnjax.evaluation import metrics
      >>> metrics.last_accuracy([[1.0, float("nan")], [0.5, 0.75]], count=[30, 10])
      0.5625

    Source: Rebuffi et al. 2017 (iCaRL, arXiv 1611.07725), Sec. 4; the name of Zhou et al. 2024
    (TPAMI, arXiv 2302.03648).
    """
    matrix = np.asarray(matrix, float)
    return _accuracy_so_far(matrix[-1], _counts(matrix, count))


def average_incremental_accuracy(matrix: ArrayLike, count: ArrayLike | None = None) -> float:
    r"""Mean over the steps of the accuracy on all classes that were seen so far.

    .. math:: \bar A = \frac{1}{T} \sum_i A_i, \quad
              A_i = \frac{1}{\sum_{j \le i} n_j} \sum_{j \le i} n_j R_{i,j}

    Args:
      matrix: R, float ``[T, T]``: row i holds the accuracies on all tasks after task i.
      count: n, test examples of each task, ``[T]``; by default all tasks have as many.

    Returns:
      A float, a share from 0 to 1; NaN unless all tasks so far were tested after each task.

    Example:
      >>> from bpnjax.evaluation import metrics
      >>> metrics.average_incremental_accuracy([[1.0, float("nan")], [0.5, 0.75]], count=[30, 10])
      0.78125

    Source: Rebuffi et al. 2017 (iCaRL, arXiv 1611.07725), Sec. 4, there "average incremental
    accuracy". Variant: with the first step, as most papers since; iCaRL leaves it out.
    """
    matrix = np.asarray(matrix, float)
    n = _counts(matrix, count)
    steps = [_accuracy_so_far(matrix[i, : i + 1], n[: i + 1]) for i in range(len(matrix))]
    return float(np.mean(steps))


SUMMARIES = {
    "average_accuracy": average_accuracy,
    "first_task_accuracy": first_task_accuracy,
    "backward_transfer": backward_transfer,
    "forgetting": forgetting,
}


def mean_and_sd(values: ArrayLike) -> dict[str, float | None]:
    r"""Mean and sample standard deviation (n - 1) over seeds; None where there is none.

    .. math:: \mathrm{sd} = \sqrt{\frac{1}{n - 1} \sum_i (x_i - \bar x)^2}

    Args:
      values: floats, one per seed.

    Returns:
      ``{"mean": ..., "sd": ...}``; sd is None for one seed, both are if a value is NaN.

    Example:
      >>> from bpnjax.evaluation import metrics
      >>> metrics.mean_and_sd([1.0, 3.0])
      {'mean': 2.0, 'sd': 1.4142135623730951}
    """
    values = np.asarray(values, float)
    mean = float(values.mean())
    sd = float(values.std(ddof=1)) if len(values) > 1 else math.nan
    return {
        "mean": None if math.isnan(mean) else mean,
        "sd": None if math.isnan(sd) else sd,
    }


# Of the classes so far, whose tasks weigh as much as they have test examples.
ANYTIME = {
    "last_accuracy": last_accuracy,
    "average_incremental_accuracy": average_incremental_accuracy,
}


def summarise(
    matrices: Iterable[ArrayLike], count: ArrayLike | None = None
) -> dict[str, dict[str, float | None]]:
    """All summaries of one kind of accuracy over seeds.

    Args:
      matrices: float ``[seeds, T, T]``.
      count: test examples of each task, ``[T]``; by default all tasks have as many.

    Returns:
      ``{name: {"mean", "sd"}}`` for `average_accuracy`, `first_task_accuracy`,
      `backward_transfer`, `forgetting`, `last_accuracy` and `average_incremental_accuracy`.

    Example:
      >>> from bpnjax.evaluation import metrics
      >>> found = metrics.summarise([[[1.0, 0.0], [0.5, 1.0]], [[1.0, 0.0], [1.0, 1.0]]])
      >>> found["average_accuracy"]["mean"], found["forgetting"]["mean"]
      (0.875, 0.25)
    """
    kept = list(matrices)
    found = {name: mean_and_sd([f(m) for m in kept]) for name, f in SUMMARIES.items()}
    return found | {name: mean_and_sd([f(m, count) for m in kept]) for name, f in ANYTIME.items()}
