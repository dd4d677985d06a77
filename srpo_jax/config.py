"""The configuration of a training run: every key with its meaning, and the checks that need no file and no device.

A recipe in ``configs/`` starts from ``default()`` and sets what differs. The dictionary is locked: a key that is not
below is an error, in a recipe and on the command line.
"""

import difflib
import glob
import json
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict, config_dict

from srpo_jax import values
from srpo_jax.errors import UserError

METHODS = ("srpo", "direct_align", "refl", "draft_lv")
REWARDS = ("hps", "pickscore", "clip")
BRANCHES = ("denoise", "inversion")

SOLVERS = ("euler", "ab2")
ROLLOUT_DTYPES = ("model", "int8", "float8")
ENCODE = ("online", "stored")
ROLLOUT = ("online", "offline")
DTYPES = ("bfloat16", "float32")
MOMENTS = ("float32", "bfloat16", "float8")
ATTENTION = ("xla", "cudnn", "splash")
REMAT = ("none", "dots", "full")
QUANTIZE = ("none", "int8", "nf4")

# Files and folders, in which ~ is the home folder; those of rewards beside them.
PATHS = ("model.path", "lora.init", "data.prompts", "data.path", "sample.prompts")

# A run may be resumed with other values of these: they change where and how fast it runs, not what it computes.
RESUMABLE = (
    *("steps", "checkpoint", "sample", "mesh", "remat", "compilation_cache", "model.scan_unroll", "optim.merge_terms"),
    *("optim.offload", "rollout.gather", "rollout.unroll"),
)


