"""A loaded model on batches that mix tasks, beside batches of one task."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from problems import NETWORKS, make_config, make_sequence, rounds_of

from bpnjax.run.predictor import Predictor
from bpnjax.training.experiment import make_experiment

EXAMPLES, TASKS, CALLS = 256, 100, 2


def mixed():
    """256 examples of 100 tasks, as a share of the time of 256 examples of one task."""
    rows = []
    for network in ("784-4x128-10", "784-5x300-10"):
        for method in ("bd_ewc", "bd_psp"):
            predictor = make_predictor(network, method)
            rng = np.random.default_rng(1)
            x = rng.integers(0, 256, (EXAMPLES, *predictor.input_shape), np.uint8)
            ids = rng.permutation(np.arange(EXAMPLES) % TASKS)
            bursts = {"one": burst(predictor, x, 3), "mixed": burst(predictor, x, ids)}
            one, several = rounds_of(bursts, rounds=500).values()
            rows.append([network, method, f"{min(one) * 1e3:.2f}", f"{min(several) * 1e3:.2f}",
                         f"{min(several) / min(one):.2f}",
                         f"{np.median(np.divide(several, one)):.2f}"])  # fmt: skip
    header = ["network", "method", "one task, ms", f"{TASKS} tasks, ms", "ratio of the best",
              "median ratio"]  # fmt: skip
    return f"Answers of bpnjax.load: {EXAMPLES} examples of {TASKS} tasks or one", header, rows


def burst(predictor, x, task):
    """A function that asks for logits a few times and gives the seconds of one time."""
    predictor.logits(x, task)

    def run() -> float:
        started = time.perf_counter()
        for _ in range(CALLS):
            predictor.logits(x, task)
        return (time.perf_counter() - started) / CALLS

    return run


def make_predictor(network: str, method: str) -> Predictor:
    """A model of 100 tasks whose weights and biases are random; nothing was trained."""
    sequence = make_sequence(network, TASKS, examples=2)
    config = make_config(network, method, sequence__num_tasks=TASKS)
    learner = make_experiment(config, sequence).learner
    rng = np.random.default_rng(0)

    def moved(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return leaf + rng.normal(0, 0.01, leaf.shape).astype(leaf.dtype)

    return Predictor(
        learner=learner, state=jax.tree.map(moved, learner.init(jax.random.key(0))),
        outputs=sequence.classes, class_names=sequence.class_names,
        input_shape=NETWORKS[network][0], input_dtype=np.dtype(np.uint8),
        input_range=(0.0, 255.0), orders=None,
        metadata={"method": method, "seed": "0"},
    )  # fmt: skip
