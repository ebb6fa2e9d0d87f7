"""Checks of a configuration before any data is read, with messages that say what to change."""

import importlib.util
import pathlib
from collections.abc import Iterator
from typing import Any

from bpnjax.utils.errors import UserError, suggest

_LOGS = ("csv", "tensorboard")

# The number of layers is fixed by the network, so the widths of the published one give it.
_ALEXNET = {"model.channels": (64, 192, 384, 256, 256), "model.hidden": (4096, 4096)}


def complaints(flat: dict[str, Any]) -> Iterator[str]:
    """Says what is wrong with a configuration, as far as this is known without data.

    Args:
      flat: ``{field: value}`` of all fields, from `bpnjax.config.flatten`.

    Yields:
      Messages with the field, its value and what to do. Later checks rely on earlier ones, so only
      the first message is sure to be right.

    Raises:
      UserError: `log` names an unknown kind, or there is no such network or option of it.
    """
    for check in (_fields, _network, _training, _own_data, _images, _patterns, _run):
        yield from check(flat)


def log_kinds(text: str) -> list[str]:
    """The kinds of copies of ``metrics.jsonl`` that the field `log` names.

    Args:
      text: names separated by commas, or empty.

    Returns:
      Names from csv and tensorboard.

    Raises:
      UserError: a name is unknown, or a package is not installed.

    Example:
      >>> from bpnjax.config.checks import log_kinds
      >>> log_kinds("csv")
      ['csv']
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in _LOGS:
            raise UserError(f"log: unknown value {name!r}; choose from: {', '.join(_LOGS)}")
    if "tensorboard" in names and importlib.util.find_spec("tensorboardX") is None:
        raise UserError(
            "log: 'tensorboard' needs a package that is not installed; pip install tensorboardX"
        )
    return names


def _fields(flat: dict[str, Any]) -> Iterator[str]:
    from bpnjax.config.fields import entries  # here, because it imports JAX
    from bpnjax.methods import REGISTRY

    for field, entry in entries().items():
        if complaint := entry.setting.complaint(flat[field], entry.default):
            yield f"{field}: {complaint}"
    if flat["method"] not in REGISTRY:
        yield f"method: unknown value {flat['method']!r}; {suggest(flat['method'], REGISTRY)}"


def _network(flat: dict[str, Any]) -> Iterator[str]:
    from bpnjax.models import registry  # here, because it imports JAX
    from bpnjax.models.pretrained import file_of

    model = {f.removeprefix("model."): v for f, v in flat.items() if f.startswith("model.")}
    factory = registry.find(model)
    factory.check(registry.parse_options(model["options"]))
    if model["dtype"] != "float32" and "dtype" not in factory.fields:
        yield (
            f"model.dtype: {model['dtype']!r} is not an argument of {factory.name}; leave it out,"
            " and set the dtype in the network"
        )
    for field in ("model.hidden", "model.channels"):
        if any(not isinstance(width, int) or width < 1 for width in flat[field]):
            yield f"{field}: {flat[field]} has a width below 1; give positive integers"
    for field, widths in _ALEXNET.items() if factory.name.endswith("alexnet") else ():
        if len(flat[field]) != len(widths):
            yield (
                f"{field}: {flat[field]} has {len(flat[field])} widths and {flat['model.name']} "
                f"{len(widths)} such layers; AlexNet's own are {widths}"
            )
    pretrained = file_of(model)
    if pretrained and not pathlib.Path(pretrained).is_file():
        fix = "make one with python -m bpnjax.pretrain and name its model.safetensors"
        if factory.name == "alexnet":
            fix = (
                "download https://download.pytorch.org/models/alexnet-owt-7be5be79.pth and name it"
            )
        yield f"model.pretrained: no file {pretrained!r}; {fix}"
    if model["mapping"]:
        if not pretrained:
            yield (
                f"model.mapping: {model['mapping']!r} has nothing to convert; name the file of "
                "weights, as --config.model.pretrained=FILE"
            )
        registry.load_function(model["mapping"], "model.mapping")


def _training(flat: dict[str, Any]) -> Iterator[str]:
    per_task = flat["train.epochs_per_task"]
    if any(not isinstance(epochs, int) or epochs < 1 for epochs in per_task):
        yield f"train.epochs_per_task: {per_task} is not positive integers; give one per task"
    drops = flat["train.rate_drops"]
    if any(not isinstance(share, (int, float)) or not 0 < share < 1 for share in drops):
        yield (
            f"train.rate_drops: {drops} is not shares of a task's epochs; give numbers between 0 "
            "and 1, as (0.75, 0.9)"
        )


def _own_data(flat: dict[str, Any]) -> Iterator[str]:
    if not flat["dataset.path"]:
        return
    from bpnjax.data import files  # here, because it imports JAX

    for path in files.paths_in(flat["dataset.path"]):
        if wrong := files.complaint(path):
            yield f"dataset.path: {wrong}"


def _images(flat: dict[str, Any]) -> Iterator[str]:
    resize = flat["dataset.resize"]
    positive = all(isinstance(length, int) and length > 0 for length in resize)
    if resize and not (positive and len(resize) == 3 and resize[2] in (1, 3)):
        yield f"dataset.resize: {resize} is not an image shape; give (height, width, 1 or 3)"
    if flat["dataset.augment"] == "none":
        return
    if not resize:
        yield (
            "dataset.resize: () leaves open what dataset.augment cuts out; give (height, width, "
            "1 or 3)"
        )
    if flat["dataset.resize_shorter"] < max(resize[:2]):
        yield (
            f"dataset.resize_shorter: {flat['dataset.resize_shorter']} is below the "
            f"{max(resize[:2])} pixels of dataset.resize; give at least that"
        )
    if flat["num_seeds"] > 1:
        yield (
            f"num_seeds: {flat['num_seeds']} seeds draw crops of their own; with dataset.augment "
            "run them one by one, each with its --config.seed"
        )


def _patterns(flat: dict[str, Any]) -> Iterator[str]:
    if flat["train.rates"]:
        from bpnjax.optim.partition import parse_rates  # here, because it imports JAX

        try:
            parse_rates(flat["train.rates"])
        except ValueError as error:
            yield f"train.rates: {error}"


def _run(flat: dict[str, Any]) -> Iterator[str]:
    from bpnjax.config.fields import COMMON  # here, because it imports JAX

    log_kinds(flat["log"])
    last = flat["seed"] + flat["num_seeds"] - 1
    if COMMON["seed"].setting.complaint(last, 0):
        yield f"num_seeds: {flat['num_seeds']} from seed {flat['seed']} on end at {last}; lower one"
    if flat["devices"] != "all" and not flat["devices"].isdecimal():
        yield f"devices: {flat['devices']!r} is neither 'all' nor a number; give one"
