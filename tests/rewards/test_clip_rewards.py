"""Rewards of CLIP's kind: preprocessing against torch's antialiased bicubic, and scales."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from srpo_jax.rewards import clip as rewards
from srpo_jax.rewards.clip import ClipReward, HpsReward


def torch_preprocess(images, size):
    """torchvision's Resize, CenterCrop and Normalize, from the torch call beneath them."""
    height, width = images.shape[2:]
    short = min(height, width)
    target = (size * height // short, size * width // short)
    x = torch.nn.functional.interpolate(images, size=target, mode="bicubic", antialias=True, align_corners=False)
    top, left = round((target[0] - size) / 2), round((target[1] - size) / 2)
    x = x[:, :, top : top + size, left : left + size]
    mean, std = (torch.tensor(v)[:, None, None] for v in (rewards.MEAN, rewards.STD))
    return (x - mean) / std


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(64, 64, 224), (64, 128, 224), (224, 224, 224), (301, 500, 224), (720, 720, 224), (96, 64, 64), (65, 97, 24)],
)
def test_preprocess_and_its_gradient_match_torch(height, width, size):
    rng = np.random.default_rng(0)
    images = rng.random((2, height, width, 3), dtype=np.float32)
    cotangent = rng.normal(size=(2, size, size, 3)).astype(np.float32)
    ours, vjp = jax.vjp(lambda x: rewards.preprocess(x, size), images)
    leaf = torch.tensor(images.transpose(0, 3, 1, 2), requires_grad=True)
    theirs = torch_preprocess(leaf, size)
    theirs.backward(torch.tensor(cotangent.transpose(0, 3, 1, 2)))
    theirs, gradient = (x.detach().numpy().transpose(0, 2, 3, 1) for x in (theirs, leaf.grad))
    for a, b in ((ours, theirs), (vjp(cotangent)[0], gradient)):
        assert np.linalg.norm(a - b) < 5e-6 * np.linalg.norm(b)


def test_scales():
    """HPS-v2.1 is the inner product, the others on the scale of their temperature."""
    seen, prepared, params = jnp.array([[1.0, 0.0]]), jnp.array([[0.5, 1.0]]), {"logit_scale": jnp.log(100.0)}
    np.testing.assert_allclose(HpsReward(None, None).score(params, seen, prepared), [0.5])
    np.testing.assert_allclose(ClipReward(None, None).score(params, seen, prepared), [0.5 * 100 / 20], rtol=1e-6)
