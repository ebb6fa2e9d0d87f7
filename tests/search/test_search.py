"""Searches: equal budgets, workers that join and die, results that main and compare take."""

import contextlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from support import digits_config

from bpnjax import compare, main, search
from bpnjax import config as configuration
from bpnjax.paper import pages
from bpnjax.run import train
from bpnjax.search import __main__ as command
from bpnjax.search import outcome, study
from bpnjax.search.trials import Trials
from bpnjax.utils.errors import UserError

optuna = pytest.importorskip("optuna", reason="pip install 'bpnjax[search]'")

SMALL = ("--config=digits", "--config.model.hidden=(8,)", "--config.train.epochs=2",
         "--config.sequence.num_tasks=2", "--config.compilation_cache=False")  # fmt: skip


def small(method="sgd", **changes):
    return digits_config(method, train__epochs=2, compilation_cache=False, **changes)


@pytest.mark.parametrize("method", ["bd_ewc", "lwf"])
def test_a_trial_is_the_ordinary_run_alone_and_among_others(method, tmp_path):
    config = small(method, evaluate__on="validation", dataset__validation=0.2)
    axes = search.space(config)
    first = {axis.field: axis.default for axis in axes}
    several = [first, first | {"train.learning_rate": 1e-3}, first]
    alone = Trials(config, axes, tmp_path, False).measure(several, range(3), None)
    together = Trials(config, axes, tmp_path, True).measure(several, range(3), None)
    result = train.train_and_evaluate(config, tmp_path / "run")
    ordinary = np.asarray(result["accuracy"]["task_told"], float)[:, -1].mean()
    assert alone[0].value == alone[2].value == pytest.approx(ordinary, abs=0.01)
    assert alone[1].value != alone[0].value
    steps = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    for one, other in zip(alone, together, strict=True):
        assert one.value == pytest.approx(other.value, abs=0.01)
        assert one.steps == other.steps == steps["total_steps"]


def test_a_trial_that_diverges_has_no_value(tmp_path):
    config = small("sgd")
    axes = search.space(config)
    (found,) = Trials(config, axes, tmp_path, False).measure(
        [{"train.learning_rate": 1e38}], [0], None
    )
    assert found.value is None and found.steps > 0


def test_settings_that_shapes_depend_on_get_programs_of_their_own(tmp_path):
    config = small("bd")
    axes = search.space(config, {"bd.hidden_dim": "4:16", "model.kernel_init":
                                 "lecun_normal,he_normal"})  # fmt: skip
    first = {axis.field: axis.default for axis in axes}
    trials = Trials(config, axes, tmp_path, False)
    trials.measure([first, first | {"bd.hidden_dim": 4}, first | {"bd.epsilon": 0.1}], range(3),
                   None)  # fmt: skip
    assert len(trials._programs) == 2


def test_the_recorded_command_names_no_folder():
    """Neither as one word nor as two."""
    words = ["--config=mnist", "--workdir", "a", "--storage=journal", "--trials=3",
             "--config.dataset.manual_dir=b", "--methods", "psp"]  # fmt: skip
    kept = command._without_folders(words, outcome.HERE)
    assert kept == ["--config=mnist", "--trials=3", "--methods", "psp"]


