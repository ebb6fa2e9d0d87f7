"""Packs: tasks learned apart on one frozen network answer together as where they were learned."""

import json
import re
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import digits_config

import bpnjax
from bpnjax.data import load_sequence
from bpnjax.run import packs, predictor, train
from bpnjax.run.export import save_models
from bpnjax.training import epochs
from bpnjax.training.experiment import make_experiment
from bpnjax.utils import arrays
from bpnjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_once")

PRETRAIN = {
    "train__epochs": 2, "dataset__normalize": "unit", "sequence__num_tasks": 1,
    "sequence__classes_per_task": 10,
}  # fmt: skip
RUN = {
    "train__epochs": 2, "dataset__normalize": "unit", "sequence__heads": "multi",
    "train__rates": "(?!output).*=0",
}  # fmt: skip
ADA, BOB = "0,1;2,3", "4,5;6,7,8"


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A network trained on all ten digits, for others to start from."""
    folder = tmp_path_factory.mktemp("pretrained")
    train.train_and_evaluate(digits_config("sgd", **PRETRAIN), folder)
    return folder / "model.safetensors"


@pytest.fixture(scope="module")
def two(network, tmp_path_factory):
    """Two people's runs on the frozen network, with other classes and other seeds."""
    folders = []
    for seed, classes in ((1, ADA), (2, BOB)):
        config = digits_config(
            "bd_psp", sequence__classes=classes, seed=seed, model__pretrained=str(network), **RUN
        )
        folders.append(tmp_path_factory.mktemp("run"))
        train.train_and_evaluate(config, folders[-1])
    return tuple(folders)


@pytest.fixture
def make_run(network, tmp_path_factory):
    """The folder of a model as two tasks leave it, without training: what they own is random."""

    def run(method, classes, **fields):
        config = digits_config(
            method, sequence__classes=classes, **RUN | {"model__pretrained": str(network)} | fields
        )
        sequence = load_sequence(config)
        experiment = make_experiment(config, sequence)
        state = epochs.init_state(experiment, jax.random.key(config.seed))
        draws = np.random.default_rng([config.seed, *classes.encode()])
        frozen = config.train.rates != ""

        def changed(name, leaf):
            if not jax.dtypes.issubdtype(leaf.dtype, jax.numpy.floating):
                return leaf
            own = "/output/" in name or leaf.shape[:1] == (2,)
            if (own and fields.get("train__rates") != ".*=0") or not frozen:
                return leaf + draws.uniform(size=leaf.shape).astype(np.float32)
            return leaf

        # Statistics have to be those of a Gaussian: a whitener with positive diagonal will do.
        if state.statistics:
            state = state.replace(statistics=jax.tree.map(np.ones_like, state.statistics))
        state = jax.tree.map(changed, arrays.names_of(state), state)
        folder = tmp_path_factory.mktemp(method)
        save_models(folder, experiment, state, 1, sequence)
        return folder

    return run


def pack_all(runs, folder, **options):
    """A pack of both tasks of each run."""
    names = [folder / f"{i}.pack" for i, _ in enumerate(runs)]
    for run, name in zip(runs, names, strict=True):
        packs.pack(run, [0, 1], name, **options)
    return names


def examples():
    """All test examples of the digits."""
    config = digits_config("sgd", **PRETRAIN)
    return load_sequence(config).test.images


def assert_answers_as(merged, runs):
    """Every task of the merged model answers as in the run that it comes from.

    Its output layer is wider, and XLA may round the products of another width otherwise.
    """
    x, number = examples(), 0
    for run in runs:
        one = bpnjax.load(run)
        for task in range(one.num_tasks):
            theirs = one.logits(x, task)[:, one.outputs[task]]
            ours = merged.logits(x, number)[:, merged.outputs[number]]
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
            names = [np.array(m.class_names)[m(x, t)] for m, t in ((merged, number), (one, task))]
            assert (names[0] == names[1]).all()
            number += 1
    assert number == merged.num_tasks


def test_two_runs_become_one_model_in_either_order(two, network, tmp_path):
    ada, bob = pack_all(two, tmp_path)
    assert ada.stat().st_size < 20_000
    merged = packs.merge(network, [ada, bob], tmp_path / "one.safetensors")
    packs.merge(network, [bob, ada], tmp_path / "other.safetensors")
    packs.merge(two[1], [bob, ada], tmp_path / "third.safetensors")  # the same network
    one, other, third = (
        (tmp_path / f"{n}.safetensors").read_bytes() for n in ("one", "other", "third")
    )
    assert one == other == third
    loaded = bpnjax.load(tmp_path / "one.safetensors")
    assert loaded.class_names == tuple("012345678")
    assert [np.flatnonzero(row).tolist() for row in loaded.outputs] == [
        [0, 1], [2, 3], [4, 5], [6, 7, 8]
    ]  # fmt: skip
    assert repr(loaded) == (
        "Predictor(bd_psp, 4 tasks, 9 outputs, inputs uint8[8, 8, 1], merged from packs)"
    )
    for model in (merged, loaded):
        assert_answers_as(model, two)
    # In one batch, and asked for the task.
    x = examples()[:40]
    ids = np.arange(40) % 4
    mixed = loaded.logits(x, ids)
    for task in range(4):
        np.testing.assert_allclose(
            mixed[ids == task], loaded.logits(x, task)[ids == task], rtol=1e-5
        )
    assert loaded.infer(x).scores.shape == (40, 4)


