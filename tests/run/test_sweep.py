"""A whole run in one program, and many at once, against the ordinary loop and by hand."""

import jax
import numpy as np
import pytest
from support import Jitted, digits_config

from bpnjax.run import sweep
from bpnjax.utils.errors import UserError


def told_after_all(config):
    """Accuracies (task_told) after the last task, by the ordinary programs, a seed each."""
    jitted = Jitted(config)
    found = []
    for seed in range(config.seed, config.seed + config.num_seeds):
        key = jax.random.key(seed)
        state, _ = jitted.train(key)
        found.append(jitted.test(state, 2)["task_told"])
    return np.array(found)


@pytest.mark.slow
def test_a_sweep_over_strengths_is_the_ordinary_runs():
    config = digits_config("bd_ewc", num_seeds=2, train__epochs=4)
    config.ewc.form = "proximal"
    values = (0.0, 5.0, 500.0)
    found = sweep.sweep(config, values, "ewc.strength")["task_told"]
    assert found.shape == (3, 2, 3, 3)
    assert np.isnan(found[:, :, 0, 1:]).all() and not np.isnan(found[:, :, 2]).any()
    for value, row in zip(values, found, strict=True):
        config.ewc.strength = value
        np.testing.assert_allclose(row[:, -1], told_after_all(config), atol=0.02)
    assert not np.allclose(found[0, :, -1], found[2, :, -1], atol=0.02)


def test_the_widest_value_of_a_sweep_is_the_ordinary_run():
    config = digits_config("bd_ewc", bd__hidden_dim=8, train__epochs=4)
    found = sweep.sweep(config, (2, 8), sweep.hidden_dim)["task_told"]
    np.testing.assert_allclose(found[1, :, -1], told_after_all(config), atol=0.02)
    assert not np.array_equal(found[0], found[1])


def factors_of(state):
    return [own["bias"] for own in state.learner.task_params[0].values()]


def test_rows_cut_off_stay_zero_and_the_others_are_factors_of_that_width():
    jitted = Jitted(digits_config("bd_ewc", bd__hidden_dim=8))
    key = jax.random.key(0)
    state = sweep.hidden_dim(jitted.begin_task(jitted.init(key), 0), 2)
    bound = 2**-0.5
    for factors in factors_of(state):
        kept = np.abs(factors["W"][:2])
        assert kept.max() <= bound and kept.max() > 0.8 * bound  # uniform in +-1/sqrt(2)
    state, _ = jitted.run_steps(state, jitted.data, 0, 0, 0, 5)
    for factors in factors_of(state):
        assert not np.any(factors["W"][2:]) and not np.any(factors["M"][:, 2:])
        assert np.all(factors["M"][:, :2] != 0)


def test_a_sweep_over_epsilon_is_the_ordinary_runs():
    config = digits_config("bd_psp", train__epochs=4)
    values = (0.02, 0.5)
    found = sweep.sweep(config, values, "bd.epsilon")["task_told"]
    for value, row in zip(values, found, strict=True):
        config.bd.epsilon = value
        np.testing.assert_allclose(row[:, -1], told_after_all(config), atol=0.02)
    assert not np.array_equal(found[0], found[1])


def test_a_joint_method_cannot_be_swept():
    with pytest.raises(UserError, match="joint has no tasks one after another"):
        sweep.sweep(digits_config("joint"), (1.0,), lambda state, value: state)
    with pytest.raises(UserError, match="ewc.strength: no setting of psp"):
        sweep.sweep(digits_config("psp"), (1.0,), "ewc.strength")
