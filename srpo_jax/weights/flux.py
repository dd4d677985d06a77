"""Tables for the FLUX transformer: diffusers' ``FluxTransformer2DModel`` and Black Forest Labs' single file.

The two differ in names and in three arrangements. BFL fuses q, k and v, and in single blocks the MLP's first layer with
them (``linear1``); diffusers keeps them apart. Of the final modulation, BFL stores (shift, scale) as we do, diffusers
(scale, shift).
"""

from srpo_jax.models.flux import MLP_RATIO, FluxConfig
from srpo_jax.weights.rules import Rule, Table, Transform
from srpo_jax.weights.transforms import (
    each,
    fused_qkv_bias,
    fused_qkv_kernel,
    identity,
    linear,
    qkv_bias,
    qkv_kernel,
    split,
    swap_halves,
)


def _dense(ours: str, theirs: str, layers: int | None = None, rows: Transform = identity) -> list[Rule]:
    """A linear layer; ``rows`` rearranges the output channels, which are torch's first axis."""
    return [
        Rule(f"{ours}.kernel", f"{theirs}.weight", rows >> linear, layers),
        Rule(f"{ours}.bias", f"{theirs}.bias", rows, layers),
    ]


# --- diffusers ---


def diffusers_rules(config: FluxConfig) -> Table:
    """diffusers ``FluxTransformer2DModel`` <-> ``Flux``."""
    embed = "time_text_embed"
    rules = [
        *_dense("img_in", "x_embedder"),
        *_dense("txt_in", "context_embedder"),
        *_diffusers_embedder("time_in", f"{embed}.timestep_embedder"),
        *_diffusers_embedder("vector_in", f"{embed}.text_embedder"),
        *(_diffusers_embedder("guidance_in", f"{embed}.guidance_embedder") if config.guidance_embeds else []),
        *_diffusers_double(config),
        *_diffusers_single(config),
        *_dense("final_mod", "norm_out.linear", rows=swap_halves),
        *_dense("final_out", "proj_out"),
    ]
    return Table(rules)


def _diffusers_embedder(ours: str, theirs: str) -> list[Rule]:
    return [*_dense(f"{ours}.in_layer", f"{theirs}.linear_1"), *_dense(f"{ours}.out_layer", f"{theirs}.linear_2")]


def _diffusers_qkv(ours: str, theirs: str, names: tuple[str, str, str], config: FluxConfig, layers: int) -> list[Rule]:
    heads, dim = config.num_attention_heads, config.attention_head_dim
    return [
        Rule(f"{ours}.kernel", [f"{theirs}.{name}.weight" for name in names], qkv_kernel(heads, dim), layers),
        Rule(f"{ours}.bias", [f"{theirs}.{name}.bias" for name in names], qkv_bias(heads, dim), layers),
    ]


