"""A trained model as one StableHLO program, which runs without bpnjax.

bpnjax.export("runs/digits/bd_psp", "digits.stablehlo")

# elsewhere, with nothing but jax and flatbuffers installed
from jax import export
program = export.deserialize(open("digits.stablehlo", "rb").read())
logits = program.call(x, task)
"""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bpnjax.run.checkpoint import write_atomically
from bpnjax.run.predictor import Predictor, load
from bpnjax.utils.errors import UserError, suggest
from bpnjax.utils.heads import within_head
from bpnjax.version import __version__

__all__ = ["PLATFORMS", "describe", "export", "program"]

PLATFORMS = ("cpu", "cuda", "tpu")
_KNOWN = (*PLATFORMS, "rocm")
_MOST = 2**31 - 2**20  # bytes; the largest size that the file format allows


def program(predictor: Predictor) -> Any:
    """The answers of a model as one function that JAX can trace.

    Args:
      predictor: the model.

    Returns:
      ``(x [n, ...], task int32 [n]) -> logits f32 [n, C]``, each example in the mode of its task.
      If a task answers with its own outputs only, the others are -1e9. A task that does not exist
      gives NaN.
    """
    p, outputs = predictor, jnp.asarray(predictor.outputs)
    state = p.answering_state

    def answer(x: jax.Array, task: jax.Array) -> jax.Array:
        exists = (task >= 0) & (task < p.num_tasks)
        task = jnp.where(exists, task, 0)
        x = x if p.extract is None else p.extract(x)
        logits = p.learner.answer(state, x, task, between_tasks=True)
        logits = within_head(logits, outputs[task] if p.learner.setup.multi_head else None)
        return jnp.where(exists[:, None], logits, jnp.nan)

    return answer


def export(
    path: str | os.PathLike[str] | Predictor,
    out: str | os.PathLike[str],
    *,
    batch: int | None = None,
    platforms: Sequence[str] = PLATFORMS,
    seed: int | None = None,
) -> pathlib.Path:
    r"""Writes a trained model as a StableHLO program, weights included.

    The file is written by `jax.export`. Its program takes stored examples, of the dtype and shape
    of the training examples, and one task number per example, from 0:

    .. math:: (x_{[n, \ldots]}, task_{[n]}) \mapsto logits_{[n, C]}

    as `Predictor.logits` does. The keys of all tasks are included unless they take more than 64 MB.
    A second file, ``OUT.json``, describes the inputs and names the outputs.

    Args:
      path: the folder of a run, one of its ``.safetensors`` files, or a loaded model.
      out: the file to write. It is about as large as the model's ``.safetensors``.
      batch: number of examples that the program takes at once; None for any number.
      platforms: platforms to compile for: cpu, cuda, rocm or tpu. They need not be present.
      seed: which model to use of a run with several seeds.

    Returns:
      The path of the file.

    Raises:
      UserError: the model, platform or folder does not exist, or the model cannot be exported.

    Example:
      >>> import pathlib, tempfile
      >>> import jax, numpy as np
      >>> import bpnjax
      >>> from bpnjax import config
      >>> settings = config.default()
      >>> settings.dataset.name, settings.sequence.classes = "gaussians", "0,1;0,2"
      >>> settings.model.hidden, settings.train.epochs = (8,), 1
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = bpnjax.train(settings, pathlib.Path(folder, "run"))
      ...     file = bpnjax.export(f"{folder}/run", f"{folder}/gaussians.stablehlo")
      ...     answer = jax.export.deserialize(file.read_bytes()).call
      >>> answer(np.zeros((5, 2), np.float32), np.array([0, 1, 1, 0, 1], np.int32)).shape
      (5, 3)

    Source: https://docs.jax.dev/en/latest/export/export.html. It promises that later versions of
    JAX can read a file for six months.
    """
    file = pathlib.Path(out)
    platforms = tuple(platforms)
    if not platforms:
        raise UserError(f"platforms: none given; choose from {', '.join(_KNOWN)}")
    for name in platforms:
        if name not in _KNOWN:
            raise UserError(f"platforms: {name!r} is not one; {suggest(name, _KNOWN)}")
    if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
        raise UserError(f"batch: {batch!r} is not a number of examples; give one from 1, or None")
    check_place(file, path if isinstance(path, (str, os.PathLike)) else None)
    predictor = path if isinstance(path, Predictor) else load(os.fspath(path), seed)
    if (size := _bytes(predictor)) > _MOST:
        raise UserError(
            f"out: a program with {size / 1e9:.1f} GB of weights does not fit into one file of "
            "StableHLO, which holds 2 GB; use bpnjax.load instead"
        )
    exported = _exported(predictor, batch, platforms)
    data = exported.serialize()
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    said = describe(predictor, batch, platforms)
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in said.items())
    text = f"{{\n{lines}\n}}\n"
    write_atomically(file.with_name(f"{file.name}.json"), text)
    partial.replace(file)
    return file


