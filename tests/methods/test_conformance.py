"""Conformance over the registry: what every method must do, in the command and in a user's loop."""

import dataclasses
import textwrap
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import ROOT
from support import ANALYTIC, FROZEN, PARTS, Jitted, digits_config, marked_slow, whole_registry

import bpnjax
from bpnjax import modes
from bpnjax.methods import REGISTRY
from bpnjax.run import byte_counts, export
from bpnjax.training import epochs
from bpnjax.training.task_data import make_reader
from bpnjax.utils import arrays, prng

pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture(scope="module", params=marked_slow(*PARTS))
def trained(request):
    wide = {"model__hidden": (100,)} if request.param in (*ANALYTIC, *FROZEN) else {}
    jitted = Jitted(digits_config(request.param, **wide))
    stages = [2] if jitted.experiment.jointly else None
    state, sums = jitted.train(jax.random.key(0), stages, epochs=12 if stages else None)
    return jitted, state, sums


def test_learns_three_tasks(trained):
    jitted, state, sums = trained
    found = jitted.test(state, 2)
    name = jitted.config.method
    if name not in ANALYTIC:  # whose steps learn nothing
        assert float(sums.correct / sums.examples) > 0.7  # the task just learned
    if not name.startswith("imm"):  # answers with a merge of three networks
        assert found["task_told"][2] > 0.9
    assert found["task_masked"][2] >= found["task_told"][2]
    guess = found.pop("task_guess")  # of methods with modes
    assert np.isfinite(guess).all() == jitted.experiment.told_task
    assert all(np.isfinite(v).all() for v in found.values())
    if name == "stl":  # nothing is forgotten
        assert found["task_told"].min() > 0.9
    assert int(sums.bad_step) == -1
    count = jitted.sequence.train.count
    # No example dropped or counted twice.
    assert int(sums.examples) == (count.sum() if jitted.experiment.jointly else count[2])


def test_compiles_its_step_once(trained):
    jitted, *_ = trained
    assert jitted.traces == 1


def test_keeps_structure_shapes_and_dtypes(trained):
    jitted, state, _ = trained
    first = jax.eval_shape(partial(epochs.init_state, jitted.experiment), jax.random.key(0))
    assert jax.tree.structure(first) == jax.tree.structure(state)
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), first, state)
    assert all(jax.tree.leaves(same))
    assert int(state.learner.task) == -1
    assert not any(leaf.any() for leaf in jax.tree.leaves(state.learner.task_params))


def test_examples(jitted, task):
    """The test examples of a task, and the outputs that stand for their classes."""
    split = jitted.sequence.test
    rows = split.index[task][: split.count[task]]
    return split.images[rows], jitted.sequence.columns[task, split.labels[rows]]


test_examples.__test__ = False


def assert_answers_agree(jitted, state, folder):
    """One way to answer: the run's tests, the loaded model and the loaded state."""
    correct = jax.tree.map(np.asarray, jitted.evaluate(state, jitted.data, 2, True))
    export.save_models(folder, jitted.experiment, state, 1, jitted.sequence)
    predictor, learner = bpnjax.load(folder), jitted.learner
    learner.save(state.learner, folder / "state.safetensors")
    again = learner.load(folder / "state.safetensors")
    both = (prng.to_numbers(tree) for tree in (again, state.learner))
    jax.tree.map(np.testing.assert_array_equal, *both)
    images, labels, ids = [], [], []
    for task in range(3):
        x, y = test_examples(jitted, task)
        own = jitted.sequence.classes[task]
        ours = learner.answer(state.learner, jnp.asarray(x), task)
        for logits in (
            ours, predictor.logits(x, task), learner.apply(again, x, task),
            predictor.learner.apply(predictor.state, x, task),
        ):  # fmt: skip
            np.testing.assert_allclose(logits, ours, rtol=1e-4, atol=1e-4)
            assert (np.argmax(logits, -1) == y).sum() == correct.task_told[task]
            within = np.where(own, logits, -np.inf)
            assert (np.argmax(within, -1) == y).sum() == correct.task_masked[task]
        if jitted.experiment.told_task:
            guess = predictor.infer(x)
            assert (guess.outputs == y).sum() == correct.task_inferred[task]
            assert (guess.task == task).sum() == correct.task_guess[task]
        images.append(x[:7])
        labels.append(y[:7])
        ids.append(np.full(7, task))
    # Tasks mixed in one batch.
    x, ids = np.concatenate(images), np.concatenate(ids)
    mixed = learner.apply(state.learner, x, ids)
    np.testing.assert_allclose(predictor.logits(x, ids), mixed, rtol=1e-4, atol=1e-4)
    for task in range(3):
        alone = learner.apply(state.learner, x, task)
        np.testing.assert_allclose(mixed[ids == task], alone[ids == task], rtol=1e-4, atol=1e-4)


