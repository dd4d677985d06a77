"""Differentiable rewards of CLIP's kind, and SRPO's semantic relative preference over them.

A reward is an inner product of unit-norm image and text features. HPS-v2.1, PickScore and CLIP differ in weights and
in a scale only. Images enter in [0, 1], NHWC, at any size.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from srpo_jax.models.compute import Params, bind

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# What multiplies the inner product: nothing (HPS-v2.1), or the trained temperature brought to a comparable range.
KINDS = ("hps", "pickscore", "clip")
TEMPERATURE_DIVISOR = 20.0


@dataclasses.dataclass(frozen=True)
class Reward:
    """One reward model, apart from its parameters.

    Attributes:
      graphdef: of a ``models.clip.Clip``.
      image_size: side of the square that its vision tower reads, pixels.
      kind: one of ``KINDS``.
      weight: its share in a mixture.
    """

    graphdef: nnx.GraphDef
    image_size: int
    kind: str
    weight: float = 1.0

    def embed_images(self, params: Params, images: jax.Array) -> jax.Array:
        """Unit-norm features ``[B, E]``, float32, of images ``[B, H, W, 3]`` in [0, 1]."""
        return unit(bind(self.graphdef, params).encode_image(preprocess(images, self.image_size)))

    def embed_text(self, params: Params, ids: jax.Array) -> jax.Array:
        """Unit-norm features ``[B, E]``, float32, of token ids ``[B, T]``."""
        return unit(bind(self.graphdef, params).encode_text(ids))

    def score(self, params: Params, image: jax.Array, target: jax.Array) -> jax.Array:
        """The reward ``[B]``: inner product of features with a target ``[B, E]``, on the model's scale."""
        product = jnp.sum(image * target, axis=-1)
        if self.kind == "hps":
            return product
        return product * jnp.exp(params["logit_scale"].astype(jnp.float32)) / TEMPERATURE_DIVISOR


def unit(features: jax.Array) -> jax.Array:
    """Divides by the Euclidean norm over the last axis, in float32."""
    features = features.astype(jnp.float32)
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


def preprocess(images: jax.Array, size: int) -> jax.Array:
    """CLIP's preprocessing: short side to ``size`` (bicubic, antialiased), centre crop, normalise.

    Matches torchvision's ``Resize(size, BICUBIC, antialias=True)``, ``CenterCrop(size)`` and ``Normalize``, and
    carries gradients.

    Args:
      images: ``[B, H, W, 3]`` in [0, 1].
      size: side of the result, pixels.

    Returns:
      ``[B, size, size, 3]``, float32.
    """
    batch, height, width, channels = images.shape
    short = min(height, width)
    resized_height, resized_width = size * height // short, size * width // short
    x = images.astype(jnp.float32)
    if (resized_height, resized_width) != (height, width):
        x = jax.image.resize(
            x,
            (batch, resized_height, resized_width, channels),
            method="cubic",
            antialias=True,
            precision=jax.lax.Precision.HIGHEST,
        )
    # torchvision rounds the crop's corner half to even, as Python does.
    top, left = round((resized_height - size) / 2), round((resized_width - size) / 2)
    x = x[:, top : top + size, left : left + size]
    return (x - jnp.asarray(MEAN)) / jnp.asarray(STD)


# --- semantic relative preference -----------------------------------------------------------------------------------


def control_words(step: int, positive: tuple[str, ...], negative: tuple[str, ...]) -> tuple[str, str]:
    """The pair of control words of a step; steps count from 1 and go round both lists."""
    return positive[step % len(positive)], negative[step % len(negative)]


def prefixed(word: str, caption: str) -> str:
    """A caption under a control word: ``"<word>. <caption>"``."""
    return f"{word}. {caption}"


def relative_target(plus: jax.Array, minus: jax.Array, discount: jax.Array, form: str) -> jax.Array:
    """The text direction that an image is scored against in SRPO.

    Args:
      plus, minus: unit-norm text features ``[B, E]`` of the wanted and the unwanted caption.
      discount: k, ``[B]``.
      form: "released", ``(1 + k) * plus - minus``, or "paper", ``(1 - k) * minus + k * plus`` (arXiv 2509.06942, eq.
      of the
        semantic relative preference).
    """
    k = discount[:, None]
    if form == "released":
        return (1 + k) * plus - minus
    if form == "paper":
        return (1 - k) * minus + k * plus
    raise ValueError(f"reward.form={form!r} is unknown; choose released or paper")


def hinge(reward: jax.Array, threshold: float) -> jax.Array:
    """``relu(threshold - reward)``: no gradient once the reward is high enough."""
    return jax.nn.relu(threshold - reward)


# --- mixtures -------------------------------------------------------------------------------------------------------


def embed_images(rewards: dict[str, Reward], params: dict[str, Params], images: jax.Array) -> dict[str, jax.Array]:
    """Image features of every model of a mixture."""
    return {name: reward.embed_images(params[name], images) for name, reward in rewards.items()}


def mixture(
    rewards: dict[str, Reward], params: dict[str, Params], images: dict[str, jax.Array], targets: dict[str, jax.Array]
) -> jax.Array:
    """The weighted sum ``[B]`` of the models' rewards, from image features and text targets by model name."""
    scores: Any = 0.0
    for name, reward in rewards.items():
        scores = scores + reward.weight * reward.score(params[name], images[name], targets[name])
    return scores
