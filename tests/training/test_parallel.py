"""One device equals four, and one host two: in processes, since devices are fixed at start."""

import json
import os
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from command import ROOT, XLA_FLAGS
from safetensors.numpy import load_file

from bpnjax.config import default
from bpnjax.training import parallel
from bpnjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_once")

# Measured: on a CPU JAX 0.10 compiles a step to the same code alone, in a loop over seeds and on
# several devices; JAX 0.12 does not.
SAME_CODE = jax.__version_info__ < (0, 11)
CHANGES = [
    f"--config={ROOT / 'configs' / 'digits.py'}",
    "--config.sequence.num_tasks=2",
    "--config.model.hidden=(16,)",
    "--config.train.epochs=2",
    "--config.train.batch_size=30",  # does not divide by four
    "--config.bd.hidden_dim=8",
    "--config.gem.memories=20",
    "--config.replay.memory_size=50",
    "--config.replay.batch_size=16",
    "--config.evaluate.batch_size=25",  # several batches, not a multiple of four
    "--config.evaluate.rule=statistics",
    "--config.evaluate.statistics=8",
]


def environment(devices):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}


def start(workdir, *more, devices=4):
    return subprocess.Popen(
        [sys.executable, "-m", "bpnjax.main", *CHANGES, *more, f"--workdir={workdir}"],
        env=environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result_of(workdir):
    models = [load_file(path) for path in sorted(workdir.glob("model*.safetensors"))]
    return json.loads((workdir / "result.json").read_text()), models


def run(workdir, *more):
    process = start(workdir, *more)
    _, err = process.communicate()
    assert process.returncode == 0, err
    return result_of(workdir)


def run_on_two_hosts(workdir, *more, timeout=300):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = [*more, "--distributed", f"--coordinator={address}", "--hosts=2"]
    both = [start(workdir, *flags, f"--host={i}", devices=2) for i in range(2)]
    try:
        said = [process.communicate(timeout=timeout) for process in both]
    finally:
        for process in both:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(both, said, strict=True)]


RUNS = """
import json, sys
from safetensors.numpy import save_file
from bpnjax import main
from bpnjax.run import export
from bpnjax.utils import arrays

save_models = export.save_models

def with_state(workdir, experiment, state, *more):
    written = save_models(workdir, experiment, state, *more)
    save_file(arrays.flatten(state.learner), workdir / "state.safetensors")
    return written

export.save_models = with_state
for flags in json.loads(sys.argv[1]):
    assert main.run(flags) == 0
"""