def test_saved_and_loaded_it_answers_as_in_its_run(trained, tmp_path):
    jitted, state, _ = trained
    assert_answers_agree(jitted, state, tmp_path)


@pytest.mark.parametrize("kind", [kind for kind in modes.MODULATIONS if kind != "bias"])
def test_every_modulation_is_answered_as_in_its_run(kind, tmp_path):
    network = {"model__name": "convnet", "model__channels": (4,)} if kind == "depthwise" else {}
    jitted = Jitted(digits_config("bd_ewc", bd__modulation=kind, train__epochs=2, **network))
    state, _ = jitted.train(jax.random.key(0), epochs=2)
    assert jitted.traces == 1
    assert_answers_agree(jitted, state, tmp_path)
    if kind == "mask":  # 16 units and 6 outputs: a bit each
        assert byte_counts.report(jitted.experiment)["bytes_per_task"] == 3


def counting(learner):
    """The same learner, and a list that grows when its training step is traced."""
    traces, network = [], learner.network

    def apply(params, mode, x, *, train=False, **options):
        if train:
            traces.append(1)
        return network.apply(params, mode, x, train=train, **options)

    setup = dataclasses.replace(learner.setup, network=dataclasses.replace(network, apply=apply))
    return dataclasses.replace(learner, setup=setup), traces


def batches_of(jitted, key, task, epoch):
    """The batches of an epoch, each of the same size: x, y, weight and the task of each example."""
    experiment, split = jitted.experiment, jitted.data.train
    slots, count = epochs.epoch_order(experiment, key, split, task, epoch)
    reader = make_reader(experiment, key, jitted.data, None if experiment.jointly else task)
    slots, size = slots[: int(count)], jitted.config.train.batch_size
    x, y = map(np.asarray, reader.take(split, slots))
    tasks = np.asarray(slots // split.index.shape[1])
    for start in range(0, len(x), size):
        rows = np.arange(start, start + size)
        weight = (rows < len(x)).astype(np.float32)
        rows = np.minimum(rows, len(x) - 1)  # the padding holds examples that must not count
        yield x[rows], y[rows], weight, tasks[rows]


# Permuted inputs reach all methods by the same way: some of each kind stand for them.
PERMUTED = [pytest.param(m, "permuted") for m in ("bd_psp", "ewc", "gem", "joint")]
# Others have the same hooks with other settings.
ALIKE = ("derpp", "ewc_masked", "ewc_online", "imm_mean", "random_bias_ewc")
IN_TURN = [pytest.param(*p.values, "class_split", marks=p.marks) for p in whole_registry(*ALIKE)]


@pytest.mark.parametrize("method, kind", IN_TURN + PERMUTED)
def test_the_command_does_what_a_users_own_loop_does(method, kind):
    """The same batches give the same parameters, and a step is compiled once for all tasks."""
    fields = dict(train__batch_size=64, train__epochs=2, sequence__kind=kind,
                  train__optimizer="sgd", ewc_kfac__every=3, lwf__warmup_steps=3)  # fmt: skip
    if kind == "permuted":
        fields |= dict(sequence__first_identity=False, sequence__examples_per_task=150)
    jitted, key = Jitted(digits_config(method, **fields)), jax.random.key(3)
    tasks = [2] if jitted.experiment.jointly else [0, 1, 2]
    learner, traces = counting(jitted.learner)
    theirs, ours = jitted.init(key), learner.init(key)
    for task in tasks:
        theirs = jitted.begin_task(theirs, task)
        ours = learner.begin_task(ours, task)
        totals, traced = np.zeros(3), []
        for epoch in range(2):
            theirs, sums = jitted.run_steps(theirs, jitted.data, task, epoch, 0, jitted.steps(task))
            given = list(batches_of(jitted, key, task, epoch))
            for x, y, weight, of in given:
                four = (x, y, weight, of) if jitted.experiment.jointly else (x, y, weight)
                before = len(traces)
                ours, metrics = learner.step(ours, four)
                traced.append(len(traces) - before)
                share = np.array([metrics["loss"], metrics["accuracy"], 1.0])
                totals += float(metrics["examples"]) * share if epoch else 0.0
        assert traced[0] > 0 or task != tasks[0]
        assert not any(traced[1:] if task == tasks[0] else traced)
        np.testing.assert_allclose(totals[:2], [sums.loss, sums.correct], rtol=1e-4)
        assert totals[2] == sums.examples
        real = np.concatenate([weight > 0 for _, _, weight, _ in given])
        x, y = (np.concatenate([batch[i] for batch in given])[real] for i in (0, 1))
        theirs = jitted.end_task(theirs, jitted.data, task)
        ours = learner.end_task(ours, (x, y))
    # A state of the command and one of the loop are one.
    assert jax.tree.structure(theirs.learner) == jax.tree.structure(ours)
    theirs, ours = (arrays.flatten(state) for state in (theirs.learner, ours))
    for name, a in theirs.items():
        if "/basis/" in name:  # eigenvectors of nearly equal matrices; what they do is in params
            continue
        scale = max(1.0, np.abs(a).max())
        np.testing.assert_allclose(a, ours[name], rtol=0, atol=2e-6 * scale, err_msg=name)


@pytest.mark.parametrize("method", whole_registry("ebll", "agem", "derpp"))
def test_jit_equals_no_jit(method):
    jitted = Jitted(digits_config(method, train__batch_size=8))
    key = jax.random.key(1)

    def short(jitted):
        state = jitted.begin_task(jitted.init(key), 0)
        state, _ = jitted.run_steps(state, jitted.data, 0, 0, 0, 1)
        state = jitted.begin_task(jitted.end_task(state, jitted.data, 0), 1)
        return jitted.run_steps(state, jitted.data, 1, 0, 0, 1)[0].learner.params

    fast = short(jitted)
    with jax.disable_jit():
        slow = short(jitted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), fast, slow)


