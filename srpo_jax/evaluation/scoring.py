"""Scores pictures under their prompts, with reward models of any kind that there is, on the mesh.

A score is on the scale of its publication (``Reward.reported``): HPS-v2.1 as the plain inner product, about 0.29,
PickScore and the CLIP score about 100 times the cosine, 22.7. Pictures are read at 8 bits, as they are kept. Two kinds
are made of a reward model and are none: ``sgp_hps`` (see ``sgp``) and ``diversity`` (see ``signals``).
"""

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from srpo_jax import resume, sharding, values
from srpo_jax.errors import UserError
from srpo_jax.evaluation import sgp
from srpo_jax.models.compute import Compute, Params
from srpo_jax.rewards import REWARDS
from srpo_jax.rewards.base import Reward, Tokenize
from srpo_jax.weights import fingerprint, folder

SGP, DIVERSITY = "sgp_hps", "diversity"
MADE_OF = {SGP: "hps", DIVERSITY: "clip"}  # kinds of score and the kind of reward that they are made of
KINDS = (*REWARDS, *MADE_OF)
FIGURES = {SGP: sgp.Sgp._fields}  # of kinds that give several; their first one has the score's bare name


class Score(NamedTuple):
    """A score that is asked for: its name, its kind, the folder of the reward model, the fingerprint of that, and which
    of the kind's ``FIGURES`` it is."""

    name: str
    kind: str
    path: str
    content: str
    figure: int = 0

    @property
    def source(self) -> str:
        """For people."""
        return f"{self.kind}:{self.path}"


class Spec(NamedTuple):
    """``[NAME=]KIND:PATH`` in its parts; nothing is read yet."""

    name: str
    kind: str
    path: str

    @property
    def names(self) -> tuple[str, ...]:
        """Of the scores that it gives."""
        return (self.name, *(f"{self.name}_{figure}" for figure in FIGURES.get(self.kind, ())[1:]))


def split(text: str) -> Spec:
    """``[NAME=]KIND:PATH``, NAME being KIND unless given. Raises ValueError, which says what is expected."""
    found = re.fullmatch(r"(?:([\w.+-]+)=)?(\w+):(.+)", text, re.DOTALL)
    if not found:
        raise ValueError(f"write [NAME=]KIND:PATH, as hps:models/hps; kinds are {', '.join(KINDS)}")
    name, kind, path = found[1] or found[2], found[2], values.expand(found[3])
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of score; choose one of {', '.join(KINDS)}")
    return Spec(name, kind, path)


def parse(texts: Iterable[str], flag: str) -> tuple[Score, ...]:
    """The scores that ``[NAME=]KIND:PATH`` each ask for. Raises UserError, which names the ``flag``, for a text that is
    not that, a folder that is not there, and two scores of one name."""
    found = []
    for text in texts:
        try:
            spec = split(text)
        except ValueError as error:
            raise UserError(f"{flag}={text}: {error}") from None
        folder.read_config(spec.path, REWARDS[MADE_OF.get(spec.kind, spec.kind)].network)
        content = fingerprint.joined(resume.reward_fingerprints(spec.path))
        found += [Score(name, spec.kind, spec.path, content, figure) for figure, name in enumerate(spec.names)]
    if len({score.name for score in found}) < len(found):
        raise UserError(f"two scores have one name; give them others: {flag}=NAME=KIND:PATH")
    return tuple(found)


