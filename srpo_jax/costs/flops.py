"""The arithmetic of each network, from sizes alone: no array, no device, no compiler. ``work`` adds up an update's.

A multiply and its add are two FLOPs. Matrix products, convolutions and attention are counted; norms, activations,
rotary embeddings, softmax and the resize before a reward are not (1 % or less at FLUX's widths). Attention counts every
pair of positions, also where a mask is causal: that is what the hardware does. Zeros that pad a convolution are not
counted.

Two figures a part (``Work``). *Model* FLOPs are those of the mathematics: a forward pass, the products for the
gradient of what is trained, and the products that carry the gradient through what is not. *Hardware* FLOPs add what
an implementation computes twice: blocks that rematerialisation runs again, and the logits that fused attention makes
again in its backward pass. Utilisation (MFU) is defined by the model's FLOPs, so that recomputing does not look like
work done.

XLA's own ``cost_analysis`` counts the body of a scan once, however often it runs: for stacked blocks it is no measure.
"""

import dataclasses
from typing import NamedTuple

from srpo_jax.models.autoencoder import AutoencoderConfig
from srpo_jax.models.blip import BlipConfig, BlipVisionConfig
from srpo_jax.models.clip import ClipConfig, ClipTextConfig, ClipVisionConfig
from srpo_jax.models.compute import kept
from srpo_jax.models.siglip import SiglipVisionConfig
from srpo_jax.models.t5 import T5Config

FUSED_ATTENTION = ("cudnn", "splash")  # backends that keep no attention matrix and make the logits again


class Work(NamedTuple):
    """FLOPs of a part: what the model needs, and what the hardware does for it."""

    model: float
    hardware: float

    def __mul__(self, count: float) -> "Work":
        return Work(self.model * count, self.hardware * count)

    def __add__(self, other: "Work") -> "Work":
        return Work(self.model + other.model, self.hardware + other.hardware)


@dataclasses.dataclass(frozen=True)
class Forward:
    """FLOPs of one sample's forward pass, split by what a backward pass makes of them.

    Attributes:
      products: with weights, of activations that depend on earlier weights.
      first: with weights, of the network's own inputs: where these are constants, no gradient goes on.
      attention: queries with keys and probabilities with values; neither side is a weight.
      again: of ``products``, those that rematerialising each block computes a second time, by the remat option. (A
        block's last product is spared where nothing in the backward pass reads it.)
      again_attention: of ``attention``, the same.
      spared: of ``again["full"]``, what keeping a value of a block spares, by its name (``models.compute.KEPT``).
    """

    products: float
    first: float
    attention: float
    again: dict[str, float]
    again_attention: dict[str, float]
    spared: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def total(self) -> float:
        """The whole pass."""
        return self.products + self.first + self.attention

    def inference(self) -> Work:
        """Of a pass without gradient."""
        return Work(self.total, self.total)

    def gradient(self, *, trained: bool, remat: str, attention: str) -> Work:
        """Of a forward and a backward pass.

        Args:
          trained: whether the gradient of the weights is taken (the inputs are constants), or the weights are frozen
            and the gradient of the inputs is taken.
          remat: option of ``models.compute.Compute``.
          attention: backend, see ``models.attention``.
        """
        # Every product has two operands and as many gradients; constants and frozen weights need none.
        backward = (2 * self.products + self.first if trained else self.products + self.first) + 2 * self.attention
        model = self.total + backward
        again = self.recomputed(remat) + self.recomputed_attention(remat, attention)
        if attention in FUSED_ATTENTION:
            again += self.attention / 2
        return Work(model, model + again)

    def recomputed(self, remat: str) -> float:
        """Of ``products``, what the backward pass computes again."""
        if names := kept(remat):
            return self.again["full"] - sum(self.spared.get(name, 0.0) for name in names)
        return self.again[remat]

    def recomputed_attention(self, remat: str, attention: str) -> float:
        """Of ``attention``, the same. Where its output is kept, "xla" still makes the logits again; "cudnn" all, for
        what its backward pass reads beside the output has no name."""
        if not (names := kept(remat)):
            return self.again_attention[remat]
        share = {"splash": 1.0, "xla": 0.5}.get(attention, 0.0) if "attention" in names else 0.0
        return (1 - share) * self.again_attention["full"]


class Factors(NamedTuple):
    """LoRA's low-rank factors: how many numbers, and the FLOPs of their products for one sample's forward pass."""

    parameters: int
    products: float


def decoder(config: AutoencoderConfig, height: int, width: int) -> Forward:
    """The autoencoder's decoder: one picture of that size in pixels."""
    rows, columns = height // config.factor, width // config.factor
    widths = config.block_out_channels[::-1]
    products = _convolution(config.latent_channels, widths[0], rows, columns)
    again = 0.0

    # Of a residual block, only its first convolution is read by its backward pass; resampling is linear.
    mid = _convolution(widths[0], widths[0], rows, columns)
    products += 4 * mid
    again += 2 * mid
    positions = rows * columns
    projection = 2 * widths[0] ** 2 * positions
    products += 4 * projection
    attention = 2 * 2 * positions**2 * widths[0]

    before = widths[0]
    for level, channels in enumerate(widths):
        for _ in range(config.layers_per_block + 1):
            one, two = (_convolution(inputs, channels, rows, columns) for inputs in (before, channels))
            shortcut = 2 * before * channels * rows * columns if before != channels else 0
            products += one + two + shortcut
            again += one
            before = channels
        if level + 1 < len(widths):
            # Four convolutions of 2x2 on the coarse picture, of which one border reads one row or column of two.
            products += 4 * 2 * channels**2 * (2 * rows - 1) * (2 * columns - 1)
            rows, columns = 2 * rows, 2 * columns
    products += _convolution(before, config.out_channels, rows, columns)
    return Forward(
        products=products,
        first=0.0,  # the latents carry the gradient on to the transformer
        attention=attention,
        # Convolutions are no "dots" to the policy; of the attention's products, q, k and v feed what is not kept.
        again={"none": 0, "dots": again, "full": again + 3 * projection},
        # Of the attention itself, only the logits: its output goes into a frozen projection.
        again_attention={"none": 0, "dots": attention / 2, "full": attention / 2},
    )


