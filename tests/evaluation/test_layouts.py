"""Pictures laid out for the judges of others: the files that these look for, and no others."""

import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from srpo_jax import sampling
from srpo_jax.errors import UserError
from srpo_jax.evaluation import layouts
from srpo_jax.evaluation.candidates import Candidate, Item
from srpo_jax.evaluation.drawing import Drawing
from srpo_jax.evaluation.prompts import Prompt
from srpo_jax.evaluation.run import Evaluation

MODEL = Candidate("my model", "models/m", "0", "models/m")
SIDE = 4


def colour(item: Item) -> np.ndarray:
    """A picture that no other item has, in one colour."""
    red = sum(item.prompt.encode()) % 256
    return np.full((SIDE, SIDE, 3), (red, 20 * item.image, 128), np.uint8)


def laid_out(out, name, spec, column, images, count=None) -> list[str]:
    """Writes a layout of pictures of ``colour``; returns the files there."""
    places = layouts.read(name, spec, column, images)
    texts = list(dict.fromkeys(item.prompt for place in places for item in place.items))[:count]
    items = [Item(text, number) for text in texts for number in range(images)]
    for item in items:
        sampling.save_image(Image.fromarray(colour(item)), out / MODEL.file(item))
    settings = Drawing(sampling.Look(SIDE, SIDE, 1, 1.0)).settings()
    prompts = tuple(Prompt(text, "") for text in texts)
    found = Evaluation(out, (MODEL,), prompts, images, (), settings, {}, {}, {}, {MODEL.folder: items}, {})
    counts = layouts.write(found, name, places)
    files = sorted(str(path.relative_to(out / name)) for path in (out / name).rglob("*") if path.is_file())
    assert counts == {"my-model": len([file for file in files if not file.endswith(".jsonl")])}
    return files


def read(file) -> np.ndarray:
    return np.asarray(Image.open(file), np.int32)


def test_hpsv2(tmp_path):
    for style in layouts.STYLES:
        (tmp_path / f"{style}.json").write_text(json.dumps([f"{style} one", "the same in all", f"{style} three"]))
    files = laid_out(tmp_path / "out", "hpsv2", f"{tmp_path}/*.json", None, 1)
    assert files == [f"my-model/{style}/{index:05d}.jpg" for style in layouts.STYLES for index in range(3)]
    file = tmp_path / "out/hpsv2/my-model/photo/00002.jpg"
    with Image.open(file) as image:
        assert image.format == "JPEG"
    assert np.abs(read(file) - colour(Item("photo three", 0))).max() <= 3
    (tmp_path / "sketch.json").write_text('["a"]')
    with pytest.raises(UserError, match=r"--writes=hpsv2: .*sketch.json is none of its styles; expected anime"):
        layouts.read("hpsv2", f"{tmp_path}/*.json", None, 1)


def test_geneval(tmp_path):
    records = [
        {"tag": "counting", "include": [{"class": "bench", "count": n}], "prompt": f"a photo of {n} benches"}
        for n in (2, 3)
    ]
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    files = laid_out(tmp_path / "out", "geneval", file, None, 4)
    samples = [f"samples/{number:05d}.png" for number in range(4)]
    assert files == [f"my-model/{index:05d}/{name}" for index in range(2) for name in ("metadata.jsonl", *samples)]
    root = tmp_path / "out/geneval/my-model"
    for index, record in enumerate(records):
        # The judge takes the first line, and pictures whose names are digits.
        with open(root / f"{index:05d}/metadata.jsonl") as lines:
            assert json.loads(next(lines)) == record
        for number, path in enumerate(sorted((root / f"{index:05d}/samples").iterdir())):
            assert re.fullmatch(r"\d+\.png", path.name)
            np.testing.assert_array_equal(read(path), colour(Item(record["prompt"], number)))
    file.write_text('{"prompt": "a"}')
    with pytest.raises(UserError, match="line 1: expected an object with include, prompt, tag"):
        layouts.read("geneval", file, None, 4)


def test_dpg(tmp_path):
    (tmp_path / "COCOval_1.txt").write_text("A long description, of many words.\n")
    (tmp_path / "whoops2.txt").write_text("Another one.")
    files = laid_out(tmp_path / "out", "dpg", f"{tmp_path}/*.txt", None, 4)
    assert files == ["my-model/COCOval_1.png", "my-model/whoops2.png"]
    found = read(tmp_path / "out/dpg/my-model/whoops2.png")
    assert found.shape == (2 * SIDE, 2 * SIDE, 3)
    for number in range(4):  # tiles by rows
        top, left = number // 2 * SIDE, number % 2 * SIDE
        tile = found[top : top + SIDE, left : left + SIDE]
        np.testing.assert_array_equal(tile, colour(Item("Another one.", number)))
    (tmp_path / "two.txt").write_text("one\ntwo\n")
    with pytest.raises(UserError, match="two.txt: expected a pattern of text files with one prompt each"):
        layouts.read("dpg", f"{tmp_path}/*.txt", None, 4)


def test_unigenbench(tmp_path):
    file = tmp_path / "test_prompts_en.csv"
    file.write_text('index,prompt_en,sub_dims_en\n0,"A fox, red","{}"\n17,A house,"{}"\n')
    files = laid_out(tmp_path / "out", "unigenbench", file, None, 4)
    assert files == [f"eval_data/en/my-model/{index}_{number}.png" for index in (0, 17) for number in range(4)]
    found = read(tmp_path / "out/unigenbench/eval_data/en/my-model/17_3.png")
    np.testing.assert_array_equal(found, colour(Item("A house", 3)))


def test_t2i_compbench(tmp_path):
    for category in ("color", "shape"):
        (tmp_path / f"{category}.txt").write_text(f"a {category} one\na {category} two\n")
    files = laid_out(tmp_path / "out", "t2i-compbench", f"{tmp_path}/*.txt", None, 10)
    assert len(files) == 40 and files[0] == "my-model/color/samples/a color one_000000.png"
    for file in files:
        # The judge reads the prompt up to the first "_".
        path = pathlib.Path(file)
        prompt, number = path.stem.split("_")
        assert prompt.startswith(f"a {path.parts[1]} ")
        found = read(tmp_path / "out/t2i-compbench" / file)
        np.testing.assert_array_equal(found, colour(Item(prompt, int(number) % 10)))
    assert len({pathlib.Path(file).name for file in files}) == 40
    (tmp_path / "bad.txt").write_text("snake_case\n")
    with pytest.raises(UserError, match="'snake_case' cannot be the name of a file"):
        layouts.read("t2i-compbench", f"{tmp_path}/*.txt", None, 10)


def test_what_was_not_drawn_is_left_out(tmp_path):
    file = tmp_path / "test_prompts_en.csv"
    file.write_text("index,prompt_en\n0,a\n1,b\n")
    files = laid_out(tmp_path / "out", "unigenbench", file, None, 4, count=1)
    assert files == [f"eval_data/en/my-model/0_{number}.png" for number in range(4)]


@pytest.mark.parametrize(("name", "needed"), [("geneval", 4), ("dpg", 4), ("unigenbench", 4), ("t2i-compbench", 10)])
def test_too_few_pictures(name, needed):
    with pytest.raises(UserError, match=f"--images={needed - 1}: {name} judges {needed} pictures of each prompt"):
        layouts.read(name, "none", None, needed - 1)