def test_a_pack_holds_what_belongs_to_its_tasks(two, tmp_path):
    made = packs.pack(two[1], 1, tmp_path / "one.pack")
    (task,) = made.tasks
    assert task.classes == ("6", "7", "8") and task.outputs == ()
    assert {name: array.shape for name, array in task.arrays.items()} == {
        "params/output/kernel": (16, 3), "params/output/bias": (3,),
        "method/0/hidden_0/bias": (16,), "method/0/output/bias": (3,),
        "method/1/hidden_0/key/seed": (2,), "method/1/output/key/seed": (2,),
    }  # fmt: skip
    assert set(made.shared) == {"params/hidden_0/kernel", "params/hidden_0/bias"}
    whole, read = load_file(two[1] / "model.safetensors"), packs.unpack(tmp_path / "one.pack")
    np.testing.assert_array_equal(
        task.arrays["params/output/kernel"], whole["params/output/kernel"][:, 2:]
    )
    np.testing.assert_array_equal(
        task.arrays["method/0/output/bias"], whole["method/0/output/bias"][1, 2:]
    )
    assert read.agreement == made.agreement and read.shared == made.shared
    assert read.tasks[0].identity == task.identity and read.network == made.network
    assert repr(read) == f"Pack(bd_psp, network {read.network[:12]}, tasks: 6, 7, 8)"
    assert read.tasks[0].arrays.keys() == task.arrays.keys()
    # By itself it makes a model of one task.
    alone = packs.merge(two[0], [tmp_path / "one.pack"], tmp_path / "alone.safetensors")
    x, source = examples(), bpnjax.load(two[1])
    np.testing.assert_allclose(alone.logits(x, 0), source.logits(x, 1)[:, 2:], rtol=1e-5, atol=1e-5)


def test_tasks_of_a_merged_model_are_packed_again(two, network, tmp_path):
    """Through a second pack a task stays what it is, keys too."""
    ada, bob = pack_all(two, tmp_path)
    packs.merge(network, [ada, bob], tmp_path / "all.safetensors")
    packs.pack(tmp_path / "all.safetensors", [3, 0], tmp_path / "some.pack")
    packs.pack(tmp_path / "all.safetensors", [1, 2], tmp_path / "others.pack")
    again = [tmp_path / "others.pack", tmp_path / "some.pack"]
    packs.merge(network, again, tmp_path / "again.safetensors")
    one, two = ((tmp_path / f"{n}.safetensors").read_bytes() for n in ("all", "again"))
    assert one == two


KEPT = {"evaluate__rule": "statistics", "evaluate__statistics": 6}
MIXTURES = {"evaluate__rule": "gmm", "evaluate__clusters": 2}


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("er", {}),
        ("xdg_ewc", {"xdg__gated": 0.5}),
        ("imm_mean", {}),
        ("bd_ewc", KEPT),
        ("bd_ewc", MIXTURES),
    ],
)
def test_other_methods(make_run, network, tmp_path, method, fields):
    runs = make_run(method, ADA, **fields), make_run(method, BOB, **fields)
    base = runs[0] if method == "imm_mean" else network  # whose shared network is its own
    merged = packs.merge(base, pack_all(runs, tmp_path), tmp_path / "all.safetensors")
    assert_answers_as(merged, runs)
    if fields in (KEPT, MIXTURES):
        x = examples()
        scores = merged.infer(x).scores
        each = [bpnjax.load(run).infer(x).scores for run in runs]
        np.testing.assert_allclose(scores, np.concatenate(each, 1), rtol=1e-5)


def test_a_precision_that_tasks_share_goes_into_no_pack(make_run, tmp_path):
    run = make_run("bd_ewc", ADA, evaluate__rule="mahalanobis")
    with pytest.raises(UserError, match="evaluate.rule=mahalanobis keeps one precision of all"):
        packs.pack(run, 0, tmp_path / "one.pack")
    packs.pack(run, 0, tmp_path / "one.pack", statistics=False)


