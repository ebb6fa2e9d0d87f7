"""A trained model as safetensors: what answers its tasks, and how to rebuild the network."""

import json
import pathlib
from typing import Any

import jax
import numpy as np

from bpnjax.data import TaskSequence
from bpnjax.run.checkpoint import write_atomically
from bpnjax.training.epochs import RunState
from bpnjax.training.experiment import Experiment
from bpnjax.utils import arrays, prng

FORMAT = "bpnjax-3"


def answering_arrays(experiment: Experiment, state: RunState) -> dict[str, np.ndarray]:
    """The part of a state that is needed to answer tasks, by name.

    Args:
      experiment: the static facts of the run.
      state: of one seed, between two tasks.

    Returns:
      ``{path: array}``: the parts of the learner's state that answers depend on (the shared
      parameters, banks, key seeds, ...), and ``statistics/...`` if the inference rule needs them.
    """
    needed = jax.tree.leaves(experiment.learner.answering())
    flat = arrays.flatten(state.learner)
    found = {name: a for (name, a), n in zip(flat.items(), needed, strict=True) if n}
    if experiment.mapper:
        named = arrays.flatten(state.statistics._asdict())
        found |= {f"statistics/{name}": array for name, array in named.items()}
    return found


def save_models(
    workdir: pathlib.Path,
    experiment: Experiment,
    state: RunState,
    num_seeds: int,
    sequence: TaskSequence,
) -> list[pathlib.Path]:
    """Writes ``model.safetensors`` (the first seed) and ``model_seed_<i>.safetensors`` (others).

    The arrays are those of `answering_arrays`. The metadata hold, as JSON, the configuration and
    everything needed to read examples and to name answers. `bpnjax.load` reads the file.

    Args:
      workdir: the run's folder.
      experiment: the static facts of the run.
      state: the final state, with a leading axis of seeds if there are several.
      num_seeds: number of seeds.
      sequence: the tasks of the run.

    Returns:
      The files of the models.
    """
    config = experiment.config
    # A model on features is stored whole, with the layers that compute them, so it reads images.
    before, images = sequence.extractor, sequence.train.images
    shape = before.shape if before else images.shape[1:]
    scale, shift = (before or sequence).scale, (before or sequence).shift
    metadata = {
        "format": FORMAT,
        "method": config.method,
        "num_tasks": str(experiment.num_tasks),
        "config": json.dumps(config.to_dict()),
        "outputs": json.dumps([np.flatnonzero(row).tolist() for row in sequence.classes]),
        "class_names": json.dumps(sequence.class_names),
        "input_shape": json.dumps(shape),
        "input_dtype": np.dtype(before.dtype if before else images.dtype).name,
        "draws": prng.fingerprint(),
        "input_range": json.dumps(_range(sequence)),
        "scale": json.dumps(scale.tolist()),
        "shift": json.dumps(shift.tolist()),
    }
    written = []
    for seed in range(num_seeds):
        one = state if num_seeds == 1 else jax.tree.map(lambda leaf, s=seed: leaf[s], state)
        found = answering_arrays(experiment, one)
        if before:
            found |= {f"extractor/{name}": array for name, array in before.arrays.items()}
        name = "model" if seed == 0 else f"model_seed_{config.seed + seed}"
        written.append(workdir / f"{name}.safetensors")
        arrays.write(written[-1], found, metadata | {"seed": str(config.seed + seed)})
    write_atomically(workdir / "model.json", json.dumps(metadata, indent=1) + "\n")
    return written


def _range(sequence: TaskSequence) -> list[float] | None:
    """The smallest and largest number in some training examples; None for features of images."""
    if sequence.extractor:
        return None
    some: Any = np.asarray(sequence.train.images[:1000])
    return [float(some.min()), float(some.max())]
