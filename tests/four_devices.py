"""A learner over four devices against one, in a process that has four: methods by name."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bpnjax
from bpnjax import methods, networks
from bpnjax.models import MLP

DEVICES, EACH = 4, 3
METHODS = {
    "agem": methods.agem(memories=6, batch_size=4),
    "bd_ewc": methods.bd_ewc(hidden_dim=4, strength=0.1),
    "er": methods.er(memory_size=9, batch_size=4),
    "gem": methods.gem(memories=6),
    "ranpac": methods.ranpac(features=7),
    "si": methods.si(strength=1.0),
    "slda": methods.slda(shrinkage=0.1),
}


def main():
    assert jax.device_count() == DEVICES
    draws = np.random.default_rng(0)
    x = draws.normal(size=(2, DEVICES * EACH, 5)).astype(np.float32)
    y = draws.integers(4, size=(2, DEVICES * EACH)).astype(np.int32)
    weight = np.ones(DEVICES * EACH, np.float32)
    weight[[-1, -2, -3, 4]] = 0  # the last device has padding only
    network = networks.from_linen(MLP((6,), 4), x[0, :1])
    for name in sys.argv[1:]:
        method = METHODS[name]
        one = bpnjax.learner(network, method, optax.adam(0.01), num_tasks=2)
        four = bpnjax.learner(network, method, optax.adam(0.01), num_tasks=2, axis="devices")
        step = jax.pmap(four.step, axis_name="devices")
        end = jax.pmap(four.end_task, axis_name="devices")
        state = one.init(jax.random.key(0))
        states = replicated(four.init(jax.random.key(0)))
        for task in range(2):
            state = one.begin_task(state, task)
            states = jax.pmap(four.begin_task, in_axes=(0, None))(states, task)
            for _ in range(3):
                state, metrics = one.step(state, (x[task], y[task], weight))
                states, said = step(states, shared((x[task], y[task], weight)))
                close(said, replicated(metrics), f"{name}: metrics")
            state = one.end_task(state, (x[task], y[task]))
            states = end(states, shared((x[task], y[task])))
            close(states, replicated(state), f"{name}: state after task {task}")
        answers = jax.pmap(four.apply, in_axes=(0, None, None))(states, x[0], 0)
        close(answers, replicated(one.apply(state, x[0], 0)), f"{name}: answers")


def replicated(tree):
    return jax.tree.map(lambda leaf: jnp.stack([leaf] * DEVICES), tree)


def shared(tree):
    return jax.tree.map(lambda leaf: leaf.reshape(DEVICES, EACH, *leaf.shape[1:]), tree)


def close(ours, expected, what):
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True)
    for a, b in pairs:
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=what)


if __name__ == "__main__":
    main()
