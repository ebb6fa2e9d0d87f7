"""Two CIFAR-10 tasks in turn, your own network and loop: kept with BD+EWC, lost without."""

import sys

import flax.linen as nn
import jax
import numpy as np
import optax
import tensorflow_datasets as tfds

from bpnjax import loop, modulated_apply, optim, select


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(32, (5, 5))(x)), (4, 4), (4, 4))
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x.reshape(len(x), -1))))


def load(split, classes):  # a prepared set, in the folder that TFDS_DATA_DIR names
    rows = [r for r in tfds.data_source("cifar10", split=split) if r["label"] in classes]
    return np.stack([r["image"] for r in rows]) / 127.5 - 1, np.array([r["label"] for r in rows])


model, loss = CNN(), optax.softmax_cross_entropy_with_integer_labels
split = f"train[:{sys.argv[1]}]" if sys.argv[1:] else "train"
tasks = [load(split, classes) for classes in ((0, 1), (2, 3))]
test_x, test_y = load("test", (0, 1))
for name, epsilon, strength in (("BD+EWC", 0.2, 2000.0), ("without", 0.0, 0.0)):
    tx = optim.beneficial_perturbation(optax.adam(1e-3), epsilon)
    step = loop.make_step(model, loss, tx, strength, step_size=1e-3)
    memory = loop.start(model, model.init(jax.random.key(0), test_x[:1])["params"], test_x[:1], 2)
    for task, (x, y) in enumerate(tasks):
        params, state = loop.begin_task(jax.random.key(task), memory, tx)
        for rows in np.random.default_rng(task).integers(len(x), size=(len(x) // 10, 32)):
            params, state, _ = step(params, state, memory, x[rows], y[rows])
        memory = loop.end_task(model, params, memory, task, x[:500], y[:500])
    answers = modulated_apply(model, memory.core, select(memory.bank, 0), test_x).argmax(-1)
    print(f"{name}: {np.mean(answers == test_y):.3f} of the first task after the second")
