"""What a learner is given, checked once: batches, the data of a task, examples, labels."""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

from bpnjax.methods.base import Setup
from bpnjax.utils.errors import UserError

__all__ = ["checked_batch", "checked_data", "checked_examples", "checked_labels"]


def checked_batch(setup: Setup, batch: Any) -> tuple[Any, Any, Any, Any]:
    """Examples, labels, weights and tasks of a batch; None where it has none of the last two."""
    if not isinstance(batch, (tuple, list)) or not 2 <= len(batch) <= 4:
        raise UserError(
            f"batch: give (x, y), or (x, y, weight) with 0 for padding, not {type(batch).__name__}"
        )
    x, y, weight, task = [*batch, None, None][:4]
    x, y = checked_examples(setup, x), checked_labels(setup, y, len(x))
    for name, more in (("weight", weight), ("task", task)):
        if more is not None and np.shape(more) != (x.shape[0],):
            raise UserError(f"batch: {name} has shape {np.shape(more)}; give [{x.shape[0]}]")
    return x, y, weight, task


def checked_data(setup: Setup, data: Any) -> tuple[Any, Any]:
    """Examples and labels of a task, given as arrays or as an iterable of batches."""
    if not (isinstance(data, (tuple, list)) and len(data) == 2 and hasattr(data[0], "shape")):
        if not isinstance(data, Iterable):
            raise UserError("data: give (x, y), or an iterable of batches (x, y)")
        parts = [(np.asarray(x), np.asarray(y)) for x, y, *_ in data]
        if not parts:
            raise UserError("data: no batches; give the examples of the task that ended")
        data = tuple(np.concatenate([part[i] for part in parts]) for i in (0, 1))
    x, y = data
    x = checked_examples(setup, x)
    return x, checked_labels(setup, y, len(x))


def checked_examples(setup: Setup, x: Any) -> Any:
    """Examples that fit the network; NaN is looked for in NumPy arrays only."""
    example = setup.network.example
    if not hasattr(x, "dtype"):
        x = np.asarray(x)
    if example is None:
        return x
    if tuple(x.shape[1:]) != example.shape[1:] or x.ndim != len(example.shape):
        raise UserError(
            f"x: examples of shape {tuple(x.shape[1:])}; the network was built for "
            f"{example.shape[1:]}"
        )
    kinds = [jnp.issubdtype(d, jnp.floating) for d in (x.dtype, example.dtype)]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"x: examples of dtype {x.dtype}; the network was built for {example.dtype}. Give "
            "them as they were in training, with the same scale"
        )
    if isinstance(x, np.ndarray):
        if kinds[0] and not np.isfinite(x).all():
            raise UserError("x: the examples hold NaN or infinite numbers; mend the data")
        return x.astype(example.dtype, copy=False)
    return x


def checked_labels(setup: Setup, y: Any, n: int) -> Any:
    """Labels that fit the network; their range is looked at in NumPy arrays only."""
    label = setup.label
    if not hasattr(y, "dtype"):
        y = np.asarray(y)
    whole = jnp.issubdtype(label.dtype, jnp.integer)
    if tuple(y.shape) != (n, *label.shape) or whole != jnp.issubdtype(y.dtype, jnp.integer):
        raise UserError(
            f"y: labels of shape {tuple(y.shape)} and dtype {y.dtype} for {n} examples; the "
            f"learner expects [{', '.join(map(str, ('n', *label.shape)))}] of {label.dtype} "
            "(pass bpnjax.learner(..., label=y[:1]) for others)"
        )
    if isinstance(y, np.ndarray):
        if setup.loss is None and y.size:
            least, most = int(y.min()), int(y.max())
            if least < 0 or most >= setup.num_outputs:
                raise UserError(
                    f"y: label {least if least < 0 else most} is no class of this network; it "
                    f"has {setup.num_outputs} outputs, labels are 0 to "
                    f"{setup.num_outputs - 1}"
                )
        elif not whole and not np.isfinite(y).all():
            raise UserError("y: the labels hold NaN or infinite numbers; mend the data")
        return y.astype(label.dtype, copy=False)
    return y
