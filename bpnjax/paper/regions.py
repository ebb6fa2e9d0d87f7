"""Fig. 5: where a network that learned two tasks in the plane sees the black cluster."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from bpnjax import config as configuration
from bpnjax.data import builtin_sets, load_sequence
from bpnjax.evaluation.metrics import mean_and_sd
from bpnjax.paper import drawing, runs
from bpnjax.paper.report import Cell, Report, beside_paper
from bpnjax.run import checkpoint, train
from bpnjax.run.checkpoint import Position
from bpnjax.training import epochs
from bpnjax.training.experiment import make_experiment

METHODS = (("plain SGD", "sgd"), ("GD+EWC", "gd_ewc"), ("BD+EWC", "bd_ewc"))
_TEXT = """Probability of the black cluster (yellow: high, blue: low). Task 1 is black against red,
task 2 black against light blue; rows: after task 1 in its mode, after task 2 in the mode of task 1
and in that of task 2. The paper gives neither clusters nor network; ours are in `configs/toy.py`.
"""


def probabilities(
    run: runs.Run, config: ConfigDict, points: np.ndarray
) -> dict[tuple[int, int], np.ndarray]:
    """Probability of the first class at some points, for the first seed.

    Args:
      run: a complete run of two tasks, with the checkpoints after both.
      config: its configuration.
      points: f32 ``[n, 2]``.

    Returns:
      ``{(tasks learned, mode): f32 [n]}``.
    """
    sequence = load_sequence(config)
    experiment = make_experiment(config, sequence)

    init = partial(epochs.init_state, experiment)
    init = jax.vmap(init) if config.num_seeds > 1 else init
    abstract = jax.eval_shape(init, train.seed_keys(config))
    found = {}
    for learned, mode_of in ((1, 0), (2, 0), (2, 1)):
        place = Position(learned, 0, 0)
        state = checkpoint.restore_at(run.folder / "checkpoints", place, abstract)
        if config.num_seeds > 1:
            state = jax.tree.map(lambda leaf: leaf[0], state)
        learner, task = experiment.learner, jnp.int32(mode_of)
        logits = learner.answer(state.learner, jnp.asarray(points), task, between_tasks=True)
        found[learned, mode_of] = np.asarray(jax.nn.softmax(logits)[:, 0])
    return found


def fig5(runner: runs.Runner) -> Report:
    """Classification regions after task 1 and task 2.

    Args:
      runner: where runs go.

    Returns:
      `Report`.

    Source: Wen et al. 2020 (arXiv 2009.13954), Fig. 5. Variant: clusters and network are ours,
    since the paper describes neither.
    """
    done, cells, probabilities_of = [], [], {}
    side = np.linspace(-4, 4, 161)
    points = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2).astype(np.float32)
    for label, method in METHODS:
        run = runs.complete(runner, label, "toy.py", method, 3)
        config = configuration.load_file(str(runner.configs / "toy.py"))
        config.update_from_flattened_dict(configuration.flatten(run.result["config"]))
        probabilities_of[label] = probabilities(run, config, points)
        found = mean_and_sd(runs.matrix(run)[:, -1, 0])
        cells.append(Cell(label, found["mean"], found["sd"]))
        done.append(run)
    data = builtin_sets.gaussians()
    path = drawing.figure_path(runner.folder, "fig5")
    with drawing.panels(path, 3, len(METHODS), (9, 9), sharey=True) as axes:
        rows = {(1, 0): "after task 1", (2, 0): "after task 2,\nmode of task 1",
                (2, 1): "after task 2,\nmode of task 2"}  # fmt: skip
        for i, (place, row_label) in enumerate(rows.items()):
            for j, (label, _) in enumerate(METHODS):
                axis = axes[i * len(METHODS) + j]
                heat = probabilities_of[label][place].reshape(len(side), len(side))
                axis.imshow(heat, origin="lower", extent=(-4, 4, -4, 4), vmin=0, vmax=1)
                for c, tint in enumerate(("black", "red", "lightskyblue")):
                    shown = data.test_images[data.test_labels == c][:80]
                    axis.scatter(*shown.T, s=3, color=tint)
                if i == 0:
                    axis.set_title(label)
                if j == 0:
                    axis.set_ylabel(row_label)
    table = beside_paper(cells, "task 1 after task 2")
    return Report(
        "fig5", "Fig. 5: classification regions of three clusters", _TEXT, [table], [path],
        "python -m bpnjax.paper --artefact=fig5", [run.command for run in done],
        runs.seconds(done),
    )  # fmt: skip