class Scorer:
    """What a reward model sees in pictures, compiled for so many at once.

    Args:
      name: of the score, for people.
      reward: the model, apart from its parameters.
      tokens: of its captions, see ``Reward.tokens``.
      mesh: where the parameters lie.
      at_once: pictures that pass at once, rounded up to what the mesh divides.
    """

    def __init__(self, name: str, reward: Reward, tokens: Tokenize, mesh: Mesh, at_once: int):
        self._name, self._reward, self._tokens, self._mesh = name, reward, tokens, mesh
        parts = sharding.batch_parts(mesh)
        self._size = -(-at_once // parts) * parts
        everywhere = sharding.replicated(mesh)
        self._apply = jax.jit(self._score, out_shardings=everywhere)
        self._look = jax.jit(self._features, out_shardings=everywhere)

    def __call__(self, params: Params, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Scores [B], float32, of pictures uint8 [B, H, W, 3], at most ``at_once``; every process gives all of them.

        Raises UserError for a score that is no finite number.
        """
        rows = self._rows(len(images))
        tokens = self._tokens([prompts[row] for row in rows])
        values = self._run(self._apply, params, images, rows, tokens)
        if not np.isfinite(values).all():
            wrong = prompts[int(np.flatnonzero(~np.isfinite(values))[0])]
            raise UserError(f"the score {self._name} of a picture of {wrong!r} is not a finite number")
        return values

    def features(self, params: Params, images: np.ndarray) -> np.ndarray:
        """What a reward of CLIP's kind sees in the pictures, of unit norm [B, E], float32."""
        return self._run(self._look, params, images, self._rows(len(images)))

    def _rows(self, count: int) -> np.ndarray:
        """This process's share. One compiled program for all: a part that is not full repeats its last picture."""
        return np.minimum(np.arange(self._size), count - 1)[sharding.local_rows(self._mesh, self._size)]

    def _run(self, function: Callable, params: Params, images: np.ndarray, rows: np.ndarray, *more: Any) -> np.ndarray:
        def place(local: np.ndarray) -> jax.Array:
            return sharding.place(self._mesh, self._size, local)

        found = function(params, place(images[rows]), *jax.tree.map(place, more))
        return np.asarray(jax.device_get(found))[: len(images)]

    def _score(self, params: Params, images: jax.Array, tokens: object) -> jax.Array:
        reward = self._reward
        return reward.score(params, self._features(params, images), reward.prepare(params, tokens)) * reward.reported

    def _features(self, params: Params, images: jax.Array) -> Any:
        return self._reward.look(params, images.astype(jnp.float32) / 255)


# All figures [B] of a kind, of pictures under prompts, as ``Scorer.__call__`` takes them.
Judge = Callable[[np.ndarray, Sequence[str]], tuple[np.ndarray, ...]]


class Judges:
    """The reward models of scores, in float32, read once each when they are first asked for.

    Args:
      mesh: where their parameters lie.
      at_once: pictures that are scored at once.
    """

    def __init__(self, mesh: Mesh, at_once: int):
        self._mesh, self._at_once = mesh, at_once
        self._open = functools.cache(self._read)

    def judge(self, score: Score) -> Judge:
        """Of a score that is made picture by picture. Raises UserError for a folder that is not right."""
        apply, params = self._open(MADE_OF.get(score.kind, score.kind), score.path)
        if score.kind != SGP:
            return lambda images, prompts: (apply(params, images, prompts),)

        def both(images: np.ndarray, prompts: Sequence[str]) -> tuple[np.ndarray, ...]:
            return tuple(sgp.sgp(*(apply(params, images, captions) for captions in sgp.captions(prompts))))

        return both

    def features(self, score: Score) -> Callable[[np.ndarray], np.ndarray]:
        """Of a score of kind ``DIVERSITY``: what ``signals.unlikeness`` compares. Raises as ``judge``."""
        apply, params = self._open(MADE_OF[score.kind], score.path)
        return functools.partial(apply.features, params)

    def _read(self, kind: str, path: str) -> tuple[Scorer, Params]:
        compute = Compute(mesh=self._mesh, constrain=sharding.constraint(self._mesh))
        network = REWARDS[kind].network
        sizes, graphdef, params = folder.load(path, network, compute, sharding.of(self._mesh, network))
        reward = REWARDS[kind](sizes, graphdef)
        return Scorer(f"{kind}:{path}", reward, reward.tokens(path), self._mesh, self._at_once), params
