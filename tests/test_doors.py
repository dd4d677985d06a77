"""The three doors open: a toy reward, method and family, some 40 lines each, train through ``srpo_jax.main``."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import runs, tiny
from jax.sharding import PartitionSpec as P

from srpo_jax import architectures, families, generate, main, rewards
from srpo_jax.algorithm import methods, preference
from srpo_jax.algorithm.direct_align import Step
from srpo_jax.algorithm.methods import Method, known_noise, stack
from srpo_jax.costs import work
from srpo_jax.costs.flops import Forward
from srpo_jax.families.base import AUTOENCODER, TRANSFORMER, Component, Family
from srpo_jax.families.guidance import classifier_free
from srpo_jax.rewards.base import Reward, int32
from srpo_jax.weights import folder

# --- a reward: how red a picture is, more so under short captions -----------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RednessConfig:
    power: float

    @classmethod
    def from_dict(cls, values):
        return cls(**values)


class RednessNetwork(nnx.Module):
    RULES = ((r".*", P()),)

    def __init__(self, config, compute, *, rngs):
        self.scale = nnx.Param(jnp.ones(()))


class Redness(Reward):
    """Reads picture and caption together: all of its work is in ``score``."""

    network, published = "redness", RednessConfig(1.0)

    def tokens(self, path):
        return lambda texts: {"length": np.array([[len(text)] for text in texts], np.int32)}

    def token_shapes(self):
        return {"length": int32(1)}

    def prepare(self, params, tokens):
        return tokens["length"][:, 0].astype(jnp.float32)

    def look(self, params, images):
        return images[..., 0].mean((1, 2)) - images[..., 1:].mean((1, 2, 3))

    def score(self, params, seen, prepared):
        return params["scale"] * seen**self.sizes.power * 10 / prepared


# --- a method: one step from one noise level --------------------------------------------------------------------------


def one_level(settings, images, own):
    high, low = (jnp.full(len(images.latents), level, jnp.float32) for level in (0.8, 0.6))
    weight = jnp.ones_like(high)
    return stack([known_noise(images.latents, images.noise, Step(high, low, low), preference.plain(len(high)), weight)])


# --- a family: a linear velocity, a word, true classifier-free guidance -----------------------------------------------


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    features: int
    words: int

    @classmethod
    def from_dict(cls, values):
        return cls(**values)


class ToyTransformer(nnx.Module):
    STACKS, RULES = (), ((r".*", P()),)

    def __init__(self, config, compute, *, rngs):
        self.compute = compute
        self.mix = nnx.Linear(config.features, config.features, rngs=rngs)
        self.word = nnx.Linear(config.words, config.features, rngs=rngs)


class Initials:
    """The first letter of a prompt, one of 26."""

    params = ()

    def tokens(self, prompts, length):
        return (np.array([ord(prompt[0].lower()) - ord("a") for prompt in prompts], np.int32),)

    def apply(self, params, letters):
        return {"word": jnp.eye(26)[letters]}


class ToyFamily(Family):
    name, pipeline, scheduler = "Toy", "ToyPipeline", "none"
    components = {
        TRANSFORMER: Component("toy", "toys", "Toy", {}),
        AUTOENCODER: Component("autoencoder", "diffusers", "AutoencoderKL", {}),
    }
    tokenizers, published = {}, {}
    factor, channels, patch, text_length = 8, 16, 1, 1

    def condition(self, transformer, text_length):
        return {"word": (transformer.words,)}

    def text_encoders(self, path, transformer, compute, place=None):
        return Initials()

    def prepare(self, transformer, condition, time, guidance):
        return {"shift": transformer.word(condition["word"]) + time[:, None], "scale": guidance[:, None]}

    def velocity(self, transformer, x, condition, prepared, height, width):
        plain = transformer.mix(x)
        return classifier_free(plain + prepared["shift"][:, None], plain, prepared["scale"][:, 0], rescale=True)

    def schedule(self, path, steps, height, width):
        return np.linspace(1, 0, steps + 1, dtype=np.float32)

    def forward(self, transformer, image_tokens, text_tokens):
        products = 2.0 * image_tokens * transformer.features**2
        nothing = {"none": 0.0, "dots": 0.0, "full": 0.0}
        return Forward(products, 0.0, 0.0, nothing, nothing)


# --- the lines in the tables, and a run -------------------------------------------------------------------------------


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.setitem(folder.NETWORKS, "redness", (__name__, "RednessConfig", "RednessNetwork"))
    monkeypatch.setitem(folder.NETWORKS, "toy", (__name__, "ToyConfig", "ToyTransformer"))
    monkeypatch.setitem(rewards.REWARDS, "redness", Redness)
    monkeypatch.setitem(methods.METHODS, "one_level", Method(lambda settings: ("level",), one_level))
    monkeypatch.setitem(families.FAMILIES, "toy", ToyFamily())


@pytest.fixture
def toys(tables, tmp_path):
    """A toy pipeline and a toy reward in our format."""
    tiny.save_random(tmp_path / "pipeline" / "transformer", "toy", ToyConfig(16, 26), 1)
    tiny.save_random(tmp_path / "pipeline" / "vae", "autoencoder", tiny.VAE, 2)
    (tmp_path / "red").mkdir()
    folder.save(tmp_path / "red", "redness", RednessConfig(1.0), {"scale": np.float32(2.0)})
    return tmp_path


RECIPE = """
from srpo_jax import config

