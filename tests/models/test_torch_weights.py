"""Files of PyTorch, in both formats, read without running what they hold."""

import collections
import io
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util

from bpnjax import models
from bpnjax.models import torch_weights


def save_pth(path, pickled: bytes, storages=(), compression=zipfile.ZIP_STORED, **more):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, data in storages:
            archive.writestr(f"archive/data/{key}", data)
        for name, data in more.items():
            archive.writestr(f"archive/{name}", data)
    return path


class Storage:
    """Stands for bytes in an archive; written by `Pickler` as PyTorch does."""

    def __init__(self, key, kind, count):
        self.pid = ("storage", Global("torch", kind), key, "cpu", count)


class Global:
    def __init__(self, module, name):
        self.module, self.name = module, name


class Tensor:
    def __init__(self, storage, offset, size, stride):
        self.arguments = (storage, offset, size, stride, False, collections.OrderedDict())


class Pickler(pickle._Pickler):  # the one in Python: it can write names that do not exist here
    def persistent_id(self, obj):
        return obj.pid if isinstance(obj, Storage) else None

    def save(self, obj, *args, **options):
        if isinstance(obj, Global):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, Tensor):
            self.save(Global("torch._utils", "_rebuild_tensor_v2"))
            self.save(obj.arguments)
            self.write(pickle.REDUCE)
        elif isinstance(obj, Build):
            self.save(obj.target)
            self.save(obj.state)
            self.write(pickle.BUILD)
        else:
            super().save(obj, *args, **options)


def pickled(obj):
    file = io.BytesIO()
    Pickler(file, protocol=2).dump(obj)
    return file.getvalue()


def test_strides_offsets_and_dtypes(tmp_path):
    numbers = np.arange(12, dtype=np.float32)
    half = np.array([1.5, 2.5], np.float16)
    state = collections.OrderedDict(
        a=Tensor(Storage("0", "FloatStorage", 12), 0, (3, 4), (4, 1)),
        b=Tensor(Storage("0", "FloatStorage", 12), 1, (4, 2), (1, 4)),
        c=Tensor(Storage("1", "HalfStorage", 2), 0, (2,), (1,)),
        d=Tensor(Storage("0", "FloatStorage", 12), 7, (), ()),
        e=Tensor(Storage("0", "FloatStorage", 12), 0, (0, 4), (4, 1)),
    )
    storages = [("0", numbers.tobytes()), ("1", half.tobytes())]
    path = save_pth(tmp_path / "w.pth", pickled(state), storages, byteorder=b"little")
    found = torch_weights.read_tensors(path)
    np.testing.assert_array_equal(found["a"], numbers.reshape(3, 4))
    np.testing.assert_array_equal(found["b"], np.stack([numbers[1:5], numbers[5:9]], 1))
    np.testing.assert_array_equal(found["c"], half)
    assert found["d"] == 7 and found["e"].shape == (0, 4)
    big = [(key, np.frombuffer(d, t).astype(t.newbyteorder(">")).tobytes())
           for (key, d), t in zip(storages, (numbers.dtype, half.dtype), strict=True)]  # fmt: skip
    path = save_pth(tmp_path / "big.pth", pickled(state), big, byteorder=b"big")
    np.testing.assert_array_equal(torch_weights.read_tensors(path)["a"], numbers.reshape(3, 4))


def test_pytorch_files_with_more_in_them(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch writes the file")
    tensors = {
        "w": torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).T),
        "b": torch.tensor([1, 2]).bfloat16(),
        "n": torch.tensor(3),
    }
    torch.save(tensors, tmp_path / "w.pth")
    found = torch_weights.read_tensors(tmp_path / "w.pth")
    assert found["w"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert found["b"].astype(np.float32).tolist() == [1, 2] and found["n"] == 3
    # As training scripts have it, with one state_dict among other things.
    torch.save({"epoch": 3, "state_dict": tensors}, tmp_path / "checkpoint.pth")
    assert torch_weights.read_tensors(tmp_path / "checkpoint.pth")["n"] == 3
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "module.pth")
    with pytest.raises(ValueError, match="refused: its pickle names .*Linear"):
        torch_weights.read_tensors(tmp_path / "module.pth")


