"""The tables: each function measures one thing and gives a title, a header and rows."""

import time
from functools import partial

import avalanche_loop
import jax
import jax.numpy as jnp
import numpy as np
import torch_loop
from accelerator import accelerator
from backbone import backbone
from machine import FLOPS, make_matrix_product
from mixed import mixed
from networks import networks
from pipeline import pipeline
from problems import NETWORKS, Timed, best_of, flops_per_example
from startup import startup

from bpnjax import importance
from bpnjax.run import byte_counts
from bpnjax.training import epochs

METHODS = ("sgd", "ewc", "bd_ewc", "bd_psp", "psp", "si", "gem")
MEASURED = tuple(NETWORKS)[:3]


def steps():
    """(a) Training steps, everything included, as a share of the matrix-multiply rate."""
    rows = []
    for network in MEASURED:
        timed = {method: Timed(network, method) for method in METHODS}
        bursts = {method: one.burst for method, one in timed.items()}
        best = best_of({"product": make_matrix_product(), **bursts}, rounds=16)
        limit = FLOPS / best["product"]
        for method, one in timed.items():
            batch, seconds = one.config.train.batch_size, best[method]
            rate = batch * flops_per_example(network) / seconds
            times = f"{seconds / best['sgd']:.2f}" if batch == 128 else "-"
            rows.append([network, method, batch, f"{batch / seconds:,.0f}", f"{rate / 1e9:.0f}",
                         f"{limit / 1e9:.0f}", f"{rate / limit:.0%}", times])  # fmt: skip
    header = ["network", "method", "batch", "examples/s", "GFLOP/s", "matrix product, GFLOP/s",
              "share of it", "time of sgd"]  # fmt: skip
    return "Training steps", header, rows


def against_torch():
    """(b) The same beside a plain PyTorch loop on the same cores."""
    return _beside("a PyTorch loop", "PyTorch", torch_loop.make_burst, ("sgd", "ewc", "bd_ewc"))


def against_avalanche():
    """(b) The same beside Avalanche's strategies."""
    return _beside("Avalanche", "Avalanche", avalanche_loop.make_burst, ("sgd", "ewc", "si"))


def _beside(title, name, make_burst, methods):
    rows = []
    for network in MEASURED[:2]:
        for method in methods:
            theirs = make_burst(*NETWORKS[network], method, 128, 90)
            if theirs is None:
                rows.append([network, method, "-", "-", f"{name} is not installed"])
                continue
            best = best_of({"ours": Timed(network, method).burst, "theirs": theirs})
            rows.append([network, method, f"{128 / best['ours']:,.0f}",
                         f"{128 / best['theirs']:,.0f}",
                         f"{best['theirs'] / best['ours']:.2f}"])  # fmt: skip
    header = ["network", "method", "ours, examples/s", f"{name}, examples/s", "ratio"]
    return f"Beside {title}", header, rows


def passes():
    """(c) Importance over n examples against one forward and backward pass over them."""
    batch, batches = 512, 20
    timed = Timed("784-5x300-10", "ewc")
    network, params = timed.experiment.learner.network, timed.state.learner.params
    key = jax.random.key(0)
    x = jax.random.normal(key, (batch * batches, *timed.data.train.images.shape[1:]))
    y = jax.random.randint(key, (batch * batches,), 0, 10)

    def gradient(params, x, y):
        def loss(params):
            log_p = jax.nn.log_softmax(network.apply(params, {}, x)[0])
            return -jnp.take_along_axis(log_p, y[:, None], 1).sum()

        return jax.grad(loss)(params)

    def burst(sum_of_batch):
        def program(params, x, y):
            def add(i, sums):
                xs = jax.lax.dynamic_slice_in_dim(x, i * batch, batch)
                ys = jax.lax.dynamic_slice_in_dim(y, i * batch, batch)
                return jax.tree.map(jnp.add, sums, sum_of_batch(params, xs, ys))

            return jax.lax.fori_loop(0, batches, add, jax.tree.map(jnp.zeros_like, params))

        compiled = jax.jit(program).lower(params, x, y).compile()
        extra = compiled.memory_analysis().temp_size_in_bytes
        return lambda: _seconds(lambda: compiled(params, x, y)), extra

    found = {
        "forward and backward": burst(gradient),
        "Fisher, empirical": burst(partial(_fisher, network, "empirical")),
        "Fisher, true": burst(partial(_fisher, network, "true")),
        "MAS": burst(lambda p, x, y: importance.sensitivity_sum(network, p, {}, x)),
    }
    best = best_of({name: run for name, (run, _) in found.items()})
    first = best["forward and backward"]
    rows = [
        [name, f"{batch * batches / seconds:,.0f}", f"{seconds / first:.2f}",
         f"{found[name][1] / 1e6:.1f}"]
        for name, seconds in best.items()
    ]  # fmt: skip
    each = 4 * sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6
    title = f"Importance passes (784-5x300-10, batches of {batch}; one gradient is {each:.1f} MB)"
    return title, ["pass", "examples/s", "of forward and backward", "memory beside, MB"], rows


