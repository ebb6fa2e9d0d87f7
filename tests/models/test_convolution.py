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
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    g = jax.random.normal(keys[2], theirs.shape)
    for a, b in zip(our_gradients(g), their_gradients(g), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("x", "kernel", "strides", "padding", "options"), CASES[:3])
def test_forward_mode_and_second_derivatives_equal_those_of_jax(
    x, kernel, strides, padding, options
):
    """Tangents, and the tangents of gradients, which a rule for gradients alone would refuse."""
    keys = jax.random.split(jax.random.key(0), 4)
    x, x_dot = (jax.random.normal(k, x) for k in keys[:2])
    kernel, kernel_dot = (jax.random.normal(k, kernel) for k in keys[2:])

    def tangents(function):
        def loss(x, k):
            return (function(x, k, strides, padding, dimension_numbers=LABELS) ** 2).sum()

        return jax.jvp(jax.grad(loss, (0, 1)), (x, kernel), (x_dot, kernel_dot))

    for a, b in zip(
        jax.tree.leaves(tangents(conv)),
        jax.tree.leaves(tangents(lax.conv_general_dilated)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("n", [1, 7, 128])
def test_gradients_by_chunks_of_any_number_of_examples(n, monkeypatch):
    """A chunk holds several examples, one, or what divides their number."""
    monkeypatch.setattr("bpnjax.models.convolution._IN_CACHE", 5 * 16 * 27)
    x, g = (jax.random.normal(jax.random.key(i), (n, 4, 4, c)) for i, c in ((0, 3), (1, 5)))

    def gradient(function):
        def run(k):
            return function(x, k, (1, 1), "SAME", dimension_numbers=LABELS)

        return jax.vjp(run, jnp.zeros((3, 3, 3, 5)))[1](g)[0]

    ours, theirs = gradient(conv), gradient(lax.conv_general_dilated)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)


DEPTHWISE = [
    ((2, 8, 9, 3), (3, 3), (1, 1), "SAME"),
    ((2, 12, 12, 4), (5, 3), (2, 2), "SAME"),  # padded by 1 and 2, 0 and 1
    ((2, 11, 13, 2), (3, 5), (2, 3), [(0, 1), (3, 2)]),  # pixels left over by the stride
    ((1, 7, 6, 2), (3, 2), (1, 2), "VALID"),
    ((1, 4, 4, 2), (3, 3), (1, 1), [(4, 0), (0, 5)]),  # wider than the kernel
    ((1, 1, 1, 3), (3, 3), (2, 2), "SAME"),
]


@pytest.mark.parametrize(
    ("x", "size", "strides", "padding", "together"),
    [(*case, False) for case in DEPTHWISE] + [(*DEPTHWISE[0], True)],
)
def test_depthwise_equals_jax_in_value_gradients_and_tangents(x, size, strides, padding, together):
    """Also in the tangents of gradients, and with a kernel for each of several batches."""
    keys = jax.random.split(jax.random.key(0), 6)
    channels = x[-1]
    shapes = [x, (*size, 1, channels)]
    if together:
        shapes = [(2, *shape) for shape in shapes]
    x, kernel, x_dot, kernel_dot = (
        jax.random.normal(k, s) for k, s in zip(keys, shapes * 2, strict=False)
    )

    def of(function):
        def run(x, kernel):
            return function(
                x, kernel, strides, padding, dimension_numbers=LABELS, feature_group_count=channels
            )

        return jax.vmap(run) if together else run

    @jax.jit
    def everything(x, kernel, g):
        y, dots = jax.jvp(of(conv), (x, kernel), (x_dot, kernel_dot))
        return y, dots, gradients(of(conv), x, kernel, g)

    def gradients(function, x, kernel, g):
        def both(x, kernel):
            return jax.vjp(function, x, kernel)[1](g)

        return jax.jvp(both, (x, kernel), (x_dot, kernel_dot))

    y, dots = jax.jvp(of(lax.conv_general_dilated), (x, kernel), (x_dot, kernel_dot))
    g = jax.random.normal(keys[5], y.shape)
    expected = y, dots, gradients(of(lax.conv_general_dilated), x, kernel, g)
    for a, b in zip(*map(jax.tree.leaves, (everything(x, kernel, g), expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)
    traced = jax.jit(of(conv)).trace(x, kernel)
    for platform, kept in (("cpu", False), ("cuda", True), ("tpu", True)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.convolution" in text) is kept, platform


def test_a_narrow_convolution_is_a_product():
    x, kernel = (
        jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(2, 5, 4, 3), (1, 1, 3, 6)])
    )
    for strides in ((1, 1), (2, 2)):
        ours = jax.jit(lambda x, k, s=strides: conv(x, k, s, "VALID", dimension_numbers=LABELS))
        theirs = lax.conv_general_dilated(x, kernel, strides, "VALID", dimension_numbers=LABELS)
        np.testing.assert_allclose(ours(x, kernel), theirs, rtol=1e-5, atol=1e-6)
        assert "dot_general" in ours.lower(x, kernel).as_text()


def test_depthwise_adds_up_halves_in_float32():
    x, kernel = jnp.full((1, 5, 5, 2), 1 / 3, jnp.bfloat16), jnp.ones((5, 5, 1, 2), jnp.bfloat16)
    options = {"dimension_numbers": LABELS, "feature_group_count": 2}
    found = conv(x, kernel, (1, 1), "VALID", **options)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, (25 * x[:, :1, :1].astype(jnp.float32)).astype(x.dtype))
    gradient = jax.grad(lambda k: conv(x, k, (1, 1), "VALID", **options).sum())(kernel)
    assert gradient.dtype == jnp.bfloat16


def test_under_vmap_and_bfloat16():
    x, kernel = jnp.ones((3, 2, 6, 6, 2)), jnp.ones((3, 3, 3, 2, 4))

    def total(x, kernel):
        return conv(x, kernel, (1, 1), "SAME", dimension_numbers=LABELS).sum()

    together = jax.vmap(jax.grad(total, 1))(x, kernel)
    np.testing.assert_allclose(together[1], jax.grad(total, 1)(x[1], kernel[1]), rtol=1e-6)
    half = jax.grad(total, 1)(x[0].astype(jnp.bfloat16), kernel[0].astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
