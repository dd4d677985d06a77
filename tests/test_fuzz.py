"""Every reader, given what it reads with random damage: it reads that, or says in one line what is wrong with it.

The damage is the same every time. ``TRIALS`` of each kind take seconds; a search for more is ``TRIALS=10000``.
"""

import copy
import dataclasses
import functools
import io
import json
import os
import random

import numpy as np
import pytest
import safetensors.numpy
from helpers import tiny
from helpers.photos import picture, write_folder

from srpo_jax import families, generate, importing, integrity, metrics, record, text
from srpo_jax.data import images, sources, stored
from srpo_jax.errors import UserError
from srpo_jax.evaluation import records
from srpo_jax.families.flux import read_scheduler
from srpo_jax.models.clip import VIT_H_14
from srpo_jax.models.lora import Lora
from srpo_jax.weights import adapters, folder, formats
from srpo_jax.weights import sources as weights_sources
from srpo_jax.weights.files import SafetensorsFile

TRIALS = int(os.environ.get("TRIALS", 30))
STRANGE = [None, True, False, -1, 0, 1, 0.5, 3, 2**31, 2**70, 1e400, float("nan"), "", "x", "\0", "\ud83d", "../x",
           "a" * 300, [], [[]], ["a"], [None], [-1, 2], {}, {"a": 1}, [2**70], "1", "inf", [1] * 100]  # fmt: skip
PIECES = [
    b"\0",
    b"\xff\xfe",
    b"[" * 2000,
    b"{",
    b"}",
    b'"',
    b"null",
    b"-1",
    b"1e999",
    b"9" * 5000,
    b"\n",
    b"\r",
    b",",
    b"\t",
]


def broken_bytes(content, generator):
    """A copy with one to three faults: cut, flipped, pasted into, doubled."""
    content = bytearray(content)
    for _ in range(generator.randint(1, 3)):
        place = generator.randrange(len(content) + 1)
        match generator.randrange(4):
            case 0:
                del content[place:]
            case 1 if content:
                content[min(place, len(content) - 1)] ^= 1 << generator.randrange(8)
            case 2:
                content[place:place] = generator.choice(PIECES)
            case _:
                content[place:place] = content[place : place + generator.randrange(64)]
    return bytes(content)


def broken_json(content, generator):
    """A copy in which one or two values, at any depth, are strange ones or gone."""
    content = {"": copy.deepcopy(content)}
    for _ in range(generator.randint(1, 2)):
        places = []

        def walk(node, places=places):
            for key, value in node.items() if isinstance(node, dict) else enumerate(node):
                places.append((node, key))
                if isinstance(value, dict | list):
                    walk(value)

        walk(content)
        node, key = generator.choice(places)
        if isinstance(node, dict) and key and generator.random() < 0.2:
            del node[key]
        else:
            node[key] = copy.deepcopy(generator.choice(STRANGE))
    return content[""]


def survives(read, allowed=()):
    """Whether a reader read; what it may raise is a line."""
    try:
        read()
    except UserError as error:
        assert "\n" not in str(error) and str(error)
        return False
    except allowed:
        return False
    return True


def fuzz(file, read, content=None, trials=TRIALS, allowed=()):
    """Calls a reader with damaged copies of a file: of its bytes, and of its values if ``content`` is JSON."""
    generator = random.Random(file.name)
    good = file.read_bytes()
    read()
    survived = 0
    for trial in range(trials):
        if content is not None and trial % 3:
            file.write_text(json.dumps(broken_json(content, generator)))
        else:
            file.write_bytes(broken_bytes(good, generator))
        survived += survives(read, allowed)
    file.write_bytes(good)
    assert survived < trials  # some of it was noticed