def check_place(file: pathlib.Path, source: Any = None) -> None:
    """Raises an error where a file cannot be written, or would destroy something else.

    Args:
      file: the file to be written.
      source: a file that is read, or None.

    Raises:
      UserError: there is no folder, the path is not a regular file, or it is the source itself.
    """
    if not file.absolute().parent.is_dir():
        raise UserError(f"out: no folder {file.parent}; make it first")
    if file.exists() and not file.is_file():
        raise UserError(f"out: {file} is not a file that can be replaced; name another")
    if source is not None and file.resolve() == pathlib.Path(source).resolve():
        raise UserError(f"out: {file} is what is read; name another file")


def _exported(predictor: Predictor, batch: int | None, platforms: tuple[str, ...]) -> Any:
    from jax import export as jax_export

    n: Any = batch or jax_export.symbolic_shape("n")[0]
    x = jax.ShapeDtypeStruct((n, *predictor.input_shape), predictor.input_dtype)
    task = jax.ShapeDtypeStruct((n,), jnp.int32)
    try:
        return jax_export.export(jax.jit(program(predictor)), platforms=platforms)(x, task)
    except (TypeError, ValueError, NotImplementedError, jax.errors.JAXTypeError,
            jax.errors.InconclusiveDimensionOperation) as error:  # fmt: skip
        why = " ".join(str(error).split())[:200]
        fix = "use bpnjax.load instead" if batch else "try it for one number, as batch=32"
        which = f"a batch of {batch}" if batch else "batches of any size"
        raise UserError(
            f"batch: the model cannot be exported for {which} ({why}); {fix}"
        ) from error


def _bytes(predictor: Predictor) -> int:
    """The size of the arrays that answers depend on."""
    needed = jax.tree.leaves(predictor.learner.answering())
    leaves = jax.tree.leaves(predictor.state)
    return sum(leaf.nbytes for leaf, n in zip(leaves, needed, strict=True) if n)


def describe(predictor: Predictor, batch: int | None, platforms: Sequence[str]) -> dict[str, Any]:
    """The content of the file that describes a program.

    Args:
      predictor: the model.
      batch: as in `export`.
      platforms: as in `export`.

    Returns:
      JSON data: inputs and outputs with names, dtypes and shapes, the names of the outputs, the
      outputs of each task, and the versions that made it.
    """
    p, n = predictor, batch or "n"
    return {
        "format": "bpnjax-stablehlo-1",
        "inputs": [
            {"name": "x", "dtype": p.input_dtype.name, "shape": [n, *p.input_shape]},
            {"name": "task", "dtype": "int32", "shape": [n], "tasks": p.num_tasks},
        ],
        "outputs": [{"name": "logits", "dtype": "float32", "shape": [n, p.outputs.shape[1]]}],
        "class_names": list(p.class_names),
        "tasks": [np.flatnonzero(row).tolist() for row in p.outputs],
        "own_outputs_only": p.learner.setup.multi_head,
        "permuted": p.orders is not None,
        "input_range": p.input_range,
        "method": p.metadata["method"],
        "platforms": list(platforms),
        "versions": {"bpnjax": __version__, "jax": jax.__version__},
    }