def default() -> ConfigDict:
    """The recipe of SRPO with HPS-v2.1 on FLUX.1-dev; paths are left open."""
    c = ConfigDict()
    c.method = "srpo"  # srpo | direct_align | refl | draft_lv (see step.py)
    c.steps = 19  # updates; a resumed run may name more
    c.seed = 0  # of everything random: noise, grid positions, the order of prompts; 32 bits, as jax.random.key takes
    # Folder of compiled programs, kept between runs; "" compiles every time.
    c.compilation_cache = "~/.cache/srpo_jax/xla"

    # --- the model ---
    c.model = ConfigDict()
    c.model.path = config_dict.placeholder(str)  # a pipeline folder written by `python -m srpo_jax.convert`
    # Of matrix products and frozen weights: bfloat16 | float32. See optim.weights for trained ones.
    c.model.dtype = "bfloat16"
    c.model.round_time = False  # round 1000 * time and 1000 * guidance to bfloat16, as the released script's autocast
    c.model.attention = "xla"  # xla (everywhere) | cudnn (NVIDIA) | splash (TPU), see models/attention.py
    c.model.scan_unroll = 1  # transformer blocks in one iteration of the scan

    # --- LoRA: low-rank factors are trained beside a frozen transformer, see docs/lora.md ---
    c.lora = ConfigDict()
    c.lora.rank = 0  # of the factors; 0 trains the transformer itself
    c.lora.alpha = 16.0  # the product of two factors counts alpha / rank
    # Layers of the blocks that get factors: regular expressions, each for whole paths as double_blocks.img_attn.qkv.
    c.lora.targets = (r"double_blocks\.\w+_(attn|mlp)\.\w+", r"single_blocks\.(qkv|mlp_in|out)")
    # LoRA file in the names of diffusers (transformer.MODULE.lora_A.weight) whose factors are the start; else B is 0.
    c.lora.init = config_dict.placeholder(str)
    # How the kernels of the frozen blocks are stored: none (as model.dtype) | int8 | nf4 (4 bits)
    c.lora.quantize = "none"

    # What a block keeps for the backward pass: none (everything) | dots (matrix products) | full (its input alone).
    # "none" is fastest and takes the most memory.
    c.remat = ConfigDict()
    c.remat.transformer = "full"
    c.remat.autoencoder = "full"
    c.remat.reward = "full"

    # --- the data ---
    c.data = ConfigDict()
    # online: the text encoders stay in memory and encode each batch | stored: a data set by python -m srpo_jax.encode
    c.data.encode = "online"
    # Of online: text (one prompt a line), CSV, TSV, JSON, JSON Lines or Parquet by the file's name, a pattern of files,
    # or tfds:NAME[:SPLIT]; see data/sources.py.
    c.data.prompts = config_dict.placeholder(str)
    c.data.column = config_dict.placeholder(str)  # of the prompts, where there are several: prompt, caption or text
    c.data.path = config_dict.placeholder(str)  # of stored: the data set's folder
    # Where the images to be improved come from. online: the model makes them by rollouts | offline: real pictures,
    # encoded by python -m srpo_jax.encode --images; of config.rollout only the shift counts then.
    c.data.rollout = "online"
    # Which of the prompts are used, either way; how many each condition leaves out is printed.
    c.data.filter = ConfigDict()
    c.data.filter.min_length = 0  # characters
    c.data.filter.max_length = 0  # characters; 0 is no limit
    c.data.filter.include = ""  # regular expression that has to be found in a prompt
    c.data.filter.exclude = ""  # one that must not be found
    c.data.filter.unique = False  # of equal prompts keep the first
    c.data.batch_size = 32  # samples in one update, over all devices
    c.data.text_length = 512  # T5 tokens of a prompt
    c.data.height = 720  # of the images, in pixels; multiples of 16
    c.data.width = 720

    # --- the rollout that makes the images to be improved ---
    c.rollout = ConfigDict()
    c.rollout.steps = 25
    # How a step goes: euler, as released | ab2 (second order at the same cost: fewer steps do)
    c.rollout.solver = "euler"
    # Of its blocks' matrix products: model (as model.dtype) | int8 | float8 (H100 and later), see docs/rollouts.md
    c.rollout.dtype = "model"
    # Every device holds the transformer's blocks (in model.dtype, or as rollout.dtype says) for the rollouts of an
    # update, and does not gather each block's weights over mesh.fsdp at each of their steps.
    c.rollout.gather = False
    # Each block's weights in arrays of their own, made once an update, and no loop over blocks, which takes a copy of
    # them at every step. Compiles longer; where weights are stored in model.dtype, their copy takes memory.
    c.rollout.unroll = False
    c.rollout.guidance = 1.0  # distilled guidance given to the transformer
    c.rollout.shift = 3.0  # time shift of the noise schedule, here and of the training grid
    c.rollout.noise = "shared"  # shared: one noise for the whole batch, as released | per_sample
    # Updates that a rollout serves: 2 rolls out at every second update and uses the images and their noise once more,
    # at other grid positions and with the next control words.
    c.rollout.reuse = 1
    # All blocks of the transformer run at every so many steps (1: at each). Between them only so many double blocks at
    # the start and single blocks at the end do, and what the others changed last is added again.
    c.rollout.cache = 1
    c.rollout.cache_ends = (1, 1)

    # --- Direct-Align: the training grid and the step that carries the gradient ---
    c.align = ConfigDict()
    # Of method srpo; without "inversion" nothing guards against reward hacking.
    c.align.branches = ("denoise", "inversion")
    c.align.guidance = 3.5  # distilled guidance of the step
    c.align.schedule_steps = 50  # the inference schedule in which train_timestep counts
    c.align.train_timestep = (5, 25)  # noisiest and cleanest index that are trained
    c.align.length = 1000  # points of the grid between them
    c.align.groundtruth_ratio = 0.9  # share of the grid covered by known noise; the rest is the step
    c.align.discount_positive = (0.1, 0.25)  # k at the (lowest, highest) noise level of the grid, denoising branch
    c.align.discount_negative = (0.3, 0.01)  # the same of the inversion branch
    c.align.weights = (0.1, 1.0)  # method direct_align: the loss's weight at the (lowest, highest) noise level

    # --- relatives of SRPO ---
    c.refl = ConfigDict()
    c.refl.late_steps = 10  # method refl: the gradient is taken at one of this many last steps of the rollout
    c.draft_lv = ConfigDict()
    c.draft_lv.renoisings = 2  # method draft_lv: how often the final sample is noised again and its last step redone

    # --- rewards ---
    c.reward = ConfigDict()
    c.reward.weights = ConfigDict({name: 0.0 for name in REWARDS})  # the mixture; 0 leaves a reward out
    c.reward.weights.hps = 1.0
    # Converted CLIP folders, one for each reward that is used.
    c.reward.paths = ConfigDict({name: config_dict.placeholder(str) for name in REWARDS})
    c.reward.form = "released"  # (1 + k) g+ - g-: released | k g+ + (1 - k) g-: paper
    c.reward.margin = 0.7  # the loss is relu(margin - reward)
    # Control words; update n takes word n modulo the list's length.
    c.reward.positive = ("Natural-lighting", "Detail", "Detailed", "Real")
    c.reward.negative = ("Concept art", "Painting", "Anime", "Flat", "Oil")

    # --- the optimiser: AdamW ---
    c.optim = ConfigDict()
    c.optim.learning_rate = 5e-6
    c.optim.warmup_steps = 0  # updates over which the learning rate rises linearly
    c.optim.b1 = 0.9
    c.optim.b2 = 0.999
    c.optim.eps = 1e-8
    c.optim.weight_decay = 1e-4  # decoupled, on every parameter
    c.optim.clip_norm = 0.1  # of the gradient's global norm
    # Of trained weights, float32 | bfloat16, and of AdamW's two moments, float32 | bfloat16 | float8 (8-bit floats with
    # a scale for 128 of them). What is not float32 is rounded stochastically; see optim.py for the bytes.
    c.optim.weights = "float32"
    c.optim.moments = "float32"
    c.optim.offload = False  # keep the moments in the hosts' memory
    c.optim.accumulation = 1  # parts of a batch that pass one after the other; same update, less memory
    # The terms of a method (SRPO's two branches) pass as one larger batch and not one after the other: same update,
    # faster where there is memory for it.
    c.optim.merge_terms = False
    c.optim.ema_decay = 0.0  # of the moving average of the weights; 0 keeps none

    # --- what is written to the workdir ---
    c.checkpoint = ConfigDict()
    c.checkpoint.every = 10  # updates between checkpoints; the last update is always saved
    c.checkpoint.keep = 3  # newest checkpoints that are kept
    c.sample = ConfigDict()
    c.sample.every = 10  # updates between sample grids, the first before training; 0 draws none
    c.sample.prompts = config_dict.placeholder(str)  # held-out prompts, a source as data.prompts
    c.sample.column = config_dict.placeholder(str)  # of these prompts, as data.column
    c.sample.count = 8  # prompts taken from its head
    c.sample.seed = 1  # of the samples' noise: the same at every grid
    c.sample.steps = 50
    c.sample.guidance = 3.5

    # --- devices along each axis of the mesh; -1 takes the rest ---
    c.mesh = ConfigDict()
    c.mesh.data = 1  # splits the batch
    c.mesh.fsdp = -1  # splits the batch, and parameters and optimiser state with it
    c.mesh.tensor = 1  # splits attention heads and hidden features
    return c.lock()


