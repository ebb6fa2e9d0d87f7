"""A sequence of any length compiles each program once."""

import logging
import os
import subprocess
import sys

import jax
import pytest
from command import ROOT, XLA_FLAGS

from bpnjax import config as configuration
from bpnjax.run import train


def compiled_programs(tmp_path, caplog, tasks, method):
    config = configuration.default()
    config.method, config.dataset.name = method, "digits"
    config.sequence.kind, config.sequence.num_tasks = "permuted", tasks
    config.model.hidden = (8,)
    config.train.epochs, config.train.batch_size = 2, 700
    config.bd.hidden_dim = 4
    config.evaluate.inferred_rows, config.evaluate.rule = "last", "statistics"
    config.checkpoint.every_tasks = tasks
    config.checkpoint.every_steps = 3  # epochs are cut into pieces of 2, 1, 1, ... steps
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        train.train_and_evaluate(config, tmp_path / f"{method}{tasks}")
    return [
        record.getMessage().split()[1]
        for record in caplog.records
        if record.getMessage().startswith("Compiling")
    ]


@pytest.mark.usefixtures("compile_once")  # counted is what is asked for, wherever it comes from
@pytest.mark.parametrize("method", ["bd_ewc", pytest.param("bd_psp", marks=pytest.mark.slow)])
def test_one_compilation_for_3_tasks_and_for_30(tmp_path, caplog, method):
    few = compiled_programs(tmp_path, caplog, 3, method)
    many = compiled_programs(tmp_path, caplog, 30, method)
    for program in ("run_steps", "begin_task", "end_task", "evaluate"):
        for names in (few, many):
            assert sum(program in name for name in names) == 1, (program, names)


def test_a_second_process_compiles_nothing_again(tmp_path, tiny_flags):
    def run(name, *more):
        env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
        env |= {"BPNJAX_CACHE_DIR": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
        env["XLA_FLAGS"] = XLA_FLAGS
        command = [sys.executable, "-m", "bpnjax.main", *tiny_flags(method="bd_psp"), *more]
        subprocess.run([*command, f"--workdir={tmp_path / name}"], check=True, env=env,
                       capture_output=True, cwd=ROOT)  # fmt: skip
        return {p.name for p in (tmp_path / "cache" / "compiled").glob("*-cache")}

    assert run("off", "--config.compilation_cache=False") == set()
    first = run("one")
    assert any("run_steps" in name for name in first)
    assert run("two") == first
    # Compiled or read from disk, it is the same program.
    results = [(tmp_path / n / "accuracy.csv").read_bytes() for n in ("off", "one", "two")]
    assert len(set(results)) == 1
