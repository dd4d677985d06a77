"""The converter from its outside: real files of the reference packages in, real packages reading what comes out."""

import json
import os
import shutil
import types

import diffusers
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from diffusers.loaders import single_file_utils
from helpers import references
from helpers.folders import same_files, tensors

from srpo_jax import checkpoint, convert, importing, integrity
from srpo_jax.algorithm.step import TrainState
from srpo_jax.emoji import tokenizers
from srpo_jax.errors import UserError
from srpo_jax.families.flux import FLUX
from srpo_jax.weights import engine, folder, formats
from srpo_jax.weights.files import SafetensorsFile

BF16 = np.dtype(ml_dtypes.bfloat16)
COMPONENTS = ("transformer", "vae", "text_encoder", "text_encoder_2")


def prefixed(found):
    """CLIP text tensors under the names of the hub's files; transformers 5 leaves the prefix out."""
    return {name if name.startswith("text_model.") else f"text_model.{name}": value for name, value in found.items()}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, dtype):
    """A diffusers pipeline folder, its transformer and autoencoder in several files."""
    path = tmp_path_factory.mktemp("diffusers") / "pipeline"
    references.flux_pipeline(path, getattr(torch, dtype), shard="100KB")
    return path


@pytest.fixture(scope="module")
def ours(pipeline, tmp_path_factory):
    """The same pipeline in our format."""
    path = tmp_path_factory.mktemp("ours") / "pipeline"
    convert.import_folder(pipeline, path)
    return path


# --- pipelines: round trips ---


def test_import_keeps_the_dtype_and_takes_along_what_is_no_network(pipeline, ours, dtype):
    assert len(list((pipeline / "transformer").glob("*.safetensors"))) > 1
    for part in COMPONENTS:
        assert sorted(os.listdir(ours / part)) == [integrity.BESIDE, folder.CONFIG, folder.WEIGHTS]
        assert folder.read_config(ours / part)[0] == FLUX.components[part].network
        assert {spec.dtype.name for spec in SafetensorsFile(ours / part / folder.WEIGHTS).specs.values()} == {dtype}
    for name in ("tokenizer", "tokenizer_2", "scheduler"):
        assert same_files(pipeline / name, ours / name)
    assert sorted(os.listdir(ours)) == sorted(os.listdir(pipeline))


def test_diffusers_round_trip_is_exact(pipeline, ours, tmp_path):
    convert.export_folder(ours, tmp_path / "back", "diffusers")
    for part in COMPONENTS:
        expected, found = tensors(pipeline / part), tensors(tmp_path / "back" / part)
        if part == "text_encoder":
            expected = prefixed(expected)
        assert found == expected, part
    for name in ("tokenizer", "tokenizer_2", "scheduler"):
        assert same_files(pipeline / name, tmp_path / "back" / name)
    # And once more round: our own files are the same to the byte.
    convert.import_folder(tmp_path / "back", tmp_path / "again")
    for part in COMPONENTS:
        assert same_files(ours / part, tmp_path / "again" / part), part


