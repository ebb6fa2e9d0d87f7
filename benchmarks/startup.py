"""What a user waits for before the first step: each in a process of its own."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]


def startup():
    """(f) Import, runs with empty and full caches of programs and of decoded images."""
    rows = []

    def timed(what, arguments, environment, workdir=None):
        started = time.perf_counter()
        subprocess.run([sys.executable, *arguments], env=environment, check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        seconds = time.perf_counter() - started
        compiling = "-"
        if workdir is not None:
            result = json.loads((workdir / "result.json").read_text())
            compiling = f"{result['time']['compile_seconds']:.1f}"
        rows.append([what, f"{seconds:.1f}", compiling])

    with tempfile.TemporaryDirectory() as folder:
        home = pathlib.Path(folder)
        environment = os.environ | {"BPNJAX_CACHE_DIR": str(home / "cache")}
        timed("python -c 'import jax, flax.linen, optax'",
              ["-c", "import jax, flax.linen, optax"], environment)  # fmt: skip
        timed("python -c 'import bpnjax'", ["-c", "import bpnjax"], environment)
        runs = [("configs/digits.py", ("caches empty", "caches full"))]
        if os.environ.get("TFDS_DATA_DIR"):
            runs.append(("configs/mnist.py", ("images not decoded", "caches full")))
        for config, states in runs:
            for state in states:
                workdir = home / f"{pathlib.Path(config).stem}-{state}"
                command = ["-m", "bpnjax.main", f"--config={ROOT / config}",
                           f"--workdir={workdir}", "--config.train.epochs=1"]  # fmt: skip
                timed(f"{config}, 1 epoch a task, {state}", command, environment, workdir)
    return "Start", ["what", "seconds in all", "of them compiling"], rows
