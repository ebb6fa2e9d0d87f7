"""Weights of other networks in those of the package, and in one's own by a mapping."""

import itertools

import flax.linen as nn
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from support import digits_config

import bpnjax
from bpnjax import models
from bpnjax.data import load_sequence
from bpnjax.models import pretrained, torch_weights
from bpnjax.run import train
from bpnjax.training.experiment import make_network
from bpnjax.utils import arrays
from bpnjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_once")

RESNET = {"model__name": "resnet18", "model__options": "width=2"}


def network_of(**fields):
    config = digits_config("sgd", **fields)
    return make_network(config, load_sequence(config))


def initial(network):
    """Parameters and variables of a seed, each by path."""
    return [arrays.flatten(tree) for tree in network.init(jax.random.key(0))]


def resnet_tensors(width=2, shortcut="downsample", output="fc"):
    """What a state_dict of torchvision's has, by the rules of its names."""
    rng = np.random.default_rng(0)
    shapes = {"conv1.weight": (width, 1, 3, 3)}

    def norm(name, channels):
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = (channels,)
        shapes[f"{name}.num_batches_tracked"] = ()

    norm("bn1", width)
    before = width
    for stage, block in itertools.product(range(4), range(2)):
        now, name = width << stage, f"layer{stage + 1}.{block}"
        shapes[f"{name}.conv1.weight"] = (now, before, 3, 3)
        shapes[f"{name}.conv2.weight"] = (now, now, 3, 3)
        norm(f"{name}.bn1", now)
        norm(f"{name}.bn2", now)
        if before != now:
            shapes[f"{name}.{shortcut}.0.weight"] = (now, before, 1, 1)
            norm(f"{name}.{shortcut}.1", now)
        before = now
    shapes |= {f"{output}.weight": (10, before), f"{output}.bias": (10,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    "form", [{}, {"shortcut": "shortcut", "output": "linear"}, {"output": "classifier"}]
)
def test_resnet_of_others_with_its_statistics(tmp_path, form):
    tensors = resnet_tensors(**form)
    prefix = "net." if form else ""
    file = tmp_path / "w.safetensors"
    save_file({f"{prefix}{name}": array for name, array in tensors.items()}, file)
    params, variables = initial(network_of(**RESNET, model__pretrained=str(file)))
    fresh, _ = initial(network_of(**RESNET))
    short = form.get("shortcut", "downsample")
    for ours, theirs in {
        "conv_0": "conv1", "block_0_0/conv_1": "layer1.0.conv2", "block_3_1/conv_0":
        "layer4.1.conv1", "block_2_0/shortcut": f"layer3.0.{short}.0",
    }.items():  # fmt: skip
        wanted = tensors[f"{theirs}.weight"].transpose(2, 3, 1, 0)
        np.testing.assert_array_equal(params[f"{ours}/kernel"], wanted)
    for ours, theirs in {
        "norm_0": "bn1", "block_1_1/norm_1": "layer2.1.bn2",
        "block_1_0/shortcut_norm": f"layer2.0.{short}.1",
    }.items():  # fmt: skip
        np.testing.assert_array_equal(params[f"{ours}/scale"], tensors[f"{theirs}.weight"])
        np.testing.assert_array_equal(params[f"{ours}/bias"], tensors[f"{theirs}.bias"])
        for part in ("mean", "var"):
            found = variables[f"batch_stats/{ours}/{part}"]
            np.testing.assert_array_equal(found, tensors[f"{theirs}.running_{part}"])
    # The output has the sequence's classes and is new; nothing else is.
    same = [name for name in params if np.array_equal(params[name], fresh[name])]
    assert same == ["output/bias", "output/kernel"]


def test_weights_that_do_not_fit(tmp_path):
    file = tmp_path / "w.safetensors"
    fields = RESNET | {"model__pretrained": str(file)}

    def refused(tensors, message, **more):
        save_file(tensors, file)
        with pytest.raises(UserError, match=message):
            network_of(**fields | more)

    refused(
        resnet_tensors(width=3),
        r"model.pretrained: block_0_0/conv_0/kernel is \(3, 3, 2, 2\) here and \(3, 3, 3, 3\) in "
        r"the file, block_0_0/conv_1/kernel .*, .* and 97 more; give both the same widths",
    )  # fmt: skip
    tensors = resnet_tensors()
    del tensors["layer2.0.bn1.running_var"]
    refused(
        tensors, r"^model.pretrained: batch_stats/block_1_0/norm_0/var \(4,\) is missing; the file"
    )
    deeper = resnet_tensors() | {"layer1.2.conv1.weight": np.zeros((2, 2, 3, 3), np.float32)}
    refused(
        deeper, r"w.safetensors: layer1.2.conv1.weight \(2, 2, 3, 3\) is not a tensor of a ResNet"
    )
    refused(resnet_tensors(), r"hidden_0/bias \(16,\) is missing, .*; the file has bn1/bias \(2,\)",
            model__name="mlp", model__options="")  # fmt: skip
    file.write_bytes(b"<html>")
    with pytest.raises(UserError, match="w.safetensors: is neither a .pth nor a safetensors file"):
        network_of(**fields)


@pytest.mark.parametrize("separator", ["/", "."])
def test_files_under_our_own_names(tmp_path, separator):
    given, _ = initial(network_of())
    given = {f"params{separator}{n.replace('/', separator)}": a + 1 for n, a in given.items()}
    save_file(given, tmp_path / "w.safetensors")
    params, _ = initial(network_of(model__pretrained=str(tmp_path / "w.safetensors")))
    name = separator.join(("params", "hidden_0", "kernel"))
    np.testing.assert_array_equal(params["hidden_0/kernel"], given[name])


MAPPINGS = """
from bpnjax.models.torch_weights import kernel


def nested(tensors):
    return {"hidden_0": {"kernel": kernel(tensors["fc1.weight"]), "bias": tensors["fc1.bias"]}}


def by_path(tensors):
    return {f"hidden_0/{part}": array for part, array in nested(tensors)["hidden_0"].items()}


def of_collections(tensors):
    return {"params": nested(tensors), "batch_stats": {}}


def fails(tensors):
    return tensors["fc2.weight"]


def a_list(tensors):
    return list(tensors)


def words(tensors):
    return {"hidden_0": {"kernel": "text", "bias": object()}}


def half(tensors):
    return {"hidden_0": {"bias": tensors["fc1.bias"]}}
"""


@pytest.fixture
def mapped(tmp_path, monkeypatch):
    (tmp_path / "mappings_of_weights_test.py").write_text(MAPPINGS)
    rng = np.random.default_rng(0)
    tensors = {"fc1.weight": rng.normal(size=(16, 64)), "fc1.bias": rng.normal(size=16)}
    tensors = {name: array.astype(np.float32) for name, array in tensors.items()}
    save_file(tensors, tmp_path / "w.safetensors")
    monkeypatch.chdir(tmp_path)

    def run(name):
        mapping = f"mappings_of_weights_test:{name}"
        return network_of(model__pretrained="w.safetensors", model__mapping=mapping)

    run.tensors = tensors
    return run


@pytest.mark.parametrize("name", ["nested", "by_path", "of_collections"])
def test_mappings(mapped, name):
    params, _ = initial(mapped(name))
    np.testing.assert_array_equal(params["hidden_0/kernel"], mapped.tensors["fc1.weight"].T)
    np.testing.assert_array_equal(params["hidden_0/bias"], mapped.tensors["fc1.bias"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails", "mappings_of_weights_test:fails raises KeyError: 'fc2.weight'; fix it"),
        ("a_list", "mappings_of_weights_test:a_list returns a list; return a dict"),
        ("words", "model.mapping: hidden_0/kernel is a str, not an array"),
        ("half", r"model.pretrained: hidden_0/kernel \(64, 16\) is missing; the file has hid"),
        ("none", "model.mapping: mappings_of_weights_test has no function 'none'"),
    ],
)  # fmt: skip
def test_refused_mappings(mapped, name, message):
    with pytest.raises(UserError, match=message):
        mapped(name)


def test_a_mapping_needs_a_file():
    with pytest.raises(UserError, match="model.mapping: 'a:b' has nothing to convert; name"):
        digits_config("sgd", model__mapping="a:b")


class Normed(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(8, name="hidden")(x.reshape(len(x), -1))
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.5, name="norm")(x))
        return nn.Dense(self.num_classes, name="classes")(x)


