"""The run configuration: every field with its meaning, and the checks that say what to change."""

import pathlib
import types

from ml_collections import ConfigDict

from bpnjax.config import checks
from bpnjax.utils.errors import UserError, suggest


def default() -> ConfigDict:
    """The default configuration; files in ``configs/`` change a few fields of it.

    Returns:
      A `ConfigDict` of all fields. Those read from files are locked: a field that is not here
      cannot be set.
    """
    c = ConfigDict()
    c.name = "run"  # of the experiment; part of the default workdir
    c.method = "bd_ewc"  # a name of bpnjax.methods.REGISTRY
    c.seed = 0  # of the first seed
    c.num_seeds = 1  # seeds seed, seed + 1, ... trained in one program
    c.devices = "all"  # "all" or a number of devices to spread the work over
    c.log = ""  # metrics.jsonl also as: csv (metrics.csv), tensorboard, or "csv,tensorboard"
    c.resume_from = ""  # a run's folder, or a model, whose tasks are the first ones of this run

    c.compilation_cache = True  # keep compiled programs in the cache folder, for the next run

    c.dataset = ConfigDict()
    c.dataset.name = "mnist"  # a TFDS set, "digits" or "gaussians"; several separated by commas
    c.dataset.train_split = "train"  # of TFDS, to train on, as "train+validation"; or one a set
    c.dataset.data_dir = ""  # where prepared TFDS sets are; "" is TFDS's default
    c.dataset.manual_dir = ""  # where the official archives are, if they cannot be downloaded
    c.dataset.cache_dir = ""  # where decoded pictures go; "" is the user's cache folder
    c.dataset.validation = 0.0  # share of each class's training examples held out
    c.dataset.normalize = "standard"  # standard (zero mean, unit sd per channel), imagenet (its
    # mean and sd, of pictures in colour), unit, none
    c.dataset.device_mb = 0.0  # pictures of a split beyond it stream; 0: half of an accelerator's
    c.dataset.resize = ()  # (height, width, channels) for sets of other or mixed sizes
    c.dataset.augment = "none"  # none: pictures are squeezed into that shape. crop_flip: it is cut
    # out of them, to train at random and mirrored half the time, else the middle
    c.dataset.resize_shorter = 256  # crop_flip: their shorter side before that
    c.dataset.workers = 0  # crop_flip: processes that decode; 0: threads of this one

    c.sequence = ConfigDict()
    c.sequence.kind = "class_split"  # class_split, permuted (pixels), datasets (one set a task)
    c.sequence.num_tasks = 5
    c.sequence.classes_per_task = 2  # class_split
    c.sequence.order_seed = -1  # class_split: -1 keeps the set's class order, else shuffles it
    c.sequence.classes = ""  # class_split: the tasks spelled out, "0,1;0,2", instead of the above
    c.sequence.heads = "single"  # single (one output layer for all), multi (each task has its own)
    c.sequence.examples_per_task = 0  # > 0: so many training examples of each task, drawn once
    c.sequence.first_identity = True  # permuted: the first task keeps the pixels' order

    c.model = ConfigDict()
    c.model.name = "mlp"  # mlp, convnet, alexnet, small_alexnet (for 32 x 32 pixels)
    c.model.hidden = (300, 300, 300, 300, 300)  # widths of the hidden layers; two of alexnet
    c.model.channels = (32, 64)  # widths of the convolutions before them; five of alexnet
    c.model.dropout = 0.5  # alexnets: share of the inputs of hidden layers dropped in training
    c.model.pretrained = ""  # starts from this model.safetensors (bpnjax.pretrain), all but the
    # output; alexnet also from torchvision's .pth or .safetensors
    c.model.kernel_init = "lecun_normal"  # lecun, he or glorot, each _normal or _uniform
    c.model.dtype = "float32"  # of the computation; parameters stay float32

    c.train = ConfigDict()
    c.train.epochs = 5  # a task
    c.train.epochs_per_task = ()  # of each task, instead; joint takes the largest
    c.train.batch_size = 128
    c.train.optimizer = "adam"  # of the shared parameters: a name of bpnjax.optim.OPTIMIZERS
    c.train.learning_rate = 3e-4  # of the shared parameters
    c.train.rates = ""  # of layers, as factors on it: "conv_.*=0;output=10", first match; 0 freezes
    c.train.features_once = False  # small_alexnet: run its convolutions, frozen by rates, once
    c.train.rate_decay = 0.0  # d: in task t = 0, 1, ... that rate is divided by 1 + d t
    c.train.rate_drops = ()  # shares of a task's epochs, as (0.75, 0.9), after each of which that
    c.train.rate_drop_factor = 10.0  # rate, and that of W, is divided by so much; not epsilon
    c.train.reset_optimizer = True  # forget the shared optimizer's state at each new task

    c.bd = ConfigDict()
    c.bd.hidden_dim = 100  # H, the inner width of the product M W
    c.bd.epsilon = 0.02  # step of M, against the sign of its gradient
    c.bd.learning_rate = 3e-4  # of W (and of M under gd_ewc), with the optimizer above
    c.bd.layers = ".*"  # which layers get a task bias: a pattern for their whole path

    c.psp = ConfigDict()
    c.psp.layers = ".*"  # which layers' inputs get a key

    c.ewc = ConfigDict()
    c.ewc.strength = 2000.0  # lambda, of lambda/2 sum F (theta - anchor)^2
    c.ewc.fisher = "empirical"  # empirical, true, sampled
    c.ewc.examples = 0  # of a task, drawn once, that its Fisher is the mean over; 0 is all
    c.ewc.anchors = "latest"  # latest, per_task
    c.ewc.decay = 1.0  # ewc_online: factor on earlier Fishers
    c.ewc.form = "proximal"  # proximal (cannot diverge), gradient; also of every other anchor

    c.ewc_kfac = ConfigDict()
    c.ewc_kfac.strength = 10.0  # lambda, of lambda/2 tr(D^T A D G), D = theta - anchor
    c.ewc_kfac.examples = 5000  # of a task, drawn once, for its factors; 0 is all
    c.ewc_kfac.every = 4  # updates of the optimizer for one pull towards the anchor

    c.si = ConfigDict()
    c.si.strength = 0.1  # c, of c sum Omega (theta - anchor)^2
    c.si.damping = 0.1  # xi, in the denominator of Omega
    c.si.clamp = "sum"  # sum, increment, none: what may not become negative

    c.mas = ConfigDict()
    c.mas.strength = 1.0  # lambda, of lambda sum Omega (theta - anchor)^2

    c.slnid = ConfigDict()
    c.slnid.strength = 1e-3  # of the inhibition between units
    c.slnid.scale = 6.0  # the inhibition reaches (width of the layer) / scale units far; 0: all
    c.slnid.discount = "sum"  # of important units: sum (the paper's), max (the code's)
    c.slnid.on = "mas"  # the anchor that it is combined with: mas, ewc, with their fields

    c.imm = ConfigDict()
    c.imm.l2 = 1e-4  # lambda of lambda |theta - theta of the last task|^2; 0 is weight-transfer
    c.imm.drop = 0.0  # share of the hidden units that a step leaves at the last task's weights

    c.lwf = ConfigDict()
    c.lwf.strength = 1.0  # lambda, weight of the earlier answers
    c.lwf.temperature = 2.0
    c.lwf.heads = "tasks"  # tasks (one head an earlier task), seen (all earlier classes together)
    c.lwf.warmup_epochs = 0  # of a later task in which only the output layer is trained

    c.ebll = ConfigDict()  # with the fields of lwf
    c.ebll.layer = ""  # the layer whose input is encoded, by its path; "" is the last one
    c.ebll.code = 100  # width of the codes
    c.ebll.strength = 0.1  # alpha, of alpha/2 |difference of codes|^2
    c.ebll.reconstruction = 0.01  # weight of |x - reconstruction|^2 in an autoencoder's objective
    c.ebll.epochs = 10  # of an autoencoder
    c.ebll.learning_rate = 1e-3  # of an autoencoder, with Adam

    c.gem = ConfigDict()  # gem and agem
    c.gem.memories = 256  # examples kept of each task, or of each of its classes:
    c.gem.per = "task"  # task (as in GEM's code), class (as the BPN paper counts, GEM(n))
    c.gem.margin = 0.5  # gem: least weight of a task's gradient once any is in conflict
    c.gem.damping = 1e-3  # gem: added to the diagonal of the dual
    c.gem.batch_size = 256  # agem: examples of the memory in its reference gradient

    c.replay = ConfigDict()  # er, der, derpp
    c.replay.memory_size = 500  # examples in the reservoir
    c.replay.batch_size = 128  # of them that join a step
    c.replay.alpha = 1.0  # der, derpp: weight of the distance to the logits kept
    c.replay.beta = 0.5  # derpp: weight of the cross-entropy

    c.xdg = ConfigDict()
    c.xdg.gated = 0.8  # share of the hidden units that are silent in a task

    c.plain_bias = ConfigDict()
    c.plain_bias.learning_rate = 1e-2  # of bias_ewc's biases, with the optimizer above

    c.random_bias = ConfigDict()
    c.random_bias.norm = 2.4  # length of each layer's bias vector

    c.parallel = ConfigDict()
    c.parallel.axis = "batch"  # what is spread over devices: batch (and its gradients), or seeds
    c.parallel.backend = "pmap"  # pmap or shard_map, which maps it
    c.parallel.seeds = "auto"  # a device's seeds: vmap (at once), map (in turn); auto: CPU in turn

    c.evaluate = ConfigDict()
    c.evaluate.on = "test"  # test, or validation for choosing hyper-parameters
    c.evaluate.batch_size = 1000
    c.evaluate.every_epochs = 0  # > 0: all tasks so far are also tested every so many epochs
    c.evaluate.every_tasks = 1  # all tasks so far are tested after each so many tasks, and the last
    c.evaluate.infer = "example"  # the mode nobody tells is chosen per example, or per batch
    c.evaluate.rule = "entropy"  # by lowest entropy, max_logit, or statistics (kept per task)
    c.evaluate.statistics = 32  # projections of the input that statistics keeps a Gaussian of
    c.evaluate.inferred_rows = "all"  # all, or last: when task_inferred is measured (T^2 passes)
    c.evaluate.inferred_examples = 0  # of each task, for task_inferred; 0 is all

    c.checkpoint = ConfigDict()
    c.checkpoint.every_steps = 0  # > 0: also inside a task, every so many steps
    c.checkpoint.every_tasks = 1
    c.checkpoint.keep = 2

    c.paper = ConfigDict()  # {method: {...}}: what the paper reports for this experiment
    return c


