"""What is timed: the package's own programs on random pictures of a set's size."""

import itertools
import time
from functools import partial

import jax
import numpy as np

from bpnjax import config as configuration
from bpnjax import programs
from bpnjax.data.sequence import Split, TaskSequence
from bpnjax.view import put_on_device

# Name: shape of a picture, hidden layers, outputs.
NETWORKS = {
    "784-5x300-10": ((28, 28, 1), (300,) * 5, 10),
    "784-4x128-10": ((28, 28, 1), (128,) * 4, 10),
    "3072-5x300-20": ((32, 32, 3), (300,) * 5, 20),
}


def make_config(network: str, method: str, **fields):
    """A configuration for a network and a method; ``a__b=value`` sets ``a.b``."""
    _, hidden, _ = NETWORKS[network]
    config = configuration.default()
    config.method = method
    config.model.hidden = hidden
    config.train.batch_size = 10 if method in ("gem", "agem") else 128
    flat = {name.replace("__", "."): value for name, value in fields.items()}
    config.update_from_flattened_dict(flat)
    configuration.validate(config)
    return config


def make_sequence(network: str, num_tasks: int = 2, examples: int = 12800) -> TaskSequence:
    """Random pictures and labels: ``examples`` for each task, two classes each."""
    shape, _, outputs = NETWORKS[network]
    rng = np.random.default_rng(0)
    per_task = min(examples, 60000 // num_tasks)
    n = per_task * num_tasks
    images = rng.integers(0, 256, (n, *shape), np.uint8)
    classes = np.zeros((num_tasks, outputs), bool)
    labels = np.empty(n, np.int32)
    for task in range(num_tasks):
        pair = (2 * task % outputs, (2 * task + 1) % outputs)
        classes[task, pair] = True
        labels[task * per_task : (task + 1) * per_task] = rng.choice(pair, per_task)
    index = np.arange(n, dtype=np.int32).reshape(num_tasks, per_task)
    split = Split(images, labels, index, np.full(num_tasks, per_task, np.int32))
    channels = shape[-1]
    columns = np.tile(np.arange(outputs, dtype=np.int32), (num_tasks, 1))
    return TaskSequence(
        train=split, test=split, classes=classes,
        class_names=tuple(str(c) for c in range(outputs)),
        scale=np.full(channels, 1 / 64, np.float32), shift=np.full(channels, -2.0, np.float32),
        columns=columns, permuted=False,
    )  # fmt: skip


class Timed:
    """A method's compiled programs on a network."""

    def __init__(self, network: str, method: str, num_tasks: int = 2, **fields):
        self.config = make_config(network, method, **fields)
        self.sequence = make_sequence(network, num_tasks)
        self.problem = programs.make_problem(self.config, self.sequence)
        self.data = put_on_device(self.sequence)
        self.key = jax.random.key(0)
        self.init = jax.jit(partial(programs.init_state, self.problem))
        self.begin_task = jax.jit(partial(programs.begin_task, self.problem), donate_argnums=1)
        self.run_steps = jax.jit(partial(programs.run_steps, self.problem), donate_argnums=1)
        self.end_task = jax.jit(partial(programs.end_task, self.problem), donate_argnums=1)

    def second_task(self, steps: int = 20):
        """A state in the second task, where anchors, memories and banks are at work."""
        state = self.begin_task(self.key, self.init(self.key), 0)
        state, _ = self.run_steps(self.key, state, self.data, 0, 0, 0, steps)
        state = self.end_task(self.key, state, self.data, 0)
        return self.begin_task(self.key, state, 1)

    def seconds_per_step(self, steps: int = 90, repeats: int = 5) -> float:
        """Of the second task, everything included; the best of some repetitions."""
        state = self.second_task()
        best = float("inf")
        for _ in range(repeats + 1):  # the first one compiles
            started = time.perf_counter()
            state, sums = self.run_steps(self.key, state, self.data, 1, 0, 0, steps)
            jax.block_until_ready((state, sums))
            best = min(best, (time.perf_counter() - started) / steps)
        return best


def flops_per_example(network: str) -> float:
    """Of the matrix products of one forward and backward pass; the input needs no gradient."""
    shape, hidden, outputs = NETWORKS[network]
    widths = (int(np.prod(shape)), *hidden, outputs)
    products = [a * b for a, b in itertools.pairwise(widths)]
    return 2.0 * (3 * sum(products) - products[0])
