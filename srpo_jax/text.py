"""Tokenizers, and FLUX's two text encoders (T5 for the tokens, CLIP-L for the pooled vector) as one callable.

Tokenizers are read through transformers, which needs no torch for that.
"""

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from srpo_jax import tokens
from srpo_jax.errors import UserError
from srpo_jax.models.compute import Compute, Params, bind
from srpo_jax.weights import folder

# Any of these makes a folder a tokenizer that transformers can read.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")


def load_tokenizer(path: str | os.PathLike) -> Any:
    """A tokenizer from a folder in transformers' format (``tokenizer_config.json`` and a vocabulary).

    Raises UserError if the folder or its vocabulary is missing or cannot be read.
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
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # a broken file surfaces as anything from KeyError to the Rust library's Exception
        raise UserError(f"{path} cannot be read as a tokenizer: {error}") from error


def tokenize(tokenizer: Any, texts: Sequence[str], length: int, pad: str | int = "own") -> np.ndarray:
    """Token ids of texts, with the special tokens of the tokenizer, cut and padded to one length.

    A text that is too long loses its last words, never its end token.

    Args:
      tokenizer: from ``load_tokenizer``.
      texts: B texts.
      length: T, at least 2.
      pad: "own", the tokenizer's padding token (T5: 0; CLIP in HF's files: end of text), or an id (open_clip: 0).

    Returns:
      int32 [B, T]. Raises ValueError for a tokenizer without padding token under "own", UserError for a text with half
      a character (a lone surrogate), which HF's tokenizers do not take.
    """
    if pad == "own":
        pad = tokenizer.pad_token_id
        if pad is None:
            raise ValueError("the tokenizer has no padding token; give its id as pad")
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


class TextEncoders:
    """FLUX's two text encoders from a converted pipeline folder.

    Args:
      path: holds ``tokenizer``, ``tokenizer_2``, ``text_encoder`` (CLIP-L) and ``text_encoder_2`` (T5).
      compute: execution options of both.
      sharding: called with a network's name ("clip_text", "t5") for where its parameters go, as in ``folder.load``;
        None puts whole arrays on the default device.

    Attributes:
      clip_config, t5_config: sizes of the two networks.
      params: of CLIP, of T5.
      apply: pure ``apply(params, *tokens) -> (text [B, T, C], pooled [B, P])`` in ``compute.dtype``.

    Raises UserError if one of the folders is missing or is not what it should be, or a tokenizer is of another network.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        compute: Compute = folder.DEFAULT,
        sharding: Callable[[str], Callable[[str, tuple[int, ...]], jax.sharding.Sharding]] | None = None,
    ):
        path = pathlib.Path(path)
        self._clip_tokenizer = load_tokenizer(path / "tokenizer")
        self._t5_tokenizer = load_tokenizer(path / "tokenizer_2")

        def load(part: str, network: str) -> tuple:
            return folder.load(path / part, network, compute, None if sharding is None else sharding(network))

        self.clip_config, clip, clip_params = load("text_encoder", "clip_text")
        self.t5_config, t5, t5_params = load("text_encoder_2", "t5")
        tokens.check(self._clip_tokenizer, self.clip_config, path / "tokenizer")
        tokens.check(self._t5_tokenizer, self.t5_config, path / "tokenizer_2")
        self.params = (clip_params, t5_params)

        def apply(params: tuple[Params, Params], clip_ids: jax.Array, t5_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
            text, pooled = bind(t5, params[1])(t5_ids), bind(clip, params[0])(clip_ids)
            return text, pooled.astype(compute.dtype)

        self.apply = apply
        self._apply = jax.jit(apply)

    def tokens(self, prompts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int32 of B prompts: CLIP's [B, its own fixed length], T5's [B, ``length``]."""
        # CLIP's files say how long its texts are; a tokenizer may cut them earlier.
        fixed = min(self.clip_config.max_position_embeddings, self._clip_tokenizer.model_max_length)
        return tokenize(self._clip_tokenizer, prompts, fixed), tokenize(self._t5_tokenizer, prompts, length)

    def encode(self, prompts: Sequence[str], length: int, batch: int = 8) -> tuple[jax.Array, jax.Array]:
        """Encodes B prompts, ``batch`` at a time, all batches by one compiled program.

        Args:
          prompts: B texts, at least one.
          length: T, T5 tokens of a prompt; longer ones are cut, shorter ones padded. CLIP has its own fixed length.
          batch: prompts encoded at once.

        Returns:
          (text [B, T, C], pooled [B, P]) in ``compute.dtype``. Raises ValueError without prompts.
        """
        if not prompts:
            raise ValueError("there are no prompts to encode")
        batch = min(batch, len(prompts))
        # What fills the last batch is cut off again.
        filled = [*prompts, *[""] * (-len(prompts) % batch)]
        clip_ids, t5_ids = self.tokens(filled, length)
        parts = [
            self._apply(self.params, clip_ids[start : start + batch], t5_ids[start : start + batch])
            for start in range(0, len(filled), batch)
        ]
        text, pooled = (jnp.concatenate(group)[: len(prompts)] for group in zip(*parts, strict=True))
        return text, pooled
