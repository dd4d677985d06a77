"""Table for ImageReward's own file, ``ImageReward.pt``: BLIP in the names of its authors' modules."""

from srpo_jax.models.blip import BlipConfig
from srpo_jax.weights.rules import Rule, Table
from srpo_jax.weights.tower import dense, fused_attention, head, norm
from srpo_jax.weights.transforms import conv, identity, reshape

VISION, TEXT, HEAD = "blip.visual_encoder", "blip.text_encoder", "mlp.layers"


def image_reward_rules(config: BlipConfig) -> Table:
    """ImageReward v1.0 <-> ``Blip``. Two projections, which BLIP's contrastive loss had, are in the file and unread."""
    return Table(
        (*vision(config), *text(config), *head(HEAD, (0, 2, 4, 6, 7))),
        ignored=frozenset({f"{TEXT}.embeddings.position_ids"}),
        unread=("blip.vision_proj.", "blip.text_proj."),
    )


def vision(config: BlipConfig) -> list[Rule]:
    """timm's ``VisionTransformer``: q, k and v are one matrix."""
    sizes = config.vision_config
    width, layers, ours, block = sizes.hidden_size, sizes.num_hidden_layers, "vision.blocks", f"{VISION}.blocks.{{i}}"
    table = (sizes.tokens, width)
    return [
        Rule("vision.class_embedding", f"{VISION}.cls_token", reshape((1, 1, width), (width,))),
        Rule("vision.position_embedding", f"{VISION}.pos_embed", reshape((1, *table), table)),
        Rule("vision.patch_embedding.kernel", f"{VISION}.patch_embed.proj.weight", conv),
        Rule("vision.patch_embedding.bias", f"{VISION}.patch_embed.proj.bias", identity),
        *norm(f"{ours}.norm1", f"{block}.norm1", layers),
        *fused_attention(f"{ours}.attn", f"{block}.attn.qkv.weight", f"{block}.attn.qkv.bias", width, layers),
        *dense(f"{ours}.attn.proj", f"{block}.attn.proj", layers),
        *norm(f"{ours}.norm2", f"{block}.norm2", layers),
        *dense(f"{ours}.mlp.in_layer", f"{block}.mlp.fc1", layers),
        *dense(f"{ours}.mlp.out_layer", f"{block}.mlp.fc2", layers),
        *norm("vision.norm_out", f"{VISION}.norm"),
    ]


def text(config: BlipConfig) -> list[Rule]:
    """BERT with cross-attention; of each of its parts the norm comes after the residual."""
    layers, ours, block = config.text_config.num_hidden_layers, "text.blocks", f"{TEXT}.encoder.layer.{{i}}"
    rules = [
        Rule("text.token_embedding", f"{TEXT}.embeddings.word_embeddings.weight", identity),
        Rule("text.position_embedding", f"{TEXT}.embeddings.position_embeddings.weight", identity),
        *norm("text.norm_in", f"{TEXT}.embeddings.LayerNorm"),
    ]
    for number, (mine, theirs) in enumerate((("self_attn", "attention"), ("cross_attn", "crossattention")), 1):
        for a, b in (("q", "query"), ("k", "key"), ("v", "value")):
            rules += dense(f"{ours}.{mine}.{a}", f"{block}.{theirs}.self.{b}", layers)
        rules += dense(f"{ours}.{mine}.proj", f"{block}.{theirs}.output.dense", layers)
        rules += norm(f"{ours}.norm{number}", f"{block}.{theirs}.output.LayerNorm", layers)
    return [
        *rules,
        *dense(f"{ours}.mlp.in_layer", f"{block}.intermediate.dense", layers),
        *dense(f"{ours}.mlp.out_layer", f"{block}.output.dense", layers),
        *norm(f"{ours}.norm3", f"{block}.output.LayerNorm", layers),
    ]
