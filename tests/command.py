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
# Two test processes share two cores: one thread each for a matrix product.
XLA_FLAGS = "--xla_cpu_multi_thread_eigen=false"
# Half of the tests' time goes to compiling; without its newest code generator XLA takes half of it.
_QUICK = "--xla_cpu_use_fusion_emitters=false"


def flags_of_tests() -> str:
    """XLA's flags for tests that do not ask how fast or how exactly users' programs run."""
    both = f"{XLA_FLAGS} {_QUICK}"
    # A flag that XLA does not know ends the process.
    known = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env=os.environ | {"XLA_FLAGS": both, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
    )
    return XLA_FLAGS if known.returncode else both


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
