"""Names, factories and options of networks, and what is wrong with them."""

import sys

import flax.linen as nn
import jax
import numpy as np
import pytest
from support import digits_config

from bpnjax import config as configuration
from bpnjax import models, networks
from bpnjax.data import load_sequence
from bpnjax.models import registry
from bpnjax.training.experiment import make_network
from bpnjax.utils.errors import UserError

FILE = """
import flax.linen as nn
import jax.numpy as jnp
from flax import nnx

from bpnjax import networks

hidden = 3


class Small(nn.Module):
    num_classes: int
    width: int = 8

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(self.width, name="hidden")(x.reshape(len(x), -1)))
        return nn.Dense(self.num_classes, name="classes")(x)


class SmallNnx(nnx.Module):
    def __init__(self, num_classes, input_shape, rngs, width=8):
        inputs = input_shape[0] * input_shape[1] * input_shape[2]
        self.hidden = nnx.Linear(inputs, width, rngs=rngs)
        self.classes = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, x):
        return self.classes(nnx.relu(self.hidden(x.reshape(len(x), -1))))


def of_key(num_classes, input_shape, key):
    return SmallNnx(num_classes, input_shape, nnx.Rngs(key))


def instance(num_classes, input_shape):
    return SmallNnx(num_classes, input_shape, nnx.Rngs(3))


def plain(num_classes, input_shape):
    x = jnp.zeros((1, *input_shape))
    return networks.from_linen(Small(num_classes), x)


def needs(num_classes, *, width):
    return Small(num_classes, width)


def anything(**options):
    return Small(options["num_classes"], options.get("width", 2))


def more(num_classes):
    return Small(num_classes + 1)


def raises(num_classes):
    raise KeyError("no such\\n thing")


def returns(num_classes):
    return [num_classes]


def classless(width=8):
    return Small(2, width)


class Fails(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_classes)(x["image"])


class Trains(Small):
    @nn.compact
    def __call__(self, x, train):
        assert not train, "evaluate me only"
        return nn.Dense(self.num_classes)(x.reshape(len(x), -1))


class Normed(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(x.reshape(len(x), -1))
        return nn.Dense(self.num_classes)(x)


two_outputs = lambda num_classes: TwoOutputs()


class TwoOutputs(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x, x
"""


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """The current folder, with a file of networks in it."""
    folder = tmp_path_factory.mktemp("beside")
    (folder / "nets_of_registry_test.py").write_text(FILE)
    (folder / "broken_of_registry_test.py").write_text("import no_such_package_at_all\n")
    (folder / "exits_of_registry_test.py").write_text("raise SystemExit(3)\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def own(make, options="", **more):
    factory = make if ":" in make else f"nets_of_registry_test:{make}"
    return digits_config("bd_ewc", model__factory=factory, model__options=options, **more)


def network_of(config):
    return make_network(config, load_sequence(config))


@pytest.mark.parametrize(
    ("make", "options", "width"),
    [
        ("Small", "", 8), ("Small", "width=5", 5), ("SmallNnx", "width=5", 5), ("of_key", "", 8),
        ("instance", "", 8), ("plain", "", 8), ("needs", "width=6", 6), ("anything", "width=3", 3),
    ],
)  # fmt: skip
def test_factories(make, options, width):
    network = network_of(own(make, options))
    assert {p: (d.inputs, d.outputs) for p, d in network.layers.items()} == {
        "hidden": (64, width), "classes": (width, 6),
    }  # fmt: skip
    one, other = (network.init(jax.random.key(k))[0]["hidden"]["kernel"] for k in (0, 1))
    assert np.array_equal(one, other) == (make == "instance")
    images = np.zeros((3, 8, 8, 1), np.uint8)
    assert network.apply(network.init(jax.random.key(0))[0], {}, images)[0].shape == (3, 6)


REFUSED = {
    "nothing": "model.factory: 'nothing' is not MODULE:FUNCTION; write it as my_module:make",
    ":make": "model.factory: ':make' is not MODULE:FUNCTION",
    "no_such_module:make": "model.factory: no module 'no_such_module'; it is looked for in the",
    "bpnjax.no_such:make": "model.factory: no module 'bpnjax.no_such'",
    "broken_of_registry_test:make": "importing broken_of_registry_test raises ModuleNotFoundError: "
    "No module named 'no_such_package_at_all'; fix it",
    "exits_of_registry_test:make": "importing exits_of_registry_test raises SystemExit: 3",
    "nets_of_registry_test:Smal": "nets_of_registry_test has no function 'Smal'; did you mean",
    "nets_of_registry_test:hidden": "nets_of_registry_test:hidden is a int; name a function",
    "classless": "nets_of_registry_test:classless takes no num_classes; define it as classless(num",
    "needs": "model.options: nets_of_registry_test:needs needs width; give it, as width=...",
    "raises": "model.factory: nets_of_registry_test:raises: KeyError: 'no such\\n thing'",
    "returns": "model.factory: nets_of_registry_test:returns: it returns a list; return a Lin",
    "more": "its output is (1, 7) for one example; let it be (1, 6), [examples, num_classes]",
    "two_outputs": "its output is ((1, 8, 8, 1), (1, 8, 8, 1)) for one example",
    "Fails": "model.factory: nets_of_registry_test:Fails: ",
    "Trains": "nets_of_registry_test:Trains: AssertionError: evaluate me only",
    "Normed": "nets_of_registry_test:Normed: the network cannot be evaluated example by example",
}


@pytest.mark.parametrize("make", REFUSED)
def test_refused_factories(make):
    factory = make if ":" in make or make == "nothing" else f"nets_of_registry_test:{make}"
    with pytest.raises(UserError) as error:
        network_of(digits_config("sgd", model__factory=factory))
    message = str(error.value)
    assert REFUSED[make] in message
    assert "\n" not in message and len(message) < 600


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet18", "widht=20", "model.options: resnet18 has no 'widht'; did you mean width?"),
        ("resnet18", "width=2.5", "model.options: width=2.5 is of type float; give one of"),
        ("resnet18", "width=0", "model.options: width=0 is too small; give a positive number"),
        ("vit", "dropout=-0.5", "model.options: dropout=-0.5 is too small"),
        ("vit", "depth=True", "model.options: depth=True is of type bool"),
        ("vit", "num_classes=3", "model.options: vit has no 'num_classes'; choose from: patch, "),
        ("mlp", "hidden=(3,)", "model.options: hidden of mlp is a field; set --config.mod"),
        ("mlp", "width=3", "model.options: mlp has no 'width'; it takes none"),
        ("mlp", "3", "model.options: '3' is not a list of keyword arguments"),
        ("vit", "patch=4, patch=2", "with literal values, each once"),
        ("vit", "patch=__import__('os').getpid()", "is not a list of keyword arguments with"),
        ("vit", "**{'patch': 4}", "is not a list of keyword arguments"),
        ("vit", "patch=4) or f(depth=2", "is not a list of keyword arguments"),
        ("vit", "patch=4)(depth=2", "is not a list of keyword arguments"),
        ("vit", "patch=", "is not a list of keyword arguments"),
        ("vti", "", "model.name: unknown value 'vti'; did you mean vit?"),
    ],
)  # fmt: skip
def test_refused_options(name, options, message):
    with pytest.raises(UserError) as error:
        digits_config("sgd", model__name=name, model__options=options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "name", ["convnet", "alexnet", "small_alexnet", "resnet18", "vit", "efficientnet_lite0"]
)
def test_tables_are_no_images(name):
    model = configuration.default().model
    model.name = name
    message = rf"model.name: {name} is for images, not for examples of shape \(5,\); take mlp"
    with pytest.raises(UserError, match=message):
        models.build(model, 3, (5,))


