"""The output of a search: ``search.json``, a table, figures, and a configuration of the settings.

Everything is made from the finished trials in the storage, so it can be made again.
"""

import json
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bpnjax import config as configuration
from bpnjax.run import results, style, train
from bpnjax.run.checkpoint import sha256, write_atomically
from bpnjax.run.writers import aligned, markdown_table, mean_and_sd, number, plain
from bpnjax.utils.errors import UserError

__all__ = ["method_record", "printed", "read", "tuned_file", "write"]

ACCURACIES = ("task_told", "task_masked", "task_inferred")
LOCK = "results.lock"
_NEAR = 0.99  # share of the best value that "number that reached 99%" refers to
HERE = ("dataset.data_dir", "dataset.manual_dir", "dataset.cache_dir")  # folders of a machine


def write(
    workdir: pathlib.Path,
    made: Any,
    found: Mapping[str, Sequence[Any]],
    prune: bool,
    report: bool,
    command: str = "",
) -> dict[str, Any]:
    """Writes all files of a search, and runs the best settings of each method if requested.

    Args:
      workdir: of the search.
      made: from `bpnjax.search.study.plan`.
      found: the finished ``optuna`` trials of each method, ordered by place.
      prune: whether trials were stopped early.
      report: whether to run the best settings on the reported sequence.
      command: the command that began the search, for the record.

    Returns:
      The content of ``search.json``.

    Raises:
      UserError: a run cannot start.
    """
    methods = {name: method_record(made.axes[name], found[name]) for name in found}
    first = made.protocols[next(iter(found))]
    counts = {name: len(record["trials"]) for name, record in methods.items()}
    steps = {name: record["steps"] for name, record in methods.items()}
    searched = [name for name in methods if made.axes[name]]
    equal = len({counts[n] for n in searched}) <= 1 and len({steps[n] for n in searched}) <= 1
    page = f"search_{made.config.name}"
    result: dict[str, Any] = {
        "name": made.config.name,
        "title": f"{made.config.name}: search",
        "page": f"docs/paper/{page}/{page}.md",
        "command": command,
        "commit": results.commit(),
        "protocol": first.name,
        "objective": made.config.search.objective,
        "trials_differ_by": first.changes,
        "budget": {"trials": counts, "steps": steps, "equal": equal, "stopped_early": prune},
        "versions": results.versions(),
        "device": results.device_name(),
        "config": plain(made.config.to_dict()),
        "methods": methods,
    }
    result["versions"]["optuna"] = _version()
    write_atomically(workdir / "tuned.py", tuned_file(made, methods))
    if report:
        for name in methods:
            print(f"report  {name}", file=sys.stderr, flush=True)
            config = made.protocols[name].report.copy_and_resolve_references()
            config.update_from_flattened_dict(methods[name]["best"]["settings"])
            folder = workdir / "report" / name
            done = train.train_and_evaluate(config, folder, overwrite=_outdated(folder, config))
            methods[name]["report"] = plain({
                "num_seeds": config.num_seeds, "summary": done["summary"],
                "memory": done["memory"],
            })  # fmt: skip
    drawn = [_by_trial(workdir / "trials.png", result), *_sensitivity(workdir, result)]
    result["figures"] = {path.name: sha256(path) for path in drawn}
    write_atomically(workdir / "search.json", json.dumps(plain(result), indent=1) + "\n")
    write_atomically(workdir / "search.md", markdown(result))
    return result


def _outdated(folder: pathlib.Path, config: Any) -> bool:
    """Whether a report has settings that later trials surpassed."""
    try:
        there = json.loads((folder / "config.json").read_text())
        return configuration.fingerprint(there) != configuration.fingerprint(config)
    except (OSError, ValueError, AttributeError):
        return False  # there is no report, or one that the run itself will refuse


def read(workdir: pathlib.Path, wait: bool = False) -> dict[str, Any]:
    """Reads the results of a search that another process writes.

    Args:
      workdir: of the search.
      wait: whether to wait until they exist and no process writes them.

    Returns:
      The content of ``search.json``.

    Raises:
      UserError: there are no results.
    """
    path = workdir / "search.json"
    while wait and (workdir / LOCK).exists():
        time.sleep(0.5)
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"--workdir: cannot read {path} ({error}); run the same command again"
        ) from error


