"""ConvNet, ResNet-18 and ViT as plain PyTorch modules, with the step of sgd."""

import os
import time


def make_bursts(name: str, batch: int, steps: int, depth: int = 3, width: int = 20) -> dict:
    """Adam steps on random images of 32 x 32 x 3, everything included, in both memory orders.

    Args:
      name: "convnet", "resnet18" or "vit".
      batch: examples in a step.
      steps: in one burst.
      depth: blocks of the ViT, of width 128 with 4 heads.
      width: of the ResNet.

    Returns:
      Functions that run the steps and return the seconds of one, by name; {} where PyTorch is not
      installed.
    """
    try:
        import torch
    except ImportError:
        return {}
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    make = {"convnet": _convnet, "resnet18": _resnet18, "vit": _vit}[name]
    size = {"convnet": (), "resnet18": (width,), "vit": (depth,)}[name]
    images = torch.randint(0, 256, (1280, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 10, (len(images),))

    def burst_of(order):
        network = make(torch, *size).to(memory_format=order)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)

        def burst() -> float:
            started = time.perf_counter()
            for _ in range(steps):
                rows = torch.randint(0, len(labels), (batch,))
                x = (images[rows].float() / 64 - 2.0).contiguous(memory_format=order)
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(network(x), labels[rows]).backward()
                optimizer.step()
            return (time.perf_counter() - started) / steps

        burst()
        return burst

    orders = {"PyTorch": torch.contiguous_format}
    if name != "vit":
        orders["PyTorch, channels last"] = torch.channels_last
    return {label: burst_of(order) for label, order in orders.items()}


def _convnet(torch):
    nn = torch.nn
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(4096, 300), nn.ReLU(), nn.Linear(300, 10),
    )  # fmt: skip


def _resnet18(torch, width: int):
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self, inputs, outputs, stride):
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs),
                nn.ReLU(), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
                nn.BatchNorm2d(outputs),
            )  # fmt: skip
            self.shortcut = nn.Identity()
            if stride > 1 or inputs != outputs:
                self.shortcut = nn.Sequential(
                    nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
                )

        def forward(self, x):
            return torch.relu(self.body(x) + self.shortcut(x))

    blocks, inputs = [], width
    for stage in range(4):
        for i in range(2):
            blocks.append(Block(inputs, width << stage, 2 if stage and not i else 1))
            inputs = width << stage
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), *blocks,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10),
    )  # fmt: skip


def _vit(torch, depth: int, dim: int = 128, heads: int = 4, hidden: int = 256):
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm_0, self.norm_1 = nn.LayerNorm(dim), nn.LayerNorm(dim)
            self.mix, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
            self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

        def forward(self, x):
            n, patches, _ = x.shape
            mixed = self.mix(self.norm_0(x)).view(n, patches, 3, heads, dim // heads)
            attended = nn.functional.scaled_dot_product_attention(*mixed.permute(2, 0, 3, 1, 4))
            x = x + self.out(attended.transpose(1, 2).reshape(n, patches, dim))
            return x + self.mlp(self.norm_1(x))

    class ViT(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Conv2d(3, dim, 4, 4)
            self.positions = nn.Parameter(0.02 * torch.randn(1, 64, dim))
            self.blocks = nn.Sequential(*(Block() for _ in range(depth)))
            self.norm, self.output = nn.LayerNorm(dim), nn.Linear(dim, 10)

        def forward(self, x):
            x = self.embed(x).flatten(2).transpose(1, 2) + self.positions
            return self.output(self.norm(self.blocks(x)).mean(1))

    return ViT()
