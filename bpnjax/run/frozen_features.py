"""Frozen layers that run only once: their outputs replace the images of a sequence.

A network whose first layers start from pretrained weights and have a learning rate of 0 computes
the same features of an image in every epoch, method and seed. With ``train.features_once`` they are
computed before training and stored in the cache folder, and only the layers behind them are
trained. The network says where the features end (`bpnjax.models.features`).
"""

import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from bpnjax import models, optim
from bpnjax.data import TaskSequence, cache, load_sequence
from bpnjax.data.sequence import Extractor, Split
from bpnjax.methods import REGISTRY
from bpnjax.models import pretrained
from bpnjax.models.features import has_features, make_extractor
from bpnjax.models.registry import said
from bpnjax.utils import prng
from bpnjax.utils.arrays import flatten, names_of
from bpnjax.utils.errors import UserError

_PIXELS = 500 * 32 * 32  # pixels in a batch, which limits its number of images


def load(config: ConfigDict) -> tuple[ConfigDict, TaskSequence]:
    """Loads the sequence of a run, with features in place of images if configured.

    Args:
      config: a validated run configuration.

    Returns:
      The configuration of what is trained, and its `TaskSequence`. The configuration is ``config``
      itself unless layers were replaced by their outputs.

    Raises:
      UserError: a set cannot be loaded, or the layers are not frozen.
    """
    return once(config, load_sequence(config))


def once(config: ConfigDict, sequence: TaskSequence) -> tuple[ConfigDict, TaskSequence]:
    """Replaces the images of a sequence by the features of frozen layers, if configured.

    Args:
      config: a validated run configuration.
      sequence: a sequence of images.

    Returns:
      The configuration without the rates of the replaced layers, and the sequence. Its images are
      features f32 ``[n, d]`` without normalisation, and ``extractor`` has the layers.

    Raises:
      UserError: the network has no features, or the layers before them are not frozen.
    """
    if not config.train.features_once:
        return config, sequence
    if config.resume_from:
        raise UserError(
            "train.features_once: a run that resumes from another one needs the whole network; "
            "leave it out with --resume_from"
        )
    if config.dataset.augment != "none":
        raise UserError(
            f"train.features_once: with dataset.augment={config.dataset.augment} an image differs "
            "from epoch to epoch; leave one of the two out"
        )
    shape, factory = sequence.train.images.shape[1:], models.find(config.model)
    model = models.build(config.model, sequence.num_classes, shape)
    if not has_features(type(model)) or len(shape) != 3:
        known = (name for name, found in models.REGISTRY.items() if has_features(found.make))
        raise UserError(
            f"train.features_once: {factory.field}={factory.name} on {shape} has no features; it "
            f"is for networks on images whose __call__ takes features=True: {', '.join(known)}"
        )
    if not config.model.pretrained:
        raise UserError(
            "train.features_once: model.pretrained is empty; name the model.safetensors of python "
            "-m bpnjax.pretrain"
        )
    x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    frozen, behind = _parts(model, x, f"{factory.field}: {factory.name}")
    _check_frozen(config, frozen, behind, sequence)
    extractor = Extractor(
        _weights(config, frozen), shape, sequence.scale, sequence.shift, sequence.train.images.dtype
    )
    features_of = make_extractor(model, extractor.arrays, sequence.scale, sequence.shift)

    def replaced(split: Split) -> Split:
        found = _features(_folder(config, extractor), features_of, split.images)
        return dataclasses.replace(split, images=found)

    config = config.copy_and_resolve_references()
    config.train.rates = ";".join(
        f"{pattern}={factor}"
        for pattern, factor in optim.parse_rates(config.train.rates)
        if _matches(pattern, _layers(behind)) or not _matches(pattern, _layers(frozen["params"]))
    )
    return config, dataclasses.replace(
        sequence, train=replaced(sequence.train), test=replaced(sequence.test), extractor=extractor,
        scale=np.ones(1, np.float32), shift=np.zeros(1, np.float32),
    )  # fmt: skip


