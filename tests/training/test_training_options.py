"""Options of the training step that no method owns: rates of layers, dropout, hosts' flags."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import Jitted, changed, digits_config

from bpnjax import main, models
from bpnjax.utils import errors

pytestmark = pytest.mark.usefixtures("compile_once")


def test_a_layer_with_rate_0_stays_and_the_others_move():
    frozen = Jitted(digits_config("ewc", train__rates="hidden_0=0"))
    start = frozen.init(jax.random.key(0))
    after, _ = frozen.run_steps(frozen.begin_task(start, 0), frozen.data, 0, 0, 0, 2)
    before, after = start.learner.params, after.learner.params
    jax.tree.map(np.testing.assert_array_equal, before["hidden_0"], after["hidden_0"])
    assert (np.asarray(before["output"]["kernel"]) != after["output"]["kernel"]).any()


def ones(tree):
    return jax.tree.map(jnp.ones_like, tree)


def strong_anchor(state):
    """EWC, MAS, SI: the largest strength and an importance of 1 for every parameter."""
    return state._replace(importance=ones(state.importance), strength=jnp.float32(1e12))


# What makes the pull of each anchored method as strong as it can be.
STRONG = {
    "ewc": strong_anchor,
    "ewc_online": strong_anchor,
    "mas": strong_anchor,
    "si": strong_anchor,
    "slnid": lambda state: state._replace(anchored=strong_anchor(state.anchored)),
    "imm_mean": lambda state: state._replace(strength=jnp.float32(1e12)),
}


@pytest.mark.parametrize("method", STRONG)
def test_the_proximal_pull_of_a_layer_has_the_rate_of_that_layer(method):
    """With a huge strength a proximal step lands on the anchor, in layers of any rate.

    Where the pull has the rate of the whole network, a layer of ten times that rate overshoots nine
    times as far, and one of a third of it stops short.
    """
    jitted = Jitted(
        digits_config(
            method, train__optimizer="sgd", train__rates="output=10;hidden_0=0.3",
            slnid__strength=0.0, ewc__form="proximal",
        )
    )  # fmt: skip
    state = jitted.begin_task(jitted.train(jax.random.key(0), [0], epochs=1)[0], 1)
    learner = state.learner
    away = jax.tree.map(lambda p: p + 0.5, learner.params)
    away = changed(state, params=away, method=STRONG[method](learner.method))
    after, _ = jitted.run_steps(away, jitted.data, 1, 0, 0, 1)
    jax.tree.map(
        lambda p, anchor: np.testing.assert_allclose(p, anchor, atol=1e-4),
        after.learner.params, learner.params,
    )  # fmt: skip


def test_the_papers_strength_does_not_diverge_with_a_larger_rate_of_the_output_layer():
    """2,000, ewc's default strength in these forms, under plain SGD."""
    sizes = {}
    for form in ("proximal", "gradient"):
        config = digits_config(
            "ewc", train__optimizer="sgd", train__learning_rate=0.03, train__rates="output=10",
            ewc__strength=2000.0, ewc__form=form,
        )  # fmt: skip
        state, _ = Jitted(config).train(jax.random.key(0), [0, 1], epochs=4)
        leaves = [np.abs(leaf).max() for leaf in jax.tree.leaves(state.learner.params)]
        sizes[form] = np.max(leaves)
    assert sizes["proximal"] < 10, sizes
    assert not sizes["gradient"] < 1e3, sizes  # the setting is one in which a pull may diverge


@pytest.mark.parametrize(
    "rates, message",
    [
        ("nothing=0", "train.rates: 'nothing' matches no layer; there are: hidden_0, output"),
        ("output", "train.rates: 'output' is not a rule"),
        ("output=-1", "train.rates: 'output=-1' needs a pattern and a factor of 0 or more"),
    ],
)
def test_rates_that_cannot_be_are_refused(rates, message):
    with pytest.raises(errors.UserError) as refused:
        Jitted(digits_config("sgd", train__rates=rates))
    assert str(refused.value).startswith(message)


class Dropping(nn.Module):
    num_classes: int
    share: float = 0.5

    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1)
        drop = nn.Dropout(self.share, deterministic=not self.has_rng("dropout"))
        return nn.Dense(6, name="output")(drop(x))


@pytest.fixture
def registered():
    """Registers networks for one test."""
    before = dict(models.REGISTRY)
    yield models.register
    for name in models.REGISTRY.keys() - before.keys():
        del models.REGISTRY[name]


def test_dropout_acts_in_training_only_and_by_the_key_of_its_step(registered):
    registered("dropping")(Dropping)
    key, found = jax.random.key(0), {}
    for share in (0.0, 0.5):
        options = {"model__name": "dropping", "model__options": f"share={share}"}
        jitted = Jitted(digits_config("sgd", **options))
        start = jitted.begin_task(jitted.init(key), 0)

        def kernel(first, last, start=start, jitted=jitted):
            state, _ = jitted.run_steps(start, jitted.data, 0, 0, first, last)
            return np.asarray(state.learner.params["output"]["kernel"])

        found[share] = kernel(0, 1), kernel(0, 1), jitted.test(start, 0)["task_told"]
    plain, dropped = found[0.0], found[0.5]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert (plain[0] != dropped[0]).any()
    np.testing.assert_array_equal(plain[2], dropped[2])


class DroppedOnes(nn.Module):
    """What a step moves is what was not dropped of the input."""

    num_classes: int

    @nn.compact
    def __call__(self, x):
        drop = nn.Dropout(0.5, deterministic=not self.has_rng("dropout"))
        return nn.Dense(6, use_bias=False, name="output")(drop(jnp.ones((len(x), 64))))


def test_every_step_drops_other_units(registered):
    registered("dropped_ones")(DroppedOnes)
    sizes = {"train__optimizer": "sgd", "train__batch_size": 1}
    jitted = Jitted(digits_config("sgd", model__name="dropped_ones", **sizes))
    start = jitted.begin_task(jitted.init(jax.random.key(0)), 0)

    def kept(task, epoch, step):
        state, _ = jitted.run_steps(start, jitted.data, task, epoch, step, step + 1)
        moved = state.learner.params["output"]["kernel"] - start.learner.params["output"]["kernel"]
        return np.asarray(jnp.abs(moved).max(1) > 0)

    one = kept(0, 0, 0)
    assert 10 < one.sum() < 54
    for other in (kept(0, 0, 1), kept(0, 1, 0), kept(1, 0, 0)):
        assert (one != other).any()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--hosts=two", "--distributed"], "--hosts: 'two' is not a number; give one from 0"),
        (["--host=-1", "--distributed"], "--host: '-1' is not a number; give one from 0"),
        (["--hosts=2"], "they go with --distributed; add it"),
    ],
)
def test_flags_of_hosts_are_checked(tiny_flags, capsys, flags, words):
    assert main.run([*tiny_flags(), *flags]) == 2
    assert words in capsys.readouterr().err
