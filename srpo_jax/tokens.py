"""Which token ids a network expects: open_clip's of captions, and that a tokenizer is the network's at all."""

import html
import json
from collections.abc import Sequence
from typing import Any

import ftfy
import regex
import tokenizers
from tokenizers import models, pre_tokenizers

from srpo_jax.errors import UserError

# open_clip's special tokens, and how it divides a text into words: by regex, whose Unicode is newer than that of
# tokenizers' own expressions.
START, END = "<start_of_text>", "<end_of_text>"
_WORDS = regex.compile(
    rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+", regex.IGNORECASE
)
WORD_END = "</w>"


def check(tokenizer: Any, config: Any, where: Any) -> None:
    """Checks that a tokenizer is the one of a network: a wrong one gives features that look right and mean nothing.

    Args:
      tokenizer: from ``text.load_tokenizer``.
      config: of the network, a ``ClipTextConfig`` or a ``T5Config``.
      where: the tokenizer's folder, for the message.

    Raises UserError if an id lies outside of the network's vocabulary, or if texts do not end with the token at which
    a CLIP reads its feature: ``eos_token_id``, or the last id of the vocabulary where the position is that of the
    largest id (``clip.end_positions``).
    """
    remedy = "take the tokenizer that the network was trained with (of a reward: --tokenizer of `convert import`)"
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise UserError(
            f"{where} is not this network's tokenizer: its ids reach {largest}, the network's end at "
            f"{config.vocab_size - 1}; {remedy}"
        )
    if not hasattr(config, "end_rule"):
        return
    end = config.vocab_size - 1 if config.end_rule == "argmax" else config.eos_token_id
    found = tokenizer([""])["input_ids"][0][-1:]
    if found != [end]:
        raise UserError(
            f"{where} is not this network's tokenizer: it ends a text with {found[0] if found else 'nothing'}, the "
            f"network reads its feature at {end}; {remedy}"
        )


def open_clip_text(text: str) -> str:
    """A caption as open_clip cleans it: mended by ftfy, HTML unescaped twice, one space between words, lower case.

    ftfy mends mojibake and lone surrogates, straightens quotes, takes ligatures and full-width letters apart and
    composes accents (NFC).
    """
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


class OpenClipTokenizer:
    """open_clip's tokenizer (``SimpleTokenizer``, with which HPS-v2.1 was trained) on CLIP's vocabulary in HF's files.

    Called as transformers' tokenizers are. HF's own differs: it does not clean texts, composes accents after HTML was
    left as it is, and takes ``<|endoftext|>`` in a text for the end.

    Args:
      tokenizer: from ``text.load_tokenizer``.
      where: its folder, for messages.

    Attributes:
      pad_token_id: 0, open_clip's.

    Raises UserError for a tokenizer of another kind than CLIP's.
    """

    pad_token_id = 0

    def __init__(self, tokenizer: Any, where: Any):
        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        if model["type"] != "BPE" or model.get("end_of_word_suffix") != WORD_END:
            raise UserError(f"{where} is no tokenizer of a CLIP: its words do not end with {WORD_END}")
        self._start, self._end = tokenizer.bos_token_id, tokenizer.eos_token_id
        names = {self._start: START, self._end: END}
        vocabulary = {names.get(number, token): number for token, number in tokenizer.get_vocab().items()}
        merges = [tuple(merge) for merge in model["merges"]]
        self._backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix=WORD_END))
        self._backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._backend.add_special_tokens([START, END])

    def __call__(self, texts: Sequence[str], truncation: bool, max_length: int) -> dict[str, list[list[int]]]:
        """``{"input_ids": rows}`` of texts, with start and end; ``truncation`` to ``max_length`` keeps the end."""
        words = [_WORDS.findall(open_clip_text(text)) for text in texts]
        rows = self._backend.encode_batch(words, is_pretokenized=True, add_special_tokens=False)
        kept = max_length - 2 if truncation else None
        return {"input_ids": [[self._start, *row.ids[:kept], self._end] for row in rows]}