def test_diffusers_loads_the_exported_pipeline(pipeline, ours, tmp_path, dtype):
    convert.export_folder(ours, tmp_path / "out", "diffusers", max_shard_size=100_000)
    assert (tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    load = {"torch_dtype": getattr(torch, dtype), "local_files_only": True}
    expected = diffusers.FluxPipeline.from_pretrained(pipeline, **load)
    found = diffusers.FluxPipeline.from_pretrained(tmp_path / "out", **load)
    for part in COMPONENTS:
        a, b = getattr(expected, part).state_dict(), getattr(found, part).state_dict()
        assert a.keys() == b.keys() and len(a) > 10
        assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a), part
    assert dict(expected.scheduler.config) == dict(found.scheduler.config)
    assert found.tokenizer("a red bird").input_ids == expected.tokenizer("a red bird").input_ids
    if dtype == "bfloat16":
        return
    # The settings that decide what is computed came through too: the same images, up to the order of torch's sums.
    images = [
        pipe(
            "a red bird",
            height=32,
            width=32,
            num_inference_steps=2,
            max_sequence_length=references.TEXT_LENGTH,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images
        for pipe in (expected, found)
    ]
    assert np.abs(images[0] - images[1]).max() < 1e-5 and images[0].std() > 0.01


@pytest.mark.parametrize("dtype", ["bfloat16"], indirect=True)
def test_single_components_load_in_their_packages(pipeline, ours, tmp_path):
    classes = {
        "transformer": diffusers.FluxTransformer2DModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.CLIPTextModel,
        "text_encoder_2": transformers.T5EncoderModel,
    }
    for part, reference in classes.items():
        convert.export_folder(ours / part, tmp_path / part, "diffusers")
        expected = reference.from_pretrained(pipeline / part).state_dict()
        found = reference.from_pretrained(tmp_path / part).state_dict()
        assert expected.keys() == found.keys() and all(torch.equal(expected[n], found[n]) for n in expected), part


@pytest.mark.parametrize("style", ["bfl", "comfyui"])
def test_single_file_round_trip_is_exact(ours, tmp_path, style):
    convert.export_folder(ours, tmp_path / "out", style)
    places = {
        "bfl": {"transformer": "flux1", "vae": "ae"},
        "comfyui": {
            "transformer": "diffusion_models/flux1",
            "vae": "vae/ae",
            "text_encoder": "text_encoders/clip_l",
            "text_encoder_2": "text_encoders/t5xxl",
        },
    }[style]
    made = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*"))
    assert made == sorted(f"{place}.safetensors" for place in places.values())
    for part, place in places.items():
        file = tmp_path / "out" / f"{place}.safetensors"
        convert.import_folder(file, tmp_path / part, config=ours / part / folder.CONFIG)
        assert same_files(ours / part, tmp_path / part), part


def with_width(function, width):
    """diffusers' converter of BFL files has FLUX.1's width built in: the same code with another."""
    code = function.__code__
    assert 3072 in code.co_consts
    code = code.replace(co_consts=tuple(width if value == 3072 else value for value in code.co_consts))
    return types.FunctionType(code, function.__globals__)


def test_diffusers_converts_our_single_files_to_the_same_tensors(pipeline, ours, tmp_path):
    convert.export_folder(ours, tmp_path, "bfl")
    config = json.loads((pipeline / "vae" / "config.json").read_text())
    width = folder.read_config(ours / "transformer")[1].width
    flux = with_width(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers, width)
    for part, file, convert_theirs in (
        ("transformer", "flux1", flux),
        ("vae", "ae", lambda checkpoint: single_file_utils.convert_ldm_vae_checkpoint(checkpoint, config)),
    ):
        found = convert_theirs(safetensors.torch.load_file(tmp_path / f"{file}.safetensors"))
        expected = {}
        for shard in (pipeline / part).glob("*.safetensors"):
            expected |= safetensors.torch.load_file(shard)
        assert found.keys() == expected.keys() and len(found) > 10, part
        assert all(torch.equal(found[name], expected[name]) for name in expected), part


def test_transformer_without_guidance_embedding(tmp_path):
    reference = references.flux_transformer(guidance=False)
    reference.save_pretrained(tmp_path / "theirs")
    convert.import_folder(tmp_path / "theirs", tmp_path / "ours")
    assert not folder.read_config(tmp_path / "ours")[1].guidance_embeds
    convert.export_folder(tmp_path / "ours", tmp_path / "back", "diffusers")
    assert tensors(tmp_path / "back") == tensors(tmp_path / "theirs")


def test_casting(pipeline, ours, tmp_path, dtype):
    other = {"float32": "bfloat16", "bfloat16": "float32"}[dtype]
    convert.import_folder(pipeline / "vae", tmp_path / "cast", dtype=convert.DTYPES[other])
    convert.export_folder(ours / "vae", tmp_path / "out", "diffusers", dtype=convert.DTYPES[other])
    convert.import_folder(tmp_path / "out", tmp_path / "again")
    assert same_files(tmp_path / "cast", tmp_path / "again")
    before, after = (SafetensorsFile(p / folder.WEIGHTS) for p in (ours / "vae", tmp_path / "cast"))
    for name in before.specs:
        assert after.read(name).dtype.name == other
        assert np.array_equal(after.read(name), before.read(name).astype(convert.DTYPES[other]))


@pytest.mark.parametrize("dtype", ["bfloat16"], indirect=True)
def test_pipeline_put_together_by_hand_exports(ours, pipeline, tmp_path):
    shutil.copytree(ours, tmp_path / "ours")
    (tmp_path / "ours" / importing.INDEX).unlink()
    convert.export_folder(tmp_path / "ours", tmp_path / "out", "diffusers")
    index = json.loads((tmp_path / "out" / importing.INDEX).read_text())
    expected = json.loads((pipeline / importing.INDEX).read_text())
    assert index == {name: value for name, value in expected.items() if name in index}
    assert set(COMPONENTS) < set(index)


@pytest.mark.parametrize("dtype", ["bfloat16"], indirect=True)
def test_trained_parameters_replace_the_transformer(ours, tmp_path):
    config, _, params = folder.load(ours / "transformer")

    def scaled(factor):
        return jax.tree.map(lambda leaf: leaf * factor, params)

    run = checkpoint.Checkpoints(tmp_path / "run", keep=2)
    for step in (6, 7):
        state = TrainState(jax.device_put(np.int32(step)), scaled(step), {"count": jnp.zeros(())}, scaled(step / 2))
        run.save(step, state, {})
    run.close()
    command = ["export", "--source", str(ours), "--format", "diffusers", "--checkpoint", str(tmp_path / "run")]
    for name, factor, flags in (("latest", 7, []), ("average", 3, ["--step", "6", "--ema"])):
        convert.main([*command, "--target", str(tmp_path / name), *flags])
        folder.save(tmp_path / f"{name} expected", "flux", config, scaled(factor))
        convert.export_folder(tmp_path / f"{name} expected", tmp_path / f"{name} single", "diffusers")
        assert tensors(tmp_path / name / "transformer") == tensors(tmp_path / f"{name} single")
        assert sorted(os.listdir(tmp_path / name)) == sorted(os.listdir(ours))
    convert.main([*command, "--target", str(tmp_path / "cast"), "--dtype", "bfloat16"])
    assert {spec.dtype for spec, _ in tensors(tmp_path / "cast" / "transformer").values()} == {BF16}

    with pytest.raises(UserError, match="give one"):
        convert.main([*command[:5], "--target", str(tmp_path / "no"), "--ema"])
    short = {**params, "img_in": {"kernel": params["img_in"]["kernel"]}}
    with pytest.raises(UserError, match="1 parameters differ, as img_in.bias"):
        convert.export_folder(ours, tmp_path / "no", "bfl", transformer=short)
    with pytest.raises(UserError, match="a checkpoint has none to put there"):
        convert.export_folder(ours / "vae", tmp_path / "no", "bfl", transformer=params)
    assert not (tmp_path / "no").exists()


# --- CLIP rewards ---


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return references.save_clip(tmp_path_factory.mktemp("clip") / "hf")


def write_words(path, size=64):
    """A CLIP tokenizer of ``size`` ids, the last of which ends a text."""
    path.mkdir(exist_ok=True)
    tokens = [chr(33 + number) for number in range(size - 2)] + [tokenizers.START, tokenizers.END]
    specials = {"bos_token": tokenizers.START, "eos_token": tokenizers.END, "pad_token": tokenizers.END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "unk_token": tokenizers.END} | specials
    (path / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


OPEN_CLIP = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 28, "layers": 3, "width": 24, "head_width": 12, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 64, "width": 16, "heads": 2, "layers": 2},
}


