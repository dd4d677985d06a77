"""What the study asks and the runs that answer it: parts, their cases, the compute of each. No network runs here."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from srpo_jax.algorithm.methods import METHODS
from srpo_jax.architectures import Architecture
from srpo_jax.costs import work
from srpo_jax.emoji import measure, world

HONEST, BIASED = "reward", "biased"  # folders of the two rewards
REWARDS = {HONEST: "honest", BIASED: "biased"}  # what they are called
RECOVERY = "recovery"  # the part that trains nothing, see recovery
PARTS = (RECOVERY, "guard", "words", "levels", "images", "methods", "discounts")
UNKNOWN = ("Qux", "Zyx")  # words that no caption has
NO_HINGE = {"reward.margin": 10.0}  # the reward is followed as far as a run goes


@dataclasses.dataclass(frozen=True)
class Preset:
    """The size of a study.

    Attributes:
      updates: of SRPO in a run; other methods take as many as cost the same.
      longer: how many times as long the long runs of ``methods`` and ``discounts`` are.
      seeds: runs of each case.
      concepts, pictures: held-out concepts that are drawn, and pictures of each.
      tuning: concepts of the train split, a picture each, by which a learning rate is chosen.
      rates: learning rates that are tried.
      methods: of ``algorithm.methods.METHODS``.
      discounts: k of the relative reward, in ``guard``.
      changes: of the recipe, by key.
    """

    updates: int
    longer: int
    seeds: int
    concepts: int
    pictures: int
    tuning: int
    rates: tuple[float, ...]
    methods: tuple[str, ...]
    discounts: tuple[float, ...]
    changes: dict[str, Any]


# A rollout of this world has 10 steps where FLUX.1-dev's has 25: "one of the last 10 of 25" is one of the last 4.
LATE = {"refl.late_steps": 4, "drtune.late_steps": 4}
PRESETS = {
    "full": Preset(
        updates=10, longer=5, seeds=3, concepts=59, pictures=3, tuning=60, rates=(1e-5, 3e-5, 1e-4),
        methods=tuple(METHODS), discounts=(2.0, 0.5, 0.1), changes=LATE,
    ),
    "small": Preset(
        updates=1, longer=2, seeds=2, concepts=3, pictures=2, tuning=3, rates=(1e-5, 3e-5), methods=("srpo", "refl"),
        discounts=(2.0,), changes=LATE | {"data.batch_size": 2, "rollout.steps": 4, "sample.steps": 2},
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of a table: a run, to be made with several seeds.

    Attributes:
      folder: where its cells are, below ``cells``; cases of several parts may be one.
      name: in tables.
      changes: of the recipe, by key.
      reward: ``HONEST`` or ``BIASED``.
      moments: numbers of updates after which it is judged; the last one is its end.
      rates: learning rates to choose from; () keeps the recipe's.
      wanted: the styles that the words ask for.
      styles: those of the artists' pictures that take the rollout's place; () for rollouts.
    """

    folder: str
    name: str
    changes: dict[str, Any]
    moments: tuple[int, ...]
    reward: str = HONEST
    rates: tuple[float, ...] = ()
    wanted: tuple[str, ...] = (measure.WANTED,)
    styles: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Part:
    """A question and the cases that answer it."""

    name: str
    title: str
    text: str
    cases: tuple[Case, ...]


def by_reward(part: Part) -> Iterator[tuple[str, tuple[Case, ...]]]:
    """A part's cases under the honest reward and those under the biased one, each with its word, where there are any.
    The names of such cases are their own; those of a part's need not be."""
    for reward, word in REWARDS.items():
        if cases := tuple(case for case in part.cases if case.reward == reward):
            yield word, cases


# --- compute ----------------------------------------------------------------------------------------------------------


def flops(config: ConfigDict, architecture: Architecture) -> float:
    """FLOPs of the transformer and the decoder in one update, without what is recomputed."""
    spent = work.update(config, architecture)
    return sum(spent[part].model for part in ("rollout", "transformer", "autoencoder"))


def changed(config: ConfigDict, changes: dict[str, Any]) -> ConfigDict:
    """A copy of a recipe with other values at some keys, as ``rollout.reuse``."""
    own = config.copy_and_resolve_references()
    own.update_from_flattened_dict(changes)
    return own


def method(name: str) -> dict[str, Any]:
    """The keys that choose a method, at SRPO's relative reward."""
    return {"method": name, "reward.target": "relative"}


def discounted(k: float) -> dict[str, Any]:
    """One discount everywhere: both branches of SRPO, and the relative reward of other methods."""
    return {"align.discount_positive": (k, k), "align.discount_negative": (k, k), "reward.discount": k}


# --- the parts --------------------------------------------------------------------------------------------------------


