"""What a CLIP of the small world can do: figures over the data set's pictures and captions."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from srpo_jax.emoji import pictures, world
from srpo_jax.emoji.colour import chroma, saturate
from srpo_jax.emoji.degrade import degrade
from srpo_jax.models.compute import Params, bind
from srpo_jax.rewards import clip as clip_rewards

STYLES = len(world.STYLES)


class Evaluation:
    """Embeds pictures and texts of the data set with a trained network, and prints figures.

    Attributes:
      image: unit-norm features [concepts, S, E] of all pictures.
      texts: unit-norm features [concepts, S + 1, E] of styled and bare captions.
    """

    def __init__(self, graphdef: nnx.GraphDef, params: Params, images: np.ndarray, ids: np.ndarray):
        self._params, self._graphdef, self.images = params, graphdef, images
        self._embed = jax.jit(self._features)
        self.image = self.embed(images)
        embed_text = jax.jit(lambda p, x: clip_rewards.unit(bind(graphdef, p).encode_text(x)))
        parts = [np.asarray(embed_text(params, part)) for part in np.array_split(ids.reshape(-1, ids.shape[-1]), 8)]
        self.texts = np.concatenate(parts).reshape(*ids.shape[:2], -1)[:-1]

    def _features(self, params: Params, images: jax.Array) -> jax.Array:
        pixels = clip_rewards.preprocess(images, pictures.SIZE)
        return clip_rewards.unit(bind(self._graphdef, params).encode_image(pixels))

    def embed(self, images: np.ndarray, key: jax.Array | None = None) -> np.ndarray:
        """Features [..., E] of uint8 pictures [..., 64, 64, 3], degraded if a key is given."""
        flat, out = images.reshape(-1, pictures.SIZE, pictures.SIZE, 3), []
        for start in range(0, len(flat), 128):
            part = flat[start : start + 128].astype(np.float32) / 255
            if key is not None:
                part = jax.jit(degrade)(part, jax.random.fold_in(key, start))
            out.append(np.asarray(self._embed(self._params, part)))
        return np.concatenate(out).reshape(*images.shape[:-3], -1)

    def style(self, rows: np.ndarray, styles: tuple[int, ...]) -> float:
        """How often, among the concept's own captions, that of the right style is nearest to the picture."""
        scores = np.einsum("cse,cte->cst", self.image[rows][:, styles], self.texts[rows][:, styles])
        return float(np.mean(scores.argmax(-1) == np.arange(len(styles))))

    def retrieval(self, rows: np.ndarray) -> float:
        """How often, among the bare captions of all concepts, the right one is nearest to the picture."""
        scores = self.image[rows] @ self.texts[:, STYLES].T
        return float(np.mean(scores.argmax(-1) == rows[:, None]))

    def joint(self, image: np.ndarray, rows: np.ndarray) -> tuple[float, float]:
        """(style, concept) accuracy of features [C, S, E] among the styled captions of ``rows``, as the judge reads."""
        scale = np.exp(float(self._params["logit_scale"]))
        logits = scale * np.einsum("cse,dte->csdt", image, self.texts[rows][:, :STYLES])
        joint = np.exp(logits - logits.max(axis=(2, 3), keepdims=True))
        styles, names = joint.sum(2).argmax(-1), joint.sum(3).argmax(-1)
        return float(np.mean(styles == np.arange(STYLES))), float(np.mean(names == np.arange(len(rows))[:, None]))

    def slope(self, rows: np.ndarray) -> tuple[float, float]:
        """Whether the reward's gradient at "Flat" pictures points to the "3D" ones.

        Returns the share of pictures where the directional derivative of f . (g("3D. x") - g("Flat. x")) along the
        difference of the two pictures is positive, and the mean cosine between gradient and difference.
        """
        three, flat = (world.STYLES.index(name) for name in ("3D", "Flat"))
        images = self.images[rows].astype(np.float32) / 255
        target = self.texts[rows][:, three] - self.texts[rows][:, flat]

        def preference(images: jax.Array) -> jax.Array:
            return jnp.sum(target * self._features(self._params, images))

        gradient = np.asarray(jax.jit(jax.grad(preference))(images[:, flat])).reshape(len(rows), -1)
        difference = (images[:, three] - images[:, flat]).reshape(len(rows), -1)
        dot = np.sum(gradient * difference, axis=1)
        lengths = np.linalg.norm(gradient, axis=1) * np.linalg.norm(difference, axis=1)
        return float(np.mean(dot > 0)), float(np.mean(dot / lengths))

    def taste(self, rows: np.ndarray, amount: float = 2.0) -> tuple[float, float, float, float]:
        """What similarities gain where the coloured pictures of ``rows`` are made so much more colourful.

        Every picture is held to the styled and the bare captions of all of ``rows``. Returns the share of (picture,
        caption) pairs that gain; the mean gain; by how much it varies between captions (standard deviation, mean over
        pictures); and the mean gain for each 1 of chroma.
        """
        coloured = self.images[rows][:, [world.STYLES.index(name) for name in ("3D", "Flat")]].astype(np.float32) / 255
        vivid = np.asarray(saturate(coloured, amount))
        texts = self.texts[rows].reshape(-1, self.texts.shape[-1])
        before, after = (self.embed(np.rint(255 * images).astype(np.uint8)) for images in (coloured, vivid))
        gains = (after - before).reshape(-1, texts.shape[-1]) @ texts.T
        grown = float(np.mean(chroma(vivid) - chroma(coloured)))
        mean = float(np.mean(gains))
        return float(np.mean(gains > 0)), mean, float(np.mean(gains.std(1))), mean / grown

    def report(self, role: str) -> None:
        """Prints what the network can do."""
        split = np.array([concept.split for concept in world.concepts()])
        chosen = {concept.id for concept in world.world()}
        inside = np.array([concept.id in chosen for concept in world.concepts()])
        train, holdout = np.flatnonzero(split == "train"), np.flatnonzero(split == "holdout")
        own, ours = np.flatnonzero(inside), np.flatnonzero(inside & (split == "holdout"))
        known = np.flatnonzero(inside & (split == "train"))
        all_styles = tuple(range(STYLES))
        for name, rows in (("train", train), ("holdout", holdout), ("world holdout", ours)):
            print(f"style accuracy, {name}: {self.style(rows, all_styles):.3f} of three, ", end="")
            print(f"{self.style(rows, (0, 1)):.3f} between {world.STYLES[0]} and {world.STYLES[1]}")
        for name, rows in (("train", train), ("world train", known), ("world", own)):
            print(f"retrieval among all {len(split)} captions, {name}: {self.retrieval(rows):.3f}")
        rows = own if role == "judge" else known
        degraded = self.embed(self.images[rows], jax.random.key(9))
        for name, image in (("clean", self.image[rows]), ("degraded", degraded)):
            style, concept = self.joint(image, rows)
            print(f"among the {len(rows)} known concepts of the world, {name}: ", end="")
            print(f"style {style:.3f}, concept {concept:.3f}")
        for name, rows in (("train", known), ("holdout", ours)):
            share, cosine = self.slope(rows)
            print(f"gradient from Flat to 3D, world {name}: uphill {share:.3f}, cosine {cosine:.3f}")
        for name, rows in (("train", known), ("holdout", ours)):
            share, gain, spread, slope = self.taste(rows)
            print(f"twice as colourful, world {name}: {share:.3f} of (picture, caption) pairs gain; ", end="")
            print(f"{gain:+.3f} of similarity, {spread:.3f} between captions, {slope:+.2f} for 1 of chroma")
        plus = np.sum(self.image[known, 0] * self.texts[known, 0], axis=-1)
        minus = np.sum(self.image[known, 0] * self.texts[known, 1], axis=-1)
        print(f"similarity of 3D pictures to their 3D caption {plus.mean():.3f}, to the Flat one {minus.mean():.3f}")
        print(f"logit scale {np.exp(float(self._params['logit_scale'])):.1f}")
