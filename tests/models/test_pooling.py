"""Max pooling has the values of Flax's, and its gradient goes to the largest inputs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bpnjax.models.pooling import max_pool


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(("size", "shape"), [((2, 2), (2, 7, 6, 3)), ((3, 2), (1, 8, 9, 2))])
def test_values_gradients_and_tangents_are_those_of_flax(size, shape, padding):
    x, x_dot = (jax.random.normal(jax.random.key(i), shape) for i in range(2))

    def theirs(x):
        return nn.max_pool(x, size, strides=size, padding=padding)

    def ours(x):
        return max_pool(x, size, padding)

    y, pull = jax.vjp(theirs, x)
    g = jax.random.normal(jax.random.key(2), y.shape)
    found, our_pull = jax.vjp(ours, x)
    np.testing.assert_array_equal(found, y)
    np.testing.assert_array_equal(our_pull(g)[0], pull(g)[0])
    np.testing.assert_array_equal(
        jax.jvp(ours, (x,), (x_dot,))[1], jax.jvp(theirs, (x,), (x_dot,))[1]
    )


def test_equally_large_inputs_share_the_gradient():
    x = jnp.array([[1.0, 1.0, 0.0], [1.0, 0.0, 2.0]]).reshape(1, 2, 3, 1)
    gradient = jax.grad(lambda x: 6 * max_pool(x, (2, 3)).sum())
    np.testing.assert_array_equal(gradient(x)[0, :, :, 0], [[0, 0, 0], [0, 0, 6]])
    even = jax.grad(lambda x: 6 * max_pool(x, (2, 2)).sum())(x)
    np.testing.assert_array_equal(even[0, :, :, 0], [[2, 2, 0], [2, 0, 0]])
