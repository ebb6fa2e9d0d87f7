"""The machine's limit, measured in the same run as what is compared with it."""

import os
import time

import jax
import jax.numpy as jnp


def matrix_multiply_rate(size: int = 2048, repeats: int = 8) -> float:
    """FLOP/s of a float32 matrix product of the default device, the best of some repetitions."""
    a = jax.random.normal(jax.random.key(0), (size, size))
    multiply = jax.jit(jnp.matmul)
    jax.block_until_ready(multiply(a, a))
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(multiply(a, a))
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


def describe() -> dict:
    """Device, cores and versions."""
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
    }
