"""The foreign formats that are read and written: how each is recognised, its table, its config and its file names."""

import dataclasses
import importlib
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from srpo_jax.errors import UserError
from srpo_jax.weights import folder, sources, strangers
from srpo_jax.weights.engine import Source
from srpo_jax.weights.files import Spec, read_json
from srpo_jax.weights.rules import Table


@dataclasses.dataclass(frozen=True)
class Format:
    """A way in which others keep one of our networks.

    Attributes:
      network: ours, see ``folder.NETWORKS``.
      name: "diffusers", "bfl" (Black Forest Labs' single files, also ComfyUI's), "hf" (transformers), "open_clip" or
        "image_reward" (its authors' file).
      marks: groups of tensor names; a file that holds all of a group is in this format, unless an earlier one fits too.
      rules: the function of ``srpo_jax.weights.<module>`` that makes the table from the network's config.
      config: the file with the network's config, and what it calls the network (``_class_name`` or ``model_type``).
      weights: how a folder of this format names its weights, without the suffix.
    """

    network: str
    name: str
    marks: tuple[tuple[str, ...], ...]
    rules: str
    config: tuple[str, str]
    weights: str

    def table(self, config: Any) -> Table:
        """The conversion rules for a network of this config."""
        module = importlib.import_module(folder.NETWORKS[self.network][0].replace(".models.", ".weights."))
        return getattr(module, self.rules)(config)

    @property
    def has_head(self) -> bool:
        """Whether its tensors come from two files, of a tower and of a score's head."""
        return any(mark.startswith(HEAD) for group in self.marks for mark in group)

    def fits(self, specs: Mapping[str, Spec]) -> bool:
        """Whether tensors of these names are in this format."""
        return any(all(mark in specs for mark in group) for group in self.marks)

    def __str__(self) -> str:
        return f"{self.network} ({self.name})"


HEAD = "head."  # before the names of a score's head, which is a file beside that of its tower
# A format whose marks are part of another's comes after it.
FORMATS = (
    Format(
        "blip",
        "image_reward",
        (("blip.visual_encoder.cls_token", "mlp.layers.7.weight"),),
        "image_reward_rules",
        ("med_config.json", "bert"),
        "ImageReward",
    ),
    Format(
        "aesthetic",
        "hf",
        (("vision_model.embeddings.class_embedding", f"{HEAD}layers.7.weight"),),
        "hf_clip_rules",
        ("config.json", "clip"),
        "model",
    ),
    Format(
        "aesthetic",
        "open_clip",
        (("visual.class_embedding", f"{HEAD}layers.7.weight"),),
        "open_clip_rules",
        ("open_clip_config.json", ""),
        "open_clip_model",
    ),
    Format(
        "aesthetic_v25",
        "hf",
        (("vision_model.head.probe", f"{HEAD}scoring_head.8.weight"),),
        "siglip_rules",
        ("config.json", "siglip"),
        "model",
    ),
    Format(
        "flux",
        "diffusers",
        (
            (
                "x_embedder.weight",
                "context_embedder.weight",
                "time_text_embed.text_embedder.linear_1.weight",
                "norm_out.linear.weight",
            ),
        ),
        "diffusers_rules",
        ("config.json", "FluxTransformer2DModel"),
        "diffusion_pytorch_model",
    ),
    Format(
        "flux",
        "bfl",
        (("img_in.weight", "txt_in.weight", "final_layer.linear.weight", "vector_in.in_layer.weight"),),
        "bfl_rules",
        ("config.json", "FluxTransformer2DModel"),
        "flux1",
    ),
    Format(
        "autoencoder",
        "diffusers",
        (("encoder.down_blocks.0.resnets.0.conv1.weight", "decoder.up_blocks.0.resnets.0.conv1.weight"),),
        "diffusers_rules",
        ("config.json", "AutoencoderKL"),
        "diffusion_pytorch_model",
    ),
    Format(
        "autoencoder",
        "bfl",
        (("encoder.down.0.block.0.conv1.weight", "decoder.up.0.block.0.conv1.weight"),),
        "bfl_rules",
        ("config.json", "AutoencoderKL"),
        "ae",
    ),
    Format(
        "clip",
        "hf",
        (("text_model.embeddings.token_embedding.weight", "vision_model.embeddings.class_embedding"),),
        "hf_rules",
        ("config.json", "clip"),
        "model",
    ),
    Format(
        "clip",
        "open_clip",
        (("visual.conv1.weight", "visual.class_embedding", "token_embedding.weight"),),
        "open_clip_rules",
        ("open_clip_config.json", ""),
        "open_clip_model",
    ),
    Format(
        "clip_text",
        "hf",
        (("text_model.embeddings.token_embedding.weight",), ("embeddings.token_embedding.weight",)),
        "hf_text_rules",
        ("config.json", "clip_text_model"),
        "model",
    ),
    Format(
        "t5",
        "hf",
        (("encoder.block.0.layer.0.SelfAttention.q.weight",),),
        "hf_rules",
        ("config.json", "t5"),
        "model",
    ),
)