# --- changes ----------------------------------------------------------------------------------------------------------


def set_text(config: ConfigDict, key: str, text: str) -> None:
    """Sets ``key``, as ``optim.b1``, to what a text stands for. Raises UserError if the key's value cannot be that."""
    check_key(key)
    plain = dict(_leaves(default()))
    if key not in plain:
        one = next(name for name in plain if name.startswith(key + "."))
        raise UserError(f"--config.{key} is a group of keys; give one of them, as --config.{one}=...")
    like = plain[key]
    try:
        if isinstance(like, tuple):
            value = values.read_list(text, type(like[0]))
        elif text == "None" and (like is None or isinstance(like, str)):
            value = None  # which ``validate`` refuses where there has to be a text
        else:
            value = values.read(text, str if like is None else type(like))
    except ValueError as error:
        raise UserError(f"--config.{key}={text}: {error}") from None
    _set(config, key, value)


def expand_paths(config: ConfigDict) -> None:
    """Puts the home folder in the place of ``~`` in a config's paths."""
    for key, value in list(_leaves(config)):
        if isinstance(value, str) and (key in PATHS or key.startswith("reward.paths.")):
            _set(config, key, values.expand(value))


def _set(config: ConfigDict, key: str, value: Any) -> None:
    *groups, name = key.split(".")
    for group in groups:
        config = config[group]
    config[name] = value


def _leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of all keys, as ``("optim.b1", 0.9)``."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


# --- views ------------------------------------------------------------------------------------------------------------


def flatten(config: ConfigDict | dict) -> dict[str, Any]:
    """``{"optim.b1": 0.9, ...}`` in a fixed order, tuples as lists: what JSON would give back."""
    flat = {}

    def walk(node: dict, prefix: str) -> None:
        for key in sorted(node):
            if isinstance(node[key], dict):
                walk(node[key], f"{prefix}{key}.")
            else:
                flat[prefix + key] = node[key]

    walk(json.loads(to_json(config)), "")
    return flat


def to_json(config: ConfigDict | dict) -> str:
    """The configuration as an indented JSON object."""
    content = config.to_dict() if isinstance(config, ConfigDict) else config
    return json.dumps(content, indent=2, sort_keys=True)


