"""Two CIFAR-10 tasks in turn, your own network and loop: kept with BD+EWC, lost without."""

import sys

import flax.linen as nn
import jax
import numpy as np
import optax
import tensorflow_datasets as tfds

from bpnjax import modulated_apply, optim, select
from bpnjax.training import loop


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(32, (5, 5), strides=4)(x))
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x.reshape(len(x), -1))))


def load(split):  # of a prepared set, in the folder that TFDS_DATA_DIR names
    rows = [r for r in tfds.data_source("cifar10", split=split) if r["label"] < 4]
    x, y = (np.stack([r[name] for r in rows]) for name in ("image", "label"))
    return [(x[y // 2 == task] / 127.5 - 1, y[y // 2 == task]) for task in (0, 1)]


model, loss = CNN(), optax.softmax_cross_entropy_with_integer_labels
tasks = load(f"train[:{sys.argv[1]}]" if sys.argv[1:] else "train")
test_x, test_y = load("test[:2000]")[0]
for name, epsilon, strength in (("BD+EWC", 0.2, 2000.0), ("without", 0.0, 0.0)):
    tx = optim.beneficial_perturbation(optax.adam(1e-3), epsilon)
    step = loop.make_step(model, loss, tx, strength, step_size=1e-3)
    memory = loop.start(model, model.init(jax.random.key(0), test_x[:1])["params"], test_x[:1], 2)
    for task, (x, y) in enumerate(tasks):
        params, state = loop.begin_task(jax.random.key(task), memory, tx)
        for rows in np.random.default_rng(task).integers(len(x), size=(len(x) // 10, 32)):
            params, state, _ = step(params, state, memory, x[rows], y[rows])
        memory = loop.end_task(model, params, memory, task, x[:200], y[:200])
    answers = modulated_apply(model, memory.core, select(memory.bank, 0), test_x).argmax(-1)
    print(f"{name}: {np.mean(answers == test_y):.3f} of the first task after the second")
