"""The training of the small world's autoencoder at a toy size."""

import functools
import json

import diffusers
import jax
import numpy as np
import pytest
import torch

from srpo_jax.emoji import pictures, train_autoencoder, world
from srpo_jax.models.autoencoder import AutoencoderConfig
from srpo_jax.weights import engine, folder

TINY = AutoencoderConfig(block_out_channels=(4, 4, 8), layers_per_block=1, norm_num_groups=2, latent_channels=5)


def test_data():
    """No held-out concept is trained on; the world is; its pictures are drawn more often by the stated factor."""
    data = train_autoencoder.load_pictures()
    inside = set(world.world())
    held_out = [c for c in world.concepts() if c.split == "holdout" and c not in inside]
    assert data.held_out.shape[:2] == (3, len(held_out)) and len(held_out) > 50
    assert len(data.train) == 3 * (len(world.concepts()) - len(held_out))
    assert data.world.shape[:2] == (3, len(inside))
    np.testing.assert_array_equal(data.world, pictures.load(world.world()))
    levels, counts = np.unique(data.probabilities, return_counts=True)
    assert counts[1] == 3 * len(inside)
    np.testing.assert_allclose([levels[1] / levels[0], data.probabilities.sum()], [train_autoencoder.WORLD_WEIGHT, 1.0])
    first, second = (train_autoencoder.choose_pictures(data, 3, step, 4) for step in (0, 1))
    assert first.shape == (4, 64, 64, 3) and first.min() >= -1 and first.max() == 1
    assert not np.array_equal(first, second)


def test_whitened():
    """Folding gives latents of mean 0 and deviation 1, and the same pictures where the decoder sees no border."""
    graphdef, params = train_autoencoder.fresh_params(TINY, 0)
    rng = np.random.default_rng(0)
    # Off their initial zeros, so that the decoder listens to its latents beyond its first convolution.
    params = jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), params)
    images = pictures.load(world.world()[:4], ("3D",))
    latents = train_autoencoder.to_latents(graphdef, params, images)
    assert np.abs(latents.std((0, 1, 2, 3)) - 1).max() > 0.1 < np.abs(latents.mean((0, 1, 2, 3))).max()
    folded = train_autoencoder.whitened(params, latents, TINY)
    after = train_autoencoder.to_latents(graphdef, folded, images)
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


def test_a_whole_run(tmp_path, monkeypatch, capsys):
    """A stopped run goes on exactly as if it had not stopped; its results are read by us and by diffusers."""
    images = pictures.load(world.world()[:3])
    flat = images.reshape(-1, *images.shape[2:])
    data = train_autoencoder.PictureData(flat, np.full(len(flat), 1 / len(flat)), images, images)
    monkeypatch.setattr(train_autoencoder, "load_pictures", lambda: data)
    monkeypatch.setattr(train_autoencoder, "CONFIG", TINY)
    # The update compiles once.
    monkeypatch.setattr(
        train_autoencoder, "make_transformation", functools.cache(train_autoencoder.make_transformation)
    )

    def train(name: str, every: int):
        train_autoencoder.main([f"--workdir={tmp_path / name}", "--steps=4", "--batch=2", f"--every={every}"])
        return engine.flatten(folder.load(tmp_path / name / "ours", "autoencoder")[2])

    whole = train("whole", 4)
    real = train_autoencoder.choose_pictures

    def stopping(data, seed, step, batch):
        if step == 3:
            raise KeyboardInterrupt
        return real(data, seed, step, batch)

    with monkeypatch.context() as patch:
        patch.setattr(train_autoencoder, "choose_pictures", stopping)
        with pytest.raises(KeyboardInterrupt):
            train("stopped", 2)
    resumed = train("stopped", 2)
    assert "autoencoder: resumed at step 2\n" in capsys.readouterr().out
    start = engine.flatten(train_autoencoder.fresh_params(TINY, 0)[1])
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
