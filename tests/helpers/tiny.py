"""A complete pipeline and a reward in our folder format, with random weights: small enough to train in a test."""

import json
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from srpo_jax import config as config_lib
from srpo_jax.emoji import tokenizers
from srpo_jax.models import autoencoder, clip, flux, t5
from srpo_jax.weights import folder

PROMPTS = ["red apple", "blue car", "green tree", "yellow sun", "small house", "old boat", "grey cat"]
HELD_OUT = ["black dog", "white bird", "tall tower"]
WORDS = ("Real", "Detail"), ("Flat", "Painting", "Anime")
LENGTH = 8  # tokens of a prompt, in every encoder

FLUX = flux.FluxConfig(
    in_channels=64, out_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=4,
    joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
)  # fmt: skip
VAE = autoencoder.AutoencoderConfig(block_out_channels=(8, 8, 8, 16), layers_per_block=1, norm_num_groups=4)
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "base_image_seq_len": 256, "base_shift": 0.5,
    "max_image_seq_len": 4096, "max_shift": 1.15, "num_train_timesteps": 1000, "shift": 3.0,
    "use_dynamic_shifting": True,
}  # fmt: skip


def save_random(path, network, config, seed):
    """Writes a network with random parameters: none is 0 or 1, where mistakes would hide."""
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        name, normal = str(path[-1].key), generator.normal(size=leaf.shape)
        if name == "scale":
            normal = 1 + 0.1 * normal
        elif name == "kernel":
            normal *= (leaf.size / leaf.shape[-1] / (leaf.shape[0] if "blocks" in str(path[0]) else 1)) ** -0.5
        else:
            normal *= 0.1
        return normal.astype(np.float32)

    folder.save(path, network, config, jax.tree_util.tree_map_with_path(draw, folder.abstract(network, config)[1]))


def write_pipeline(path: pathlib.Path) -> pathlib.Path:
    """A pipeline folder as `python -m srpo_jax.convert import` writes it."""
    texts = PROMPTS + HELD_OUT
    clip_size = tokenizers.train_clip_tokenizer(texts, path / "tokenizer", LENGTH)
    t5_size = tokenizers.train_t5_tokenizer(texts, path / "tokenizer_2", LENGTH)
    text = clip.ClipTextConfig(clip_size, 16, 32, 2, 2, LENGTH, "quick_gelu", eos_token_id=clip_size - 1)
    encoder = t5.T5Config.from_dict({
        "vocab_size": t5_size, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
        "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu",
    })  # fmt: skip
    save_random(path / "transformer", "flux", FLUX, 1)
    save_random(path / "vae", "autoencoder", VAE, 2)
    save_random(path / "text_encoder", "clip_text", text, 3)
    save_random(path / "text_encoder_2", "t5", encoder, 4)
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    return path


def write_reward(path: pathlib.Path, seed: int) -> pathlib.Path:
    """A CLIP with its tokenizer."""
    words = [word for words in WORDS for word in words]
    size = tokenizers.train_clip_tokenizer(PROMPTS + HELD_OUT + words, path / "tokenizer", LENGTH)
    config = clip.ClipConfig(
        clip.ClipTextConfig(size, 32, 32, 1, 4, 2 * LENGTH, "gelu", eos_token_id=size - 1),
        clip.ClipVisionConfig(32, 32, 1, 4, 32, 16, "gelu"),
        projection_dim=16,
    )
    save_random(path, "clip", config, seed)
    return path


def write_all(path: pathlib.Path) -> pathlib.Path:
    """``pipeline``, ``clip`` and ``hps`` folders, and the prompt files ``train.txt`` and ``held_out.txt``."""
    path.mkdir(parents=True, exist_ok=True)
    write_pipeline(path / "pipeline")
    write_reward(path / "clip", 5)
    write_reward(path / "hps", 6)
    (path / "train.txt").write_text("\n".join(PROMPTS) + "\n")
    (path / "held_out.txt").write_text("\n".join(HELD_OUT) + "\n")
    return path


def read_arrays(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of one item of a checkpoint, by path, whatever devices wrote them."""
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder.absolute()).item_metadata.tree
    how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    with ocp.PyTreeCheckpointer() as checkpointer:
        found = checkpointer.restore(folder.absolute(), args=ocp.args.PyTreeRestore(restore_args=how))
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found)}


def config(path: pathlib.Path, **changes):
    """A short recipe on the folders of ``write_all``; ``changes`` are flattened keys with ``__`` for dots."""
    c = config_lib.default()
    c.steps = 3
    c.compilation_cache = ""
    c.model.path, c.model.dtype = str(path / "pipeline"), "float32"
    c.remat.transformer = c.remat.autoencoder = c.remat.reward = "none"
    c.data.prompts, c.data.batch_size, c.data.text_length = str(path / "train.txt"), 2, LENGTH
    c.data.height, c.data.width = 32, 48
    c.rollout.steps, c.rollout.noise = 2, "per_sample"
    c.reward.models.hps.weight, c.reward.models.clip.weight = 0.0, 1.0
    c.reward.models.clip.path = str(path / "clip")
    c.reward.positive, c.reward.negative = WORDS
    c.optim.learning_rate = 1e-3
    c.checkpoint.every = 2
    c.checkpoint.resumable = c.checkpoint.keep  # tests go on from older ones too
    c.sample.every, c.sample.prompts, c.sample.steps = 0, str(path / "held_out.txt"), 2
    c.refl.late_steps = 2
    c.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return c