def parts(preset: Preset, config: ConfigDict, architecture: Architecture) -> tuple[Part, ...]:
    """All parts of a study, in the order in which they are run."""
    budget = preset.updates * flops(config, architecture)

    def afford(changes: dict[str, Any]) -> int:
        return max(1, round(budget / flops(changed(config, changes), architecture)))

    once, methods = (preset.updates,), tuple(_methods(preset, afford))
    return (
        Part(
            RECOVERY,
            "Recovery of a picture from noise",
            "The artists' 3D pictures of held-out concepts, noised to a level and recovered: by the one-step "
            "prediction, and by Direct-Align's short step and known noise.",
            (),
        ),
        Part(
            "guard",
            "What guards against a reward's taste",
            "Under the reward that likes colour, after as many updates. k is the discount: how much of the plain "
            "reward, and with it of its taste, is left beside the words. Plain: the reward of the bare name.",
            tuple(_guard(preset, once)),
        ),
        Part(
            "words",
            "Control words",
            "The recipe under the honest reward with other words. Judged: the share in one of the wanted styles.",
            tuple(_words(once)),
        ),
        Part(
            "levels",
            "Which noise levels to train",
            "Steps of 50 of the schedule, 0 the noisiest, under the reward that likes colour, k = 1.",
            tuple(_levels(once)),
        ),
        Part(
            "images",
            "Where the images come from",
            "The recipe under the honest reward.",
            (_recipe(once), *_images(once)),
        ),
        Part(
            "methods",
            "All methods at equal compute",
            "Equal FLOPs of transformer and decoder, SRPO's relative reward with k = 1 for all, no hinge, each at the "
            "learning rate that served best on concepts of the train split (share of pictures with style and concept "
            f"right); and {preset.longer} times as long.",
            methods,
        ),
        Part(
            "discounts",
            "What keeps the concept in a long run",
            f"SRPO of the part before, {preset.longer} times as long, with other discounts k+ of the denoising and k- "
            "of the inversion branch: together they follow (2 + k+) r+ - (2 + k-) r-, so that k+ - k- is how much of "
            "the caption's own reward, and with it of its taste, is left.",
            tuple(_discounts(methods)),
        ),
    )


def _recipe(moments: tuple[int, ...]) -> Case:
    return Case("words/3D", "3D against Flat, Mono", {}, moments)


def _guard(preset: Preset, moments: tuple[int, ...]) -> Iterator[Case]:
    kinds = {
        "SRPO": {},
        "SRPO without inversion": {"align.branches": ("denoise",)},
        "Direct-Align": method("direct_align"),
        "ReFL": method("refl"),
    }
    for k in preset.discounts:
        for name, changes in kinds.items():
            folder = f"guard/{name.lower().replace(' ', '_')}_{k}"
            yield Case(folder, f"{name}, k = {k:g}", changes | NO_HINGE | discounted(k), moments, BIASED)
    for name in ("Direct-Align", "ReFL"):
        changes = kinds[name] | NO_HINGE | {"reward.target": "caption"}
        yield Case(f"guard/{name.lower()}_plain", f"{name}, plain", changes, moments, BIASED)
    yield Case("guard/recipe", "SRPO, released discounts", {}, moments, BIASED)


def _words(moments: tuple[int, ...]) -> Iterator[Case]:
    three, flat, mono = world.STYLES
    yield _recipe(moments)
    for wanted, unwanted in (
        ((flat,), (three, mono)),
        ((mono,), (three, flat)),
        ((three, flat), (mono,)),
        (UNKNOWN[:1], (flat, mono)),
        (UNKNOWN[:1], UNKNOWN[1:]),
    ):
        changes = {"reward.positive": wanted, "reward.negative": unwanted}
        folder = f"words/{'_'.join(wanted)}_against_{'_'.join(unwanted)}"
        # A word that the reward does not know is judged by the style that stays when the others are pushed away.
        judged = (three,) if wanted[0] in UNKNOWN else wanted
        yield Case(folder, f"{', '.join(wanted)} against {', '.join(unwanted)}", changes, moments, wanted=judged)


def _levels(moments: tuple[int, ...]) -> Iterator[Case]:
    for name, chosen in (("Direct-Align", "direct_align"), ("SRPO", "srpo")):
        for window in ((1, 10), (10, 25), (25, 40), (40, 49)):
            changes = {"align.train_timestep": window, "align.weights": (1.0, 1.0)}
            changes |= method(chosen) | NO_HINGE | discounted(1.0)
            folder = f"levels/{chosen}_{window[0]}_{window[1]}"
            yield Case(folder, f"{name}, steps {window[0]} to {window[1]}", changes, moments, BIASED)


def _images(moments: tuple[int, ...]) -> Iterator[Case]:
    yield Case("images/reuse_2", "rollouts, each for two updates", {"rollout.reuse": 2}, moments)
    fast = {"rollout.cache": 2, "rollout.cache_ends": (1, 1), "rollout.reuse": 2}
    yield Case("images/fast", "the same, every second step cached (flux_dev_hps_fast.py)", fast, moments)
    yield Case("images/shared", "rollouts of one noise for the batch", {"rollout.noise": "shared"}, moments)
    yield Case("images/offline_all", "artists' pictures, all styles", {}, moments, styles=world.STYLES)
    yield Case("images/offline_wanted", "artists' pictures, 3D", {}, moments, styles=(measure.WANTED,))


def _methods(preset: Preset, afford: Callable[[dict[str, Any]], int]) -> Iterator[Case]:
    for reward in REWARDS:
        for name in preset.methods:
            changes = method(name) | NO_HINGE | discounted(1.0)
            updates = afford(changes)
            moments = tuple(sorted({updates, updates * ((1 + preset.longer) // 2), updates * preset.longer}))
            yield Case(f"methods/{reward}/{name}", name, changes, moments, reward, preset.rates)


def _discounts(methods: tuple[Case, ...]) -> Iterator[Case]:
    """SRPO's cases of ``methods``, each with others of the same length: at the recipe's learning rate, which is the one
    that ``methods`` finds for SRPO."""
    for equal in (case for case in methods if case.name == "srpo"):
        yield equal
        for plus, minus in ((1.5, 0.5), (2.0, 0.0)):
            changes = {"align.discount_positive": (plus, plus), "align.discount_negative": (minus, minus)}
            folder, name = f"discounts/{equal.reward}/{plus:g}_{minus:g}", f"srpo, k+ = {plus:g}, k- = {minus:g}"
            yield Case(folder, name, equal.changes | changes, equal.moments, equal.reward)
