"""What goes into a model file: the leaves of a state on which answers depend, and no others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import ANALYTIC, digits_config, whole_registry

from bpnjax.data import load_sequence
from bpnjax.methods import REGISTRY
from bpnjax.run.export import answering_arrays
from bpnjax.training import epochs
from bpnjax.training.experiment import make_experiment
from bpnjax.utils import arrays

pytestmark = pytest.mark.usefixtures("compile_once")

LAYERS = ("hidden_0", "output")
# What the parts of methods keep to answer, beside the shared parameters.
BIASES = {f"{layer}/bias" for layer in LAYERS}
KEYS = {f"{layer}/key/seed" for layer in LAYERS}
GATES = {"output/key/seed"}  # of the inputs of all layers but the first
NETWORK = {f"{layer}/{leaf}" for layer in LAYERS for leaf in ("kernel", "bias")}
MERGED = {f"merged/{name}" for name in NETWORK}
LINEAR = {"head/kernel", "head/bias"}
OWN = {
    **dict.fromkeys(("bd", "gd", "gd_matched", "plain_bias", "random_bias"), BIASES),
    "psp": KEYS, "xdg": GATES, "stl": NETWORK,
    "imm_mean": MERGED, "imm_mode": MERGED,
    "ncm": LINEAR, "slda": LINEAR, "ranpac": {*LINEAR, "settings"},
    "joint_ridge": {*LINEAR, "settings"},
    "fecam": {"head/means", "head/precision", "head/seen", "settings/power"},
}  # fmt: skip


def expected(name):
    """Names of the arrays of a model, by the parts of its method."""
    shared = {f"params/{leaf}" for leaf in NETWORK}
    if name in ("stl", "imm_mean", "imm_mode"):
        shared = set()  # networks of their own answer
    if name in ANALYTIC:  # in place of the output layer
        shared = {leaf for leaf in shared if "output" not in leaf}
    parts = REGISTRY[name].parts
    found = set()
    for place, part in enumerate(parts):
        at = f"method/{place}" if len(parts) > 1 else "method"
        found |= {f"{at}/{leaf}" for leaf in OWN.get(part.name, ())}
    return shared | found


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_the_names_of_what_answers(name):
    config = digits_config(name)
    experiment = make_experiment(config, load_sequence(config))
    abstract = jax.eval_shape(experiment.learner.first, jax.random.key(0))
    needed = jax.tree.leaves(experiment.learner.answering(abstract))
    names = jax.tree.leaves(arrays.names_of(abstract))
    assert {n for n, need in zip(names, needed, strict=True) if need} == expected(name)


def garbage(leaf):
    """Numbers that would show in any answer."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return (
            jax.random.split(jax.random.key(99), leaf.shape) if leaf.shape else (jax.random.key(99))
        )
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.full_like(leaf, jnp.nan)
    return jnp.full_like(leaf, 1)


@pytest.mark.parametrize("name", whole_registry("ewc_kfac", "ebll", "imm_mode", "gem", "derpp"))
def test_answers_depend_on_nothing_else(name):
    """Everything that is not in the file may be any number: the answers stay bit for bit."""
    config = digits_config(name)
    sequence = load_sequence(config)
    experiment = make_experiment(config, sequence)
    learner = experiment.learner
    state = jax.jit(lambda key: epochs.init_state(experiment, key))(jax.random.key(0)).learner
    # As after training: no part is zero.
    draws = iter(jax.random.split(jax.random.key(1), 1000))
    state = jax.tree.map(
        lambda leaf: (
            leaf + jax.random.uniform(next(draws), leaf.shape, leaf.dtype)
            if jnp.issubdtype(leaf.dtype, jnp.floating)
            else leaf
        ),
        state,
    )
    needed = learner.answering()
    other = jax.tree.map(lambda leaf, need: leaf if need else garbage(leaf), state, needed)
    answer = jax.jit(lambda s, x, t: learner.answer(s, x, t, between_tasks=True))
    x = jnp.asarray(sequence.test.images[:6])
    for task in range(3):
        one, two = answer(state, x, task), answer(other, x, task)
        assert np.isfinite(one).all()
        np.testing.assert_array_equal(one, two)
    # The file has these leaves as they are.
    found = answering_arrays(experiment, epochs.RunState(state))
    flat = arrays.flatten(state)
    assert set(found) == expected(name)
    for path, array in found.items():
        assert array.dtype == flat[path].dtype and array.tobytes() == flat[path].tobytes()
