"""Options of the training step that no method owns: rates of layers, dropout, hosts' flags."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from support import Jitted, digits_config

from bpnjax import main
from bpnjax.run import setup
from bpnjax.utils import errors

pytestmark = pytest.mark.usefixtures("compile_once")


def test_a_layer_with_rate_0_stays_and_the_others_move():
    frozen = Jitted(digits_config("ewc", train__rates="hidden_0=0"))
    key = jax.random.key(0)
    before = frozen.init(key).core
    after, _ = frozen.run_steps(key, frozen.init(key), frozen.data, 0, 0, 0, 2)
    jax.tree.map(np.testing.assert_array_equal, before["hidden_0"], after.core["hidden_0"])
    assert (np.asarray(before["output"]["kernel"]) != after.core["output"]["kernel"]).any()


@pytest.mark.parametrize(
    "rates, message",
    [
        ("nothing=0", "train.rates: 'nothing' matches no layer; there are: hidden_0, output"),
        ("output", "train.rates: 'output' is no rule"),
        ("output=-1", "train.rates: 'output=-1' needs a pattern and a factor of 0 or more"),
    ],
)
def test_rates_that_cannot_be_are_refused(rates, message):
    with pytest.raises(errors.UserError) as refused:
        Jitted(digits_config("sgd", train__rates=rates))
    assert str(refused.value).startswith(message)


class Dropping(nn.Module):
    share: float

    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1)
        drop = nn.Dropout(self.share, deterministic=not self.has_rng("dropout"))
        return nn.Dense(6, name="output")(drop(x))


def test_dropout_acts_in_training_only_and_by_the_key_of_its_step(monkeypatch):
    key, found = jax.random.key(0), {}
    for share in (0.0, 0.5):
        monkeypatch.setattr(setup.models, "build", lambda *_, share=share: Dropping(share))
        jitted = Jitted(digits_config("sgd"))
        start = jitted.init(key)

        def kernel(first, last, start=start, jitted=jitted):
            state, _ = jitted.run_steps(key, start, jitted.data, 0, 0, first, last)
            return np.asarray(state.core["output"]["kernel"])

        found[share] = kernel(0, 1), kernel(0, 1), jitted.test(key, start, 0)["task_told"]
    plain, dropped = found[0.0], found[0.5]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert (plain[0] != dropped[0]).any()
    np.testing.assert_array_equal(plain[2], dropped[2])


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--hosts=two", "--distributed"], "--hosts: 'two' is no number; give one from 0"),
        (["--host=-1", "--distributed"], "--host: '-1' is no number; give one from 0"),
        (["--hosts=2"], "they go with --distributed; add it"),
    ],
)
def test_flags_of_hosts_are_checked(tiny_flags, capsys, flags, words):
    assert main.run([*tiny_flags(), *flags]) == 2
    assert words in capsys.readouterr().err
