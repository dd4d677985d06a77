"""From a configuration to an endless, shuffled stream of batches whose position can be saved."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np
from ml_collections import ConfigDict

from srpo_jax.architectures import Architecture
from srpo_jax.data import filters, sources, stored
from srpo_jax.errors import UserError
from srpo_jax.families.base import AUTOENCODER
from srpo_jax.weights import fingerprint


class ExampleSource(Protocol):
    """Examples that can be read in any order.

    ``read(places)`` gives one dictionary each, with ``prompt`` and arrays by name. ``digest`` tells these examples from
    others, ``summary`` describes them in a line. ``ahead`` batches are read before they are asked for, by as many
    threads.
    """

    digest: str
    summary: str
    ahead: int

    def __len__(self) -> int: ...

    def read(self, places: Sequence[int]) -> list[dict[str, Any]]: ...


class Examples(NamedTuple):
    """Some examples of a batch: their prompts, and their arrays ``[len(prompts), ...]`` by name (none if only prompts
    are stored)."""

    prompts: list[str]
    arrays: dict[str, np.ndarray]


class Prompts:
    """Prompts in memory as an ``ExampleSource``; ``summary`` as ``filters.describe`` makes it."""

    ahead = 0  # strings cost nothing to read: no threads

    def __init__(self, prompts: Sequence[str], summary: str = ""):
        self._prompts, self.summary, self.digest = list(prompts), summary, stored.digest(prompts)

    def __len__(self) -> int:
        return len(self._prompts)

    def read(self, places: Sequence[int]) -> list[dict[str, Any]]:
        """The prompts at these places."""
        return [{"prompt": self._prompts[place]} for place in places]


class Encoded:
    """Examples of a data set as an ``ExampleSource``: those at ``places``, with these ``prompts``.

    ``latents`` says that the pictures count: ``digest`` then tells them from others with the same captions.
    """

    ahead = 2  # batches; 32 examples of T5-XXL's features are 134 MB

    def __init__(
        self,
        data: stored.DataSet,
        places: Sequence[int],
        prompts: Sequence[str],
        summary: str = "",
        latents: bool = False,
    ):
        self._data, self._places, self.summary = data, list(places), summary
        self.digest = stored.digest([*prompts, data.manifest.digest] if latents else prompts)

    def __len__(self) -> int:
        return len(self._places)

    def read(self, places: Sequence[int]) -> list[dict[str, Any]]:
        """The examples at these places."""
        return self._data.read([self._places[place] for place in places])


def open_examples(config: ConfigDict, architecture: Architecture) -> ExampleSource:
    """The examples of a validated configuration for these networks.

    Raises UserError if they cannot be read, or were encoded otherwise than the configuration would.
    """
    where, data = config.data.prompts, None
    if config.data.encode == "stored":
        where, data = config.data.path, stored.DataSet(config.data.path)
        check_encoding(data.manifest, config, architecture)
    prompts = sources.read(where, config.data.column) if data is None else stored.read_prompts(where)
    wanted = config.data.filter
    chosen = filters.Filter(wanted.min_length, wanted.max_length, wanted.include, wanted.exclude, wanted.unique)
    places, counts = filters.select(prompts, chosen)
    summary, kept = f"{where}: {filters.describe(len(prompts), counts)}", [prompts[place] for place in places]
    if data is None:
        return Prompts(kept, summary)
    return Encoded(data, places, kept, summary, latents=config.data.images == "stored")


def check_encoding(manifest: stored.Manifest, config: ConfigDict, architecture: Architecture) -> None:
    """Raises UserError, with the remedy, if stored arrays are not what ``config``'s encoders would make."""
    path, family, length = config.data.path, architecture.family, config.data.text_length
    for name, shape in family.condition(architecture.transformer, length).items():
        if name not in manifest.arrays:
            raise UserError(f"{path} holds no {name}, which {family.name} reads; encode again")
        found = manifest.arrays[name]
        if found.shape[-1] != shape[-1]:
            raise UserError(
                f"{path} has features of width {found.shape[-1]} ({name}); the transformer of {config.model.path} "
                f"expects {shape[-1]}"
            )
        if found.shape != shape:
            raise UserError(
                f"{path} was encoded with {found.shape[0]} tokens a prompt, config.data.text_length={length}; "
                f"set --config.data.text_length={found.shape[0]}, or encode again with --text-length={length}"
            )
        if str(found.dtype) != config.model.dtype:
            raise UserError(
                f"{path} was encoded in {found.dtype}, config.model.dtype={config.model.dtype}; encode again with "
                f"--dtype={config.model.dtype}"
            )
    networks = family.text_folders
    if config.data.images == "stored":
        _check_latents(manifest, config, family.factor)
        networks = *networks, AUTOENCODER
    here = fingerprint.of_parts(config.model.path, networks, family.tokenizers)
    if different := [part for part in here if manifest.encoders.get(part) != here[part]]:
        raise UserError(
            f"{path} was encoded by another {' and another '.join(different)} than config.model.path="
            f"{config.model.path} has (by {manifest.model}); encode again with --model={config.model.path}"
        )


def _check_latents(manifest: stored.Manifest, config: ConfigDict, factor: int) -> None:
    path, height, width = config.data.path, config.data.height, config.data.width
    if stored.LATENTS not in manifest.arrays:
        raise UserError(
            f"{path} holds prompts without pictures; config.data.images=stored needs a data set made by "
            "`python -m srpo_jax.encode --images=...`"
        )
    rows, columns, _ = manifest.arrays[stored.LATENTS].shape
    found = rows * factor, columns * factor
    if found != (height, width):
        raise UserError(
            f"{path} holds pictures of {found[0]}x{found[1]} (height x width), config.data.height={height} and width="
            f"{width}; set --config.data.height={found[0]} --config.data.width={found[1]}, or encode again with "
            f"--height={height} --width={width}"
        )


def batches(
    source: ExampleSource, batch_size: int, seed: int, rows: Sequence[int] | None = None
) -> grain.DatasetIterator[Examples]:
    """An endless stream of batches: every example once in a random order, then again in another.

    The stream is the same for every number of processes. ``iterator.get_state()`` is a small JSON-able position, of
    what was taken and not of what was read ahead, and ``set_state`` goes there.

    Args:
      source: at least one example.
      batch_size: of the whole job.
      seed: of the order.
      rows: which samples of a batch this process wants, None for all; others are not read.

    Returns:
      An iterator over ``Examples``.
    """
    order = grain.MapDataset.source(range(len(source))).seed(seed).shuffle().repeat(None)
    places = order.batch(batch_size, drop_remainder=True, batch_fn=list)

    def read(batch: list[int]) -> Examples:
        examples = source.read([int(batch[row]) for row in (range(batch_size) if rows is None else rows)])
        prompts = [example.pop("prompt") for example in examples]
        return Examples(prompts, {name: np.stack([example[name] for example in examples]) for name in examples[0]})

    options = grain.ReadOptions(num_threads=source.ahead, prefetch_buffer_size=source.ahead)
    return iter(places.map(read).to_iter_dataset(options))