def test_options_are_literals():
    text = "width=20, sizes=(3, 5), pool='mean', share=-.5, none=None, # all of them\n"
    assert registry.parse_options(text) == {
        "width": 20, "sizes": (3, 5), "pool": "mean", "share": -0.5, "none": None,
    }  # fmt: skip
    assert registry.parse_options("  ") == {}


def test_the_dtype_of_an_own_network_is_its_own():
    with pytest.raises(UserError, match="model.dtype: 'bfloat16' is not an argument of nets"):
        own("Small", model__dtype="bfloat16")
    digits_config("sgd", model__name="resnet18", model__dtype="bfloat16")


def test_registered_names():
    @models.register("mine_of_test", fields=("hidden",))
    def mine(num_classes, hidden, input_shape, slope=0.1):
        assert (hidden, input_shape) == ((16,), (8, 8, 1))
        return nn.Sequential([lambda x: x.reshape(len(x), -1), nn.Dense(num_classes)])

    try:
        config = digits_config("sgd", model__name="mine_of_test", model__options="slope=0.5")
        assert list(network_of(config).layers) == ["layers_1"]
        assert models.find(config.model).described(config.model) == "mine_of_test(slope=0.5)"
    finally:
        del models.REGISTRY["mine_of_test"]
    with pytest.raises(UserError, match="model.name: unknown value 'mine_of_test'"):
        configuration.validate(config)
    with pytest.raises(ValueError, match="'mlp' is one of bpnjax; choose another name"):
        models.register("mlp")
    with pytest.raises(ValueError, match="no field 'width'; choose from: hidden, channels"):
        models.register("other", fields=("width",))


def test_the_search_path_is_left_as_it_was(folder, monkeypatch):
    # As with the console script, whose first place is not the current folder.
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(folder))])
    before = list(sys.path)
    (folder / "late_of_registry_test.py").write_text("from nets_of_registry_test import Small\n")
    assert registry.load_function("late_of_registry_test:Small", "model.factory")(2).width == 8
    assert sys.path == before


def test_every_network_of_the_package_has_the_shape_of_its_classes():
    widths = {"alexnet": (2, 2, 2, 2, 2), "small_alexnet": (2, 2, 2, 2, 2)}
    options = {"resnet18": "width=2", "vit": "dim=4, heads=2, depth=1"}
    for name in (
        "mlp", "convnet", "alexnet", "small_alexnet", "resnet18", "vit", "efficientnet_lite0",
    ):  # fmt: skip
        model = configuration.default().model
        model.name, model.options = name, options.get(name, "")
        model.channels, model.hidden = widths.get(name, (2, 2)), (3, 3)
        x = jax.ShapeDtypeStruct((2, 64, 64, 3), "float32")
        network = networks.from_linen(models.build(model, 7), x)
        params, variables = jax.eval_shape(network.init, jax.random.key(0))
        out, _ = jax.eval_shape(
            lambda p, v, x, n=network: n.apply(p, {}, x, variables=v), params, variables, x
        )
        assert out.shape == (2, 7) and list(network.layers)[-1] == "output"
