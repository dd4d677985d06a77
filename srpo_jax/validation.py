"""Checks of a configuration that need no file and no device: every message names the key, its value and the remedy."""

import glob
import os
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from srpo_jax import ranges, values
from srpo_jax.algorithm import flow
from srpo_jax.algorithm.methods import METHODS
from srpo_jax.config import (
    ATTENTION,
    BRANCHES,
    DTYPES,
    ENCODE,
    IMAGES,
    MOMENTS,
    ON_FAILURE,
    QUANTIZE,
    REMAT,
    ROLLOUT_DTYPES,
    SOLVERS,
    WANDB,
    check_key,
    default,
    flatten,
    kind_of,
    leaves,
    reward_of,
    standard,
)
from srpo_jax.errors import UserError
from srpo_jax.evaluation import scoring, stopping
from srpo_jax.models.compute import KEPT, kept
from srpo_jax.patterns import Pattern
from srpo_jax.rewards import REWARDS


def validate(config: ConfigDict, paths: bool = True) -> None:
    """Checks all that needs no file and no device. Raises UserError that names the key, its value and the remedy.

    ``paths`` says whether the files and folders of a run have to be named, which only a run needs.
    """
    _check_keys(config)
    _check_kinds(config)
    flat = flatten(config)

    def require(key: str, good: Any, remedy: str) -> None:
        if not good:
            raise UserError(f"config.{key}={flat[key]!r}: {remedy}")

    for key, choices in (
        ("method", tuple(METHODS)),
        ("model.dtype", DTYPES),
        ("data.encode", ENCODE),
        ("data.images", IMAGES),
        ("model.attention", ATTENTION),
        ("remat.autoencoder", REMAT),
        ("remat.reward", REMAT),
        ("lora.quantize", QUANTIZE),
        ("rollout.noise", ("shared", "per_sample")),
        ("rollout.draws", ("shared", "per_sample")),
        ("rollout.solver", SOLVERS),
        ("rollout.dtype", ROLLOUT_DTYPES),
        ("reward.form", ("released", "paper")),
        ("reward.target", ("caption", "relative")),
        ("optim.weights", DTYPES),
        ("optim.moments", MOMENTS),
        ("checkpoint.on_failure", ON_FAILURE),
        ("wandb.mode", WANDB),
    ):
        require(key, flat[key] in choices, f"choose one of {', '.join(choices)}")
    remat = flat["remat.transformer"]
    names = f"names of {', '.join(KEPT)} joined by +, as out+attention"
    require("remat.transformer", remat in REMAT or kept(remat),
            f"choose one of {', '.join(REMAT)}, or {names}")  # fmt: skip
    if paths:
        _check_paths(flat)
    require("optim.weights", DTYPES.index(flat["optim.weights"]) >= DTYPES.index(flat["model.dtype"]),
            "must be float32 where model.dtype is")  # fmt: skip
    if flat["model.attention"] == "cudnn":
        require("model.dtype", flat["model.dtype"] == "bfloat16", "model.attention=cudnn needs bfloat16")
    ranges.check(flat)
    for key in ("data.filter.include", "data.filter.exclude"):
        Pattern(flat[key], f"config.{key}")
    require(
        "optim.accumulation",
        flat["data.batch_size"] % flat["optim.accumulation"] == 0,
        f"must divide data.batch_size={flat['data.batch_size']}",
    )

    ends = flat["rollout.cache_ends"]
    require("rollout.cache_ends", len(ends) == 2, ranges.RANGES["rollout.cache_ends"].words)
    if METHODS[flat["method"]].keep is not None and flat["data.images"] == "rollout":
        # Its gradient starts from states of the trajectory, not where the trajectory ends.
        words = f"method={flat['method']} needs a rollout at every update; set it to 1"
        require("rollout.reuse", flat["rollout.reuse"] == 1, words)
    _check_lora(flat, require)
    if flat["data.images"] == "stored":
        _check_offline(flat, require)
    _check_align(flat, require)
    _check_method(flat, require)
    _check_rewards(flat, require)
    _check_evaluation(flat, require)
    if sum(flat[f"mesh.{axis}"] == -1 for axis in ("data", "fsdp", "tensor")) > 1:
        raise UserError("config.mesh: only one of data, fsdp and tensor can be -1 (the rest of the devices)")


