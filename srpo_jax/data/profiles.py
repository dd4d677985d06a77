"""Colours of pictures: from their own ICC profile into sRGB, as every program that shows them does.

Cameras and telephones save photographs in Adobe RGB and Display P3: read without their profile, they are dull.
"""

import io

import numpy as np
from PIL import Image, ImageCms

MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # of Pillow, by a profile's own word for its colours
SAME = 2  # levels of 255 that a profile may differ from sRGB, by its own rounding, without being another


def to_srgb(image: Image.Image) -> Image.Image:
    """A picture in sRGB; as it is if it has no profile, or sRGB's, or one that is broken or of other colours.

    One that is converted is RGB, or RGBA if anything in it is transparent.
    """
    content = image.info.get("icc_profile")
    if not content:
        return image
    try:
        profile = ImageCms.getOpenProfile(io.BytesIO(content))
        mode = MODES.get(profile.profile.xcolor_space.strip())
        plain, alpha = _without_alpha(image)
        if mode == "RGB" and plain.mode == "L":
            plain = plain.convert("RGB")
        if plain.mode != mode:
            return image
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode != "CMYK" and _is_nothing(transform, mode):
            return image
        found = ImageCms.applyTransform(plain, transform)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):  # programs that show it pass over it too
        return image
    if alpha is not None:
        found.putalpha(alpha)
    return found


def _without_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """A picture's colours, and how opaque they are; None if all are."""
    if image.mode in ("P", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode in ("LA", "RGBA"):
        return image.convert(image.mode[:-1]), image.getchannel("A")
    return image, None


def _is_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a transform changes no colour, tried on a grid of them."""
    if mode == "L":
        colours = np.arange(256, dtype=np.uint8)[None]
    else:
        levels = np.arange(0, 256, 51, dtype=np.uint8)
        colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    before = Image.fromarray(colours)
    after = np.asarray(ImageCms.applyTransform(before, transform), np.int16)
    return int(np.abs(after - np.asarray(before.convert("RGB"), np.int16)).max()) <= SAME