def encoder(config: AutoencoderConfig, height: int, width: int) -> Forward:
    """The autoencoder's encoder, without gradient (offline latents): one picture of that size in pixels."""
    widths = config.block_out_channels
    rows, columns = height, width
    products = _convolution(config.in_channels, widths[0], rows, columns)
    before = widths[0]
    for level, channels in enumerate(widths):
        for _ in range(config.layers_per_block):
            products += sum(_convolution(inputs, channels, rows, columns) for inputs in (before, channels))
            products += 2 * before * channels * rows * columns if before != channels else 0
            before = channels
        if level + 1 < len(widths):
            rows, columns = rows // 2, columns // 2
            # Stride 2: of the padding, only the last row and column are read.
            products += 2 * channels**2 * (3 * rows - 1) * (3 * columns - 1)
    products += 4 * _convolution(before, before, rows, columns) + 4 * 2 * before**2 * rows * columns
    products += _convolution(before, 2 * config.latent_channels, rows, columns)
    nothing = {"none": 0.0, "dots": 0.0, "full": 0.0}
    return Forward(products, 0.0, 2 * 2 * (rows * columns) ** 2 * before, nothing, nothing)


def _convolution(inputs: int, outputs: int, rows: int, columns: int) -> float:
    """3x3, as large out as in: the border reads two of three rows, or columns."""
    return 2.0 * inputs * outputs * (3 * rows - 2) * (3 * columns - 2)


def image_tower(config: ClipConfig) -> Forward:
    """A CLIP's vision tower: one picture."""
    return vision_tower(config.vision_config, 1, config.projection_dim)


def vision_tower(
    vision: ClipVisionConfig | BlipVisionConfig | SiglipVisionConfig, others: int, projection_dim: int = 0
) -> Forward:
    """A reward's vision tower: one picture. ``others``: tokens beside those of patches."""
    width, patches = vision.hidden_size, (vision.image_size // vision.patch_size) ** 2
    blocks = _blocks(width, vision.intermediate_size, vision.num_hidden_layers, patches + others)
    ends = 2 * patches * 3 * vision.patch_size**2 * width + 2 * width * projection_dim
    return dataclasses.replace(blocks, products=blocks.products + ends)


def siglip(vision: SiglipVisionConfig) -> Forward:
    """SigLIP's vision tower: one picture. One query of its pooling attends to all patches."""
    tower, width = vision_tower(vision, 0), vision.hidden_size
    patches = (vision.image_size // vision.patch_size) ** 2
    pooling = 2 * 2 * width**2 * (patches + 1) + 2 * 2 * width * vision.intermediate_size
    attention = tower.attention + 2 * 2 * patches * width
    return dataclasses.replace(tower, products=tower.products + pooling, attention=attention)


def blip_text(config: BlipConfig, tokens: int) -> Forward:
    """BLIP's text encoder: one caption, padded to ``tokens``, looking at one picture in every layer."""
    text, image = config.text_config, config.vision_config
    width, layers = text.hidden_size, text.num_hidden_layers
    words = 2 * tokens * (6 * width**2 + 2 * width * text.intermediate_size)
    looked_at = 2 * image.tokens * 2 * width * image.hidden_size
    attention = layers * 2 * 2 * tokens * (tokens + image.tokens) * width
    products = layers * (words + looked_at)
    return Forward(
        products=products,
        first=0.0,
        attention=attention,
        # A norm after each residual reads every product of a block.
        again={"none": 0, "dots": 0, "full": products},
        again_attention={"none": 0, "dots": attention / 2, "full": attention},
    )


def text_tower(config: ClipTextConfig, projection_dim: int | None = None) -> Forward:
    """A reward's text tower, or FLUX's pooled text encoder (without projection): one caption."""
    width = config.hidden_size
    blocks = _blocks(width, config.intermediate_size, config.num_hidden_layers, config.max_position_embeddings)
    return dataclasses.replace(blocks, products=blocks.products + 2 * width * (projection_dim or 0))


def _blocks(width: int, hidden: int, layers: int, tokens: int) -> Forward:
    """CLIP's blocks, which are frozen: a product's output is made again only if a later one of its block needs it."""
    projection, mlp = 2 * width**2 * tokens, 2 * width * hidden * tokens
    attention = layers * 2 * 2 * tokens**2 * width
    return Forward(
        products=layers * (4 * projection + 2 * mlp),
        first=0.0,
        attention=attention,
        again={"none": 0, "dots": 0, "full": layers * (4 * projection + mlp)},
        again_attention={"none": 0, "dots": attention / 2, "full": attention},
    )


def t5(config: T5Config, tokens: int) -> Forward:
    """T5's encoder: one prompt, padded to ``tokens``. It is never differentiated."""
    inner = config.num_heads * config.d_kv
    products = config.num_layers * 2 * tokens * (4 * config.d_model * inner + 3 * config.d_model * config.d_ff)
    nothing = {"none": 0.0, "dots": 0.0, "full": 0.0}
    return Forward(products, 0.0, config.num_layers * 2 * 2 * tokens**2 * inner, nothing, nothing)