def get_config():
    c = config.default()
    c.steps, c.compilation_cache, c.model.dtype = 2, "", "float32"
    c.remat.transformer = c.remat.autoencoder = c.remat.reward = "none"
    c.data.height, c.data.width, c.data.batch_size, c.data.text_length = 32, 48, 2, 1
    c.rollout.steps, c.rollout.noise, c.optim.learning_rate = 2, "per_sample", 1e-3
    c.reward.models.hps.weight = 0.0
    c.sample.steps, c.sample.count = 2, 2
    return c
"""


def words(folder_, *more):
    (folder_ / "recipe.py").write_text(RECIPE)
    (folder_ / "prompts.txt").write_text("\n".join(tiny.PROMPTS))
    prompts = folder_ / "prompts.txt"
    return [f"--config={folder_ / 'recipe.py'}", f"--workdir={folder_ / 'run'}", f"--config.data.prompts={prompts}",
            f"--config.sample.prompts={prompts}", *more]  # fmt: skip


def test_a_reward(tables, toys, models):
    """Beside a CLIP, under both words of SRPO; the file gives it a name of its own, twice."""
    mixture = [f"--config.reward.models.{name}.{key}" for name in ("red", "redder") for key in ("kind=redness",
               f"path={toys / 'red'}", "weight=0.5")]  # fmt: skip
    clip = [f"--config.reward.models.clip.path={models / 'clip'}", "--config.reward.models.clip.weight=1"]
    main.main(words(toys, f"--config.model.path={models / 'pipeline'}", "--config.data.text_length=8", *mixture, *clip))
    first, second = runs.numbers(toys / "run")
    assert {"denoise/reward", "inversion/reward"} < set(first) and first["grad_norm"] > 0
    assert first["denoise/reward"] != second["denoise/reward"]


def test_a_method(tables, models, tmp_path):
    flags = ["--config.method=one_level", f"--config.model.path={models / 'pipeline'}", "--config.data.text_length=8"]
    flags += [f"--config.reward.models.clip.path={models / 'clip'}", "--config.reward.models.clip.weight=1"]
    main.main(words(tmp_path, *flags))
    first, _ = runs.numbers(tmp_path / "run")
    assert first["loss"] == first["level/loss"] and first["level/reward"] == first["level/caption_reward"]
    assert first["grad_norm"] > 0


def test_a_family(toys):
    """With the toy reward: trained, resumed, sampled, generated, and counted."""
    flags = [f"--config.model.path={toys / 'pipeline'}", "--config.reward.models.red.kind=redness"]
    flags += [f"--config.reward.models.red.path={toys / 'red'}", "--config.reward.models.red.weight=1"]
    main.main(words(toys, *flags, "--config.steps=1", "--config.checkpoint.every=1"))
    main.main(words(toys, *flags, "--config.steps=2", "--config.sample.every=1"))
    found = runs.numbers(toys / "run")
    assert len(found) == 2 and all(line["grad_norm"] > 0 for line in found)
    assert (toys / "run" / "samples" / "000002.png").exists()
    images = [f"--model={toys / 'pipeline'}", "--prompt=fox", f"--out={toys / 'images'}", "--height=32", "--width=48"]
    generate.main([*images, f"--checkpoint={toys / 'run'}", "--steps=2", "--text-length=1"])
    assert [path.name for path in (toys / "images").iterdir()] == ["0000-fox.png"]
    recipe = main.parse(words(toys, *flags)).config
    parts = work.update(recipe, architectures.read(recipe))
    assert parts["transformer"].model == 2 * 2 * 3 * 2.0 * 24 * 16**2  # samples, branches, forward and two backward
    assert parts["captions"].model == 0
