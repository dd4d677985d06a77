"""The small world's tokenizers: whole words, the special ids that networks rely on, files that transformers reads."""

import json
import os
import subprocess
import sys

import pytest

from srpo_jax import text
from srpo_jax.emoji import world


def test_clip_words_are_whole_and_the_end_is_the_largest_id(word_tokenizers):
    folder, size, _ = word_tokenizers["clip"]
    tokenizer = text.load_tokenizer(folder)
    assert len(tokenizer) == size and tokenizer.model_max_length == 16
    ids = tokenizer("3D. Red Apple")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == [
        "<|startoftext|>",
        "3</w>",
        "d</w>",
        ".</w>",
        "red</w>",
        "apple</w>",
        "<|endoftext|>",
    ]
    assert (ids[0], ids[-1], tokenizer.pad_token_id) == (size - 2, size - 1, size - 1)


def test_t5_words_are_whole_and_texts_end(word_tokenizers):
    folder, size, _ = word_tokenizers["t5"]
    tokenizer = text.load_tokenizer(folder)
    assert len(tokenizer) == size and tokenizer.model_max_length == 16
    ids = tokenizer("3D. red apple")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁3D", ".", "▁red", "▁apple", "</s>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "3D. red apple"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)


@pytest.mark.parametrize("name", ["clip", "t5"])
def test_every_prompt_fits_and_is_its_own(word_tokenizers, name):
    tokenizer = text.load_tokenizer(word_tokenizers[name].folder)
    prompts = [world.prompt(concept, style) for concept in world.world() for style in (None, *world.STYLES)]
    rows = tokenizer(prompts)["input_ids"]
    assert max(map(len, rows)) <= 16
    assert len({tuple(row) for row in rows}) == len(prompts)


@pytest.mark.parametrize("name", ["clip", "t5"])
def test_unseen_words_are_cut_into_known_pieces(word_tokenizers, name):
    tokenizer = text.load_tokenizer(word_tokenizers[name].folder)
    ids = tokenizer("Zeppelin, 47 quickly!")["input_ids"]
    assert len(ids) > 10
    assert name == "clip" or tokenizer.unk_token_id not in ids


AGAIN = """
import sys
from srpo_jax.emoji import tokenizers, world
texts = [world.prompt(concept, style) for concept in world.world() for style in (None, *world.STYLES)]
getattr(tokenizers, sys.argv[1])(texts, sys.argv[2], 16)
"""


@pytest.mark.parametrize("name", ["clip", "t5"])
def test_training_again_gives_the_same_files(word_tokenizers, name, tmp_path):
    """In another process, where sets have another order: a resumed training has to see the same ids."""
    folder, _, train = word_tokenizers[name]
    seed = {"PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", AGAIN, train.__name__, tmp_path], check=True, env=os.environ | seed)
    files = sorted(path.name for path in folder.iterdir())
    assert "tokenizer_config.json" in files and files == sorted(path.name for path in tmp_path.iterdir())
    for file in files:
        assert (folder / file).read_bytes() == (tmp_path / file).read_bytes(), file


def test_merges_are_no_more_than_the_words_need(word_tokenizers):
    folder = word_tokenizers["clip"].folder
    version, *merges = (folder / "merges.txt").read_text().splitlines()
    assert version == "#version: 0.2"
    assert len(json.loads((folder / "vocab.json").read_text())) == 512 + len(merges) + 2
