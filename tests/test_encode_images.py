"""Pictures with captions, encoded: the numbers, going on, broken pictures, two processes, and the contact sheet."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import children, encoders, tiny
from helpers.photos import picture, write_folder
from PIL import Image

from srpo_jax import architectures, encode, inspect_data, latents, sharding
from srpo_jax.data import images, stored
from srpo_jax.errors import UserError
from srpo_jax.families.flux import FLUX
from srpo_jax.models.compute import bind
from srpo_jax.weights import fingerprint, folder

HEIGHT, WIDTH = 32, 48


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("images") / "photos")


@pytest.fixture(scope="module")
def whole(model, photos, tmp_path_factory):
    """The data set of seven pictures, encoded in one go."""
    out = tmp_path_factory.mktemp("data") / "whole"
    run(model, photos, out)
    return out


def words(model, photos, out, *more):
    usual = {"model": model, "images": photos, "out": out, "text-length": tiny.LENGTH, "dtype": "float32"}
    usual |= {"height": HEIGHT, "width": WIDTH, "batch": 2, "shard-size": 3}
    return [*(f"--{name}={value}" for name, value in usual.items()), *more]


def run(*args):
    encode.main(words(*args))


def read(path):
    data = stored.DataSet(path)
    return data.read(range(len(data)))


def test_latents_are_the_scaled_means_of_the_posterior(model, photos, whole):
    """By the autoencoder itself, which tests/models/test_autoencoder.py holds to diffusers'."""
    examples, manifest = read(whole), stored.read_manifest(whole)
    assert [example["prompt"] for example in examples] == tiny.PROMPTS
    _, graphdef, params = folder.load(model / "vae")
    network, sizes = bind(graphdef, params), tiny.VAE
    for place, example in enumerate(examples):
        pixels = np.asarray(images.crop(picture(place), HEIGHT, WIDTH), np.float32)
        mean, _ = network.encode(jnp.asarray(pixels[None] / 127.5 - 1))
        expected = (np.asarray(mean[0]) - sizes.shift_factor) * sizes.scaling_factor
        assert example["latents"].dtype == np.float32 and example["latents"].shape == (HEIGHT // 8, WIDTH // 8, 16)
        np.testing.assert_allclose(example["latents"], expected, atol=1e-5)
    assert manifest.encoders == encoders.fingerprints(model) | {"vae": fingerprint.of_network(model / "vae")}
    assert manifest.source == f"{photos}: 7 pictures" and manifest.count == 7


def test_captions_are_encoded_as_prompts_are(model, whole, tmp_path):
    (tmp_path / "prompts.json").write_text(json.dumps(tiny.PROMPTS))
    flags = ["--model", model, "--prompts", tmp_path / "prompts.json", "--out", tmp_path / "data", "--dtype", "float32"]
    encode.main([*map(str, flags), "--text-length", str(tiny.LENGTH), "--batch", "2"])
    for mine, other in zip(read(whole), read(tmp_path / "data"), strict=True):
        assert (
            mine["text"].tobytes() == other["text"].tobytes() and mine["pooled"].tobytes() == other["pooled"].tobytes()
        )


def test_latents_decode_to_the_picture_they_were_made_from(tmp_path):
    """With the shipped autoencoder of the small world, which is a good one."""
    from srpo_jax import convert
    from srpo_jax.emoji import demo, pictures, world

    convert.import_folder(demo.SHIPPED / "pipeline" / "vae", tmp_path / "vae")
    shown = pictures.load(world.split("train")[:4], ["3D"])[0]
    encoder = latents.LatentEncoder(
        tmp_path, FLUX, sharding.make_mesh(types.SimpleNamespace(data=1, fsdp=-1, tensor=1))
    )
    encoded = np.asarray(encoder(shown, 4))
    assert 0.7 < encoded.std() < 1.3
    decoded = pictures.to_float(latents.decode(tmp_path, FLUX, encoded))
    assert pictures.psnr(decoded, pictures.to_float(shown)).min() > 25


def test_latents_that_training_cannot_use(model, tmp_path):
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    tiny.save_random(tmp_path / "vae", "autoencoder", dataclasses.replace(tiny.VAE, latent_channels=4), 0)
    with pytest.raises(UserError, match="vae has 4 channels of latents at 1/8 of a picture's sides; FLUX.1 takes 16"):
        architectures.read_pipeline(tmp_path)


def test_an_interrupted_command_goes_on_where_it_stopped(model, photos, whole, tmp_path, monkeypatch):
    write = stored.Writer.write

    def interrupted(self, prompt, arrays):
        if prompt == tiny.PROMPTS[4]:
            raise KeyboardInterrupt
        write(self, prompt, arrays)

    monkeypatch.setattr(stored.Writer, "write", interrupted)
    with pytest.raises(UserError, match="interrupted; the same command goes on"):
        run(model, photos, tmp_path / "data")
    written = []
    monkeypatch.setattr(stored.Writer, "write", lambda *args: (written.append(args[1]), write(*args)))
    run(model, photos, tmp_path / "data")
    assert written == tiny.PROMPTS[3:]
    for mine, other in zip(read(tmp_path / "data"), read(whole), strict=True):
        assert mine["prompt"] == other["prompt"]
        np.testing.assert_array_equal(mine["latents"], other["latents"])


def test_other_pictures_under_the_same_captions_are_noticed(model, whole, tmp_path):
    photos = write_folder(tmp_path / "photos")
    before = {file.name: file.read_bytes() for file in whole.iterdir()}
    run(model, photos, whole)  # the same pictures from elsewhere
    picture(99).save(photos / "3.png")
    with pytest.raises(
        UserError, match="holds a data set that differs in the pictures or their captions; choose another"
    ):
        run(model, photos, whole)
    with pytest.raises(UserError, match="differs in the arrays .*, the pictures or their captions"):
        run(model, photos, whole, f"--width={HEIGHT}")
    assert {file.name: file.read_bytes() for file in whole.iterdir()} == before


@pytest.fixture
def broken(tmp_path):
    """A folder with one of everything that can be wrong, each under its own name."""
    root = write_folder(tmp_path / "broken", [*tiny.PROMPTS, "x"])
    (root / "1.png").write_bytes((root / "1.png").read_bytes()[:300])
    picture(2, 30, 30).save(root / "2.png")
    (root / "3.txt").unlink()
    return root


def test_broken_pictures_are_named_and_end_the_command(model, broken, tmp_path, capsys):
    with pytest.raises(UserError, match=r"3 of 8 pictures cannot be used: .*3.png has no caption, and 2 more; .*=skip"):
        run(model, broken, tmp_path / "data")
    told = capsys.readouterr().err
    for name, reason in (("3.png", "has no caption"), ("1.png", "cannot be decoded"), ("2.png", "is 30x30, smaller")):
        assert f"{broken / name} {reason}" in told
    assert not (tmp_path / "data").exists()


def test_broken_pictures_are_named_and_skipped(model, broken, tmp_path, capsys):
    run(model, broken, tmp_path / "data", "--broken=skip", "--min-length=2")
    told = capsys.readouterr()
    assert f"{broken}: 8 pictures; left out: 1 shorter than 2, 3 broken; 4 stay\n" in told.out
    assert "1.png cannot be decoded" in told.err and "4 pictures in" in told.out
    kept = [tiny.PROMPTS[0], *tiny.PROMPTS[4:]]
    assert [example["prompt"] for example in read(tmp_path / "data")] == kept
    np.testing.assert_array_equal(read(tmp_path / "data")[0]["latents"].shape, (HEIGHT // 8, WIDTH // 8, 16))


def test_metadata_that_names_a_missing_file(model, tmp_path, capsys):
    root = tmp_path / "photos"
    root.mkdir()
    picture(0).save(root / "a.png")
    lines = [{"file_name": name, "text": name} for name in ("a.png", "b.png")]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError, match=r"1 of 2 .*b.png \(metadata.jsonl, line 2\) cannot be read \(No such file"):
        run(model, root, tmp_path / "data")
    run(model, root, tmp_path / "data", "--broken=skip")
    assert [example["prompt"] for example in read(tmp_path / "data")] == ["a.png"]


def test_nothing_but_broken_pictures(model, tmp_path):
    root = write_folder(tmp_path / "photos", ["a"])
    (root / "0.png").write_bytes(b"x")
    with pytest.raises(UserError, match="no picture is left: 1 pictures; left out: 1 broken; 0 stay"):
        run(model, root, tmp_path / "data", "--broken=skip")


def test_a_picture_that_breaks_while_encoding(model, tmp_path, monkeypatch):
    root = write_folder(tmp_path / "photos")
    begin = encode.MissingShards.begin
    monkeypatch.setattr(encode.MissingShards, "begin", lambda *args: ((root / "6.png").write_bytes(b"x"), begin(*args)))
    with pytest.raises(UserError, match="6.png cannot be decoded .*, and was whole when encoding began"):
        run(model, root, tmp_path / "data")
    assert len(stored.missing_shards(tmp_path / "data", stored.read_manifest(tmp_path / "data"))) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--height=40"], "--height=40: must be a positive multiple of 16"),
        (["--width=0"], "--width=0: must be at least 1"),
        (["--column=text"], "has no metadata.jsonl: .*leave out 'text'"),
        (["--min-length=99"], "no prompt is left: 7 prompts; left out: 7 shorter than 99"),
        (["--model=nothing"], "nothing/transformer is not a folder"),
    ],
)
def test_bad_flags_leave_no_folder(model, photos, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        run(model, photos, tmp_path / "data", *more)
    assert not (tmp_path / "data").exists()


def test_flags_of_pictures_are_not_for_prompts(model, tmp_path):
    (tmp_path / "p.txt").write_text("a\n")
    usual = ["--model", str(model), "--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "data")]
    with pytest.raises(UserError, match="--broken=skip is for --images; leave it out"):
        encode.main([*usual, "--broken=skip"])


def test_two_processes_encode_pictures_without_tensorflow(model, photos, whole, tmp_path):
    code = "import sys; from srpo_jax import encode; encode.main(sys.argv[1:]); assert 'tensorflow' not in sys.modules"
    job = [f"--coordinator=127.0.0.1:{children.free_port()}", "--process-count=2"]
    environment = children.environment()
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", code, *words(model, photos, tmp_path / "two", *job, f"--process-id={i}")],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in (0, 1)
    ]  # fmt: skip
    output = [child.communicate() for child in pair]
    assert [child.returncode for child in pair] == [0, 0], output
    assert f"7 pictures in {tmp_path / 'two'}" in output[0][0] and "7 pictures" not in output[1][0]
    for mine, other in zip(read(tmp_path / "two"), read(whole), strict=True):
        assert mine["prompt"] == other["prompt"]
        for name in ("text", "pooled", "latents"):
            np.testing.assert_allclose(mine[name], other[name], atol=1e-5)


def test_a_data_set_is_no_source_of_pictures(whole):
    with pytest.raises(UserError, match="whole has no image features; expected one"):
        images.read(whole)


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_a_contact_sheet_of_decoded_latents(model, whole, tmp_path, capsys):
    inspect_data.main([str(whole), "--show=5", f"--sheet={tmp_path / 'sheet.png'}"])
    out = capsys.readouterr().out
    assert re.search(r"latents +float32 \[4, 6, 16\], 1.54 kB\n", out) and re.search(r"vae +\w{16}  the same\n", out)
    examples = [read(whole)[int(place)] for place in re.findall(r"^ +(\d+)  \w", out, re.MULTILINE)]
    assert len(examples) == 5
    found = np.stack([example["latents"] for example in examples])
    assert f"latents of 5 pictures: mean {found.mean():.3f}, deviation {found.std():.3f}; decoded in" in out
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet)
    height, width = HEIGHT + 26 + 8, 72 + 8  # of a tile: picture, two lines of text, gap
    assert pixels.shape == (2 * height, 3 * width, 3)
    for index, image in enumerate(latents.decode(model, FLUX, found)):
        tile = pixels[index // 3 * height :, index % 3 * width :]
        np.testing.assert_array_equal(tile[:HEIGHT, :WIDTH], image)
        assert (tile[HEIGHT : HEIGHT + 26, :72] < 128).any()  # its caption
    assert (pixels[height:, 2 * width :] == 255).all()


def test_sheets_that_cannot_be_drawn(model, whole, tmp_path):
    with pytest.raises(UserError, match="--show=0: there is nothing to draw"):
        inspect_data.main([str(whole), "--show=0", "--sheet=x.png"])
    manifest = stored.read_manifest(whole)
    text = {name: spec for name, spec in manifest.arrays.items() if name != "latents"}
    plain = dataclasses.replace(manifest, arrays=text, count=1)
    stored.begin(tmp_path / "plain", plain, ["a"])
    with stored.Writer(tmp_path / "plain", plain, [0]) as writer:
        writer.write("a", {name: np.zeros(spec.shape, spec.dtype) for name, spec in text.items()})
    stored.finish(tmp_path / "plain", plain)
    with pytest.raises(UserError, match="plain holds prompts without pictures: there is nothing to draw"):
        inspect_data.contact_sheet(tmp_path / "plain", None, 3, 0)
    with pytest.raises(UserError, match="moved.* is not there to decode; name the pipeline's folder with --model"):
        inspect_data.contact_sheet(whole, str(tmp_path / "moved"), 3, 0)
