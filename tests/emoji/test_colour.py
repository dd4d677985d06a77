"""How colourful pictures are, and are made."""

import numpy as np
import pytest

from srpo_jax.emoji import pictures, world
from srpo_jax.emoji.colour import chroma, saturate


def test_saturate():
    pixels = np.array([[[[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.25, 0.25, 0.25], [0.5, 0.4, 0.6]]]], np.float32)
    np.testing.assert_allclose(saturate(pixels, 1.0), pixels, atol=1e-6)
    grey = np.asarray(saturate(pixels, 0.0))
    np.testing.assert_allclose(grey[0, 0, 0], [0.299] * 3, atol=1e-6)
    assert np.ptp(grey, axis=-1).max() < 1e-6
    vivid = np.asarray(saturate(pixels, 2.0))
    np.testing.assert_allclose(vivid[0, 0, 1:3], pixels[0, 0, 1:3], atol=1e-6)  # greys have no colour to move from
    np.testing.assert_allclose(np.ptp(vivid[0, 0, 3]), 0.4, atol=1e-6)
    assert vivid.min() >= 0 and vivid.max() <= 1


def test_chroma_of_known_pictures_and_of_the_artists():
    assert chroma(np.zeros((2, 4, 4, 3))).tolist() == [0, 0]
    half = np.ones((4, 4, 3))
    half[:2] = [1.0, 0.0, 0.5]
    assert chroma(half) == 0.5
    drawn = chroma(pictures.load(world.world()) / np.float32(255)).mean(1)
    assert drawn[:2] == pytest.approx([0.19, 0.22], abs=0.01) and drawn[2] < 1e-3
