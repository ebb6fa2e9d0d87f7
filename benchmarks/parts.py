"""The tables: each function measures one thing and gives a title, a header and rows."""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from problems import NETWORKS, Timed, flops_per_example
from torch_loop import seconds_per_step as torch_seconds

from bpnjax import importance, memory, programs

METHODS = ("sgd", "ewc", "bd_ewc", "bd_psp", "psp", "si", "gem")


def steps(limit: float):
    """(a) Training steps, everything included, as a share of the matrix-multiply rate."""
    rows = []
    for network in NETWORKS:
        sgd = None
        for method in METHODS:
            timed = Timed(network, method)
            batch = timed.config.train.batch_size
            seconds = timed.seconds_per_step()
            sgd = seconds if method == "sgd" else sgd
            rate = batch * flops_per_example(network) / seconds
            times = f"{seconds / sgd:.2f}" if batch == 128 else "-"
            rows.append([network, method, batch, f"{batch / seconds:,.0f}", f"{rate / 1e9:.0f}",
                         f"{rate / limit:.0%}", times])  # fmt: skip
    header = ["network", "method", "batch", "examples/s", "GFLOP/s", "of the limit", "time of sgd"]
    return "Training steps", header, rows


def against_torch(limit: float):
    """(b) The same beside a plain PyTorch loop on the same cores."""
    del limit
    rows = []
    for network, (shape, hidden, outputs) in NETWORKS.items():
        for method in ("sgd", "ewc", "bd_ewc"):
            theirs = torch_seconds(shape, hidden, outputs, method, 128, 90, 3)
            if theirs is None:
                rows.append([network, method, "-", "-", "PyTorch is not installed"])
                continue
            ours = Timed(network, method).seconds_per_step(repeats=3)
            rows.append([network, method, f"{128 / ours:,.0f}", f"{128 / theirs:,.0f}",
                         f"{theirs / ours:.2f}"])  # fmt: skip
    header = ["network", "method", "ours, examples/s", "PyTorch, examples/s", "ratio"]
    return "Beside a PyTorch loop", header, rows


def passes(limit: float):
    """(c) Importance over n examples against one forward and backward pass over them."""
    del limit
    network, batch, batches = "784-5x300-10", 512, 20
    timed = Timed(network, "ewc")
    model, params = timed.problem.model, timed.init(timed.key).core
    x = jax.random.normal(timed.key, (batch * batches, *timed.data.train.images.shape[1:]))
    y = jax.random.randint(timed.key, (batch * batches,), 0, 10)

    def loop(sum_of_batch):
        def program(params, x, y):
            def add(i, sums):
                xs = jax.lax.dynamic_slice_in_dim(x, i * batch, batch)
                ys = jax.lax.dynamic_slice_in_dim(y, i * batch, batch)
                return jax.tree.map(jnp.add, sums, sum_of_batch(params, xs, ys))

            return jax.lax.fori_loop(0, batches, add, jax.tree.map(jnp.zeros_like, params))

        return jax.jit(program)

    def gradient(params, x, y):
        def loss(params):
            log_p = jax.nn.log_softmax(model.apply({"params": params}, x))
            return -jnp.take_along_axis(log_p, y[:, None], 1).sum()

        return jax.grad(loss)(params)

    candidates = {
        "forward and backward": gradient,
        "Fisher, empirical": lambda p, x, y: importance.fisher_sum(model, p, {}, x, y),
        "Fisher, true": lambda p, x, y: importance.fisher_sum(model, p, {}, x, y, kind="true"),
        "MAS": lambda p, x, y: importance.sensitivity_sum(model, p, {}, x),
    }
    rows, first = [], None
    for name, function in candidates.items():
        program = loop(function)
        seconds = _best(lambda program=program: program(params, x, y))
        first = first or seconds
        rows.append([name, f"{batch * batches / seconds:,.0f}", f"{seconds / first:.2f}"])
    return "Importance passes", ["pass", "examples/s", "of forward and backward"], rows


def tasks(limit: float):
    """(d) Seconds of a task, its end included, in a sequence of 200."""
    del limit
    rows = []
    for method in ("bd_ewc", "bd_psp", "si", "mas"):
        timed = Timed("784-4x128-10", method, num_tasks=200)
        state = timed.init(timed.key)
        seconds = []
        for task in range(200):
            started = time.perf_counter()
            count = programs.steps_per_epoch(timed.problem, timed.sequence, task)
            state = timed.begin_task(timed.key, state, jnp.int32(task))
            state, _ = timed.run_steps(timed.key, state, timed.data, jnp.int32(task), 0, 0, count)
            state = timed.end_task(timed.key, state, timed.data, jnp.int32(task))
            jax.block_until_ready(state)
            seconds.append(time.perf_counter() - started)
        early, late = np.median(seconds[1:51]), np.median(seconds[150:])
        rows.append([method, f"{early * 1e3:.1f}", f"{late * 1e3:.1f}", f"{late / early:.2f}"])
    return "Cost of a task", ["method", "tasks 2-51, ms", "tasks 151-200, ms", "ratio"], rows


def seeds(limit: float):
    """(d) Training steps of many seeds in one program."""
    del limit
    rows = []
    for network in ("784-5x300-10", "784-4x128-10"):
        one = None
        for number in (1, 2, 4, 8, 16, 32):
            timed = Timed(network, "bd_ewc")
            keys = jax.vmap(jax.random.key)(jnp.arange(number))
            start = jax.vmap(partial(programs.init_state, timed.problem))(keys)
            many = jax.jit(
                jax.vmap(
                    partial(programs.run_steps, timed.problem),
                    (0, 0, None, None, None, None, None),
                )
            )
            seconds = _best(lambda: many(keys, start, timed.data, 0, 0, 0, 20)[1]) / 20  # noqa: B023
            one = one or seconds
            rows.append([network, number, f"{seconds * 1e3:.2f}", f"{seconds / one:.2f}",
                         f"{seconds / one / number:.2f}"])  # fmt: skip
    header = ["network", "seeds", "ms a step", "of one seed", "of so many runs"]
    return "Seeds in one program (bd_ewc)", header, rows


def sizes(limit: float):
    """(e) What training keeps, by the number of tasks."""
    del limit
    rows = []
    for method in ("sgd", "ewc", "bd_ewc", "bd_psp", "si", "mas", "ewc_kfac"):
        found = []
        for number in (2, 200):
            timed = Timed("784-4x128-10", method, num_tasks=number)
            state = jax.eval_shape(partial(programs.init_state, timed.problem), timed.key)
            found.append(memory.report(timed.problem, state, 784)["training_bytes"])
        rows.append([method, *(f"{b / 1e6:.2f}" for b in found)])
    return "Training state, MB", ["method", "2 tasks", "200 tasks"], rows


def _best(run, repeats: int = 5) -> float:
    best = float("inf")
    for _ in range(repeats + 1):  # the first one compiles
        started = time.perf_counter()
        jax.block_until_ready(run())
        best = min(best, time.perf_counter() - started)
    return best


PARTS = {
    "steps": steps, "torch": against_torch, "passes": passes, "tasks": tasks, "seeds": seeds,
    "sizes": sizes,
}  # fmt: skip