def detect(specs: Mapping[str, Spec], where: Any, said: str = "") -> Format:
    """The format of a weight file, from its tensor names. Raises UserError saying what the file is instead; ``said`` is
    what a config beside it calls it."""
    words = strangers.never_ours(specs)
    if words is None:
        for form in FORMATS:
            if form.fits(specs):
                return form
        words = strangers.described(specs, "" if said in {form.config[1] for form in FORMATS} else said)
    raise UserError(f"{where} {words}")


def find(network: str, name: str) -> Format:
    """The format of a network by its name. Raises UserError if there is none."""
    names = [form.name for form in FORMATS if form.network == network]
    if name not in names:
        raise UserError(f"there is no format {name!r} of the network {network!r}; known: {', '.join(names)}")
    return next(form for form in FORMATS if (form.network, form.name) == (network, name))


def written_as(network: str, style: str) -> Format | None:
    """The format for a network in an export of a style ("diffusers", "bfl", "comfyui"), None if it has no place there.

    Text encoders are in transformers' names in every style; BFL's own files hold none, ComfyUI has no use for rewards.
    Scores with a head of their own are read by no other program under any of these names.
    """
    if network in ("blip", "aesthetic", "aesthetic_v25"):
        return None
    if network in ("flux", "autoencoder"):
        return find(network, "diffusers" if style == "diffusers" else "bfl")
    if style == "bfl" or (style == "comfyui" and network == "clip"):
        return None
    return find(network, "hf")


def open_network(
    path: pathlib.Path, network: str | None = None, name: str | None = None, head: pathlib.Path | None = None
) -> tuple[Format, Source]:
    """Opens the weights of one network, a file or a component's folder.

    Args:
      path: the file or folder.
      network, name: what its network and format must be; None takes what they are.
      head: a file with the head of the score whose tower ``path`` is.

    Raises UserError if there is nothing readable or it is not what was asked for.
    """
    names = [file for file in sources.WEIGHT_FILES if name != "open_clip" or file.startswith("open_clip")]
    source = sources.open_source(path, names)
    if head is None:
        form = detect(source.specs, source.path, _said(path / "config.json") if path.is_dir() else "")
    else:
        source = sources.JoinedSource(source, sources.open_file(head), HEAD)
        form = next((form for form in FORMATS if form.has_head and form.fits(source.specs)), None)
        if form is None:
            raise UserError(
                f"{path} and {head} make no score: LAION's head (layers.7.weight) belongs to a CLIP, V2.5's "
                "(scoring_head.8.weight) to a SigLIP"
            )
    if network not in (None, form.network) or name not in (None, form.name):
        raise UserError(f"{source.path} looks like {form}; expected {' '.join(filter(None, (network, name)))}")
    return form, source


# --- configs ---


def find_config(form: Format, path: pathlib.Path, source: Source, given: Any = None) -> tuple[Any, str]:
    """A network's config from a given file, from beside the weights, or assumed; and a remark if it was assumed.

    Raises UserError if the file does not describe the network, or there is none and nothing can be assumed.
    """
    if given is not None:
        return parse_config(form, read_json(pathlib.Path(given)), given), ""
    found = config_beside(form, path)
    if found is not None:
        return found, ""
    assumed = assumed_config(form, source.specs, source.path)
    return assumed, f" (no {form.config[0]} beside it, so usual sizes were assumed; --config gives others)"


def parse_config(form: Format, content: Mapping[str, Any], where: Any) -> Any:
    """A network's config from a foreign config.json, an open_clip_config.json or our own. Raises UserError."""
    if form.network in ("clip", "aesthetic") and ("model_cfg" in content or "vision_cfg" in content):
        from srpo_jax.models.clip import ClipConfig

        try:
            content = dataclasses.asdict(ClipConfig.from_open_clip(content))
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
    if str(content.get("format", "")).startswith("srpo_jax/"):
        content = content.get("config", {})
    elif form.network == "clip_text" and "text_config" in content:
        content = content["text_config"]
    return folder.make_config(form.network, content, where)


def _said(file: pathlib.Path) -> str:
    """What a config.json of diffusers or transformers calls its network; "" if there is none."""
    content = read_json(file) if file.is_file() else {}
    return str(content.get("_class_name") or content.get("model_type") or "")


