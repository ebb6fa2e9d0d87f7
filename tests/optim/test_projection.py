"""GEM's dual against SciPy and its optimality conditions; A-GEM by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import nnls

from bpnjax.optim import projection

pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.mark.parametrize("correlation", [0.0, 0.9, 0.999])
@pytest.mark.parametrize("tasks", [1, 3, 19])
def test_equals_scipy_nnls(tasks, correlation):
    """min |B u - d| over u >= 0 has A = B^T B and b = B^T d."""
    rng = np.random.default_rng(tasks)
    common = rng.normal(size=(400, 1))
    basis = np.sqrt(correlation) * common + np.sqrt(1 - correlation) * rng.normal(size=(400, tasks))
    basis *= rng.uniform(0.1, 10, size=tasks)  # tasks' gradients differ in length
    solve = jax.jit(projection.nonnegative_quadratic)
    for _ in range(5):
        target = rng.normal(size=400) + rng.normal() * common[:, 0]
        expected, _ = nnls(basis, target)
        got = solve(jnp.asarray(basis.T @ basis, jnp.float32),
                    jnp.asarray(basis.T @ target, jnp.float32), jnp.ones(tasks, bool))  # fmt: skip
        assert (np.asarray(got) >= 0).all()
        # Compared by what they explain: the columns themselves are nearly dependent.
        np.testing.assert_allclose(
            basis @ got, basis @ expected, atol=2e-3 * np.linalg.norm(basis @ expected) + 1e-4
        )


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_gem_meets_its_optimality_conditions(margin):
    project = jax.jit(partial(projection.gem, margin=margin, damping=0.0))
    for seed in range(20):
        rng = np.random.default_rng(seed)
        memories = rng.normal(size=(6, 30)) + 0.5 * rng.normal(size=30)
        g = rng.normal(size=30)
        valid = np.array([True, True, False, True, True, False])
        got = project(*(jnp.asarray(v, jnp.float32) for v in (g, memories)), jnp.asarray(valid))
        got = np.asarray(got)
        rows = memories[valid]
        if (rows @ g >= 0).all():
            np.testing.assert_allclose(got, g, rtol=1e-6)
            continue
        v = np.linalg.lstsq(rows.T, got - g, rcond=None)[0]
        np.testing.assert_allclose(rows.T @ v, got - g, atol=1e-4)  # in the span of the memories
        slope = rows @ got  # derivative of the dual
        assert (v >= margin - 1e-3).all() and (slope >= -1e-3).all()
        np.testing.assert_allclose((v - margin) * slope, 0, atol=2e-2)  # complementary slackness


def test_gem_in_the_plane_by_hand():
    g, memory = jnp.array([1.0, -1.0]), jnp.array([[0.0, 2.0], [9.0, 9.0]])
    only_first, project = jnp.array([True, False]), jax.jit(projection.gem)
    plain = project(g, memory, only_first, margin=0.0, damping=0.0)
    np.testing.assert_allclose(plain, [1.0, 0.0], atol=1e-6)
    # v >= 2 holds the second component at -1 + 2 * 2.
    pushed = project(g, memory, only_first, margin=2.0, damping=0.0)
    np.testing.assert_allclose(pushed, [1.0, 3.0], atol=1e-6)
    free = project(-g, memory, only_first, margin=0.5)
    np.testing.assert_array_equal(free, -g)  # no conflict: untouched, margin or not


def test_gem_without_earlier_tasks_and_under_vmap():
    g = jax.random.normal(jax.random.key(0), (3, 8))
    memories = jax.random.normal(jax.random.key(1), (3, 4, 8))
    project = jax.jit(projection.gem)
    none = project(g[0], memories[0], jnp.zeros(4, bool))
    np.testing.assert_array_equal(none, g[0])
    valid = jnp.array([[True] * 4, [True, False, True, False], [False] * 4])
    together = jax.jit(jax.vmap(projection.gem))(g, memories, valid)
    for i in range(3):
        alone = project(g[i], memories[i], valid[i])
        np.testing.assert_allclose(together[i], alone, rtol=1e-4, atol=1e-5)


def test_agem_by_hand():
    g, reference = jnp.array([1.0, -1.0]), jnp.array([1.0, 3.0])
    got = projection.agem(g, reference)
    np.testing.assert_allclose(got, g - (-2 / 10) * reference, rtol=1e-6)
    np.testing.assert_allclose(got @ reference, 0, atol=1e-6)
    np.testing.assert_array_equal(projection.agem(g, -reference), g)
    np.testing.assert_array_equal(projection.agem(g, jnp.zeros(2)), g)
