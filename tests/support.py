"""A small run in pieces, for tests of what happens inside one."""

import io
from functools import partial

import jax
import pytest
from PIL import Image

from bpnjax import config as configuration
from bpnjax.data import load_sequence
from bpnjax.evaluation.accuracy import accuracies
from bpnjax.methods import REGISTRY
from bpnjax.training import epochs
from bpnjax.training.evaluate import evaluate
from bpnjax.training.experiment import make_experiment
from bpnjax.training.task_data import make_reader, put_on_device

# Parts of compositions that protect no shared parameter: each is run inside a composition.
PARTS = ("bd", "gd", "gd_matched", "plain_bias", "random_bias")
# With compositions whose every part is in another method: what has nothing of its own.
COMPOSED = (
    *PARTS, "bd_ewc_kfac", "bd_frozen", "bd_psp_ewc", "bd_psp_ewc_kfac", "bias_frozen", "gd_ewc",
    "gd_matched_ewc", "xdg_ewc",
)  # fmt: skip
# Their network stays as it is, here at random weights: it has to be wider.
FROZEN = ("bd_frozen", "bias_frozen", "frozen")
# Answer from the features of a network that never moves: their steps change nothing.
ANALYTIC = ("fecam", "joint_ridge", "ncm", "ranpac", "slda")


def whole_registry(*costly):
    """All methods for a costly test; those in `COMPOSED` and ``costly`` run with ``-m slow`` only.

    Args:
      *costly: names of further ones.
    """
    return marked_slow(*COMPOSED, *costly)


def marked_slow(*costly):
    """All methods, some of which run with ``-m slow`` only."""
    marks = {True: pytest.mark.slow, False: ()}
    return [pytest.param(m, marks=marks[m in costly]) for m in sorted(REGISTRY)]


def digits_config(method, **changes):
    """Three tasks of two digits and a network of 16 units; ``a__b=value`` sets ``a.b``."""
    config = configuration.default()
    config.dataset.name = "digits"
    config.sequence.num_tasks = 3
    config.model.hidden = (16,)
    config.train.batch_size = 48
    config.train.learning_rate = 3e-3
    config.train.epochs = 16
    config.bd.hidden_dim = 8
    config.bd.learning_rate = 3e-3
    config.ewc.strength = 0.002
    config.mas.strength = 0.01
    config.slnid.anchor_strength = 0.01
    config.random_bias.norm = 1.0
    config.ebll.code = 8
    config.ebll.epochs = 2
    config.gem.memories = 40
    config.ranpac.features = 100
    config.replay.memory_size = 60
    config.replay.batch_size = 24
    config.method = method
    config.update_from_flattened_dict(
        {field.replace("__", "."): value for field, value in changes.items()}
    )
    configuration.validate(config)
    return config


class Jitted:
    """The programs of one method, jitted, with a count of the traces of its step."""

    def __init__(self, config):
        self.config = config
        self.sequence = load_sequence(config)
        self.experiment = make_experiment(config, self.sequence)
        self.learner = self.experiment.learner
        self.data = put_on_device(self.sequence)
        self.traces = 0

        def run_steps(*args):
            self.traces += 1
            return epochs.run_steps(self.experiment, *args)

        self.run_steps = jax.jit(run_steps)
        self.init = jax.jit(partial(epochs.init_state, self.experiment))
        self.begin_task = jax.jit(partial(epochs.begin_task, self.experiment))
        self.end_task = jax.jit(partial(epochs.end_task, self.experiment))
        self.evaluate = jax.jit(partial(evaluate, self.experiment), static_argnames="in_training")

    def steps(self, task):
        """How many steps an epoch of a task has."""
        return epochs.steps_per_epoch(self.experiment, self.sequence, task)

    def train(self, key, tasks=None, epochs=None):
        """Trains some tasks in turn; returns the state and the sums of the last epoch."""
        state = self.init(key)
        for task in range(self.sequence.num_tasks) if tasks is None else tasks:
            state, sums = self.train_task(state, task, epochs)
        return state, sums

    def train_task(self, state, task, epochs=None):
        """Begins, trains and ends a task; returns the state and the sums of the last epoch."""
        state = self.begin_task(state, task)
        for epoch in range(epochs or self.config.train.epochs):
            state, sums = self.run_steps(state, self.data, task, epoch, 0, self.steps(task))
        return self.end_task(state, self.data, task), sums

    def test(self, state, row):
        """The three accuracies after task ``row``."""
        return accuracies(self.evaluate(state, self.data, row, True), self.sequence.test.count)

    def epoch(self, key, task, epoch):
        """The batches of an epoch in their order: inputs as they are stored, and labels."""
        slots, count = epochs.epoch_order(self.experiment, key, self.data.train, task, epoch)
        reader = make_reader(self.experiment, key, self.data, task)
        x, y = reader.take(self.data.train, slots[: int(count)])
        size = self.config.train.batch_size
        return [(x[i : i + size], y[i : i + size]) for i in range(0, int(count), size)]


def changed(state, **fields):
    """A state of a run with some parts of the learner's replaced."""
    return state.replace(learner=state.learner.replace(**fields))


def encoded(pixels, kind="PNG"):
    """An image as the bytes of a file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return file.getvalue()


def write_prepared(data_dir, name, splits, **more):
    """Writes a set as TFDS does: ``splits`` is {split: [(bytes of an image, label)]}.

    A set that TFDS knows gets the features of its builder, what its examples have beside images
    and labels from the functions ``more``, else text; any other has these two, of ``classes``.
    """
    import tensorflow_datasets as tfds

    if "classes" in more:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(num_classes=more.pop("classes")),
            }
        )
    else:
        features = tfds.builder_cls(name)(data_dir=str(data_dir / "unused")).info.features

    def examples(rows):
        for i, (image, label) in enumerate(rows):
            example = {"image": io.BytesIO(image), "label": label}
            for k in set(features) - set(example):
                example[k] = more[k]() if k in more else f"text {i}"
            yield i, example

    body = {
        "__module__": __name__, "name": name, "VERSION": tfds.core.Version("3.0.0"),
        "_info": lambda self: tfds.core.DatasetInfo(builder=self, features=features),
        "_split_generators": lambda self, _: {s: examples(rows) for s, rows in splits.items()},
        "_generate_examples": None,
    }  # fmt: skip
    with tfds.core.registered.skip_registration():
        builder = type(name, (tfds.core.GeneratorBasedBuilder,), body)
    builder(data_dir=str(data_dir), file_format="array_record").download_and_prepare()