def open_clip_tensors(path):
    """A folder in our format -> the same network in open_clip's names, with torch tensors."""
    _, config, source = folder.open_weights(path, "clip")
    arrays = {name: source.read(name) for name in source.specs}
    params = engine.unflatten(arrays, folder.abstract("clip", config)[1])
    table = formats.find("clip", "open_clip").table(config)
    return {name: torch.from_numpy(array.copy()) for name, array in engine.from_params(table, params).items()}


def test_clip_round_trips_in_both_formats(clip, tmp_path):
    convert.import_folder(clip, tmp_path / "ours")
    convert.export_folder(tmp_path / "ours", tmp_path / "hf", "diffusers")
    expected = tensors(clip)
    del expected["text_model.embeddings.position_ids"]
    assert tensors(tmp_path / "hf") == expected
    found = transformers.CLIPModel.from_pretrained(tmp_path / "hf").state_dict()
    reference = references.clip().state_dict()
    assert found.keys() == reference.keys() and all(torch.equal(found[n], reference[n]) for n in reference)

    there = open_clip_tensors(tmp_path / "ours")
    assert there["transformer.resblocks.1.attn.in_proj_weight"].shape == (48, 16)
    (tmp_path / "oc").mkdir()
    (tmp_path / "oc" / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP, "preprocess_cfg": {}}))
    safetensors.numpy.save_file(
        {name: t.numpy() for name, t in there.items()}, tmp_path / "oc" / "open_clip_model.safetensors"
    )
    convert.import_folder(tmp_path / "oc", tmp_path / "from_oc")
    assert (tmp_path / "from_oc" / folder.WEIGHTS).read_bytes() == (tmp_path / "ours" / folder.WEIGHTS).read_bytes()


