"""Packs hold single tasks without the network that they were learned on.

The command and the functions do the same.

    bpnjax packs pack --model=runs/ada --tasks=1,2 --output=ada.pack
    bpnjax packs merge --model=pretrained --output=both.safetensors ada.pack bob.pack
    bpnjax packs show ada.pack

In Python tasks count from 0, in the command from 1.

    from bpnjax import packs

    packs.pack("runs/ada", [0, 1], "ada.pack")
    predictor = packs.merge("pretrained", ["ada.pack", "bob.pack"], "both.safetensors")
"""

from bpnjax import config as configuration
from bpnjax.run.packs import Pack as Pack
from bpnjax.run.packs import Task as Task
from bpnjax.run.packs import merge, pack, unpack
from bpnjax.utils import flags
from bpnjax.utils.errors import UserError, suggest

USAGE = """usage: bpnjax packs pack --model=DIR --tasks=1,2 --output=FILE [--seed=N]
                         [--nostatistics]
       bpnjax packs merge --model=DIR --output=FILE.safetensors PACK ...
       bpnjax packs show PACK ...

pack    writes the part of a model that belongs to some tasks
merge   merges the tasks of packs into one model, on the network they share
show    lists the tasks of packs

  --model=DIR       the folder of a complete run, or one of its .safetensors;
                    for merge one with the network of the packs
  --tasks=1,2       numbers of the tasks, from 1 (default: all)
  --output=FILE     the file to write
  --seed=N          which model to use of a run with several seeds
  --nostatistics    leave out the statistics that infer the task
  --config=FILE     the run's config file, if it registers the method"""
ACTIONS = ("pack", "merge", "show")


def run(arguments: list[str]) -> int:
    """Runs the command.

    Args:
      arguments: without the program's name.

    Returns:
      The exit code: 0, 1 if the file could not be written, 2 for a wrong argument or file.
    """
    return flags.run(USAGE, arguments, _answer)


def _answer(arguments: list[str]) -> str:
    """Runs the command on its arguments; returns the text to print."""
    texts = ("model", "tasks", "output", "config")
    values, rest = flags.parse(arguments, texts, ("seed",), booleans={"statistics": True})
    action, *files = rest or [""]
    if action not in ACTIONS:
        what = f"unknown action {action!r}" if action else "no action"
        raise UserError(f"packs: {what}; {suggest(action, ACTIONS)}")
    if action == "pack" and files:
        raise UserError(f"{files[0]!r} is not a flag; see --help")
    if action != "pack" and not files:
        raise UserError("packs: none given; name at least one file")
    for name in ("model", "output") if action != "show" else ():
        if not values[name].value:
            raise UserError(f"--{name}: missing; see --help")
    if values.config:
        configuration.load_file(values.config)
    if action == "show":
        return "\n".join(f"{file}: {unpack(file)}" for file in files)
    if action == "merge":
        merged = flags.named(lambda: merge(values.model, files, values.output), out="output")
        lines = [
            f"task {number + 1}: {', '.join(merged.class_names[c] for c in row.nonzero()[0])}"
            for number, row in enumerate(merged.outputs)
        ]
        return "\n".join([*lines, f"{merged.num_tasks} tasks in {values.output}"])
    made = flags.named(
        lambda: pack(
            values.model, _numbers(values.tasks), values.output, seed=values.seed,
            statistics=values.statistics,
        ),
        out="output", tasks="tasks",
    )  # fmt: skip
    return f"{values.output}: {made}"


def _numbers(text: str) -> list[int] | None:
    """Task numbers from 0, from a text with numbers from 1; None for all."""
    try:
        return [int(part) - 1 for part in text.split(",")] if text else None
    except ValueError as error:
        raise UserError(f"--tasks: {text!r} is not a list of numbers; give them as 1,2") from error


if __name__ == "__main__":
    from bpnjax.main import leave

    leave(run)
