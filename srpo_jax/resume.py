"""Whether a run may go on in a workdir: what of its configuration may change, and that its models are the same ones.

Models are told by their content, not by where they lie; prompts and pictures by the digest in each checkpoint.
"""

import os
import pathlib
from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict

from srpo_jax import config as config_lib
from srpo_jax import families
from srpo_jax.architectures import used_rewards
from srpo_jax.weights import fingerprint

# A run may be resumed with other values of these: they change where and how fast it runs, not what it computes (but for
# the order of sums). What prompts and pictures are is known by their digest, what the models are by their fingerprints.
FREE = (
    *("steps", "checkpoint", "sample", "mesh", "remat", "compilation_cache", "model.scan_unroll", "model.attention"),
    *("optim.merge_terms", "optim.patience", "optim.offload", "optim.accumulation", "rollout.gather", "rollout.unroll"),
    *("evaluate", "wandb"),  # evaluations that were made in another way are told apart, see evaluation.history
    *("data.prompts", "data.path", "data.column", "lora.init"),
)
TOKENIZER = "tokenizer"  # of a reward's folder
IMAGES_BEFORE = {"online": "rollout", "offline": "stored"}  # values of data.rollout, an earlier name of data.images


def up_to_date(flat: dict[str, Any]) -> dict[str, Any]:
    """A ``config.flatten`` result of any version in today's keys; a key that it lacks has its default."""
    found = {}
    for key, value in flat.items():
        today = config_lib.renamed(key)
        found[today] = IMAGES_BEFORE[value] if today == "data.images" and today != key else value
        if (name := config_lib.reward_of(today)) and today != key:  # name and kind were one
            found[f"reward.models.{name}.kind"] = name
    if found.get("method") == "refl":  # which drew a step for each sample before it could choose
        found.setdefault("rollout.draws", "per_sample")
    return config_lib.flatten(config_lib.default()) | found


def fingerprints(config: ConfigDict) -> dict[str, str]:
    """Of the models of a run, by the key of their path. Raises UserError for a folder that is not right."""
    family = families.of_pipeline(config.model.path)
    parts = fingerprint.of_parts(config.model.path, family.components, family.tokenizers)
    found = {"model.path": fingerprint.joined(parts.values())}
    for name, reward in used_rewards(config).items():
        found[f"reward.models.{name}.path"] = fingerprint.joined(reward_fingerprints(reward.path))
    return found


def reward_fingerprints(path: str | os.PathLike) -> list[str]:
    """Of a reward's network and, if it has one, its tokenizer. Raises UserError for a folder that is not right."""
    path = pathlib.Path(path)
    parts = [fingerprint.of_network(path)]
    if (path / TOKENIZER).is_dir():
        parts.append(fingerprint.of_tokenizer(path / TOKENIZER))
    return parts


def differences(
    here: dict[str, Any],
    there: dict[str, Any],
    models: dict[str, str],
    models_there: dict[str, str],
    allowed: Collection[str] = (),
) -> list[str]:
    """What forbids to resume one run as the other, each in words.

    Args:
      here, there: ``config.flatten`` results, that of the workdir in any version's keys.
      models, models_there: ``fingerprints``; a workdir of an earlier version has none.
      allowed: keys, or groups of keys, that may change beside ``FREE``.
    """
    here, there = (_without_unused(flat) for flat in (here, up_to_date(there)))
    found = []
    for key in sorted(here.keys() | there.keys()):
        if _is_among(key, (*FREE, *allowed)):
            continue
        before, now = there.get(key), here.get(key)
        if key in models and key in models_there:
            if models[key] != models_there[key]:
                found.append(f"{key}={now!r} holds another model than {before!r} did")
        elif before != now and not (key in models and _same_place(before, now)):
            found.append(f"{key} is {before!r} there, {now!r} here")
    return found


def changed(here: dict[str, Any], there: dict[str, Any], allowed: Collection[str]) -> dict[str, tuple[Any, Any]]:
    """(value there, value here) of the keys that differ and are, or belong to, ``allowed``; arguments as above."""
    there = up_to_date(there)
    keys = [key for key in sorted(here.keys() | there.keys()) if _is_among(key, allowed)]
    return {key: (there.get(key), here.get(key)) for key in keys if there.get(key) != here.get(key)}


def _is_among(key: str, names: Collection[str]) -> bool:
    return any(key == name or key.startswith(name + ".") for name in names)


def _same_place(before: Any, now: Any) -> bool:
    return isinstance(before, str) and isinstance(now, str) and os.path.realpath(before) == os.path.realpath(now)


def _without_unused(flat: dict[str, Any]) -> dict[str, Any]:
    """Without the rewards that have no weight."""
    weights = {config_lib.reward_of(key): value for key, value in flat.items() if key.endswith(".weight")}
    return {key: value for key, value in flat.items() if weights.get(config_lib.reward_of(key), 1)}