def method_record(axes: Sequence[Any], trials: Sequence[Any]) -> dict[str, Any]:
    """The entry of a method in ``search.json``.

    Args:
      axes: the searched settings.
      trials: finished ``optuna`` trials, first the default settings.

    Returns:
      A dict: the space, each trial, the best one, the value of the default settings, the spread
      over trials, and the number of trials that reached 99% of the best value.
    """
    records = []
    for place, trial in enumerate(trials):
        diverged = trial.user_attrs.get("diverged", False)
        stopped = trial.state.name == "PRUNED"
        records.append({
            "number": place + 1,
            "settings": dict(trial.params),
            "value": None if diverged or stopped else trial.value,
            "state": "stopped early" if stopped else "diverged" if diverged else "complete",
            "steps": trial.user_attrs.get("steps", 0),
            "seconds": trial.user_attrs.get("seconds", 0.0),
            "worker": trial.user_attrs.get("worker", ""),
        })  # fmt: skip
    values = np.array([np.nan if r["value"] is None else r["value"] for r in records], float)
    whole = values[~np.isnan(values)]
    best = int(np.nanargmax(values)) if len(whole) else 0
    near = np.flatnonzero(np.nan_to_num(values, nan=-np.inf) >= _NEAR * values[best])
    return {
        "space": [axis.described() for axis in axes],
        "trials": records,
        "best": records[best],
        "default": records[0]["value"],
        "spread": {
            "mean": float(whole.mean()) if len(whole) else None,
            "sd": float(whole.std(ddof=1)) if len(whole) > 1 else None,
            "least": float(whole.min()) if len(whole) else None,
        },
        "trials_to_99_percent": int(near[0]) + 1 if len(near) else None,
        "steps": sum(r["steps"] for r in records),
        "seconds": sum(r["seconds"] for r in records),
    }


def tuned_file(made: Any, methods: Mapping[str, Any]) -> str:
    """Writes a config file with the settings found for each method.

    Args:
      made: from `bpnjax.search.study.plan`.
      methods: `method_record` of each method.

    Returns:
      Python code. The commands run, compare and paper take the file as ``--config``.
    """
    flat = configuration.flatten(made.config)
    default = configuration.flatten(configuration.default())
    lines = [
        f'"""Settings that bpnjax search found for {made.config.name}: of each method, under tuned.'
        '"""',
        "",
        "from bpnjax.config import default",
        "",
        "",
        "def get_config():",
        "    config = default()",
    ]
    for field, value in flat.items():
        if field.startswith(("paper.", "tuned.")) or field in HERE:
            continue
        if value != default.get(field):
            lines.append(f"    config.{field} = {plain_python(value)}")
    lines.append("    config.tuned = {")
    for name, record in methods.items():
        groups: dict[str, list[str]] = {}
        for field, value in record["best"]["settings"].items():
            group, _, last = field.rpartition(".")
            groups.setdefault(group, []).append(f'"{last}": {plain_python(value)}')
        lines.append(f'        "{name}": {{')
        lines += [f'            "{g}": {{{", ".join(texts)}}},' for g, texts in groups.items()]
        lines.append("        },")
    return "\n".join([*lines, "    }", "    return config", ""])


def plain_python(value: Any) -> str:
    """Writes a value as Python code.

    Args:
      value: of a field.

    Returns:
      Code such as ``(300, 300)``.
    """
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return repr(tuple(value)) if isinstance(value, (list, tuple)) else repr(value)


def _version() -> str:
    import optuna

    return optuna.__version__


