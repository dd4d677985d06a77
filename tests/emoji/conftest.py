"""What several tests of the small world need, made once."""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import pytest

from srpo_jax.emoji import tokenizers, world

LENGTH = 16  # tokens of a text


class WordTokenizer(NamedTuple):
    """A tokenizer's folder, its vocabulary's size, and the function that trains one."""

    folder: pathlib.Path
    size: int
    train: Callable[..., int]


@pytest.fixture(scope="session")
def word_tokenizers(tmp_path_factory) -> dict[str, WordTokenizer]:
    """Both kinds of tokenizers, "clip" and "t5", of the world's prompts."""
    folder = tmp_path_factory.mktemp("tokenizers")
    texts = [world.prompt(concept, style) for concept in world.world() for style in (None, *world.STYLES)]
    kinds = {"clip": tokenizers.train_clip_tokenizer, "t5": tokenizers.train_t5_tokenizer}
    return {
        name: WordTokenizer(folder / name, train(texts, folder / name, LENGTH), train) for name, train in kinds.items()
    }
