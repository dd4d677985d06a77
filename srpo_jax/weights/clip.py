"""Tables for CLIP: Hugging Face's ``CLIPModel`` and ``CLIPTextModel``, and open_clip's ViT family (so HPS-v2.1)."""

from srpo_jax.models.clip import ClipConfig, ClipTextConfig
from srpo_jax.weights.rules import Rule, Table
from srpo_jax.weights.transforms import conv, each, identity, linear, split


def _norm(ours: str, theirs: str, layers: int | None = None) -> list[Rule]:
    return [
        Rule(f"{ours}.scale", f"{theirs}.weight", identity, layers),
        Rule(f"{ours}.bias", f"{theirs}.bias", identity, layers),
    ]


def _dense(ours: str, theirs: str, layers: int) -> list[Rule]:
    return [
        Rule(f"{ours}.kernel", f"{theirs}.weight", linear, layers),
        Rule(f"{ours}.bias", f"{theirs}.bias", identity, layers),
    ]


def _hf_blocks(ours: str, theirs: str, layers: int) -> list[Rule]:
    """One tower's stack in HF's names: separate q, k and v."""
    ours, theirs = f"{ours}.blocks", f"{theirs}encoder.layers.{{i}}"
    pairs = (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("proj", "out_proj"))
    return [
        *_norm(f"{ours}.norm1", f"{theirs}.layer_norm1", layers),
        *(rule for a, b in pairs for rule in _dense(f"{ours}.attn.{a}", f"{theirs}.self_attn.{b}", layers)),
        *_norm(f"{ours}.norm2", f"{theirs}.layer_norm2", layers),
        *_dense(f"{ours}.mlp.in_layer", f"{theirs}.mlp.fc1", layers),
        *_dense(f"{ours}.mlp.out_layer", f"{theirs}.mlp.fc2", layers),
    ]


def _hf_text(config: ClipTextConfig) -> list[Rule]:
    return [
        Rule("text.token_embedding", "text_model.embeddings.token_embedding.weight", identity),
        Rule("text.position_embedding", "text_model.embeddings.position_embedding.weight", identity),
        *_hf_blocks("text", "text_model.", config.num_hidden_layers),
        *_norm("text.norm_out", "text_model.final_layer_norm"),
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


def hf_rules(config: ClipConfig) -> Table:
    """HF ``CLIPModel`` (PickScore, laion's CLIP-H) <-> ``Clip``. ``pre_layrnorm`` is the files' own spelling."""
    vision = "vision_model.embeddings"
    rules = [
        *_hf_text(config.text_config),
        Rule("text.projection.kernel", "text_projection.weight", linear),
        Rule("vision.patch_embedding.kernel", f"{vision}.patch_embedding.weight", conv),
        Rule("vision.class_embedding", f"{vision}.class_embedding", identity),
        Rule("vision.position_embedding", f"{vision}.position_embedding.weight", identity),
        *_norm("vision.norm_in", "vision_model.pre_layrnorm"),
        *_hf_blocks("vision", "vision_model.", config.vision_config.num_hidden_layers),
        *_norm("vision.norm_out", "vision_model.post_layernorm"),
        Rule("vision.projection.kernel", "visual_projection.weight", linear),
        Rule("logit_scale", "logit_scale", identity),
    ]
    buffers = {f"{tower}_model.embeddings.position_ids" for tower in ("text", "vision")}
    return Table(tuple(rules), ignored=frozenset(buffers))


def _open_clip_blocks(ours: str, theirs: str, width: int, layers: int) -> list[Rule]:
    """One tower's stack in open_clip's names: q, k and v are one ``in_proj`` of torch's MultiheadAttention."""
    ours, theirs = f"{ours}.blocks", f"{theirs}transformer.resblocks.{{i}}"
    kernels = [f"{ours}.attn.{x}.kernel" for x in "qkv"]
    biases = [f"{ours}.attn.{x}.bias" for x in "qkv"]
    rows = split(width, width, width)
    return [
        *_norm(f"{ours}.norm1", f"{theirs}.ln_1", layers),
        Rule(kernels, f"{theirs}.attn.in_proj_weight", rows >> each(linear, linear, linear), layers),
        Rule(biases, f"{theirs}.attn.in_proj_bias", rows, layers),
        *_dense(f"{ours}.attn.proj", f"{theirs}.attn.out_proj", layers),
        *_norm(f"{ours}.norm2", f"{theirs}.ln_2", layers),
        *_dense(f"{ours}.mlp.in_layer", f"{theirs}.mlp.c_fc", layers),
        *_dense(f"{ours}.mlp.out_layer", f"{theirs}.mlp.c_proj", layers),
    ]


def open_clip_rules(config: ClipConfig) -> Table:
    """open_clip ``CLIP`` with a ``VisionTransformer`` <-> ``Clip``. Its projections are stored as [in, out]."""
    text, vision = config.text_config, config.vision_config
    rules = [
        Rule("text.token_embedding", "token_embedding.weight", identity),
        Rule("text.position_embedding", "positional_embedding", identity),
        *_open_clip_blocks("text", "", text.hidden_size, text.num_hidden_layers),
        *_norm("text.norm_out", "ln_final"),
        Rule("text.projection.kernel", "text_projection", identity),
        Rule("vision.patch_embedding.kernel", "visual.conv1.weight", conv),
        Rule("vision.class_embedding", "visual.class_embedding", identity),
        Rule("vision.position_embedding", "visual.positional_embedding", identity),
        *_norm("vision.norm_in", "visual.ln_pre"),
        *_open_clip_blocks("vision", "visual.", vision.hidden_size, vision.num_hidden_layers),
        *_norm("vision.norm_out", "visual.ln_post"),
        Rule("vision.projection.kernel", "visual.proj", identity),
        Rule("logit_scale", "logit_scale", identity),
    ]
    return Table(tuple(rules), ignored=frozenset({"attn_mask"}))
