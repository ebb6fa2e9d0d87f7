"""On a GPU or TPU: many seeds at once, beside what memory and kernel launches alone would take."""

import re
import time
from functools import partial

import jax
import jax.numpy as jnp
from problems import Timed, best_of

from bpnjax.training import epochs


def accelerator():
    """Steps of 1, 10 and 32 seeds (vmap) against the floors of memory and of launches."""
    bandwidth, launch = _bandwidth(), _launch()
    rows = []
    for network in ("784-5x300-10", "784-4x128-10"):
        one = None
        for number in (1, 10, 32):
            fields = {"num_seeds": number, "parallel__seeds": "vmap", "devices": "1"}
            timed = Timed(network, "bd_ewc", steps=200, **fields)
            seconds = best_of({"ours": timed.burst}, rounds=4)["ours"]
            one = one or seconds
            # Adam reads parameter, gradient and two moments and writes three and the gradient;
            # EWC reads anchor and importance.
            learner = timed.state.learner
            shared = sum(leaf.nbytes for leaf in jax.tree.leaves(learner.params))
            factors = sum(leaf.nbytes for leaf in jax.tree.leaves(learner.task_params))
            memory = (10 * shared + 8 * factors) / bandwidth
            launches = _kernels(timed) * launch
            rows.append([network, number, f"{seconds * 1e6:.0f}", f"{seconds / one:.2f}",
                         f"{memory * 1e6:.0f}", f"{launches * 1e6:.0f}"])  # fmt: skip
    header = ["network", "seeds", "microseconds a step", "of one seed", "floor of memory",
              "floor of launches"]  # fmt: skip
    return f"Seeds on {jax.devices()[0].device_kind} (bd_ewc)", header, rows


def _bandwidth() -> float:
    """Bytes a second, read and written."""
    x = jnp.zeros(64 * 2**20, jnp.float32)
    add = jax.jit(lambda x: x + 1.0)
    return 2 * x.nbytes / best_of({"add": lambda: _seconds(add, x)})["add"]


def _launch(count: int = 1000) -> float:
    """Seconds of a kernel that does next to nothing, one after another in a loop."""
    x = jnp.eye(8)
    loop = jax.jit(lambda x: jax.lax.fori_loop(0, count, lambda _, y: jnp.sort(y), x))
    return best_of({"loop": lambda: _seconds(loop, x)})["loop"] / count


def _seconds(function, x) -> float:
    started = time.perf_counter()
    jax.block_until_ready(function(x))
    return time.perf_counter() - started


def _kernels(timed) -> int:
    """Kernels of one step: fusions and library calls in the loop's body, as compiled."""
    n = jnp.int32(0)
    step = jax.vmap(partial(epochs.run_steps, timed.experiment), (0, *[None] * 5))
    state = timed.state
    if timed.config.num_seeds == 1:
        state = jax.tree.map(lambda leaf: leaf[None], state)
    run = jax.jit(step).lower(state, timed.data, n, n, n, n)
    bodies = re.split(r"\n(?=%|ENTRY)", run.compile().as_text())
    counts = [len(re.findall(r" (?:fusion|custom-call|dot|sort)\(", body)) for body in bodies]
    return max(counts)
