"""What commands say of what they have made, and by what."""

import jax
import numpy as np
from helpers import tiny

from srpo_jax import convert, generate, terminal
from srpo_jax.weights import folder


def size(path, *names):
    """Bytes of all tensors of networks of ours."""
    return sum(spec.nbytes for name in names for spec in folder.open_weights(path / name)[2].specs.values())


def test_convert_says_what_it_wrote(model, tmp_path, capsys):
    out, back, halved = tmp_path / "out", tmp_path / "back", tmp_path / "halved"
    networks = ("transformer", "vae", "text_encoder", "text_encoder_2")
    total = terminal.in_bytes(size(model, *networks))
    convert.main(["export", "--source", str(model), "--target", str(out), "--format", "diffusers"])
    assert capsys.readouterr().out == f"wrote {out}: 4 networks, {total}, float32\n"
    convert.main(["import", "--source", str(out), "--target", str(back)])
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {back}: 4 networks, {total}, float32"
    words = ["--source", str(model / "transformer"), "--target", str(halved), "--format", "bfl", "--dtype", "bfloat16"]
    convert.main(["export", *words])
    half = terminal.in_bytes(size(model, "transformer") / 2)
    assert capsys.readouterr().out == f"wrote {halved}: 1 network, {half}, bfloat16\n"


def test_a_released_transformer_takes_the_place_of_the_pipelines(model, tmp_path, monkeypatch, capsys):
    """As the README has it for SRPO's one file: imported beside the pipeline, and linked into a copy of it."""
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other"
    tiny.save_random(other, "flux", tiny.FLUX, 99)
    convert.main(["export", "--source", str(other), "--target", "foreign", "--format", "diffusers"])
    (file,), (config,) = (list((tmp_path / "foreign").rglob(name)) for name in ("*.safetensors", "config.json"))
    (tmp_path / "SRPO").mkdir()
    file.rename("SRPO/diffusion_pytorch_model.safetensors")
    words = ["--source", "SRPO/diffusion_pytorch_model.safetensors", "--config", str(config)]
    convert.main(["import", *words, "--target", "srpo-transformer"])
    (tmp_path / "srpo").mkdir()
    for part in model.iterdir():
        (tmp_path / "srpo" / part.name).symlink_to(part)
    (tmp_path / "srpo" / "transformer").unlink()
    (tmp_path / "srpo" / "transformer").symlink_to("../srpo-transformer")
    shapes = ["--height=32", "--width=32", "--steps=1", f"--text-length={tiny.LENGTH}", "--prompt=red apple"]
    for name in (str(model), "srpo"):
        generate.main([f"--model={name}", f"--out=images-{name == 'srpo'}", *shapes])
    said = capsys.readouterr()
    assert "1 cpu device(s), float32, attention xla\n" in said.err and "1 images in images-True" in said.out
    assert "loading the transformer: " in said.err and "compiling, and the first 1 of 1" in said.err
    mine, theirs = (next((tmp_path / f"images-{n}").iterdir()).read_bytes() for n in (True, False))
    assert mine != theirs
    source, taken = (folder.load(path)[2] for path in (other, tmp_path / "srpo" / "transformer"))
    jax.tree.map(np.testing.assert_array_equal, source, taken)
