"""The arithmetic of FLUX.1's transformer, from its sizes alone; see ``costs.flops`` for what is counted."""

import math

from srpo_jax.costs.flops import FUSED_ATTENTION, Factors, Forward, Work
from srpo_jax.models.flux import Flux, FluxConfig, is_modulation
from srpo_jax.models.flux_layers import MLP_RATIO, TIME_CHANNELS
from srpo_jax.models.lora import Lora, chosen, factor_shapes
from srpo_jax.weights import folder

# Products of a block by what is kept of them, in widths squared for a token.
WIDTHS_SQUARED = {"out": 1 + MLP_RATIO, "qkv": 3, "mlp": MLP_RATIO}


def transformer(config: FluxConfig, image_tokens: int, text_tokens: int) -> Forward:
    """One sample's pass, embedders and modulations included."""
    width, tokens = config.width, image_tokens + text_tokens
    blocks = config.num_layers + config.num_single_layers
    products = _block_products(config, tokens)
    attention = blocks * 2 * 2 * tokens**2 * width
    vectors = 2 + config.guidance_embeds  # time, pooled text, perhaps guidance
    inputs = TIME_CHANNELS * (vectors - 1) + config.pooled_projection_dim
    ends = vectors * 2 * width**2 + 2 * 2 * width**2 + 2 * width * config.out_channels * image_tokens
    first = 2 * width * (config.in_channels * image_tokens + config.joint_attention_dim * text_tokens + inputs)
    return Forward(
        products=products + modulations(config) + ends,
        first=first,
        attention=attention,
        # The gates' gradients read each block's last products, so none is spared.
        again={"none": 0, "dots": 0, "full": products},
        again_attention={"none": 0, "dots": attention, "full": attention},
        spared={name: share * blocks * 2 * width**2 * tokens for name, share in WIDTHS_SQUARED.items()},
    )


def kept(config: FluxConfig, image_tokens: int, text_tokens: int) -> dict[str, int]:
    """Numbers that all blocks keep of one sample, by name (``models.compute.KEPT``); of attention also its sums, one
    number of float32 for each head and token."""
    tokens, single = image_tokens + text_tokens, config.num_single_layers
    blocks, heads = config.num_layers + single, config.num_attention_heads
    # Both halves of a double block end in such a product.
    out = (2 * config.num_layers + single) * tokens * config.width
    each = blocks * tokens * config.width
    return {"out": out, "attention": each + 2 * blocks * tokens * heads, "qkv": 3 * each, "mlp": MLP_RATIO * each}


def modulations(config: FluxConfig) -> float:
    """Shift, scale and gate of one vector, for each of two streams' two halves, or once."""
    return (config.num_layers * 12 + config.num_single_layers * 3) * 2.0 * config.width**2


def factors(config: FluxConfig, lora: Lora, image_tokens: int, text_tokens: int) -> Factors:
    """All factors beside the transformer's layers."""
    count, products = 0, 0.0
    for name, kernel in _adapted(config, lora).items():
        size = sum(math.prod(shape) for shape in factor_shapes(kernel, lora.rank))
        stream = image_tokens if ".img_" in name else text_tokens if ".txt_" in name else image_tokens + text_tokens
        count += size
        products += 2 * size * (1 if is_modulation(name) else stream)
    return Factors(count, products)


def _adapted(config: FluxConfig, lora: Lora) -> dict[str, tuple[int, ...]]:
    """The shapes of the kernels that have factors, by layer."""
    kernels = {
        name.removesuffix(".kernel"): shape
        for name, shape in folder.shapes("flux", config).items()
        if name.startswith(Flux.STACKS) and name.endswith(".kernel")
    }
    return {name: kernels[name] for name in chosen(lora, kernels)}


def adapted(config: FluxConfig, lora: Lora, image_tokens: int, text_tokens: int, *, remat: str, attention: str) -> Work:
    """A forward and a backward pass of the transformer in which factors alone are trained.

    Frozen kernels have no gradient, and the gradient that passes through the blocks does not go on to the condition:
    modulations are constants, unless they are adapted.
    """
    flux, low = transformer(config, image_tokens, text_tokens), factors(config, lora, image_tokens, text_tokens)
    width, tokens, names = config.width, image_tokens + text_tokens, _adapted(config, lora)
    through = _block_products(config, tokens) + 2 * width * config.out_channels * image_tokens
    model = flux.total + low.products + through + 2 * flux.attention + 2 * low.products
    again = flux.recomputed_attention(remat, attention)
    if remat not in ("none", "dots"):
        again += flux.recomputed(remat) + low.products
        # A block's last products are read by the gradient of their gate alone.
        for mod, layers, wide, count in (
            ("double_blocks.img_mod", config.num_layers, MLP_RATIO, image_tokens),
            ("double_blocks.txt_mod", config.num_layers, MLP_RATIO, text_tokens),
            ("single_blocks.mod", config.num_single_layers, 1 + MLP_RATIO, tokens),
        ):
            needless = mod not in names and "out" not in remat.split("+")
            again -= layers * wide * 2 * width**2 * count if needless else 0
    if attention in FUSED_ATTENTION:
        again += flux.attention / 2
    return Work(model, model + again)


def _block_products(config: FluxConfig, tokens: int) -> float:
    """Both kinds of block: qkv 3, out 1, MLP 2 * MLP_RATIO widths squared a token."""
    return (config.num_layers + config.num_single_layers) * (4 + 2 * MLP_RATIO) * 2 * config.width**2 * tokens
