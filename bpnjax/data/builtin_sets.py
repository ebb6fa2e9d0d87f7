"""Sets that need no download: scikit-learn's handwritten digits and three Gaussian clusters."""

import numpy as np

from bpnjax.data.arrays import Arrays

TRAIN_DIGITS = 1400


def digits() -> Arrays:
    """The 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn.

    They have no official split. A fixed shuffle gives 1,400 training and 397 test images.

    Returns:
      `Arrays`: uint8 images ``[n, 8, 8, 1]`` with values 0 to 16, int32 labels ``[n]``.

    Source: UCI, Alpaydin and Kaynak 1998, by way of ``sklearn.datasets.load_digits``.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    images = bunch.images.astype(np.uint8)[order, :, :, None]
    labels = bunch.target.astype(np.int32)[order]
    n = TRAIN_DIGITS
    names = tuple(str(i) for i in range(10))
    return Arrays(images[:n], labels[:n], images[n:], labels[n:], names, 16.0, "1797")


def gaussians() -> Arrays:
    """Three Gaussian clusters in the plane, for figures of decision regions.

    Means (0, 0), (-2, 2) and (2, 2), standard deviation 0.5, 500 training and 200 test points per
    cluster.

    Returns:
      `Arrays`: f32 points ``[n, 2]``, int32 labels ``[n]`` (black, red, light blue).

    Example:
      >>> from bpnjax.data import builtin_sets
      >>> found = builtin_sets.gaussians()
      >>> found.train_images.shape, found.test_labels.shape
      ((1500, 2), (600,))

    Source: after Wen et al. 2020 (arXiv 2009.13954), Fig. 5. Variant: the paper gives no means,
    variances or sizes; these are ours.
    """
    rng = np.random.default_rng(0)
    means = np.array([[0.0, 0.0], [-2.0, 2.0], [2.0, 2.0]])
    labels = [np.tile(np.arange(3, dtype=np.int32), n) for n in (500, 200)]
    points = [(means[y] + 0.5 * rng.normal(size=(len(y), 2))).astype(np.float32) for y in labels]
    names = ("black", "red", "light blue")
    return Arrays(points[0], labels[0], points[1], labels[1], names, 1.0, "1")


SETS = {"digits": digits, "gaussians": gaussians}