def save_legacy(path, state, storages, begin=(0x1950A86A20F9469CFC6C, 1001, {}), keys=None):
    """As torch.save did before PyTorch 1.6: pickles, then length and bytes of each storage."""
    objects = [*begin, state, list(storages) if keys is None else keys]
    parts = [pickled(obj) for obj in objects]
    for array in storages.values():
        parts += [struct.pack("<q", array.size), array.tobytes()]
    path.write_bytes(b"".join(parts))
    return path


class Part(Storage):
    """A storage that is a part of another."""

    def __init__(self, key, kind, count, view=None):
        self.pid = ("storage", Global("torch", kind), key, "cpu", count, view)


def test_the_format_before_zip(tmp_path):
    numbers, half = np.arange(12, dtype=np.float32), np.array([1.5, -2], ml_dtypes.bfloat16)
    state = collections.OrderedDict(
        a=Tensor(Part("7", "FloatStorage", 12), 0, (3, 4), (4, 1)),
        b=Tensor(Part("7", "FloatStorage", 12), 1, (4, 2), (1, 4)),
        c=Tensor(Part("3", "BFloat16Storage", 2), 0, (2,), (1,)),
        d=Tensor(Part("7", "FloatStorage", 12, ("9", 4, 3)), 1, (2,), (1,)),
    )
    path = save_legacy(tmp_path / "w.pth", state, {"7": numbers, "3": half})
    found = torch_weights.read_tensors(path)
    np.testing.assert_array_equal(found["a"], numbers.reshape(3, 4))
    np.testing.assert_array_equal(found["b"], np.stack([numbers[1:5], numbers[5:9]], 1))
    np.testing.assert_array_equal(found["c"], half)
    assert found["d"].tolist() == [5, 6]


def test_the_format_before_zip_against_pytorch(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch writes the file")
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).half()
    wanted = net.state_dict() | {"b": torch.tensor([1, 2]).bfloat16(), "t": torch.rand(3, 2).T}
    wanted["view"] = wanted["0.weight"][1:, 2]
    for new in (True, False):
        torch.save(wanted, tmp_path / "w.pth", _use_new_zipfile_serialization=new)
        found = torch_weights.read_tensors(tmp_path / "w.pth")
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert found[name].shape == tuple(tensor.shape)
            np.testing.assert_array_equal(np.float32(found[name]), tensor.float().numpy())


def test_damaged_files_of_the_format_before_zip(tmp_path):
    numbers = np.arange(6, dtype=np.float32)
    state = {"a": Tensor(Part("0", "FloatStorage", 6), 0, (6,), (1,))}
    path = tmp_path / "w.pth"

    def refused(what, *args, **options):
        save_legacy(path, *args, **options)
        with pytest.raises(ValueError, match=f"w.pth: (refused|damaged).*{what}"):
            torch_weights.read_tensors(path)

    save_legacy(path, state, {"0": numbers})
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="w.pth: refused: storage '0' is cut short"):
        torch_weights.read_tensors(path)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match="w.pth: refused: pickle data was truncated"):
        torch_weights.read_tensors(path)
    refused("cut short", state, {"0": numbers[:5]})
    refused("does not hold the storages", state, {"1": numbers})
    refused("torch.save did not write", state, {"0": numbers}, begin=(1, 1001, {}))
    huge = {"a": Tensor(Part("0", "FloatStorage", 1 << 60), 0, (6,), (1,))}
    refused("too few for 1152921504606846976 x float32", huge, {"0": numbers})
    twice = state | {"b": Tensor(Part("0", "LongStorage", 6), 0, (6,), (1,))}
    refused("named twice", twice, {"0": numbers})
    beyond = {"a": Tensor(Part("0", "FloatStorage", 6, ("1", 4, 3)), 0, (1,), (1,))}
    refused("beyond its 6 elements", beyond, {"0": numbers})


