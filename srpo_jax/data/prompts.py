"""Prompts as people have them, one a line in a text file, and their endless shuffled stream."""

import os
import pathlib
from collections.abc import Sequence

import grain

from srpo_jax.errors import UserError


def read_prompts(path: str | os.PathLike) -> list[str]:
    """The prompts of a UTF-8 text file, one a line; empty lines and white space around a prompt are dropped.

    Raises UserError if the file is missing, is not UTF-8 (names the line), or holds no prompt.
    """
    path = pathlib.Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; expected a text file, one prompt a line") from error
    try:
        # utf-8-sig: editors on Windows put a byte order mark in front.
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{path} is not UTF-8 (line {line}); save it as UTF-8, one prompt a line") from error
    # Not splitlines(): it also splits at characters that a prompt may hold, as a form feed or U+2028.
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise UserError(f"{path} holds no prompt; write one a line")
    return prompts


def batches(
    prompts: Sequence[str], batch_size: int, seed: int, rows: Sequence[int] | None = None
) -> grain.DatasetIterator:
    """An endless stream of batches: every prompt once in a random order, then again in another.

    The stream is the same for every number of processes. ``iterator.get_state()`` is a small JSON-able position and
    ``set_state`` goes there.

    Args:
      prompts: at least one.
      batch_size: of the whole job.
      seed: of the order.
      rows: which samples of a batch this process wants, None for all.

    Returns:
      An iterator over lists of prompts.
    """
    order = grain.MapDataset.source(prompts).seed(seed).shuffle().repeat(None)
    stream = order.batch(batch_size, drop_remainder=True, batch_fn=list)
    if rows is not None:
        stream = stream.map(lambda batch: [batch[row] for row in rows])
    # Strings cost nothing to read: no threads.
    return iter(stream.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
