"""The convolution with a gradient of our own: JAX's numbers, and on CPUs kernels' axes in order inside of loops too."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srpo_jax.models import convolution

AXES = ("NHWC", "HWIO", "NHWC")


def arrays(size: tuple[int, int], dtype=np.float32):
    generator = np.random.default_rng(0)
    x = generator.standard_normal((2, 6, 5, 3), np.float32).astype(dtype)
    return x, generator.standard_normal((*size, 3, 4), np.float32).astype(dtype)


@pytest.mark.parametrize(
    ("size", "padding"),
    [
        ((3, 3), ((1, 1), (1, 1))),
        ((1, 1), ((0, 0), (0, 0))),
        ((2, 2), ((1, 0), (0, 1))),
        ((2, 2), ((0, 1), (1, 0))),
        ((3, 2), ((0, 0), (0, 0))),
        ((3, 3), ((2, 0), (1, 2))),
    ],
)
def test_result_and_gradients_are_those_of_jax(size, padding):
    x, kernel = arrays(size)

    def theirs(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=AXES)

    expected, back = jax.vjp(theirs, x, kernel)
    found, ours = jax.vjp(lambda x, kernel: convolution.convolve(x, kernel, padding), x, kernel)
    np.testing.assert_array_equal(found, expected)
    cotangent = np.random.default_rng(1).standard_normal(expected.shape, np.float32)
    for one, other in zip(ours(cotangent), back(cotangent), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_gradients_are_in_the_dtype_of_what_was_given():
    x, kernel = arrays((3, 3), jnp.bfloat16)
    result, back = jax.vjp(lambda x, kernel: convolution.general(x, kernel, (1, 1), "SAME"), x, kernel)
    assert result.shape == (2, 6, 5, 4)
    assert [g.dtype for g in (result, *back(result))] == [jnp.bfloat16] * 3


def in_a_loop(convolve):
    """The axes of the convolutions in a program that takes the gradient of the input in a loop, from its HLO."""
    x, kernel = arrays((3, 3))

    def body(x, _):
        return x + jax.grad(lambda x: jnp.square(convolve(x, kernel)).sum())(x), None

    program = jax.jit(lambda x: jax.lax.scan(body, x, None, 3)[0]).lower(x).compile().as_text()
    found = re.findall(r"dim_labels=(\S+?)[,\s]", program)
    assert len(found) == 2  # forward and back
    return found


def test_in_a_loop_a_cpu_gets_kernels_with_their_axes_in_order():
    def theirs(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=AXES)

    assert set(in_a_loop(lambda x, kernel: convolution.general(x, kernel, (1, 1), "SAME"))) == {"b01f_01io->b01f"}
    assert set(in_a_loop(theirs)) != {"b01f_01io->b01f"}  # what it is for; if this fails, JAX's own will do


def test_other_platforms_get_the_form_of_jax():
    """Lowered for a TPU that is not here, nothing is turned."""
    x, kernel = arrays((3, 3))

    def gradient(x):
        return jax.grad(lambda x: convolution.general(x, kernel, (1, 1), "SAME").sum())(x)

    def text(platform: str) -> str:
        return jax.jit(gradient).trace(x).lower(lowering_platforms=(platform,)).as_text()

    swapped = "x[0, 1, o, i]->"
    assert swapped in text("tpu") and swapped not in text("cpu")
