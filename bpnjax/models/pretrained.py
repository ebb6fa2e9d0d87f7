"""Starts a network from the weights of one that was trained by this package."""

import os
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open

OUTPUT = "output"  # the layer that every network starts anew

__all__ = ["is_ours", "read", "start_from"]


def is_ours(path: str | os.PathLike[str]) -> bool:
    """Was the file written by this package? Torchvision's are read by `torch_weights`."""
    try:
        with safe_open(path, "np") as file:
            return (file.metadata() or {}).get("format", "").startswith("bpnjax")
    except (SafetensorError, OSError):
        return False


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads the shared parameters of a ``model.safetensors``.

    Args:
      path: the file.

    Returns:
      ``{"conv_0/kernel": array, ...}``, f32.

    Raises:
      ValueError: the file is no model of this package.
    """
    if not is_ours(path):
        raise ValueError(
            f"{os.fspath(path)}: no model of this package; train one with python -m "
            "bpnjax.pretrain and name its model.safetensors"
        )
    with safe_open(path, "np") as file:
        # Layers that a run computed once (train.features_once) are kept beside those it trained.
        names = [n for n in file.keys() if n.startswith(("params/", "extractor/"))]  # noqa: SIM118
        if not names:
            raise ValueError(
                f"{os.fspath(path)}: a model of another version of this package "
                f"({file.metadata()['format']}); train it again with python -m bpnjax.pretrain"
            )
        return {name.partition("/")[2]: file.get_tensor(name) for name in names}


def start_from(params: Any, arrays: dict[str, np.ndarray]) -> Any:
    r"""Takes the pretrained parameters of all layers but the output.

    .. math:: \theta_l = \theta^{pretrained}_l \quad (l \neq \mathrm{output})

    Args:
      params: a network's fresh parameters.
      arrays: what `read` gives; layers that the network has not are left out.

    Returns:
      Parameters of the same structure, shapes and dtypes.

    Raises:
      ValueError: no layer is in common, or one differs in shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.models.pretrained import start_from
      >>> fresh = {"fc6": {"bias": jnp.zeros(2)}, "output": {"bias": jnp.zeros(3)}}
      >>> start_from(fresh, {"fc6/bias": jnp.ones(2)})["fc6"]["bias"].tolist()
      [1.0, 1.0]
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    shared = [n for n in flat if n in arrays and n.split("/")[0] != OUTPUT]
    if not shared:
        raise ValueError(
            f"the pretrained network has no layer of this one ({', '.join(flat)}); it has "
            f"{', '.join(arrays)}"
        )
    for name in shared:
        if arrays[name].shape != flat[name].shape:
            raise ValueError(
                f"{name} is {tuple(flat[name].shape)} here and {arrays[name].shape} in the "
                "pretrained network; give both the same widths and images of the same size"
            )
    flat |= {name: jnp.asarray(arrays[name], flat[name].dtype) for name in shared}
    return traverse_util.unflatten_dict(flat, sep="/")
