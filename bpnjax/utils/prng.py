"""Random numbers: each use folds the seed's key with its own number, and draws nothing else.

Nothing random is stored: keys derive from (seed, use, task, epoch, step), so that a run taken up
again draws what it would have drawn.
"""

from typing import Any

import jax

INIT, METHOD, FRESH, ORDER, PIXELS, FISHER, STEP, ENDED, DROPOUT, STATISTICS, REPLAY = range(11)


def fold(key: jax.Array, *numbers: Any) -> jax.Array:
    """Folds several integers into a typed PRNG key, one after another.

    Args:
      key: typed PRNG key.
      *numbers: ints, or int scalars that may be traced; their order counts.

    Returns:
      A typed PRNG key; ``key`` itself without numbers.

    Example:
      >>> import jax
      >>> from bpnjax.utils import prng
      >>> one, other = (prng.fold(jax.random.key(0), prng.ORDER, task, 5) for task in (1, 2))
      >>> bool((jax.random.key_data(one) == jax.random.key_data(other)).all())
      False
    """
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key


def to_numbers(tree: Any) -> Any:
    """Typed keys as the numbers that they are; NumPy, files and other hosts know no keys.

    Args:
      tree: of arrays and typed PRNG keys.

    Returns:
      The tree with uint32 [..., 2] (of JAX's default generator) for each key [...]; the other
      leaves are the same objects.

    Example:
      >>> import jax
      >>> from bpnjax.utils import prng
      >>> prng.to_numbers({"key": jax.random.key(7), "count": 3})["key"].tolist()
      [0, 7]
    """
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, tree)


def from_numbers(numbers: Any, like: Any) -> Any:
    """The inverse of `to_numbers`.

    Args:
      numbers: a tree of arrays.
      like: the same structure, with typed keys (or their `jax.ShapeDtypeStruct`) where the result
        has some.

    Returns:
      ``numbers`` with keys in their places.
    """
    return jax.tree.map(
        lambda leaf, old: jax.random.wrap_key_data(leaf) if _is_key(old) else leaf, numbers, like
    )


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