PARQUET, PROMPTS = "a.parquet", ["a red apple", "ein Bär", "狐", "x, y", "tab\tand 'quotes'"]
ITEMS = [{"prompt": prompt, "id": number} for number, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.jsonl", PARQUET])
def test_prompts(tmp_path, name):
    file, content = tmp_path / name, None
    if name == PARQUET:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"prompt": PROMPTS, "id": list(range(len(PROMPTS)))}), file)
    elif name == "a.json":
        content = ITEMS
        file.write_text(json.dumps(content))
    elif name == "a.jsonl":
        file.write_text("\n".join(map(json.dumps, ITEMS)))
    else:
        mark = "," if name == "a.csv" else "\t"
        file.write_text(f"prompt{mark}id\n" + "".join(f'"{prompt}"{mark}3\n' for prompt in PROMPTS))
    fuzz(file, lambda: sources.read(file), content, 2 * TRIALS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_pictures(kind):
    file, generator = io.BytesIO(), random.Random(kind)
    picture(1).save(file, kind)
    read = [
        survives(lambda: images.upright(broken_bytes(file.getvalue(), generator), 1 << 20), ValueError)
        for _ in range(2 * TRIALS)
    ]
    assert not all(read)


def test_metadata_of_pictures(tmp_path):
    root = write_folder(tmp_path / "photos", ["a", "b"])
    file, content = root / "metadata.jsonl", {"file_name": "0.png", "text": "a fox"}
    file.write_text(json.dumps(content))

    def read():
        images.examine(images.read(root)[0], 32, 48)

    fuzz(file, read, content)


@pytest.mark.parametrize("network", list(folder.NETWORKS))
def test_configs_of_networks(tmp_path, network):
    """Ours; those of others have the same keys."""
    sizes = {"flux": tiny.FLUX, "autoencoder": tiny.VAE, "clip": VIT_H_14}
    if network in sizes or network == "t5":
        values = formats.T5_XXL if network == "t5" else dataclasses.asdict(sizes[network])
    else:
        values = dataclasses.asdict(folder.classes(network)[0]())
    content = {"format": folder.FORMAT, "network": network, "config": json.loads(json.dumps(values))}
    (tmp_path / folder.CONFIG).write_text(json.dumps(content))
    fuzz(tmp_path / folder.CONFIG, lambda: folder.read_config(tmp_path), content, 3 * TRIALS)


def test_the_config_of_open_clip():
    content = {"model_cfg": {"embed_dim": 8, "vision_cfg": {"width": 64, "layers": 1}, "text_cfg": {"width": 64}}}
    form, generator = formats.find("clip", "open_clip"), random.Random(0)
    formats.parse_config(form, content, "it")
    for _ in range(4 * TRIALS):
        if isinstance(broken := broken_json(content, generator), dict):
            survives(functools.partial(formats.parse_config, form, broken, "it"))


def test_a_scheduler(tmp_path):
    (tmp_path / "scheduler").mkdir()
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(tiny.SCHEDULER))
    fuzz(file, lambda: read_scheduler(tmp_path), tiny.SCHEDULER, 3 * TRIALS)


def test_the_index_of_a_pipeline(tmp_path):
    content = {"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"], "scheduler": [None, None]}
    (tmp_path / "vae").mkdir()
    file = tmp_path / "model_index.json"
    file.write_text(json.dumps(content))
    fuzz(file, lambda: importing.pipeline_parts(tmp_path, families.of_index(tmp_path)), content, 3 * TRIALS)


def read_all(source):
    for name in source.specs:
        np.asarray(source.read(name))


def test_safetensors(tmp_path):
    file, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    arrays = {"a": np.ones((2, 3), np.float32), "b": np.zeros((0, 4), np.float16), "c": np.ones((), np.int64)}
    safetensors.numpy.save_file(arrays, file, {"note": "x"})
    fuzz(file, lambda: read_all(SafetensorsFile(file)), trials=3 * TRIALS)
    content = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])
    generator, data = random.Random(1), file.read_bytes()[-32:]
    for _ in range(3 * TRIALS):
        header = json.dumps(broken_json(content, generator)).encode()
        other.write_bytes(len(header).to_bytes(8, "little") + header + data)
        survives(lambda: read_all(SafetensorsFile(other)))


def test_the_index_of_several_files(tmp_path):
    safetensors.numpy.save_file({"a": np.ones(2, np.float32)}, tmp_path / "a.safetensors")
    file, content = tmp_path / "model.safetensors.index.json", {"weight_map": {"a": "a.safetensors"}, "metadata": {}}
    file.write_text(json.dumps(content))
    fuzz(file, lambda: read_all(weights_sources.open_file(file)), content)


