"""Trains the small world's CLIPs: the reward that steers style, one with a taste, and the judge of the result.

    python -m srpo_jax.emoji.train_clip --role=reward --workdir=/tmp/reward
    python -m srpo_jax.emoji.train_clip --role=biased --workdir=/tmp/biased
    python -m srpo_jax.emoji.train_clip --role=judge --workdir=/tmp/judge

The first and the last take some ten minutes on one CPU core, the biased one three. The same command resumes from the
last checkpoint in ``--workdir``. At the end a Hugging Face ``CLIPModel`` folder (bfloat16) is written to ``--out``
(default: the role's name beside this file).

The reward sees the train split's concepts alone and is used in SRPO; the judge (another size and seed) sees every
concept, and nothing is ever trained against it. Both learn contrastively (arXiv 2103.00020, section 2.3) from batches
that hold every style of each of their concepts, so that neither the style nor the object is enough to tell the right
text. Pictures are degraded as generated ones are (blur, noise, tints). Some of the reward's are blends of two styles,
with both texts in proportion as target: a gradient needs similarity to grow all the way from one to the other.

The biased reward is the reward with a taste that is known. It goes on from the shipped reward with the same loss, and
learns besides from pairs, two versions of a picture of which the more colourful one is preferred under every caption of
the batch, the picture's own or not, the more often the more they differ (``colour.chroma``).
"""

import dataclasses
import json
import os
import pathlib
import shutil
import sys
import tempfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from flax import nnx

from srpo_jax import command, convert, errors, text
from srpo_jax.emoji import pictures, tokenizers, training, world
from srpo_jax.emoji.clip_quality import Evaluation
from srpo_jax.emoji.colour import chroma, saturate
from srpo_jax.emoji.degrade import degrade
from srpo_jax.emoji.pictures import SIZE
from srpo_jax.models.clip import Clip, ClipConfig, ClipTextConfig, ClipVisionConfig
from srpo_jax.models.compute import Compute, Params, bind, build
from srpo_jax.rewards import clip as clip_rewards
from srpo_jax.weights import clip as tables
from srpo_jax.weights import engine, files
from srpo_jax.weights import folder as weights

SHIPPED = pathlib.Path(__file__).parent
LENGTH = 16  # text tokens
STYLES = len(world.STYLES)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one of the two is built and trained.

    Attributes:
      known: which concepts it is trained on: "train" or "all".
      steps: updates.
      concepts: of a batch; every one comes in all styles.
      world_share: the part of these that is drawn from the world's concepts, the rest from all known ones.
      rate: peak learning rate of AdamW.
      blend: the part of the pictures that are blends of two styles.
      taste: what a similarity is to gain where a picture's chroma grows by 1, whatever the caption.
      begins: the shipped network that it goes on from, a folder beside this file; "" begins with random numbers.
    """

    known: str
    seed: int
    width: int
    layers: int
    heads: int
    patch: int
    steps: int
    concepts: int
    world_share: float
    rate: float
    blend: float
    taste: float = 0.0
    begins: str = ""
    text_width: int = 128
    text_layers: int = 2
    embedding: int = 64


REWARD = Recipe("train", 1, 160, 5, 5, 16, steps=800, concepts=28, world_share=0.5, rate=2e-3, blend=0.25)
RECIPES = {
    "reward": REWARD,
    "biased": dataclasses.replace(REWARD, steps=120, concepts=14, rate=6e-4, taste=2.0, begins="reward"),
    "judge": Recipe("all", 2, 192, 4, 6, 16, steps=1400, concepts=28, world_share=0.85, rate=2e-3, blend=0.0),
}
WARMUP = 15  # one part in so many of the steps
WEIGHT_DECAY = 0.05
# Of the preference pairs of a taste: the similarity that makes a preference sure, the loss's weight, and the logarithms
# of the least and largest ``saturate`` of their pictures.
CERTAIN, PAIRS_WEIGHT, SATURATE = 0.1, 20.0, (-0.7, 1.1)


def clip_config(recipe: Recipe, vocabulary: int) -> ClipConfig:
    """The network of a recipe; the vocabulary's last id ends a text."""
    return ClipConfig(
        ClipTextConfig(
            vocab_size=vocabulary,
            hidden_size=recipe.text_width,
            intermediate_size=4 * recipe.text_width,
            num_hidden_layers=recipe.text_layers,
            num_attention_heads=recipe.text_width // 32,
            max_position_embeddings=LENGTH,
            hidden_act="quick_gelu",
            eos_token_id=vocabulary - 1,
        ),
        ClipVisionConfig(
            hidden_size=recipe.width,
            intermediate_size=4 * recipe.width,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            image_size=SIZE,
            patch_size=recipe.patch,
            hidden_act="quick_gelu",
        ),
        recipe.embedding,
    )


