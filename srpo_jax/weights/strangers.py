"""What a weight file is that holds none of our networks: called by its name, so that nobody looks for a fault in it.

Each is known by a part of a tensor's name. The names are those of diffusers' classes, of the models' own files, and of
ComfyUI's ``model_detection.py``, which reads these; tests hold the patterns to diffusers' networks.
"""

import re
from collections.abc import Iterable

# Networks that share blocks or names with ours. Asked before our formats: some have all of a format's marks.
_FAMILIES = (
    (r"^(double|single)_stream_modulation(_img|_txt)?\.", "a FLUX.2 transformer"),
    (r"^distilled_guidance_layer\.", "a Chroma transformer"),
    (r"^transformer_blocks\.\d+\.(img|txt)_mod\.", "a Qwen-Image transformer"),
    (r"^txt_in\.individual_token_refiner\.|^context_embedder\.token_refiner\.", "a HunyuanVideo transformer"),
    (r"^double_blocks\.\d+\.(img|txt)_mlp\.(gate|up)_proj\.|^context_embedder_norm\.", "an Ovis-Image transformer"),
    (r"^caption_projection\.\d+\.linear\.|^double_stream_blocks\.", "a HiDream transformer"),
    (r"^(all_)?(noise|context)_refiner\.", "a Lumina 2 or Z-Image transformer"),
    (r"^redux_(up|down)\.", "FLUX.1 Redux's image encoder"),
    (r"^joint_blocks\.|^joint_transformer_blocks\.|^pos_embed\.proj\.weight", "a Stable Diffusion 3 transformer"),
    (r"^blocks\.\d+\.(self_attn\.q|attn1\.to_q)\.", "a Wan transformer"),
    (r"^down_blocks\.\d+\.(attentions|resnets)|^input_blocks\.", "a U-Net of Stable Diffusion"),
    (r"^controlnet_|^control_net", "a ControlNet"),
)
# Files in a form that is not read, of our networks or of others. Factors tell themselves whatever they are for.
_FACTORS = (
    (
        r"\.lora_|^lora_|\.lora\.|\.hada_w\d|\.lokr_w\d",
        "a LoRA: merge it into its base model first, or train on from it by config.lora.init",
    ),
)
_FORMS = (
    (
        r"\.comfy_quant$|\.quant_state|\.absmax$|scale_weight$|^scaled_fp8$|\.(input|weight)_scale(_2)?$|\.SCB$"
        r"|\.q(weight|zeros)$|\.wscales$",
        "a quantised checkpoint: use the original weights",
    ),
    (
        r"^model\.diffusion_model\.|^first_stage_model\.|^cond_stage_model\.|^conditioner\.|^text_encoders\.",
        "an all-in-one checkpoint: use the transformer, autoencoder and text encoders as separate files",
    ),
    (r"^decoder\.block\.\d+\.layer", "a T5 with its decoder: use the encoder alone (FLUX's text_encoder_2)"),
)
_OTHERS = (
    (r"^model\.layers\.\d+\.self_attn", "a language model"),
    (r"^encoder\.layer\.\d+\.attention", "a BERT"),
    (r"^visual\.trunk\.|^text\.transformer\.", "an open_clip model that is not of its plain ViT family"),
    (r"^vision_model\.", "a vision transformer without its text half"),
)
# Halves of what is read together. A SigLIP's text tower has the names of a CLIP's.
_HALVES = (
    (r"^vision_model\.head\.probe", "a SigLIP: as the tower of an aesthetic score it takes the score's head by --head"),
    (
        r"^(layers|scoring_head)\.[24]\.weight",
        "an aesthetic score's head: give it by --head, its tower as --source",
    ),
)
# Every name that a FLUX.1 transformer's file can hold, diffusers' and BFL's: a file of these alone is a part of one.
_LAYER = r"(weight|bias)"
_FLUX = re.compile(
    rf"double_blocks\.\d+\.(img|txt)_(mod\.lin|attn\.(qkv|proj)|mlp\.[02])\.{_LAYER}"
    r"|double_blocks\.\d+\.(img|txt)_attn\.norm\.(query|key)_norm\.scale"
    rf"|single_blocks\.\d+\.(linear[12]|modulation\.lin)\.{_LAYER}|single_blocks\.\d+\.norm\.(query|key)_norm\.scale"
    rf"|(img_in|txt_in|(time|vector|guidance)_in\.(in|out)_layer|final_layer\.(linear|adaLN_modulation\.1))\.{_LAYER}"
    rf"|transformer_blocks\.\d+\.(norm1(_context)?\.linear|ff(_context)?\.net\.(0\.proj|2))\.{_LAYER}"
    rf"|transformer_blocks\.\d+\.attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)\.{_LAYER}"
    r"|transformer_blocks\.\d+\.attn\.norm_(added_)?[qk]\.weight"
    rf"|single_transformer_blocks\.\d+\.(norm\.linear|proj_mlp|proj_out|attn\.to_[qkv])\.{_LAYER}"
    r"|single_transformer_blocks\.\d+\.attn\.norm_[qk]\.weight"
    rf"|(x_embedder|context_embedder|proj_out|norm_out\.linear)\.{_LAYER}"
    rf"|time_text_embed\.(timestep|text|guidance)_embedder\.linear_[12]\.{_LAYER}"
)


def _first(kinds: Iterable[tuple[str, str]], names: Iterable[str]) -> str | None:
    for pattern, words in kinds:
        if any(re.search(pattern, name) for name in names):
            return words
    return None


def never_ours(names: Iterable[str]) -> str | None:
    """What a file is whose names tell that it is none of ours whatever else it holds, as a predicate; else None."""
    if words := _first(_FACTORS, names):
        return f"looks like {words}"
    if words := _first(_FAMILIES, names):
        return f"is {words}, which is not supported"
    if words := _first((*_FORMS, *_HALVES), names):
        return f"looks like {words}"
    return None


def described(names: Iterable[str], said: str) -> str:
    """What a file is that is in none of our formats, as a predicate; ``said``: what a config beside it calls it."""
    names = list(names)
    if names and all(_FLUX.fullmatch(name) for name in names):
        return "looks like a part of a FLUX transformer: give the folder, or the index.json that joins the parts"
    if said:
        return f"is what its config.json says, a {said}, which is not supported"
    some = ", ".join(names[:3])
    return "looks like " + (
        _first(_OTHERS, names) or f"no network that is known here ({len(names)} tensors, as {some})"
    )
