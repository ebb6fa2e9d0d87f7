"""Random numbers: each use folds the seed's key with its own number, and draws nothing else.

Nothing random is stored: keys derive from (seed, use, task, epoch, step), so that a run taken up
again draws what it would have drawn.
"""

import jax

INIT, METHOD, FRESH, ORDER, PIXELS, FISHER, STEP, ENDED, DROPOUT, STATISTICS = range(10)


def fold(key, *numbers):
    """Folds several integers, which may be traced, into a typed PRNG key, one after another."""
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key