@pytest.mark.parametrize("policy", ["task", "shared"])
def test_statistics_of_our_own_models(tmp_path, policy):
    """A pretrained run hands on its running statistics; the output is the layer called last."""
    models.register("normed_of_test")(Normed)
    try:
        fields = {"model__name": "normed_of_test", "train__epochs": 1}
        first = digits_config(
            "sgd", sequence__num_tasks=1, sequence__classes_per_task=6,
            model__batch_statistics=policy, **fields,
        )  # fmt: skip
        train.train_and_evaluate(first, tmp_path)
        state = bpnjax.load(tmp_path).state
        file = str(tmp_path / "model.safetensors")
        params, variables = initial(network_of(model__pretrained=file, **fields))
        given = arrays.flatten(state.params)
        anew = [name for name in params if not np.array_equal(params[name], given[name])]
        assert anew == ["classes/bias", "classes/kernel"]
        mean = variables["batch_stats/norm/mean"]
        kept = state.task_variables if policy == "task" else state.variables
        wanted = arrays.flatten(kept)["batch_stats/norm/mean"]
        np.testing.assert_array_equal(mean, wanted[-1] if policy == "task" else wanted)
        assert np.abs(mean).max() > 0.01
    finally:
        del models.REGISTRY["normed_of_test"]


def test_what_is_known_of_other_packages():
    assert set(torch_weights.CONVERTERS) <= set(models.REGISTRY)
    assert not pretrained.is_ours("/no/such/file")
