"""Trees of arrays: flattened to names, in files, grown, and which leaves a function reads."""

import json
import os
import pathlib
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from bpnjax.utils import prng
from bpnjax.utils.errors import UserError

CHECKSUM = "checksum"  # name of a file's checksum in its metadata

__all__ = ["CHECKSUM", "flatten", "put_in_corner", "read", "unflatten", "used", "write"]


def names_of(tree: Any) -> Any:
    """Replaces each leaf of a tree by its path, joined by ``/``.

    Args:
      tree: of arrays, or their shapes.

    Returns:
      A tree of strings.

    Example:
      >>> from bpnjax.utils.arrays import names_of
      >>> names_of({"a": {"b": 1}})
      {'a': {'b': 'a/b'}}
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"), tree
    )


def flatten(tree: Any) -> dict[str, np.ndarray]:
    """A tree as named NumPy arrays. Typed PRNG keys become their numbers.

    Args:
      tree: of arrays.

    Returns:
      ``{path: array}``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from bpnjax.utils import arrays
      >>> {name: a.tolist() for name, a in arrays.flatten({"w": jnp.ones(2)}).items()}
      {'w': [1.0, 1.0]}
    """
    numbers = jax.tree.leaves(prng.to_numbers(tree))
    names = jax.tree.leaves(names_of(tree))
    return {n: np.asarray(a, order="C") for n, a in zip(names, numbers, strict=True)}


def unflatten(found: Mapping[str, np.ndarray], abstract: Any) -> Any:
    """The inverse of `flatten`.

    Args:
      found: ``{path: array}``.
      abstract: the tree's structure, shapes and dtypes.

    Returns:
      The tree, on the default device.

    Raises:
      ValueError: names, shapes or dtypes differ; the message names the first difference.
    """
    names = names_of(abstract)
    numbers = jax.eval_shape(prng.to_numbers, abstract)
    if more := sorted(set(found) - set(jax.tree.leaves(names))):
        raise ValueError(f"{more[0]} is too much")

    def one(name: str, leaf: Any) -> jax.Array | np.ndarray:
        if name not in found:
            raise ValueError(f"{name} is missing")
        array = found[name]
        if array.shape != leaf.shape or array.dtype != leaf.dtype:
            raise ValueError(
                f"{name} is {array.dtype}{list(array.shape)}, not {leaf.dtype}{list(leaf.shape)}"
            )
        # A leaf stored as one repeated element, since nobody reads it, stays one.
        return array if array.size > 1 and not any(array.strides) else jnp.asarray(array)

    return prng.from_numbers(jax.tree.map(one, names, numbers), abstract)


def write(path: Any, found: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes named arrays to a ``.safetensors`` file; an interrupted write leaves the old file.

    Args:
      path: of the file.
      found: ``{name: array}``.
      metadata: texts stored with the arrays.
    """
    file = pathlib.Path(path)
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("wb") as out:
        # safetensors writes the memory of an array as it lies, whatever its order of axes.
        whole = {name: np.asarray(array, order="C") for name, array in found.items()}
        texts = {name: text for name, text in metadata.items() if name != CHECKSUM}
        out.write(_in_order(save(whole, texts | {CHECKSUM: _checksum(whole, texts)})))
        out.flush()
        os.fsync(out.fileno())
    partial.replace(file)


def _checksum(found: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """The checksum of all arrays, with names, dtypes and shapes, and of all texts."""
    total = zlib.crc32(json.dumps(dict(metadata), sort_keys=True).encode())
    for name, array in sorted(found.items()):
        total = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), total)
        total = zlib.crc32(np.asarray(array, order="C").tobytes(), total)
    return f"{total:08x}"


def _in_order(data: bytes) -> bytes:
    """The file with a sorted header, since safetensors writes metadata in a random order."""
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def read(path: Any) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads a ``.safetensors`` file.

    Args:
      path: of the file.

    Returns:
      ``{name: array}`` and the metadata.

    Raises:
      UserError: the file does not exist, is of another kind, or does not match its checksum.
    """
    if not pathlib.Path(path).is_file():
        raise UserError(f"{path}: no such file; name a .safetensors file")
    try:
        with safe_open(path, "np") as tensors:
            found = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
            metadata = dict(tensors.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a safetensors file ({error}); write it again") from error
    kept = metadata.pop(CHECKSUM, None)  # files of other programs have none
    if kept is not None and kept != _checksum(found, metadata):
        raise UserError(
            f"{path}: its content is not what was written (checksum {kept}); write it again"
        )
    return found, metadata


def put_in_corner(fresh: Any, earlier: Any) -> Any:
    """Copies every array of one tree into the first places of a larger array of another.

    Args:
      fresh: a tree of arrays.
      earlier: the same structure with arrays at most as long along each axis.

    Returns:
      ``fresh`` with its first places along each axis replaced by ``earlier``.

    Raises:
      ValueError: an array does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.utils import arrays
      >>> arrays.put_in_corner(jnp.zeros((2, 2)), jnp.ones((1, 2))).tolist()
      [[1.0, 1.0], [0.0, 0.0]]
    """

    def one(new: Any, old: Any) -> Any:
        numbers, old = np.array(prng.to_numbers(new)), np.asarray(prng.to_numbers(old))
        if old.ndim != numbers.ndim or any(a > b for a, b in zip(old.shape, numbers.shape)):  # noqa: B905
            raise ValueError(f"an array {old.shape} does not fit into {numbers.shape}")
        numbers[tuple(slice(0, length) for length in old.shape)] = old
        return prng.from_numbers(jnp.asarray(numbers), new)

    return jax.tree.map(one, fresh, earlier)


def used(function: Callable[..., Any], tree: Any, *more: Any) -> Any:
    """Finds which leaves of its first argument a function reads.

    Args:
      function: of the tree and further arguments; traced, not run.
      tree: its first argument, arrays or shapes.
      *more: further arguments, arrays or shapes.

    Returns:
      A tree of bools like ``tree``.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.utils import arrays
      >>> arrays.used(lambda t: 2 * t["a"], {"a": jnp.ones(1), "b": jnp.ones(1)})
      {'a': True, 'b': False}
    """
    leaves, structure = jax.tree.flatten(tree)
    closed = jax.make_jaxpr(function)(tree, *more)
    jaxpr = closed.jaxpr
    live = {v for v in jaxpr.outvars if not hasattr(v, "val")}
    for equation in reversed(jaxpr.eqns):
        if any(v in live for v in equation.outvars):
            live |= {v for v in equation.invars if not hasattr(v, "val")}
    read = [v in live for v in jaxpr.invars[: len(leaves)]]
    return jax.tree.unflatten(structure, read)
