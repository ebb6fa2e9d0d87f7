"""The paper's artefacts on digits in its place: files, tables, statistics, refusals."""

import json

import jax
import numpy as np
import pytest
from command import ROOT
from safetensors.numpy import load_file

import bpnjax
from bpnjax import config as configuration
from bpnjax.data import load_sequence
from bpnjax.paper import __main__ as command
from bpnjax.paper import (
    classes,
    controls,
    domains,
    eight,
    incremental,
    online,
    permuted,
    regions,
    report,
    runs,
    step,
    sweeps,
    untold,
)
from bpnjax.run import checkpoint, train
from bpnjax.training.experiment import make_experiment
from bpnjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_once")

NOT_THE_PAPERS = ("online", "step", "incremental_classes", "ten_domains")
CONFIG = """
from bpnjax.config import default


def get_config():
    config = default()
    config.name = {name!r}
    config.dataset.name = "digits,digits" if {kind!r} == "datasets" else "digits"
    config.sequence.heads = "multi" if {kind!r} == "datasets" else "single"
    config.sequence.kind = {kind!r}
    config.sequence.num_tasks = {tasks}
    config.model.hidden = (8,)
    config.train.epochs = 2
    config.train.batch_size = 64
    config.train.learning_rate = 3e-3
    config.bd.hidden_dim = 4
    config.bd.step = "absolute"
    config.ewc.form = "proximal"
    return config
"""


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """Configurations of the paper's names, each small and on digits."""
    folder = tmp_path_factory.mktemp("configs")
    others = ("online_cifar10", "online_cifar100", "cifar100_b0_inc10")
    for name in ("mnist", "cifar10", "cifar100", "permuted_mnist", *others):
        kind, tasks = ("permuted", 12) if name == "permuted_mnist" else ("class_split", 2)
        text = CONFIG.format(name=name, kind=kind, tasks=tasks)
        (folder / f"{name}.py").write_text(text)
    for name in ("eight_domains", "ten_domains"):
        text = CONFIG.format(name=name, kind="datasets", tasks=2)
        (folder / f"{name}.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("paper")


@pytest.fixture
def few(monkeypatch):
    """One to three methods an artefact."""
    kept = {"MNIST": ("BD+EWC", "EWC"), "CIFAR10": ("BD+EWC",), "CIFAR100": ("BD+EWC", "GEM(10)")}
    for name, labels in kept.items():
        lines = [l for l in getattr(incremental, name) if l.label in labels]
        monkeypatch.setattr(incremental, name, tuple(lines))
    monkeypatch.setattr(permuted, "METHODS", permuted.METHODS[:2])
    monkeypatch.setattr(controls, "METHODS", controls.METHODS[:1])
    monkeypatch.setattr(controls, "RATES", controls.RATES[:1])
    monkeypatch.setattr(untold, "SEQUENCES", (("MNIST", "mnist.py", {}, 20),))
    monkeypatch.setattr(untold, "METHODS", untold.METHODS[:1])
    labels = ("joint", "BD+EWC", "LwF")
    monkeypatch.setattr(eight, "METHODS", {label: eight.METHODS[label] for label in labels})
    monkeypatch.setattr(sweeps, "HIDDEN_DIMS", ((1, 4),))
    monkeypatch.setattr(sweeps, "STRENGTHS", ((0.0, 2000.0),))


def test_every_artefact_and_the_page(configs, folder, few, monkeypatch, capsys):
    known = command.artefacts()
    monkeypatch.setattr(
        command, "artefacts", lambda: {k: f for k, f in known.items() if k != "fig5"}
    )
    flags = ["--artefact=all", f"--workdir={folder}", f"--configs={configs}", "--num_seeds=1",
             "--config.train.batch_size=48", "--sequence=eight_domains", "--latex"]  # fmt: skip
    assert command.run(flags) == 0
    names = [name for name in command.artefacts() if name not in NOT_THE_PAPERS]
    for name in names:
        text = (folder / name / f"{name}.md").read_text()
        assert f"python -m bpnjax.paper --artefact={name}" in text and str(folder) not in text
        assert (folder / name / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        found = json.loads((folder / name / f"{name}.json").read_text())
        assert found["tables"] and found["made"]["num_seeds"] == 1 and found["command"]
    for name in ("fig6a", "fig6b", "fig6c", "fig7", "table2", "untold"):  # what README shows
        for key, table in results(name)["ledger"].items():
            made = json.loads((folder / name / f"{name}.json").read_text())["ledger"][key]
            assert made["header"] == table["header"] and made["rows"]
        assert (folder / name / f"{name}.svg").is_file() and (
            folder / name / f"{name}.pdf"
        ).is_file()
        found = json.loads((folder / name / f"{name}.json").read_text())
        latex = (folder / name / f"{name}.tex").read_text()
        assert latex.count(r"\begin{tabular}") == len(found["tables"])
    page = (folder / "report" / "index.html").read_text()
    assert page.count("data:image/png;base64,") == len(names) + 1  # fig. 7 has two
    assert "<td>BD+EWC</td>" in page and "http" not in page.replace("http-equiv", "")
    config = (folder / "mnist" / "bd_ewc" / "config.json").read_text()
    assert '"batch_size": 48' in config  # the override reached the runs
    # All is there: nothing is trained again.
    capsys.readouterr()
    monkeypatch.setattr("bpnjax.run.train.train_and_evaluate", None)
    monkeypatch.setattr("bpnjax.run.sweep.sweep", None)
    assert command.run(flags) == 0


def results(name):
    """A result file of the documentation."""
    return json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())


def test_online_has_a_table_for_each_set_and_the_published_figures(configs, folder, monkeypatch):
    monkeypatch.setattr(online, "METHODS", [m for m in online.METHODS if m[0] in ("SGD", "ER")])
    made = online.online(runs.Runner(folder, configs, 1, {"train.epochs": 1}))
    (header, rows), *others, (_, published) = made.tables
    assert len(others) == 3 and header[0] == "CIFAR-10, 5 x 2, batches of 10"
    assert [row[0] for row in rows] == ["SGD", "ER"]
    assert header[1:] == ["nobody tells the task", "told, all classes", "told, own classes"]
    assert rows[1][1] == rows[1][2] != rows[1][3]  # without modes nothing is told but the classes
    assert all("arXiv" in row[-1] for row in published)
    assert made.figures[0].is_file()


def test_incremental_classes_chooses_by_held_out_trials(configs, folder, monkeypatch):
    lines = [line for line in classes.LINES if line.label in ("NCM", "ER", "BD, frozen: gmm")]
    lines = [line._replace(trials=line.trials[:2]) for line in lines]
    monkeypatch.setattr(classes, "LINES", lines)
    made = classes.incremental_classes(runs.Runner(folder, configs, 2, {}))
    (header, rows), (_, trials) = made.tables
    assert header[:3] == ["method", "after the last step", "average incremental"]
    ncm, er, bd = rows
    assert "±" not in ncm[1] and "±" in er[1]
    assert all(row[3] >= row[1] for row in (ncm, er, bd))  # told the task, of fewer classes
    assert [row[0] for row in trials] == ["`er`"] * 2 + ["`bd_frozen`"] * 2
    for method in ("`er`", "`bd_frozen`"):
        best = max((row for row in trials if row[0] == method), key=lambda row: row[2])
        taken = [row for row in trials if row[0] == method and row[1].endswith(" *")]
        assert len(taken) == 1 and taken[0][2] == best[2]
        fields = taken[0][1].removesuffix(" *").replace("`", "").split(", ")
        command = next(run for run in made.runs if f"--config.method={method.strip('`')}" in run)
        assert all(f"--config.{field}" in command for field in fields)
        assert "validation" not in command
    assert made.figures[0].is_file()


def test_ten_domains_are_told_and_guessed(configs, folder, monkeypatch):
    monkeypatch.setattr(domains, "METHODS", ("bd_frozen",))
    monkeypatch.setattr(domains, "RULES", ("entropy", "nearest_mean"))
    made = domains.ten_domains(runs.Runner(folder, configs, 2, {"train.epochs": 1}))
    (_, (entropy, nearest)), (header, by_set) = made.tables
    assert entropy[:3] == ["`bd_frozen`", "entropy", nearest[2]]  # the same networks
    assert int(nearest[5].replace(",", "")) > int(entropy[5].replace(",", "")) > 0
    assert header[1:] == ["told", "entropy", "nearest_mean"] and len(by_set) == 2
    told = [float(row[1].split()[0]) for row in by_set]
    assert float(nearest[2].split()[0]) == pytest.approx(np.mean(told), abs=1e-3)
    assert made.figures[0].is_file()


def test_step_has_a_table_of_defaults_controls_and_values(configs, folder, monkeypatch):
    monkeypatch.setattr(step, "SETTINGS", [step.Setting("one", "mnist.py", {}, whole=True)])
    monkeypatch.setattr(step, "PAPER_SETS", (("MNIST", "mnist.py"),))
    made = step.step(runs.Runner(folder, configs, 1, {"train.epochs": 1}))
    (header, ((name, _, *told),)), (_, ((_, *three),)), (_, (paper,)), (_, values) = made.tables
    assert name == "one" and len(header) == 8 and len(paper) == 5
    assert three[0] == told[0]  # BD by its default, in both tables
    row = dict((row[0], row[1:]) for row in values)["bd_ewc, relative"]
    assert row[step.RELATIVE.index(step.DEFAULT)] == told[0] and len(row) == len(step.RELATIVE)
    assert made.figures[0].is_file() and len(made.runs) > 40
    command = next(c for c in made.runs if "bd_ewc" in c and "--config.bd.epsilon=0.2" in c)
    given = dict(flag.split("=", 1) for flag in command.split() if "config." in flag)
    assert given["--config.bd.step"] == "relative" and given["--config.ewc.strength"] == "0.02"


def test_figures_are_those_of_the_result_files(configs, folder, few):
    """After the test above, whose runs are taken up."""
    runner = runs.Runner(folder, configs, 1, {"train.batch_size": 48})
    made = incremental.fig6a(runner)
    (header, rows) = made.tables[0]
    assert header == ["task 1 after all tasks", "ours", "paper", "difference", "state"]
    by_label = {row[0]: row for row in rows}
    for line in incremental.MNIST:
        marks = [f"{k.replace('__', '.')}={v}" for k, v in line.fields.items()]
        run = runs.read(folder / "mnist" / "-".join([line.method, *marks]), "", "")
        value = runs.matrix(run, line.kind)[0, -1, 0]
        assert by_label[line.label][1] == f"{value:.3f}"
        epochs, values = runs.by_epoch(run, line.kind)
        assert epochs.tolist() == [1, 2, 3, 4] and values.shape == (4, 1, 2)
        assert np.isnan(values[:2, 0, 1]).all() and not np.isnan(values[2:]).any()


def test_eight_sets_in_a_table(configs, folder, few):
    """After the first test, whose runs are taken up."""
    runner = runs.Runner(folder, configs, 1, {"train.batch_size": 48}, "eight_domains")
    made = eight.table2(runner)
    (header, rows), (_, averages) = made.tables
    assert header == ["method", "digits", "digits", "average", "paper's average"]
    papers = [("joint", "-"), ("BD+EWC", "0.529"), ("LwF", "0.495")]
    assert [(row[0], row[-1]) for row in rows] == papers
    assert averages[0][4] == "-"
    for row, other in zip(rows, averages, strict=True):
        assert float(row[3]) == pytest.approx((float(row[1]) + float(row[2])) / 2, abs=1.1e-3)
        assert other[1] == row[3]


def test_settings_of_a_method_lie_in_its_configuration():
    """Fig. 7 takes them; controls differ in the bias alone, whatever the files have for one."""
    home = configuration.packaged()["mnist"].parent
    runner = runs.Runner(home, home, 1, {})
    psp = runs.configured(runner, "permuted_mnist.py", "psp", 1, {})
    assert (psp.train.optimizer, psp.train.rate_decay) == ("momentum", 0.05)
    for _, file, _, fields in controls.SEQUENCES:
        changes = {name.replace("__", "."): value for name, value in fields.items()}
        same = [
            {name: value for name, value in configuration.flatten(own).items()
             if name.startswith(("train.", "model.", "ewc.", "sequence."))}
            for own in (runs.configured(runner, file, m, 1, changes) for m, _ in controls.METHODS)
        ]  # fmt: skip
        assert all(one == same[0] for one in same), file


def test_group_of_ten_and_so_far(configs, folder):
    runner = runs.Runner(folder, configs, 1, {"train.batch_size": 48})
    line = permuted.METHODS[0]
    run = runs.complete(runner, line.label, "permuted_mnist.py", line.method, 5)
    count, averages = permuted.so_far(run)
    found = runs.matrix(run)
    assert count.tolist() == list(range(1, 13)) and averages.shape == (12, 1)
    assert averages[3, 0] == pytest.approx(found[0, 3, :4].mean())


def test_length_of_the_stored_biases(configs, folder, few):
    """By hand, and none where there are none; the runs of an earlier test are taken up."""
    runner = runs.Runner(folder, configs, 1, {"train.batch_size": 48})
    more = {"evaluate__inferred_rows": "last", "evaluate__every_epochs": 1}
    run = runs.complete(runner, "BD+EWC", "mnist.py", "bd_ewc", 1, **more)
    arrays = load_file(run.folder / "model.safetensors")
    lengths = [
        np.sqrt((arrays[f"method/0/{layer}/bias"][task] ** 2).sum())
        for layer in ("hidden_0", "output")
        for task in range(2)
    ]
    assert controls.bias_length(run) == pytest.approx(np.mean(lengths)) and min(lengths) > 0
    without = runs.complete(runner, "EWC", "mnist.py", "ewc", 1, **more)
    assert np.isnan(controls.bias_length(without))


def test_probabilities_of_fig5_are_those_of_the_run(tmp_path, monkeypatch):
    """Of the first of two seeds: after task 1 in its mode, after task 2 in both."""
    config = configuration.load_file(str(ROOT / "configs" / "toy.py"))
    config.update_from_flattened_dict(
        {"method": "bd_ewc", "num_seeds": 2, "train.epochs": 2, "model.hidden": (8,)}
    )
    states, save = {}, checkpoint.save

    def spy(folder, position, state, *more):
        states[position.task] = jax.tree.map(lambda leaf: leaf[0], state.learner)
        save(folder, position, state, *more)

    monkeypatch.setattr(checkpoint, "save", spy)
    train.train_and_evaluate(config, tmp_path)
    points = np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)
    found = regions.probabilities(runs.read(tmp_path, "BD+EWC", ""), config, points)
    assert list(found) == [(1, 0), (2, 0), (2, 1)]
    learner = make_experiment(config, load_sequence(config)).learner
    for (learned, task), black in found.items():
        logits = np.asarray(learner.apply(states[learned], points, task))
        odds = np.exp(logits - logits[:, :1])
        np.testing.assert_allclose(black, 1 / odds.sum(1), rtol=1e-4)
    predictor = bpnjax.load(tmp_path)
    np.testing.assert_allclose(found[2, 1], predictor.probabilities(points, 1)[:, 0], rtol=1e-4)
    assert not np.allclose(found[1, 0], found[2, 0], atol=1e-3)


