"""Random numbers from keys that depend on the seed and the place of use only.

Nothing random is stored. A key is made from (seed, use, task, epoch, step), so that a resumed run
draws the same numbers as one that was not interrupted.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

INIT, METHOD, FRESH, ORDER, PIXELS, FISHER, STEP, ENDED, DROPOUT, STATISTICS, REPLAY = range(11)


_IMPLEMENTATION = "threefry2x32"  # the same bits on every machine; JAX's default may change
_BY_WIDTH = {2: _IMPLEMENTATION, 4: "rbg"}  # by the number of values in a key


def key(seed: int) -> jax.Array:
    """The PRNG key of a seed, from a generator that no flag of JAX changes.

    Args:
      seed: int from 0.

    Returns:
      A typed PRNG key.

    Example:
      >>> import jax
      >>> from bpnjax.utils import prng
      >>> jax.random.key_data(prng.key(7)).tolist()
      [0, 7]
    """
    return jax.random.key(seed, impl=_IMPLEMENTATION)


def fingerprint() -> str:
    """A few random numbers as text, to detect that two processes draw different ones.

    Keys of tasks, permutations and projections are drawn again when a model is loaded. The flag
    ``jax_threefry_partitionable`` changes the numbers that a key gives.

    Returns:
      8 hexadecimal digits.

    Example:
      >>> from bpnjax.utils import prng
      >>> prng.fingerprint()
      '1212c6b0'
    """
    seed = key(0)
    drawn = [
        jax.random.bits(fold(seed, 1), (8,), jnp.uint32),
        jax.random.permutation(fold(seed, 2), 8),
        jax.random.uniform(fold(seed, 3), (8,), jnp.float32),
    ]
    numbers = np.concatenate([np.asarray(part, np.float64) for part in drawn])
    return f"{zlib.crc32(numbers.tobytes()):08x}"


def fold(key: jax.Array, *numbers: Any) -> jax.Array:
    """Folds several integers into a typed PRNG key, one after another.

    Args:
      key: typed PRNG key.
      *numbers: ints, or int scalars that may be traced. Their order matters.

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
    """Replaces typed keys by their numbers, since NumPy, files and other hosts have no keys.

    Args:
      tree: of arrays and typed PRNG keys.

    Returns:
      The tree with uint32 [..., 2] (for JAX's default generator) in place of each key [...]. Other
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
    return jax.tree.map(lambda leaf, old: _wrapped(leaf) if _is_key(old) else leaf, numbers, like)


def _wrapped(numbers: Any) -> jax.Array:
    return jax.random.wrap_key_data(numbers, impl=_BY_WIDTH[numbers.shape[-1]])


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
