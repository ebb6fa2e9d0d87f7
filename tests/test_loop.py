"""A loop of one's own: the example that README shows, and each function by its parts."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import pytest
from command import ROOT

import bpnjax
from bpnjax import importance, optim
from bpnjax.data.tfds_read import data_roots, find
from bpnjax.methods import bd
from bpnjax.training import loop

pytestmark = pytest.mark.usefixtures("compile_once")

X = jax.random.normal(jax.random.key(0), (6, 4, 4, 2))
Y = jnp.array([0, 2, 1, 1, 0, 2])
MODEL = networks.ConvLayerNorm()
entropy = optax.softmax_cross_entropy_with_integer_labels


def begun(strength=5.0, step_size=0.0):
    core = jax.jit(MODEL.init)(jax.random.key(1), X)["params"]
    tx = optim.beneficial_perturbation(optax.sgd(0.1), 0.5)
    step = loop.make_step(MODEL, entropy, tx, strength, step_size)
    memory = loop.start(MODEL, core, X, num_tasks=3)
    return core, tx, step, memory


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a, b)


def test_a_step_is_that_of_its_parts():
    core, tx, step, memory = begun()
    ones = jax.tree.map(jnp.ones_like, core)
    memory = memory._replace(importance=ones, core=jax.tree.map(lambda p: p + 0.1, core))
    params, state = loop.begin_task(jax.random.key(2), memory._replace(core=core), tx, hidden_dim=4)
    assert params["bd"]["conv"]["W"].shape == (4, 3) and params["bd"]["head"]["M"].shape == (1, 4)

    def penalised(core, biases):
        logits = bpnjax.modulated_apply(MODEL, core, biases, X)
        return entropy(logits, Y).mean() + optim.anchor_penalty(core, memory.core, ones, 5.0)

    biases = bd.product(params["bd"])
    g_core, g_bias = jax.jit(jax.grad(penalised, (0, 1)))(core, biases)
    new, _, value = step(params, state, memory, X, Y)
    np.testing.assert_allclose(
        value, entropy(MODEL.apply({"params": core}, X), Y).mean(), rtol=1e-4
    )
    close(new["core"], jax.tree.map(lambda p, g: p - 0.1 * g, core, g_core))
    for path, f in params["bd"].items():  # d loss / d M = (d loss / d bias) W^T
        expected = -0.5 * np.sign(g_bias[path]["bias"] @ f["W"].T)
        np.testing.assert_allclose(new["bd"][path]["M"][0], expected)


def test_the_end_of_a_task_keeps_its_biases_and_adds_its_fisher():
    _, tx, step, memory = begun()
    for task in range(2):
        before = memory
        params, state = loop.begin_task(jax.random.key(task), memory, tx, hidden_dim=4)
        for _ in range(3):
            params, state, _ = step(params, state, memory, X, Y)
        memory = loop.end_task(MODEL, params, memory, task, X, Y)
        biases = bd.product(params["bd"])
        for path, vectors in biases.items():
            np.testing.assert_array_equal(memory.bank[path]["bias"][task], vectors["bias"])
            np.testing.assert_array_equal(memory.bank[path]["bias"][2], 0.0)
            assert np.abs(vectors["bias"]).max() > 0
        close(memory.core, params["core"])
        new = importance.fisher(MODEL, params["core"], biases, X, Y)
        close(memory.importance, jax.tree.map(jnp.add, before.importance, new))
    assert not np.allclose(memory.bank["head"]["bias"][0], memory.bank["head"]["bias"][1])


def test_a_pattern_chooses_the_layers():
    core, *_ = begun()
    assert list(loop.start(MODEL, core, X, 2, "conv").bank) == ["conv"]
    with pytest.raises(ValueError, match="matches no layer but 'LayerNorm_0'"):
        loop.start(MODEL, core, X, 2, "LayerNorm_0")


def test_the_example_keeps_the_first_task_with_and_loses_it_without():
    if not find("cifar10", None, None, data_roots("")):
        pytest.skip("TFDS_DATA_DIR holds no prepared cifar10")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "two_tasks.py", "3000"],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kept, lost = (float(line.split()[1].strip("%,")) for line in done.stdout.splitlines()
                  if line.startswith(("BD+EWC:", "without:")))  # fmt: skip
    assert kept > 0.7 and lost < 0.1


def test_the_example_fits_on_a_page():
    assert len((ROOT / "examples" / "two_tasks.py").read_text().splitlines()) <= 40
