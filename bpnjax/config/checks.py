"""What a configuration must fulfil before any data is touched, and the mend where it does not."""

import math
import pathlib
import re
from collections.abc import Iterator

from bpnjax.run import log_copies
from bpnjax.utils.errors import suggest

KERNEL_INITS = tuple(
    f"{who}_{how}" for who in ("lecun", "he", "glorot") for how in ("normal", "uniform")
)
# Widths of the published network, whose layers are as many in any other.
_ALEXNET = {"model.channels": (64, 192, 384, 256, 256), "model.hidden": (4096, 4096)}
_CHOICES = {
    "dataset.augment": ("none", "crop_flip"),
    "dataset.normalize": ("standard", "imagenet", "unit", "none"),
    "sequence.kind": ("class_split", "permuted", "datasets"),
    "model.name": ("mlp", "convnet", "alexnet", "small_alexnet"),
    "sequence.heads": ("single", "multi"),
    "model.kernel_init": KERNEL_INITS,
    "model.dtype": ("float32", "bfloat16"),
    "ewc.fisher": ("empirical", "true", "sampled"),
    "ewc.anchors": ("latest", "per_task"),
    "ewc.form": ("proximal", "gradient"),
    "slnid.discount": ("sum", "max"),
    "slnid.on": ("mas", "ewc"),
    "lwf.heads": ("tasks", "seen"),
    "gem.per": ("task", "class"),
    "si.clamp": ("sum", "increment", "none"),
    "parallel.axis": ("batch", "seeds"),
    "parallel.backend": ("pmap", "shard_map"),
    "parallel.seeds": ("auto", "vmap", "map"),
    "evaluate.on": ("test", "validation"),
    "evaluate.infer": ("example", "batch"),
    "evaluate.rule": ("entropy", "max_logit", "statistics"),
    "evaluate.inferred_rows": ("all", "last"),
}
_AT_LEAST = {
    "dataset.resize_shorter": 1,
    "dataset.workers": 0,
    "num_seeds": 1,
    "seed": 0,
    "sequence.num_tasks": 1,
    "sequence.classes_per_task": 1,
    "sequence.order_seed": -1,
    "sequence.examples_per_task": 0,
    "train.epochs": 1,
    "train.batch_size": 1,
    "bd.hidden_dim": 1,
    "ewc.examples": 0,
    "ewc_kfac.examples": 0,
    "ewc_kfac.every": 1,
    "lwf.warmup_epochs": 0,
    "ebll.code": 1,
    "ebll.epochs": 1,
    "gem.memories": 1,
    "gem.batch_size": 1,
    "replay.memory_size": 1,
    "replay.batch_size": 1,
    "evaluate.batch_size": 1,
    "evaluate.every_epochs": 0,
    "evaluate.every_tasks": 1,
    "evaluate.inferred_examples": 0,
    "evaluate.statistics": 1,
    "checkpoint.every_steps": 0,
    "checkpoint.every_tasks": 1,
    "checkpoint.keep": 1,
}
_LARGEST_SEED = 2**31 - 1  # larger ones would be cut to 32 bits, or refused, by JAX
_SHARES = ("xdg.gated", "dataset.validation", "imm.drop", "model.dropout")
_POSITIVE = (
    "train.learning_rate",
    "train.rate_drop_factor",
    "bd.epsilon",
    "bd.learning_rate",
    "plain_bias.learning_rate",
    "si.damping",
    "lwf.temperature",
    "ebll.learning_rate",
)
_NOT_NEGATIVE = (
    "dataset.device_mb",
    "train.rate_decay",
    "ewc.strength",
    "ewc.decay",
    "si.strength",
    "lwf.strength",
    "ebll.strength",
    "ebll.reconstruction",
    "slnid.strength",
    "slnid.scale",
    "imm.l2",
    "mas.strength",
    "random_bias.norm",
    "gem.margin",
    "gem.damping",
    "replay.alpha",
    "replay.beta",
)


def complaints(flat: dict, reference: dict) -> Iterator[str]:
    """What is wrong with a configuration, as far as can be said without data.

    Args:
      flat: ``{field: value}`` of all fields, as `bpnjax.config.flatten` gives them.
      reference: the same of the default configuration, whose types count.

    Yields:
      Messages that name the field, its value and the mend. Later checks rely on what earlier ones
      passed: only the first message is sure to be right.

    Raises:
      UserError: `log` names no kind of log.
    """
    yield from _types(flat, reference)
    for check in (_choices, _ranges, _network, _training, _pictures, _patterns, _run):
        yield from check(flat)


