"""Summaries of an accuracy matrix: pure functions on float[T, T].

``matrix[i, j]`` is the accuracy on task j after training task i; NaN where it was not tested.
"""

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

__all__ = [
    "average_accuracy",
    "backward_transfer",
    "first_task_accuracy",
    "forgetting",
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


def summarise(matrices: Iterable[ArrayLike]) -> dict[str, dict[str, float | None]]:
    """All summaries of one kind of accuracy over seeds.

    Args:
      matrices: float ``[seeds, T, T]``.

    Returns:
      ``{name: {"mean", "sd"}}`` for `average_accuracy`, `first_task_accuracy`,
      `backward_transfer` and `forgetting`.

    Example:
      >>> from bpnjax.evaluation import metrics
      >>> found = metrics.summarise([[[1.0, 0.0], [0.5, 1.0]], [[1.0, 0.0], [1.0, 1.0]]])
      >>> found["average_accuracy"]["mean"], found["forgetting"]["mean"]
      (0.875, 0.25)
    """
    return {name: mean_and_sd([f(m) for m in matrices]) for name, f in SUMMARIES.items()}
