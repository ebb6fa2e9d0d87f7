"""Reasons to doubt a finished run: tasks at chance, equal modes, no importance."""

import json

import jax
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


@pytest.mark.parametrize(
    "modulation, vectors",
    [("bias", "bias"), ("mask", "gain"), ("bias+gain", "bias and gain"), ("rank1", "gain and key")],
)
def test_parts_without_effect(modulation, vectors):
    jitted = Jitted(digits_config("bd_ewc", bd__modulation=modulation))
    state = jitted.init(jax.random.key(0))
    masked = np.ones((1, 3, 3))

    def found(change):
        method = jax.tree.map(change, state.learner.method)
        changed = state.replace(learner=state.learner.replace(method=method))
        return doubts.found({"task_masked": masked}, jitted.sequence, changed, True)

    same, importance = found(lambda leaf: leaf)
    assert same.startswith(f"all tasks have the same {vectors} in every layer, so they")
    assert importance.startswith("the importance of every parameter is zero")
    assert found(lambda leaf: leaf + leaf.dtype.type(1)) == [same]  # equal, though they moved
    first = lambda leaf: leaf.at[0].add(leaf.dtype.type(1)) if leaf.ndim else leaf  # noqa: E731
    assert found(first) == []


def test_random_biases_are_no_doubt():
    """They never move, and differ between tasks."""
    jitted = Jitted(digits_config("random_bias"))
    state = jitted.init(jax.random.key(0))
    assert doubts.found({"task_masked": np.ones((1, 3, 3))}, jitted.sequence, state, True) == []


def test_seeds_are_not_taken_for_tasks():
    jitted = Jitted(digits_config("bd"))
    state = jax.vmap(jitted.init)(jax.random.split(jax.random.key(0), 2))
    bank = state.learner.method
    layer = next(iter(bank))
    bank[layer]["bias"] = bank[layer]["bias"].at[1].add(1.0)  # all tasks of the second seed
    (said,) = doubts.found({"task_masked": np.ones((2, 3, 3))}, jitted.sequence, state, True)
    assert said.startswith("all tasks have the same bias in every layer")


def test_a_run_says_so_at_its_end(run, tiny_flags, tmp_path):
    flags = tiny_flags(method="bd_psp", train__learning_rate=1e-9, bd__epsilon=1e-30)
    code, _, said = run([*flags, f"--workdir={tmp_path / 'run'}"])
    assert code == 0 and "bpnjax: warning: task 1 and 2 more of 3 not learned" in said
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["doubts"][0].startswith("task 1 and 2 more of 3 not learned")
