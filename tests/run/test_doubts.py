"""What a finished run is told to doubt: tasks at chance, biases that stood still, no importance."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import Jitted, digits_config

from bpnjax.run import doubts

pytestmark = pytest.mark.usefixtures("compile_once")


def test_tasks_at_chance():
    jitted = Jitted(digits_config("sgd"))
    state = jitted.init(jax.random.key(0))
    masked = np.full((2, 3, 3), np.nan)
    masked[:, [0, 1, 2], [0, 1, 2]] = [[0.97, 0.98, 0.99], [0.96, 0.51, 0.9]]
    (said,) = doubts.found({"task_masked": masked}, jitted.sequence, state, False)
    assert said.startswith("task 2 of 3 not learned: right after training the accuracy among its")
    assert "is 0.51, and chance is 0.50" in said
    masked[1, 1, 1] = 0.8
    assert doubts.found({"task_masked": masked}, jitted.sequence, state, False) == []


def test_protections_without_effect():
    jitted = Jitted(digits_config("bd_ewc"))
    state = jitted.init(jax.random.key(0))
    masked = np.ones((1, 3, 3))
    said = doubts.found({"task_masked": masked}, jitted.sequence, state, True)
    assert [text.split(",")[0] for text in said] == [
        "no bias of any task ever moved", "the importance of every parameter is zero",
    ]  # fmt: skip
    moved = jax.tree.map(
        lambda leaf: leaf if leaf.dtype != jnp.float32 else leaf + 1, state.learner.method
    )
    state = state.replace(learner=state.learner.replace(method=moved))
    assert doubts.found({"task_masked": masked}, jitted.sequence, state, True) == []


def test_a_run_says_so_at_its_end(run, tiny_flags, tmp_path):
    flags = tiny_flags(method="bd_psp", train__learning_rate=1e-9, bd__epsilon=1e-30)
    code, _, said = run([*flags, f"--workdir={tmp_path / 'run'}"])
    assert code == 0 and "bpnjax: warning: task 1 and 2 more of 3 not learned" in said
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["doubts"][0].startswith("task 1 and 2 more of 3 not learned")
