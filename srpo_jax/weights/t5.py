"""Table for Hugging Face's ``T5EncoderModel`` (FLUX's ``text_encoder_2``)."""

from srpo_jax.models.t5 import T5Config
from srpo_jax.weights.rules import Rule, Table
from srpo_jax.weights.transforms import identity, linear


def hf_rules(config: T5Config) -> Table:
    """HF ``T5EncoderModel`` <-> ``T5Encoder``. The first block's table of relative positions serves all blocks."""
    block, ours, layers = "encoder.block.{i}.layer", "blocks", config.num_layers
    first = "encoder.block.0.layer.0"
    kernels = {
        **{f"attn.{a}": f"0.SelfAttention.{b}" for a, b in (("q", "q"), ("k", "k"), ("v", "v"), ("proj", "o"))},
        **{f"mlp.{a}": f"1.DenseReluDense.{b}" for a, b in (("gate", "wi_0"), ("up", "wi_1"), ("down", "wo"))},
    }
    rules = [
        Rule("token_embedding", "shared.weight", identity),
        Rule("relative_bias.embedding", f"{first}.SelfAttention.relative_attention_bias.weight", identity),
        Rule(f"{ours}.norm1.scale", f"{block}.0.layer_norm.weight", identity, layers),
        Rule(f"{ours}.norm2.scale", f"{block}.1.layer_norm.weight", identity, layers),
        *(Rule(f"{ours}.{a}.kernel", f"{block}.{b}.weight", linear, layers) for a, b in kernels.items()),
        Rule("norm_out.scale", "encoder.final_layer_norm.weight", identity),
    ]
    return Table(tuple(rules), aliases={"encoder.embed_tokens.weight": "shared.weight"})
