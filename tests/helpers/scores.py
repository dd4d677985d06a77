"""A tiny ImageReward and aesthetic predictors in our format, and a BERT's tokenizer."""

import json
import pathlib

from helpers import tiny
from srpo_jax.models.aesthetic import ClipAestheticConfig, SiglipAestheticConfig
from srpo_jax.models.blip import BlipConfig, BlipTextConfig, BlipVisionConfig
from srpo_jax.models.clip import ClipVisionConfig
from srpo_jax.models.siglip import SiglipVisionConfig

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
HEAD = (16, 8, 1)
AESTHETIC = ClipAestheticConfig(ClipVisionConfig(32, 32, 1, 4, 32, 16), 16, HEAD)
AESTHETIC_V25 = SiglipAestheticConfig(SiglipVisionConfig(32, 32, 1, 4, 30, 8), HEAD)


def bert_words() -> list[str]:
    """The vocabulary of the tiny prompts and control words."""
    texts = [*tiny.PROMPTS, *tiny.HELD_OUT, *(word for words in tiny.WORDS for word in words)]
    return [*SPECIALS, ".", *sorted({word.lower() for text in texts for word in text.split()})]


def blip_config() -> BlipConfig:
    """Of ``bert_words`` and BLIP's two tokens."""
    text = BlipTextConfig(len(bert_words()) + 2, 32, 32, 2, 4, 40)
    return BlipConfig(text, BlipVisionConfig(32, 32, 1, 4, 32, 16), HEAD)


def write_bert_tokenizer(path: pathlib.Path, cased: bool = False) -> pathlib.Path:
    """As bert-base-uncased keeps it: a vocabulary, and a configuration that names no class."""
    path.mkdir(parents=True)
    (path / "vocab.txt").write_text("\n".join([*bert_words(), *(["Cased"] if cased else [])]) + "\n")
    (path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": not cased, "model_max_length": 512}))
    return path


def write_image_reward(path: pathlib.Path) -> pathlib.Path:
    """With its tokenizer."""
    tiny.save_random(path, "blip", blip_config(), 7)
    write_bert_tokenizer(path / "tokenizer")
    return path


def write_aesthetic(path: pathlib.Path, network: str = "aesthetic") -> pathlib.Path:
    """Either predictor, by its network's name."""
    tiny.save_random(path, network, {"aesthetic": AESTHETIC, "aesthetic_v25": AESTHETIC_V25}[network], 8)
    return path
