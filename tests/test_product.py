"""The package's dense product has the values and gradients of JAX's own, in an order."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bpnjax import models
from bpnjax.config import default
from bpnjax.models.product import dot_general

DIMENSIONS = (((1,), (0,)), ((), ()))
X = jax.random.normal(jax.random.key(0), (5, 3))
KERNEL = jax.random.normal(jax.random.key(1), (3, 4))
G = jax.random.normal(jax.random.key(2), (5, 4))


def test_equals_jax_in_value_and_gradients():
    def of(function, x, kernel):
        return jax.vjp(lambda x, k: function(x, k, DIMENSIONS), x, kernel)

    for dtype in (jnp.float32, jnp.bfloat16):
        x, kernel, g = (a.astype(dtype) for a in (X, KERNEL, G))
        (ours, to_ours), (theirs, to_theirs) = (
            of(f, x, kernel) for f in (dot_general, lax.dot_general)
        )
        np.testing.assert_array_equal(ours, theirs)
        jax.tree.map(np.testing.assert_array_equal, to_ours(g), to_theirs(g))


def test_what_is_not_finite_is_not_hidden():
    def gradients(x, kernel, g):
        return jax.vjp(lambda x, k: dot_general(x, k, DIMENSIONS), x, kernel)[1](g)

    for broken in (jnp.inf, jnp.nan):
        to_x, to_kernel = gradients(X, KERNEL, G.at[0, 0].set(broken))
        assert not np.isfinite(to_x).all() and not np.isfinite(to_kernel).all()


def test_under_vmap_equals_each_alone():
    def gradient(x, kernel):
        return jax.grad(lambda k: jnp.sum(G * dot_general(x, k, DIMENSIONS) ** 2))(kernel)

    kernels = jnp.stack([KERNEL, 2 * KERNEL])
    together = jax.vmap(gradient, (None, 0))(X, kernels)
    for one, kernel in zip(together, kernels, strict=True):
        np.testing.assert_allclose(one, gradient(X, kernel), rtol=1e-5)


def test_a_step_copies_no_kernel_and_forms_no_gradient_of_the_input():
    """What it is for: in a loop of SGD steps no kernel is copied; and nothing is computed more."""
    config = default().model
    config.hidden = (24, 24)
    model = models.build(config, 5)
    x = jnp.ones((8, 40))

    def loss(params):
        return jnp.sum(model.apply({"params": params}, x) ** 2)

    def step(_, params):
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))

    params = model.init(jax.random.key(0), x)["params"]
    run = jax.jit(lambda params: lax.fori_loop(0, 7, step, params), donate_argnums=0)
    text = run.lower(params).compile().as_text()
    bodies = [part for part in text.split("\n\n") if " dot(" in part]
    assert bodies, text
    copies = [line for body in bodies for line in body.splitlines() if re.search(r" copy\(", line)]
    assert not [line for line in copies if re.search(r"f32\[24,(24|5)\]", line)], copies
    assert sum(body.count(" dot(") for body in bodies) == 3 + 3 + 2
