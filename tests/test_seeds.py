"""Seeds of 64 bits."""

import jax
import numpy as np
import pytest

from srpo_jax import sampling, seeds, values

LARGE = 1125899906842624  # 2^50, whose last 32 bits are 0


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1])
def test_numbers_of_seeds_below_32_bits_are_jaxs(seed):
    assert (jax.random.key_data(seeds.key(seed)) == jax.random.key_data(jax.random.key(seed))).all()


def test_all_bits_count():
    found = {
        seed: tuple(np.asarray(jax.random.key_data(seeds.key(seed)))) for seed in (0, 1, 2**32, LARGE, values.SEED)
    }
    assert len(set(found.values())) == len(found)
    names = np.zeros((1, 1), np.uint32)
    noise = [np.asarray(sampling.draw_noise(names, seed, (4, 4))) for seed in (0, LARGE)]
    assert np.abs(noise[0] - noise[1]).max() > 0.1