def test_a_network_that_is_all_frozen(make_run, network, tmp_path):
    """Tasks that share their outputs, each with pixels in an order of its own."""
    fields = {"sequence__kind": "permuted", "sequence__num_tasks": 2, "sequence__heads": "single",
              "train__rates": ".*=0"}  # fmt: skip
    runs = [make_run("bd_ewc", "", seed=s, **fields) for s in (1, 2)]
    # The output layer is drawn anew by each run, and here it is shared.
    names = pack_all(runs, tmp_path)
    with pytest.raises(UserError, match=r"the network that tasks share: params/output/kernel"):
        packs.merge(network, names, tmp_path / "all.safetensors")
    packs.pack(runs[0], 0, tmp_path / "0.pack")
    packs.pack(runs[0], 1, tmp_path / "1.pack")
    merged = packs.merge(runs[0], names, tmp_path / "all.safetensors")
    source, x = bpnjax.load(runs[0]), examples()
    assert merged.class_names == source.class_names
    matched = set()
    for task in range(2):
        theirs = source.logits(source.permuted(x, task), task)
        for number in range(2):
            ours = merged.logits(merged.permuted(x, number), number)
            if np.array_equal(ours, theirs):
                matched.add(number)
    assert matched == {0, 1}


@pytest.mark.parametrize("whole", [True, False])
def test_statistics_of_a_run_with_another_seed(make_run, network, tmp_path, whole):
    """Their projections differ; without them tasks are told apart by entropy."""
    runs = make_run("bd_ewc", ADA, seed=1, **KEPT), make_run("bd_ewc", BOB, seed=2, **KEPT)
    names = pack_all(runs, tmp_path, statistics=whole)
    if whole:
        with pytest.raises(UserError, match=r'evaluate.statistics is {"seed": 1, "proj.*"seed": 2'):
            packs.merge(network, names, tmp_path / "all.safetensors")
        return
    merged = packs.merge(network, names, tmp_path / "all.safetensors")
    assert merged.rule == "entropy" and merged.statistics is None
    assert_answers_as(merged, runs)


# What cannot be packed or merged.


def changed_copy(run, file, **changes):
    """The model of a run with some arrays changed."""
    found, metadata = load_file(run / "model.safetensors"), None
    metadata = predictor.read_metadata(run / "model.safetensors")
    for name, change in changes.items():
        name = name.replace("__", "/")
        found[name] = change(found[name])
    save_file(found, file, metadata)
    return file


def test_packs_of_other_networks_are_refused(two, network, tmp_path):
    ada, bob = pack_all(two, tmp_path)
    other = changed_copy(
        two[1], tmp_path / "m.safetensors", params__hidden_0__kernel=lambda a: a * 1.001
    )
    packs.pack(other, [0], tmp_path / "other.pack")
    out = tmp_path / "all.safetensors"
    with pytest.raises(
        UserError, match=r"0.pack and .*other.pack differ in .* params/hidden_0/ker"
    ):
        packs.merge(network, [ada, tmp_path / "other.pack"], out)
    with pytest.raises(
        UserError,
        match=r"m.safetensors: not the network of .*0.pack .*kernel \(other numbers\); pac",
    ):
        packs.merge(other, [ada, bob], out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"method": "bd_ewc"}, r'method is "bd_psp" in .* and "bd_ewc" in'),
        ({"dataset__normalize": "standard"}, r"dataset.normalize is .* each run measured its own"),
        (
            {"psp__layers": "output"},
            r"differ in what they have per task: method/1/hidden_0/key/seed",
        ),
        ({"sequence__heads": "single", "train__rates": ""}, r'sequence.heads is "multi" in'),
    ],
)
def test_packs_that_differ_are_refused(two, make_run, network, tmp_path, fields, said):
    fields = {"train__epochs": 1} | fields
    run = make_run(fields.pop("method", "bd_psp"), BOB, **fields)
    names = pack_all((two[0], run), tmp_path)
    with pytest.raises(UserError, match=said) as error:
        packs.merge(network, names, tmp_path / "all.safetensors")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "all.safetensors").exists()


def test_a_setting_that_changes_answers_is_noticed(make_run, network, tmp_path):
    """The share of silent units is in no array; what it changes shows in the answers."""
    runs = [make_run("xdg", c, xdg__gated=g) for c, g in ((ADA, 0.2), (BOB, 0.8))]
    with pytest.raises(UserError, match=r"other answers than .* differ: xdg.gated 0.2 and 0.8; tr"):
        packs.merge(network, pack_all(runs, tmp_path), tmp_path / "all.safetensors")
    assert not (tmp_path / "all.safetensors").exists()


