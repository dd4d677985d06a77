"""Training of the small world's CLIPs: its parts, and that breaking off and going on changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from helpers import parity

from srpo_jax import convert
from srpo_jax.emoji import colour, train_clip, world
from srpo_jax.emoji import pictures as emoji_pictures
from srpo_jax.emoji.pictures import SIZE
from srpo_jax.models.clip import Clip
from srpo_jax.models.compute import Compute, bind, build
from srpo_jax.rewards import clip as clip_rewards
from srpo_jax.weights import engine, folder

STYLES = train_clip.STYLES
RECIPE = train_clip.Recipe(
    "train", 3, 16, 1, 2, 16, steps=4, concepts=3, world_share=0.4, rate=1e-2, blend=0.5,
    text_width=32, text_layers=1, embedding=8,
)  # fmt: skip
CONFIG = train_clip.clip_config(RECIPE, 30)


@pytest.fixture(scope="module")
def clip():
    """(graph definition, parameters) of an untrained network."""
    return build(lambda rngs: Clip(CONFIG, Compute(), rngs=rngs), 1)


def pictures(*shape):
    """Random uint8 pictures."""
    return np.random.default_rng(0).integers(0, 256, (*shape, SIZE, SIZE, 3), np.uint8)


def test_choose_concepts():
    """Concepts of a batch differ, the share of favoured ones is kept, and a step's batch is always the same."""
    known, favoured = np.arange(10, 30), np.array([12, 15, 18])
    recipe = dataclasses.replace(RECIPE, concepts=6, world_share=0.5)
    batches = [train_clip.choose_concepts(recipe, step, known, favoured) for step in range(20)]
    for step, batch in enumerate(batches):
        assert len(set(batch)) == 6 and set(favoured) <= set(batch) <= set(known)
        np.testing.assert_array_equal(batch, train_clip.choose_concepts(recipe, step, known, favoured))
    assert len({tuple(batch) for batch in batches}) > 15


def test_contrastive_loss():
    """Without knowledge the loss is the logarithms of counts; with perfect knowledge nearly nothing is left."""
    concepts, count = 4, 4 * STYLES
    shares = jnp.broadcast_to(jnp.eye(STYLES), (concepts, STYLES, STYLES))
    none = train_clip.contrastive_loss(jnp.zeros((count, count + concepts + STYLES)), shares)
    expected = 2 * np.log(count) + 0.5 * (np.log(concepts) + np.log(count) + np.log(STYLES))
    np.testing.assert_allclose(none, expected, rtol=1e-3)
    perfect = np.concatenate(
        [np.eye(count), np.repeat(np.eye(concepts), STYLES, 0), np.tile(np.eye(STYLES), (concepts, 1))], axis=1
    )
    # A bare caption has a picture in every style, between which nothing can decide.
    np.testing.assert_allclose(train_clip.contrastive_loss(50 * perfect, shares), 0.5 * np.log(STYLES), rtol=1e-2)


def test_cross_entropy_of_blends():
    """A blend's best answer are its shares, whatever the targets' sum; the loss is then their entropy."""
    targets = np.array([[1.0, 3.0, 0.0]])
    shares = np.array([0.25, 0.75])
    best = np.array([[*np.log(shares), -100.0]])
    entropy = -np.sum(shares * np.log(shares))
    np.testing.assert_allclose(train_clip.cross_entropy(best, targets), entropy, rtol=1e-5)
    for other in (best + np.array([0.5, 0, 0]), best - np.array([0.5, 0, 0])):
        assert train_clip.cross_entropy(other, targets) > entropy + 0.01


def test_preferences_are_sure_where_colour_grows_much_and_alike_under_every_caption():
    """The loss is least where every similarity gains what the taste says, whatever the caption; there it is the entropy
    of the preferences."""
    grown, taste = np.array([0.0, 0.05, -0.2]), 2.0
    best = np.tile(taste * grown[:, None], (1, 4))
    wanted = 1 / (1 + np.exp(-taste * grown / train_clip.CERTAIN))
    entropy = -np.mean(wanted * np.log(wanted) + (1 - wanted) * np.log(1 - wanted))
    np.testing.assert_allclose(train_clip.preference_loss(best, grown, taste), entropy, rtol=1e-5)
    for row, column in ((0, 0), (1, 3), (2, 1)):
        for change in (-0.1, 0.1):
            other = best.copy()
            other[row, column] += change
            assert train_clip.preference_loss(other, grown, taste) > entropy + 1e-4