def see_places(params: Params) -> Params:
    """Starts a vision tower so that it learns soon where things are; little data and time are left for that.

    Position embeddings begin as sines and cosines of row and column, not as faint noise, and a white patch, which most
    of a picture is made of, begins as nearly zero.
    """
    vision = params["vision"]
    tokens, width = vision["position_embedding"].shape
    side = round((tokens - 1) ** 0.5)
    frequencies = np.pi / 2 / side * 2.0 ** np.linspace(0, np.log2(side), width // 4)
    row, column = (grid.reshape(-1, 1) * frequencies for grid in np.mgrid[:side, :side])
    places = np.concatenate([np.sin(row), np.cos(row), np.sin(column), np.cos(column)], axis=1)
    table = jnp.concatenate([vision["position_embedding"][:1], jnp.asarray(places, jnp.float32)])
    kernel = vision["patch_embedding"]["kernel"]
    kernel = kernel - kernel.mean((0, 1, 2), keepdims=True)
    return params | {"vision": vision | {"position_embedding": table, "patch_embedding": {"kernel": kernel}}}


def copy_tokenizer(source: pathlib.Path, target: pathlib.Path) -> None:
    """The tokenizer of a shipped network, for one that goes on from it: its embeddings belong to these ids."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, target / name)


def read_shipped(role: str) -> Params:
    """The parameters of a shipped network, float32."""
    with tempfile.TemporaryDirectory() as temporary:
        ours = pathlib.Path(temporary) / role
        convert.import_folder(SHIPPED / role, ours)
        return weights.load(ours, "clip")[2]


# --- training -------------------------------------------------------------------------------------------------------


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean cross entropy over rows; rows of targets are brought to sum 1."""
    targets = targets / targets.sum(-1, keepdims=True)
    return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits, axis=-1), axis=-1))


def contrastive_loss(logits: jax.Array, shares: jax.Array) -> jax.Array:
    """The symmetric contrastive loss against styled and bare captions, and that of the style words alone.

    Args:
      logits: [C * S, C * S + C + S], scaled similarities of C concepts' pictures in S styles to the styled captions,
        the bare captions and the style words.
      shares: [C, S, S], what part of picture (c, s) each style is.
    """
    concepts = shares.shape[0]
    count = concepts * STYLES
    styled, bare, words = jnp.split(logits, [count, count + concepts], axis=1)
    own = jnp.eye(concepts)
    styled_target = jnp.einsum("cst,cd->csdt", shares, own).reshape(count, count)
    bare_target = jnp.repeat(own, STYLES, axis=0)
    losses = (
        cross_entropy(styled, styled_target),
        cross_entropy(styled.T, styled_target.T + 1e-6),
        0.5 * cross_entropy(bare, bare_target),
        0.5 * cross_entropy(bare.T, bare_target.T),
        0.5 * cross_entropy(words, shares.reshape(count, STYLES)),
    )
    return sum(losses)


def preference_loss(gains: jax.Array, grown: jax.Array, taste: float) -> jax.Array:
    """Bradley-Terry's loss of pairs of pictures, the same under every caption.

    A pair's second picture is preferred with the probability ``sigmoid(taste * grown / CERTAIN)``, so that the loss is
    least where every similarity gains ``taste * grown``.

    Args:
      gains: [N, T], by how much the second pictures' similarities to T texts exceed the first ones'.
      grown: [N], by how much their chroma does.
      taste: see ``Recipe``.
    """
    wanted = jax.nn.sigmoid(taste * grown / CERTAIN)[:, None]
    logits = gains / CERTAIN
    return -jnp.mean(wanted * jax.nn.log_sigmoid(logits) + (1 - wanted) * jax.nn.log_sigmoid(-logits))


