"""Networks whose first layers run apart: what goes on behind them is what the whole gives."""

from functools import partial

import jax
import numpy as np
import pytest

from bpnjax import config as configuration
from bpnjax import models
from bpnjax.models.features import has_features, make_extractor
from bpnjax.utils import arrays

OPTIONS = {"resnet18": "width=2", "vit": "dim=4, heads=2, depth=1, pool='token'"}
KNOWN = [name for name, factory in models.REGISTRY.items() if has_features(factory.make)]


def test_networks_with_features():
    assert KNOWN == [
        "convnet", "alexnet", "small_alexnet", "resnet18", "vit", "efficientnet_lite0",
    ]  # fmt: skip
    assert not has_features(lambda num_classes, features: None)


@pytest.mark.parametrize("name", [n for n in KNOWN if n != "efficientnet_lite0"])  # has its own
def test_features_go_on_to_the_same_logits(name):
    model = configuration.default().model
    model.name, model.options = name, OPTIONS.get(name, "")
    model.channels, model.hidden = (2,) * (5 if "alexnet" in name else 2), (3, 3)
    network = models.build(model, 7)
    size = 64 if name == "alexnet" else 16
    x = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), np.uint8)
    images = jax.ShapeDtypeStruct(x.shape, np.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), images)
    kept = jax.eval_shape(partial(network.init, features=True), jax.random.key(0), images)
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda leaf: np.float32(np.abs(rng.normal(0, 0.1, leaf.shape))), shapes
    )
    found, names = arrays.flatten(variables), jax.tree.leaves(arrays.names_of(kept))
    before = {name.removeprefix("params/"): found[name] for name in names}
    scale, shift = np.full(3, 1 / 64, np.float32), np.full(3, -2, np.float32)

    @jax.jit
    def both(x):
        return make_extractor(network, before, scale, shift)(x), network.apply(
            variables, x.astype(np.float32) * scale + shift
        )

    features, expected = both(x)
    behind = jax.eval_shape(network.init, jax.random.key(0), features)
    assert set(behind) == {"params"} and not set(behind["params"]) & set(kept["params"])
    assert variables["params"].keys() == kept["params"].keys() | behind["params"].keys()
    rest = {"params": {layer: variables["params"][layer] for layer in behind["params"]}}
    np.testing.assert_allclose(network.apply(rest, features), expected, rtol=1e-5, atol=1e-5)