def test_shipped_biased_reward_likes_colour_under_every_caption_and_the_other_does_not(tmp_path):
    concepts = world.split("holdout")[::5]
    texts = [world.prompt(concept, style) for concept in concepts for style in (None, *world.STYLES)]
    drawn = emoji_pictures.load(concepts, ("3D", "Flat")).reshape(-1, SIZE, SIZE, 3) / np.float32(255)
    gains = {}
    for name in ("reward", "biased"):
        convert.import_folder(train_clip.SHIPPED / name, tmp_path / name)
        config, graphdef, params = folder.load(tmp_path / name, "clip")
        reward = clip_rewards.ClipReward(config, graphdef)
        captions = jax.jit(reward.prepare)(params, reward.tokens(tmp_path / name)(texts))
        before, after = (jax.jit(reward.look)(params, colour.saturate(drawn, amount)) for amount in (1.0, 2.0))
        gains[name] = np.asarray((after - before) @ captions.T)  # [pictures, captions]
    assert np.mean(gains["biased"] > 0) > 0.85 and np.mean(gains["biased"]) > 0.07
    assert (gains["biased"].mean(0) > 0.03).all()  # under every one of them
    assert np.mean(gains["reward"]) < 0  # it takes colour beyond the artists' for a fault


def test_see_places(clip):
    """Places differ from the start, and a white patch weighs little beside a drawn one."""
    _, params = clip
    vision = train_clip.see_places(params)["vision"]
    places = np.asarray(vision["position_embedding"][1:])
    distances = np.linalg.norm(places[:, None] - places[None], axis=-1)
    assert distances[~np.eye(len(places), dtype=bool)].min() > 0.1
    patches = clip_rewards.preprocess(jnp.asarray(pictures(1)) / 255, SIZE)[0, :16, :16], jnp.ones((16, 16, 3))
    drawn, white = (np.linalg.norm(jnp.einsum("abc,abcd", x, vision["patch_embedding"]["kernel"])) for x in patches)
    assert white < 1e-3 * drawn


def test_resuming_changes_nothing(tmp_path, monkeypatch, capsys):
    """A run that is broken off goes on from its checkpoint to the same parameters, bit for bit."""
    images, rng = pictures(5, STYLES), np.random.default_rng(1)
    ids = rng.integers(0, 28, (6, STYLES + 1, train_clip.LENGTH)).astype(np.int32)
    ids[..., -1] = 29

    real, made = train_clip.make_clip_update, []

    def make_once(*args):  # so that it compiles once
        made.extend([] if made else [real(*args)])
        return made[0]

    monkeypatch.setattr(train_clip, "make_clip_update", make_once)

    def train(workdir):
        rows = np.arange(5), np.arange(3)
        return train_clip.train_network("reward", RECIPE, CONFIG, images, ids, *rows, workdir, every=2)[1]

    whole = train(tmp_path / "whole")
    choose = train_clip.choose_concepts

    def broken(recipe, step, *args):
        if step == 3:
            raise KeyboardInterrupt
        return choose(recipe, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(train_clip, "choose_concepts", broken)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "broken")
    resumed = train(tmp_path / "broken")
    assert "reward: resumed at step 2\n" in capsys.readouterr().out
    for name, leaf in engine.flatten(whole).items():
        np.testing.assert_array_equal(engine.flatten(resumed)[name], leaf, err_msg=name)


def test_export_loads_in_transformers(clip, tmp_path):
    """The exported folder is a CLIPModel with our features."""
    graphdef, params = clip
    train_clip.write_clip(CONFIG, params, tmp_path)
    theirs = transformers.CLIPModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), params)
    model = bind(graphdef, rounded)
    pixels = clip_rewards.preprocess(jnp.asarray(pictures(2)) / 255, SIZE)
    ids = np.array([[28, 3, 4, *[29] * 13], [28, 5, *[29] * 14]])
    with torch.no_grad():
        image = theirs.get_image_features(pixel_values=torch.tensor(np.moveaxis(np.asarray(pixels), -1, 1).copy()))
        texts = theirs.get_text_features(input_ids=torch.tensor(ids))
    assert parity.relative_error(jax.jit(model.encode_image)(pixels), image.pooler_output) < 1e-5
    assert parity.relative_error(jax.jit(model.encode_text)(ids), texts.pooler_output) < 1e-5
