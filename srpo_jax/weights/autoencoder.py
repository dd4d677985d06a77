"""Tables for FLUX's autoencoder: diffusers' ``AutoencoderKL`` and Black Forest Labs' ``ae.safetensors``."""

import dataclasses

from srpo_jax.models.autoencoder import AutoencoderConfig
from srpo_jax.weights.rules import Rule, Table, Transform
from srpo_jax.weights.transforms import conv, identity, linear, pointwise


@dataclasses.dataclass(frozen=True)
class _Names:
    """What a format calls the parts of either side; ``{level}`` and ``{block}`` are filled in."""

    encoder_level: str
    decoder_level: str
    levels_reversed: bool  # whether the decoder's levels are counted from the finest on
    resnet: str
    shortcut: str
    downsample: str
    upsample: str
    mid_resnets: tuple[str, str]
    attention: str
    attention_norm: str
    projections: tuple[str, str, str, str]
    projection: Transform  # of the attention's weights: linear layers, or 1x1 convolutions
    norm_out: str


_DIFFUSERS = _Names(
    encoder_level="encoder.down_blocks.{level}",
    decoder_level="decoder.up_blocks.{level}",
    levels_reversed=False,
    resnet="resnets.{block}",
    shortcut="conv_shortcut",
    downsample="downsamplers.0.conv",
    upsample="upsamplers.0.conv",
    mid_resnets=("mid_block.resnets.0", "mid_block.resnets.1"),
    attention="mid_block.attentions.0",
    attention_norm="group_norm",
    projections=("to_q", "to_k", "to_v", "to_out.0"),
    projection=linear,
    norm_out="conv_norm_out",
)
_BFL = _Names(
    encoder_level="encoder.down.{level}",
    decoder_level="decoder.up.{level}",
    levels_reversed=True,
    resnet="block.{block}",
    shortcut="nin_shortcut",
    downsample="downsample.conv",
    upsample="upsample.conv",
    mid_resnets=("mid.block_1", "mid.block_2"),
    attention="mid.attn_1",
    attention_norm="norm",
    projections=("q", "k", "v", "proj_out"),
    projection=pointwise,
    norm_out="norm_out",
)


def _layer(target: str, source: str, transform: Transform) -> list[Rule]:
    return [
        Rule(f"{target}.kernel", f"{source}.weight", transform),
        Rule(f"{target}.bias", f"{source}.bias", identity),
    ]


def _norm(target: str, source: str) -> list[Rule]:
    return [
        Rule(f"{target}.scale", f"{source}.weight", identity),
        Rule(f"{target}.bias", f"{source}.bias", identity),
    ]


def _resnet(target: str, source: str, shortcut: str | None) -> list[Rule]:
    rules = []
    for index in (1, 2):
        rules += _norm(f"{target}.norm{index}", f"{source}.norm{index}")
        rules += _layer(f"{target}.conv{index}", f"{source}.conv{index}", conv)
    if shortcut is not None:
        rules += _layer(f"{target}.conv_shortcut", f"{source}.{shortcut}", conv)
    return rules


def _side(side: str, config: AutoencoderConfig, names: _Names) -> list[Rule]:
    """The rules of "encoder" or "decoder"."""
    rules = _layer(f"{side}.conv_in", f"{side}.conv_in", conv) + _layer(f"{side}.conv_out", f"{side}.conv_out", conv)
    rules += _norm(f"{side}.norm_out", f"{side}.{names.norm_out}")

    for index, resnet in enumerate(names.mid_resnets):
        rules += _resnet(f"{side}.mid.resnets.{index}", f"{side}.{resnet}", None)
    attention = f"{side}.{names.attention}"
    rules += _norm(f"{side}.mid.attention.norm", f"{attention}.{names.attention_norm}")
    for ours, theirs in zip(("q", "k", "v", "proj"), names.projections, strict=True):
        rules += _layer(f"{side}.mid.attention.{ours}", f"{attention}.{theirs}", names.projection)

    if side == "encoder":
        widths, depth = config.block_out_channels, config.layers_per_block
        ours, theirs, resample, resample_source = "down_blocks", names.encoder_level, "downsample", names.downsample
    else:
        widths, depth = config.block_out_channels[::-1], config.layers_per_block + 1
        ours, theirs, resample, resample_source = "up_blocks", names.decoder_level, "upsample", names.upsample
    inputs = widths[0]
    for level, width in enumerate(widths):
        number = len(widths) - 1 - level if side == "decoder" and names.levels_reversed else level
        target, source = f"{side}.{ours}.{level}", theirs.format(level=number)
        for block in range(depth):
            shortcut = names.shortcut if inputs != width else None
            rules += _resnet(f"{target}.resnets.{block}", f"{source}.{names.resnet.format(block=block)}", shortcut)
            inputs = width
        if level + 1 < len(widths):
            rules += _layer(f"{target}.{resample}.conv", f"{source}.{resample_source}", conv)
    return rules


def _table(config: AutoencoderConfig, names: _Names) -> Table:
    return Table((*_side("encoder", config, names), *_side("decoder", config, names)))


def diffusers_rules(config: AutoencoderConfig) -> Table:
    """diffusers ``AutoencoderKL`` (without quant convolutions) <-> ``Autoencoder``."""
    return _table(config, _DIFFUSERS)


def bfl_rules(config: AutoencoderConfig) -> Table:
    """BFL ``ae.safetensors`` <-> ``Autoencoder``: decoder levels count from the finest, attention is by 1x1 convs."""
    return _table(config, _BFL)