def test_a_torch_pickle(tmp_path):
    torch = pytest.importorskip("torch")
    file = tmp_path / "a.pt"
    torch.save({"a": torch.ones(2, 3)}, file)
    fuzz(file, lambda: weights_sources.open_file(file))


def test_low_rank_factors_and_what_peft_notes_of_them(tmp_path):
    lora = Lora(2, 4.0, (r"single_blocks\.out",))
    arrays = {}
    for block in range(tiny.FLUX.num_single_layers):
        module = f"base_model.model.single_transformer_blocks.{block}.proj_out"
        width, inner = tiny.FLUX.width, 5 * tiny.FLUX.width
        arrays |= {f"{module}.lora_A.weight": np.ones((2, inner), np.float32)}
        arrays |= {f"{module}.lora_B.weight": np.ones((width, 2), np.float32)}
    file, note = tmp_path / "adapter_model.safetensors", tmp_path / adapters.PEFT_CONFIG
    safetensors.numpy.save_file(arrays, file)
    content = {
        "peft_type": "LORA",
        "lora_alpha": 4,
        "use_rslora": False,
        "init_lora_weights": True,
        "alpha_pattern": {},
    }
    note.write_text(json.dumps(content))

    def read():
        adapters.read(tmp_path, tiny.FLUX, lora)

    fuzz(note, read, content)
    fuzz(file, read)


def test_what_encode_writes(tmp_path):
    arrays = {"text": stored.Spec((8, 32), np.dtype(np.float32))}
    manifest = stored.Manifest(3, 2, arrays, {"vae": "0"}, "d", "m", "s")
    stored.begin(tmp_path, manifest, PROMPTS)
    fuzz(tmp_path / stored.MANIFEST, lambda: stored.read_manifest(tmp_path), manifest.content())
    fuzz(tmp_path / stored.PROMPTS, lambda: stored.read_prompts(tmp_path), PROMPTS)


def test_what_a_run_writes(tmp_path):
    (tmp_path / "config.json").write_text('{"steps": 3, "optim": {"b1": 0.9}, "lora": {"rank": 2}}')
    fuzz(tmp_path / "config.json", lambda: record.read_config(record.storage.path(tmp_path)), {"steps": 3, "lora": {}})
    file, generator = tmp_path / metrics.JSONL, random.Random(2)
    for _ in range(TRIALS):
        file.write_bytes(broken_bytes(b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n', generator))
        assert all(isinstance(found["step"], int) for found in metrics.read(tmp_path))
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"weights")
    integrity.seal_file(weights)
    sums = tmp_path / integrity.BESIDE
    good = sums.read_bytes()
    for trial in range(TRIALS):
        damaged = broken_json(json.loads(good), generator) if trial % 2 else None
        sums.write_bytes(broken_bytes(good, generator) if damaged is None else json.dumps(damaged).encode())
        survives(lambda: integrity.check_file(weights))


def test_what_evaluate_writes(tmp_path):
    line = {"model": "a", "prompt": "fox", "image": 0, "file": "x", "scores": {"clip": 0.5}}
    file = tmp_path / records.SCORES
    file.write_text(json.dumps(line) + "\n")
    fuzz(file, lambda: records.Records(tmp_path))
    file.unlink()
    settings, model = {"seed": 0}, {"a": {"source": "s", "content": "c"}}
    records.Records(tmp_path).begin(settings, model, model)
    file = tmp_path / records.SETTINGS
    fuzz(file, lambda: records.Records(tmp_path).begin(settings, model, model), json.loads(file.read_text()))


def test_latents(tmp_path):
    np.savez(tmp_path / "a.npz", latents=np.ones((1, 4, 64), np.float32))
    fuzz(tmp_path / "a.npz", lambda: generate._read_latents(str(tmp_path / "a.npz")))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json"])
def test_tokenizers(model, tmp_path, name):
    for file in (model / "tokenizer_2").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())

    def read():
        found = text.load_tokenizer(tmp_path)
        text.tokenize(found, ["a fox"], min(found.model_max_length, 8))

    fuzz(tmp_path / name, read, json.loads((tmp_path / name).read_text()), TRIALS // 3)
