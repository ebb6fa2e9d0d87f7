"""One training loop for any network and any method: two of Flax Linen and NNX by turns.

    python examples/own_loop.py          # 1,000 images of each of three tasks
    python examples/own_loop.py 200      # fewer; the last argument

A ResNet with BatchNorm (Linen), a CNN (NNX) and a small vision transformer with dropout (NNX) learn
three tasks in turn, two classes each, with five methods. None of them knows of the others.
"""

import os
import pathlib
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tensorflow_datasets as tfds
from flax import nnx

import bpnjax
from bpnjax import methods, networks
from bpnjax.data import builtin_sets

CLASSES = [[0, 1], [2, 3], [4, 5]]
METHODS = {
    "sgd": methods.sgd(),
    "bd_ewc": methods.bd_ewc(epsilon=0.05, strength=2000.0),
    "bd_psp": methods.bd_psp(epsilon=0.05),
    "er": methods.er(memory_size=200, batch_size=32),
    "lwf": methods.lwf(strength=1.0),
}


def run(network, method, tasks, epochs=4, batch=32):
    """Trains the tasks in turn; returns the outputs for each task's test images, and the state."""
    learner = bpnjax.learner(network, method, optax.adam(1e-3), len(tasks), classes=CLASSES)
    state = learner.init(jax.random.key(0))
    for task, (x, y, _, _) in enumerate(tasks):
        state = learner.begin_task(state, task)
        draws = np.random.default_rng(task)
        for _ in range(epochs):
            order = draws.permutation(len(x) // batch * batch)
            for rows in order.reshape(-1, batch):
                state, _ = learner.step(state, (x[rows], y[rows]))
        state = learner.end_task(state, (x, y))
    outputs = [learner.apply(state, x, task) for task, (_, _, x, _) in enumerate(tasks)]
    return outputs, learner, state


class ResNet(nn.Module):
    """Two residual blocks, batch normalisation, Flax Linen."""

    @nn.compact
    def __call__(self, x, train):
        def conv(x, strides=1):
            x = nn.Conv(16, (3, 3), strides=strides, use_bias=False)(x)
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)

        x = nn.relu(conv(x, strides=2))
        for _ in range(2):
            x = nn.relu(x + conv(nn.relu(conv(x))))
        return nn.Dense(6)(x.mean((1, 2)))


class CNN(nnx.Module):
    """Two convolutions and two dense layers, Flax NNX."""

    def __init__(self, shape, rngs):
        height, width, channels = shape
        self.first = nnx.Conv(channels, 16, (3, 3), strides=2, rngs=rngs)
        self.second = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.hidden = nnx.Linear(height // 4 * (width // 4) * 32, 64, rngs=rngs)
        self.classes = nnx.Linear(64, 6, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.second(nnx.relu(self.first(x))))
        return self.classes(nnx.relu(self.hidden(x.reshape(len(x), -1))))


class Transformer(nnx.Module):
    """A small vision transformer with dropout, Flax NNX."""

    def __init__(self, shape, rngs, width=32, depth=2):
        patch = shape[0] // 4  # 16 patches
        self.patches = nnx.Conv(
            shape[2], width, (patch, patch), strides=patch, padding="VALID", rngs=rngs
        )
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (16, width)))
        self.blocks = nnx.List(Block(width, rngs) for _ in range(depth))
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.classes = nnx.Linear(width, 6, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x).reshape(len(x), 16, -1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.classes(self.norm(x).mean(1))


class Block(nnx.Module):
    """Attention and a dense part, each beside a skip connection."""

    def __init__(self, width, rngs):
        self.norms = nnx.List(nnx.LayerNorm(width, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.wide = nnx.Linear(width, 2 * width, rngs=rngs)
        self.narrow = nnx.Linear(2 * width, width, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        x = x + self.dropout(self.attention(self.norms[0](x)))
        return x + self.dropout(self.narrow(nnx.gelu(self.wide(self.norms[1](x)))))


def load(examples):
    """``[(x, y, test x, test y)]`` of three tasks: CIFAR-10 where it is prepared, else digits."""
    found = pathlib.Path(os.environ.get("TFDS_DATA_DIR", "."), "cifar10").is_dir()
    if found:
        print("CIFAR-10, three tasks of two classes")
        train, test = (
            rows_of("cifar10", split, 5 * n)
            for split, n in (("train", examples), ("test", 400))
        )
        scale = 127.5
    else:
        print("scikit-learn's digits (no cifar10 in TFDS_DATA_DIR), three tasks of two classes")
        digits = builtin_sets.digits()
        train = digits.train_images, digits.train_labels
        test = digits.test_images, digits.test_labels
        scale = 8.0
    tasks = []
    for classes in CLASSES:
        parts = []
        for (x, y), most in ((train, examples), (test, 400)):
            rows = np.flatnonzero(np.isin(y, classes))[:most]
            parts += [x[rows].astype(np.float32) / scale - 1, y[rows].astype(np.int32)]
        tasks.append(parts)
    return tasks


def rows_of(name, split, most):
    """Images and labels of a prepared TFDS set."""
    source = tfds.data_source(name, split=f"{split}[:{most}]", download=False)
    rows = [source[i] for i in range(len(source))]
    return tuple(np.stack([row[feature] for row in rows]) for feature in ("image", "label"))


def main(examples=1000):
    """Prints a table for each network."""
    tasks = load(examples)
    x = tasks[0][0][:1]
    built = {
        "ResNet, BatchNorm (Linen)": networks.from_linen(ResNet(), x),
        "CNN (NNX)": networks.from_nnx(lambda rngs: CNN(x.shape[1:], rngs), x),
        "transformer, dropout (NNX)": networks.from_nnx(
            lambda rngs: Transformer(x.shape[1:], rngs), x
        ),
    }
    import time
    for name, network in built.items():
        print(f"\n{name}")
        for kind, method in METHODS.items():
            t0 = time.time()
            outputs, learner, state = run(network, method, tasks)
            told = [float((o.argmax(-1) == y).mean()) for o, (_, _, _, y) in zip(outputs, tasks, strict=True)]
            masked = [float((o[:, jnp.array(c)].argmax(-1) + c[0] == y).mean()) for o, c, (_, _, _, y) in zip(outputs, CLASSES, tasks, strict=True)]
            print(kind, np.round(told, 3), round(np.mean(told), 3), np.round(masked, 3), round(np.mean(masked), 3), round(time.time() - t0, 1), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
