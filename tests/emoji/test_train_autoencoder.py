"""The embedded pictures, and the training of their autoencoder at a toy size."""

import functools
import json

import diffusers
import jax
import numpy as np
import pytest
import torch

from srpo_jax.emoji import pictures, world
from srpo_jax.emoji import train_autoencoder as training
from srpo_jax.models.autoencoder import AutoencoderConfig
from srpo_jax.weights import engine, folder

TINY = AutoencoderConfig(block_out_channels=(4, 4, 8), layers_per_block=1, norm_num_groups=2, latent_channels=5)


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


def test_data():
    """No held-out concept is trained on; the world is; its pictures are drawn more often by the stated factor."""
    data = training.load_data()
    inside = set(world.world())
    held_out = [c for c in world.concepts() if c.split == "holdout" and c not in inside]
    assert data.held_out.shape[:2] == (3, len(held_out)) and len(held_out) > 50
    assert len(data.train) == 3 * (len(world.concepts()) - len(held_out))
    assert data.world.shape[:2] == (3, len(inside))
    np.testing.assert_array_equal(data.world, pictures.load(world.world()))
    levels, counts = np.unique(data.probabilities, return_counts=True)
    assert counts[1] == 3 * len(inside)
    np.testing.assert_allclose([levels[1] / levels[0], data.probabilities.sum()], [training.WORLD_WEIGHT, 1.0])
    from_start, later = training.batches(data, 3, 0, 4), training.batches(data, 3, 2, 4)
    first = [next(from_start) for _ in range(3)]
    np.testing.assert_array_equal(first[2], next(later))
    assert not np.array_equal(first[0], first[1])


def test_whitened():
    """Folding gives latents of mean 0 and deviation 1, and the same pictures where the decoder sees no border."""
    graphdef, params = training.fresh_params(TINY, 0)
    rng = np.random.default_rng(0)
    # Off their initial zeros, so that the decoder listens to its latents beyond its first convolution.
    params = jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), params)
    images = pictures.load(world.world()[:4], ("3D",))
    latents = training.encode(graphdef, params, images)
    assert np.abs(latents.std((0, 1, 2, 3)) - 1).max() > 0.1 < np.abs(latents.mean((0, 1, 2, 3))).max()
    folded = training.whitened(params, latents, TINY)
    after = training.encode(graphdef, folded, images)
    np.testing.assert_allclose(after.mean((0, 1, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(after.std((0, 1, 2, 3)), 1, atol=1e-4)

    # The first convolution is the only thing that the folding of the decoder touches.
    def entered(params, latents):
        conv = jax.tree.map(np.asarray, params["decoder"]["conv_in"])
        raw = latents[0] / TINY.scaling_factor + TINY.shift_factor
        dimensions = ("NHWC", "HWIO", "NHWC")
        inner = jax.lax.conv_general_dilated(raw, conv["kernel"], (1, 1), "VALID", dimension_numbers=dimensions)
        return inner + conv["bias"]

    np.testing.assert_allclose(entered(folded, after), entered(params, latents), rtol=1e-3, atol=1e-3)


def test_training(tmp_path, monkeypatch):
    """A stopped run goes on exactly as if it had not stopped; its results are read by us and by diffusers."""
    images = pictures.load(world.world()[:3])
    flat = images.reshape(-1, *images.shape[2:])
    data = training.Data(flat, np.full(len(flat), 1 / len(flat)), images, images)
    monkeypatch.setattr(training, "load_data", lambda: data)
    monkeypatch.setattr(training, "CONFIG", TINY)
    monkeypatch.setattr(training, "optimiser", functools.cache(training.optimiser))  # the update compiles once

    def train(name: str, every: int):
        training.train(tmp_path / name, steps=4, batch=2, learning_rate=1e-3, seed=0, every=every)
        return engine.flatten(folder.load(tmp_path / name / "ours", "autoencoder")[2])

    whole = train("whole", 4)
    (tmp_path / "stopped").mkdir()
    real, calls = training.update, []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training, "update", stopping)
        with pytest.raises(KeyboardInterrupt):
            train("stopped", 2)
    resumed = train("stopped", 2)
    start = engine.flatten(training.fresh_params(TINY, 0)[1])
    for name, leaf in whole.items():
        np.testing.assert_array_equal(resumed[name], leaf, name)
    assert any(not np.array_equal(start[name].astype(jax.numpy.bfloat16), leaf) for name, leaf in whole.items())

    figures = json.loads((tmp_path / "whole" / "quality.json").read_text())
    model = diffusers.AutoencoderKL.from_pretrained(tmp_path / "whole" / "vae").eval()
    truth = pictures.to_float(flat)
    with torch.no_grad():
        mean = model.encode(torch.from_numpy(truth.transpose(0, 3, 1, 2).copy())).latent_dist.mean
        theirs = model.decode(mean).sample.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(pictures.psnr(theirs, truth).mean(), figures["world"]["all"], atol=1e-3)
    scaled = (mean.numpy() - TINY.shift_factor) * TINY.scaling_factor
    np.testing.assert_allclose(scaled.mean((0, 2, 3)), figures["latent_mean"], atol=1e-4)
    assert (tmp_path / "whole" / "world.png").is_file()