# Fields that do not change what a run computes: a workdir may be taken up again with others.
FREE_FIELDS = (
    "compilation_cache", "log", "dataset.data_dir", "dataset.manual_dir", "dataset.cache_dir",
    "dataset.device_mb", "dataset.workers", "checkpoint", "paper",
)  # fmt: skip


def flatten(config, prefix: str = "") -> dict:
    """A configuration as one flat dict.

    Args:
      config: a `ConfigDict`, or the nested dict of one.
      prefix: put before each name.

    Returns:
      ``{"a.b": value}``.

    Example:
      >>> from bpnjax.config import flatten
      >>> flatten({"seed": 0, "train": {"epochs": 3}})
      {'seed': 0, 'train.epochs': 3}
    """
    flat = {}
    for key, value in config.items():
        if isinstance(value, (ConfigDict, dict)):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def check_field(config: ConfigDict, field: str) -> None:
    """Makes sure that a configuration has a field.

    Args:
      config: a `ConfigDict`.
      field: its name, ``"train.epochs"``.

    Raises:
      UserError: it has none of this name, and the message says which are near; or it is a group.
    """
    fields = flatten(config)
    groups = {f.rsplit(".", 1)[0] for f in fields if "." in f}
    if field in fields:
        return
    if field in groups:
        raise UserError(f"{field}: is a group of fields; set one of them, as --config.{field}.x=y")
    raise UserError(f"{field}: unknown config field; {suggest(field, fields)}")