def _types(flat, reference) -> Iterator[str]:
    for field, usual in reference.items():
        value, expected = flat[field], type(usual)
        fits = isinstance(value, expected) or (expected is float and isinstance(value, int))
        if not fits or (isinstance(value, bool) and expected is not bool):
            yield (
                f"{field}: {value!r} is of type {type(value).__name__}; give one of type "
                f"{expected.__name__}"
            )


def _choices(flat) -> Iterator[str]:
    from bpnjax import methods, optim  # late: they import JAX

    registered = {"method": tuple(methods.REGISTRY), "train.optimizer": tuple(optim.OPTIMIZERS)}
    for field, allowed in (_CHOICES | registered).items():
        if flat[field] not in allowed:
            yield f"{field}: unknown value {flat[field]!r}; {suggest(flat[field], allowed)}"


def _ranges(flat) -> Iterator[str]:
    for field, least in _AT_LEAST.items():
        if flat[field] < least:
            yield f"{field}: {flat[field]} is below {least}; give at least {least}"
    for field in _POSITIVE:
        if not (flat[field] > 0 and math.isfinite(flat[field])):
            yield f"{field}: {flat[field]} is not a positive number; give one above 0"
    for field in _NOT_NEGATIVE:
        if not (flat[field] >= 0 and math.isfinite(flat[field])):
            yield f"{field}: {flat[field]} is negative or not finite; give 0 or more"
    for field in _SHARES:
        if not 0 <= flat[field] < 1:
            yield f"{field}: {flat[field]} is no share; give 0 up to below 1"
    if flat["seed"] > _LARGEST_SEED:
        yield f"seed: {flat['seed']} is above {_LARGEST_SEED}; give at most that"


def _network(flat) -> Iterator[str]:
    for field in ("model.hidden", "model.channels"):
        if any(not isinstance(width, int) or width < 1 for width in flat[field]):
            yield f"{field}: {flat[field]} has a width below 1; give positive integers"
    for field, widths in _ALEXNET.items() if "alexnet" in flat["model.name"] else ():
        if len(flat[field]) != len(widths):
            yield (
                f"{field}: {flat[field]} has {len(flat[field])} widths and {flat['model.name']} "
                f"{len(widths)} such layers; AlexNet's own are {widths}"
            )
    pretrained = flat["model.pretrained"]
    if pretrained and not pathlib.Path(pretrained).is_file():
        mend = "make one with python -m bpnjax.pretrain and name its model.safetensors"
        if flat["model.name"] == "alexnet":
            mend = (
                "download https://download.pytorch.org/models/alexnet-owt-7be5be79.pth and name it"
            )
        yield f"model.pretrained: no file {pretrained!r}; {mend}"


def _training(flat) -> Iterator[str]:
    per_task = flat["train.epochs_per_task"]
    if any(not isinstance(epochs, int) or epochs < 1 for epochs in per_task):
        yield f"train.epochs_per_task: {per_task} is not positive integers; give one a task"
    drops = flat["train.rate_drops"]
    if any(not isinstance(share, (int, float)) or not 0 < share < 1 for share in drops):
        yield (
            f"train.rate_drops: {drops} is not shares of a task's epochs; give numbers between 0 "
            "and 1, as (0.75, 0.9)"
        )


def _pictures(flat) -> Iterator[str]:
    resize = flat["dataset.resize"]
    positive = all(isinstance(length, int) and length > 0 for length in resize)
    if resize and not (positive and len(resize) == 3 and resize[2] in (1, 3)):
        yield f"dataset.resize: {resize} is no picture shape; give (height, width, 1 or 3)"
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


def _patterns(flat) -> Iterator[str]:
    for field in ("bd.layers", "psp.layers"):
        try:
            re.compile(flat[field])
        except re.error as error:
            yield f"{field}: {flat[field]!r} is no regular expression ({error}); mend it"
    if flat["train.rates"]:
        from bpnjax.optim.partition import parse_rates  # late: it imports JAX

        try:
            parse_rates(flat["train.rates"])
        except ValueError as error:
            yield f"train.rates: {error}"


def _run(flat) -> Iterator[str]:
    log_copies.parse(flat["log"])
    if flat["devices"] != "all" and not flat["devices"].isdecimal():
        yield f"devices: {flat['devices']!r} is neither 'all' nor a number; give one"