def _diffusers_double(config: FluxConfig) -> list[Rule]:
    layers, theirs = config.num_layers, "transformer_blocks.{i}"
    rules = []
    # (our stream, diffusers' modulation, q k v, their norms, projection, MLP)
    for stream, mod, qkv, norms, proj, mlp in (
        ("img", "norm1", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0", "ff"),
        (
            "txt",
            "norm1_context",
            ("add_q_proj", "add_k_proj", "add_v_proj"),
            ("norm_added_q", "norm_added_k"),
            "to_add_out",
            "ff_context",
        ),
    ):
        ours = f"double_blocks.{stream}"
        rules += [
            *_dense(f"{ours}_mod", f"{theirs}.{mod}.linear", layers),
            *_diffusers_qkv(f"{ours}_attn.qkv", f"{theirs}.attn", qkv, config, layers),
            Rule(f"{ours}_attn.query_norm.scale", f"{theirs}.attn.{norms[0]}.weight", identity, layers),
            Rule(f"{ours}_attn.key_norm.scale", f"{theirs}.attn.{norms[1]}.weight", identity, layers),
            *_dense(f"{ours}_attn.proj", f"{theirs}.attn.{proj}", layers),
            *_dense(f"{ours}_mlp.in_layer", f"{theirs}.{mlp}.net.0.proj", layers),
            *_dense(f"{ours}_mlp.out_layer", f"{theirs}.{mlp}.net.2", layers),
        ]
    return rules


def _diffusers_single(config: FluxConfig) -> list[Rule]:
    layers, ours, theirs = config.num_single_layers, "single_blocks", "single_transformer_blocks.{i}"
    return [
        *_dense(f"{ours}.mod", f"{theirs}.norm.linear", layers),
        *_diffusers_qkv(f"{ours}.qkv", f"{theirs}.attn", ("to_q", "to_k", "to_v"), config, layers),
        Rule(f"{ours}.query_norm.scale", f"{theirs}.attn.norm_q.weight", identity, layers),
        Rule(f"{ours}.key_norm.scale", f"{theirs}.attn.norm_k.weight", identity, layers),
        *_dense(f"{ours}.mlp_in", f"{theirs}.proj_mlp", layers),
        *_dense(f"{ours}.out", f"{theirs}.proj_out", layers),
    ]


# --- Black Forest Labs ---


def bfl_rules(config: FluxConfig) -> Table:
    """BFL ``Flux`` (``flux1-dev.safetensors``) <-> ``Flux``."""
    rules = [
        *_dense("img_in", "img_in"),
        *_dense("txt_in", "txt_in"),
        *_bfl_embedder("time_in"),
        *_bfl_embedder("vector_in"),
        *(_bfl_embedder("guidance_in") if config.guidance_embeds else []),
        *_bfl_double(config),
        *_bfl_single(config),
        *_dense("final_mod", "final_layer.adaLN_modulation.1"),
        *_dense("final_out", "final_layer.linear"),
    ]
    return Table(rules)


def _bfl_embedder(name: str) -> list[Rule]:
    return [*_dense(f"{name}.in_layer", f"{name}.in_layer"), *_dense(f"{name}.out_layer", f"{name}.out_layer")]


def _bfl_double(config: FluxConfig) -> list[Rule]:
    layers, heads, dim = config.num_layers, config.num_attention_heads, config.attention_head_dim
    rules = []
    for stream in ("img", "txt"):
        ours, theirs = f"double_blocks.{stream}", f"double_blocks.{{i}}.{stream}"
        rules += [
            *_dense(f"{ours}_mod", f"{theirs}_mod.lin", layers),
            Rule(f"{ours}_attn.qkv.kernel", f"{theirs}_attn.qkv.weight", fused_qkv_kernel(heads, dim), layers),
            Rule(f"{ours}_attn.qkv.bias", f"{theirs}_attn.qkv.bias", fused_qkv_bias(heads, dim), layers),
            Rule(f"{ours}_attn.query_norm.scale", f"{theirs}_attn.norm.query_norm.scale", identity, layers),
            Rule(f"{ours}_attn.key_norm.scale", f"{theirs}_attn.norm.key_norm.scale", identity, layers),
            *_dense(f"{ours}_attn.proj", f"{theirs}_attn.proj", layers),
            *_dense(f"{ours}_mlp.in_layer", f"{theirs}_mlp.0", layers),
            *_dense(f"{ours}_mlp.out_layer", f"{theirs}_mlp.2", layers),
        ]
    return rules


def _bfl_single(config: FluxConfig) -> list[Rule]:
    layers, heads, dim = config.num_single_layers, config.num_attention_heads, config.attention_head_dim
    ours, theirs = "single_blocks", "single_blocks.{i}"
    rows = split(3 * config.width, MLP_RATIO * config.width)
    kernels, biases = ([f"{ours}.{layer}.{kind}" for layer in ("qkv", "mlp_in")] for kind in ("kernel", "bias"))
    return [
        *_dense(f"{ours}.mod", f"{theirs}.modulation.lin", layers),
        Rule(kernels, f"{theirs}.linear1.weight", rows >> each(fused_qkv_kernel(heads, dim), linear), layers),
        Rule(biases, f"{theirs}.linear1.bias", rows >> each(fused_qkv_bias(heads, dim), identity), layers),
        Rule(f"{ours}.query_norm.scale", f"{theirs}.norm.query_norm.scale", identity, layers),
        Rule(f"{ours}.key_norm.scale", f"{theirs}.norm.key_norm.scale", identity, layers),
        *_dense(f"{ours}.out", f"{theirs}.linear2", layers),
    ]
