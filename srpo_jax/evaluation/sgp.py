"""SGP-HPS (arXiv 2509.06942, Table 1): how much more a picture is liked as a photograph than as a rendering.

The paper defines it as the difference of HPS-v2.1 under two prefixes of the caption and prints 0.463 for FLUX.1-dev,
which no difference of numbers near 0.29 is; how it was scaled, and what joins prefix and caption, is not published.
Here prefix and caption have a space between them, and there are three figures. None compares with the printed ones.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

PHOTO, RENDER = "Realistic photo", "CG Render"
SHARPNESS = 100.0  # of the sigmoid: HPS differs by a few hundredths


def captions(prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """The prompts as photographs and as renderings, for HPS-v2.1 to score one picture under both."""
    return [f"{PHOTO} {prompt}" for prompt in prompts], [f"{RENDER} {prompt}" for prompt in prompts]


class Sgp(NamedTuple):
    """Of every picture ``[N]``, float64; their means are the three figures of SGP-HPS.

    Attributes:
      difference: HPS as a photograph minus HPS as a rendering, d.
      win: 1 where d > 0, a half where it is 0, else 0; the mean is the share of pictures that win.
      sigmoid: of ``100 d``.
    """

    difference: np.ndarray
    win: np.ndarray
    sigmoid: np.ndarray


def sgp(photo: np.ndarray, render: np.ndarray) -> Sgp:
    """From the HPS-v2.1 scores ``[N]`` of the same pictures under both captions. Raises ValueError if N differs."""
    photo, render = (np.asarray(scores, np.float64) for scores in (photo, render))
    if photo.shape != render.shape:
        raise ValueError(f"scores of the same pictures have one shape, got {photo.shape} and {render.shape}")
    difference = photo - render
    # By tanh, which no difference overflows.
    return Sgp(difference, (np.sign(difference) + 1) / 2, (1 + np.tanh(SHARPNESS * difference / 2)) / 2)
