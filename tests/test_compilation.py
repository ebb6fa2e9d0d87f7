"""A sequence of any length compiles each program once."""

import logging

import jax
import pytest

from bpnjax import config as configuration
from bpnjax import train


def compiled_programs(tmp_path, caplog, tasks, method):
    config = configuration.default()
    config.method, config.dataset.name = method, "digits"
    config.sequence.kind, config.sequence.num_tasks = "permuted", tasks
    config.model.hidden = (8,)
    config.train.epochs, config.train.batch_size = 2, 700
    config.bd.hidden_dim = 4
    config.evaluate.inferred_rows = "last"
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


@pytest.mark.parametrize("method", ["bd_ewc", "bd_psp"])
def test_one_compilation_for_3_tasks_and_for_30(tmp_path, caplog, method):
    few = compiled_programs(tmp_path, caplog, 3, method)
    many = compiled_programs(tmp_path, caplog, 30, method)
    for program in ("run_steps", "begin_task", "end_task", "evaluate"):
        for names in (few, many):
            assert sum(program in name for name in names) == 1, (program, names)