def test_equal_budgets_and_files_that_other_commands_take(tmp_path, capsys):
    arguments = [*SMALL, "--methods=sgd,psp", "--trials=3", f"--workdir={tmp_path}",
                 "--num_seeds=2", "--space.train.learning_rate=1e-4:1e-2:log"]  # fmt: skip
    assert command.run(arguments) == 0
    said = capsys.readouterr()
    assert "Each method had 3 trials and" in said.out
    assert max(map(len, said.out.splitlines()[:-1])) <= 80  # the last names the folder
    result = json.loads((tmp_path / "search.json").read_text())
    assert result["budget"]["equal"] and result["protocol"] == "two_phase"
    for name in ("sgd", "psp"):
        record = result["methods"][name]
        assert [t["number"] for t in record["trials"]] == [1, 2, 3]
        assert record["trials"][0]["settings"] == {"train.learning_rate": 3e-4}
        assert record["default"] == record["trials"][0]["value"]
        values = [t["value"] for t in record["trials"]]
        assert record["best"]["value"] == max(values)
        assert len({t["settings"]["train.learning_rate"] for t in record["trials"]}) == 3
        assert record["report"]["num_seeds"] == 2
        assert (tmp_path / "report" / name / "result.json").is_file()
    for name in ("search.md", *result["figures"]):
        assert (tmp_path / name).stat().st_size
    assert "--trials=3" in result["command"] and str(tmp_path) not in result["command"]
    # It is the result file of a page of the documentation.
    home = tmp_path / "docs" / "results"
    home.mkdir(parents=True)
    shutil.copy(tmp_path / "search.json", home / "search_digits.json")
    missing = pages.render(tmp_path, check=False)
    assert missing[0] == "docs/paper/search_digits/search_digits.md"
    assert "(not the figure of its result file)" in missing[1]
    for name in result["figures"]:
        shutil.copy(tmp_path / name, tmp_path / "docs" / "paper" / "search_digits")
    assert pages.render(tmp_path, check=True) == []
    assert (tmp_path / missing[0]).read_text() == (tmp_path / "search.md").read_text()

    tuned = tmp_path / "tuned.py"
    subprocess.run([sys.executable, "-m", "ruff", "check", "-q", str(tuned)], check=True)
    best = result["methods"]["psp"]["best"]["settings"]["train.learning_rate"]
    config, _, _ = main.parse([f"--config={tuned}", "--config.method=psp"])
    assert config.train.learning_rate == best and not config.tuned
    config, _, _ = main.parse(
        [f"--config={tuned}", "--config.method=psp", "--config.train.learning_rate=0.5"]
    )
    assert config.train.learning_rate == 0.5
    rows = compare.run_all(configuration.load_file(str(tuned)), ["psp"], tmp_path / "c", False)
    assert rows[0].result["config"]["train"]["learning_rate"] == best

    # A report of other settings than the best, as of fewer trials, gives way.
    folder = tmp_path / "report" / "psp"
    before = json.loads((folder / "result.json").read_text())["accuracy"]
    stale = json.loads((folder / "config.json").read_text())
    stale["train"]["learning_rate"] = 0.123
    (folder / "config.json").write_text(json.dumps(stale))
    assert command.run(arguments) == 0
    assert json.loads((folder / "result.json").read_text())["accuracy"] == before
    stale["train"]["learning_rate"] = best
    assert json.loads((folder / "config.json").read_text()) == stale

    # More trials: those that are there stay.
    made = search.search(
        configuration.with_changes(config_of(arguments), "", ""), ["sgd"], tmp_path, trials=4,
        space={"train.learning_rate": "1e-4:1e-2:log"}, report=False,
    )  # fmt: skip
    assert [t["value"] for t in made["methods"]["sgd"]["trials"][:3]] == [
        t["value"] for t in result["methods"]["sgd"]["trials"]
    ]
    assert len(made["methods"]["sgd"]["trials"]) == 4

    # Another search in the same folder.
    other = [a for a in arguments if "epochs" not in a] + ["--config.train.epochs=1"]
    assert command.run(other) == 2
    said = capsys.readouterr().err
    assert "holds a search of sgd with other settings (train.epochs: 2 -> 1)" in said


def config_of(arguments):
    fields = [a for a in arguments if a.startswith("--config")]
    config = main.parse_flags(fields).config
    config.num_seeds = 2
    return config


def test_a_lost_trial_is_taken_up_again_with_its_settings(tmp_path):
    made = study.plan(small("sgd"), ["sgd"], 3)
    storage = study._open(study._optuna(), "", tmp_path)
    its = study._study(optuna, storage, made, "sgd")
    worker = study._Worker(
        optuna, storage, its, made, "sgd",
        Trials(made.protocols["sgd"].tune, made.axes["sgd"], tmp_path, False), 1, False,
    )  # fmt: skip
    alive, worker.me = worker.me, f"{socket.gethostname()}:{_dead_process()}:0"
    worker._take()
    worker.me = alive  # of a search that this very process gave up
    (also,) = worker._take()
    values = [axis.suggest(also) for axis in made.axes["sgd"]]
    found = search.search(small("sgd"), ["sgd"], tmp_path, trials=3, report=False)
    trials = found["methods"]["sgd"]["trials"]
    assert len(trials) == 3 and all(t["state"] == "complete" for t in trials)
    assert list(trials[1]["settings"].values()) == values
    states = [t.state.name for t in its.get_trials()]
    assert states.count("COMPLETE") == 3 and states.count("FAIL") == 2


def _dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("storage", ["", "journal"])
def test_two_workers_one_of_them_killed(tmp_path, storage):
    line = [sys.executable, "-m", "bpnjax", "search", *SMALL, "--methods=sgd,psp", "--trials=3",
            f"--workdir={tmp_path}", f"--storage={storage}", "--noreport"]  # fmt: skip
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    first = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment)
    second = subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                              env=environment)  # fmt: skip
    for said in first.stderr:
        if "trial" in said:
            break
    first.send_signal(signal.SIGKILL)
    first.wait()
    first.stderr.close()
    _, error = second.communicate(timeout=150)
    assert second.returncode == 0, error
    result = json.loads((tmp_path / "search.json").read_text())
    for record in result["methods"].values():
        assert len(record["trials"]) == 3
        assert all(t["state"] == "complete" for t in record["trials"])
    assert result["budget"]["equal"]


def test_a_trial_that_was_changed_is_refused(tmp_path):
    """A database has no checksums of its own: a better value would win the search."""
    search.search(small("sgd"), ["sgd"], tmp_path, trials=2, report=False)
    with contextlib.closing(sqlite3.connect(tmp_path / "search.db")) as database:
        database.execute("UPDATE trial_values SET value = 0.999 WHERE trial_id = 2")
        database.commit()
    with pytest.raises(
        UserError, match=r"search.db is damaged \(trial 1 of sgd is not what was wr"
    ):
        search.search(small("sgd"), ["sgd"], tmp_path, trials=2, report=False)
    path = tmp_path / "search.db"
    data = path.read_bytes()
    path.write_bytes(data[:4096] + bytes(4096) + data[8192:])
    with pytest.raises(UserError, match=r"search.db is damaged \(.*delete it to search anew"):
        search.search(small("sgd"), ["sgd"], tmp_path, trials=2, report=False)


