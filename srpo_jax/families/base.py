"""What a model family is: all that is to be known of one line of text-to-image models, in one object.

The rest of the project asks this object and knows no family by name. A family is a rectified flow over tokens: a
transformer predicts the velocity of packed latents under a condition, an autoencoder goes between latents and
pictures. What differs between families is below: components and their folders, the geometry of latents, what a prompt
becomes, how a step is prepared and a velocity computed, the schedule of inference, FLOPs.

A new family is a subclass in a file of its own and a line of ``families.FAMILIES``; docs/extending.md has the way.
Widths in shapes: B batch, N image tokens, C features of an image token, T text tokens, S steps.
"""

import abc
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from srpo_jax.costs.flops import Factors, Forward, Work
from srpo_jax.errors import UserError
from srpo_jax.models.compute import Compute
from srpo_jax.models.lora import Lora

# Folders of every pipeline and the file that lists them, as diffusers lays them out.
TRANSFORMER, AUTOENCODER, SCHEDULER, INDEX = "transformer", "vae", "scheduler", "model_index.json"

Condition = dict[str, jax.Array]  # arrays by name, [B, ...]: what the transformer reads beside latents, time, guidance
PlaceOf = Callable[[str], Callable[[str, tuple[int, ...]], jax.sharding.Sharding]]


class Component(NamedTuple):
    """A network of a pipeline.

    Attributes:
      network: its name in ``weights.folder.NETWORKS``.
      library, published: what a ``model_index.json`` names, as "diffusers", "AutoencoderKL".
      places: by style of export, the folder and the name without suffix of its single file.
      matrices: whether most of it are matrices, which files of 8 bits halve.
    """

    network: str
    library: str
    published: str
    places: Mapping[str, tuple[str, str]]
    matrices: bool = False


class Tokenizer(NamedTuple):
    """A tokenizer of a pipeline: what its tokens are called, the folder of the text encoder that reads them, and the
    array of a condition that has one row a token (None for a vector a prompt)."""

    label: str
    encoder: str
    array: str | None


class Sizes(NamedTuple):
    """The configs of a pipeline's networks; ``text`` by folder."""

    transformer: Any
    autoencoder: Any
    text: Mapping[str, Any]


class TextEncoders(Protocol):
    """Tokenizers and text encoders of a pipeline.

    ``apply(params, *tokens)`` is pure and gives a ``Condition`` in the compute dtype; ``tokens`` come from prompts on
    the host, int32 arrays [B, ...].
    """

    params: Any
    apply: Callable[..., Condition]

    def tokens(self, prompts: Sequence[str], length: int) -> tuple[np.ndarray, ...]: ...


