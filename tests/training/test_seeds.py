"""Seeds in turn, as a CPU runs them: each is bit for bit the run of that seed alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import digits_config

from bpnjax.data import load_sequence
from bpnjax.run import train
from bpnjax.training import parallel
from bpnjax.training.experiment import make_experiment
from bpnjax.training.task_data import put_on_device
from bpnjax.utils import prng


def run(how, **fields):
    """The state after each program of two tasks, compiled as for a user."""
    config = digits_config("bd_ewc", evaluate__rule="statistics", evaluate__statistics=6, **fields)
    sequence = load_sequence(config)
    experiment = make_experiment(config, sequence)
    data, keys = put_on_device(sequence), train.seed_keys(config)
    layout = parallel.Layout(seeds=how)
    compiled = train.compile_programs(experiment, parallel.Clock(), config.num_seeds, layout)
    state = compiled.init(keys)
    for task in range(2):
        numbers = [jnp.int32(n) for n in (task, 0, 0, 3)]
        state = compiled.begin_task(state, numbers[0])
        state, _ = compiled.run_steps(state, data, *numbers)
        trained = copy(state)
        state = compiled.end_task(state, data, numbers[0])
    return trained, copy(state)


def copy(state):
    """On the host: the next program takes the buffers over."""
    return jax.tree.map(np.array, prng.to_numbers(state))


@pytest.mark.parametrize("how", ["map", "vmap"])
def test_several_seeds_equal_each_alone(how):
    both = run(how, num_seeds=2, seed=4)
    alone = run(how, seed=5)
    same = np.testing.assert_array_equal
    if how == "vmap":  # all at once: other products, rounded otherwise
        same = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)  # noqa: E731
    jax.tree.map(lambda many, one: same(many[1], one), both, alone)
