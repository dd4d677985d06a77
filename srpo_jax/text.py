"""Tokenizers, read through transformers, which needs no torch for that."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from srpo_jax.errors import UserError

# Any of these makes a folder a tokenizer that transformers can read.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")


def load_tokenizer(path: str | os.PathLike, kind: str = "AutoTokenizer") -> Any:
    """A tokenizer from a folder in transformers' format (``tokenizer_config.json`` and a vocabulary).

    ``kind`` is the class of transformers, for folders that do not tell it.

    Raises UserError if the folder or its vocabulary is missing or cannot be read, or its texts have no length.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; expected a tokenizer in transformers' format")
    for names in (("tokenizer_config.json",), _VOCABULARIES):
        if not any((path / name).exists() for name in names):
            raise UserError(f"{path} holds no tokenizer: {' or '.join(names)} is missing")
    # It would warn, among the lines that matter, that it can load no models without torch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # Importing transformers takes seconds, and nothing else needs it.
    import transformers

    try:
        found = getattr(transformers, kind).from_pretrained(path, local_files_only=True)
        length, size = found.model_max_length, len(found.get_vocab())
    # A broken file surfaces as anything from KeyError to the panic of the Rust library, which is no Exception.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        words = " ".join(str(error).split())[:300]
        raise UserError(f"{path} cannot be read as a tokenizer: {words or type(error).__name__}") from error
    if not size:
        raise UserError(f"{path} cannot be read as a tokenizer: its vocabulary is empty")
    if isinstance(length, bool) or not isinstance(length, int) or length < 2:
        raise UserError(
            f"{path / 'tokenizer_config.json'}: model_max_length={length!r} must be a whole number, at least 2"
        )
    return found


def tokenize(tokenizer: Any, texts: Sequence[str], length: int, pad: str | int = "own") -> np.ndarray:
    """Token ids of texts, with the special tokens of the tokenizer, cut and padded to one length.

    A text that is too long loses its last words, never its end token.

    Args:
      tokenizer: from ``load_tokenizer``.
      texts: B texts.
      length: T, at least 2.
      pad: "own", the tokenizer's padding token (T5: 0; CLIP in HF's files: end of text), or an id (open_clip: 0).

    Returns:
      int32 [B, T]. Raises UserError for a tokenizer without padding token under "own", and for a text with half a
      character (a lone surrogate), which HF's tokenizers do not take.
    """
    if pad == "own":
        pad = tokenizer.pad_token_id
        if pad is None:
            raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no padding token; take the model's own")
    out = np.full((len(texts), length), pad, np.int32)
    try:
        rows = tokenizer(list(texts), truncation=True, max_length=length)["input_ids"] if len(texts) else []
    except TypeError as error:
        broken = [text for text in texts if any("\ud800" <= character <= "\udfff" for character in text)]
        if not broken:
            raise
        raise UserError(f"{broken[0]!a} holds half a character, as a cut emoji leaves; mend this text") from error
    for row, ids in zip(out, rows, strict=True):
        row[: len(ids)] = ids
    return out
