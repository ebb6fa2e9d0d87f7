"""Settings of methods: those of a user's own file reach the learner, the command and its checks."""

import functools
import json
import types
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from command import process

import bpnjax
from bpnjax import config as configuration
from bpnjax import methods, networks
from bpnjax.config.fields import entries
from bpnjax.methods import Method, Setting
from bpnjax.models import MLP
from bpnjax.utils.errors import UserError

pytestmark = pytest.mark.usefixtures("compile_once")

# What a user writes: a method in a file, which is the configuration file too.
FILE = '''
from typing import Annotated

import jax
import jax.numpy as jnp

from bpnjax import config, methods


@methods.register("mine", paper="ours")
def mine(
    strength: Annotated[float, methods.Setting("of the pull", at_least=0)] = 1.0,
    towards: Annotated[str, methods.Setting("where to", choices=("start", "zero"))] = "start",
) -> methods.Method:
    """A pull towards the parameters before the first task, or towards zero."""

    def init(key, params, setup):
        return {"anchor": jax.tree.map(lambda p: p if towards == "start" else 0 * p, params)}

    def gradient(grads, params, state, batch, ctx):
        return jax.tree.map(
            lambda g, p, a: g + strength * (p - a), grads, params, state["anchor"]
        )

    return methods.Method(init=init, gradient=gradient)


def get_config():
    c = config.default()
    c.name, c.method, c.dataset.name = "ours", "mine", "digits"
    c.sequence.num_tasks, c.model.hidden = 2, (8,)
    c.train.epochs, c.train.optimizer, c.train.learning_rate = 2, "sgd", 0.1
    return c
'''


@pytest.fixture(autouse=True)
def registry():
    """What a test registers is forgotten after it."""
    before = dict(methods.REGISTRY)
    yield
    methods.REGISTRY.clear()
    methods.REGISTRY.update(before)


@pytest.fixture
def file(tmp_path):
    """The file, and the method that it registers."""
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    scope = {}
    exec(FILE, scope)
    return types.SimpleNamespace(flag=f"--config={path}", mine=scope["mine"])


def length(tree):
    return np.linalg.norm([np.linalg.norm(leaf) for leaf in jax.tree.leaves(tree)])


def test_in_a_loop_its_settings_are_arguments(file):
    x, y = np.eye(6, 4, dtype=np.float32), np.array([0, 1, 0, 1, 0, 1])
    network, moved = networks.from_linen(MLP((3,), 2), x), {}
    for name, method in {
        "none": file.mine(strength=0.0), "sgd": methods.sgd(), "default": file.mine(),
        "three": file.mine(strength=3.0), "zero": file.mine(3.0, "zero"),
    }.items():  # fmt: skip
        learner = bpnjax.learner(network, method, optax.sgd(0.1), num_tasks=2)
        state = learner.begin_task(learner.init(jax.random.key(0)), 0)
        start = jax.tree.map(np.array, state.params)
        for _ in range(2):
            state, _ = learner.step(state, (x, y))
        moved[name] = jax.tree.map(lambda p, s: np.asarray(p) - s, state.params, start)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8),
        moved["none"], moved["sgd"],
    )  # fmt: skip
    sizes = {n: length(m) for n, m in moved.items()}
    assert sizes["three"] < sizes["default"] < sizes["sgd"]
    apart = moved["zero"]["output"]["kernel"] - moved["three"]["output"]["kernel"]
    assert np.abs(apart).max() > 0.1
    assert file.mine.name == file.mine().name == "mine" and file.mine().paper == "ours"
    assert file.mine.__doc__.startswith("A pull towards the parameters")


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"strength": -1.0}, r"mine\.strength: -1\.0 is below 0; give at least 0"),
        ({"strength": "much"}, r"mine\.strength: 'much' is of type str; give one of type float"),
        ({"strength": True}, r"mine\.strength: True is of type bool; give one of type float"),
        ({"strength": float("inf")}, r"mine\.strength: inf is not finite; give a number"),
        ({"towards": "zeros"}, r"mine\.towards: unknown value 'zeros'; did you mean zero\?"),
        ({"strenght": 1.0}, r"mine\.strenght: mine has no such setting; did you mean strength\?"),
    ],
)
def test_bad_values_are_refused_in_a_loop(settings, words, file):
    with pytest.raises(UserError, match=words):
        file.mine(**settings)


def test_in_the_command_its_settings_are_fields(file, run, tmp_path):
    def params(workdir, *flags):
        code, _, err = run([file.flag, f"--workdir={workdir}", *flags])
        assert code == 0, err
        config = json.loads((tmp_path / workdir / "config.json").read_text())
        predictor = bpnjax.load(tmp_path / workdir)
        result = json.loads((tmp_path / workdir / "result.json").read_text())
        assert result["method"] == "mine"
        return config["mine"], predictor.state.params

    own, weak = params("weak")
    assert own == {"strength": 1.0, "towards": "start"}
    own, strong = params("strong", "--config.mine.strength=3")
    assert own == {"strength": 3.0, "towards": "start"}
    own, zero = params("zero", "--config.mine.strength=3", "--config.mine.towards=zero")
    assert own == {"strength": 3.0, "towards": "zero"}
    assert length(zero) < 0.7 * length(strong)
    assert np.abs(weak["output"]["kernel"] - strong["output"]["kernel"]).max() > 1e-2


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--config.mine.strength=-1", "mine.strength: -1.0 is below 0; give at least 0"),
        ("--config.mine.strength=much", "mine.strength: 'much' is not of type float; give one, as"),
        ("--config.mine.towards=zeros", "mine.towards: unknown value 'zeros'; did you mean zero?"),
        ("--config.mine.strenght=1", "mine.strenght: unknown config field; did you mean"),
        ("--config.method=mind", "method: unknown value 'mind'; did you mean mine?"),
    ],
)
def test_bad_values_are_refused_by_the_command(flag, words, file, refused):
    refused([file.flag, flag], words)


