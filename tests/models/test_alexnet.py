"""AlexNet: layer by layer equal to PyTorch's, and weights read without running what holds them."""

from functools import partial
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bpnjax import config as configuration
from bpnjax import data, networks
from bpnjax.methods import Context
from bpnjax.models import torch_weights
from bpnjax.models.alexnet import AlexNet, adaptive_average_pool
from bpnjax.training.experiment import make_experiment, make_network
from bpnjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_once")

CHANNELS, HIDDEN, CLASSES = (6, 8, 10, 9, 7), (20, 18), 5
SMALL = AlexNet(CLASSES, CHANNELS, HIDDEN)
SIZES = (90, 224)  # features of 1 x 1 and of 6 x 6 cells before the average


def torch_alexnet(torch):
    """torchvision's network with other widths, under its names."""
    nn = torch.nn
    a, b, c, d, e = CHANNELS

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            relu = lambda: nn.ReLU(inplace=False)  # noqa: E731
            self.features = nn.Sequential(
                nn.Conv2d(3, a, 11, stride=4, padding=2), relu(), nn.MaxPool2d(3, 2),
                nn.Conv2d(a, b, 5, padding=2), relu(), nn.MaxPool2d(3, 2),
                nn.Conv2d(b, c, 3, padding=1), relu(),
                nn.Conv2d(c, d, 3, padding=1), relu(),
                nn.Conv2d(d, e, 3, padding=1), relu(), nn.MaxPool2d(3, 2),
            )  # fmt: skip
            self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
            self.classifier = nn.Sequential(
                nn.Dropout(0.5), nn.Linear(e * 36, HIDDEN[0]), relu(),
                nn.Dropout(0.5), nn.Linear(*HIDDEN), relu(), nn.Linear(HIDDEN[1], CLASSES),
            )  # fmt: skip

        def forward(self, x):
            return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))

    torch.manual_seed(1)
    return Network().eval()


def random_tensors(dtype=np.float32):
    """Tensors under torchvision's names, made without PyTorch."""
    rng = np.random.default_rng(0)
    modules = [f"features.{i}" for i in (0, 3, 6, 8, 10)] + [f"classifier.{i}" for i in (1, 4, 6)]
    inputs = (3, *CHANNELS[:-1], CHANNELS[-1] * 36, *HIDDEN)
    outputs = (*CHANNELS, *HIDDEN, CLASSES)
    kernels = [(k, k) for k in (11, 5, 3, 3, 3)] + [()] * 3
    shapes = {}
    for name, n, m, kernel in zip(modules, inputs, outputs, kernels, strict=True):
        shapes |= {f"{name}.weight": (m, n, *kernel), f"{name}.bias": (m,)}
    return {name: 0.1 * rng.normal(size=s).astype(dtype) for name, s in shapes.items()}


@pytest.mark.parametrize("size", SIZES)
def test_equal_to_pytorch_layer_by_layer(tmp_path, size):
    torch = pytest.importorskip("torch", reason="PyTorch is the reference")
    network = torch_alexnet(torch)
    torch.save(network.state_dict(), tmp_path / "alexnet.pth")
    params = torch_weights.alexnet_params(torch_weights.read_tensors(tmp_path / "alexnet.pth"))
    x = np.random.default_rng(2).normal(size=(3, size, size + 13, 3)).astype(np.float32)

    seen = {}

    def keep(name):
        def hook(_, inputs, output):
            seen[name] = (inputs[0].detach().numpy().copy(), output.detach().numpy())

        return hook

    for layer, module in torch_weights._ALEXNET.items():
        network.get_submodule(module).register_forward_hook(keep(layer))
    with torch.no_grad():
        logits = network(torch.from_numpy(x.transpose(0, 3, 1, 2))).numpy()

    taken = networks.from_linen(SMALL, x).features(params, {}, x, list(seen))
    ours, outputs = SMALL.apply({"params": params}, x, capture_intermediates=True)
    outputs = outputs["intermediates"]
    for layer, (inputs, output) in seen.items():
        if output.ndim == 4:
            inputs, output = (a.transpose(0, 2, 3, 1) for a in (inputs, output))
        elif layer == "fc6":  # channels first there, last here
            inputs = inputs.reshape(3, -1, 36).transpose(0, 2, 1).reshape(3, -1)
        np.testing.assert_allclose(taken[layer], inputs, atol=1e-5, err_msg=layer)
        np.testing.assert_allclose(outputs[layer]["__call__"][0], output, atol=1e-5, err_msg=layer)
        assert np.abs(output).max() > 1e-2
    np.testing.assert_allclose(ours, logits, atol=1e-5)