def check_files(config: ConfigDict) -> None:
    """Raises UserError that names all files and folders of a run that are not there, if there are several of them.

    One alone is left to whoever reads it and says more of it.
    """
    flat = flatten(config)
    paths = {key: flat[key] for key in (*_needed_paths(flat), "lora.init") if flat[key]}
    local = {key: path for key, path in paths.items() if "://" not in path and not path.startswith(values.TFDS)}
    missing = [key for key, path in local.items() if not os.path.exists(path) and not glob.has_magic(path)]
    if len(missing) > 1:
        raise UserError(f"not there: {', '.join(f'config.{key}={local[key]}' for key in missing)}")


def _check_keys(config: ConfigDict) -> None:
    given = dict(leaves(config))
    for key in given:
        check_key(key)
    for key in dict(leaves(default())):
        if key not in given and reward_of(key) is None:
            raise UserError(f"config.{key} is missing; start the config from srpo_jax.config.default()")


def _check_kinds(config: ConfigDict) -> None:
    """Every value is of its default's kind, and every number finite."""
    for key, value in leaves(config):
        like = standard(key)
        if like is None:
            good, wanted = value is None or isinstance(value, str), "text, or None"
        elif isinstance(like, tuple):
            kind = kind_of(like)
            good = isinstance(value, tuple | list) and all(values.fits(item, kind) for item in value)
            wanted = f"a list of {values.MANY[kind]}"
        else:
            good, wanted = values.fits(value, type(like)), values.NAMES[type(like)]
        if not good:
            raise UserError(f"config.{key}={value!r}: must be {wanted}")


def _needed_paths(flat: dict[str, Any]) -> list[str]:
    """Keys of the files and folders that a run reads."""
    needed = ["model.path", "data.prompts" if flat["data.encode"] == "online" else "data.path"]
    names = [name for key in flat if (name := reward_of(key)) and key.endswith(".weight")]
    needed += [f"reward.models.{name}.path" for name in names if flat[f"reward.models.{name}.weight"] > 0]
    used = [use for use in ("sample", "evaluate") if flat[f"{use}.every"] and flat[f"{use}.prompts"]]
    return needed + [f"{use}.prompts" for use in used]


def _check_paths(flat: dict[str, Any]) -> None:
    if missing := [key for key in _needed_paths(flat) if not flat[key]]:
        flags = " ".join(f"--config.{key}=..." for key in missing)
        raise UserError(f"give {'a path' if len(missing) == 1 else 'paths'}: {flags}")


def _check_lora(flat: dict[str, Any], require: Any) -> None:
    require("rollout.dtype", flat["rollout.dtype"] == "model" or flat["lora.quantize"] == "none",
            "the blocks' weights are quantised already; set it to model, or lora.quantize to none")  # fmt: skip
    require("optim.weights", not flat["lora.rank"] or flat["optim.weights"] == "float32",
            "low-rank factors are small and stay float32; set it to float32, or lora.rank to 0")  # fmt: skip
    require("lora.quantize", flat["lora.quantize"] == "none" or flat["lora.rank"],
            "trained weights cannot be quantised; train factors beside them: --config.lora.rank=16")  # fmt: skip
    require("lora.init", flat["lora.rank"] or not flat["lora.init"], "is for LoRA: set lora.rank to the file's")
    require("lora.targets", flat["lora.targets"], "name one or more layers")
    for target in flat["lora.targets"]:
        Pattern(target, "config.lora.targets")


def _check_offline(flat: dict[str, Any], require: Any) -> None:
    offline, method = "data.images=stored", METHODS[flat["method"]]
    require("method", method.offline, f"takes states of a rollout, {offline} has none; choose another method")
    require("data.encode", flat["data.encode"] == "stored", f"{offline} needs encoded pictures; set it to stored")
    require("rollout.noise", flat["rollout.noise"] == "per_sample",
            f"{offline} draws noise for each picture; set it to per_sample")  # fmt: skip
    require("rollout.reuse", flat["rollout.reuse"] == 1, f"{offline} has no rollout to use again; set it to 1")
    for key, plain in (
        ("rollout.dtype", "model"),
        ("rollout.solver", "euler"),
        ("rollout.cache", 1),
        ("rollout.unroll", False),
    ):
        require(key, flat[key] == plain, f"{offline} has no rollout to make faster; set it to {plain}")