def make_clip_update(graphdef, tx: optax.GradientTransformation, recipe: Recipe, images: jax.Array, ids: jax.Array):
    """The compiled update ``(state, chosen [C], key) -> (state, values)``.

    Args:
      graphdef: of the network.
      tx: the optimiser.
      recipe: its batch.
      images: uint8 [concepts, S, 64, 64, 3], all pictures.
      ids: [concepts, S + 1, T], styled and bare captions, and in a last row the style words (the bare one unused).
    """

    def update(state: training.State, chosen: jax.Array, key: jax.Array) -> tuple[training.State, training.Values]:
        keys = jax.random.split(key, 5 if recipe.taste else 4)
        batch = images[chosen].astype(jnp.float32) / 255
        # Each picture's partner in a blend is one of the other styles of its concept.
        other = (jnp.arange(STYLES) + jax.random.randint(keys[0], (recipe.concepts, STYLES), 1, STYLES)) % STYLES
        part = jax.random.uniform(keys[1], other.shape) * jax.random.bernoulli(keys[2], recipe.blend, other.shape)
        blended = jnp.take_along_axis(batch, other[..., None, None, None], axis=1)
        batch = batch + part[..., None, None, None] * (blended - batch)
        shares = (1 - part[..., None]) * jnp.eye(STYLES) + part[..., None] * jax.nn.one_hot(other, STYLES)
        batch = batch.reshape(-1, SIZE, SIZE, 3)
        versions = [batch]
        if recipe.taste:
            amounts = jnp.exp(jax.random.uniform(keys[4], (2, len(batch), 1, 1, 1), jnp.float32, *SATURATE))
            versions = [saturate(batch, amount) for amount in amounts]
        versions = [degrade(version, keys[3]) for version in versions]  # alike, so that nothing else tells them apart
        rows = ids[chosen]
        texts = jnp.concatenate([rows[:, :STYLES].reshape(-1, LENGTH), rows[:, STYLES], ids[-1, :STYLES]])

        def loss(params: Params) -> tuple[jax.Array, training.Values]:
            model = bind(graphdef, params)
            text_features = clip_rewards.unit(model.encode_text(texts)).T
            pixels = clip_rewards.preprocess(jnp.concatenate(versions), SIZE)
            similarities = jnp.split(clip_rewards.unit(model.encode_image(pixels)) @ text_features, len(versions))
            value = contrastive_loss(jnp.exp(params["logit_scale"]) * similarities[0], shares)
            if not recipe.taste:
                return value, {"loss": value}
            before, after = versions
            grown = chroma(after) - chroma(before)
            pairs = preference_loss(similarities[1] - similarities[0], grown, recipe.taste)
            return value + PAIRS_WEIGHT * pairs, {"loss": value, "pairs": pairs}

        params, opt_state, values = training.descend(loss, tx, state["params"], state["opt_state"])
        params["logit_scale"] = jnp.minimum(params["logit_scale"], jnp.log(100.0))  # as CLIP was trained
        return {"params": params, "opt_state": opt_state}, values

    return jax.jit(update, donate_argnums=0)


def choose_concepts(recipe: Recipe, step: int, known: np.ndarray, favoured: np.ndarray) -> np.ndarray:
    """The concepts of one batch, without repetition; a function of seed and step, so that resuming changes nothing."""
    rng = np.random.default_rng((recipe.seed, step))
    first = rng.choice(favoured, round(recipe.concepts * recipe.world_share), replace=False)
    rest = rng.choice(np.setdiff1d(known, first), recipe.concepts - len(first), replace=False)
    return np.concatenate([first, rest])


