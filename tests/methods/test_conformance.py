"""Conformance over the registry: what every method must do, and the closed forms of each."""

import pathlib
import textwrap
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import Jitted, digits_config, whole_registry

from bpnjax import importance
from bpnjax.evaluation.accuracy import accuracies, evaluate
from bpnjax.methods import REGISTRY, ewc
from bpnjax.networks.linen import find_layers, modulated_apply
from bpnjax.training import epochs
from bpnjax.training.task_data import make_view

pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture(scope="module", params=sorted(REGISTRY))
def trained(request):
    jitted = Jitted(digits_config(request.param))
    key = jax.random.key(0)
    stages = [2] if jitted.problem.method.joint else None
    state, sums = jitted.train(key, stages, epochs=12 if stages else None)
    return jitted, key, state, sums


def test_learns_three_tasks(trained):
    jitted, key, state, sums = trained
    found = accuracies(
        jitted.evaluate(key, state, jitted.data, 2, True), jitted.sequence.test.count
    )
    assert float(sums.correct / sums.examples) > 0.7  # the task just learned
    if not jitted.problem.method.name.startswith("imm"):  # answers with a merge of three networks
        assert found["task_told"][2] > 0.9
    assert found["task_masked"][2] >= found["task_told"][2]
    guess = found.pop("task_guess")  # of methods with modes
    assert np.isfinite(guess).all() == jitted.problem.method.told_task
    assert all(np.isfinite(v).all() for v in found.values())
    assert int(sums.bad_step) == -1
    assert int(sums.examples) == (
        jitted.sequence.train.count.sum()
        if jitted.problem.method.joint
        else jitted.sequence.train.count[2]
    )  # no example dropped or counted twice


def test_compiles_its_step_once(trained):
    jitted, *_ = trained
    assert jitted.traces == 1


def test_keeps_structure_shapes_and_dtypes(trained):
    jitted, key, state, _ = trained
    first = jax.eval_shape(partial(epochs.init_state, jitted.problem), key)
    assert jax.tree.structure(first) == jax.tree.structure(state)
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), first, state)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("method", whole_registry("ebll", "agem", "derpp"))
def test_jit_equals_no_jit(method):
    jitted = Jitted(digits_config(method, train__batch_size=8))
    key = jax.random.key(1)

    def short(jitted):
        state = jitted.begin_task(key, jitted.init(key), 0)
        state, _ = jitted.run_steps(key, state, jitted.data, 0, 0, 0, 1)
        state = jitted.end_task(key, state, jitted.data, 0)
        state = jitted.begin_task(key, state, 1)
        return jitted.run_steps(key, state, jitted.data, 1, 0, 0, 1)[0]

    fast = short(jitted)
    with jax.disable_jit():
        slow = short(jitted)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), fast.core, slow.core
    )


@pytest.mark.parametrize("method", whole_registry())
def test_vmap_over_seeds_equals_single_runs(method):
    jitted = Jitted(digits_config(method, train__batch_size=64))
    keys = jnp.stack([jax.random.key(s) for s in (3, 4)])

    def short(key):
        problem, data = jitted.problem, jitted.data

        def one_task(task, state):
            state = epochs.begin_task(problem, key, state, task)
            state, _ = epochs.run_steps(problem, key, state, data, task, 0, 0, 2)
            return epochs.end_task(problem, key, state, data, task)

        return jax.lax.fori_loop(0, 2, one_task, epochs.init_state(problem, key)).core

    both = jax.jit(jax.vmap(short))(keys)
    for i, key in enumerate(keys):
        core = jax.jit(short)(key)
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-3, atol=1e-5), both, core
        )


