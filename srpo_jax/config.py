"""The configuration of a training run: every key with its meaning.

A recipe in ``configs/`` starts from ``default()`` and sets what differs. The dictionary is locked: a key that is not
below is an error, in a recipe and on the command line; ``validation`` checks the values.
"""

import difflib
import functools
import json
import re
import types
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from srpo_jax import values
from srpo_jax.errors import UserError
from srpo_jax.rewards import REWARDS

BRANCHES = ("denoise", "inversion")
SOLVERS = ("euler", "ab2")
ROLLOUT_DTYPES = ("model", "int8", "float8")
ENCODE = ("online", "stored")
IMAGES = ("rollout", "stored")
DTYPES = ("bfloat16", "float32")
MOMENTS = ("float32", "bfloat16", "float8")
ATTENTION = ("auto", "xla", "cudnn", "splash")
REMAT = ("none", "dots", "full", "auto")
QUANTIZE = ("none", "int8", "nf4")
ON_FAILURE = ("stop", "continue")
WANDB = ("online", "offline")

# Files and folders, in which ~ is the home folder; the paths of rewards beside them.
PATHS = ("model.path", "lora.init", "data.prompts", "data.path", "sample.prompts", "evaluate.prompts")


def reward(kind: str, path: str | None = None, weight: float = 1.0) -> ConfigDict:
    """An entry of ``config.reward.models``.

    Args:
      kind: of ``rewards.REWARDS``.
      path: folder of the reward model, converted, with its tokenizer.
      weight: its share in the mixture; 0 leaves it out.
    """
    c = ConfigDict({"kind": kind, "path": config_dict.placeholder(str), "weight": weight})
    if path is not None:
        c.path = path
    return c