def test_full_size_has_the_published_shape():
    net = AlexNet(1000)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 61_100_840
    assert shapes["fc6"]["kernel"].shape == (9216, 4096)
    layers = networks.find_layers(net, shapes, jax.ShapeDtypeStruct((1, 224, 224, 3), "float32"))
    assert list(layers) == [*(f"conv_{i}" for i in range(5)), "fc6", "fc7", "output"]
    assert list(networks.matching(layers, "fc6|fc7|output")) == ["fc6", "fc7", "output"]


def test_average_into_cells_against_pytorch():
    torch = pytest.importorskip("torch", reason="PyTorch is the reference")
    for shape in ((2, 1, 7, 3), (1, 6, 6, 2), (2, 5, 13, 1), (1, 12, 4, 2)):
        x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        pool = torch.nn.AdaptiveAvgPool2d((6, 6))
        wanted = pool(torch.from_numpy(x.transpose(0, 3, 1, 2))).numpy().transpose(0, 2, 3, 1)
        np.testing.assert_allclose(adaptive_average_pool(jnp.asarray(x), 6), wanted, atol=1e-6)


def test_dropout_only_with_a_key_for_it():
    params = torch_weights.alexnet_params(random_tensors())
    x = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (1, 70, 70, 3)), (50, 70, 70, 3))
    network = networks.from_linen(SMALL, x)
    run = lambda x, **options: network.apply(params, {}, x, **options)[0]  # noqa: E731
    plain = run(x[:2])
    np.testing.assert_array_equal(plain[0], plain[1])
    np.testing.assert_array_equal(plain, run(x[:2], key=jax.random.key(1)))  # not in evaluation
    dropped = run(x, train=True, key=jax.random.key(1))
    assert np.asarray(dropped).std(0).min() > 0
    np.testing.assert_array_equal(dropped, run(x, train=True, key=jax.random.key(1)))

    # Half of fc6's inputs are 0 and the others doubled.
    def first(rngs):
        seen = {}

        def keep(call, inputs, options, context):
            if context.method_name == "__call__":
                seen[context.module.name] = inputs[0]
            return call(*inputs, **options)

        with nn.intercept_methods(keep):
            SMALL.apply({"params": params}, x, rngs=rngs)
        return np.asarray(seen["fc6"])

    whole, half = first({}), first({"dropout": jax.random.key(2)})
    kept = (half != 0)[whole > 0]
    assert 0.45 < kept.mean() < 0.55
    np.testing.assert_allclose(half[half > 0], 2 * whole[half > 0], rtol=1e-6)


def test_too_small_images():
    with pytest.raises(ValueError, match="at least 63 x 63 pixels, not 62 x 80.*dataset.resize"):
        SMALL.init(jax.random.key(0), jnp.zeros((1, 62, 80, 3)))
    jax.eval_shape(SMALL.init, jax.random.key(0), jnp.zeros((1, 63, 63, 3)))


# Weights of torchvision.


