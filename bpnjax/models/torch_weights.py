"""Weights published for PyTorch, read without PyTorch and without running what a file contains.

A ``.pth`` file is a zip archive of one pickle, which names tensors, and of their bytes. A pickle
may name any function for its reader to call; the reader here knows the few names that rebuild
tensors and refuses every other.
"""

import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

__all__ = ["alexnet_initializers", "alexnet_params", "read_tensors"]

_DTYPES = {
    "BFloat16Storage": ml_dtypes.bfloat16, "HalfStorage": np.float16, "FloatStorage": np.float32,
    "DoubleStorage": np.float64, "BoolStorage": np.bool_, "ByteStorage": np.uint8,
    "CharStorage": np.int8, "ShortStorage": np.int16, "IntStorage": np.int32,
    "LongStorage": np.int64,
}  # fmt: skip
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"  # how a zip archive and a pickle begin
# Layer of `AlexNet` -> module of torchvision's.
_ALEXNET = {
    "conv_0": "features.0", "conv_1": "features.3", "conv_2": "features.6",
    "conv_3": "features.8", "conv_4": "features.10",
    "fc6": "classifier.1", "fc7": "classifier.4", "output": "classifier.6",
}  # fmt: skip
_CELLS = 36  # 6 x 6, before fc6


def read_tensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads the tensors of a ``state_dict`` that ``torch.save`` wrote, or of a safetensors file.

    Args:
      path: the file; its first bytes tell which of the two it is.

    Returns:
      ``{name: array}``, shapes and dtypes as stored.

    Raises:
      ValueError: no such file, one that is damaged or in another format, or a pickle that names
        anything but tensors and dictionaries of them; nothing of it has been executed then.

    Example:
      >>> import tempfile, numpy as np
      >>> from safetensors.numpy import save_file
      >>> from bpnjax.models.torch_weights import read_tensors
      >>> with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
      ...     save_file({"a": np.arange(3)}, file.name)
      ...     read_tensors(file.name)["a"].tolist()
      [0, 1, 2]

    Source: the zip format of ``torch.save``, written since PyTorch 1.6.
    """
    try:
        with open(path, "rb") as file:
            begin = file.read(len(_ZIP))
        if begin == _ZIP:
            return _read_zip(path)
        if begin.startswith(_PICKLE):
            raise _unreadable(path, "is of PyTorch before 1.6; torch.save it again with a new one")
        return load_file(path)
    except OSError as error:
        raise _unreadable(path, f"cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        raise _unreadable(path, f"is neither a .pth nor a safetensors file ({error})") from error


def _unreadable(path: str | os.PathLike[str], what: str) -> ValueError:
    return ValueError(f"{os.fspath(path)}: {what}")


def _read_zip(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise _unreadable(path, f"holds {len(pickles)} files data.pkl, not 1")
            folder = pickles[0].removesuffix("data.pkl")
            found = _Tensors(archive, folder).load()
    except pickle.UnpicklingError as error:
        raise _unreadable(path, f"refused: {error}") from error
    except ValueError:
        raise
    # A damaged pickle or archive raises anything.
    except Exception as error:
        raise _unreadable(path, f"damaged ({type(error).__name__}: {error})") from error
    if not isinstance(found, dict):
        raise _unreadable(path, f"holds a {type(found).__name__}, not a state_dict; save one")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, np.ndarray):
            raise _unreadable(path, f"entry {name!r} is no tensor; save a state_dict alone")
    return dict(found)


class _StorageKind:
    """Stands for a storage class of PyTorch in a pickle.

    A pickle may set attributes of whatever it names, so it is never given a dtype of NumPy, which
    the whole process shares.
    """

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class _Tensors(pickle.Unpickler):
    """Unpickles tensors and ordered dictionaries, as NumPy arrays, and nothing else."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(archive.open(f"{folder}data.pkl"))
        self.archive, self.folder = archive, folder
        names = archive.namelist()
        byteorder = f"{folder}byteorder"
        big = byteorder in names and archive.read(byteorder) == b"big"
        self.order: Literal[">", "<"] = ">" if big else "<"
        # Objects of this reading only: what a pickle might do to them ends with it.
        self.known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): lambda *a: _view(*a[:4]),
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
        }
        for name in _DTYPES:
            self.known["torch", name] = _StorageKind(name)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.known:
            raise pickle.UnpicklingError(f"its pickle names {module}.{name}, which is no tensor")
        return self.known[module, name]

    def persistent_load(self, pid: Any) -> Any:
        what, kind, key, _, count = pid
        if what != "storage" or not isinstance(kind, _StorageKind) or kind.name not in _DTYPES:
            raise pickle.UnpicklingError(f"its pickle refers to {what!r}, which is no tensor")
        dtype = np.dtype(_DTYPES[kind.name])
        entry = self.archive.getinfo(f"{self.folder}data/{key}")
        if entry.file_size != count * dtype.itemsize:
            raise pickle.UnpicklingError(
                f"{entry.filename} has {entry.file_size} bytes for {count} x {dtype}"
            )
        if dtype.itemsize > 1:
            dtype = dtype.newbyteorder(self.order)
        return np.frombuffer(self.archive.read(entry), dtype)


