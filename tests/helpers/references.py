"""Tiny random models of the reference packages, in the files that these packages write."""

import pathlib

import diffusers
import numpy as np
import safetensors.numpy
import torch
import transformers

from srpo_jax.emoji import tokenizers

TEXTS = ("a red bird", "the big house on a hill", "Flat 3D drawing of nothing")
TEXT_LENGTH = 12


def randomise(model: torch.nn.Module, seed: int, scale: float = 0.2) -> torch.nn.Module:
    """Fills all parameters, biases and norms too, so that none is 0 or 1 and no two are alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise + (1 if "norm" in name and name.endswith("weight") else 0))
    return model.eval()


def flux_transformer(seed: int = 0, guidance: bool = True, **changes) -> torch.nn.Module:
    """diffusers' transformer: width 32, two double and three single blocks."""
    sizes = {
        "in_channels": 64,
        "num_layers": 2,
        "num_single_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 20,
        "guidance_embeds": guidance,
        "axes_dims_rope": (4, 6, 6),
    }
    return randomise(diffusers.FluxTransformer2DModel(**sizes | changes), seed)


def autoencoder(seed: int = 1, **changes) -> torch.nn.Module:
    """diffusers' autoencoder: factor 8, 16 latent channels, widths 8 and 16."""
    levels = 4
    sizes = {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 16,
        "block_out_channels": (8, 8, 16, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    return randomise(diffusers.AutoencoderKL(**sizes | changes), seed, 0.1)


def clip_text(vocabulary: int, seed: int = 2) -> torch.nn.Module:
    """transformers' CLIP text model, width 20, of a vocabulary whose last id is end-of-text."""
    config = transformers.CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=20,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=20,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return randomise(transformers.CLIPTextModel(config), seed)


def t5(vocabulary: int, seed: int = 3) -> torch.nn.Module:
    """transformers' T5 v1.1 encoder, width 24."""
    config = transformers.T5Config(
        vocab_size=vocabulary,
        d_model=24,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=3,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        dropout_rate=0.0,
    )
    return randomise(transformers.T5EncoderModel(config), seed)


def clip(seed: int = 4) -> torch.nn.Module:
    """transformers' CLIP with both towers, image size 28, patch 14."""
    text = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_act": "gelu",
        "eos_token_id": 2,
        "bos_token_id": 0,
    }
    vision = {
        "hidden_size": 24,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "hidden_act": "gelu",
    }
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    return randomise(transformers.CLIPModel(config), seed)


def save_clip(path: pathlib.Path) -> pathlib.Path:
    """``clip`` as transformers saves it, with ``position_ids`` buffers, as older files have them."""
    clip().save_pretrained(path)
    arrays = safetensors.numpy.load_file(path / "model.safetensors")
    arrays["text_model.embeddings.position_ids"] = np.arange(77)[None]
    safetensors.numpy.save_file(arrays, path / "model.safetensors", {"format": "pt"})
    return path


def flux_pipeline(path: pathlib.Path, dtype: torch.dtype = torch.float32, shard: str = "10GB") -> None:
    """Saves a whole pipeline as a diffusers folder, with tokenizers of ``TEXTS``."""
    clip_words = tokenizers.train_clip_tokenizer(TEXTS, path / "tokenizer", 77)
    t5_words = tokenizers.train_t5_tokenizer(TEXTS, path / "tokenizer_2", TEXT_LENGTH)
    pipeline = diffusers.FluxPipeline(
        transformer=flux_transformer(pooled_projection_dim=20, joint_attention_dim=24),
        vae=autoencoder(),
        text_encoder=clip_text(clip_words),
        text_encoder_2=t5(t5_words),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(path / "tokenizer"),
        tokenizer_2=transformers.T5Tokenizer.from_pretrained(path / "tokenizer_2"),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipeline.to(dtype).save_pretrained(path, max_shard_size=shard)