def test_safetensors_gives_the_same(tmp_path):
    from safetensors.numpy import save_file

    tensors = random_tensors()
    save_file(tensors, tmp_path / "alexnet.safetensors")
    found = torch_weights.alexnet_params(
        torch_weights.read_tensors(tmp_path / "alexnet.safetensors")
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(torch_weights.alexnet_params(tensors)):
        layer, part = (k.key for k in path)
        np.testing.assert_array_equal(found[layer][part], leaf)
    assert found["conv_0"]["kernel"].shape == (11, 11, 3, CHANNELS[0])
    weight = tensors["classifier.1.weight"]  # channels, rows, columns -> rows, columns, channels
    kernel = found["fc6"]["kernel"].reshape(6, 6, CHANNELS[-1], HIDDEN[0])
    assert kernel[2, 5, 3, 4] == weight.reshape(HIDDEN[0], CHANNELS[-1], 6, 6)[4, 3, 2, 5]


def test_tensors_of_another_network():
    tensors = random_tensors()
    with pytest.raises(ValueError, match="no tensor features.3.bias; this is not an AlexNet"):
        torch_weights.alexnet_params({k: v for k, v in tensors.items() if k != "features.3.bias"})
    with pytest.raises(ValueError, match="classifier.1.weight has shape"):
        torch_weights.alexnet_params(tensors | {"classifier.1.weight": np.zeros((2, 2, 2))})
    with pytest.raises(ValueError, match="fc6 has 35 inputs"):
        torch_weights.alexnet_params(tensors | {"classifier.1.weight": np.zeros((2, 35))})


# In a run.


def alexnet_config(**changes):
    config = configuration.default()
    config.dataset.resize = (80, 80, 3)
    config.model.name = "alexnet"
    config.model.channels, config.model.hidden = CHANNELS, HIDDEN
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    configuration.validate(config)
    return config


def images(classes):
    """A sequence without examples."""
    split = SimpleNamespace(images=np.zeros((0, 80, 80, 3), np.uint8))
    return SimpleNamespace(
        train=split, num_classes=classes, scale=np.ones(1), shift=np.zeros(1), extractor=None
    )


def test_pretrained_weights_but_a_fresh_output(tmp_path):
    from safetensors.numpy import save_file

    tensors = random_tensors()
    save_file(tensors, tmp_path / "w.safetensors")
    wanted = torch_weights.alexnet_params(tensors)
    config = alexnet_config(model__pretrained=str(tmp_path / "w.safetensors"))
    network = make_network(config, images(11))  # as many outputs as the sequence has, not the file
    (tmp_path / "w.safetensors").unlink()  # read once

    def init(key):
        return network.init(key)[0]

    program = jax.jit(jax.vmap(init)).lower(jax.random.split(jax.random.key(0), 2))
    assert len(program.as_text()) < 100_000  # the weights are no constants of it
    seeds = program.compile()(jax.random.split(jax.random.key(0), 2))
    fresh = jax.tree.map(lambda p: p[1], seeds)
    for layer in set(wanted) - {"output"}:
        for part in ("kernel", "bias"):
            np.testing.assert_array_equal(fresh[layer][part], wanted[layer][part])
    assert fresh["output"]["kernel"].shape == (HIDDEN[1], 11)
    assert not np.array_equal(seeds["output"]["kernel"][0], seeds["output"]["kernel"][1])


def test_pretrained_weights_of_another_width(tmp_path):
    from safetensors.numpy import save_file

    save_file(random_tensors(), tmp_path / "w.safetensors")
    config = alexnet_config(
        model__pretrained=str(tmp_path / "w.safetensors"), model__hidden=(20, 17)
    )
    message = (
        r"model.pretrained: fc7/bias is \(17,\) here and \(18,\) in the file, fc7/kernel is .*; "
        "give both the same widths and images of the same size"
    )
    with pytest.raises(UserError, match=message):
        make_network(config, images(3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__channels": (1, 2)}, r"model.channels: \(1, 2\) has 2 widths and alexnet 5"),
        ({"model__hidden": (1, 2, 3)}, r"model.hidden: .*3 widths and alexnet 2 .*\(4096, 4096\)"),
        ({"model__dropout": 1.0}, "model.dropout: 1.0 is not below 1"),
        ({"model__pretrained": "/no/such.pth"}, "model.pretrained: no file .*alexnet-owt-7be5be79"),
        (
            {"model__name": "convnet", "model__pretrained": "x"},
            "model.pretrained: no file 'x'; make one with python -m bpnjax.pretrain",
        ),
    ],
)
def test_fields(changes, message):
    with pytest.raises(UserError, match=message):
        alexnet_config(**changes)


def test_a_task_of_a_method(tmp_path):
    """Biases and keys are where the paper has them."""
    from safetensors.numpy import save_file

    from bpnjax.training import epochs
    from bpnjax.training.task_data import put_on_device

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 63, 63, 3), np.uint8)
    labels = np.tile(np.arange(4, dtype=np.int32), 2)
    save_file(random_tensors(), tmp_path / "w.safetensors")  # random ones compile for long
    config = alexnet_config(
        method="bd_psp", bd__layers="fc6|fc7|output", psp__layers="fc6|fc7|output",
        model__pretrained=str(tmp_path / "w.safetensors"),
        sequence__heads="multi", train__batch_size=4, bd__hidden_dim=3, train__epochs=1,
    )  # fmt: skip
    pair = images, labels
    sequence = data.tasks(pair, pair, classes=[[0, 1], [2, 3]], heads="multi", normalize="unit")
    experiment = make_experiment(config, sequence)
    arrays, key = put_on_device(sequence), jax.random.key(0)

    @jax.jit
    def task(state, t):
        state = epochs.begin_task(experiment, state, t)
        state, sums = epochs.run_steps(experiment, state, arrays, t, 0, 0, 1)
        return epochs.end_task(experiment, state, arrays, t), sums

    before = jax.jit(partial(epochs.init_state, experiment))(key)
    state, sums = task(before, 0)
    assert int(sums.bad_step) == -1 and float(sums.loss) > 0
    learner = experiment.learner
    factors, *_ = before.learner.task_params
    assert set(factors) == {"fc6", "fc7", "output"}
    ctx = Context(learner.setup, jnp.int32(0), None, False)
    params, mode = learner.method.forward(
        state.learner.params, state.learner.task_params, state.learner.method, ctx
    )
    assert {path for path in mode if "key" in mode[path]} == {"fc6", "fc7", "output"}
    assert {path for path in mode if "bias" in mode[path]} == {"fc6", "fc7", "output"}
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