def _check_align(flat: dict[str, Any], require: Any) -> None:
    branches = flat["align.branches"]
    require("align.branches", branches and len(set(branches)) == len(branches) and set(branches) <= set(BRANCHES),
            f"name one or both of {', '.join(BRANCHES)}")  # fmt: skip
    window = flat["align.train_timestep"]
    steps = flat["align.schedule_steps"]
    require("align.train_timestep", len(window) == 2 and 1 <= window[0] < window[1] <= steps,
            f"must be (first, last) with 1 <= first < last <= align.schedule_steps={steps}")  # fmt: skip
    if shift := flat["rollout.shift"]:  # else the family has one that is made for this
        # In float32 a schedule with a smaller one does not begin at 1.
        require("rollout.shift", shift >= 0.05, "must be 0, for the family's own, or at least 0.05")
        first, last = flow.shifted_schedule(steps, shift)[window]
        require("align.train_timestep", 1 > first > last >= 0,
                f"the noise levels there are {first:g} and {last:g} with rollout.shift={shift:g}; they must fall, from "
                "less than 1")  # fmt: skip
        levels = flow.shifted_schedule(flat["rollout.steps"], shift)
        require("rollout.shift", (np.diff(levels) < 0).all(), f"{flat['rollout.steps']} noise levels must fall")
    for key in ("align.discount_positive", "align.discount_negative", "align.weights"):
        require(key, len(flat[key]) == 2, "must be two numbers, (at the lowest noise, at the highest)")


def _check_method(flat: dict[str, Any], require: Any) -> None:
    """What a method asks of its own keys and of others; the keys of the other methods are not read."""
    name, steps = flat["method"], flat["rollout.steps"]
    within = {
        "refl": ("refl.late_steps",),
        "draft_k": ("draft_k.last_steps",),
        "drtune": ("drtune.late_steps",),
        "flowbp_sparse": ("flowbp_sparse.passes",),
        "flowbp_bridge": ("flowbp_bridge.passes",),
    }
    for key in within.get(name, ()):
        require(key, flat[key] <= steps, f"must not exceed rollout.steps={steps}")
    if METHODS[name].passes is not None:
        require("rollout.solver", flat["rollout.solver"] == "euler",
                f"method={name} follows the steps of an Euler rollout; set it to euler")  # fmt: skip
        require("optim.merge_terms", not flat["optim.merge_terms"],
                f"the passes of method={name} run one after the other; set it to False")  # fmt: skip
    if name == "drtune":
        room = steps - flat["drtune.late_steps"] + 1
        require("drtune.passes", flat["drtune.passes"] <= room,
                f"must not exceed {room}, the steps up to the earliest that drtune.late_steps leaves")  # fmt: skip
    if name == "flowbp_bridge":
        require("flowbp_bridge.passes", flat["flowbp_bridge.passes"] >= 2, "must be at least 2, one at the bridge")
    if name == "flowbp_lagrange":
        shares = "flowbp_lagrange.concentration"
        require(shares, len(flat[shares]) == 3, ranges.RANGES[shares].words)
    least = {"leapalign": 2, "flowbp_bridge": 2, "flowbp_lagrange": 3}.get(name, 1)
    require("rollout.steps", steps >= least, f"must be at least {least} for method={name}")


def _check_evaluation(flat: dict[str, Any], require: Any) -> None:
    for text in flat["evaluate.scores"]:
        try:
            scoring.split(text)
        except ValueError as error:
            raise UserError(f"config.evaluate.scores: {text!r}: {error}") from None
    if flat["checkpoint.best"]:
        require("checkpoint.best", flat["evaluate.every"], "is by evaluations; set evaluate.every too")
        try:
            stopping.parse(flat["checkpoint.best"])
        except ValueError as error:
            raise UserError(f"config.checkpoint.best={flat['checkpoint.best']!r}: {error}") from None
    require("evaluate.patience", flat["checkpoint.best"] or not flat["evaluate.patience"],
            "waits for a better score; say which by checkpoint.best=NAME:max")  # fmt: skip


def _check_rewards(flat: dict[str, Any], require: Any) -> None:
    names = [name for key in flat if (name := reward_of(key)) and key.endswith(".weight")]
    for name in names:
        require(f"reward.models.{name}.kind", flat[f"reward.models.{name}.kind"] in REWARDS,
                f"choose one of {', '.join(REWARDS)}")  # fmt: skip
    if not any(flat[f"reward.models.{name}.weight"] for name in names):
        raise UserError(f"config.reward.models: all weights are 0; give one of {', '.join(names)} a weight")
    for key in ("reward.positive", "reward.negative"):
        words = flat[key]
        require(key, words and all(word.strip() for word in words),
                "must be a list of one or more control words, none of them empty")  # fmt: skip