@pytest.mark.parametrize("method", [m for m in sorted(REGISTRY) if m.startswith(("bd", "gd"))])
def test_dropping_the_factors_leaves_predictions_unchanged(method):
    jitted = Jitted(digits_config(method))
    key = jax.random.key(0)
    state = jitted.begin_task(key, jitted.init(key), 0)
    state, _ = jitted.run_steps(key, state, jitted.data, 0, 0, 0, 5)
    method = jitted.problem.method
    x = jnp.asarray(jitted.sequence.test.images[:50], jnp.float32)
    before = method.train_mode(state.learned, method.mode(state.method, 0))
    assert any(np.abs(layer["bias"]).max() > 0 for layer in before.values())
    ended = jitted.end_task(key, state, jitted.data, 0)
    after = method.mode(ended.method, 0)
    # Equal up to the rounding of M W, which is compiled once alone and once inside a program.
    np.testing.assert_allclose(
        modulated_apply(jitted.problem.model, state.core, before, x),
        modulated_apply(jitted.problem.model, ended.core, after, x),
        rtol=1e-5,
        atol=1e-6,
    )
    assert all(not leaf.any() for leaf in jax.tree.leaves(ended.learned))
    assert "M" not in str(jax.tree_util.tree_structure(method.stored(ended.method)))


def test_bd_starts_as_the_plain_network_and_moves_by_epsilon():
    jitted = Jitted(digits_config("bd_ewc", bd__epsilon=0.25))
    key = jax.random.key(0)
    state = jitted.begin_task(key, jitted.init(key), 0)
    for factors in state.learned["bd"].values():
        assert not factors["M"].any()
        bound = 8**-0.5
        assert 0 < np.abs(factors["W"]).max() <= bound
        assert factors["M"].shape == (1, 8)
    moved, _ = jitted.run_steps(key, state, jitted.data, 0, 0, 0, 1)
    for path, factors in moved.learned["bd"].items():
        np.testing.assert_allclose(np.abs(factors["M"]), 0.25)
        # While M is zero the gradient of W, M^T g, is zero: W has not moved yet.
        np.testing.assert_array_equal(factors["W"], state.learned["bd"][path]["W"])


def test_bd_factor_gradients_by_hand():
    """dL/dW = M^T g and M moves against sign(g W^T), with g summed over the batch."""
    jitted = Jitted(digits_config("bd_psp", train__optimizer="sgd", bd__epsilon=0.5))
    key = jax.random.key(0)
    state = jitted.begin_task(key, jitted.init(key), 0)
    state, _ = jitted.run_steps(key, state, jitted.data, 0, 0, 0, 1)
    moved, _ = jitted.run_steps(key, state, jitted.data, 0, 0, 1, 2)
    problem, data = jitted.problem, jitted.data
    slots, _ = epochs.epoch_order(problem, key, data.train, 0, 0)
    x, y = make_view(problem, key, data, 0).examples(data.train, slots[48:96])
    mode = problem.method.train_mode(state.learned, problem.method.mode(state.method, 0))

    def loss(shift):
        shifted = {p: {**v, "bias": v["bias"] + shift[p]} for p, v in mode.items()}
        logits = modulated_apply(problem.model, state.core, shifted, x)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(48), y])

    g = jax.grad(loss)({p: jnp.zeros_like(v["bias"]) for p, v in mode.items()})
    for path, factors in state.learned["bd"].items():
        new = moved.learned["bd"][path]
        np.testing.assert_allclose(
            new["M"][0], factors["M"][0] - 0.5 * np.sign(g[path] @ factors["W"].T), rtol=1e-6
        )
        expected = factors["W"] - 3e-3 * jnp.outer(factors["M"][0], g[path])
        np.testing.assert_allclose(new["W"], expected, rtol=1e-4, atol=1e-7)


def test_gd_moves_m_by_its_gradient():
    jitted = Jitted(digits_config("gd_ewc", train__optimizer="sgd"))
    key = jax.random.key(0)
    state = jitted.begin_task(key, jitted.init(key), 0)
    moved, _ = jitted.run_steps(key, state, jitted.data, 0, 0, 0, 1)
    sizes = np.abs(np.concatenate([f["M"].ravel() for f in moved.learned["bd"].values()]))
    assert len(np.unique(sizes.round(9))) > 8 and sizes.max() < 0.01