def _view(
    storage: np.ndarray, offset: int, size: Sequence[int], stride: Sequence[int]
) -> np.ndarray:
    """A tensor: a strided view of a storage, checked not to leave it."""
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


def alexnet_params(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The parameters of `AlexNet` from those of torchvision's.

    PyTorch has channels before rows and columns: kernels are transposed, and so are the rows of
    fc6, which stand for the elements of the last feature map.

    Args:
      tensors: ``{name: array}`` with torchvision's names, any widths, as `read_tensors` gives.

    Returns:
      ``{"conv_0": {"kernel": [h, w, in, out], "bias": [out]}, ...}``, NumPy arrays, f32.

    Raises:
      ValueError: a tensor is missing or has another number of axes.

    Source: ``torchvision.models.alexnet``.
    """
    return {
        layer: {
            "kernel": _kernel(layer, _take(tensors, f"{module}.weight", 2 + 2 * ("conv" in layer))),
            "bias": _take(tensors, f"{module}.bias", 1),
        }
        for layer, module in _ALEXNET.items()
    }


def _take(tensors: Mapping[str, np.ndarray], name: str, axes: int) -> np.ndarray:
    if name not in tensors:
        raise ValueError(f"no tensor {name}; this is no AlexNet of torchvision")
    if tensors[name].ndim != axes:
        raise ValueError(f"{name} has shape {tensors[name].shape}, not {axes} axes")
    return np.asarray(tensors[name], np.float32)


def _kernel(layer: str, weight: np.ndarray) -> np.ndarray:
    if weight.ndim == 4:
        return np.ascontiguousarray(weight.transpose(2, 3, 1, 0))
    if layer == "fc6":
        outputs, inputs = weight.shape
        if inputs % _CELLS:
            raise ValueError(f"fc6 has {inputs} inputs, not a multiple of {_CELLS} cells")
        cells_last = weight.reshape(outputs, inputs // _CELLS, _CELLS)
        return np.ascontiguousarray(cells_last.transpose(2, 1, 0)).reshape(inputs, outputs)
    return np.ascontiguousarray(weight.T)


def alexnet_initializers(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Initializers that give the layers of `AlexNet`, the output excepted, the weights of a file.

    Args:
      path: as in `read_tensors`.

    Returns:
      ``{layer: {"kernel_init": f, "bias_init": f}}``, for the fields of Linen's layers. Their
      arrays are handed over when the initialization runs: a constant of 230 MB would be compiled
      into the program.

    Raises:
      ValueError: as `read_tensors` and `alexnet_params`; an initializer raises it where the file
        has another shape than the layer.
    """
    try:
        params = alexnet_params(read_tensors(path))
    except ValueError as error:
        prefix = "" if str(error).startswith(os.fspath(path)) else f"{os.fspath(path)}: "
        raise ValueError(f"{prefix}{error}") from error

    def given(
        name: str, array: np.ndarray, key: jax.Array, shape: Sequence[int], dtype: Any = np.float32
    ) -> Any:
        del key
        if array.shape != tuple(shape):
            raise ValueError(f"{os.fspath(path)}: {name} is {array.shape}, the network's {shape}")
        out = jax.ShapeDtypeStruct(shape, dtype)
        return jax.pure_callback(lambda: array.astype(out.dtype), out)

    return {
        layer: {
            f"{part}_init": partial(given, f"{layer}/{part}", array)
            for part, array in arrays.items()
        }
        for layer, arrays in params.items()
        if layer != "output"
    }
