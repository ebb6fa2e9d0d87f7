"""One device equals four, each in a process: the number of devices is fixed at start."""

import json
import os
import subprocess
import sys

import pytest

from bpnjax import parallel
from bpnjax.errors import UserError

CHANGES = [
    "--config=configs/digits.py",
    "--config.sequence.num_tasks=2",
    "--config.model.hidden=(16,)",
    "--config.train.epochs=2",
    "--config.train.batch_size=30",  # does not divide by four
    "--config.bd.hidden_dim=8",
]


def run(workdir, devices, method):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    command = [sys.executable, "-m", "bpnjax.main", *CHANGES, f"--config.devices={devices}",
               f"--config.method={method}", f"--workdir={workdir}"]  # fmt: skip
    subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags}, check=True, capture_output=True)
    from safetensors.numpy import load_file

    return json.loads((workdir / "result.json").read_text()), load_file(
        workdir / "model.safetensors"
    )


@pytest.mark.parametrize("method", ["bd_ewc", "bd_psp"])
def test_four_devices_equal_one(tmp_path, method):
    one, one_model = run(tmp_path / "one", 1, method)
    four, four_model = run(tmp_path / "four", 4, method)
    for name, array in one_model.items():
        assert abs(array.astype(float) - four_model[name]).max() < 1e-4, name
    told = [r["accuracy"]["task_told"][0][-1] for r in (one, four)]
    assert all(abs(a - b) < 0.03 for a, b in zip(*told, strict=True))


def test_devices_are_checked():
    assert parallel.choose_devices("all", 1) == 1
    with pytest.raises(UserError, match="devices: 99 asked for"):
        parallel.choose_devices("99", 128)
