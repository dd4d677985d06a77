"""Preprocessing against torch's antialiased bicubic, and the arithmetic of the semantic relative preference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from srpo_jax.algorithm import rewards


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


def test_control_words_go_round_from_step_one():
    words = [rewards.control_words(n, ("a", "b"), ("x", "y", "z")) for n in (1, 2, 3, 4)]
    assert words == [("b", "y"), ("a", "z"), ("b", "x"), ("a", "y")]
    assert rewards.prefixed("Oil", "a red fox") == "Oil. a red fox"


def test_relative_target_forms():
    plus, minus = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])
    k = jnp.array([0.25])
    np.testing.assert_allclose(rewards.relative_target(plus, minus, k, "released"), [[1.25, -1.0]])
    np.testing.assert_allclose(rewards.relative_target(plus, minus, k, "paper"), [[0.25, 0.75]])
    with pytest.raises(ValueError, match="form"):
        rewards.relative_target(plus, minus, k, "other")


def test_hinge_stops_at_the_margin():
    rewards_in = jnp.array([0.0, 0.69, 0.71])
    np.testing.assert_allclose(rewards.hinge(rewards_in, 0.7), [0.7, 0.01, 0.0], atol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(lambda r: rewards.hinge(r, 0.7)))(rewards_in), [-1, -1, 0])


def test_mixture_weights_and_scales():
    image = {"hps": jnp.array([[1.0, 0.0]]), "clip": jnp.array([[0.0, 1.0]])}
    target = {"hps": jnp.array([[0.5, 0.0]]), "clip": jnp.array([[0.0, 0.1]])}
    models = {"hps": rewards.Reward(None, 224, "hps", 1.0), "clip": rewards.Reward(None, 224, "clip", 2.0)}
    params = {"hps": {"logit_scale": jnp.log(100.0)}, "clip": {"logit_scale": jnp.log(100.0)}}
    # hps: 0.5 as it is; clip: 2 * 0.1 * 100 / 20
    np.testing.assert_allclose(rewards.mixture(models, params, image, target), [1.5], rtol=1e-6)