class Family(abc.ABC):
    """A model family; see the module. Instances hold facts, no arrays.

    Attributes:
      name: in messages, as "FLUX.1".
      pipeline: ``_class_name`` of its ``model_index.json``.
      components: by folder of the pipeline; ``TRANSFORMER`` and ``AUTOENCODER`` are among them, the others are text
        encoders.
      tokenizers: by folder of the pipeline.
      scheduler: class of its scheduler in diffusers.
      published: sizes by a short name, for work without weights (preflight, benchmark).
      factor: pixels of a picture for each latent position, along a side.
      channels: of a latent position.
      patch: latent positions, along a side, that one token packs.
      text_length: most tokens of a prompt.
    """

    name: str
    pipeline: str
    components: Mapping[str, Component]
    tokenizers: Mapping[str, Tokenizer]
    scheduler: str
    published: Mapping[str, Sizes]
    factor: int
    channels: int
    patch: int
    text_length: int

    # --- components ---

    @property
    def network(self) -> str:
        """The transformer's name in ``weights.folder.NETWORKS``."""
        return self.components[TRANSFORMER].network

    @property
    def decoder(self) -> str:
        """The autoencoder's name in ``weights.folder.NETWORKS``."""
        return self.components[AUTOENCODER].network

    @property
    def copied(self) -> tuple[str, ...]:
        """The folders of a pipeline that go along as they are."""
        return (*self.tokenizers, SCHEDULER)

    @property
    def text_folders(self) -> tuple[str, ...]:
        """The folders of the text encoders."""
        return tuple(part for part in self.components if part not in (TRANSFORMER, AUTOENCODER))

    def check(self, sizes: Sizes, path: Any) -> None:
        """Raises UserError if the networks of the pipeline ``path`` do not fit each other."""
        found = sizes.autoencoder.factor, sizes.autoencoder.latent_channels
        if found != (self.factor, self.channels):
            raise UserError(
                f"{path}/{AUTOENCODER} has {found[1]} channels of latents at 1/{found[0]} of a picture's sides; "
                f"{self.name} takes {self.channels} at 1/{self.factor}"
            )

    # --- geometry ---

    @property
    def cell(self) -> int:
        """Pixels of a picture for each token, along a side."""
        return self.factor * self.patch

    def check_size(self, height: int, width: int, keys: tuple[str, str]) -> None:
        """Raises UserError for pictures that are no whole number of tokens; ``keys`` name the two sides to the user."""
        for key, value in zip(keys, (height, width), strict=True):
            if value <= 0 or value % self.cell:
                raise UserError(f"{key}={value}: must be a positive multiple of {self.cell}")

    def check_text_length(self, key: str, length: int) -> None:
        """Raises UserError for more tokens of a prompt than the family takes; ``key`` names them to the user."""
        if length > self.text_length:
            raise UserError(f"{key}={length}: {self.name} takes at most {self.text_length} tokens of a prompt")

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Of a picture's latents as the autoencoder has them, for sides in pixels."""
        return height // self.factor, width // self.factor, self.channels

    def token_shape(self, height: int, width: int) -> tuple[int, int]:
        """(N, C): of a picture's packed latents."""
        return height // self.cell * (width // self.cell), self.channels * self.patch**2

    def pack(self, latents: jax.Array) -> jax.Array:
        """Latents ``[B, h, w, channels]`` to tokens ``[B, N, C]``, row by row, channel-major in a token."""
        batch, height, width, channels = latents.shape
        rows, columns, side = height // self.patch, width // self.patch, self.patch
        x = latents.reshape(batch, rows, side, columns, side, channels)
        return x.transpose(0, 1, 3, 5, 2, 4).reshape(batch, rows * columns, channels * side**2)

    def unpack(self, tokens: jax.Array, height: int, width: int) -> jax.Array:
        """The inverse of ``pack``, for a picture of ``height`` and ``width`` in pixels."""
        batch, side = tokens.shape[0], self.patch
        rows, columns = height // self.cell, width // self.cell
        x = tokens.reshape(batch, rows, columns, self.channels, side, side)
        return x.transpose(0, 1, 4, 2, 5, 3).reshape(batch, rows * side, columns * side, self.channels)

    # --- pictures ---

    def encode(self, autoencoder: Any, images: jax.Array) -> jax.Array:
        """Pictures ``[B, H, W, 3]`` in -1 .. 1 to latents as the transformer is trained on, ``[B, h, w, channels]``,
        float32: the posterior's mean."""
        return autoencoder.scale_latents(autoencoder.encode(images)[0])

    def decode(self, autoencoder: Any, tokens: jax.Array, height: int, width: int) -> jax.Array:
        """Packed latents to the decoder's raw output ``[B, H, W, 3]``, about -1 .. 1 and not clipped, float32."""
        return autoencoder.decode(autoencoder.unscale_latents(self.unpack(tokens, height, width)))

    # --- prompts ---

    @abc.abstractmethod
    def condition(self, transformer: Any, text_length: int) -> dict[str, tuple[int, ...]]:
        """The shapes of a ``Condition``'s arrays, without the batch, for a transformer's config; all in the compute
        dtype."""

    @abc.abstractmethod
    def text_encoders(
        self, path: str | os.PathLike, transformer: Any, compute: Compute, place: PlaceOf | None = None
    ) -> TextEncoders:
        """The text encoders of a pipeline folder, for a transformer of this config.

        ``place`` is called with a network's name for where its parameters go, as ``weights.folder.load`` takes it;
        None puts whole arrays on the default device. Raises UserError for folders that are missing, or do not fit.
        """

    # --- the velocity ---

    @abc.abstractmethod
    def prepare(self, transformer: Any, condition: Condition, time: jax.Array, guidance: jax.Array) -> Any:
        """What a step draws from condition, time [B] and guidance scale [B] before it sees the latents: arrays whose
        axis before the last is the batch. A network without guidance leaves that number alone."""

    def prepare_steps(self, transformer: Any, condition: Condition, times: jax.Array, guidance: jax.Array) -> Any:
        """``prepare`` at every step [S] of a sampler, ``[S, ...]``, from weights that are read once; guidance [B]."""
        batch, steps = len(guidance), len(times)
        # The samples' axis first, along which a mesh splits. What is not read of the repeated condition is not made.
        spread = jax.tree.map(lambda x: jnp.repeat(x, steps, axis=0), condition)
        made = self.prepare(transformer, spread, jnp.tile(times, batch), jnp.repeat(guidance, steps))

        def by_step(x: jax.Array) -> jax.Array:
            return jnp.moveaxis(x.reshape(*x.shape[:-2], batch, steps, x.shape[-1]), -2, 0)

        return jax.tree.map(by_step, made)

    @abc.abstractmethod
    def velocity(
        self, transformer: Any, x: jax.Array, condition: Condition, prepared: Any, height: int, width: int
    ) -> jax.Array:
        """The velocity ``[B, N, C]`` at latents ``x``, of pictures of that size in pixels; guidance included, which may
        take a second pass (``families.guidance``)."""

    def no_change(self, transformer: Any, x: jax.Array, condition: Condition) -> Any:
        """What ``cached_velocity`` is given first, for latents ``x`` [B, N, C]."""
        raise UserError(f"config.rollout.cache: {self.name} has no cache of blocks; set it to 1")

    def cached_velocity(
        self,
        transformer: Any,
        x: jax.Array,
        condition: Condition,
        prepared: Any,
        height: int,
        width: int,
        change: Any,
        renew: jax.Array,
        ends: tuple[int, int],
    ) -> tuple[jax.Array, Any]:
        """The velocity, with the blocks between ``ends`` replaced by what they changed before where ``renew`` is
        false; and that change."""
        raise UserError(f"config.rollout.cache: {self.name} has no cache of blocks; set it to 1")

    def is_modulation(self, path: str) -> bool:
        """Whether a layer or parameter, by its dotted path, reads one vector a sample: ``prepare`` alone uses it."""
        del path
        return False

    # --- inference ---

    def shift(self, height: int, width: int) -> float:
        """The time shift of the family's own schedule for pictures of that size in pixels (``rollout.shift`` = 0)."""
        raise UserError(f"config.rollout.shift=0.0: {self.name} has no shift by the size of pictures; give a number")

    @abc.abstractmethod
    def schedule(self, path: str | os.PathLike, steps: int, height: int, width: int) -> np.ndarray:
        """The noise levels ``[steps + 1]``, float32, 1 to 0, of the pipeline's inference for pictures of that size.

        Raises UserError for a scheduler file that is missing or asks for what is not computed here.
        """

    # --- costs ---

    @abc.abstractmethod
    def forward(self, transformer: Any, image_tokens: int, text_tokens: int) -> Forward:
        """FLOPs of one sample's pass through the transformer, preparation included."""

    def preparation(self, transformer: Any) -> float:
        """FLOPs of ``forward`` that belong to blocks' preparation."""
        del transformer
        return 0.0

    def blocks(self, transformer: Any) -> tuple[int, ...]:
        """How many blocks a transformer of this config has, by kind in the order in which they run."""
        del transformer
        return ()

    def with_blocks(self, transformer: Any, blocks: tuple[int, ...]) -> Any:
        """The config with other numbers of blocks. Raises UserError if there is no such transformer."""
        raise UserError(f"{self.name} has no blocks to choose from; got {','.join(map(str, blocks))}")

    def kept(self, transformer: Any, image_tokens: int, text_tokens: int) -> dict[str, int]:
        """Numbers that all blocks keep of one sample for the backward pass, by name (``models.compute.KEPT``)."""
        del transformer, image_tokens, text_tokens
        return {}

    def factors(self, transformer: Any, lora: Lora, image_tokens: int, text_tokens: int) -> Factors:
        """Numbers and FLOPs of the low-rank factors."""
        raise UserError(f"config.lora.rank: {self.name} has no layers to adapt; set it to 0")

    def adapted(
        self, transformer: Any, lora: Lora, image_tokens: int, text_tokens: int, *, remat: str, attention: str
    ) -> Work:
        """FLOPs of a forward and a backward pass in which factors alone are trained."""
        raise UserError(f"config.lora.rank: {self.name} has no layers to adapt; set it to 0")