def test_holm_against_its_definition():
    p = np.random.default_rng(0).uniform(0, 0.1, 6)
    expected, worst = {}, 0.0
    for rank, i in enumerate(np.argsort(p)):
        worst = max(worst, (6 - rank) * p[i])
        expected[i] = min(worst, 1.0)
    np.testing.assert_allclose(permuted.holm(p), [expected[i] for i in range(6)])
    assert [permuted.stars(p) for p in (5e-4, 5e-3, 0.03, 0.2)] == ["***", "**", "*", "n.s."]


@pytest.mark.parametrize(
    "mean, paper, expected",
    [(0.5, None, "-"), (0.49, 0.5, "reproduced"), (0.6, 0.5, "reproduced, higher"),
     (0.4, 0.5, "differs"), (0.01, 0.0, "reproduced"), (0.8, 0.0, "differs")],
)  # fmt: skip
def test_state_of_a_figure(mean, paper, expected):
    assert report.state(mean, paper) == expected


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "--artefact: missing"),
        (["--artefact=fig9"], "--artefact: unknown artefact 'fig9'; choose from: fig5"),
        (["--artefact=fig5", "--num_seeds=0"], "--num_seeds: '0' is not a number above 0"),
        (["--artefact=fig5", "--configs=/nowhere"], "--configs: no mnist.py in /nowhere"),
        (["--artefact=fig5", "--config.train.epoch=1"], "train.epoch: unknown config field"),
        (["--artefact=fig5", "--nonsense=1"], "nonsense"),
        (
            ["--artefact=table2", "--sequence=eight"],
            "--sequence: unknown sequence 'eight'; choose from: eight_tasks, eight_domains",
        ),
    ],
)
def test_refusals(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.run(flags) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("bpnjax: ") and message in error and "\n" not in error
    assert not list(tmp_path.iterdir())


def test_a_run_not_tested_by_epoch_cannot_be_drawn(tmp_path):
    run = runs.Run("x", {}, [{"kind": "train"}], tmp_path, "")
    with pytest.raises(UserError, match="was not tested after each epoch"):
        runs.by_epoch(run)
