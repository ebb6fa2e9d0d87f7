"""Plain Flax networks, which know nothing of tasks."""

from bpnjax.models.alexnet import AlexNet
from bpnjax.models.convnet import ConvNet
from bpnjax.models.efficientnet import EfficientNetLite0
from bpnjax.models.mlp import MLP
from bpnjax.models.registry import REGISTRY, build, find, register
from bpnjax.models.resnet import ResNet18
from bpnjax.models.small_alexnet import SmallAlexNet
from bpnjax.models.vit import ViT

__all__ = [
    "MLP",
    "REGISTRY",
    "AlexNet",
    "ConvNet",
    "EfficientNetLite0",
    "ResNet18",
    "SmallAlexNet",
    "ViT",
    "build",
    "find",
    "register",
]

_EACH = ("dtype", "kernel_init")
register("mlp", fields=("hidden", *_EACH))(MLP)
register("convnet", fields=("channels", "hidden", *_EACH))(ConvNet)
register("alexnet", fields=("channels", "hidden", "dropout", *_EACH))(AlexNet)
register("small_alexnet", fields=("channels", "hidden", "dropout", *_EACH))(SmallAlexNet)
register("resnet18", fields=_EACH)(ResNet18)
register("vit", fields=_EACH)(ViT)
register("efficientnet_lite0", fields=_EACH)(EfficientNetLite0)
