"""The embedded pictures as arrays, their quality in decibels, and sheets of them."""

import numpy as np
import pytest

from srpo_jax.emoji import pictures, world


def test_pictures():
    """Pictures come in the order asked for, on white; floats and back are exact; a sheet has them row by row."""
    chosen = world.world()[5:2:-1]
    images = pictures.load(chosen, ("Mono", "3D"))
    assert images.shape == (2, 3, 64, 64, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(images[1, 2], pictures.load(chosen[2:])[world.STYLES.index("3D"), 0])
    assert np.all(images[:, :, 0, 0] >= 250)
    assert np.ptp(images[0].astype(int), axis=-1).max() == 0 < np.ptp(images[1].astype(int), axis=-1).max()
    floats = pictures.to_float(images)
    assert floats.min() >= -1 and floats.max() == 1
    np.testing.assert_array_equal(pictures.to_uint8(floats), images)
    np.testing.assert_array_equal(pictures.to_uint8(np.array([-9.0, 9.0])), [0, 255])
    sheet = np.asarray(pictures.sheet(images[0], columns=2, gap=1))
    assert sheet.shape == (129, 129, 3)
    np.testing.assert_array_equal(sheet[65:, :64], images[0, 2])
    assert np.all(sheet[65:, 65:] == 255)
    with pytest.raises(ValueError, match="style 'Noto' is unknown"):
        pictures.load(chosen, ("Noto",))


def test_psnr():
    """An error of 0.02 everywhere, on a range of 2, is 40 dB; values outside of the range count as clipped."""
    truth = np.zeros((2, 4, 4, 3), np.float32)
    truth[1] = 1.0
    np.testing.assert_allclose(pictures.psnr(truth + 0.02, truth), [40.0, 100 + 10 * np.log10(4)], rtol=1e-5)
