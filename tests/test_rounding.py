"""Stochastic rounding and 8-bit floats with shared scales: unbiased, on the grid of the format, and stable."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from srpo_jax import rounding

FORMATS = [jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2]


def neighbours(x, dtype):
    """The numbers of a format on both sides of each of ``x``, from the list of all of them."""
    bits = ml_dtypes.finfo(dtype).bits
    every = np.arange(2**bits, dtype=f"uint{bits}").view(dtype).astype(np.float32)
    every = np.unique(every[np.isfinite(every)].astype(np.float64))
    index = np.searchsorted(every, x, side="right") - 1
    return every[index], every[np.minimum(index + (every[index] != x), len(every) - 1)]


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_number_becomes_one_of_its_neighbours_with_its_own_mean(dtype):
    rng = np.random.default_rng(0)
    # Subnormals of the 8-bit formats among them.
    x = (rng.choice([-1.0, 1.0], 400) * np.exp2(rng.uniform(-8, 6, 400))).astype(np.float32)
    count = 2048
    keys = jax.random.split(jax.random.key(0), count)
    rounded = jax.vmap(lambda key: rounding.stochastic(jnp.asarray(x), dtype, key))(keys)
    rounded = np.asarray(rounded).astype(np.float64)
    low, high = neighbours(x.astype(np.float64), dtype)
    assert np.all((rounded == low) | (rounded == high))
    spread = np.maximum(high - low, 1e-12)
    # Of 2048 draws, the mean of one with probability p is off by sqrt(p (1 - p) / 2048) <= 0.011.
    assert np.abs((rounded.mean(0) - x) / spread).max() < 5 * 0.011
    assert ((rounded == low).any(0) & (rounded == high).any(0)).mean() > 0.9


@pytest.mark.parametrize("dtype", FORMATS)
def test_what_a_format_holds_stays(dtype):
    x = np.array([0, 1, -1.5, 2.0**-6, -(2.0**-7), 208], np.float32)
    x = x.astype(dtype).astype(np.float32)
    for seed in range(8):
        found = rounding.stochastic(jnp.asarray(x), dtype, jax.random.key(seed))
        np.testing.assert_array_equal(found.astype(np.float32), x)


def test_ends_of_the_range():
    x = jnp.array([1e9, -jnp.inf, jnp.nan])
    rounded = np.asarray(rounding.stochastic(x, jnp.float8_e4m3fn, jax.random.key(0))).astype(np.float32)
    np.testing.assert_array_equal(rounded, [448, -448, np.nan])


@pytest.mark.parametrize("size", [256, 192, 7])
def test_blocks(size):
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(3, size)) * np.exp2(rng.integers(-30, 10, (3, 1)))).astype(np.float32)
    found = rounding.scaled(jnp.asarray(x), jnp.float8_e4m3fn, jax.random.key(0))
    width = rounding.block(size)
    assert found.scale.shape == (3, size // width) == rounding.scale_shape(x.shape)
    assert np.all(np.frexp(found.scale)[0] == 0.5), "a power of two"
    back = np.asarray(rounding.unscaled(found))
    largest = np.abs(x.reshape(3, -1, width)).max(-1, keepdims=True).repeat(width, -1).reshape(x.shape)
    # Half the range of the format may be unused; of a number, 3 bits are kept, of the largest 2**-15 at least.
    assert np.all(np.abs(back - x) <= np.maximum(np.abs(x) / 8, largest * 2.0**-15))
    again = rounding.scaled(jnp.asarray(back), jnp.float8_e4m3fn, jax.random.key(1))
    np.testing.assert_array_equal(rounding.unscaled(again), back)


def test_nothing_and_almost_nothing():
    x = jnp.zeros((2, 128)).at[1, 0].set(1.0).at[1, 1].set(1e-12)
    found = rounding.scaled(x, jnp.float8_e4m3fn, jax.random.key(0), floor=True)
    back = np.asarray(rounding.unscaled(found))
    assert not back[0].any() and not back[1, 2:].any()
    assert 0 < back[1, 1] < 1e-5, "a floor keeps what is positive from zero"
