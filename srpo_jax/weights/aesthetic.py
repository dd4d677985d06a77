"""Tables for the aesthetic predictors. Tower and head come from two files, of which the head's names get ``head.``."""

from srpo_jax.models.aesthetic import ClipAestheticConfig, SiglipAestheticConfig
from srpo_jax.weights.clip import hf_blocks, hf_vision, open_clip_vision
from srpo_jax.weights.rules import Rule, Table
from srpo_jax.weights.tower import dense, fused_attention, head, norm
from srpo_jax.weights.transforms import conv, identity, reshape

LAION_HEAD, V25_HEAD = ("head.layers", (0, 2, 4, 6, 7)), ("head.scoring_head", (0, 2, 4, 6, 8))


def hf_clip_rules(config: ClipAestheticConfig) -> Table:
    """HF ``CLIPModel`` and LAION's head <-> ``ClipAesthetic``. The text tower is unread."""
    rules = (*hf_vision(config.vision_config), *head(*LAION_HEAD))
    buffers = frozenset({"vision_model.embeddings.position_ids"})
    return Table(rules, ignored=buffers, unread=("text_model.", "text_projection.", "logit_scale"))


def open_clip_rules(config: ClipAestheticConfig) -> Table:
    """open_clip ``CLIP`` and LAION's head <-> ``ClipAesthetic``. The text tower is unread."""
    rules = (*open_clip_vision(config.vision_config), *head(*LAION_HEAD))
    text = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection", "logit_scale")
    return Table(rules, ignored=frozenset({"attn_mask"}), unread=text)


def siglip_rules(config: SiglipAestheticConfig) -> Table:
    """HF ``SiglipModel`` and V2.5's head <-> ``SiglipAesthetic``. The text tower is unread."""
    vision, width = "vision_model.embeddings", config.vision_config.hidden_size
    ours, pool = "vision.pooling", "vision_model.head"
    rules = (
        Rule("vision.patch_embedding.kernel", f"{vision}.patch_embedding.weight", conv),
        Rule("vision.patch_embedding.bias", f"{vision}.patch_embedding.bias", identity),
        Rule("vision.position_embedding", f"{vision}.position_embedding.weight", identity),
        *hf_blocks("vision", "vision_model.", config.vision_config.num_hidden_layers),
        *norm("vision.norm_out", "vision_model.post_layernorm"),
        Rule(f"{ours}.probe", f"{pool}.probe", reshape((1, 1, width), (width,))),
        *fused_attention(f"{ours}.attn", f"{pool}.attention.in_proj_weight", f"{pool}.attention.in_proj_bias", width),
        *dense(f"{ours}.attn.proj", f"{pool}.attention.out_proj"),
        *norm(f"{ours}.norm", f"{pool}.layernorm"),
        *dense(f"{ours}.mlp.in_layer", f"{pool}.mlp.fc1"),
        *dense(f"{ours}.mlp.out_layer", f"{pool}.mlp.fc2"),
        *head(*V25_HEAD),
    )
    buffers = frozenset({"vision_model.embeddings.position_ids"})
    return Table(rules, ignored=buffers, unread=("text_model.", "logit_scale", "logit_bias"))
