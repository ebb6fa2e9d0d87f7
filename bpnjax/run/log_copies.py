"""Copies of ``metrics.jsonl`` for other tools: a CSV file, event files for TensorBoard.

A copy starts empty and gets all lines from the first one, also when a run resumes. So in the end
it has exactly the same lines.
"""

import csv
import pathlib
import shutil
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from bpnjax.config.checks import log_kinds

FOLDER = "tensorboard"
ACCURACIES = ("task_told", "task_masked", "task_inferred")
COLUMNS = (
    "kind", "seed", "task", "epoch", "step", "total_steps", "loss", "accuracy",
    "examples_per_second", "task_finished", "tested", *ACCURACIES,
)  # fmt: skip


class Copy(NamedTuple):
    """An open copy."""

    write: Callable[[dict[str, Any]], None]  # takes a line from `json.loads`
    close: Callable[[], None]


def open_copies(text: str, workdir: pathlib.Path, first_seed: int) -> list[Copy]:
    """Opens the copies that ``log`` names.

    Args:
      text: names separated by commas, as in `bpnjax.config.checks.log_kinds`.
      workdir: the run's folder.
      first_seed: the first seed of the run.

    Returns:
      The copies, empty.
    """
    begin = {"csv": _begin_csv, "tensorboard": _begin_tensorboard}
    return [begin[name](workdir, first_seed) for name in log_kinds(text)]


def _begin_csv(workdir: pathlib.Path, first_seed: int) -> Copy:
    path = workdir / "metrics.csv"

    def append(rows: Iterable[Iterable[Any]], mode: str = "a") -> None:
        with path.open(mode, newline="") as f:
            csv.writer(f, lineterminator="\n").writerows(rows)

    append([COLUMNS], "w")

    def write(line: dict[str, Any]) -> None:
        found = rows(line, first_seed)
        append([["" if row.get(c) is None else row[c] for c in COLUMNS] for row in found])

    return Copy(write, lambda: None)


def rows(line: dict[str, Any], first_seed: int) -> list[dict[str, Any]]:
    """A line of ``metrics.jsonl`` as flat rows.

    Args:
      line: its content.
      first_seed: the seed of its first entries.

    Returns:
      For a line about training one row per seed; for a line about a test one row per seed and
      tested task (from 1).
    """
    common = {name: value for name, value in line.items() if not isinstance(value, list)}
    if line["kind"] == "train":
        return [
            common | {"seed": first_seed + s, "loss": loss, "accuracy": line["accuracy"][s]}
            for s, loss in enumerate(line["loss"])
        ]
    return [
        common
        | {"seed": first_seed + s, "tested": task + 1}
        | {kind: line[kind][s][task] for kind in ACCURACIES}
        for s, tasks in enumerate(line["task_told"])
        for task, value in enumerate(tasks)
        if value is not None
    ]


def _begin_tensorboard(workdir: pathlib.Path, first_seed: int) -> Copy:
    from tensorboardX import SummaryWriter

    shutil.rmtree(workdir / FOLDER, ignore_errors=True)
    writers = {}

    def write(line: dict[str, Any]) -> None:
        for row in rows(line, first_seed):
            seed = row["seed"]
            if seed not in writers:
                writers[seed] = SummaryWriter(str(workdir / FOLDER / f"seed_{seed}"), flush_secs=10)
            if row["kind"] == "train":
                values = {f"train/{n}": row[n] for n in ("loss", "accuracy", "examples_per_second")}
            else:
                values = {f"{kind}/task_{row['tested']}": row[kind] for kind in ACCURACIES}
            for tag, value in values.items():
                if value is not None:
                    writers[seed].add_scalar(tag, value, row["total_steps"])

    def close() -> None:
        for writer in writers.values():
            writer.close()

    return Copy(write, close)
