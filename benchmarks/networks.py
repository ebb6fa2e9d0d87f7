"""Training steps of convolutional networks and a transformer, beside PyTorch's step of sgd."""

from problems import NETWORKS, Timed, best_of
from torch_networks import make_bursts

NETWORKS["cifar"] = ((32, 32, 3), (300,), 10)
_RESNET = {"model__name": "resnet18", "model__options": "width=20"}
CASES = (
    ("ConvNet 32, 64, 300", "convnet", 128,
     {"model__name": "convnet", "model__channels": (32, 64)}),
    ("ResNet-18, width 20", "resnet18", 128, _RESNET),
    ("ResNet-18, width 20", "resnet18", 10, _RESNET),
    ("ViT, 3 blocks of 128", "vit", 128,
     {"model__name": "vit", "model__options": "depth=3,dim=128,heads=4,mlp=2"}),
)  # fmt: skip
METHODS = ("sgd", "bd_ewc", "bd_psp")


def networks():
    """Examples per second of each method; ratios to PyTorch's sgd and to our sgd."""
    rows = []
    for title, name, batch, fields in CASES:
        steps = 4 if batch > 10 else 30
        bursts = {
            method: Timed("cifar", method, steps=steps, train__batch_size=batch, **fields).burst
            for method in METHODS
        }
        theirs = make_bursts(name, batch, steps)
        best = best_of(bursts | theirs, rounds=4)
        torch = min((best[label] for label in theirs), default=None)
        for label, seconds in best.items():
            ratio = f"{torch / seconds:.2f}" if torch else "-"
            cost = f"{seconds / best['sgd']:.2f}" if label in bursts else "-"
            rows.append([title, batch, label, f"{batch / seconds:,.0f}", ratio, cost])
        if not theirs:
            rows.append([title, batch, "PyTorch", "-", "is not installed", "-"])
    header = ["network", "batch", "method", "examples/s", "of the best PyTorch sgd", "time of sgd"]
    return "Convolutional networks and a transformer, 32 x 32 images", header, rows