@pytest.mark.parametrize("method", whole_registry())
def test_vmap_over_seeds_equals_single_runs(method):
    jitted = Jitted(digits_config(method, train__batch_size=64))
    keys = jnp.stack([jax.random.key(s) for s in (3, 4)])

    def short(key):
        experiment, data = jitted.experiment, jitted.data

        def one_task(task, state):
            state = epochs.begin_task(experiment, state, task)
            state, _ = epochs.run_steps(experiment, state, data, task, 0, 0, 2)
            return epochs.end_task(experiment, state, data, task)

        state = jax.lax.fori_loop(0, 2, one_task, epochs.init_state(experiment, key))
        return state.learner.params

    both = jax.jit(jax.vmap(short))(keys)
    for i, key in enumerate(keys):
        alone = jax.jit(short)(key)
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-3, atol=1e-5), both, alone
        )


def test_every_method_of_the_registry_says_what_it_is():
    for name, factory in REGISTRY.items():
        method = factory()
        assert method.name == factory.name == name
        assert method.paper == factory.paper
        assert factory.__doc__.strip().endswith((".", "formula.", "each."))


def test_the_method_of_the_contributing_guide_works():
    """Its code, as it stands there: it learns, and pulls from the second task on."""
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    lines = guide.split("For example, L2", 1)[1].split("\n2. ", 1)[0].splitlines(keepends=True)
    code = "".join(line for line in lines if line.isspace() or line.startswith(7 * " "))
    exec(textwrap.dedent(code), {})
    try:
        key = jax.random.key(0)
        runs = {m: Jitted(digits_config(m)) for m in ("sgd", "l2")}
        first, second = (
            {m: run.train(key, tasks, epochs=2)[0].learner.params for m, run in runs.items()}
            for tasks in ([0], [0, 1])
        )
    finally:
        REGISTRY.pop("l2", None)
    apart = [
        np.abs(found["l2"]["output"]["kernel"] - found["sgd"]["output"]["kernel"]).max()
        for found in (first, second)
    ]
    assert apart[0] < 1e-6 < 1e-4 < apart[1]


def test_stl_keeps_every_network_and_starts_each_anew():
    jitted, key = Jitted(digits_config("stl", train__epochs=2)), jax.random.key(0)
    starts, state = [], jitted.init(key)
    for task in range(3):
        starts.append(jitted.begin_task(state, task).learner.params)
        state, _ = jitted.train_task(state, task)
    kernels = [np.asarray(start["hidden_0"]["kernel"]) for start in starts]
    for one, other in [(0, 1), (0, 2), (1, 2)]:
        assert (kernels[one] != kernels[other]).all()
        assert abs(kernels[one].std() / kernels[other].std() - 1) < 0.1  # of one distribution
    early, _ = jitted.train(key, [0])
    networks = [jax.tree.map(lambda leaf: leaf[0], s.learner.method) for s in (state, early)]
    jax.tree.map(np.testing.assert_array_equal, *networks)
    # A later task's network does not depend on what was trained before.
    alone, _ = jitted.train(key, [2])
    networks = [jax.tree.map(lambda leaf: leaf[2], s.learner.method) for s in (state, alone)]
    jax.tree.map(np.testing.assert_array_equal, *networks)
