"""Collapse signals against formulas written otherwise: colorsys, loops, scipy's filters, torch."""

import colorsys

import jax
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats

from srpo_jax.evaluation import signals


@pytest.fixture(scope="module")
def images():
    """Two pictures of different character, uint8: noise of few colours, and a smooth one that is clipped in places."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (20, 26, 3), np.uint8)
    y, x = np.mgrid[:20, :26] / 20
    smooth = np.stack([x, y, 0.5 + 0.7 * np.sin(3 * x * y)], -1)
    return np.stack([noise, (np.clip(smooth, 0, 1) * 255).astype(np.uint8)])


def luma(picture):
    red, green, blue = np.moveaxis(picture / 255.0, -1, 0)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def test_saturation(images):
    expected = [
        np.mean([colorsys.rgb_to_hsv(*pixel)[1] for pixel in picture.reshape(-1, 3) / 255.0]) for picture in images
    ]
    np.testing.assert_allclose(signals.saturation(images), expected, rtol=1e-12)
    assert signals.saturation(np.zeros((1, 4, 4, 3), np.uint8)) == [0]


def test_clipped(images):
    expected = [sum(any(c <= 2 or c >= 253 for c in pixel) for pixel in p.reshape(-1, 3).tolist()) for p in images]
    assert min(expected) > 0
    np.testing.assert_allclose(signals.clipped(images) * images[0, ..., 0].size, expected)
    borders = np.array([2, 3, 252, 253], np.uint8)[:, None, None, None] * np.ones((1, 1, 1, 3), np.uint8)
    for pictures in (borders, (borders / 255).astype(np.float32)):
        np.testing.assert_array_equal(signals.clipped(pictures), [1, 0, 0, 1])


def test_laplacian_variance(images):
    expected = [scipy.ndimage.laplace(luma(picture))[1:-1, 1:-1].var() for picture in images]
    np.testing.assert_allclose(signals.laplacian_variance(images), expected, rtol=1e-10)


def test_high_frequency_share(images):
    """A cosine's energy lies at its frequency: below a quarter of a cycle a pixel all of it is low."""
    x = np.arange(32)

    def wave(vertical, horizontal):
        phase = 2 * np.pi * (vertical * x[:, None] + horizontal * x[None]) / 32
        return np.repeat((0.5 + 0.4 * np.cos(phase))[None, ..., None], 3, -1)

    waves = np.concatenate([wave(0, 7), wave(0, 9), wave(7, 7), wave(8, 0), wave(5, 6)])
    np.testing.assert_allclose(signals.high_frequency_share(waves), [0, 1, 1, 0, 0], atol=1e-12)
    mixed = (wave(0, 3) + 2 * wave(12, 0)) / 3  # amplitudes 1 to 2, energies 1 to 4
    np.testing.assert_allclose(signals.high_frequency_share(mixed), [0.8], rtol=1e-12)
    flat = np.full((1, 8, 8, 3), 77, np.uint8)
    assert signals.high_frequency_share(flat) == [0]
    noise, smooth = signals.high_frequency_share(images)
    assert noise > 0.5 > 0.1 > smooth


def test_grey_entropy(images):
    for picture, found in zip(images, signals.grey_entropy(images), strict=True):
        counts = np.histogram(np.rint(luma(picture) * 255), bins=256, range=(-0.5, 255.5))[0]
        assert found == pytest.approx(scipy.stats.entropy(counts, base=2), rel=1e-6)
    ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1), 3, -1)
    np.testing.assert_allclose(signals.grey_entropy(ramp), [8])


def test_floats_are_the_same_pictures(images):
    for signal in (
        signals.saturation,
        signals.clipped,
        signals.laplacian_variance,
        signals.high_frequency_share,
        signals.grey_entropy,
    ):
        np.testing.assert_allclose(signal((images / 255).astype(np.float32)), signal(images), rtol=1e-5)


def features(*shape):
    found = np.random.default_rng(1).normal(size=shape) + 0.5
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


def test_diversity():
    found = features(3, 4, 6)
    expected = [np.mean([1 - p[i] @ p[j] for i in range(4) for j in range(4) if i != j]) for p in found]
    np.testing.assert_allclose(signals.diversity(found), expected, rtol=1e-12)
    np.testing.assert_allclose(signals.diversity(np.repeat(found[:, :1], 4, 1)), 0, atol=1e-12)
    with pytest.raises(ValueError, match="several seeds"):
        signals.diversity(found[:, :1])


def test_vendi():
    assert signals.vendi(np.eye(5)) == pytest.approx(5)
    assert signals.vendi(np.repeat(features(1, 4), 7, 0)) == pytest.approx(1)
    found = features(9, 4)
    values = np.linalg.eigvalsh(found @ found.T / 9)
    values = values[values > 1e-12]
    assert signals.vendi(found) == pytest.approx(np.exp(-np.sum(values * np.log(values))), rel=1e-9)


def test_drift():
    rng = np.random.default_rng(2)
    base, change = rng.normal(size=(2, 3, 5, 4)).astype(np.float32)
    found = jax.jit(signals.drift)(base + 0.1 * change, base)
    assert found == pytest.approx(0.01 * np.sum(change**2) / np.sum(base**2), rel=1e-4)