def test_what_cannot_be_packed(two, make_run, tmp_path):
    out = tmp_path / "a.pack"
    for tasks, said in (
        ([2], "tasks: .* has no task 2, but 0 to 1 "), ([-1], "tasks: .* has no task -1, but"),
        ([0, 0], r"tasks: \[0, 0\]; name at least one, and each once"), ([], "name at least one"),
        (["a"], "tasks: .* has no task 'a'"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            packs.pack(two[0], tasks, out)
    with pytest.raises(UserError, match="stl keeps a whole network for each task"):
        packs.pack(make_run("stl", ADA, train__epochs=1), [0], out)
    shared = make_run("er", ADA, train__epochs=1, sequence__heads="single", train__rates="")
    with pytest.raises(UserError, match="nothing in it belongs to single tasks; train with seq"):
        packs.pack(shared, [0], out)
    with pytest.raises(UserError, match="no model .*none"):
        packs.pack(tmp_path / "none", [0], out)
    with pytest.raises(UserError, match="out: no folder"):
        packs.pack(two[0], [0], tmp_path / "none" / "a.pack")
    assert not out.exists()


def test_what_cannot_be_merged(two, network, tmp_path):
    ada, bob = pack_all(two, tmp_path)
    packs.pack(two[0], [1], tmp_path / "again.pack")
    out = tmp_path / "all.safetensors"

    def refused(names, said, target=out):
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(UserError, match=said) as error:
            packs.merge(network, names, target)
        assert "\n" not in str(error.value)
        assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}

    refused([], "packs: none given")
    refused([ada, bob, tmp_path / "again.pack"],
            r"the task 2, 3 of .*again.pack is also in .*0.pack; leave one")  # fmt: skip
    refused([ada, ada], "the task 0, 1 of .* is also in")
    refused([ada, tmp_path / "none.pack"], r"none.pack: no such file")
    refused(
        [ada, two[1] / "model.safetensors"], "is not a pack but a model; packs.pack makes one of it"
    )
    refused([ada, bob], "out: .* is what is read", ada)
    (tmp_path / "text.pack").write_text("no")
    refused([ada, tmp_path / "text.pack"], "text.pack is not a safetensors file")
    save_file({"a": np.zeros(1)}, tmp_path / "odd.pack")
    refused([ada, tmp_path / "odd.pack"], "odd.pack is not a pack but something else")
    found, metadata = arrays.read(bob)
    for name, change in (("1/probe", None), ("1/params/output/bias", lambda a: a + 1)):
        less = {n: a for n, a in found.items() if n != name}
        if change:
            less[name] = change(found[name])
        save_file(less, tmp_path / "odd.pack", metadata)
        refused([ada, tmp_path / "odd.pack"], "odd.pack: .*make the pack again")
    for name, text in (("tasks", "{"), ("tasks", "3"), ("agreement", "[]"), ("fields", "1")):
        save_file(found, tmp_path / "odd.pack", metadata | {name: text})
        refused([ada, tmp_path / "odd.pack"], "odd.pack: damaged .*make the pack again")
    with pytest.raises(UserError, match="no model"):
        packs.merge(tmp_path / "none", [ada], out)


def test_a_pack_cannot_name_code(two, network, tmp_path, monkeypatch):
    """Merging would import it; the code that the own model names is trusted."""
    ada, _ = pack_all(two, tmp_path)
    (tmp_path / "code_of_a_pack.py").write_text("raise RuntimeError('imported')")
    monkeypatch.chdir(tmp_path)
    found, metadata = arrays.read(ada)
    metadata.pop("checksum", None)
    for named in (
        {"model.factory": "code_of_a_pack:make"},
        {"model": {"factory": "code_of_a_pack:make"}},
    ):
        fields = {f: v for f, v in json.loads(metadata["fields"]).items() if f != "model.factory"}
        arrays.write(
            tmp_path / "odd.pack", found, metadata | {"fields": json.dumps(named | fields)}
        )
        with pytest.raises(
            UserError, match=r"odd.pack: its network is model.factory=code_of_a_pack"
        ):
            packs.merge(network, [tmp_path / "odd.pack"], tmp_path / "all.safetensors")
    assert "code_of_a_pack" not in sys.modules and not (tmp_path / "all.safetensors").exists()


def test_a_merged_model_says_what_it_is(two, network, tmp_path):
    file = tmp_path / "all.safetensors"
    packs.merge(network, pack_all(two, tmp_path), file)
    metadata = predictor.read_metadata(file)
    assert json.loads(metadata["scale"]) == pytest.approx([1 / 16])
    config = json.loads(metadata["config"])
    assert config["method"] == "bd_psp" and config["model"]["hidden"] == [16]
    assert "pretrained" not in config["model"] and "dataset" not in config
    assert not re.search(r"/tmp|/home", json.dumps(metadata))
    # It is no run to go on with.
    fields = RUN | {"model__pretrained": str(network), "resume_from": str(file)}
    config = digits_config("bd_psp", sequence__classes=f"{ADA};{BOB};0,9", **fields)
    with pytest.raises(UserError, match=r"--resume_from: .* was merged from packs; "):
        train.train_and_evaluate(config, tmp_path / "run")
