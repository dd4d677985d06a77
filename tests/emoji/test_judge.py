"""The judge: its probabilities are CLIP's, and it knows the pictures that it judges by."""

import pathlib
import shutil

import numpy as np
import pytest
from helpers import tiny

from srpo_jax import convert, text
from srpo_jax.emoji import pictures, world
from srpo_jax.emoji.judge import Judge, Judgement
from srpo_jax.models import clip
from srpo_jax.models.compute import bind
from srpo_jax.rewards import clip as clip_rewards
from srpo_jax.weights import folder

LENGTH = 16


@pytest.fixture(scope="module")
def tiny_judge(tmp_path_factory, word_tokenizers):
    """A folder with a small random CLIP and a tokenizer of the world's words, and the CLIP itself."""
    path, vocabulary = tmp_path_factory.mktemp("judge"), word_tokenizers["clip"].size
    shutil.copytree(word_tokenizers["clip"].folder, path / "tokenizer")
    config = clip.ClipConfig(
        clip.ClipTextConfig(vocabulary, 16, 32, 1, 2, LENGTH, "gelu", eos_token_id=vocabulary - 1),
        clip.ClipVisionConfig(16, 32, 1, 2, 32, 16, "gelu"),
        8,
    )
    tiny.save_random(path, "clip", config, 1)
    _, graphdef, params = folder.load(path, "clip")
    return path, bind(graphdef, params)


def draw(style: str, count: int) -> np.ndarray:
    return pictures.load(world.world()[:count], [style])[0]


def test_probabilities_are_the_softmax_over_all_prompts(tiny_judge):
    path, model = tiny_judge
    images = draw("3D", 5)
    judgement = Judge(path)(images, batch=3)

    ids = text.tokenize(
        text.load_tokenizer(path / "tokenizer"),
        [f"{style}. {concept.caption}" for style in world.STYLES for concept in world.world()],
        LENGTH,
    )
    image = np.asarray(
        clip_rewards.unit(model.encode_image(clip_rewards.preprocess(images.astype(np.float32) / 255, 32)))
    )
    logits = np.exp(float(model.logit_scale[...])) * image @ np.asarray(clip_rewards.unit(model.encode_text(ids))).T
    joint = np.exp(logits - logits.max(-1, keepdims=True))
    joint = (joint / joint.sum(-1, keepdims=True)).reshape(5, 3, -1)
    np.testing.assert_allclose(judgement.styles, joint.sum(2), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(judgement.concepts, joint.sum(1), rtol=1e-3, atol=1e-6)


def test_numbers_and_bytes_are_the_same_draw(tiny_judge):
    images = draw("Flat", 2)
    judge = Judge(tiny_judge[0])
    np.testing.assert_allclose(judge(images).styles, judge(images / np.float32(255)).styles, rtol=1e-6)


def test_shares_accuracy_and_notes():
    concepts = np.zeros((4, len(world.world())))
    concepts[[0, 1, 2, 3], [0, 1, 2, 0]] = 0.9
    judgement = Judgement(np.array([[0.8, 0.1, 0.1], [0.2, 0.5, 0.3], [0.6, 0.4, 0.0], [0.4, 0.0, 0.6]]), concepts)
    captions = [concept.caption for concept in world.world()[:4]]
    shares = {style: found.mean() for style, found in judgement.in_style().items()}
    assert shares == {"3D": 0.5, "Flat": 0.25, "Mono": 0.25}
    assert judgement.right(captions).tolist() == [True, True, True, False]
    assert judgement.note(1) == f"judged Flat 50%, {captions[1]} 90%"
    with pytest.raises(ValueError, match="3 captions for 4 pictures"):
        judgement.right(captions[:3])


def test_shipped_judge_knows_every_picture_of_the_world(tmp_path):
    shipped = pathlib.Path(world.__file__).parent / "judge"
    convert.import_folder(shipped, tmp_path / "judge")
    judge = Judge(tmp_path / "judge")
    captions = [concept.caption for concept in world.world()]
    for style in world.STYLES:
        judgement = judge(draw(style, len(captions)))
        assert judgement.in_style()[style].mean() >= 0.97
        assert judgement.right(captions).mean() >= 0.97
