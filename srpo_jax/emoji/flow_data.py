"""What ``train_flow`` learns from: the world's pictures as latents, their captions, and batches of both with noise."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp

from srpo_jax import text
from srpo_jax.algorithm import flow
from srpo_jax.emoji import pictures, tokenizers, world
from srpo_jax.emoji.flow_networks import LENGTH
from srpo_jax.families.flux import FLUX
from srpo_jax.models.compute import bind
from srpo_jax.weights import folder

EMPTY, BARE = 0.1, 0.45  # shares of the captions that are empty, and that leave the style open
LEVEL_MEAN, LEVEL_DEVIATION = 0.4, 1.0  # noise levels are sigmoid(normal): a little more of the noisy ones


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FlowData:
    """What is learnt from, on the device.

    Attributes:
      tokens: [S * K, 16, 64], packed scaled latents of the world's K concepts in S styles, style by style.
      t5_ids, clip_ids: [(S + 1) * K + 1, 16], token ids of captions: styled as ``tokens``, then bare, then empty.
    """

    tokens: jax.Array
    t5_ids: jax.Array
    clip_ids: jax.Array

    @property
    def pictures(self) -> int:
        """How many pictures there are, S * K."""
        return len(self.tokens)

    @property
    def empty(self) -> int:
        """The row of the empty caption."""
        return len(self.t5_ids) - 1


def captions() -> list[str]:
    """All captions in the order of ``FlowData``."""
    concepts = world.world()
    return [world.prompt(concept, style) for style in (*world.STYLES, None) for concept in concepts] + [""]


def load_world(vae: pathlib.Path, tokenizer_folder: pathlib.Path) -> FlowData:
    """Encodes the world's pictures and captions; trains the tokenizers into their folder if they are not there."""
    texts = captions()
    for name, train in (("tokenizer", tokenizers.train_clip_tokenizer), ("tokenizer_2", tokenizers.train_t5_tokenizer)):
        if not (tokenizer_folder / name).is_dir():
            train(texts, tokenizer_folder / name, LENGTH)
    clip, t5 = (text.load_tokenizer(tokenizer_folder / name) for name in ("tokenizer", "tokenizer_2"))
    _, graphdef, params = folder.load(vae, "autoencoder")

    @jax.jit
    def encode(images: jax.Array) -> jax.Array:
        model = bind(graphdef, params)
        return FLUX.pack(FLUX.encode(model, images))

    images = pictures.to_float(pictures.load(world.world()))
    return FlowData(
        tokens=jnp.concatenate([encode(style) for style in images]),
        t5_ids=jnp.asarray(text.tokenize(t5, texts, LENGTH)),
        clip_ids=jnp.asarray(text.tokenize(clip, texts, LENGTH)),
    )


def draw_batch(data: FlowData, key: jax.Array, batch: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """A batch: rows of captions [B], noise levels [B], noisy latents [B, 16, 64] and the velocities to learn."""
    keys = jax.random.split(key, 4)
    picture = jax.random.randint(keys[0], (batch,), 0, data.pictures)
    concepts = len(world.world())
    kind = jax.random.uniform(keys[1], (batch,))
    caption = jnp.where(kind < EMPTY + BARE, data.pictures + picture % concepts, picture)
    caption = jnp.where(kind < EMPTY, data.empty, caption)
    sigma = jax.nn.sigmoid(LEVEL_MEAN + LEVEL_DEVIATION * jax.random.normal(keys[2], (batch,)))
    clean = data.tokens[picture]
    noise = jax.random.normal(keys[3], clean.shape)
    return caption, sigma, flow.add_noise(clean, noise, sigma), noise - clean