def test_hps_pickle_with_a_tokenizer_from_elsewhere(clip, tmp_path):
    convert.import_folder(clip, tmp_path / "ours")
    torch.save({"epoch": 1, "state_dict": open_clip_tensors(tmp_path / "ours")}, tmp_path / "HPS.pt")
    (tmp_path / "config.json").write_text(json.dumps(OPEN_CLIP))
    write_words(tmp_path / "words")
    (tmp_path / "words" / "unrelated.txt").write_text("unrelated")
    convert.import_folder(
        tmp_path / "HPS.pt",
        tmp_path / "hps",
        network="clip",
        config=tmp_path / "config.json",
        tokenizer=tmp_path / "words",
    )
    assert (tmp_path / "hps" / folder.WEIGHTS).read_bytes() == (tmp_path / "ours" / folder.WEIGHTS).read_bytes()
    assert sorted(os.listdir(tmp_path / "hps" / "tokenizer")) == ["merges.txt", "tokenizer_config.json", "vocab.json"]
    # Without a config it is taken for ViT-H-14, as HPS-v2.1 is, which this small one is not.
    with pytest.raises(
        UserError,
        match=r"usual sizes were assumed; --config.* token_embedding.weight \[64, 16\] "
        r"instead of \[49408, 1024\]",
    ):
        convert.import_folder(tmp_path / "HPS.pt", tmp_path / "no")
    with pytest.raises(UserError, match="holds no tokenizer"):
        convert.import_folder(
            tmp_path / "HPS.pt", tmp_path / "no", config=tmp_path / "config.json", tokenizer=tmp_path / "hps"
        )
    assert not (tmp_path / "no").exists()


def test_folder_with_the_same_network_twice(clip, tmp_path):
    shutil.copytree(clip, tmp_path / "hub")
    write_words(tmp_path / "hub")
    convert.import_folder(clip, tmp_path / "ours")
    torch.save(open_clip_tensors(tmp_path / "ours"), tmp_path / "hub" / "open_clip_pytorch_model.bin")
    (tmp_path / "hub" / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP}))
    for name in (None, "hf", "open_clip"):
        convert.import_folder(tmp_path / "hub", tmp_path / f"ours {name}", format=name)
        weights = (tmp_path / f"ours {name}" / folder.WEIGHTS).read_bytes()
        assert weights == (tmp_path / "ours" / folder.WEIGHTS).read_bytes()
        assert "vocab.json" in os.listdir(tmp_path / f"ours {name}" / "tokenizer")