def default() -> ConfigDict:
    """The recipe of SRPO with HPS-v2.1 on FLUX.1-dev; paths are left open."""
    c = ConfigDict()
    c.method = "srpo"  # of algorithm/methods.py: srpo | direct_align | refl | draft_lv | draft_k | drtune |
    # leapalign | flowbp_sparse | flowbp_bridge | flowbp_lagrange; see docs/methods.md
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
    c.model.truncate_time = True  # give the network whole thousandths of time, rounded down, as SRPO's trainer
    # xla (everywhere) | cudnn (NVIDIA) | splash (TPU), see models/attention.py | auto: which of them fits the devices
    c.model.attention = "auto"
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
    # "none" is fastest and takes the most memory. Of the transformer also names joined by +, of out | attention | qkv |
    # mlp, as out+attention (docs/memory.md). auto: on CPUs none; on accelerators full, of the transformer as many of
    # those names as the device has room for, which compiles the update twice.
    c.remat = ConfigDict()
    c.remat.transformer = "auto"
    c.remat.autoencoder = "auto"
    c.remat.reward = "auto"

    # --- the data ---
    c.data = ConfigDict()
    # online: the text encoders stay in memory and encode each batch | stored: a data set by python -m srpo_jax.encode
    c.data.encode = "online"
    # Of online: text (one prompt a line), CSV, TSV, JSON, JSON Lines or Parquet by the file's name, a pattern of files,
    # or tfds:NAME[:SPLIT]; see data/sources.py.
    c.data.prompts = config_dict.placeholder(str)
    c.data.column = config_dict.placeholder(str)  # of the prompts, where there are several: prompt, caption or text
    c.data.path = config_dict.placeholder(str)  # of stored: the data set's folder
    # Where the images to be improved come from. rollout: the model makes them | stored: real pictures, encoded by
    # python -m srpo_jax.encode --images; of config.rollout only the shift counts then.
    c.data.images = "rollout"
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
    # Time shift of the noise schedule, here and of the training grid; 0 takes the family's own by the pictures' size.
    c.rollout.shift = 3.0
    c.rollout.noise = "shared"  # shared: one noise for the whole batch, as released | per_sample
    # Methods that draw steps of the rollout draw them once for the whole batch (shared), as released, or per_sample.
    c.rollout.draws = "shared"
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
    c.align.guidance = 3.5  # distilled guidance of the step, and of every method's passes that carry a gradient
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
    c.draft_k = ConfigDict()
    c.draft_k.last_steps = 1  # method draft_k: steps at the end of the rollout that the gradient goes through; 0: all
    c.drtune = ConfigDict()
    c.drtune.late_steps = 10  # method drtune: the rollout is cut short at one of this many last steps
    c.drtune.passes = 3  # evenly spaced steps that are trained
    c.leapalign = ConfigDict()
    c.leapalign.alpha = 0.3  # method leapalign: share of the gradient that goes through the later leap to the earlier
    c.leapalign.tau = 0.1  # a leap that misses by less, on average over the latents, counts as one that misses by this
    c.flowbp_sparse = ConfigDict()
    c.flowbp_sparse.passes = 3  # method flowbp_sparse: steps that are trained, late ones rather than early ones
    c.flowbp_sparse.rescale = 1.0  # how far (0 .. 1) their gradients make up for the steps that are not
    c.flowbp_bridge = ConfigDict()
    c.flowbp_bridge.passes = 5  # method flowbp_bridge: the same
    c.flowbp_bridge.rescale = 1.0
    c.flowbp_bridge.alpha = 0.1  # share of the gradient that goes through the bridge's step to those before it
    c.flowbp_lagrange = ConfigDict()
    c.flowbp_lagrange.order = 3  # method flowbp_lagrange: supports of a segment, at most; two of them are trained
    c.flowbp_lagrange.alpha = 0.1  # share of the gradient that goes through the later segment to the earlier
    c.flowbp_lagrange.tau = 0.2  # as leapalign.tau
    c.flowbp_lagrange.rescale = 0.5
    c.flowbp_lagrange.second = 0.25  # what the second support of a segment counts
    c.flowbp_lagrange.anchor = 1.0  # of the earlier segment: 1 is the quadrature, 0 LeapAlign's leap
    # Of the Dirichlet law of the steps after the later segment's first one, of the earlier segment, and before it.
    c.flowbp_lagrange.concentration = (2.5, 6.0, 2.0)

    # --- rewards ---
    c.reward = ConfigDict()
    # The mixture by name: kind (of rewards/: hps | pickscore | clip | image_reward | aesthetic | aesthetic_v25, see
    # docs/scores.md), path of a converted folder, weight (0 leaves it out). Others can be added, several of a kind too:
    # c.reward.models.NAME = reward(KIND, PATH, WEIGHT) in a recipe, --config.reward.models.NAME.kind=KIND on the
    # command line.
    c.reward.models = ConfigDict({kind: reward(kind, weight=float(kind == "hps")) for kind in REWARDS})
    c.reward.form = "released"  # (1 + k) g+ - g-: released | k g+ + (1 - k) g-: paper
    # What methods other than srpo follow: caption (the plain reward) | relative (SRPO's, with k = reward.discount)
    c.reward.target = "caption"
    c.reward.discount = 0.1
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
    # An update with a loss or gradient that is not finite changes nothing and is counted; after so many in a row the
    # run ends, and says what was not finite first.
    c.optim.patience = 3
    c.optim.ema_decay = 0.0  # of the moving average of the weights; 0 keeps none

    # --- what is written to the workdir ---
    c.checkpoint = ConfigDict()
    c.checkpoint.every = 10  # updates between checkpoints; the last update is always saved
    # One is also made after the update in which so many minutes have passed since the last one: what an end without
    # notice costs at most. 0: by updates alone.
    c.checkpoint.minutes = 0.0
    # What a checkpoint that cannot be written means: stop (exit code 74) | continue, and try again when the next is
    # due. The last one of a run has to be written, and any of a job of several processes.
    c.checkpoint.on_failure = "stop"
    c.checkpoint.keep = 3  # newest checkpoints that are kept
    # Of these, the newest that a run can go on from. Older ones lose the optimiser's state, two thirds of them, and
    # keep the weights (and their average), for `generate` and `convert export`.
    c.checkpoint.resumable = 1
    # NAME:max or NAME:min of a reward of the run or a score of config.evaluate: the update with the best mean is kept
    # beside the newest ones, with its weights alone, for --step=best. "" keeps none.
    c.checkpoint.best = ""
    c.sample = ConfigDict()
    c.sample.every = 10  # updates between sample grids, the first before training; 0 draws none
    # Held-out prompts, a source as data.prompts; None takes the 100 that come with the package.
    c.sample.prompts = config_dict.placeholder(str)
    c.sample.column = config_dict.placeholder(str)  # of these prompts, as data.column
    c.sample.count = 8  # prompts taken from its head
    c.sample.seed = 1  # of the samples' noise: the same at every grid
    c.sample.steps = 50
    c.sample.guidance = 3.5

    # --- evaluation while the run trains, see docs/evaluation.md ---
    c.evaluate = ConfigDict()
    c.evaluate.every = 0  # updates between evaluations, the first before training; 0 evaluates never
    # As sample.prompts: None takes the 100 that come with the package. None of them should be trained on.
    c.evaluate.prompts = config_dict.placeholder(str)
    c.evaluate.column = config_dict.placeholder(str)  # of these prompts, as data.column
    c.evaluate.count = 100  # prompts taken from its head
    c.evaluate.images = 1  # pictures of each prompt
    # Scores beside the run's own rewards, each [NAME=]KIND:PATH as `python -m srpo_jax.evaluate --score` takes it. They
    # are held out, unless they are of a model that the run is trained with.
    c.evaluate.scores = ()
    c.evaluate.seed = 0  # of the noise, as --seed of evaluate: the same at every evaluation
    c.evaluate.steps = 50
    c.evaluate.guidance = 3.5
    # Evaluations in a row without a better score by checkpoint.best, after which training ends; 0 goes on to the end.
    c.evaluate.patience = 0

    # --- Weights & Biases (pip install '.[wandb]') beside TensorBoard ---
    c.wandb = ConfigDict()
    c.wandb.project = ""  # "" reports nothing there
    c.wandb.name = ""  # of the run; "" takes the workdir's name
    c.wandb.mode = "online"  # online | offline: files in WORKDIR/wandb, for `wandb sync`

    # --- devices along each axis of the mesh; -1 takes the rest ---
    c.mesh = ConfigDict()
    c.mesh.data = 1  # splits the batch
    c.mesh.fsdp = -1  # splits the batch, and parameters and optimiser state with it
    c.mesh.tensor = 1  # splits attention heads and hidden features
    c.lock()
    c.reward.models.unlock()
    return c