def test_a_journal_whose_last_line_was_cut_goes_on(tmp_path):
    """Optuna would append to that line, and nobody could read it any more."""
    ask = {"trials": 2, "report": False, "storage": "journal"}
    whole = search.search(small("sgd"), ["sgd"], tmp_path, **ask)
    path = tmp_path / "search.journal"
    path.write_bytes(path.read_bytes()[:-9])
    again = search.search(small("sgd"), ["sgd"], tmp_path, **ask)
    one, other = (
        [(t["settings"], t["value"]) for t in found["methods"]["sgd"]["trials"]]
        for found in (whole, again)
    )
    assert one == other and path.read_bytes().endswith(b"\n")


def test_hopeless_trials_are_ended_early_and_counted(tmp_path):
    space = {"train.learning_rate": "1e-7:3e-3:log"}
    found = search.search(
        small("sgd"), ["sgd"], tmp_path, trials=5, space=space, prune=True, report=False
    )
    trials = found["methods"]["sgd"]["trials"]
    assert len(trials) == 5
    early = [t for t in trials if t["state"] == "stopped early"]
    whole = [t for t in trials if t["state"] == "complete"]
    assert early and whole
    assert all(0 < t["steps"] < whole[0]["steps"] for t in early)
    assert found["budget"]["steps"]["sgd"] == sum(t["steps"] for t in trials)
    assert not list((tmp_path / "trials" / "sgd").glob("*/checkpoints"))


def test_a_method_without_settings_has_one_trial(tmp_path):
    space = {"train.learning_rate": "fixed"}
    found = search.search(small("sgd"), ["sgd"], tmp_path, trials=4, space=space, report=False)
    assert len(found["methods"]["sgd"]["trials"]) == 1
    assert "nothing to search: one trial" in (tmp_path / "search.md").read_text()


def test_a_record_by_hand():
    def trial(value, state="COMPLETE", diverged=False, **settings):
        return types.SimpleNamespace(
            params=settings, value=value, state=types.SimpleNamespace(name=state),
            user_attrs={"diverged": diverged, "steps": 10, "seconds": 1.0, "worker": "h:1"},
        )  # fmt: skip

    found = outcome.method_record(
        (), [trial(0.5), trial(0.0, diverged=True), trial(0.905), trial(0.7, "PRUNED"), trial(0.91)]
    )
    assert found["best"]["number"] == 5 and found["default"] == 0.5
    assert found["trials_to_99_percent"] == 3  # 0.905 is at least 0.99 * 0.91
    assert [t["state"] for t in found["trials"]] == [
        "complete", "diverged", "complete", "stopped early", "complete",
    ]  # fmt: skip
    assert found["spread"]["mean"] == pytest.approx(0.7716667)
    assert found["spread"]["sd"] == pytest.approx(np.std([0.5, 0.905, 0.91], ddof=1))
    assert found["steps"] == 50
    # 0.85 is near, not within 1%.
    near = outcome.method_record((), [trial(0.85), trial(0.905), trial(0.91)])
    assert near["trials_to_99_percent"] == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "--methods: missing"),
        (["--methods=bd_ewcc"], "--methods: unknown method 'bd_ewcc'; did you mean bd_ewc"),
        (["--methods=sgd", "--trials=0"], "--trials: '0' is not a number above 0"),
        (["--methods=sgd", "--space.bd.epsilom=1:2"], "bd.epsilom: unknown config field"),
        (["--methods=sgd", "--space.train.learning_rate"], "no range; write low:high:log"),
        (["--methods=sgd", "--storage=oracle9://x"], "--storage: cannot use 'oracle9://x'"),
        (["--methods=sgd", "--prune", "--at_once=4"], "cannot be ended early"),
        (["--methods=sgd", "--overwrite"], "--overwrite: a search is never overwritten"),
    ],
)
def test_wrong_requests_are_refused(more, message, tmp_path, capsys):
    assert command.run([*SMALL, f"--workdir={tmp_path}", *more]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


def test_without_optuna(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"not installed; pip install 'bpnjax\[search\]'"):
        search.search(small("sgd"), ["sgd"], tmp_path, trials=1)


def test_a_dry_run_says_how_many_runs(tmp_path, capsys):
    started = time.time()
    arguments = [*SMALL, "--methods=bd_ewc,psp", "--trials=8", "--dry_run"]
    assert command.run([*arguments, f"--workdir={tmp_path / 'x'}"]) == 0
    said = capsys.readouterr().out
    assert "bd_ewc: 8 trials of" in said and "18 runs, about" in said
    assert "bd.epsilon from 0.02 to 2, log, first 0.2" in said
    assert not (tmp_path / "x").exists() and time.time() - started < 60