@pytest.mark.parametrize(
    "method",
    [
        "bd_ewc", "er",
        *(pytest.param(m, marks=pytest.mark.slow)
          for m in ("bd_psp", "si", "gem", "agem", "derpp", "lwf")),
    ],
)  # fmt: skip
def test_four_devices_equal_one(tmp_path, method):
    """By pmap and by shard_map, in all that training keeps: memories, importance, optimizer too."""
    flags = [*CHANGES, f"--config.method={method}"]
    layouts = {"one": ["1"], "pmap": ["4", "pmap"], "shard_map": ["4", "shard_map"]}
    runs = [
        [*flags, f"--workdir={tmp_path / name}", f"--config.devices={devices}",
         *(f"--config.parallel.backend={b}" for b in backend)]
        for name, (devices, *backend) in layouts.items()
    ]  # fmt: skip
    script = [sys.executable, "-c", RUNS, json.dumps(runs)]
    done = subprocess.run(script, env=environment(devices=4), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, state = result_of(tmp_path / "one"), load_file(tmp_path / "one" / "state.safetensors")
    for name in ("pmap", "shard_map"):
        assert_equal(one, result_of(tmp_path / name))
        found = load_file(tmp_path / name / "state.safetensors")
        assert found.keys() == state.keys()
        for part, array in state.items():
            if np.issubdtype(array.dtype, np.integer):
                np.testing.assert_array_equal(found[part], array, err_msg=f"{name} {part}")
            else:
                np.testing.assert_allclose(
                    found[part], array, rtol=1e-5, atol=1e-5, err_msg=f"{name} {part}"
                )


def assert_equal(ours, theirs):
    (one, (one_model,)), (four, (four_model,)) = ours, theirs
    for name, array in one_model.items():
        assert abs(array.astype(float) - four_model[name]).max() < 1e-5, name
    for kind in ("task_told", "task_masked", "task_inferred"):
        assert one["accuracy"][kind] == four["accuracy"][kind]
    assert one["inference"] == four["inference"]


@pytest.mark.parametrize(
    "method, backend",
    [
        ("bd_ewc", "pmap"),
        *(pytest.param(*both, marks=pytest.mark.slow)
          for both in (("bd_psp", "pmap"), ("si", "shard_map"), ("gem", "shard_map"))),
    ],
)  # fmt: skip
def test_two_hosts_equal_one_and_go_on_where_they_stopped(tmp_path, method, backend):
    """Two processes with two devices each; then their run, cut, is ended by both."""
    flags = [f"--config.method={method}", f"--config.parallel.backend={backend}"]
    one, workdir = run(tmp_path / "one", *flags, "--config.devices=1"), tmp_path / "two"
    ended = run_on_two_hosts(workdir, *flags)
    assert [code for code, *_ in ended] == [0, 0], ended
    assert "results in" in ended[0][1] and "results in" not in ended[1][1]
    assert_equal(one, result_of(workdir))

    (workdir / "result.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / "00002-00000-000000000")
    (workdir / "checkpoints" / "00002-00000-000000000.json").unlink()
    ended = run_on_two_hosts(workdir, *flags)
    assert [code for code, *_ in ended] == [0, 0], ended
    assert "going on at task 2" in ended[0][2]
    assert_equal(one, result_of(workdir))

    # What the first host refuses all refuse, none waits for the others.
    ended = run_on_two_hosts(workdir, *flags, "--config.train.epochs=3")
    assert [code for code, *_ in ended] == [2, 2]
    assert all("train.epochs: 2 -> 3" in err for *_, err in ended)


@pytest.mark.slow
def test_host_that_fails_does_not_leave_the_other_waiting(tmp_path):
    """The first host alone cannot write; the run ends on both, with its message."""
    (tmp_path / ".config.json.partial").mkdir()
    ended = run_on_two_hosts(tmp_path, timeout=100)
    assert ended[0][0] == 2 and ended[1][0] != 0, ended
    assert "bpnjax: --workdir: cannot write to" in ended[0][2]


@pytest.mark.parametrize("backend", ["pmap", pytest.param("shard_map", marks=pytest.mark.slow)])
def test_seeds_over_devices_equal_seeds_on_one(tmp_path, backend, monkeypatch):
    """Two seeds on each of two devices, and all on one, compiled as users do.

    Bit for bit where XLA makes the same machine code of both programs, else up to rounding.
    """
    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS")
    monkeypatch.setenv("XLA_FLAGS", XLA_FLAGS)
    flags = ["--config.method=bd_ewc", "--config.parallel.axis=seeds", "--config.num_seeds=4"]
    one, ones = run(tmp_path / "one", *flags, "--config.devices=1")
    two, twos = run(
        tmp_path / "two", *flags, "--config.devices=2", f"--config.parallel.backend={backend}"
    )
    assert one["accuracy"] == two["accuracy"]
    for a, b in zip(ones, twos, strict=True):
        for name, array in a.items():
            if SAME_CODE:
                assert array.tobytes() == b[name].tobytes(), name
            else:
                np.testing.assert_allclose(b[name], array, rtol=0, atol=1e-6, err_msg=name)


def layout(**changes):
    config = default()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return parallel.choose_layout(config)


def test_devices_are_checked(monkeypatch):
    monkeypatch.setattr(parallel.jax, "device_count", lambda: 4)
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
    monkeypatch.setattr(parallel.jax, "process_count", lambda: 2)
    assert layout().number == 4
    with pytest.raises(UserError, match="parallel.axis: 'seeds' works on one host"):
        layout(parallel__axis="seeds", num_seeds=4)
    with pytest.raises(UserError, match="devices: 2 hosts share the work of all their 4 devices"):
        layout(train__batch_size=3)
