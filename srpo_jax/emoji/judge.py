"""The judge: a CLIP of another seed and size than the reward, never used in training, that says what a picture shows.

It scores a picture against the prompt "STYLE. caption" of every style and every concept of the world, and reads off the
probabilities of the style (summed over concepts) and of the concept (summed over styles).
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from srpo_jax import text, tokens
from srpo_jax.emoji import world
from srpo_jax.models.compute import Params
from srpo_jax.rewards.clip import ClipReward
from srpo_jax.weights import folder


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What the judge thinks of N pictures.

    Attributes:
      styles: probabilities ``[N, 3]`` in the order of ``world.STYLES``.
      concepts: probabilities ``[N, K]`` in the order of ``world.world()``.
    """

    styles: np.ndarray
    concepts: np.ndarray

    def in_style(self) -> dict[str, np.ndarray]:
        """Whether each picture is most of all in a style, bool ``[N]`` by style."""
        chosen = self.styles.argmax(-1)
        return {style: chosen == index for index, style in enumerate(world.STYLES)}

    def right(self, captions: Sequence[str]) -> np.ndarray:
        """Whether each picture's most probable concept, among all of the world, is the one of ``captions``, bool [N].

        Raises ValueError if there is not one caption a picture, or one that is no concept of the world.
        """
        if len(captions) != len(self.concepts):
            raise ValueError(f"{len(captions)} captions for {len(self.concepts)} pictures")
        known = [concept.caption for concept in world.world()]
        return self.concepts.argmax(-1) == [known.index(caption) for caption in captions]

    def note(self, index: int) -> str:
        """One picture's judgement as text: "judged 3D 92 %, red apple 88 %"."""
        style, concept = int(self.styles[index].argmax()), int(self.concepts[index].argmax())
        return (
            f"judged {world.STYLES[style]} {self.styles[index, style]:.0%}, "
            f"{world.world()[concept].caption} {self.concepts[index, concept]:.0%}"
        )


class Judge:
    """A judge from a converted CLIP folder (``python -m srpo_jax.convert import``) with its ``tokenizer``.

    Raises UserError if the folder is not one.
    """

    def __init__(self, path: str | os.PathLike):
        config, graphdef, self._params = folder.load(path, "clip")
        self._clip = ClipReward(config, graphdef)
        where = pathlib.Path(path) / "tokenizer"
        tokenizer = text.load_tokenizer(where)
        tokens.check(tokenizer, config.text_config, where)
        prompts = [world.prompt(concept, style) for style in world.STYLES for concept in world.world()]
        ids = text.tokenize(tokenizer, prompts, config.text_config.max_position_embeddings)
        self._prompts = jax.jit(self._clip.prepare)(self._params, ids)
        self._probabilities = jax.jit(self._probabilities)

    def __call__(self, images: np.ndarray, batch: int = 64) -> Judgement:
        """Judges pictures ``[N, H, W, 3]``, uint8 or floats in [0, 1], at most ``batch`` at a time."""
        images = np.asarray(images)
        batch = min(batch, len(images))
        if images.dtype == np.uint8:
            images = images.astype(np.float32) / 255
        parts = []
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            # One compiled size: the last part is filled up, and what fills it is thrown away.
            filled = np.concatenate([part, np.zeros((batch - len(part), *part.shape[1:]), part.dtype)])
            parts.append(np.asarray(self._probabilities(self._params, self._prompts, filled))[: len(part)])
        joint = np.concatenate(parts)
        return Judgement(styles=joint.sum(2), concepts=joint.sum(1))

    def _probabilities(self, params: Params, prompts: jax.Array, images: jax.Array) -> jax.Array:
        """Joint probabilities ``[N, styles, concepts]``: CLIP's softmax over all prompts."""
        features = self._clip.look(params, images)
        scale = jnp.exp(params["logit_scale"].astype(jnp.float32))
        joint = jax.nn.softmax(scale * features @ prompts.T, axis=-1)
        return joint.reshape(len(images), len(world.STYLES), len(world.world()))