def differing_keys(here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    """Keys of two ``flatten`` results that forbid to resume one run as the other; ``RESUMABLE`` keys may differ."""
    keys = [key for key in sorted(here.keys() | there.keys()) if here.get(key) != there.get(key)]
    return [key for key in keys if not any(key == free or key.startswith(free + ".") for free in RESUMABLE)]


# --- checks -----------------------------------------------------------------------------------------------------------


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
        ("method", METHODS),
        ("model.dtype", DTYPES),
        ("data.encode", ENCODE),
        ("data.rollout", ROLLOUT),
        ("model.attention", ATTENTION),
        ("remat.transformer", REMAT),
        ("remat.autoencoder", REMAT),
        ("remat.reward", REMAT),
        ("lora.quantize", QUANTIZE),
        ("rollout.noise", ("shared", "per_sample")),
        ("rollout.solver", SOLVERS),
        ("rollout.dtype", ROLLOUT_DTYPES),
        ("reward.form", ("released", "paper")),
        ("optim.weights", DTYPES),
        ("optim.moments", MOMENTS),
    ):
        require(key, flat[key] in choices, f"choose one of {', '.join(choices)}")
    if paths:
        _check_paths(flat)
    require("optim.weights", DTYPES.index(flat["optim.weights"]) >= DTYPES.index(flat["model.dtype"]),
            "must be float32 where model.dtype is")  # fmt: skip
    if flat["model.attention"] == "cudnn":
        require("model.dtype", flat["model.dtype"] == "bfloat16", "model.attention=cudnn needs bfloat16")
    for key in (
        *("steps", "model.scan_unroll", "data.batch_size", "data.text_length", "rollout.steps", "rollout.reuse"),
        "rollout.cache",
        *("align.schedule_steps", "optim.accumulation", "checkpoint.every", "checkpoint.keep", "sample.count"),
        *("sample.steps", "refl.late_steps", "draft_lv.renoisings"),
    ):
        require(key, flat[key] >= 1, "must be at least 1")
    for key in (
        *("data.filter.min_length", "data.filter.max_length", "optim.warmup_steps", "optim.weight_decay"),
        *("lora.rank", "sample.every"),
    ):
        require(key, flat[key] >= 0, "must not be negative")
    for key in ("seed", "sample.seed"):
        require(key, 0 <= flat[key] <= values.SEED, f"must be from 0 to {values.SEED}")
    for key in ("lora.alpha", "rollout.shift", "optim.learning_rate", "optim.eps", "optim.clip_norm"):
        require(key, np.float32(flat[key]) > 0, "must be greater than 0, in float32 too")
    for key in ("optim.b1", "optim.b2", "optim.ema_decay"):
        require(key, 0 <= flat[key] < 1, "must be at least 0 and less than 1")
    for key in ("data.height", "data.width"):
        require(key, flat[key] > 0 and flat[key] % 16 == 0, "must be a positive multiple of 16")
    require(
        "optim.accumulation",
        flat["data.batch_size"] % flat["optim.accumulation"] == 0,
        f"must divide data.batch_size={flat['data.batch_size']}",
    )

    ends = flat["rollout.cache_ends"]
    require("rollout.cache_ends", len(ends) == 2 and all(end >= 0 for end in ends),
            "must be two whole numbers, of double blocks at the start and single blocks at the end")  # fmt: skip
    if flat["method"] == "refl":
        # Its gradient needs a late state of the trajectory, at a step drawn anew, not where the trajectory ends.
        require("rollout.reuse", flat["rollout.reuse"] == 1, "method=refl needs a rollout at every update; set it to 1")
    _check_lora(flat, require)
    if flat["data.rollout"] == "offline":
        _check_offline(flat, require)
    _check_align(flat, require)
    _check_rewards(flat, require)
    for key in ("mesh.data", "mesh.fsdp", "mesh.tensor"):
        require(key, flat[key] >= 1 or flat[key] == -1, "must be at least 1, or -1 for the rest of the devices")
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


def check_key(key: str) -> None:
    """Raises UserError, with a suggestion, if a config has no key (or group of keys) of this name, as ``optim.b1``."""
    known = list(flatten(default()))
    if any(name == key or name.startswith(key + ".") for name in known):
        return
    group, _, name = key.rpartition(".")
    if group in ("reward.weights", "reward.paths"):
        raise UserError(f"config.{key}: the reward {name!r} is unknown; choose one of {', '.join(REWARDS)}")
    near = difflib.get_close_matches(key, known, n=1)
    raise UserError(f"config.{key} is unknown; " + (f"do you mean config.{near[0]}?" if near else "see --help"))


