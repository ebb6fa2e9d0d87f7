"""The machine's limit, measured in the same run as what is compared with it."""

import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

SIZE = 2048
FLOPS = 2.0 * SIZE**3


def make_matrix_product() -> Callable[[], float]:
    """A function that multiplies two square float32 matrices and returns the seconds of it."""
    a = jax.random.normal(jax.random.key(0), (SIZE, SIZE))
    multiply = jax.jit(jnp.matmul)
    jax.block_until_ready(multiply(a, a))

    def burst() -> float:
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            jax.block_until_ready(multiply(a, a))
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    return burst


def describe() -> dict:
    """Device, cores and versions."""
    return {
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "devices": jax.device_count(),
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
    }


def _processor() -> str:
    """Its model, where the system tells."""
    try:
        with open("/proc/cpuinfo") as f:
            names = [line.split(":", 1)[1].strip() for line in f if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else "unknown"
