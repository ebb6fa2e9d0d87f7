"""Frozen convolutions run once: what they give takes the images' place in a sequence.

A network whose convolutions start from pretrained weights and have a learning rate of 0 computes
the same features of an image in every epoch, method and seed. With ``train.features_once`` they
are computed before training, kept in the cache folder, and the network that is trained begins
behind them.
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
from bpnjax.utils import prng
from bpnjax.utils.errors import UserError

_BATCH = 500


def load(config: ConfigDict) -> tuple[ConfigDict, TaskSequence]:
    """Loads a run's sequence, of features where its configuration asks for them.

    Args:
      config: a validated run configuration.

    Returns:
      The configuration of what is trained, which is ``config`` itself unless layers were run once
      and are gone, and its `TaskSequence`.

    Raises:
      UserError: the sets cannot be had, or the convolutions do not stay as they are.
    """
    return once(config, load_sequence(config))


def once(config: ConfigDict, sequence: TaskSequence) -> tuple[ConfigDict, TaskSequence]:
    """Replaces the images of a sequence by the features of frozen convolutions, if so asked.

    Args:
      config: a validated run configuration.
      sequence: of images.

    Returns:
      The configuration without the rates of the layers that are gone, and the sequence: images f32
      ``[n, d]``, to be taken as they are, and what made them in ``extractor``.

    Raises:
      UserError: the network has no features, or its convolutions may change.
    """
    if not config.train.features_once:
        return config, sequence
    if config.resume_from:
        raise UserError(
            "train.features_once: a run goes on behind another's tasks with the whole network; "
            "leave it out beside --resume_from"
        )
    if config.dataset.augment != "none":
        raise UserError(
            f"train.features_once: with dataset.augment={config.dataset.augment} an image differs "
            "from epoch to epoch; leave one of the two out"
        )
    shape = sequence.train.images.shape[1:]
    x = jnp.zeros((1, *shape), jnp.float32)
    name = models.find(config.model).name
    if name != "small_alexnet" or len(shape) != 3:
        raise UserError(
            f"train.features_once: model.name={name} on {shape} has no features; it "
            "is for small_alexnet on images"
        )
    model = models.build(config.model, sequence.num_classes)
    if not config.model.pretrained:
        raise UserError(
            "train.features_once: model.pretrained is empty; name the model.safetensors of python "
            "-m bpnjax.pretrain"
        )
    params = jax.eval_shape(partial(model.init, features=True), prng.key(0), x)["params"]
    _check_frozen(config, params, sequence)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), params)
    try:
        params, _ = pretrained.start_from(params, pretrained.load(config.model))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"model.pretrained: {error}") from error
    extractor = Extractor(
        jax.tree.map(np.asarray, params), shape, sequence.scale, sequence.shift,
        sequence.train.images.dtype,
    )  # fmt: skip

    @jax.jit
    def features_of(images: Any) -> jax.Array:
        x = images.astype(jnp.float32) * sequence.scale + sequence.shift
        found: Any = model.apply({"params": params}, x, features=True)
        return found.astype(jnp.float32)

    def replaced(split: Split) -> Split:
        folder = _folder(config, extractor, split.images)
        found = cache.read(folder)
        if found is None:
            computed = {"features": _in_batches(features_of, split.images)}
            cache.write(folder, computed)
            found = cache.read(folder) or computed
        return dataclasses.replace(split, images=found["features"])

    config = config.copy_and_resolve_references()
    rules = optim.parse_rates(config.train.rates)
    left = [(p, c) for p, c in rules if not any(re.fullmatch(p, layer) for layer in params)]
    config.train.rates = ";".join(f"{pattern}={factor}" for pattern, factor in left)
    return config, dataclasses.replace(
        sequence, train=replaced(sequence.train), test=replaced(sequence.test), extractor=extractor,
        scale=np.ones(1, np.float32), shift=np.zeros(1, np.float32),
    )  # fmt: skip


def _check_frozen(config: ConfigDict, layers: Iterable[str], sequence: TaskSequence) -> None:
    rules = optim.parse_rates(config.train.rates)
    for layer in layers:
        rate = next((c for pattern, c in rules if re.fullmatch(pattern, layer)), 1.0)
        if rate:
            raise UserError(
                f"train.features_once: {layer} learns; freeze it with "
                "--config.train.rates='conv_.*=0'"
            )
        for field, found in REGISTRY[config.method].fields.items():
            group, name = field.split(".")
            if found.setting.pattern and re.fullmatch(config[group][name], layer):
                raise UserError(
                    f"train.features_once: {field}={config[group][name]!r} gives {layer} a part in "
                    f"the tasks; leave it out, as --config.{field}='fc6|fc7|output'"
                )
    if sequence.permuted:
        raise UserError(
            "train.features_once: permuted pixels give each task features of its own; set it to "
            "False"
        )


def _folder(config: ConfigDict, extractor: Extractor, images: Any) -> pathlib.Path:
    """Where features are kept: by the images and all that makes the one of the other."""
    digest = hashlib.blake2b(config.model.dtype.encode(), digest_size=12)
    parts = [*jax.tree.leaves(extractor.params), extractor.scale, extractor.shift, images]
    for part in parts:
        digest.update(str(part.shape).encode() + np.ascontiguousarray(part).tobytes())
    return cache.cache_root(config.dataset.cache_dir) / "features" / digest.hexdigest()


def _in_batches(function: Callable[[np.ndarray], jax.Array], images: Any) -> np.ndarray:
    """Rows in batches of one size, the last one padded, so that one program serves all."""
    found = []
    for start in range(0, len(images), _BATCH):
        part = np.asarray(images[start : start + _BATCH])
        padded = np.pad(part, [(0, _BATCH - len(part)), *[(0, 0)] * (part.ndim - 1)])
        found.append(np.asarray(function(padded))[: len(part)])
    return np.concatenate(found)
