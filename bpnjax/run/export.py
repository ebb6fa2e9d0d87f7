"""A trained model as safetensors: shared parameters, bank, key seeds, and how to build it again."""

import json
import pathlib

import jax
import numpy as np
from flax import traverse_util
from safetensors.numpy import save

from bpnjax.data import TaskSequence
from bpnjax.modes.keys import is_seed
from bpnjax.run.checkpoint import write_atomically
from bpnjax.run.setup import Problem
from bpnjax.training.epochs import TrainState


def plain_leaves(tree, prefix: str):
    """Names in the file and leaves of a tree, ``(name, leaf)`` each; of a key its seed."""
    flat = traverse_util.flatten_dict(tree, sep="/", is_leaf=lambda _, node: is_seed(node))
    for name, leaf in flat.items():
        if is_seed(leaf):
            yield f"{prefix}/{name}_seed", leaf.seed
        else:
            yield f"{prefix}/{name}", leaf


def _plain_arrays(tree, prefix: str) -> dict[str, np.ndarray]:
    arrays = {}
    for name, leaf in plain_leaves(tree, prefix):
        if name.endswith("_seed"):
            leaf = jax.random.key_data(leaf)
        arrays[name] = np.ascontiguousarray(np.asarray(leaf))
    return arrays


FORMAT = "bpnjax-2"


def save_models(
    workdir: pathlib.Path,
    problem: Problem,
    state: TrainState,
    num_seeds: int,
    sequence: TaskSequence,
) -> None:
    """Writes ``model.safetensors`` (the first seed) and ``model_seed_<i>.safetensors`` (others).

    Names in the file: ``core/<path>`` the shared parameters; ``bank/<layer>/bias`` f32 [T, K];
    ``bank/<layer>/key_seed`` uint32 [2], from which `bpnjax.modes.keys.KeySeeds` draws the layer's
    keys; ``cores/<path>`` [T, ...] for stl; ``statistics/mean`` and ``statistics/whitener``
    [T, ...] where `evaluate.rule` asks for them (`bpnjax.evaluation.task_inference.Statistics`). The metadata hold
    the configuration and what is needed to read pictures and name answers, as JSON. `bpnjax.load`
    reads the file.

    Args:
      workdir: the run's folder.
      problem: the static side of the run.
      state: the final state, with a leading seed axis if there are several.
      num_seeds: how many.
      sequence: what was learned.
    """
    config = problem.config
    # A model of features goes out whole, with the layers that made them: it reads pictures.
    before, images = sequence.extractor, sequence.train.images
    shape = before.shape if before else images.shape[1:]
    scale, shift = (before or sequence).scale, (before or sequence).shift
    metadata = {
        "format": FORMAT,
        "method": config.method,
        "num_tasks": str(problem.num_tasks),
        "config": json.dumps(config.to_dict()),
        "outputs": json.dumps([np.flatnonzero(row).tolist() for row in sequence.classes]),
        "class_names": json.dumps(sequence.class_names),
        "input_shape": json.dumps(shape),
        "scale": json.dumps(scale.tolist()),
        "shift": json.dumps(shift.tolist()),
    }
    for seed in range(num_seeds):
        one = state if num_seeds == 1 else jax.tree.map(lambda leaf, s=seed: leaf[s], state)
        # What answers is kept: after imm's merging, say. stl's networks are among the stored.
        last = problem.num_tasks - 1
        core = problem.method.for_eval(one.core, one.method, last)
        arrays = _plain_arrays((before.params if before else {}) | core, "core")
        for name, tree in problem.method.stored(one.method).items():
            arrays |= _plain_arrays(tree, name)
        if problem.statistics:
            arrays |= _plain_arrays(one.statistics._asdict(), "statistics")
        name = "model" if seed == 0 else f"model_seed_{config.seed + seed}"
        partial = workdir / f".{name}.partial"
        partial.write_bytes(save(arrays, metadata | {"seed": str(config.seed + seed)}))
        partial.replace(workdir / f"{name}.safetensors")
    write_atomically(workdir / "model.json", json.dumps(metadata, indent=1) + "\n")