def _parts(model: Any, x: jax.ShapeDtypeStruct, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shapes of the variables before the features, and of the parameters behind them."""
    before = partial(model.init, features=True)
    try:
        frozen = jax.eval_shape(before, prng.key(0), x)
        features = jax.eval_shape(partial(model.apply, features=True), frozen, x)
        behind = jax.eval_shape(model.init, prng.key(0), features)["params"]
    except ValueError as error:  # for example, the images are too small for the network
        raise UserError(f"{name}: {said(error)}") from error
    return frozen, behind


def _weights(config: ConfigDict, frozen: dict[str, Any]) -> dict[str, np.ndarray]:
    """The pretrained arrays of the frozen layers, by path."""
    arrays = pretrained.load(config.model)
    try:
        params, statistics = pretrained.start_from(
            frozen["params"], arrays, statistics=frozen.get("batch_stats")
        )
    except ValueError as error:
        raise UserError(f"model.pretrained: {error}") from error
    found = flatten(params)
    if statistics is not None:
        found |= flatten({"batch_stats": statistics})
    return found


def _layers(params: dict[str, Any]) -> list[str]:
    """The paths of modules that own parameters."""
    paths = jax.tree.leaves(names_of(params))
    return list(dict.fromkeys(path.rpartition("/")[0] for path in paths))


def _matches(pattern: str, layers: Iterable[str]) -> bool:
    return any(re.fullmatch(pattern, layer) for layer in layers)


def _check_frozen(
    config: ConfigDict, frozen: dict[str, Any], behind: dict[str, Any], sequence: TaskSequence
) -> None:
    rules = optim.parse_rates(config.train.rates)
    # A pattern for the parts behind the features, which the error messages recommend.
    layers = _layers(behind)
    rest = [name if name in layers else f"{name}/.*" for name in behind]
    for layer in _layers(frozen["params"]):
        rate = next((c for pattern, c in rules if re.fullmatch(pattern, layer)), 1.0)
        if rate:
            raise UserError(
                f"train.features_once: {layer} learns; freeze it with "
                f"--config.train.rates='(?!{'|'.join(behind)}).*=0'"
            )
        for field, found in REGISTRY[config.method].fields.items():
            group, name = field.split(".")
            if found.setting.pattern and re.fullmatch(config[group][name], layer):
                raise UserError(
                    f"train.features_once: {field}={config[group][name]!r} includes the frozen "
                    f"layer {layer}; leave it out, as --config.{field}='{'|'.join(rest)}'"
                )
    if frozen.get("batch_stats") and config.model.batch_statistics != "frozen":
        raise UserError(
            f"model.batch_statistics: with {config.model.batch_statistics!r} the norms before the "
            "features learn (train.features_once); freeze them with "
            "--config.model.batch_statistics=frozen"
        )
    if sequence.permuted:
        raise UserError(
            "train.features_once: with permuted pixels each task has its own features; set it to "
            "False"
        )


def _features(
    folder: pathlib.Path, features_of: Callable[[np.ndarray], jax.Array], images: Any
) -> np.ndarray:
    """Features of images, of which only those that the folder does not hold are computed.

    An image is known by its content, so that a part of a set, to validate on say, finds its own.
    """
    names = _contents(images)
    parts = [cache.read(part) or {} for part in sorted(folder.glob("[!.]*"))]
    known = {name for part in parts for name in part["contents"].tolist()}
    new = {name: row for row, name in enumerate(names.tolist()) if name not in known}
    if new:
        computed = {
            "contents": np.array(list(new), names.dtype),
            "features": _in_batches(features_of, _Rows(images, np.fromiter(new.values(), int))),
        }
        digest = hashlib.blake2b(computed["contents"].tobytes(), digest_size=12).hexdigest()
        cache.write(folder / digest, computed)
        parts.append(cache.read(folder / digest) or computed)
    for part in parts:
        if np.array_equal(part["contents"], names):
            return part["features"]  # as it lies on disk
    found = np.empty((len(names), *parts[0]["features"].shape[1:]), np.float32)
    for part in parts:
        row_of = {name: row for row, name in enumerate(part["contents"].tolist())}
        pairs = [(i, row_of[name]) for i, name in enumerate(names.tolist()) if name in row_of]
        if pairs:
            places, rows = np.array(pairs).T
            found[places] = part["features"][rows]
    return found


class _Rows:
    """Some rows of an array, taken when they are asked for."""

    def __init__(self, array: Any, rows: np.ndarray) -> None:
        self.array, self.rows = array, rows
        self.shape = (len(rows), *array.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, places: slice) -> Any:
        return self.array[self.rows[places]]


def _contents(images: Any) -> np.ndarray:
    """A digest of each image, ``[n]`` of 24 characters."""
    found = [
        hashlib.blake2b(np.ascontiguousarray(images[row]).tobytes(), digest_size=12).hexdigest()
        for row in range(len(images))
    ]
    return np.array(found, "S24")


def _folder(config: ConfigDict, extractor: Extractor) -> pathlib.Path:
    """The folder of cached features, by everything but the image that determines them."""
    network = f"{models.find(config.model).described(config.model)} {config.model.dtype}"
    digest = hashlib.blake2b(network.encode(), digest_size=12)
    for name, array in sorted(extractor.arrays.items()):
        digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
    for part in (extractor.scale, extractor.shift):
        digest.update(str(part.shape).encode() + np.ascontiguousarray(part).tobytes())
    digest.update(f"{extractor.dtype} {extractor.shape}".encode())
    return cache.cache_root(config.dataset.cache_dir) / "features" / digest.hexdigest()


def _in_batches(function: Callable[[np.ndarray], jax.Array], images: Any) -> np.ndarray:
    """Computes rows in batches of one size, with the last one padded, so one program serves all."""
    batch = max(1, _PIXELS // int(np.prod(images.shape[1:3])))
    found = []
    for start in range(0, len(images), batch):
        part = np.asarray(images[start : start + batch])
        padded = np.pad(part, [(0, batch - len(part)), *[(0, 0)] * (part.ndim - 1)])
        found.append(np.asarray(function(padded))[: len(part)])
    return np.concatenate(found)
