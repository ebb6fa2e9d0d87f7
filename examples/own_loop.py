"""One training loop for any network and any method: `run` is all there is to it.

    python examples/own_loop.py          # 1,000 training images per task
    python examples/own_loop.py 100      # fewer

A ResNet with BatchNorm (Flax Linen), a CNN (Flax NNX) and a vision transformer with dropout (Flax
NNX) learn three tasks of two classes in turn, each network with five methods.
"""

import os
import pathlib
import sys

import flax.linen as nn
import jax
import numpy as np
import optax
import tensorflow_datasets as tfds
from flax import nnx

import bpnjax
from bpnjax import methods, networks
from bpnjax.data import builtin_sets

CLASSES = [[0, 1], [2, 3], [4, 5]]
METHODS = (
    methods.sgd(),
    methods.bd_ewc(),
    methods.bd_psp(),
    methods.er(memory_size=200, batch_size=32),
    methods.lwf(strength=1.0),
)


def run(network, method, tasks, epochs=4, batch=32):
    """Trains the tasks in turn; returns learner, state and the outputs per task."""
    optimizer = optax.adam(1e-3)
    learner = bpnjax.learner(network, method, optimizer, len(tasks), classes=CLASSES)
    state = learner.init(jax.random.key(0))
    for task, (x, y, _, _) in enumerate(tasks):
        state = learner.begin_task(state, task)
        draws = np.random.default_rng(task)
        for _ in range(epochs):
            order = draws.permutation(len(x))[: len(x) // batch * batch]
            for rows in order.reshape(-1, batch):
                state, _ = learner.step(state, (x[rows], y[rows]))
        state = learner.end_task(state, (x, y))
    outputs = [learner.apply(state, x, task) for task, (*_, x, _) in enumerate(tasks)]
    return learner, state, outputs


class ResNet(nn.Module):
    """A residual block with batch normalisation, Flax Linen."""

    @nn.compact
    def __call__(self, x, train):
        def conv(x, strides=1):
            x = nn.relu(nn.Conv(16, (3, 3), strides=strides)(x))
            # Behind the ReLU: right behind the convolution it would subtract the task's bias.
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)

        x = conv(x, strides=2)
        x = x + conv(conv(x))
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
    """A vision transformer of 16 patches and one block, with dropout, Flax NNX."""

    def __init__(self, shape, rngs, width=32):
        patch = (shape[0] // 4, shape[1] // 4)
        self.patches = nnx.Conv(shape[2], width, patch, patch, padding="VALID", rngs=rngs)
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (16, width)))
        self.norms = nnx.List(nnx.LayerNorm(width, rngs=rngs) for _ in range(3))
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.wide = nnx.Linear(width, 2 * width, rngs=rngs)
        self.narrow = nnx.Linear(2 * width, width, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.classes = nnx.Linear(width, 6, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x).reshape(len(x), 16, -1) + self.position
        x = x + self.dropout(self.attention(self.norms[0](x)))
        x = x + self.dropout(self.narrow(nnx.gelu(self.wide(self.norms[1](x)))))
        return self.classes(self.norms[2](x).mean(1))


def load(examples):
    """Name of the set, and ``(x, y, test x, test y)`` of each task."""
    if pathlib.Path(os.environ.get("TFDS_DATA_DIR", ""), "cifar10").is_dir():
        name, largest = "CIFAR-10", 255
        splits = read_cifar10(f"train[:{6 * examples}]"), read_cifar10("test[:2500]")
    else:
        name, largest = "scikit-learn's digits (TFDS_DATA_DIR has no cifar10)", 16
        d = builtin_sets.digits()
        splits = (d.train_images, d.train_labels), (d.test_images, d.test_labels)
    tasks: list[list[np.ndarray]] = [[] for _ in CLASSES]
    for (x, y), most in zip(splits, (examples, 400), strict=True):
        for task, classes in zip(tasks, CLASSES, strict=True):
            rows = np.flatnonzero(np.isin(y, classes))[:most]
            task += [x[rows].astype(np.float32) / largest * 2 - 1, y[rows].astype(np.int32)]
    return name, tasks


def read_cifar10(split):
    """Images and labels of the prepared set, without TensorFlow."""
    source = tfds.data_source("cifar10", split=split, download=False)
    rows = [source[i] for i in range(len(source))]
    return tuple(np.stack([row[name] for row in rows]) for name in ("image", "label"))


def table_of(network, tasks):
    """The lines of a table: each method after the last task."""
    yield f"{'method':8}  task 1  task 2  task 3  average  masked  KB to answer  KB to train"
    for method in METHODS:
        learner, state, outputs = run(network, method, tasks)
        told, masked = [], []
        for logits, classes, (*_, y) in zip(outputs, CLASSES, tasks, strict=True):
            told.append(float(np.mean(logits.argmax(-1) == y)))
            masked.append(float(np.mean(logits[:, classes].argmax(-1) + classes[0] == y)))
        sizes = [leaf.nbytes for leaf in jax.tree.leaves(state)]
        needed = jax.tree.leaves(learner.answering())
        answer = sum(size for size, n in zip(sizes, needed, strict=True) if n)
        yield (
            f"{method.name:8}" + "".join(f"{accuracy:8.3f}" for accuracy in told)
            + f"{np.mean(told):9.3f}{np.mean(masked):8.3f}"
            + f"{answer / 1000:14.1f}{sum(sizes) / 1000:13.1f}"
        )  # fmt: skip


def main(examples=1000):
    """Prints a table for each network."""
    name, tasks = load(examples)
    x = tasks[0][0]
    print(f"{name}: three tasks of two classes, {len(x)} training images in the first")
    print("Accuracy told the task, after the last one; masked: among the task's own classes.")
    shape = x.shape[1:]
    for title, network in (
        ("ResNet with BatchNorm, Linen", networks.from_linen(ResNet(), x[:1])),
        ("CNN, NNX", networks.from_nnx(lambda rngs: CNN(shape, rngs), x[:1])),
        (
            "Transformer with dropout, NNX",
            networks.from_nnx(lambda r: Transformer(shape, r), x[:1]),
        ),
    ):
        params, _ = jax.eval_shape(network.init, jax.random.key(0))
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        print(f"\n{title}: {size:,} parameters, {len(network.layers)} layers with modes")
        for line in table_of(network, tasks):
            print(line, flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
