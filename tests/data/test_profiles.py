"""Colours of pictures with a profile of their own, as any program that manages colours shows them."""

import io

import numpy as np
import pytest
from helpers.photos import content
from PIL import Image, ImageCms

from srpo_jax.data import images

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# sRGB whose tags of red and blue have changed places in the table: red numbers make blue.
SWAPPED = SRGB.replace(b"rXYZ", b"?XYZ", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"?XYZ", b"bXYZ", 1)
RED, PURPLE = (255, 0, 0), (40, 0, 200)


def shown(image, profile, kind="PNG"):
    return np.asarray(images.upright(content(image, kind, icc_profile=profile)), int)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_are_what_the_profile_says(mode):
    image = Image.new("RGB", (8, 4), PURPLE).convert(mode, palette=Image.Palette.ADAPTIVE)
    found = shown(image, SWAPPED)
    assert found.shape == (4, 8, 3) and np.abs(found - (200, 0, 40)).max() <= 2
    assert (shown(image, None) == PURPLE).all()


def test_what_is_clear_stays_on_white():
    image = Image.new("RGBA", (8, 4), (*RED, 255))
    image.paste((*RED, 0), (4, 0, 8, 4))
    found = shown(image, SWAPPED)
    assert np.abs(found[:, :4] - (0, 0, 255)).max() <= 2 and (found[:, 4:] == 255).all()


def test_grey_under_a_profile_of_colours():
    grey = Image.new("L", (8, 4), 90)
    assert np.abs(shown(grey, SWAPPED) - 90).max() <= 2


@pytest.mark.parametrize("profile", [SRGB, b"no profile", SRGB[:200]])
def test_what_says_nothing_new_changes_nothing(profile):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    np.testing.assert_array_equal(shown(image, profile), np.asarray(image))


def test_the_profile_of_printed_colours_is_read():
    """Of a profile that is not for the picture's kind of colours, nothing."""
    image = Image.new("CMYK", (8, 4), (0, 255, 255, 0))
    file = io.BytesIO()
    image.save(file, "TIFF", icc_profile=SRGB)
    np.testing.assert_array_equal(np.asarray(images.upright(file.getvalue())), np.asarray(image.convert("RGB")))
