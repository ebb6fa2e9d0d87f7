"""What is timed: the package's own programs, as a run compiles them, on random images."""

import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np

from bpnjax import config as configuration
from bpnjax.data.sequence import Split, TaskSequence
from bpnjax.run import train
from bpnjax.training import parallel
from bpnjax.training.experiment import make_experiment
from bpnjax.training.task_data import put_on_device

# Name: shape of an image, hidden layers, outputs.
NETWORKS = {
    "784-5x300-10": ((28, 28, 1), (300,) * 5, 10),
    "784-4x128-10": ((28, 28, 1), (128,) * 4, 10),
    "3072-5x300-20": ((32, 32, 3), (300,) * 5, 20),
    "784-4x128-100": ((28, 28, 1), (128,) * 4, 100),
    "784-4x128-1000": ((28, 28, 1), (128,) * 4, 1000),
}

_most: dict[str, int] = {}  # rounds and steps, where the times do not matter


def be_quick() -> None:
    """One round of three steps of everything: shows that it runs, not how fast."""
    _most.update(rounds=1, steps=3)


def make_config(network: str, method: str, **fields):
    """A configuration for a network and a method; ``a__b=value`` sets ``a.b``."""
    config = configuration.default()
    config.method = method
    config.model.hidden = NETWORKS[network][1]
    config.train.batch_size = 10 if method in ("gem", "agem") else 128
    flat = {name.replace("__", "."): value for name, value in fields.items()}
    config.update_from_flattened_dict(flat)
    configuration.validate(config)
    return config


def make_sequence(network: str, num_tasks: int = 2, examples: int = 12800) -> TaskSequence:
    """Random images and labels: ``examples`` for each task, two classes each."""
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
    return TaskSequence(
        train=split, test=split, classes=classes,
        class_names=tuple(str(c) for c in range(outputs)),
        scale=np.full(shape[-1], 1 / 64, np.float32),
        shift=np.full(shape[-1], -2.0, np.float32),
        columns=np.tile(np.arange(outputs, dtype=np.int32), (num_tasks, 1)), permuted=False,
    )  # fmt: skip


class Timed:
    """A method on a network, in the second task, where anchors, memories and banks are at work."""

    def __init__(self, network: str, method: str, num_tasks: int = 2, steps: int = 90, **fields):
        self.config = make_config(network, method, **fields)
        self.sequence = make_sequence(network, num_tasks)
        self.experiment = make_experiment(self.config, self.sequence)
        self.data = put_on_device(self.sequence)
        self.steps = min(steps, _most.get("steps", steps))
        self.keys = train.seed_keys(self.config)
        seeds, layout = self.config.num_seeds, parallel.choose_layout(self.config)
        self.programs = train.compile_programs(self.experiment, parallel.Clock(), seeds, layout)
        self.state = self.programs.init(self.keys)
        self.begin(0)
        self.run(0, 20)
        self.end(0)
        self.begin(1)
        self.burst()

    def begin(self, task: int):
        self.state = self.programs.begin_task(self.state, jnp.int32(task))

    def run(self, task: int, steps: int):
        numbers = [jnp.int32(n) for n in (task, 0, 0, steps)]
        self.state, sums = self.programs.run_steps(self.state, self.data, *numbers)
        jax.block_until_ready((self.state, sums))

    def end(self, task: int):
        self.state = self.programs.end_task(self.state, self.data, jnp.int32(task))
        jax.block_until_ready(self.state)

    def burst(self) -> float:
        """Seconds a step, everything included."""
        started = time.perf_counter()
        self.run(1, self.steps)
        return (time.perf_counter() - started) / self.steps


def best_of(bursts: dict, rounds: int = 8) -> dict:
    """The best of some rounds of every burst, taken in turn: a machine's pace changes."""
    return {name: min(times) for name, times in rounds_of(bursts, rounds).items()}


def rounds_of(bursts: dict, rounds: int) -> dict:
    """The times of some rounds of every burst, taken in turn."""
    times: dict = {name: [] for name in bursts}
    for _ in range(min(rounds, _most.get("rounds", rounds))):
        for name, burst in bursts.items():
            times[name].append(burst())
    return times


def flops_per_example(network: str) -> float:
    """Of the matrix products of one forward and backward pass; the input needs no gradient."""
    shape, hidden, outputs = NETWORKS[network]
    widths = (int(np.prod(shape)), *hidden, outputs)
    products = [a * b for a, b in itertools.pairwise(widths)]
    return 2.0 * (3 * sum(products) - products[0])