class Evil:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path):
    witness = tmp_path / "witness"
    evils = {
        "os": Evil(__import__("os").mkdir, str(witness)),
        "eval": Evil(eval, f"open({str(witness)!r}, 'w')"),
        "nested": {"weight": [Evil(__import__("pathlib").Path.touch, witness)]},
    }
    for name, evil in evils.items():
        path = save_pth(tmp_path / f"{name}.pth", pickle.dumps(evil, protocol=2))
        with pytest.raises(ValueError, match=f"{name}.pth: refused: its pickle names "):
            torch_weights.read_tensors(path)
        assert not witness.exists()
        with zipfile.ZipFile(path) as archive:  # it would have
            pickle.loads(archive.read("archive/data.pkl"))
        assert witness.exists()
        witness.rmdir() if witness.is_dir() else witness.unlink()
        # The format before zip has five pickles, and any of them may be the one.
        parts = [
            pickle.dumps(obj, protocol=2) for obj in (0x1950A86A20F9469CFC6C, 1001, {}, {}, [])
        ]
        for place in range(5):
            parts_now = [*parts[:place], pickle.dumps(evil, protocol=2), *parts[place + 1 :]]
            path.write_bytes(b"".join(parts_now))
            with pytest.raises(ValueError, match=f"{name}.pth: refused: its pickle names "):
                torch_weights.read_tensors(path)
            assert not witness.exists()
    # Names that look harmless but are not those of tensors.
    other = ("torch.load", "torch._utils._import_dotted_name", "builtins.getattr")
    for module, name in (whole.rsplit(".", 1) for whole in other):
        path = save_pth(tmp_path / "x.pth", pickled({"a": Global(module, name)}))
        with pytest.raises(ValueError, match=f"names {module}.{name}"):
            torch_weights.read_tensors(path)


class Build:
    """An object whose state is set by the pickle, as by ``__reduce__`` with a third item."""

    def __init__(self, target, state):
        self.target, self.state = target, state


@pytest.mark.parametrize("kind", ["FloatStorage", "BFloat16Storage", "HalfStorage"])
@pytest.mark.parametrize("state", [(3, "<", None, None, None, -1, 0, 63), (None, {"name": "x"})])
def test_a_pickle_cannot_change_what_the_process_shares(tmp_path, kind, state):
    """Dtypes of NumPy have a __setstate__, which a crafted pickle would call."""

    dtypes = [np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16)]
    before = [(d.itemsize, d.alignment, d.byteorder) for d in dtypes]
    built = {"a": Build(Global("torch", kind), state)}
    path = save_pth(tmp_path / "w.pth", pickled(built), [("0", bytes(4))])
    with pytest.raises(ValueError, match=r"w.pth: (damaged|refused|entry)"):
        torch_weights.read_tensors(path)
    assert [(d.itemsize, d.alignment, d.byteorder) for d in dtypes] == before
    # A changed kind is refused, and the next reading has kinds of its own.
    good = {"a": Tensor(Storage("0", kind, 1), 0, (1,), (1,))}
    size = np.dtype(torch_weights._DTYPES[kind]).itemsize
    path = save_pth(tmp_path / "good.pth", pickled(good), [("0", bytes(size))])
    assert torch_weights.read_tensors(path)["a"].tolist() == [0]


