"""Scores pictures under their prompts, with reward models of any kind that there is, in float32, on the mesh.

A score is on the scale of its publication (``Reward.reported``): HPS-v2.1 as the plain inner product, about 0.29,
PickScore and the CLIP score about 100 times the cosine, 22.7. Pictures are read at 8 bits, as they are kept.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from srpo_jax import resume, sharding, values
from srpo_jax.errors import UserError
from srpo_jax.models.compute import Compute, Params
from srpo_jax.rewards import REWARDS
from srpo_jax.weights import fingerprint, folder


class Score(NamedTuple):
    """A score that is asked for: its name, the kind of its reward model, the folder, and the fingerprint of that."""

    name: str
    kind: str
    path: str
    content: str

    @property
    def source(self) -> str:
        """For people."""
        return f"{self.kind}:{self.path}"


def parse(text: str) -> Score:
    """``[NAME=]KIND:PATH``, NAME being KIND unless given. Raises UserError for what is not that, or not there."""
    found = re.fullmatch(r"(?:([\w.+-]+)=)?(\w+):(.+)", text, re.DOTALL)
    if not found:
        raise UserError(f"--score={text}: write [NAME=]KIND:PATH, as hps:models/hps; kinds are {', '.join(REWARDS)}")
    name, kind, path = found[1] or found[2], found[2], values.expand(found[3])
    if kind not in REWARDS:
        raise UserError(f"--score={text}: {kind!r} is no kind of score; choose one of {', '.join(REWARDS)}")
    folder.read_config(path, REWARDS[kind].network)
    return Score(name, kind, path, fingerprint.joined(resume.reward_fingerprints(path)))


class Scorer:
    """A reward model on a mesh.

    Args:
      score: which.
      mesh: where its parameters lie.
      at_once: pictures that are scored at once, rounded up to what the mesh divides.

    Raises UserError for a folder that is not right.
    """

    def __init__(self, score: Score, mesh: Mesh, at_once: int):
        kind = REWARDS[score.kind]
        compute = Compute(mesh=mesh, constrain=sharding.constraint(mesh))
        sizes, graphdef, self._params = folder.load(score.path, kind.network, compute, sharding.of(mesh, kind.network))
        self._reward, self._mesh, self._name = kind(sizes, graphdef), mesh, score.name
        self._tokens = self._reward.tokens(score.path)
        parts = sharding.batch_parts(mesh)
        self._size = -(-at_once // parts) * parts
        self._apply = jax.jit(self._score, out_shardings=sharding.replicated(mesh))

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Scores [B], float32, of pictures uint8 [B, H, W, 3], at most ``at_once``; every process gives all of them.

        Raises UserError for a score that is no finite number.
        """
        # One compiled program for all: a part that is not full repeats its last picture.
        filled = np.minimum(np.arange(self._size), len(images) - 1)
        rows = filled[sharding.local_rows(self._mesh, self._size)]
        tokens = self._tokens([prompts[row] for row in rows])

        def place(local: np.ndarray) -> jax.Array:
            return sharding.place(self._mesh, self._size, local)

        found = self._apply(self._params, place(images[rows]), jax.tree.map(place, tokens))
        values = np.asarray(jax.device_get(found))[: len(images)]
        if not np.isfinite(values).all():
            wrong = prompts[int(np.flatnonzero(~np.isfinite(values))[0])]
            raise UserError(f"the score {self._name} of a picture of {wrong!r} is not a finite number")
        return values

    def _score(self, params: Params, images: jax.Array, tokens: object) -> jax.Array:
        reward = self._reward
        seen = reward.look(params, images.astype(jnp.float32) / 255)
        return reward.score(params, seen, reward.prepare(params, tokens)) * reward.reported
