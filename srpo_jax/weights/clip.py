"""Tables for CLIP: Hugging Face's ``CLIPModel`` and ``CLIPTextModel``, and open_clip's ViT family (so HPS-v2.1)."""

from srpo_jax.models.clip import ClipConfig, ClipTextConfig, ClipVisionConfig
from srpo_jax.weights.rules import Rule, Table
from srpo_jax.weights.tower import dense, fused_attention, norm
from srpo_jax.weights.transforms import conv, identity, linear


def hf_blocks(ours: str, theirs: str, layers: int) -> list[Rule]:
    """One tower's stack in HF's names: separate q, k and v."""
    ours, theirs = f"{ours}.blocks", f"{theirs}encoder.layers.{{i}}"
    pairs = (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("proj", "out_proj"))
    return [
        *norm(f"{ours}.norm1", f"{theirs}.layer_norm1", layers),
        *(rule for a, b in pairs for rule in dense(f"{ours}.attn.{a}", f"{theirs}.self_attn.{b}", layers)),
        *norm(f"{ours}.norm2", f"{theirs}.layer_norm2", layers),
        *dense(f"{ours}.mlp.in_layer", f"{theirs}.mlp.fc1", layers),
        *dense(f"{ours}.mlp.out_layer", f"{theirs}.mlp.fc2", layers),
    ]


def _hf_text(config: ClipTextConfig) -> list[Rule]:
    return [
        Rule("text.token_embedding", "text_model.embeddings.token_embedding.weight", identity),
        Rule("text.position_embedding", "text_model.embeddings.position_embedding.weight", identity),
        *hf_blocks("text", "text_model.", config.num_hidden_layers),
        *norm("text.norm_out", "text_model.final_layer_norm"),
    ]


def hf_text_rules(config: ClipTextConfig) -> Table:
    """HF ``CLIPTextModel`` (FLUX's ``text_encoder``) <-> ``ClipText``.

    Files on the hub prefix every name with ``text_model.``; transformers 5 does not. Both are read, the former written.
    """
    rules = _hf_text(config)
    names = [name for rule in rules for i in range(rule.layers or 1) for name in rule.layer_sources(i)]
    aliases = {name.removeprefix("text_model."): name for name in names}
    buffer = "embeddings.position_ids"
    return Table(tuple(rules), ignored=frozenset({buffer, f"text_model.{buffer}"}), aliases=aliases)


def hf_vision(config: ClipVisionConfig) -> list[Rule]:
    """The vision tower in HF's names. ``pre_layrnorm`` is the files' own spelling."""
    vision = "vision_model.embeddings"
    return [
        Rule("vision.patch_embedding.kernel", f"{vision}.patch_embedding.weight", conv),
        Rule("vision.class_embedding", f"{vision}.class_embedding", identity),
        Rule("vision.position_embedding", f"{vision}.position_embedding.weight", identity),
        *norm("vision.norm_in", "vision_model.pre_layrnorm"),
        *hf_blocks("vision", "vision_model.", config.num_hidden_layers),
        *norm("vision.norm_out", "vision_model.post_layernorm"),
        Rule("vision.projection.kernel", "visual_projection.weight", linear),
    ]


def hf_rules(config: ClipConfig) -> Table:
    """HF ``CLIPModel`` (PickScore, laion's CLIP-H) <-> ``Clip``."""
    rules = [
        *_hf_text(config.text_config),
        Rule("text.projection.kernel", "text_projection.weight", linear),
        *hf_vision(config.vision_config),
        Rule("logit_scale", "logit_scale", identity),
    ]
    buffers = {f"{tower}_model.embeddings.position_ids" for tower in ("text", "vision")}
    return Table(tuple(rules), ignored=frozenset(buffers))


def _open_clip_blocks(ours: str, theirs: str, width: int, layers: int) -> list[Rule]:
    """One tower's stack in open_clip's names: q, k and v are one ``in_proj`` of torch's MultiheadAttention."""
    ours, theirs = f"{ours}.blocks", f"{theirs}transformer.resblocks.{{i}}"
    fused = f"{theirs}.attn.in_proj_weight", f"{theirs}.attn.in_proj_bias"
    return [
        *norm(f"{ours}.norm1", f"{theirs}.ln_1", layers),
        *fused_attention(f"{ours}.attn", *fused, width, layers),
        *dense(f"{ours}.attn.proj", f"{theirs}.attn.out_proj", layers),
        *norm(f"{ours}.norm2", f"{theirs}.ln_2", layers),
        *dense(f"{ours}.mlp.in_layer", f"{theirs}.mlp.c_fc", layers),
        *dense(f"{ours}.mlp.out_layer", f"{theirs}.mlp.c_proj", layers),
    ]


def open_clip_vision(vision: ClipVisionConfig) -> list[Rule]:
    """The vision tower in open_clip's names. Its projection is stored as [in, out]."""
    return [
        Rule("vision.patch_embedding.kernel", "visual.conv1.weight", conv),
        Rule("vision.class_embedding", "visual.class_embedding", identity),
        Rule("vision.position_embedding", "visual.positional_embedding", identity),
        *norm("vision.norm_in", "visual.ln_pre"),
        *_open_clip_blocks("vision", "visual.", vision.hidden_size, vision.num_hidden_layers),
        *norm("vision.norm_out", "visual.ln_post"),
        Rule("vision.projection.kernel", "visual.proj", identity),
    ]


def open_clip_rules(config: ClipConfig) -> Table:
    """open_clip ``CLIP`` with a ``VisionTransformer`` <-> ``Clip``. Its projections are stored as [in, out]."""
    text = config.text_config
    rules = [
        Rule("text.token_embedding", "token_embedding.weight", identity),
        Rule("text.position_embedding", "positional_embedding", identity),
        *_open_clip_blocks("text", "", text.hidden_size, text.num_hidden_layers),
        *norm("text.norm_out", "ln_final"),
        Rule("text.projection.kernel", "text_projection", identity),
        *open_clip_vision(config.vision_config),
        Rule("logit_scale", "logit_scale", identity),
    ]
    return Table(tuple(rules), ignored=frozenset({"attn_mask"}))
