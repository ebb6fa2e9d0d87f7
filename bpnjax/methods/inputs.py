"""Checks of what a learner is given: batches, the data of a task, examples, labels."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bpnjax.methods.base import Setup
from bpnjax.modes.bank import check_task
from bpnjax.utils.errors import UserError

__all__ = ["checked_batch", "checked_data", "checked_examples", "checked_labels", "checked_losses"]


def checked_batch(setup: Setup, batch: Any) -> tuple[Any, Any, Any, Any]:
    """Examples, labels, weights and tasks of a batch; None for missing weights and tasks."""
    if not isinstance(batch, (tuple, list)) or not 2 <= len(batch) <= 4:
        raise UserError(
            f"batch: give (x, y), or (x, y, weight) with 0 for padding, not {type(batch).__name__}"
        )
    x, y, weight, task = [*batch, None, None][:4]
    x, y = checked_examples(setup, x), checked_labels(setup, y, len(x))
    if not len(x):
        raise UserError("batch: it holds no examples; leave empty batches out")
    for name, more in (("weight", weight), ("task", task)):
        if more is not None and np.shape(more) != (x.shape[0],):
            raise UserError(f"batch: {name} has shape {np.shape(more)}; give [{x.shape[0]}]")
    if isinstance(weight, (np.ndarray, list, tuple)):
        weight = np.asarray(weight, np.float32)
        if not (weight >= 0).all() or not 0 < weight.sum() < np.inf:
            raise UserError("batch: weights are finite numbers from 0, and not all of them 0")
    if task is not None:
        try:
            task = check_task(task, setup.num_tasks)
        except ValueError as error:
            raise UserError(f"batch: {error}") from error
    return x, y, weight, task


def checked_data(setup: Setup, data: Any) -> tuple[Any, Any]:
    """Examples and labels of a task, given as arrays or as an iterable of batches."""
    if not isinstance(data, Iterable) or hasattr(data, "shape"):
        raise UserError("data: give (x, y), or an iterable of batches (x, y)")
    if isinstance(data, (tuple, list)) and data and all(hasattr(part, "shape") for part in data):
        data = [data]
    elif isinstance(data, tuple) and not any(isinstance(part, tuple) for part in data):
        data = [data]  # a pair of lists of numbers
    parts = [_real(batch) for batch in data]
    if not parts:
        raise UserError("data: no batches; give the examples of the task that ended")
    x, y = parts[0]
    if len(parts) > 1:
        try:
            x, y = (np.concatenate([np.asarray(part[i]) for part in parts]) for i in (0, 1))
        except ValueError as error:
            raise UserError(f"data: batches that do not go together ({error})") from error
    x = checked_examples(setup, x)
    if not len(x):
        raise UserError("data: no examples; give those of the task that ended")
    return x, checked_labels(setup, y, len(x))


def _real(batch: Any) -> tuple[Any, Any]:
    """Examples and labels of a batch, without those of weight 0."""
    if not isinstance(batch, (tuple, list)) or not 2 <= len(batch) <= 4:
        raise UserError(
            f"data: give (x, y), or an iterable of batches (x, y), not of {type(batch).__name__}"
        )
    x, y, weight = [*batch, None][:3]
    if weight is None:
        return x, y
    kept = np.asarray(weight) > 0
    x, y = np.asarray(x), np.asarray(y)
    if kept.shape != x.shape[:1] or kept.shape != y.shape[:1]:
        raise UserError(f"data: weight has shape {kept.shape}; give [{len(x)}]")
    return x[kept], y[kept]


def checked_examples(setup: Setup, x: Any) -> Any:
    """Examples that fit the network. NaN is searched for in NumPy arrays only."""
    example = setup.network.example
    if not hasattr(x, "dtype"):
        try:
            x = np.asarray(x)
        except ValueError as error:
            raise UserError(f"x: no array of examples ({error}); give [n, ...]") from error
    if example is None:
        if not x.ndim:
            raise UserError("x: a scalar is not a batch of examples; give [n, ...]")
        return x
    if tuple(x.shape[1:]) != example.shape[1:] or x.ndim != len(example.shape):
        raise UserError(
            f"x: examples of shape {tuple(x.shape[1:])}; the network was built for "
            f"{example.shape[1:]}"
        )
    if _kind(x.dtype) != _kind(example.dtype):
        raise UserError(
            f"x: examples of dtype {x.dtype}; the network was built for {example.dtype}. Give "
            "them as they were in training, with the same scale"
        )
    if isinstance(x, np.ndarray):
        if _kind(x.dtype) == "float" and not np.isfinite(x).all():
            raise UserError("x: the examples hold NaN or infinite numbers; fix the data")
        if _kind(x.dtype) == "integer" and x.size:
            room = jnp.iinfo(example.dtype)
            if x.min() < room.min or x.max() > room.max:
                raise UserError(
                    f"x: examples from {x.min()} to {x.max()}; the network was built for "
                    f"{example.dtype}"
                )
        return x.astype(example.dtype, copy=False)
    return x


def _kind(dtype: Any) -> str:
    """The kind of numbers of a dtype; numbers of the same kind are converted silently."""
    kinds = {"float": jnp.floating, "integer": jnp.integer}
    return next((kind for kind, of in kinds.items() if jnp.issubdtype(dtype, of)), str(dtype))


def checked_labels(setup: Setup, y: Any, n: int) -> Any:
    """Labels that fit the network. Their range is checked in NumPy arrays only."""
    label = setup.label
    if not hasattr(y, "dtype"):
        try:
            y = np.asarray(y)
        except ValueError as error:
            raise UserError(f"y: no array of labels ({error})") from error
    whole = jnp.issubdtype(label.dtype, jnp.integer)
    if tuple(y.shape) != (n, *label.shape) or whole != jnp.issubdtype(y.dtype, jnp.integer):
        raise UserError(
            f"y: labels of shape {tuple(y.shape)} and dtype {y.dtype} for {n} examples; the "
            f"learner expects [{', '.join(map(str, ('n', *label.shape)))}] of {label.dtype} "
            "(pass bpnjax.learner(..., label=y[:1]) for others)"
        )
    if isinstance(y, np.ndarray):
        if setup.loss is None and y.size and setup.num_outputs:
            least, most = int(y.min()), int(y.max())
            if least < 0 or most >= setup.num_outputs:
                raise UserError(
                    f"y: label {least if least < 0 else most} is not a class of this network; it "
                    f"has {setup.num_outputs} outputs, labels are 0 to "
                    f"{setup.num_outputs - 1}"
                )
        elif not whole and not np.isfinite(y).all():
            raise UserError("y: the labels hold NaN or infinite numbers; fix the data")
        return y.astype(label.dtype, copy=False)
    return y


def checked_losses(loss: Callable[[Any, Any], Any], outputs: Any, y: Any) -> Any:
    """The losses of a user's function, ``[n, ...]``, which must not depend on other examples.

    Outputs ``[n, 1]`` minus labels ``[n]`` are ``[n, n]``. Such a loss has a finite but wrong
    gradient. Its shape reveals it: another axis also changes with the number of examples.
    """
    losses = loss(outputs, y)
    n = outputs.shape[0]
    if losses.ndim == 0 or losses.shape[0] != n:
        raise UserError(
            f"loss: it returns shape {losses.shape} for {n} examples; return one loss per "
            "example, [n]"
        )
    if losses.ndim > 1 and n in losses.shape[1:]:
        more = [jax.ShapeDtypeStruct((n + 1, *a.shape[1:]), a.dtype) for a in (outputs, y)]
        if jax.eval_shape(loss, *more).shape[1:] != losses.shape[1:]:
            raise UserError(
                f"loss: it returns shape {losses.shape} for {n} examples, the outputs of each with "
                f"the labels of all ({outputs.shape} and {y.shape} were broadcast); return one "
                "loss per example, [n]"
            )
    return losses
