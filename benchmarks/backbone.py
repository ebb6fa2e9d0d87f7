"""The frozen backbone: EfficientNet-Lite0 forward at 96 pixels, beside PyTorch on the same file."""

import os
import time
from unittest import mock

import jax
import numpy as np
from flax import traverse_util
from problems import best_of

from bpnjax import models
from bpnjax.models import efficientnet, pretrained, torch_weights
from bpnjax.utils.errors import UserError

BATCH, PIXELS = 32, 96
MODEL = {"name": "efficientnet_lite0", "factory": "", "pretrained": "package", "mapping": ""}


def backbone():
    """Images per second of the forward pass to the 1,000 logits of ImageNet."""
    header = ["network", "images/s", "of the best PyTorch"]
    title = f"EfficientNet-Lite0, forward, {BATCH} images of {PIXELS} x {PIXELS}"
    try:
        file = pretrained.file_of(MODEL)
    except UserError as error:
        return title, header, [["-", "-", str(error)]]
    x = np.random.default_rng(0).uniform(-1, 1, (BATCH, PIXELS, PIXELS, 3)).astype(np.float32)
    bursts = {"ours": ours(x, folded=False), "ours, norms folded": ours(x, folded=True)}
    if jax.default_backend() == "cpu":
        with mock.patch.object(efficientnet, "conv", jax.lax.conv_general_dilated):
            bursts["ours, with JAX's own convolution"] = ours(x, folded=True)
    theirs = in_torch(file, x)
    best = best_of(bursts | theirs, rounds=6)
    first = min((best[name] for name in theirs), default=None)
    rows = [
        [name, f"{BATCH / seconds:,.0f}", f"{first / seconds:.2f}" if first else "-"]
        for name, seconds in best.items()
    ]
    return title, header, rows if theirs else [*rows, ["PyTorch", "-", "is not installed"]]


def ours(x, folded: bool):
    """A function that computes the logits once and gives the seconds."""
    arrays = pretrained.load(MODEL | {"options": f"folded={folded}"})
    named = {n if n.startswith("batch_stats/") else f"params/{n}": a for n, a in arrays.items()}
    variables, x = jax.device_put((traverse_util.unflatten_dict(named, sep="/"), x))
    run = jax.jit(models.EfficientNetLite0(1000, folded=folded).apply).lower(variables, x).compile()
    return _timed(lambda: jax.block_until_ready(run(variables, x)))


def _timed(run):
    run()

    def burst() -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    return burst


def in_torch(file: str, x) -> dict:
    """The same in PyTorch, in both orders of its memory; {} where it is not installed."""
    try:
        import torch
    except ImportError:
        return {}
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    functional = torch.nn.functional
    tensors = {n: torch.from_numpy(a.copy()) for n, a in torch_weights.read_tensors(file).items()}

    def layer(x, conv, norm, stride=1, depthwise=False):
        weight, pads = tensors[f"{conv}.weight"], []
        for n in (x.shape[3], x.shape[2]):
            more = max((-(-n // stride) - 1) * stride + weight.shape[-1] - n, 0)
            pads += [more // 2, more - more // 2]
        x = functional.pad(x, pads) if any(pads) else x
        x = functional.conv2d(x, weight, stride=stride, groups=len(weight) if depthwise else 1)
        parts = (tensors[f"{norm}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        return functional.batch_norm(x, *parts, eps=1e-3)

    def forward(x):
        relu6 = functional.relu6
        x = relu6(layer(x, "_conv_stem", "_bn0", 2))
        for i, (_, stride, expansion, _) in enumerate(efficientnet.BLOCKS):
            y, at = x, f"_blocks.{i}."
            if expansion > 1:
                y = relu6(layer(y, f"{at}_expand_conv", f"{at}_bn0"))
            y = relu6(layer(y, f"{at}_depthwise_conv", f"{at}_bn1", stride, depthwise=True))
            y = layer(y, f"{at}_project_conv", f"{at}_bn2")
            x = x + y if x.shape == y.shape else y
        x = relu6(layer(x, "_conv_head", "_bn1")).mean((2, 3))
        return functional.linear(x, tensors["_fc.weight"], tensors["_fc.bias"])

    found = {}
    for name, order in (("", torch.contiguous_format), (", channels last", torch.channels_last)):
        images = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(memory_format=order)

        def run(images=images):
            with torch.inference_mode():
                forward(images)

        found[f"PyTorch{name}"] = _timed(run)
    return found
