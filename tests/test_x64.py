"""With 64-bit floats on, states stay what they are: the same dtypes, hence the same bits."""

import json
import os
import subprocess
import sys

import pytest
from command import ROOT
from support import COMPOSED

from bpnjax.methods import REGISTRY

SCRIPT = """
import json, sys
from functools import partial
import jax, jax.numpy as jnp
from support import digits_config
from bpnjax.data import load_sequence
from bpnjax.training import epochs
from bpnjax.training.evaluate import evaluate
from bpnjax.training.experiment import make_experiment
from bpnjax.training.task_data import put_on_device
from bpnjax.utils import prng

assert jax.config.jax_enable_x64
wide = {}
for method in sys.argv[1:]:
    config = digits_config(method)
    config.evaluate.rule = "statistics"
    sequence = load_sequence(config)
    data, experiment = put_on_device(sequence), make_experiment(config, sequence)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    start = jax.eval_shape(partial(epochs.init_state, experiment), prng.key(0))
    begun = jax.eval_shape(partial(epochs.begin_task, experiment), start, number)
    many = (number,) * 4
    run, _ = jax.eval_shape(partial(epochs.run_steps, experiment), begun, data, *many)
    ended = jax.eval_shape(partial(epochs.end_task, experiment), run, data, number)
    jax.eval_shape(partial(evaluate, experiment), ended, data, number, True)
    leaves = [leaf for state in (start, begun, run, ended) for leaf in jax.tree.leaves(state)]
    wide[method] = sorted({str(leaf.dtype) for leaf in leaves if "64" in str(leaf.dtype)})
print(json.dumps(wide))
"""
QUICK = ("ewc", "derpp", "gem", "bd_psp", "slda")


@pytest.mark.parametrize(
    "methods",
    [QUICK, pytest.param(tuple(m for m in REGISTRY if m not in (*QUICK, *COMPOSED)),
                         marks=pytest.mark.slow)],
    ids=["some", "all"],
)  # fmt: skip
def test_states_stay_32_bits_wide(methods):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *methods], capture_output=True, text=True,
        env=os.environ | {"JAX_ENABLE_X64": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {method: [] for method in methods}
