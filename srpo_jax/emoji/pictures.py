"""The embedded pictures as arrays. NumPy and Pillow only."""

import io
import zipfile
from collections.abc import Sequence

import numpy as np
from PIL import Image

from srpo_jax.emoji import world

SIZE = 64  # pixels along each side of a picture


def load(concepts: Sequence[world.Concept], styles: Sequence[str] = world.STYLES) -> np.ndarray:
    """The pictures of concepts in styles: uint8 ``[styles, concepts, 64, 64, 3]``, RGB on white, in the order given.

    Raises ValueError for a style that is not in ``world.STYLES``.
    """
    images = np.empty((len(styles), len(concepts), SIZE, SIZE, 3), np.uint8)
    for row, style in zip(images, styles, strict=True):
        if style not in world.STYLES:
            raise ValueError(f"style {style!r} is unknown; choose one of {', '.join(world.STYLES)}")
        with zipfile.ZipFile(world.DATA / f"{style.lower()}.zip") as archive:
            for index, concept in enumerate(concepts):
                row[index] = Image.open(io.BytesIO(archive.read(f"{concept.id}.webp"))).convert("RGB")
    return images


def to_float(images: np.ndarray) -> np.ndarray:
    """uint8 pictures -> float32 in [-1, 1], as the autoencoder takes them."""
    return images.astype(np.float32) / 127.5 - 1.0


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Pictures in [-1, 1] -> uint8, rounded; what lies outside is clipped."""
    return np.clip(np.rint((np.asarray(images, np.float32) + 1.0) * 127.5), 0, 255).astype(np.uint8)


def psnr(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of pictures ``[..., H, W, 3]`` in [-1, 1], one number per picture ``[...]``."""
    error = np.square(np.clip(images, -1, 1) - references).mean((-3, -2, -1))
    return 10 * np.log10(4.0 / np.maximum(error, 1e-10))


def sheet(images: np.ndarray, columns: int, gap: int = 2) -> Image.Image:
    """Pictures uint8 ``[N, H, W, 3]`` row by row on one white sheet with ``columns`` columns."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return Image.fromarray(canvas)
