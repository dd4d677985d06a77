"""What a reward is: a network that scores pictures under captions, in four functions.

    tokens(texts)                  on the host: what the network reads of captions
    prepare(params, tokens)        compiled: what can be made of the captions alone
    look(params, images)           compiled: what can be made of the pictures alone
    score(params, seen, prepared)  compiled: the reward, [B]

A CLIP does its work in ``prepare`` and ``look``, once whatever is asked then; a network that reads picture and text
together does it in ``score``, a pass for each caption. All but ``tokens`` are pure and differentiable in the pictures.

A new reward is a subclass in a file of its own and a line of ``rewards.REWARDS``; docs/extending.md has the way.
"""

import abc
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx

from srpo_jax.costs.flops import Forward
from srpo_jax.models.compute import Params

# Text by text to a tree of integer arrays [B, ...].
Tokenize = Callable[[Sequence[str]], Any]


class Reward(abc.ABC):
    """A reward model, apart from its parameters.

    Args:
      sizes: config of its network.
      graphdef: of its network.
      weight: its share in a mixture.

    Attributes:
      network: the network's name in ``weights.folder.NETWORKS``.
      published: sizes of the published weights, for work without them (preflight, benchmark).
      tokenizer_of: where its tokenizer is found that the published weights come without, in words; "" for a reward
        without tokenizer.
      reported: what a reward is multiplied by where it is reported, to stand on its publication's scale.
    """

    network: ClassVar[str]
    published: ClassVar[Any]
    tokenizer_of: ClassVar[str] = ""
    reported: ClassVar[float] = 1.0

    def __init__(self, sizes: Any, graphdef: nnx.GraphDef, weight: float = 1.0):
        self.sizes, self.graphdef, self.weight = sizes, graphdef, weight

    @abc.abstractmethod
    def tokens(self, path: str | os.PathLike) -> Tokenize:
        """The function that turns captions into tokens, with the tokenizer of a reward's folder.

        Raises UserError for a folder whose tokenizer is missing or does not fit the network.
        """

    @classmethod
    def load_tokenizer(cls, sizes: Any, where: str | os.PathLike) -> Any:
        """The tokenizer in a folder, for a network of these sizes; of a reward that has ``tokenizer_of``.

        Raises UserError if it is missing or is not the network's.
        """
        raise NotImplementedError(f"{cls.__name__} has no tokenizer")

    @abc.abstractmethod
    def token_shapes(self) -> Any:
        """The shapes of one caption's tokens, a tree of ``ShapeDtypeStruct`` like what ``tokens`` gives, without the
        batch."""

    @abc.abstractmethod
    def prepare(self, params: Params, tokens: Any) -> Any:
        """A tree of arrays [B, ...] from tokens [B, ...]."""

    @abc.abstractmethod
    def look(self, params: Params, images: jax.Array) -> Any:
        """A tree of arrays [B, ...] from pictures ``[B, H, W, 3]`` in [0, 1], of any size."""

    @abc.abstractmethod
    def score(self, params: Params, seen: Any, prepared: Any) -> jax.Array:
        """The reward ``[B]``, float32."""

    # --- costs: FLOPs of one sample; None is nothing that counts ---

    def prepare_cost(self) -> Forward | None:
        """Of ``prepare``, one caption."""
        return None

    def look_cost(self) -> Forward | None:
        """Of ``look``, one picture."""
        return None

    def score_cost(self) -> Forward | None:
        """Of ``score``, one picture under one caption."""
        return None


def int32(*shape: int) -> jax.ShapeDtypeStruct:
    """The shape of one caption's ids."""
    return jax.ShapeDtypeStruct(shape, np.int32)
