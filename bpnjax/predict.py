"""The command that answers examples with a trained model.

    bpnjax predict --model=runs/mnist/bd_ewc --input=examples.npz --output=answers.csv

`examples.npz` holds ``x``, stored examples (uint8 for images), and optionally ``task``, one number
from 1 per example, if the tasks are known. The answers have one line per example: its task, whether
it was told, the class and its probability.
"""

import csv
import io
import pathlib
import sys
import warnings
import zipfile
import zlib
from typing import Any

import numpy as np

from bpnjax import config as configuration
from bpnjax.evaluation import task_inference
from bpnjax.run.predictor import Predictor, load
from bpnjax.utils import flags, memory
from bpnjax.utils.errors import UserError

USAGE = """usage: bpnjax predict --model=DIR --input=FILE.npz --output=FILE.csv
                      [--task=N] [--seed=N] [--rule=NAME] [--per=example|batch]
                      [--config=FILE]

  --model=DIR        the folder of a complete run, or one of its .safetensors
  --input=FILE.npz   the examples, `x` (or `images`), and `task` (from 1, one
                     per example) if the tasks are known
  --output=FILE.csv  one line per example: task, whether it was told,
                     class, probability
  --task=N           one task, from 1, for all examples
  --seed=N           which model to use of a run with several seeds
  --rule=NAME        infers tasks by entropy or max_logit, or by what the run
                     stored about them (default: as in the run)
  --per=batch        all examples belong to one task (default: each has its own)
  --config=FILE      the run's config file, if it registers the method"""


# Exceptions for a file that is incomplete, encrypted or not an archive.
_UNREADABLE = (
    OSError, ValueError, EOFError, KeyError, NotImplementedError, RuntimeError, MemoryError,
    SyntaxError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def _read_examples(path: str) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        if zipfile.is_zipfile(path) and (size := memory.too_large(path)):
            raise ValueError(size)
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it holds one array")
        with file:
            contents = {name: file[name] for name in file.files}
        if odd := [name for name, array in contents.items() if not isinstance(array, np.ndarray)]:
            raise ValueError(f"{odd[0]} is not an array")
    except _UNREADABLE as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
        raise UserError(
            f"--input: cannot read {path} as .npz ({why}); write it with np.savez"
        ) from error
    given = [contents[name] for name in ("x", "images") if name in contents]
    if len(given) != 1:
        raise UserError(
            f"--input: {path} holds {', '.join(contents) or 'nothing'}; it needs the examples as "
            "`x` (or `images`, not both)"
        )
    if (task := contents.get("task")) is not None and task.dtype.kind not in "ui":
        raise UserError(
            f"--input: `task` of {path} is of dtype {task.dtype}; give task numbers from 1"
        )
    return given[0], task


def answers(
    predictor: Predictor,
    x: Any,
    task: Any = None,
    rule: str | None = None,
    per: str = "example",
) -> str:
    """Answers examples with a trained model, as CSV.

    Args:
      predictor: the model.
      x: stored examples, ``[n, ...]``.
      task: from 0, an int or int ``[n]``; None infers each example's task.
      rule: how the task is inferred; None for the rule of the model's run.
      per: "example" or "batch", for which the task is inferred.

    Returns:
      Lines of text: example (from 0), task (from 1), told or not, class, its name and its
      probability among all classes.
    """
    told = task is not None
    task = predictor.infer(x, rule, per).task if task is None else np.asarray(task)
    p = predictor.probabilities(x, task)
    task = np.broadcast_to(task, (len(p),))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["example", "task", "told", "output", "class", "probability"])
    for i, (t, row) in enumerate(zip(task, p, strict=True)):
        c = int(row.argmax())
        told_text = "yes" if told else "no"
        writer.writerow([i, t + 1, told_text, c, predictor.class_names[c], f"{row[c]:.6f}"])
    return text.getvalue()


def _check_output(output: pathlib.Path, source: str, model: str) -> None:
    """Raises an error where answers cannot be written, or would replace an input."""
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output: no folder {output.parent}; make it first")
    if output.exists() and not output.is_file():
        raise UserError(f"--output: {output} is not a file that can be replaced; name another")
    for flag, given in (("--input", source), ("--model", model)):
        if output.resolve() == pathlib.Path(given).resolve():
            raise UserError(f"--output: {output} is what {flag} names; name another file")


def run(arguments: list[str]) -> int:
    """Runs the command.

    Args:
      arguments: without the program's name.

    Returns:
      The exit code: 0, 1 if the file could not be written, 2 for a wrong argument or input.
    """
    return flags.run(USAGE, arguments, _answered)


def _answered(arguments: list[str]) -> str:
    """Runs the command on its arguments; returns the text to print."""
    from bpnjax.run.checkpoint import write_atomically

    values, rest = flags.parse(
        arguments, ("model", "input", "output", "config"), ("task", "seed"),
        {"rule": (None, task_inference.RULES), "per": ("example", ("example", "batch"))},
    )  # fmt: skip
    if rest:
        raise UserError(f"{rest[0]!r} is not a flag; see --help")
    for name in ("model", "input", "output"):
        if not values[name].value:
            raise UserError(f"--{name}: missing; see --help")
    output = pathlib.Path(values.output)
    _check_output(output, values.input, values.model)
    x, task = _read_examples(values.input)
    if values.task is not None:
        task = values.task
    if values.config:
        configuration.load_file(values.config)
    predictor = load(values.model, values.seed)
    task = None if task is None else np.asarray(task) - 1
    if values.rule and (complaint := predictor.cannot_infer_by(values.rule)):
        raise UserError(f"--rule: {values.model} {complaint}")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UserWarning)
            text = answers(predictor, x, task, values.rule, values.per)
    except UserError as error:
        raise UserError(f"--model: {values.model}: {error}") from error
    except ValueError as error:
        raise UserError(f"--input: {error} (on the command line tasks count from 1)") from error
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        print(f"bpnjax: --input: {message}", file=sys.stderr)
    write_atomically(output, text)
    return f"{text.count(chr(10)) - 1} answers in {values.output}"


if __name__ == "__main__":
    from bpnjax.main import leave

    leave(run)
