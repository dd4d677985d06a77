"""Pictures with captions, in files."""

import io

import numpy as np
from PIL import Image

from helpers import tiny


def picture(seed, width=60, height=40):
    """A smooth picture, so that a resize does not wash it out."""
    noise = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def content(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_folder(path, captions=tiny.PROMPTS):
    """Pictures with sidecar captions; their names sort as the captions stand."""
    path.mkdir(parents=True)
    for place, caption in enumerate(captions):
        picture(place).save(path / f"{place}.png")
        (path / f"{place}.txt").write_text(caption + "\n")
    return path