def test_a_process_of_its_own_needs_nothing_but_the_file(file, tmp_path):
    done = process([file.flag, "--config.mine.strength=3", "--workdir=run"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["mine"]["strength"] == 3.0


def test_its_fields_have_a_meaning_and_a_composition_has_them_too(file):
    found = entries()["mine.strength"]
    assert found.default == 1.0 and found.setting.meaning == "of the pull"
    assert found.methods == ("mine",)
    both = methods.compose("bd_mine", methods.bd, file.mine)
    assert set(both.fields) == {*methods.bd.fields, *file.mine.fields}
    assert entries()["mine.strength"].methods == ("mine", "bd_mine")
    config = configuration.default()
    config.method, config.mine.strength, config.bd.epsilon = "bd_mine", 0.25, 0.5
    configuration.validate(config)
    method = both.from_config(config)
    assert method.name == "bd_mine" and method.told_task
    ctx = methods.Context(None, 0, 0, True, jax.random.key(0))
    grads = {"w": jnp.float32(0)}
    state = ({}, {"anchor": {"w": jnp.float32(1)}})
    pull = method.gradient(grads, {"w": jnp.float32(5)}, state, None, ctx)
    assert float(pull["w"]) == 1.0
    with pytest.raises(UserError, match=r"mine\.strength: -1\.0 is below 0"):
        both(strength=-1.0)


def test_settings_of_the_same_name_are_given_per_part():
    method = methods.bd_psp(bd={"layers": "output"}, psp={"layers": "hidden_.*"}, epsilon=0.3)
    network = networks.from_linen(MLP((3,), 2), jnp.zeros((1, 4)))
    learner = bpnjax.learner(network, method, optax.sgd(0.1), num_tasks=2)
    bank, keys = learner.init(jax.random.key(0)).method
    assert list(bank) == ["output"] and list(keys) == ["hidden_0"]
    with pytest.raises(UserError, match=r"layers: bd_psp has it for bd and psp; say which, as"):
        methods.bd_psp(layers="output")
    with pytest.raises(UserError, match="bd.epsilon: 0.0 is not above 0"):
        methods.bd_psp(bd={"epsilon": 0.0})
    with pytest.raises(UserError, match="epsilonn: bd_psp has no such setting; did you mean eps"):
        methods.bd_psp(epsilonn=0.3)


def test_names_of_this_package_are_not_taken_again():
    for name in ("ewc", "bd_ewc"):
        with pytest.raises(ValueError, match="is one of bpnjax; choose another name"):
            methods.register(name)
        with pytest.raises(ValueError, match="is one of bpnjax; choose another name"):
            methods.compose(name, methods.bd, methods.psp)


def test_a_setting_without_meaning_or_default_is_refused():
    def bare(strength: float = 1.0) -> Method:
        return Method()

    def without(strength: Annotated[float, Setting("of it")]) -> Method:
        return Method()

    for function in (bare, without):
        with pytest.raises(ValueError, match="its argument strength needs a default and a Setting"):
            methods.register("ours")(function)
        assert "ours" not in methods.REGISTRY


def test_two_methods_cannot_give_one_field_different_defaults():
    """Their configurations could not be told apart."""

    @methods.register("other", group="ewc")
    def other(strength: Annotated[float, Setting("of it")] = 7.0) -> Method:
        return Method()

    with pytest.raises(ValueError, match=r"ewc\.strength of the method other .* another default"):
        entries()


def test_two_methods_cannot_give_one_field_different_limits():
    """What one allows the other might not be made for."""

    @methods.register("other", group="ewc")
    def other(strength: Annotated[float | None, Setting("of it", above=0)] = None) -> Method:
        return Method()

    words = r"ewc\.strength of the method other .* another limits \(\{'at_least': 0\}, not "
    with pytest.raises(ValueError, match=words + r"\{'above': 0\}\)"):
        entries()


def test_what_the_command_sets_is_what_the_function_gets(monkeypatch):
    """Every field of every method arrives, under its own name, as an argument of its function."""
    for name, factory in methods.REGISTRY.items():
        config, got, wanted = configuration.default(), {}, {}
        for place, (field, found) in enumerate(factory.fields.items()):
            group, key = field.split(".")
            wanted[found.part, found.name] = config[group][key] = other_value(found, place)
        config.method = name
        configuration.validate(config)
        with monkeypatch.context() as patch:
            for place, part in enumerate(factory.parts):
                patch.setattr(part, "_raw", spy(part._raw, place, got))
            factory.from_config(config)
        assert got == wanted, name


def spy(function, place, got):
    @functools.wraps(function)
    def called(**kwargs):
        got.update({(place, name): value for name, value in kwargs.items()})
        return function(**kwargs)

    return called


def other_value(found, place):
    """A value that a setting allows and that is neither its default nor that of its neighbours."""
    setting, default = found.setting, found.default
    if setting.choices:
        return next(choice for choice in setting.choices if choice != default)
    if setting.pattern:
        return "output"
    if isinstance(default, str):
        return "hidden_0"
    if isinstance(default, int):
        return default + 1 + place
    low = max(setting.at_least or 0.0, setting.above or 0.0)
    high = 1.0 if setting.below is None else setting.below
    value = low + (high - low) * (place + 1) / 100
    return value if value != default else value + (high - low) / 300
