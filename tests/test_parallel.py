"""One device equals four, each in a process: the number of devices is fixed at start."""

import json
import os
import subprocess
import sys

import pytest

from bpnjax import parallel
from bpnjax.config import default
from bpnjax.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_once")

CHANGES = [
    "--config=configs/digits.py",
    "--config.sequence.num_tasks=2",
    "--config.model.hidden=(16,)",
    "--config.train.epochs=2",
    "--config.train.batch_size=30",  # does not divide by four
    "--config.bd.hidden_dim=8",
    "--config.gem.memories=20",
    "--config.evaluate.batch_size=25",  # several batches, not a multiple of four
]


def run(workdir, *more):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    command = [sys.executable, "-m", "bpnjax.main", *CHANGES, *more, f"--workdir={workdir}"]
    done = subprocess.run(
        command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    from safetensors.numpy import load_file

    models = [load_file(path) for path in sorted(workdir.glob("model*.safetensors"))]
    return json.loads((workdir / "result.json").read_text()), models


@pytest.mark.parametrize(
    "method, backend",
    [("bd_ewc", "pmap"), ("bd_psp", "shard_map"), ("si", "pmap"), ("gem", "pmap")],
)
def test_four_devices_equal_one(tmp_path, method, backend):
    flags = [f"--config.method={method}", f"--config.parallel.backend={backend}"]
    one, (one_model,) = run(tmp_path / "one", *flags, "--config.devices=1")
    four, (four_model,) = run(tmp_path / "four", *flags, "--config.devices=4")
    for name, array in one_model.items():
        assert abs(array.astype(float) - four_model[name]).max() < 1e-4, name
    for kind in ("task_told", "task_masked", "task_inferred"):
        told = [r["accuracy"][kind][0][-1] for r in (one, four)]
        assert all(abs(a - b) < 0.03 for a, b in zip(*told, strict=True)), kind


@pytest.mark.parametrize("backend", ["pmap", "shard_map"])
def test_seeds_over_devices_equal_seeds_on_one(tmp_path, backend):
    """Two seeds on each of two devices, and the same two seeds alone on one.

    Equal up to a rounding: XLA fuses the two programs differently.
    """
    flags = ["--config.method=bd_ewc", "--config.parallel.axis=seeds",
             f"--config.parallel.backend={backend}"]  # fmt: skip
    four, models = run(tmp_path / "four", *flags, "--config.num_seeds=4", "--config.devices=2")
    two, pair = run(
        tmp_path / "two", *flags, "--config.num_seeds=2", "--config.seed=2", "--config.devices=1"
    )
    for kind in ("task_told", "task_masked", "task_inferred"):
        assert four["accuracy"][kind][2:] == two["accuracy"][kind]
    for a, b in zip(models[2:], pair, strict=True):
        for name, array in a.items():
            assert abs(array.astype(float) - b[name]).max() < 1e-6, name


def layout(**changes):
    config = default()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return parallel.choose_layout(config)


def test_devices_are_checked(monkeypatch):
    monkeypatch.setattr(parallel.jax, "local_device_count", lambda: 4)
    assert layout(train__batch_size=1).number == 1
    assert layout().number == 4
    assert layout(parallel__axis="seeds", num_seeds=6).number == 3
    assert layout(parallel__axis="seeds", num_seeds=6, devices="2").number == 2
    with pytest.raises(UserError, match="devices: 99 asked for, 4 there"):
        layout(devices="99")
    with pytest.raises(UserError, match="devices: 3 devices share a batch of 2"):
        layout(devices="3", train__batch_size=2)
    with pytest.raises(UserError, match="devices: 4 devices cannot share 6 seeds evenly"):
        layout(devices="4", parallel__axis="seeds", num_seeds=6)