def _check_keys(config: ConfigDict) -> None:
    known, given = dict(_leaves(default())), dict(_leaves(config))
    for key in given:
        if key not in known:
            check_key(key)
    for key in known:
        if key not in given:
            raise UserError(f"config.{key} is missing; start the config from srpo_jax.config.default()")


def _check_kinds(config: ConfigDict) -> None:
    """Every value is of its default's kind, and every number finite."""
    plain = dict(_leaves(default()))
    for key, value in _leaves(config):
        like = plain[key]
        if like is None:
            good, wanted = value is None or isinstance(value, str), "text, or None"
        elif isinstance(like, tuple):
            kind = type(like[0])
            good = isinstance(value, tuple | list) and all(values.fits(item, kind) for item in value)
            wanted = f"a list of {values.MANY[kind]}"
        else:
            good, wanted = values.fits(value, type(like)), values.NAMES[type(like)]
        if not good:
            raise UserError(f"config.{key}={value!r}: must be {wanted}")


def _needed_paths(flat: dict[str, Any]) -> list[str]:
    """Keys of the files and folders that a run reads."""
    needed = ["model.path", "data.prompts" if flat["data.encode"] == "online" else "data.path"]
    needed += [f"reward.paths.{name}" for name in REWARDS if flat[f"reward.weights.{name}"] > 0]
    return needed + (["sample.prompts"] if flat["sample.every"] else [])


def _check_paths(flat: dict[str, Any]) -> None:
    if missing := [key for key in _needed_paths(flat) if not flat[key]]:
        held_out = "; config.sample.every=0 needs no sample.prompts" if "sample.prompts" in missing else ""
        flags = " ".join(f"--config.{key}=..." for key in missing)
        raise UserError(f"give {'a path' if len(missing) == 1 else 'paths'}: {flags}{held_out}")


def _check_lora(flat: dict[str, Any], require: Any) -> None:
    require("rollout.dtype", flat["rollout.dtype"] == "model" or flat["lora.quantize"] == "none",
            "the blocks' weights are quantised already; set it to model, or lora.quantize to none")  # fmt: skip
    require("optim.weights", not flat["lora.rank"] or flat["optim.weights"] == "float32",
            "low-rank factors are small and stay float32; set it to float32, or lora.rank to 0")  # fmt: skip
    require("lora.quantize", flat["lora.quantize"] == "none" or flat["lora.rank"],
            "trained weights cannot be quantised; train factors beside them: --config.lora.rank=16")  # fmt: skip
    require("lora.init", flat["lora.rank"] or not flat["lora.init"], "is for LoRA: set lora.rank to the file's")
    require("lora.targets", flat["lora.targets"], "name one or more layers")
    for pattern in flat["lora.targets"]:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise UserError(f"config.lora.targets: {pattern!r} is not a regular expression: {error}") from error


def _check_offline(flat: dict[str, Any], require: Any) -> None:
    offline = "data.rollout=offline"
    require("method", flat["method"] != "refl", f"takes states of a rollout, {offline} has none; choose another method")
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
    require("align.length", flat["align.length"] >= 10, "must be at least 10")
    require("align.groundtruth_ratio", 0 <= flat["align.groundtruth_ratio"] < 1, "must be at least 0 and less than 1")
    window = flat["align.train_timestep"]
    steps = flat["align.schedule_steps"]
    require("align.train_timestep", len(window) == 2 and 1 <= window[0] < window[1] <= steps,
            f"must be (first, last) with 1 <= first < last <= align.schedule_steps={steps}")  # fmt: skip
    for key in ("align.discount_positive", "align.discount_negative", "align.weights"):
        require(key, len(flat[key]) == 2, "must be two numbers, (at the lowest noise, at the highest)")
    if flat["method"] == "refl":
        require("refl.late_steps", flat["refl.late_steps"] <= flat["rollout.steps"],
                f"must not exceed rollout.steps={flat['rollout.steps']}")  # fmt: skip


def _check_rewards(flat: dict[str, Any], require: Any) -> None:
    for name in REWARDS:
        require(f"reward.weights.{name}", flat[f"reward.weights.{name}"] >= 0, "must not be negative")
    if not any(flat[f"reward.weights.{name}"] for name in REWARDS):
        raise UserError(f"config.reward.weights: all are 0; give one of {', '.join(REWARDS)} a weight")
    for key in ("reward.positive", "reward.negative"):
        words = flat[key]
        require(key, words and all(word.strip() for word in words),
                "must be a list of one or more control words, none of them empty")  # fmt: skip
