"""Signs that a model collapses into what a reward likes, which no judge model is needed for.

They have no target: watch them beside the scores, on the same prompts and noise. Of pictures, arrays ``[B, H, W, 3]``,
uint8 or floating point in [0, 1]; luma is BT.601's, 0.299 R + 0.587 G + 0.114 B, in [0, 1].
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

LUMA = (0.299, 0.587, 0.114)
LOW, HIGH = 2 / 255, 253 / 255  # a channel at or beyond these counts as clipped
BINS = 256  # of the histogram of luma
HALF_NYQUIST = 0.25  # cycles a pixel


def saturation(images: np.ndarray) -> np.ndarray:
    """The mean of HSV's S, ``(max - min) / max`` of a pixel's channels and 0 of black: ``[B]`` in [0, 1].

    It rises as colours are overdone, which HPS and late denoising steps reward.
    """
    pixels = _unit_range(images)
    largest, smallest = pixels.max(-1), pixels.min(-1)
    return np.mean((largest - smallest) / np.where(largest > 0, largest, 1), axis=(1, 2))


def clipped(images: np.ndarray) -> np.ndarray:
    """The share of pixels of which any channel is <= 2/255 or >= 253/255: ``[B]``. They carry no gradient on."""
    pixels = _unit_range(images)
    # Halfway to the next level of 8 bits, so that rounding of a float does not decide.
    edge = 0.5 / 255
    return np.mean(((pixels < LOW + edge) | (pixels > HIGH - edge)).any(-1), axis=(1, 2))


def laplacian_variance(images: np.ndarray) -> np.ndarray:
    """The variance of luma's Laplacian (4 neighbours; the picture's border left out): ``[B]``. It falls as pictures
    grow smooth."""
    x = _luma(images)
    edges = x[:, :-2, 1:-1] + x[:, 2:, 1:-1] + x[:, 1:-1, :-2] + x[:, 1:-1, 2:] - 4 * x[:, 1:-1, 1:-1]
    return edges.var(axis=(1, 2))


def high_frequency_share(images: np.ndarray) -> np.ndarray:
    """The share of luma's spectral energy, its mean left out, above half of Nyquist's frequency (0.25 cycles a pixel in
    any direction): ``[B]``, 0 of a flat picture. It falls with smoothing, and rises with gloss and grids."""
    x = _luma(images)
    x = x - x.mean(axis=(1, 2), keepdims=True)
    energy = np.abs(np.fft.fft2(x)) ** 2
    vertical, horizontal = np.fft.fftfreq(x.shape[1]), np.fft.fftfreq(x.shape[2])
    high = np.hypot(vertical[:, None], horizontal[None]) > HALF_NYQUIST
    total = energy.sum((1, 2))
    # What rounding leaves of a flat picture is no detail.
    flat = total <= 1e-12 * x[0].size ** 2
    return np.where(flat, 0.0, (energy * high).sum((1, 2)) / np.where(flat, 1.0, total))


def grey_entropy(images: np.ndarray) -> np.ndarray:
    """The entropy of the histogram of luma in 256 levels, bits: ``[B]`` in [0, 8]. It falls as pictures turn into flat
    posters."""
    levels = np.floor(_luma(images) * (BINS - 1) + 0.5).astype(np.int64)
    found = []
    for picture in levels:
        share = np.bincount(picture.ravel(), minlength=BINS) / picture.size
        share = share[share > 0]
        found.append(-np.sum(share * np.log2(share)))
    return np.array(found)


def diversity(features: np.ndarray) -> np.ndarray:
    """How unlike the pictures of a prompt are: the mean of ``1 - cos`` over all pairs of its seeds.

    Args:
      features: of unit norm, ``[P, N, E]``: P prompts, N >= 2 seeds. Of a model that was not the reward.

    Returns:
      ``[P]``: 0 if all seeds look the same.

    Raises ValueError for a single seed.
    """
    features = np.asarray(features, np.float64)
    count = features.shape[1]
    if count < 2:
        raise ValueError("diversity is of several seeds a prompt; got one")
    # |sum of features|^2 = N + the cosines of all ordered pairs.
    cosines = np.sum(features.sum(1) ** 2, axis=-1) - np.sum(features**2, axis=(1, 2))
    return 1 - cosines / (count * (count - 1))


def unlikeness(features: np.ndarray) -> np.ndarray:
    """How unlike the other pictures of its prompt each picture is: the mean of ``1 - cos`` over them.

    ``features``: of the N >= 2 seeds of one prompt, of unit norm, ``[N, E]``. Returns ``[N]``, whose mean is
    ``diversity``. Raises ValueError for a single seed.
    """
    features = np.asarray(features, np.float64)
    if len(features) < 2:
        raise ValueError("diversity is of several seeds a prompt; got one")
    cosines = features @ features.T
    return 1 - (cosines.sum(1) - np.diag(cosines)) / (len(features) - 1)


def unlikeness_of_prompts(features: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """``unlikeness`` of pictures of several prompts, each among those of its own: features ``[N, E]``, prompts ``[N]``
    in any order. Returns ``[N]``. Raises ValueError for a prompt with a single picture."""
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    found = np.zeros(len(features))
    for of in rows.values():
        found[of] = unlikeness(features[of])
    return found


def vendi(features: np.ndarray) -> float:
    """How many different pictures a set is worth (Friedman, Dieng, arXiv 2210.02410): the exponential of the entropy of
    the eigenvalues of ``F F^T / n``, from 1 to n.

    ``features``: of unit norm, ``[n, E]``. Of a model that was not the reward.
    """
    features = np.asarray(features, np.float64)
    # Singular values and not the n x n matrix: where n > E they are fewer.
    values = np.linalg.svd(features, compute_uv=False) ** 2 / len(features)
    values = values[values > 0]
    return float(np.exp(-np.sum(values * np.log(values))))


def drift(velocity: jax.Array, base: jax.Array) -> jax.Array:
    """``mean |v - v_base|^2 / mean |v_base|^2`` over all samples: how far a model has gone from the one it started as.

    Stands in for a Kullback-Leibler divergence, of which a deterministic flow has none, and grows before rewards turn.

    Args:
      velocity, base: of the model and of its base at the same states, ``[B, ...]``.

    Returns:
      A float32 scalar.
    """
    velocity, base = (x.astype(jnp.float32) for x in (velocity, base))
    return jnp.mean((velocity - base) ** 2) / jnp.mean(base**2)


# By the name that it is written under: the signals of pictures alone.
OF_PICTURES = {
    function.__name__: function
    for function in (saturation, clipped, laplacian_variance, high_frequency_share, grey_entropy)
}


def of_picture(picture: np.ndarray) -> dict[str, float]:
    """All ``OF_PICTURES`` of one picture ``[H, W, 3]``, in seven digits."""
    return {name: float(f"{function(picture[None])[0]:.7g}") for name, function in OF_PICTURES.items()}


def _unit_range(images: np.ndarray) -> np.ndarray:
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images.astype(np.float64) / 255
    return images.astype(np.float64)


def _luma(images: np.ndarray) -> np.ndarray:
    return _unit_range(images) @ np.array(LUMA)
