"""Images decoded and cropped for training, beside the steps of AlexNet that use them."""

import io
import os
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from bpnjax import config as configuration
from bpnjax.data import crops
from bpnjax.data.sequence import Split, TaskSequence
from bpnjax.run import train
from bpnjax.training import parallel
from bpnjax.training.experiment import make_experiment
from bpnjax.training.task_data import put_on_device

LOOK = crops.Look(256, (224, 224, 3))
IMAGE = (300, 400)  # of those that are decoded
BATCH, STORED, BATCHES, FIRST = 128, 256, 12, 4
CLASSES = 100


def pipeline():
    """(f) Examples a second that are read, by the number of workers, and that AlexNet trains on."""
    cores, rates = len(os.sched_getaffinity(0)), {}
    with tempfile.TemporaryDirectory() as folder:
        files = crops.of_source(make_source(folder), LOOK)
        for workers in (0, 1, 2, 4, 8, 16):
            if workers <= max(2, cores):
                rates[workers] = read_rate(files, workers)
    on_cpu = jax.default_backend() == "cpu"
    steps, rounds = (1, 1) if on_cpu else (48, 4)
    methods = ("bd_psp",) if on_cpu else ("sgd", "bd_psp")  # a step takes many seconds there
    trained = {}
    for method in methods:
        burst = make_burst(method, steps)
        burst()
        trained[method] = BATCH / min(burst() for _ in range(rounds))
    rows = [
        [f"{workers} workers" if workers else "threads", f"{read:,.0f}",
         *(f"{read / rate:.2f}" for rate in trained.values())]
        for workers, read in rates.items()
    ]  # fmt: skip
    header = ["read by", "examples/s", *(f"of {m}'s {r:,.0f}" for m, r in trained.items())]
    title = f"Random crops of {IMAGE[0]} x {IMAGE[1]} JPEGs, {cores} cores; AlexNet's steps"
    return title, header, rows


def read_rate(files, workers: int) -> float:
    """Examples a second, once the workers have begun."""
    plan = np.arange(BATCHES * BATCH) % STORED
    draws = crops.Draws(0, 0, 0, STORED)
    with crops.batches(files, plan, BATCH, draws, 0, workers) as found:
        for _ in range(FIRST):
            next(found)
        started = time.perf_counter()
        count = sum(len(batch["label"]) for batch in found)
        return count / (time.perf_counter() - started)


def make_source(folder: str):
    """A prepared set of images about as easy to decode as photographs are."""
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(shape=(None, None, 3)),
         "label": tfds.features.ClassLabel(num_classes=CLASSES)}
    )  # fmt: skip

    def examples(split):
        rng = np.random.default_rng(0)
        for i in range(STORED):
            coarse = Image.fromarray(rng.integers(0, 256, (38, 50, 3), np.uint8))
            file = io.BytesIO()
            coarse.resize(IMAGE[::-1], Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
            file.seek(0)
            yield i, {"image": file, "label": i % CLASSES}

    body = {
        "__module__": __name__, "name": "photographs", "VERSION": tfds.core.Version("1.0.0"),
        "_info": lambda self: tfds.core.DatasetInfo(builder=self, features=features),
        "_split_generators": lambda self, _: {"train": examples("train")},
        "_generate_examples": None,
    }  # fmt: skip
    with tfds.core.registered.skip_registration():
        builder_class = type("photographs", (tfds.core.GeneratorBasedBuilder,), body)
    builder = builder_class(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    opened = tfds.builder_from_directory(builder.data_dir)
    return opened.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})


def make_burst(method: str, steps: int):
    """Seconds of a step of AlexNet, images on the device."""
    config = configuration.default()
    config.method, config.devices = method, "1"
    config.model.name = "alexnet"
    config.model.channels, config.model.hidden = (64, 192, 384, 256, 256), (4096, 4096)
    config.train.batch_size, config.train.optimizer = BATCH, "momentum"
    config.bd.layers = config.psp.layers = "fc6|fc7|output"
    rng = np.random.default_rng(0)
    number = BATCH * min(steps, 8)
    images = rng.integers(0, 256, (number, *LOOK.shape), np.uint8)
    labels = rng.integers(0, CLASSES, number).astype(np.int32)
    index = np.arange(number, dtype=np.int32)[None]
    split = Split(images, labels, index, np.array([number], np.int32))
    sequence = TaskSequence(
        train=split, test=split, classes=np.ones((1, CLASSES), bool),
        class_names=tuple(map(str, range(CLASSES))), scale=np.full(3, 1 / 64, np.float32),
        shift=np.full(3, -2.0, np.float32),
        columns=np.arange(CLASSES, dtype=np.int32)[None], permuted=False,
    )  # fmt: skip
    experiment = make_experiment(config, sequence)
    made = train.compile_programs(experiment, parallel.Clock(), 1, parallel.choose_layout(config))
    data = put_on_device(sequence)
    state = made.begin_task(made.init(train.seed_keys(config)), jnp.int32(0))

    def burst():
        nonlocal state
        started = time.perf_counter()
        for epoch in range(-(-steps // 8)):
            last = min(8, steps - 8 * epoch)
            numbers = [jnp.int32(n) for n in (0, epoch, 0, last)]
            state, sums = made.run_steps(state, data, *numbers)
        jax.block_until_ready((state, sums))
        return (time.perf_counter() - started) / steps

    return burst
