"""Supplement C: accuracy against the inner width H and against EWC's strength."""

import numpy as np

from bpnjax.metrics import mean_and_sd
from bpnjax.paper import drawing, runs
from bpnjax.paper.report import Report, number

HIDDEN_DIMS = (1, 5, 25, 100, 300, 900, 2500)
STRENGTHS = (0.0, 1.0, 10.0, 100.0, 2000.0, 2e4, 2e5, 2e6)


def _sweep(runner, name, title, text, field, values, what) -> Report:
    done = [
        runs.complete(
            runner, f"{value:g}", "mnist.py", "bd_ewc", 3,
            **{field: value, "evaluate__inferred_rows": "last"},
        )
        for value in values
    ]  # fmt: skip
    path = drawing.picture_path(runner.folder, name)
    rows = []
    with drawing.panels(path, 1, 1, (7, 4.5)) as (axis,):
        place = np.arange(len(values))
        for label, measure in (
            ("average", lambda m: m[:, -1].mean(1)),
            ("task 1", lambda m: m[:, -1, 0]),
            ("last task", lambda m: m[:, -1, -1]),
        ):
            drawing.band(axis, place, np.array([measure(runs.matrix(r)) for r in done]), label)
        axis.set_xticks(place, [run.label for run in done])
        axis.set_xlabel(what)
        axis.set_ylabel("accuracy after all tasks (task_told)")
        axis.set_ylim(-0.03, 1.03)
        drawing.legend(axis)
    for run in done:
        found = runs.matrix(run)
        parts = (found[:, -1].mean(1), found[:, -1, 0], found[:, -1, -1])
        figures = [mean_and_sd(part) for part in parts]
        rows.append([run.label, *(number(f["mean"], f["sd"]) for f in figures)])
    header = [what, "average", "task 1", "last task"]
    return Report(
        name, title, text, [(header, rows)], [path], f"python -m bpnjax.paper --artefact={name}",
        [run.command for run in done], runs.seconds(done),
    )  # fmt: skip


def hidden_dim(runner) -> Report:
    """Accuracy against H."""
    text = """BD+EWC on incremental MNIST for inner widths H of the product M W. The paper tries 1
to 2,500 and uses 25 to 900 (Supplement C). With the sign rule a step moves the bias by a length
that grows with sqrt(H), so H acts like the step size epsilon."""
    return _sweep(runner, "hidden_dim", "Inner width H", text, "bd__hidden_dim", HIDDEN_DIMS, "H")


def strength(runner) -> Report:
    """Accuracy against EWC's strength."""
    text = """BD+EWC on incremental MNIST for strengths lambda of EWC's anchor (of lambda/2 sum F
(theta - anchor)^2, proximal form, which stays finite at any strength). The paper uses 2,000 and
says that larger ones hinder new tasks (Supplement C)."""
    return _sweep(runner, "strength", "Strength of EWC", text, "ewc__strength", STRENGTHS, "lambda")