def _fisher(network, kind, params, x, y):
    return importance.fisher_sum(network, params, {}, x, y, kind=kind)


def tasks():
    """(d) Seconds of a task, its end included: late ones of a sequence beside another's first."""
    rows = []
    for method in ("bd_ewc", "bd_psp", "si", "mas"):
        ahead, behind = (Timed("784-4x128-10", method, num_tasks=200) for _ in range(2))
        count = epochs.steps_per_epoch(ahead.experiment, ahead.sequence, 0)

        def seconds(timed, task, count=count):
            started = time.perf_counter()
            timed.begin(task)
            for _ in range(20):
                timed.run(task, count)
            timed.end(task)
            return time.perf_counter() - started

        for task in range(150):
            seconds(ahead, task)
        seconds(behind, 0)
        # In turn, since a machine's pace changes.
        both = [(seconds(behind, task), seconds(ahead, 149 + task)) for task in range(1, 51)]
        early, late = np.median(both, axis=0)
        rows.append([method, f"{early * 1e3:.1f}", f"{late * 1e3:.1f}", f"{late / early:.2f}"])
    header = ["method", "tasks 2 to 51, ms", "tasks 151 to 200, ms", "ratio"]
    return "Cost of a task (300 examples, 20 epochs)", header, rows


def seeds():
    """(d) Training steps of many seeds in one program: at once (vmap) or in turn (map)."""
    rows = []
    for network in MEASURED[:2]:
        one = None
        for number in (1, 2, 4, 8, 10, 16, 32):
            bursts = {}
            for how in ("vmap", "map"):
                fields = {"num_seeds": number, "parallel__seeds": how, "parallel__axis": "seeds"}
                bursts[how] = Timed(network, "bd_ewc", steps=20, devices="1", **fields).burst
            best = best_of(bursts, rounds=4)
            one = one or best["map"]
            rows.append([network, number, f"{best['vmap'] * 1e3:.2f}", f"{best['map'] * 1e3:.2f}",
                         f"{best['vmap'] / one:.2f}", f"{best['map'] / one:.2f}"])  # fmt: skip
    header = ["network", "seeds", "at once, ms a step", "in turn, ms a step",
              "at once, of one seed", "in turn, of one seed"]  # fmt: skip
    return "Seeds in one program (bd_ewc)", header, rows


def classes():
    """(d) Training steps with 10, 100 and 1000 outputs."""
    networks = ("784-4x128-10", "784-4x128-100", "784-4x128-1000")
    rows = []
    for method in ("sgd", "bd_ewc", "bd_psp"):
        best = best_of({network: Timed(network, method).burst for network in networks})
        first = best[networks[0]] / flops_per_example(networks[0])
        rows += [
            [method, NETWORKS[network][2], f"{128 / seconds:,.0f}",
             f"{seconds / flops_per_example(network) / first:.2f}"]
            for network, seconds in best.items()
        ]  # fmt: skip
    header = ["method", "outputs", "examples/s", "time a FLOP, of 10 outputs"]
    return "Outputs (784-4x128)", header, rows


def sizes():
    """(e) What training keeps by the number of tasks, and what its programs need beside."""
    rows = []
    for method in ("sgd", "ewc", "bd_ewc", "bd_psp", "si", "mas", "ewc_kfac"):
        found = []
        for number in (2, 200):
            timed = Timed("784-4x128-10", method, num_tasks=number, steps=1)
            found.append(byte_counts.report(timed.experiment)["training_bytes"])
        n = jnp.int32(0)
        arguments = (timed.state, timed.data, n)
        step = jax.jit(partial(epochs.run_steps, timed.experiment), donate_argnums=0)
        end = jax.jit(partial(epochs.end_task, timed.experiment), donate_argnums=0)
        for lowered in (step.lower(*arguments, n, n, n), end.lower(*arguments)):
            found.append(lowered.compile().memory_analysis().temp_size_in_bytes)
        rows.append([method, *(f"{b / 1e6:.2f}" for b in found)])
    header = [
        "method",
        "kept, 2 tasks",
        "kept, 200 tasks",
        "beside, a step",
        "beside, a task's end",
    ]
    return "Memory of training, MB (784-4x128-10)", header, rows


def _seconds(run) -> float:
    started = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - started


PARTS = {
    "steps": steps, "torch": against_torch, "avalanche": against_avalanche, "passes": passes,
    "tasks": tasks, "seeds": seeds, "classes": classes, "sizes": sizes, "startup": startup,
    "pipeline": pipeline, "mixed": mixed, "backbone": backbone, "networks": networks,
    "accelerator": accelerator,
}  # fmt: skip