def test_a_rewards_tokenizer_is_the_networks(clip, tmp_path, capsys):
    """One of another network is refused before anything is written; that there is none, or another goes, is said."""
    shutil.copytree(clip, tmp_path / "hub")
    convert.import_folder(tmp_path / "hub", tmp_path / "bare")
    assert "note: no tokenizer went along; a run wants it in " in (said := capsys.readouterr().out)
    assert str(tmp_path / "bare" / "tokenizer") in said
    write_words(tmp_path / "hub")
    convert.import_folder(tmp_path / "hub", tmp_path / "beside")
    same = write_words(tmp_path / "same")
    convert.import_folder(tmp_path / "hub", tmp_path / "equal", tokenizer=same)
    assert capsys.readouterr().out == ""
    other = write_words(tmp_path / "other")
    (other / "merges.txt").write_text("#version: 0.2\nA B\n")
    vocabulary = json.loads((other / "vocab.json").read_text())
    vocabulary["AB"] = vocabulary.pop("!")
    (other / "vocab.json").write_text(json.dumps(vocabulary))
    convert.import_folder(tmp_path / "hub", tmp_path / "replaced", tokenizer=other)
    assert f"note: the tokenizer of {other} went along, in place of the one beside" in capsys.readouterr().out
    assert (tmp_path / "replaced" / "tokenizer" / "merges.txt").read_text().endswith("A B\n")
    for size, words in ((65, "its ids reach 64, the network's end at 63"), (63, "it ends a text with 62, the network")):
        wrong = write_words(tmp_path / f"words {size}", size)
        with pytest.raises(UserError, match=f"words {size} is not this network's tokenizer: {words}"):
            convert.import_folder(tmp_path / "hub", tmp_path / "no", tokenizer=wrong)
        write_words(tmp_path / "hub", size)
        with pytest.raises(UserError, match=f"hub is not this network's tokenizer: {words}"):
            convert.import_folder(tmp_path / "hub", tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("dtype", ["bfloat16"], indirect=True)
def test_tokenizers_of_a_pipeline_are_its_encoders(pipeline, tmp_path):
    """Exchanged, they are refused before anything is written."""
    shutil.copytree(pipeline, tmp_path / "in")
    (tmp_path / "in" / "tokenizer").rename(tmp_path / "in" / "other")
    (tmp_path / "in" / "tokenizer_2").rename(tmp_path / "in" / "tokenizer")
    (tmp_path / "in" / "other").rename(tmp_path / "in" / "tokenizer_2")
    with pytest.raises(UserError, match="in/tokenizer_2 is not this network's tokenizer"):
        convert.import_folder(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- files without a config ---


def test_transformer_file_without_config_tells_its_sizes(tmp_path):
    reference = references.flux_transformer(
        attention_head_dim=128, num_attention_heads=1, num_layers=1, num_single_layers=2, axes_dims_rope=(16, 56, 56)
    )
    reference.save_pretrained(tmp_path / "theirs")
    convert.import_folder(tmp_path / "theirs", tmp_path / "known")
    (tmp_path / "theirs" / "config.json").unlink()
    convert.import_folder(tmp_path / "theirs" / "diffusion_pytorch_model.safetensors", tmp_path / "guessed")
    assert same_files(tmp_path / "known", tmp_path / "guessed")
    convert.export_folder(tmp_path / "known", tmp_path / "bfl", "bfl")
    convert.import_folder(tmp_path / "bfl" / "flux1.safetensors", tmp_path / "from_bfl")
    assert same_files(tmp_path / "known", tmp_path / "from_bfl")
    # Some nodes of ComfyUI save under a prefix.
    arrays = safetensors.numpy.load_file(tmp_path / "bfl" / "flux1.safetensors")
    renamed = {f"model.diffusion_model.{name}": array for name, array in arrays.items()}
    safetensors.numpy.save_file(renamed, tmp_path / "comfy.safetensors")
    convert.import_folder(tmp_path / "comfy.safetensors", tmp_path / "from_comfy")
    assert same_files(tmp_path / "known", tmp_path / "from_comfy")


@pytest.mark.parametrize("dtype", ["bfloat16"], indirect=True)
def test_config_of_another_network_beside_a_loose_file_is_not_taken(ours, tmp_path):
    convert.export_folder(ours, tmp_path, "bfl")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(UserError, match="head size 128 .*give its config.json by --config"):
        convert.import_folder(tmp_path / "flux1.safetensors", tmp_path / "out")
    # The autoencoder is taken for FLUX.1's.
    with pytest.raises(UserError, match="autoencoder config lacks"):
        convert.import_folder(tmp_path / "ae.safetensors", tmp_path / "out")
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"usual sizes were assumed.* instead of \[128, 3, 3, 3\]"):
        convert.import_folder(tmp_path / "ae.safetensors", tmp_path / "out")