# --- keys -------------------------------------------------------------------------------------------------------------


def reward_of(key: str) -> str | None:
    """NAME of a key ``reward.models.NAME.kind``, ``.path`` or ``.weight``; None of another key."""
    match = re.fullmatch(r"reward\.models\.(\w+)\.(kind|path|weight)", key)
    return match and match[1]


@functools.cache
def _standards() -> Mapping[str, Any]:
    """The default of every key, made once: each of a config's two hundred keys is looked up in it."""
    return types.MappingProxyType(dict(leaves(default())))


def standard(key: str) -> Any:
    """The default of a key; of a reward of any name, that of a reward. Raises UserError for an unknown key."""
    check_key(key)
    plain = _standards()
    if reward_of(key) is not None:
        return dict(leaves(reward("", weight=1.0)))[key.rpartition(".")[2]]
    if key not in plain:
        one = next(name for name in plain if name.startswith(key + "."))
        raise UserError(f"--config.{key} is a group of keys; give one of them, as --config.{one}=...")
    return plain[key]


def kind_of(like: tuple) -> type:
    """Of the values of a list, by its default; an empty one is of texts."""
    return type(like[0]) if like else str


def check_key(key: str) -> None:
    """Raises UserError, with a suggestion, if a config has no key (or group of keys) of this name, as ``optim.b1``."""
    known = sorted(_standards())
    if reward_of(key) is not None or any(name == key or name.startswith(key + ".") for name in known):
        return
    if (today := renamed(key)) != key:
        raise UserError(f"config.{key} is config.{today} now")
    near = _meant(key, known)
    raise UserError(f"config.{key} is unknown; " + (f"do you mean config.{near}?" if near else "see --help"))


def _meant(key: str, known: list[str]) -> str | None:
    """The key that an unknown one stands for, told by its last word: the same, much alike, initials, or a part of it.

    Keys of the same group come before others.
    """
    group, _, word = key.rpartition(".")
    last = {name: name.rpartition(".")[2] for name in known}
    beside = [name for name in known if name.rpartition(".")[0] == group]
    if same := [name for name in known if last[name] == word]:
        return same[0]
    for names in (beside, known):
        words = {last[name]: name for name in reversed(names)}
        if close := difflib.get_close_matches(word, words, n=1, cutoff=0.7):
            return words[close[0]]
        for name in names:
            parts = last[name].split("_")
            if word in parts or word == "".join(part[0] for part in parts):
                return name
    return None


# Keys that had another name in an earlier version: pattern, and what stands in its place.
RENAMED = (
    (r"reward\.weights\.(\w+)", r"reward.models.\1.weight"),
    (r"reward\.paths\.(\w+)", r"reward.models.\1.path"),
    (r"reward\.(weights|paths)", "reward.models"),
    (r"data\.rollout", "data.images"),
)


def renamed(key: str) -> str:
    """Today's name of a key of an earlier version."""
    for pattern, name in RENAMED:
        if re.fullmatch(pattern, key):
            return re.sub(pattern, name, key)
    return key


def leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of all keys, as ``("optim.b1", 0.9)``."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


# --- changes ----------------------------------------------------------------------------------------------------------


def set_text(config: ConfigDict, key: str, text: str) -> None:
    """Sets ``key``, as ``optim.b1``, to what a text stands for. Raises UserError if the key's value cannot be that."""
    like = standard(key)
    try:
        if isinstance(like, tuple):
            value = values.read_list(text, kind_of(like))
        elif text == "None" and (like is None or isinstance(like, str)):
            value = None  # which ``validate`` refuses where there has to be a text
        else:
            value = values.read(text, str if like is None else type(like))
    except ValueError as error:
        raise UserError(f"--config.{key}={text}: {error}") from None
    name = reward_of(key)
    if name is not None and name not in config.reward.models:
        with config.unlocked():
            config.reward.models[name] = reward("")  # whose kind is still to be said
    _set(config, key, value)


def expand_paths(config: ConfigDict) -> None:
    """Puts the home folder in the place of ``~`` in a config's paths."""
    for key, value in list(leaves(config)):
        if isinstance(value, str) and (key in PATHS or (reward_of(key) and key.endswith(".path"))):
            _set(config, key, values.expand(value))


def _set(config: ConfigDict, key: str, value: Any) -> None:
    *groups, name = key.split(".")
    for group in groups:
        config = config[group]
    config[name] = value


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
