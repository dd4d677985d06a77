"""Tokenizers for the small world's text encoders, made from its own texts: every word of them becomes one token.

Both folders load with transformers' ``from_pretrained`` and as parts of a diffusers pipeline. Other words are cut into
pieces, down to single characters, so that no prompt fails.
"""

import collections
import json
import math
import pathlib
import re
import string
from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
# OpenAI CLIP's division of lower-case text into words, which transformers repeats whatever the files say.
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
SPACE = "▁"  # sentencepiece's mark of a word's start
CHARACTER_PENALTY = 10.0  # log probability by which a single character is less likely than the rarest word


def train_clip_tokenizer(texts: Iterable[str], folder: str | pathlib.Path, length: int) -> int:
    """Writes a byte-level BPE tokenizer as CLIP's (vocab.json, merges.txt, configs) into ``folder``.

    Args:
      texts: what the tokenizer is trained on; case does not matter.
      folder: made if missing.
      length: tokens a text is padded or cut to by default (``model_max_length``), start and end included.

    Returns:
      The vocabulary's size n. Ids n - 2 and n - 1 are start and end of text, the end being the largest id as in
      OpenAI's vocabulary (see ``clip.end_positions``); it also pads.
    """
    normalizer = normalizers.Lowercase()
    divide = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    words = (word for text in texts for word, _ in divide.pre_tokenize_str(normalizer.normalize_str(text)))
    merges = _byte_pairs(collections.Counter(words))

    # OpenAI's order: bytes, bytes that end a word, merges, specials.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(byte + WORD_END for byte in alphabet), *("".join(merge) for merge in merges), START, END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}

    folder = _folder(folder)
    _write_json(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    specials = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    _write_json(folder / "special_tokens_map.json", specials)
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True, **specials},
    )
    return len(vocabulary)


def _byte_pairs(counts: collections.Counter[str]) -> list[tuple[str, str]]:
    """The merges of byte-pair encoding (Sennrich et al., arXiv 1508.07909) until every counted word is whole.

    Of equally frequent pairs the alphabetically last is merged first. The tokenizers library leaves that to chance,
    and ids that differ from run to run would make a resumed training see other words.
    """
    words = {word: [*word[:-1], word[-1] + WORD_END] for word in counts}
    merges = []
    while True:
        pairs = collections.Counter()
        for word, pieces in words.items():
            for pair in zip(pieces, pieces[1:], strict=False):
                pairs[pair] += counts[word]
        if not pairs:
            return merges
        first, second = merge = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(merge)
        for pieces in words.values():
            index = 0
            while index < len(pieces) - 1:
                if pieces[index] == first and pieces[index + 1] == second:
                    pieces[index : index + 2] = [first + second]
                index += 1
        words = {word: pieces for word, pieces in words.items() if len(pieces) > 1}


def train_t5_tokenizer(texts: Iterable[str], folder: str | pathlib.Path, length: int) -> int:
    """Writes a Unigram tokenizer as T5's (tokenizer.json, configs) into ``folder``. Case matters.

    With every word a piece, the pieces' most likely probabilities are the words' frequencies, so that nothing has to be
    iterated; single characters get a probability below all of them.

    Args:
      texts: what the frequencies are counted in.
      folder: made if missing.
      length: ``model_max_length``, the end token included.

    Returns:
      The vocabulary's size. Ids 0, 1, 2 are padding, end of text and unknown.
    """
    counts = collections.Counter(word for text in texts for word in re.findall(r"\w+", text))
    total = sum(counts.values())
    words = {SPACE + word: math.log(count / total) for word, count in sorted(counts.items())}
    lowest = -math.log(total) - CHARACTER_PENALTY
    characters = {*string.digits, *string.ascii_letters, *string.punctuation, SPACE, *"".join(counts)}
    pieces = [(PAD, 0.0), (EOS, 0.0), (UNK, 0.0), *words.items()]
    pieces += [(character, lowest) for character in sorted(characters) if character not in words]

    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    metaspace = {"replacement": SPACE, "prepend_scheme": "always", "split": True}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**metaspace)]
    )
    tokenizer.decoder = decoders.Metaspace(**metaspace)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, 1)]
    )
    tokenizer.add_special_tokens([PAD, EOS, UNK])

    folder = _folder(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    specials = {"eos_token": EOS, "pad_token": PAD, "unk_token": UNK}
    _write_json(folder / "special_tokens_map.json", specials)
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "T5Tokenizer", "model_max_length": length, "extra_ids": 0, **specials},
    )
    return len(pieces)


def _folder(folder: str | pathlib.Path) -> pathlib.Path:
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write_json(path: pathlib.Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
