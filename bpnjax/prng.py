"""Random numbers: each use folds the seed's key with its own number, and draws nothing else.

Nothing random is stored: keys derive from (seed, use, task, epoch, step), so that a run taken up
again draws what it would have drawn.
"""

import jax

INIT, METHOD, FRESH, ORDER, PIXELS, FISHER, STEP, ENDED, DROPOUT, STATISTICS = range(10)


def fold(key, *numbers):
    """Folds several integers into a typed PRNG key, one after another.

    Args:
      key: typed PRNG key.
      *numbers: ints, or int scalars that may be traced; their order counts.

    Returns:
      A typed PRNG key; ``key`` itself without numbers.

    Example:
      >>> import jax
      >>> from bpnjax import prng
      >>> one, other = (prng.fold(jax.random.key(0), prng.ORDER, task, 5) for task in (1, 2))
      >>> bool((jax.random.key_data(one) == jax.random.key_data(other)).all())
      False
    """
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key