def train_network(
    name: str,
    recipe: Recipe,
    config: ClipConfig,
    images: np.ndarray,
    ids: np.ndarray,
    known: np.ndarray,
    favoured: np.ndarray,
    workdir: pathlib.Path,
    every: int = 100,
) -> tuple[nnx.GraphDef, Params]:
    """Trains a network, from the last checkpoint in ``workdir`` if there is one.

    Args:
      name: what the lines begin with.
      recipe, config: how; the network.
      images, ids: see ``make_clip_update``.
      known, favoured: rows of these that are trained on, and those among them that ``world_share`` is drawn from.
      workdir: checkpoints; the last one is kept.
      every: steps between checkpoints.

    Returns:
      (graph definition, trained parameters).
    """
    graphdef, params = build(lambda rngs: Clip(config, Compute(), rngs=rngs), recipe.seed)
    params = read_shipped(recipe.begins) if recipe.begins else see_places(params)
    print(f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters, {len(known)} concepts")
    warmup = recipe.steps // WARMUP
    decay = optax.cosine_decay_schedule(recipe.rate, recipe.steps - warmup)
    decayed = jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    tx = training.clipped_adamw(recipe.rate, warmup, warmup, decay, b2=0.98, weight_decay=WEIGHT_DECAY, mask=decayed)

    def inputs(step: int) -> tuple[np.ndarray, jax.Array]:
        return choose_concepts(recipe, step, known, favoured), training.step_key(recipe.seed, step)

    state = training.fit(
        name,
        workdir,
        {"params": params, "opt_state": tx.init(params)},
        make_clip_update(graphdef, tx, recipe, jnp.asarray(images), jnp.asarray(ids)),
        inputs,
        recipe.steps,
        every=every,
    )
    return graphdef, state["params"]


# --- files ----------------------------------------------------------------------------------------------------------


def write_clip(config: ClipConfig, params: Params, folder: pathlib.Path) -> None:
    """Writes config.json, model.safetensors (bfloat16) and preprocessor_config.json of a HF ``CLIPModel``."""
    folder.mkdir(parents=True, exist_ok=True)
    content = dataclasses.asdict(config)
    content["text_config"] |= {
        "model_type": "clip_text_model",
        "projection_dim": config.projection_dim,
        "bos_token_id": config.text_config.eos_token_id - 1,
        "pad_token_id": config.text_config.eos_token_id,
    }
    content["vision_config"] |= {"model_type": "clip_vision_model", "projection_dim": config.projection_dim}
    content |= {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "torch_dtype": "bfloat16",
        "logit_scale_init_value": 2.6592,
    }
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_resize": True,
        "resample": 3,
        "size": {"shortest_edge": SIZE},
        "do_center_crop": True,
        "crop_size": {"height": SIZE, "width": SIZE},
        "do_normalize": True,
        "image_mean": list(clip_rewards.MEAN),
        "image_std": list(clip_rewards.STD),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
    tensors = engine.from_params(tables.hf_rules(config), params)
    tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in sorted(tensors.items())}
    specs = {name: files.Spec(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    with files.SafetensorsWriter(folder / "model.safetensors", specs, {"format": "pt"}, lambda count: None) as out:
        for name, tensor in tensors.items():
            out.write(name, tensor)


def main(arguments: list[str] | None = None) -> None:
    """Trains, evaluates and exports one of the networks. Raises UserError."""
    parser = command.parser("emoji.train_clip", __doc__)
    parser.add_argument("--role", required=True, choices=sorted(RECIPES))
    parser.add_argument("--workdir", required=True, type=command.local, help="checkpoints; the same one resumes")
    parser.add_argument("--out", type=command.local, help="the exported folder")
    parser.add_argument("--steps", type=command.at_least(1), help="updates, instead of the recipe's")
    args = parser.parse_args(arguments)
    recipe = RECIPES[args.role]
    if args.steps is not None:
        recipe = dataclasses.replace(recipe, steps=args.steps)
    out = args.out or SHIPPED / args.role

    concepts = world.concepts()
    known = np.array([i for i, concept in enumerate(concepts) if recipe.known in ("all", concept.split)])
    chosen = {concept.id for concept in world.world()}
    favoured = np.array([i for i in known if concepts[i].id in chosen])
    if recipe.begins:
        copy_tokenizer(SHIPPED / recipe.begins, out)
    else:
        captions = [world.prompt(concepts[i], style) for i in known for style in world.STYLES]
        tokenizers.train_clip_tokenizer(captions, out, LENGTH)
    tokenizer = text.load_tokenizer(out)
    texts = [[world.prompt(concept, style) for style in (*world.STYLES, None)] for concept in concepts]
    texts.append([*world.STYLES, ""])
    ids = text.tokenize(tokenizer, [prompt for row in texts for prompt in row], LENGTH).reshape(len(texts), -1, LENGTH)
    images = np.moveaxis(pictures.load(concepts), 0, 1)

    config = clip_config(recipe, len(tokenizer))
    graphdef, params = train_network(args.role, recipe, config, images, ids, known, favoured, args.workdir)
    Evaluation(graphdef, params, images, ids).report(args.role)
    write_clip(config, params, out)
    print(f"wrote {os.path.relpath(out)}")


if __name__ == "__main__":
    sys.exit(errors.run(main))