DAMAGES = {
    "beyond": ((0, (4,), (1,)), 3, "beyond its 3 elements"),
    "offset": ((3, (1,), (1,)), 3, "beyond its 3 elements"),
    "negative": ((2, (2,), (-1,)), 3, "negative"),
    "negative offset": ((-1, (1,), (1,)), 3, "negative"),
    "axes": ((0, (3,), (1, 1)), 3, "malformed"),
    "count": ((0, (3,), (1,)), 4, "12 bytes for 4 x float32"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_tensors_that_leave_their_storage(tmp_path, damage):
    place, count, what = DAMAGES[damage]
    state = {"a": Tensor(Storage("0", "FloatStorage", count), *place)}
    path = save_pth(tmp_path / "w.pth", pickled(state), [("0", bytes(12))])
    with pytest.raises(ValueError, match=f"w.pth: refused: .*{what}"):
        torch_weights.read_tensors(path)


def test_other_files(tmp_path):
    def refused(name, data, what):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}: .*{what}"):
            torch_weights.read_tensors(tmp_path / name)

    with pytest.raises(ValueError, match="none.pth: cannot be read"):
        torch_weights.read_tensors(tmp_path / "none.pth")
    refused("page.pth", b"<html>not found</html>", "neither a .pth nor a safetensors")
    whole = save_pth(tmp_path / "w.pth", pickled({}), [("0", bytes(1000))]).read_bytes()
    refused("cut.pth", whole[: len(whole) // 2], "damaged")
    refused("odd.pth", save_pth(tmp_path / "o.pth", pickled([1])).read_bytes(), "holds a list")
    refused("num.pth", save_pth(tmp_path / "o.pth", pickled({"a": 1})).read_bytes(), "'a' is no")
    state = {"a": Tensor(Storage("7", "FloatStorage", 1), 0, (1,), (1,))}
    refused(
        "lost.pth", save_pth(tmp_path / "o.pth", pickled(state)).read_bytes(), "damaged.*data/7"
    )
    with zipfile.ZipFile(tmp_path / "o.zip", "w") as archive:
        archive.writestr("image.png", b"")
    refused("zip.pth", (tmp_path / "o.zip").read_bytes(), "refused: it holds 0 files data.pkl")


# Names of PyTorch's networks.


def torch_resnet(torch, form, width=4, classes=3):
    """ResNet-18 for small images under torchvision's or Mammoth's names."""
    nn, functional = torch.nn, torch.nn.functional
    short, last = {"torchvision": ("downsample", "fc"), "mammoth": ("shortcut", "classifier")}[form]

    class Block(nn.Module):
        def __init__(self, inputs, outputs, stride):
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(outputs)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(outputs)
            shortcut = nn.Sequential()
            if stride > 1 or inputs != outputs:
                conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
                shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))
            setattr(self, short, shortcut)

        def forward(self, x):
            y = functional.relu(self.bn1(self.conv1(x)))
            return functional.relu(self.bn2(self.conv2(y)) + getattr(self, short)(x))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            before = width
            for stage in range(4):
                now = width << stage
                blocks = Block(before, now, 1 + (stage > 0)), Block(now, now, 1)
                setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
                before = now
            setattr(self, last, nn.Linear(before, classes))

        def forward(self, x):
            x = functional.relu(self.bn1(self.conv1(x)))
            for stage in range(4):
                x = getattr(self, f"layer{stage + 1}")(x)
            return getattr(self, last)(x.mean((2, 3)))

    torch.manual_seed(0)
    network = Network()
    with torch.no_grad():
        for _ in range(5):  # running statistics of its own
            network(torch.randn(16, 3, 16, 16) * 2 + 1)
    return network.eval()


@pytest.mark.parametrize("form", ["torchvision", "mammoth"])
def test_resnet_is_that_of_pytorch(tmp_path, form):
    torch = pytest.importorskip("torch", reason="PyTorch is the reference")
    network = torch_resnet(torch, form)
    tensors = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save(tensors, tmp_path / "w.pth")
    found = torch_weights.resnet_variables(torch_weights.read_tensors(tmp_path / "w.pth"))
    variables = {g: traverse_util.unflatten_dict(flat, sep="/") for g, flat in found.items()}
    x = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        wanted = network(torch.from_numpy(x.transpose(0, 3, 1, 2))).numpy()
    ours = models.ResNet18(3, width=4)
    np.testing.assert_allclose(ours.apply(variables, x), wanted, atol=1e-5)


def test_names_of_other_networks():
    with pytest.raises(
        ValueError, match=r"layer1.2.conv1.weight \(4, 4, 3, 3\) is not a tensor of a"
    ):
        torch_weights.resnet_variables({"layer1.2.conv1.weight": np.zeros((4, 4, 3, 3))})
    assert not any(
        torch_weights.resnet_variables({"bn1.num_batches_tracked": np.zeros(())}).values()
    )
    with pytest.raises(ValueError, match="shape \\(4, 4, 3\\), neither 2 nor 4"):
        torch_weights.kernel(np.zeros((4, 4, 3)))
