"""The package's convolution has the values and gradients of JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from bpnjax.models.convolution import conv

LABELS = ("NHWC", "HWIO", "NHWC")
CASES = [
    ((2, 8, 9, 3), (3, 3, 3, 4), (1, 1), "SAME", {}),
    ((2, 23, 20, 2), (5, 4, 2, 3), (4, 3), [(2, 2), (0, 1)], {}),  # pixels left over by the stride
    ((1, 7, 7, 2), (3, 2, 2, 3), (2, 2), "VALID", {}),
    ((1, 8, 8, 4), (3, 3, 2, 4), (1, 1), "SAME", {"feature_group_count": 2}),
    ((1, 8, 8, 2), (3, 3, 2, 4), (1, 1), "SAME", {"rhs_dilation": (2, 2)}),
    ((2, 9, 3), (3, 3, 4), (2,), "SAME", {"dimension_numbers": ("NHC", "HIO", "NHC")}),
]


@pytest.mark.parametrize(("x", "kernel", "strides", "padding", "options"), CASES)
def test_equals_jax_in_value_and_gradients(x, kernel, strides, padding, options):
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], x), jax.random.normal(keys[1], kernel)
    options = {"dimension_numbers": LABELS} | options

    def of(function):
        return jax.vjp(lambda x, k: function(x, k, strides, padding, **options), x, kernel)

    (ours, our_gradients), (theirs, their_gradients) = of(conv), of(lax.conv_general_dilated)
    np.testing.assert_array_equal(ours, theirs)
    g = jax.random.normal(keys[2], theirs.shape)
    for a, b in zip(our_gradients(g), their_gradients(g), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_under_vmap_and_bfloat16():
    x, kernel = jnp.ones((3, 2, 6, 6, 2)), jnp.ones((3, 3, 3, 2, 4))

    def total(x, kernel):
        return conv(x, kernel, (1, 1), "SAME", dimension_numbers=LABELS).sum()

    together = jax.vmap(jax.grad(total, 1))(x, kernel)
    np.testing.assert_allclose(together[1], jax.grad(total, 1)(x[1], kernel[1]), rtol=1e-6)
    half = jax.grad(total, 1)(x[0].astype(jnp.bfloat16), kernel[0].astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