def test_ewc_first_task_is_sgd_and_later_tasks_are_not():
    key = jax.random.key(0)
    plain, _ = Jitted(digits_config("sgd")).train(key, [0])
    anchored, _ = Jitted(digits_config("ewc")).train(key, [0])
    jax.tree.map(np.testing.assert_array_equal, plain.core, anchored.core)
    jax.tree.map(np.testing.assert_array_equal, anchored.method.anchor, anchored.core)
    plain, _ = Jitted(digits_config("sgd")).train(key, [0, 1])
    anchored, _ = Jitted(digits_config("ewc")).train(key, [0, 1])
    # The anchor has moved on to the newest parameters.
    jax.tree.map(np.testing.assert_array_equal, anchored.method.anchor, anchored.core)
    assert not np.allclose(plain.core["output"]["kernel"], anchored.core["output"]["kernel"])


@pytest.mark.parametrize("anchors", ["latest", "per_task"])
def test_accumulated_anchors_equal_the_sum_of_penalties(anchors):
    """Per-task penalties add up to one, for every theta, up to a constant."""
    rng = np.random.default_rng(0)
    fishers, points = rng.gamma(1.0, size=(3, 5)), rng.normal(size=(3, 5))
    state = ewc.EwcState(jnp.zeros(5), jnp.zeros(5), jnp.float32(1.0))
    for f, p in zip(fishers, points, strict=True):
        state = ewc.accumulate(state, jnp.asarray(p), jnp.asarray(f), anchors=anchors)
    theta = rng.normal(size=5)
    got = state.importance * (theta - state.anchor)
    per_task = (fishers * (theta - points)).sum(0)
    latest = fishers.sum(0) * (theta - points[-1])
    np.testing.assert_allclose(got, per_task if anchors == "per_task" else latest, rtol=1e-4)


def test_a_fisher_of_some_examples_is_their_mean():
    """Of the first ones in the order of the task's last epoch."""
    jitted = Jitted(digits_config("ewc", train__epochs=2, ewc__examples=50))
    key = jax.random.key(0)
    state, _ = jitted.train(key, [0])
    x, y = (np.concatenate(part)[:50] for part in zip(*jitted.epoch(key, 0, 1), strict=True))
    expected = importance.fisher(jitted.problem.model, state.core, {}, x, y)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-8),
        state.method.importance, expected,
    )  # fmt: skip


def test_online_ewc_forgets_by_its_decay():
    state = ewc.EwcState(jnp.array([4.0]), jnp.zeros(1), jnp.float32(1.0))
    state = ewc.accumulate(state, jnp.ones(1), jnp.array([1.0]), decay=0.5)
    assert float(state.importance[0]) == 3.0 and float(state.anchor[0]) == 1.0


def test_strength_2000_with_plain_sgd_is_finite_in_the_proximal_form_only():
    """The paper's own strength: the explicit form goes to NaN, the default does not."""
    changes = dict(train__optimizer="sgd", train__learning_rate=0.3, bd__learning_rate=0.3,
                   ewc__strength=2000.0, ewc__fisher="true", train__epochs=2)  # fmt: skip

    def final(form):
        config = digits_config("ewc", ewc__form=form, **changes)
        state, _ = Jitted(config).train(jax.random.key(0))
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.core)])

    assert np.isfinite(final("proximal")).all()
    assert not np.isfinite(final("gradient")).all()


def test_the_rate_falls_from_task_to_task():
    """A step of task 2 (t = 1) is that without decay, divided by 1 + d."""
    key = jax.random.key(0)
    moves = []
    for decay in (0.0, 0.5):
        jitted = Jitted(digits_config("sgd", train__optimizer="sgd", train__rate_decay=decay))
        state = jitted.begin_task(key, jitted.init(key), 1)
        moved, _ = jitted.run_steps(key, state, jitted.data, 1, 0, 0, 1)
        moves.append(moved.core["output"]["kernel"] - state.core["output"]["kernel"])
    np.testing.assert_allclose(moves[0] / 1.5, moves[1], rtol=1e-3, atol=1e-8)


