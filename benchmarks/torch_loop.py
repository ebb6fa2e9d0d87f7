"""The same networks and methods as a plain PyTorch loop, as a user would write it."""

import itertools
import time

import numpy as np


def make_burst(shape, hidden, outputs, method: str, batch: int, steps: int):
    """Adam steps on random data kept in memory, everything included.

    Args:
      shape: of an image.
      hidden: widths.
      outputs: of the network.
      method: sgd, ewc or bd_ewc (H 100, epsilon 0.02).
      batch: examples in a step.
      steps: in one burst.

    Returns:
      A function that runs them and gives the seconds of one; None where PyTorch is not installed.
    """
    try:
        import torch
    except ImportError:
        return None
    import os

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    widths = (int(np.prod(shape)), *hidden, outputs)
    layers = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    core = [p for layer in layers for p in layer.parameters()]
    optimizer = torch.optim.Adam(core, lr=1e-4)
    anchor = [p.detach().clone() for p in core]
    fisher = [torch.rand_like(p) * 1e-3 for p in core]
    factors = []
    if method == "bd_ewc":
        for width in widths[1:]:
            m = torch.zeros(1, 100, requires_grad=True)
            w = ((torch.rand(100, width) * 2 - 1) * 0.1).requires_grad_()
            factors.append((m, w))
        factor_optimizer = torch.optim.Adam([w for _, w in factors], lr=1e-3)
    images = torch.randint(0, 256, (12800, widths[0]), dtype=torch.uint8)
    labels = torch.randint(0, outputs, (12800,))
    cross_entropy = torch.nn.CrossEntropyLoss()

    def step(rows):
        x = images[rows].float() / 64 - 2.0
        for i, layer in enumerate(layers):
            x = layer(x)
            if factors:
                m, w = factors[i]
                x = x + (m @ w)
            if i < len(layers) - 1:
                x = torch.relu(x)
        loss = cross_entropy(x, labels[rows])
        if method in ("ewc", "bd_ewc"):
            pull = sum(
                (f * (p - a).square()).sum() for f, p, a in zip(fisher, core, anchor, strict=True)
            )
            loss = loss + 1000.0 * pull
        optimizer.zero_grad()
        if factors:
            factor_optimizer.zero_grad()
            for m, _ in factors:
                m.grad = None
        loss.backward()
        optimizer.step()
        if factors:
            factor_optimizer.step()
            with torch.no_grad():
                for m, _ in factors:
                    m -= 0.02 * m.grad.sign()

    def burst() -> float:
        order = torch.randperm(len(labels))
        started = time.perf_counter()
        for i in range(steps):
            step(order[i * batch : (i + 1) * batch])
        return (time.perf_counter() - started) / steps

    burst()
    return burst