def config_beside(form: Format, path: pathlib.Path) -> Any | None:
    """The config that lies in the folder of a weight file, None if there is none of this network.

    Raises UserError if the folder was what the user named and its config is of another network.
    """
    place = path if path.is_dir() else path.parent
    file = place / form.config[0]
    if not file.is_file():
        return None
    content, said = read_json(file), _said(file)
    if said != form.config[1]:
        if path.is_dir():
            raise UserError(f"{file} describes {said or 'something unnamed'}, but the weights look like {form}")
        return None
    return parse_config(form, content, file)


def assumed_config(form: Format, specs: Mapping[str, Spec], where: Any) -> Any:
    """The config of a file that comes without one: FLUX by its tensors, the others as FLUX.1 and HPS-v2.1 have them.

    Whether the assumption holds shows when the shapes are checked. Raises UserError where nothing can be assumed.
    """
    from srpo_jax.models import clip, t5

    if form.network == "flux":
        return _flux_config(form, specs, where)
    if (form.network, form.name) == ("clip", "open_clip"):
        return clip.VIT_H_14
    if form.network == "clip":
        raise UserError(f"{where} has no config.json beside it; give --config")
    if form.network == "clip_text":
        return clip.ClipTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)  # CLIP-L
    if form.network == "t5":
        return t5.T5Config.from_dict(T5_XXL)
    return folder.classes(form.network)[0]()


T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
}
_FLUX_TENSORS = {  # (image, text, pooled, out, norm, guidance, double blocks, single blocks)
    "diffusers": (
        "x_embedder.weight",
        "context_embedder.weight",
        "time_text_embed.text_embedder.linear_1.weight",
        "proj_out.weight",
        "transformer_blocks.0.attn.norm_q.weight",
        "time_text_embed.guidance_embedder.linear_1.weight",
        "transformer_blocks",
        "single_transformer_blocks",
    ),
    "bfl": (
        "img_in.weight",
        "txt_in.weight",
        "vector_in.in_layer.weight",
        "final_layer.linear.weight",
        "double_blocks.0.img_attn.norm.query_norm.scale",
        "guidance_in.in_layer.weight",
        "double_blocks",
        "single_blocks",
    ),
}


def _flux_config(form: Format, specs: Mapping[str, Spec], where: Any) -> Any:
    image, text, pooled, out, norm, guidance, double, single = _FLUX_TENSORS[form.name]
    try:
        head_dim = specs[norm].shape[0]
        width, in_channels = specs[image].shape
        values = {
            "in_channels": in_channels,
            "out_channels": specs[out].shape[0],
            "attention_head_dim": head_dim,
            "num_attention_heads": width // head_dim,
            "joint_attention_dim": specs[text].shape[1],
            "pooled_projection_dim": specs[pooled].shape[1],
            "guidance_embeds": guidance in specs,
        }
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{where} lacks tensors of a FLUX transformer: {error}; is the file complete?") from error
    for key, blocks in (("num_layers", double), ("num_single_layers", single)):
        numbers = [int(match[1]) for name in specs if (match := re.match(rf"{blocks}\.(\d+)\.", name))]
        values[key] = max(numbers, default=-1) + 1
    if head_dim != 128:
        raise UserError(f"{where} is not of FLUX.1's head size 128 (but {head_dim}); give its config.json by --config")
    return folder.make_config("flux", values | {"axes_dims_rope": (16, 56, 56)}, where)


def foreign_config(network: str, config: Any) -> dict[str, Any]:
    """The ``config.json`` that diffusers or transformers need beside the weights of a network.

    Our configs have the keys of theirs; added is what tells them the class and what we do not vary.
    """
    values = dataclasses.asdict(config)
    if network == "flux":
        return {"_class_name": "FluxTransformer2DModel", "patch_size": 1} | values
    if network == "autoencoder":
        levels = len(config.block_out_channels)
        return {
            "_class_name": "AutoencoderKL",
            "act_fn": "silu",
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "mid_block_add_attention": True,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "force_upcast": True,
        } | values
    # transformers' default for the begin-of-text token, which no forward pass reads, may lie outside of the vocabulary.
    text = {"model_type": "clip_text_model", "bos_token_id": None}
    if network == "clip_text":
        return {"architectures": ["CLIPTextModel"]} | text | values
    if network == "clip":
        added = {"text_config": text, "vision_config": {"model_type": "clip_vision_model"}}
        towers = {key: more | values[key] | {"projection_dim": config.projection_dim} for key, more in added.items()}
        return {"architectures": ["CLIPModel"], "model_type": "clip"} | values | towers
    return {"architectures": ["T5EncoderModel"], "model_type": "t5", "feed_forward_proj": "gated-gelu"} | values
