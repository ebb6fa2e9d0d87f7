"""BatchNorm in a sequence of tasks: running statistics per task, shared, or frozen.

    python benchmarks/batch_statistics.py [--examples=1500] [--epochs=6] [--seeds=3]

A small ResNet learns five pairs of CIFAR-10 classes, one after another, with each policy of
``bpnjax.learner(..., batch_statistics=...)``. Writes docs/benchmarks/batch_statistics.json and .md
beside it: accuracy told after the last task, mean and sd over seeds.
"""

import argparse
import json
import pathlib
import time

import flax.linen as nn
import jax
import numpy as np
import optax
import tensorflow_datasets as tfds

import bpnjax
from bpnjax import methods, networks
from bpnjax.models.convolution import conv

ROOT = pathlib.Path(__file__).resolve().parents[1]
POLICIES = ("task", "shared", "frozen")
METHODS = {
    "sgd": methods.sgd(),
    "ewc": methods.ewc(examples=200),
    "bd_ewc": methods.bd_ewc(examples=200),
    "bd_psp": methods.bd_psp(),
    "er": methods.er(memory_size=500, batch_size=32),
}


class ResNet(nn.Module):
    """A stem and three residual blocks of two 3 x 3 convolutions, each with BatchNorm."""

    widths: tuple[int, ...] = (16, 32, 64)

    @nn.compact
    def __call__(self, x, train: bool):
        def norm(y):
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)(y)

        def layer(width, strides=1, size=3):
            return nn.Conv(width, (size, size), strides, use_bias=False, conv_general_dilated=conv)

        x = nn.relu(norm(layer(self.widths[0], 2)(x)))
        for i, width in enumerate(self.widths):
            strides = 2 if i else 1
            y = nn.relu(norm(layer(width, strides)(x)))
            y = norm(layer(width)(y))
            if x.shape != y.shape:
                x = layer(width, strides, 1)(x)
            x = nn.relu(x + y)
        return nn.Dense(10)(x.mean((1, 2)))


def pairs(split: str, most: int):
    """Five tasks of two classes: uint8 images and labels, at most so many examples each."""
    rows = list(tfds.data_source("cifar10", split=split))
    x, y = (np.stack([row[name] for row in rows]) for name in ("image", "label"))
    chosen = [np.flatnonzero(y // 2 == task)[:most] for task in range(5)]
    return [(x[rows], y[rows].astype(np.int32)) for rows in chosen]


def make_learner(policy: str, method) -> bpnjax.Learner:
    """A learner of five tasks on the ResNet."""
    network = networks.from_linen(ResNet(), jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32))
    network = network.with_input(
        lambda x: x.astype(np.float32) / 64.0 - 2.0, jax.ShapeDtypeStruct((1, 32, 32, 3), np.uint8)
    )
    return bpnjax.learner(network, method, optax.adam(1e-3), num_tasks=5, batch_statistics=policy)


def accuracy(learner: bpnjax.Learner, train, test, epochs: int, seed: int) -> list[float]:
    """Share of right answers on each task after the last one, told the task."""
    state = learner.init(jax.random.key(seed))
    rng = np.random.default_rng(seed)
    for task, (x, y) in enumerate(train):
        state = learner.begin_task(state, task)
        for _ in range(epochs):
            order = rng.permutation(len(x))
            for start in range(0, len(x) - 63, 64):
                rows = order[start : start + 64]
                state, _ = learner.step(state, (x[rows], y[rows]))
        state = learner.end_task(state, (x[:500], y[:500]))
    return [
        float(np.mean(np.argmax(learner.apply(state, x, task), -1) == y))
        for task, (x, y) in enumerate(test)
    ]


def main() -> None:
    """Runs every method with every policy and writes the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--examples", type=int, default=1500)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    train, test = pairs("train", options.examples), pairs("test", 500)
    found: dict[str, dict[str, list[list[float]]]] = {}
    started = time.time()
    for name, method in METHODS.items():
        for policy in POLICIES:
            learner = make_learner(policy, method)
            runs = [
                accuracy(learner, train, test, options.epochs, seed)
                for seed in range(options.seeds)
            ]
            found.setdefault(name, {})[policy] = runs
            print(name, policy, np.round(np.mean(runs, 0), 3), f"{time.time() - started:.0f} s")
    folder = ROOT / "docs" / "benchmarks"
    result = {
        "command": "python benchmarks/batch_statistics.py "
        f"--examples={options.examples} --epochs={options.epochs} --seeds={options.seeds}",
        "versions": {"bpnjax": bpnjax.__version__, "jax": jax.__version__},
        "accuracy": found,
    }
    (folder / "batch_statistics.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "batch_statistics.md").write_text(table(result))


def table(result: dict) -> str:
    """The page of a result."""
    lines = [
        "# BatchNorm in a sequence of tasks", "",
        "A small ResNet with BatchNorm learns five pairs of CIFAR-10 classes. Accuracy told after",
        "the last task, mean over the tasks, with the standard deviation over seeds. Made by",
        f"`{result['command']}`.", "",
        "| method | statistics per task | shared | frozen |", "|---|---|---|---|",
    ]  # fmt: skip
    for name, by in result["accuracy"].items():
        cells = []
        for policy in POLICIES:
            means = np.mean(by[policy], 1)
            cells.append(f"{means.mean():.3f} +- {means.std(ddof=1) if len(means) > 1 else 0:.3f}")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