def _trials(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table of the trials."""
    rows = []
    for name, record in result["methods"].items():
        spread = record["spread"]
        rows.append([
            name, number(record["best"]["value"]), number(record["default"]),
            number(spread["mean"], spread["sd"]), str(record["trials_to_99_percent"] or "-"),
        ])  # fmt: skip
    return ["trials of", "best", "default", "all of them", "number that reached 99%"], rows


def _reported(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table of the reported runs; without rows if there are none."""
    rows = []
    for name, record in result["methods"].items():
        if "report" in record:
            summary = record["report"]["summary"]
            averages = [summary[kind]["average_accuracy"] for kind in ACCURACIES]
            bytes_per_task = record["report"]["memory"]["bytes_per_task"]
            rows.append([
                name, *(mean_and_sd(found, 3) for found in averages),
                f"{bytes_per_task:,}",
            ])  # fmt: skip
    return ["reported", "told", "masked", "inferred", "bytes per task"], rows


def _budget(result: Mapping[str, Any]) -> str:
    budget = result["budget"]
    trials, steps = sorted(set(budget["trials"].values())), sorted(set(budget["steps"].values()))
    if budget["equal"] and len(trials) == 1:
        return f"Each method had {trials[0]} trials and {steps[0]:,} training steps in them."
    each = ", ".join(
        f"{name} {budget['trials'][name]} and {budget['steps'][name]:,}"
        for name in budget["trials"]
    )
    why = " Trials were stopped early." if budget["stopped_early"] else ""
    return f"Trials and training steps in them: {each}. The budgets are not equal.{why}"


def printed(result: Mapping[str, Any]) -> str:
    """Formats the results as a table for a terminal.

    Args:
      result: the content of ``search.json``.

    Returns:
      Lines of text. The last one is about the budget.
    """
    lines = aligned(*_trials(result))
    if _reported(result)[1]:
        lines += ["", *aligned(*_reported(result))]
    return "\n".join([*lines, "", _budget(result)])


def markdown(result: Mapping[str, Any]) -> str:
    """Formats the results as a page.

    Args:
      result: the content of ``search.json``.

    Returns:
      Markdown.
    """
    settings = [
        [name, ", ".join(f"{f} = {v:.4g}" if isinstance(v, float) else f"{f} = {v}"
                         for f, v in record["best"]["settings"].items()) or "-",
         "; ".join(record["space"]) or "nothing to search: one trial"]
        for name, record in result["methods"].items()
    ]  # fmt: skip
    differ = "; ".join(f"`{change}`" for change in result["trials_differ_by"])
    return "\n\n".join([
        f"# {result['title']}",
        f"Protocol: {result['protocol']}. Trials differ from the runs that are reported by {differ}"
        f". They are judged by the average of {result['objective']} after the last task.",
        _budget(result),
        markdown_table(*_trials(result)),
        *([markdown_table(*_reported(result))] if _reported(result)[1] else []),
        markdown_table(["method", "found", "searched"], settings),
        *[f"![{name}]({name})" for name in result["figures"]],
        *([f"    {result['command']}"] if result["command"] else []),
    ]) + "\n"  # fmt: skip


@style.applied()
def _by_trial(path: pathlib.Path, result: Mapping[str, Any]) -> pathlib.Path:
    """Draws the value of each trial, and the best so far."""
    methods = result["methods"]
    figure, axes = style.new_figure(
        1, len(methods), (3 * len(methods), 3.2), squeeze=False, sharey=True
    )
    for axis, (name, record) in zip(axes[0], methods.items(), strict=True):
        values = [np.nan if t["value"] is None else t["value"] for t in record["trials"]]
        numbers = np.arange(1, len(values) + 1)
        axis.plot(numbers, values, "o", label="trial")
        axis.step(numbers, np.fmax.accumulate(values), where="post", label="best so far")
        axis.set_title(style.display(name))
        axis.set_xlabel("trial")
    axes[0][0].set_ylabel(f"average accuracy ({result['objective']})")
    style.legend(figure)
    return style.save(figure, path, (".png",))


@style.applied()
def _sensitivity(workdir: pathlib.Path, result: Mapping[str, Any]) -> list[pathlib.Path]:
    """Draws, for each method, the value against each of its settings."""
    made = []
    for name, record in result["methods"].items():
        fields = list(record["best"]["settings"])
        if not fields:
            continue
        figure, axes = style.new_figure(
            1, len(fields), (3 * len(fields), 3.2), squeeze=False, sharey=True
        )
        for axis, field in zip(axes[0], fields, strict=True):
            x = [t["settings"][field] for t in record["trials"] if t["value"] is not None]
            y = [t["value"] for t in record["trials"] if t["value"] is not None]
            axis.plot([str(v) for v in x] if isinstance(x[0], (str, bool)) else x, y, "o")
            if any(text.startswith(f"{field} from") and ", log" in text
                   for text in record["space"]):  # fmt: skip
                axis.set_xscale("log")
            axis.set_xlabel(field)
        axes[0][0].set_ylabel(f"average accuracy ({result['objective']})")
        figure.suptitle(style.display(name))
        made.append(style.save(figure, workdir / f"sensitivity_{name}.png", (".png",)))
    return made
