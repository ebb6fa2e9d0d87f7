"""A small run in pieces, for tests of what happens inside one."""

import io
from functools import partial

import jax
import pytest
from PIL import Image

from bpnjax import config as configuration
from bpnjax.data import load_sequence
from bpnjax.evaluation.accuracy import accuracies, evaluate
from bpnjax.methods import REGISTRY
from bpnjax.run.setup import make_problem
from bpnjax.training import epochs
from bpnjax.training.task_data import make_view, put_on_device

# Compositions whose every part is in another method of the registry, with nothing of their own.
COMPOSED = ("bd_ewc_kfac", "bd_psp_ewc", "bd_psp_ewc_kfac", "gd_ewc", "gd_matched_ewc", "xdg_ewc")


def whole_registry(*costly):
    """All methods for a costly test; left to ``-m slow`` are those made of others' parts, and more.

    Args:
      *costly: names of further ones.
    """
    marks = {True: pytest.mark.slow, False: ()}
    return [pytest.param(m, marks=marks[m in (*COMPOSED, *costly)]) for m in sorted(REGISTRY)]


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
    config.ewc.strength = 5.0
    config.mas.strength = 0.01
    config.random_bias.norm = 1.0
    config.ebll.code = 8
    config.ebll.epochs = 2
    config.gem.memories = 40
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
        self.problem = make_problem(config, self.sequence)
        self.data = put_on_device(self.sequence)
        self.traces = 0

        def run_steps(*args):
            self.traces += 1
            return epochs.run_steps(self.problem, *args)

        self.run_steps = jax.jit(run_steps)
        self.init = jax.jit(partial(epochs.init_state, self.problem))
        self.begin_task = jax.jit(partial(epochs.begin_task, self.problem))
        self.end_task = jax.jit(partial(epochs.end_task, self.problem))
        self.evaluate = jax.jit(partial(evaluate, self.problem))

    def train(self, key, tasks=None, epochs=None):
        """Trains some tasks in turn; returns the state and the sums of the last epoch."""
        state = self.init(key)
        stages = range(self.sequence.num_tasks) if tasks is None else tasks
        for task in stages:
            state = self.begin_task(key, state, task)
            steps = epochs.steps_per_epoch(self.problem, self.sequence, task)
            for epoch in range(epochs or self.config.train.epochs):
                state, sums = self.run_steps(key, state, self.data, task, epoch, 0, steps)
            state = self.end_task(key, state, self.data, task)
        return state, sums

    def test(self, key, state, row):
        """The three accuracies after task ``row``."""
        correct = self.evaluate(key, state, self.data, row, True)
        return accuracies(correct, self.sequence.test.count)

    def epoch(self, key, task, epoch):
        """The batches of an epoch in their order: NumPy inputs and labels."""
        slots, count = epochs.epoch_order(self.problem, key, self.data.train, task, epoch)
        view = make_view(self.problem, key, self.data, task)
        x, y = view.examples(self.data.train, slots[: int(count)])
        size = self.config.train.batch_size
        return [(x[i : i + size], y[i : i + size]) for i in range(0, int(count), size)]


def encoded(pixels, kind="PNG"):
    """A picture as the bytes of a file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return file.getvalue()


def write_prepared(data_dir, name, splits, **more):
    """Writes a set as TFDS does: ``splits`` is {split: [(bytes of a picture, label)]}.

    A set that TFDS knows gets the features of its builder, what its examples have beside pictures
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
        for i, (picture, label) in enumerate(rows):
            example = {"image": io.BytesIO(picture), "label": label}
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
