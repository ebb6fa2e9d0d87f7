"""Compositions: what goes together answers alike everywhere, what does not is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import Jitted, digits_config
from test_conformance import assert_answers_agree

import bpnjax
from bpnjax import importance, methods, modes, networks
from bpnjax.methods import Context
from bpnjax.methods.bd import product
from bpnjax.methods.controls import output_mask
from bpnjax.models import MLP
from bpnjax.run import train
from bpnjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture
def registry():
    """What a test registers is forgotten after it."""
    before = dict(methods.REGISTRY)
    yield
    methods.REGISTRY.clear()
    methods.REGISTRY.update(before)


def centred():
    """A method that keeps a group of its own: what each task's outputs are on the average.

    Outputs are answered less that average, so whoever does not keep it answers otherwise.
    """

    def init(key, params, setup):
        return {"offsets": {"of_outputs": jnp.zeros((setup.num_tasks, setup.num_outputs))}}

    def forward(params, task_params, state, ctx):
        if ctx.training:
            return params, {}
        *_, output = ctx.setup.network.layers
        offsets = modes.select(state["offsets"], ctx.task)["of_outputs"]
        return params, {output: {"bias": -4.0 * offsets}}

    def end_task(params, task_params, state, data, ctx):
        x, _ = data.take(jnp.arange(50))
        kept = state["offsets"]["of_outputs"]
        mean = ctx.outputs(params, x, ctx.current).mean(0)
        return params, {"offsets": {"of_outputs": kept.at[ctx.current].set(mean)}}

    return methods.Method(told_task=True, init=init, forward=forward, end_task=end_task)


# Compositions that are not in the registry, and what of theirs changes what is answered.
OURS = {
    "bd_xdg": ("bd", "xdg"),
    "psp_xdg": ("psp", "xdg"),
    "psp_er": ("psp", "er"),
    "bd_gem": ("bd", "gem"),
    "bd_psp_derpp": ("bd", "psp", "derpp"),
    "bd_imm_mode": ("bd", "imm_mode"),
    "random_bias_mas": ("random_bias", "mas"),
    "centred": ("centred",),
    "centred_psp_si": ("centred", "psp", "si"),
}


def registered(name):
    """Makes a composition of `OURS` known to the command."""
    if "centred" in OURS[name]:
        methods.register("centred")(centred)
    if len(OURS[name]) > 1:
        methods.compose(name, *(methods.REGISTRY[part] for part in OURS[name]))


QUICK = ("bd_xdg", "psp_er", "bd_gem", "centred")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in OURS]
)
def test_a_composition_answers_after_loading_as_in_its_run(name, registry, tmp_path):
    registered(name)
    jitted = Jitted(digits_config(name, train__epochs=4))
    state, _ = jitted.train(jax.random.key(0))
    assert jitted.test(state, 2)["task_masked"][2] > 0.6
    assert_answers_agree(jitted, state, tmp_path)
    # It needs what its parts keep: zeros in their place answer otherwise.
    x = jitted.sequence.test.images[:30]
    zeros = jax.tree.map(jnp.zeros_like, state.learner.method)
    without = jitted.learner.apply(state.learner.replace(method=zeros), x, 1)
    if "psp" not in name and "xdg" not in name:  # a seed of zeros is a seed
        assert not np.allclose(without, jitted.learner.apply(state.learner, x, 1), atol=1e-2)


@pytest.mark.parametrize("name", ["bd_xdg", "centred"])
def test_the_command_tells_the_accuracy_that_its_model_has(name, registry, tmp_path):
    registered(name)
    result = train.train_and_evaluate(digits_config(name, train__epochs=4), tmp_path)
    predictor = bpnjax.load(tmp_path)
    sequence = Jitted(digits_config(name)).sequence
    for task in range(3):
        rows = sequence.test.index[task][: sequence.test.count[task]]
        x, y = sequence.test.images[rows], sequence.columns[task, sequence.test.labels[rows]]
        told = (predictor(x, task=task) == y).mean()
        assert told == result["accuracy"]["task_told"][0, 2, task]
        assert (predictor(x) == y).mean() == result["accuracy"]["task_inferred"][0, 2, task]


def test_a_method_that_is_not_known_here_is_asked_for(registry, tmp_path):
    registered("centred")
    train.train_and_evaluate(digits_config("centred", train__epochs=1), tmp_path)
    del methods.REGISTRY["centred"]
    with pytest.raises(UserError, match="'centred'"):
        bpnjax.load(tmp_path)


DRAWS = np.random.default_rng(0)
X, Y = DRAWS.normal(size=(9, 5)).astype(np.float32), np.arange(9) % 6


def learner_of(method, optimizer=None, **options):
    network = networks.from_linen(MLP((8,), 6), X)
    options = {"classes": [[0, 1], [2, 3], [4, 5]]} | options
    return bpnjax.learner(network, method, optimizer or optax.sgd(0.1), 3, **options)


def test_replayed_examples_are_answered_in_the_mode_of_their_own_task():
    """What er, gem and their kin ask of the whole: each example with its own key and bias."""
    tasks = np.arange(9) % 3

    def record(old, new, grads, state, batch, ctx):
        return new, (ctx.trained(old, X, tasks)[0], ctx.losses(old, X, Y, tasks))

    watcher = methods.Method(
        init=lambda key, params, setup: (jnp.zeros((9, 6)), jnp.zeros(9)), end_step=record
    )
    learner = learner_of(methods.chain(methods.bd(hidden_dim=4), methods.psp(), watcher))
    state = learner.init(jax.random.key(0))
    for task in range(3):
        state = learner.begin_task(state, task)
        for _ in range(3):
            before = np.array(learner.apply(state, X, tasks))
            state, _ = learner.step(state, (X, Y))
        if task == 2:
            outputs, losses = state.method[-1]
            np.testing.assert_allclose(outputs, before, rtol=1e-5, atol=1e-5)
            expected = -jax.nn.log_softmax(before)[np.arange(9), Y]
            np.testing.assert_allclose(losses, expected, rtol=1e-4)
        state = learner.end_task(state, (X, Y))
    plain, _ = learner.network.apply(state.params, {}, X)
    assert np.abs(before - plain).min(1).max() > 1e-2


def test_parts_do_not_share_random_numbers():
    """The reservoirs of two parts hold different samples of the same stream."""
    learner = learner_of(methods.chain(*[methods.er(memory_size=4, batch_size=2)] * 2))
    state = learner.begin_task(learner.init(jax.random.key(0)), 0)
    for _ in range(5):
        state, _ = learner.step(state, (X, Y))
    first, second = (kept.memory for kept in state.method)
    assert int(first.seen) == int(second.seen) == 45
    assert (np.asarray(first.y) != second.y).any()
    both = learner_of(methods.chain(methods.bd(), methods.bd()))
    own = both.begin_task(both.init(jax.random.key(0)), 0).task_params
    assert (own[0]["output"]["bias"]["W"] != own[1]["output"]["bias"]["W"]).any()


def test_biases_add_up_and_keys_multiply():
    """Two biases per layer, a key and a gate: against the network run by hand."""
    two = methods.chain(methods.bd(hidden_dim=4, epsilon=0.5), methods.plain_bias())
    learner = learner_of(methods.chain(two, methods.psp(), methods.xdg()), optax.sgd(1e-2))
    state = learner.begin_task(learner.init(jax.random.key(0)), 1)
    for _ in range(3):
        state, _ = learner.step(state, (X, Y))
    ((bd, bias), _, _), (_, keys, gates) = state.task_params, state.method
    keys, gates, made = modes.select(keys, 1), modes.select(gates, 1), product(bd)
    bias = {path: own["bias"]["change"] for path, own in bias.items()}
    assert np.abs(bias["output"]).max() > 0

    def layer(name, x):
        p = state.params[name]
        return x @ p["kernel"] + p["bias"] + made[name]["bias"] + bias[name]

    hidden = jax.nn.relu(layer("hidden_0", X * keys["hidden_0"]["key"]))
    expected = layer("output", hidden * keys["output"]["key"] * gates["output"]["key"])
    np.testing.assert_allclose(learner.apply(state, X, 1), expected, rtol=1e-4, atol=1e-5)
    ended = learner.end_task(state, (X, Y))
    np.testing.assert_allclose(learner.apply(ended, X, 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["der", "imm_mean", "gem"])
def test_an_output_mask_changes_answers_only(method, registry):
    """Whatever is trained under it is trained as without, outputs that are kept included."""
    methods.compose(f"{method}_masked", methods.REGISTRY[method], join=output_mask)
    found, runs = {}, {}
    for name in (method, f"{method}_masked"):
        runs[name] = Jitted(digits_config(name, train__epochs=3))
        found[name], _ = runs[name].train(jax.random.key(0))
    plain, masked = (state.learner for state in found.values())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        (plain.params, plain.method), (masked.params, masked.method),
    )  # fmt: skip
    told, answer = (runs[name].test(found[name], 2) for name in found)
    np.testing.assert_array_equal(answer["task_told"], told["task_masked"])
    assert (answer["task_told"] > told["task_told"]).any()


def test_a_fisher_is_of_the_mode_of_all_parts(registry):
    """psp in front of ewc: with the key of the task, which is not a part of ewc."""
    methods.compose("psp_ewc", methods.psp, methods.ewc)
    config = digits_config("psp_ewc", train__epochs=1, ewc__form="proximal")
    jitted, key = Jitted(config), jax.random.key(0)
    state = jitted.train(key, [1])[0].learner
    x, y = (jnp.concatenate(part) for part in zip(*jitted.epoch(key, 1, 0), strict=True))
    mode = modes.select(state.method[0], 1)
    expected = importance.fisher(jitted.learner.network, state.params, mode, x, y)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-7),
        state.method[1].importance, expected,
    )  # fmt: skip


ONE_NETWORK = "distils the answers of one network .* with a key or bias per task there is no such"


@pytest.mark.parametrize(
    "parts, words",
    [
        (["psp", "lwf"], f"method: lwf {ONE_NETWORK}"),
        (["lwf", "psp"], f"method: lwf {ONE_NETWORK}"),
        (["bd", "lwf"], f"method: lwf {ONE_NETWORK}"),
        (["bd", "ebll"], f"method: ebll {ONE_NETWORK}"),
        (["xdg", "ewc", "ebll"], f"method: ebll {ONE_NETWORK}"),
        (["stl", "ewc"], "chain: stl is an upper bound that trains its networks by itself"),
        (["bd", "joint"], "chain: joint is an upper bound that trains its networks by itself"),
    ],
)
def test_what_cannot_go_together_is_refused_with_its_reason(parts, words, registry):
    with pytest.raises(UserError, match=words):
        learner_of(methods.chain(*(methods.REGISTRY[part]() for part in parts)))
    methods.compose("ours", *(methods.REGISTRY[part] for part in parts))
    with pytest.raises(UserError, match=words):
        Jitted(digits_config("ours"))


def test_parts_with_learning_rates_of_their_own_must_agree():
    with pytest.raises(UserError, match=r"chain: parts ask for different learning rates .*0\.5"):
        methods.chain(methods.bd(learning_rate=0.5), methods.plain_bias(learning_rate=0.1))
    both = methods.chain(methods.bd(learning_rate=0.5), methods.plain_bias(learning_rate=0.5))
    assert both.learning_rate == 0.5
    assert methods.chain(methods.bd(), methods.plain_bias(learning_rate=0.1)).learning_rate == 0.1


def test_a_mask_over_a_method_that_is_told_the_task_is_refused():
    with pytest.raises(UserError, match="output_mask: bd is told the task already"):
        output_mask(methods.bd())
    with pytest.raises(UserError, match="a mask on the outputs needs to know which outputs"):
        learner_of(output_mask(methods.ewc()), classes=None)


def test_a_loss_of_ones_own_is_refused_where_the_formula_needs_classes():
    def squares(outputs, labels):
        return jnp.square(outputs - labels).mean(-1)

    label = jnp.zeros((1, 6))
    for method in (
        methods.lwf(), methods.ebll(), methods.imm_mode(), methods.ewc(fisher="true"),
        methods.chain(methods.bd(), methods.ewc(fisher="sampled")),
    ):  # fmt: skip
        with pytest.raises(UserError, match="loss: .* is defined for cross-entropy .* another"):
            learner_of(method, loss=squares, label=label)
    for method in (methods.bd_ewc(hidden_dim=4), methods.er(), methods.gem(), methods.mas()):
        learner = learner_of(method, loss=squares, label=label, classes=None)
        state = learner.begin_task(learner.init(jax.random.key(0)), 0)
        state, metrics = learner.step(state, (X, np.zeros((9, 6), np.float32)))
        assert np.isfinite(metrics["loss"]) and "accuracy" not in metrics
        state = learner.end_task(state, (X, np.zeros((9, 6), np.float32)))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_context_of_training_is_that_of_the_chain():
    """Each part sees its own state only, in the order of the chain."""
    seen = []

    def part(name):
        def gradient(grads, params, state, batch, ctx):
            seen.append((name, state))
            assert isinstance(ctx, Context)
            return jax.tree.map(lambda g: 2.0 * g if name == "b" else g + 1.0, grads)

        return methods.Method(name=name, init=lambda *_: name, gradient=gradient)

    method = methods.chain(part("a"), part("b"))
    assert method.name == "a+b" and not method.told_task
    ctx = Context(None, 0, 0, True, jax.random.key(0))
    state = method.init(jax.random.key(0), {}, None)
    found = method.gradient({"w": 3.0}, {}, state, None, ctx)
    assert found == {"w": 8.0} and seen == [("a", "a"), ("b", "b")]
