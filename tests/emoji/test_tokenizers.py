"""The small world's tokenizers: whole words, the special ids that networks rely on, files that transformers reads."""

import json

import pytest

from srpo_jax import text
from srpo_jax.emoji import tokenizers, world

LENGTH = 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of both tokenizers, and their vocabularies' sizes."""
    folder = tmp_path_factory.mktemp("tokenizers")
    texts = [world.prompt(concept, style) for concept in world.world() for style in (None, *world.STYLES)]
    sizes = [
        train(texts, folder / name, LENGTH)
        for name, train in (("clip", tokenizers.train_clip_tokenizer), ("t5", tokenizers.train_t5_tokenizer))
    ]
    return folder, *sizes


def test_clip_words_are_whole_and_the_end_is_the_largest_id(folders):
    folder, size, _ = folders
    tokenizer = text.load_tokenizer(folder / "clip")
    assert len(tokenizer) == size and tokenizer.model_max_length == LENGTH
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


def test_t5_words_are_whole_and_texts_end(folders):
    folder, _, size = folders
    tokenizer = text.load_tokenizer(folder / "t5")
    assert len(tokenizer) == size and tokenizer.model_max_length == LENGTH
    ids = tokenizer("3D. red apple")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁3D", ".", "▁red", "▁apple", "</s>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "3D. red apple"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)


@pytest.mark.parametrize("name", ["clip", "t5"])
def test_every_prompt_fits_and_is_its_own(folders, name):
    tokenizer = text.load_tokenizer(folders[0] / name)
    prompts = [world.prompt(concept, style) for concept in world.world() for style in (None, *world.STYLES)]
    rows = tokenizer(prompts)["input_ids"]
    assert max(map(len, rows)) <= LENGTH
    assert len({tuple(row) for row in rows}) == len(prompts)


@pytest.mark.parametrize("name", ["clip", "t5"])
def test_unseen_words_are_cut_into_known_pieces(folders, name):
    tokenizer = text.load_tokenizer(folders[0] / name)
    ids = tokenizer("Zeppelin, 47 quickly!")["input_ids"]
    assert len(ids) > 10
    assert name == "clip" or tokenizer.unk_token_id not in ids


def test_training_again_gives_the_same_files(folders, tmp_path):
    texts = [concept.caption for concept in world.world()]
    for name, train in (("clip", tokenizers.train_clip_tokenizer), ("t5", tokenizers.train_t5_tokenizer)):
        for copy in ("a", "b"):
            train(texts, tmp_path / copy / name, LENGTH)
        files = sorted(path.name for path in (tmp_path / "a" / name).iterdir())
        assert "tokenizer_config.json" in files
        for file in files:
            first, second = ((tmp_path / copy / name / file).read_bytes() for copy in ("a", "b"))
            assert first == second, file
    merges = (tmp_path / "a" / "clip" / "merges.txt").read_text().splitlines()
    assert merges[0] == "#version: 0.2"
    assert len(json.loads((tmp_path / "a" / "clip" / "vocab.json").read_text())) <= 512 + len(merges) - 1 + 2
