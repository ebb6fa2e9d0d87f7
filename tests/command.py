"""The command as a user runs it, for the tests of what it says and leaves behind."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
# What a run leaves.
FILES = (
    "accuracy.csv", "accuracy_matrix.png", "checkpoints", "config.json", "learning_curves.png",
    "metrics.jsonl", "model.json", "model.safetensors", "result.json",
)  # fmt: skip


def contents(folder):
    """Every path below a folder with its bytes, None for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def process(arguments, cwd):
    """Runs the command as a user does, from another folder than the repository's."""
    return subprocess.run(
        [sys.executable, "-m", "bpnjax.main", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def one_line(stderr, *words):
    assert stderr.startswith("bpnjax: ") and stderr.endswith("\n") and stderr.count("\n") == 1
    for word in words:
        assert word in stderr
    return stderr


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
