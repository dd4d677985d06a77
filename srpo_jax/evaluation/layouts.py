"""Pictures as the judges of others read them: names, folders and metadata. The judges themselves are not run here.

    hpsv2          OUT/hpsv2/MODEL/STYLE/00000.jpg          prompts: its benchmark, 'benchmark/[acp]*.json'
    geneval        OUT/geneval/MODEL/00000/samples/00000.png, metadata.jsonl    prompts: its evaluation_metadata.jsonl
    dpg            OUT/dpg/MODEL/ID.png, four in one        prompts: its prompts, a pattern of ID.txt
    unigenbench    OUT/unigenbench/eval_data/en/MODEL/INDEX_0.png               prompts: its test_prompts_en.csv
    t2i-compbench  OUT/t2i-compbench/MODEL/CATEGORY/samples/PROMPT_000000.png   prompts: a pattern of CATEGORY.txt

Read of hpsv2 1.2.0, djghosh13/geneval, TencentQQGYLab/ELLA, CodeGoat24/UniGenBench and Karine-Huang/T2I-CompBench.
"""

import io
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from srpo_jax import sampling, storage
from srpo_jax.data import sources
from srpo_jax.errors import UserError
from srpo_jax.evaluation.candidates import Candidate, Item
from srpo_jax.evaluation.run import Evaluation

STYLES = ("anime", "concept-art", "paintings", "photo")  # of HPSv2
LONGEST = 255  # bytes of a file's name


class Place(NamedTuple):
    """A file of a layout: its path below the layout's folder (MODEL in it is the model's), of which pictures it is
    made (by prompt and number), and what else is written beside it."""

    file: str
    items: tuple[Item, ...]
    beside: tuple[tuple[str, str], ...] = ()


class Layout(NamedTuple):
    """A judge's layout: pictures of each prompt that it takes, and the places for a source of prompts."""

    images: int
    places: Callable[[str, str | None], Iterator[Place]]


def _hpsv2(spec: str, column: str | None) -> Iterator[Place]:
    for file in sources.files(spec):
        if file.stem not in STYLES:
            raise UserError(
                f"--writes=hpsv2: {file} is none of its styles; expected {', '.join(STYLES)}: 'benchmark/[acp]*.json'"
            )
        for index, prompt in enumerate(sources.read(file, column)):
            yield Place(f"MODEL/{file.stem}/{index:05d}.jpg", (Item(prompt, 0),))


def _geneval(spec: str, column: str | None) -> Iterator[Place]:
    del column
    needed = {"tag", "include", "prompt"}
    for index, (record, place) in enumerate(sources.json_lines(pathlib.Path(spec))):
        if not isinstance(record, dict) or not needed <= record.keys():
            raise UserError(f"--writes=geneval: {spec}, {place}: expected an object with {', '.join(sorted(needed))}")
        folder = f"MODEL/{index:05d}"
        items = [Item(record["prompt"].strip(), number) for number in range(4)]
        for item in items:
            beside = ((f"{folder}/metadata.jsonl", json.dumps(record)),) if item.image == 0 else ()
            yield Place(f"{folder}/samples/{item.image:05d}.png", (item,), beside)


def _dpg(spec: str, column: str | None) -> Iterator[Place]:
    for file in sources.files(spec):
        prompts = sources.read(file, column)
        if file.suffix != ".txt" or len(prompts) != 1:
            raise UserError(
                f"--writes=dpg: {file}: expected a pattern of text files with one prompt each, prompts/*.txt"
            )
        yield Place(f"MODEL/{file.stem}.png", tuple(Item(prompts[0], number) for number in range(4)))


def _unigenbench(spec: str, column: str | None) -> Iterator[Place]:
    for prompt, index in sources.read_beside(spec, column or "prompt_en", "index"):
        for number in range(4):
            yield Place(f"eval_data/en/MODEL/{index}_{number}.png", (Item(prompt, number),))


def _t2i_compbench(spec: str, column: str | None) -> Iterator[Place]:
    for file in sources.files(spec):
        prompts = sources.read(file, column)
        for index, prompt in enumerate(prompts):
            for number in range(10):
                name = f"{prompt}_{index * 10 + number:06d}.png"
                # The judge takes what stands before the first "_" for the prompt.
                if "_" in prompt or "/" in prompt or len(name.encode()) > LONGEST:
                    raise UserError(f"--writes=t2i-compbench: {file}: {prompt[:60]!r} cannot be the name of a file")
                yield Place(f"MODEL/{file.stem}/samples/{name}", (Item(prompt, number),))


LAYOUTS = {
    "hpsv2": Layout(1, _hpsv2),
    "geneval": Layout(4, _geneval),
    "dpg": Layout(4, _dpg),
    "unigenbench": Layout(4, _unigenbench),
    "t2i-compbench": Layout(10, _t2i_compbench),
}


def read(name: str, spec: str | os.PathLike, column: str | None, images: int) -> list[Place]:
    """The places of a layout for a source of prompts.

    Raises UserError if the source is not as this judge has it, or ``images`` of each prompt are too few for it.
    """
    layout = LAYOUTS[name]
    if images < layout.images:
        raise UserError(
            f"--images={images}: {name} judges {layout.images} pictures of each prompt; give at least as many"
        )
    return list(layout.places(os.fspath(spec), column))


def write(found: Evaluation, name: str, places: list[Place]) -> dict[str, int]:
    """Lays out the pictures of every model, below ``out/NAME``. A prompt that was not drawn (--count), or of which a
    folder has too few pictures, is left out.

    Returns:
      How many files each model got, by its folder.
    """
    counts = {}
    for model in found.candidates:
        there, counts[model.folder] = set(found.items[model.folder]), 0
        for place in places:
            if not there.issuperset(place.items):
                continue
            root = storage.path(found.out) / name
            _write(root / place.file.replace("MODEL", model.folder, 1), _picture(found, model, place.items))
            for file, text in place.beside:
                storage.write(root / file.replace("MODEL", model.folder, 1), text.encode())
            counts[model.folder] += 1
    return counts


def _picture(found: Evaluation, model: Candidate, items: tuple[Item, ...]) -> Image.Image:
    pictures = [found.picture(model, item) for item in items]
    if len(pictures) == 1:
        return Image.fromarray(pictures[0])
    if len({picture.shape for picture in pictures}) > 1:
        raise UserError(f"{model.source}: pictures of {items[0].prompt!r} have several sizes; they go into one grid")
    return sampling.grid(np.stack(pictures), columns=2)


def _write(file: os.PathLike, image: Image.Image) -> None:
    if not os.fspath(file).endswith(".jpg"):
        sampling.save_image(image, file)
        return
    content = io.BytesIO()
    image.save(content, "JPEG", quality=95, subsampling=0)
    storage.write(storage.path(file), content.getvalue())