def load_file(path: str) -> ConfigDict:
    """Runs a config file and returns what its ``get_config()`` gives.

    Args:
      path: a Python file.

    Returns:
      A locked `ConfigDict` with the fields of `default`.

    Raises:
      UserError: no such file, it raises, or what it returns is not such a configuration.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise UserError(f"--config: no file {path!r}; name a config file, as configs/digits.py")
    try:
        # Not by an import, which would write bytecode beside the file and might trust a stale one.
        module = types.ModuleType("bpnjax_config_file")
        module.__file__ = str(file)
        exec(compile(file.read_bytes(), path, "exec"), module.__dict__)
        get_config = getattr(module, "get_config", None)
        if get_config is None:
            raise UserError(f"--config: {path} defines no get_config(); add one (see configs/)")
        config = get_config()
    except UserError:
        raise
    except BaseException as error:  # a user's file may raise anything, sys.exit included
        if isinstance(error, KeyboardInterrupt):
            raise
        what = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
        raise UserError(f"--config: {path} raises {what}; mend that file") from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"--config: get_config() of {path} returns {type(config).__name__}; return a "
            "ConfigDict, starting from bpnjax.config.default()"
        )
    reference = flatten(default())
    for field in flatten(config):
        if field not in reference and not field.startswith("paper."):
            raise UserError(f"{field}: unknown config field in {path}; {suggest(field, reference)}")
    missing = [field for field in reference if field not in flatten(config)]
    if missing:
        raise UserError(
            f"{missing[0]}: missing in {path}; start from bpnjax.config.default() there"
        )
    return config.lock()


def validate(config: ConfigDict) -> None:
    """Checks all that can be checked without data.

    Args:
      config: a run configuration with the fields of `default`.

    Raises:
      UserError: the first wrong field, its value, and what to change.
    """
    flat, reference = flatten(config), default()
    for field in flat:
        if not field.startswith("paper."):
            check_field(reference, field)
    for complaint in checks.complaints(flat, flatten(reference)):
        raise UserError(complaint)


def differences(old: dict, new: dict) -> list[str]:
    """The fields in which two flat configurations differ.

    Args:
      old: as `flatten` gives.
      new: the same.

    Returns:
      Texts ``"field: old -> new"``. Fields that do not change results, `FREE_FIELDS`, are passed
      over.

    Example:
      >>> from bpnjax.config import differences
      >>> differences({"seed": 0, "dataset.data_dir": ""}, {"seed": 1, "dataset.data_dir": "sets"})
      ['seed: 0 -> 1']
    """
    found = []
    for field in sorted(set(old) | set(new)):
        if any(field == f or field.startswith(f + ".") for f in FREE_FIELDS):
            continue
        a, b = old.get(field, "absent"), new.get(field, "absent")
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            a, b = list(a), list(b)
        if a != b:
            found.append(f"{field}: {a!r} -> {b!r}")
    return found