def test_stl_keeps_every_network():
    jitted = Jitted(digits_config("stl"))
    key = jax.random.key(0)
    state, _ = jitted.train(key)
    early, _ = Jitted(digits_config("stl")).train(key, [0])
    method = jitted.problem.method
    jax.tree.map(
        np.testing.assert_array_equal,
        method.for_eval(state.core, state.method, 0),
        method.for_eval(early.core, early.method, 0),
    )
    found = accuracies(
        jitted.evaluate(key, state, jitted.data, 2, True), jitted.sequence.test.count
    )
    assert found["task_told"].min() > 0.9


def test_psp_keys_sit_on_every_layer_pixels_included():
    jitted = Jitted(digits_config("bd_psp", psp__layers=".*"))
    state = jitted.init(jax.random.key(0))
    mode = jitted.problem.method.mode(state.method, 1)
    assert {p: v["key"].shape for p, v in mode.items()} == {
        "hidden_0": (64,), "output": (16,)}  # fmt: skip
    some = Jitted(digits_config("psp", psp__layers="hidden_.*"))
    mode = some.problem.method.mode(some.init(jax.random.key(0)).method, 0)
    assert list(mode) == ["hidden_0"]


@pytest.mark.parametrize("method", ["bd_psp", "bd_ewc", "stl"])
def test_permuting_the_kernel_equals_permuting_the_pictures(method):
    """Training, Fisher and evaluation, against a model whose input is gathered instead."""

    def cores(moves_rows):
        config = digits_config(method, sequence__kind="permuted", train__optimizer="sgd",
                               train__epochs=1, sequence__first_identity=False)  # fmt: skip
        jitted = Jitted(config)
        if not moves_rows:
            jitted.problem = jitted.problem._replace(input_layer="")
            for name, function in [
                ("begin_task", epochs.begin_task),
                ("end_task", epochs.end_task),
                ("evaluate", evaluate),
            ]:
                setattr(jitted, name, jax.jit(partial(function, jitted.problem)))  # fmt: skip
        key = jax.random.key(0)
        state, _ = jitted.train(key, [0, 1])
        return state, jitted.evaluate(key, state, jitted.data, 1, True)

    (moved, a), (gathered, b) = cores(True), cores(False)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5),
                 (moved.core, moved.method if method == "bd_ewc" else ()),
                 (gathered.core, gathered.method if method == "bd_ewc" else ()))  # fmt: skip
    np.testing.assert_allclose(a.task_told, b.task_told, atol=2)
    np.testing.assert_allclose(a.task_inferred, b.task_inferred, atol=4)


def test_layers_of_the_specification_are_those_of_the_network():
    jitted = Jitted(digits_config("bd_ewc", model__name="convnet", model__channels=(4,)))
    x = jnp.zeros((1, 8, 8, 1))
    assert jitted.problem.spec.layers == find_layers(
        jitted.problem.model, jitted.problem.spec.init(jax.random.key(0)), x
    )
    state, _ = jitted.train(jax.random.key(0), [0, 1], epochs=1)
    bank = jitted.problem.method.stored(state.method)["bank"]
    assert bank["conv_0"]["bias"].shape == (3, 4)


def test_the_method_of_the_contributing_guide_works(monkeypatch):
    """Its code, as it stands there: it learns, and pulls from the second task on."""
    guide = (pathlib.Path(__file__).resolve().parents[1] / "CONTRIBUTING.md").read_text()
    code = guide.split("For example, L2", 1)[1].split("\n2. ", 1)[0].split("\n", 2)[2]
    scope = {}
    exec(textwrap.dedent(code), scope)
    monkeypatch.setitem(REGISTRY, "l2", scope["L2"])
    key = jax.random.key(0)
    cores = {m: Jitted(digits_config(m)).train(key, [0, 1], epochs=2)[0].core
             for m in ("sgd", "l2")}  # fmt: skip
    assert not np.allclose(cores["l2"]["output"]["kernel"], cores["sgd"]["output"]["kernel"])
