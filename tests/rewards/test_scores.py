"""ImageReward and the aesthetic predictors as rewards: tokens, pictures, and an update through ``train``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from helpers import runs, scores, tiny

from srpo_jax import text, train
from srpo_jax.errors import UserError
from srpo_jax.rewards import REWARDS
from srpo_jax.rewards.image_reward import LENGTH
from srpo_jax.weights import folder


def reward(kind, path):
    """A reward on the weights of a folder, and these."""
    config, graphdef, params = folder.load(path, REWARDS[kind].network)
    return REWARDS[kind](config, graphdef), params


def score(scorer, params, images, tokens):
    return scorer.score(params, scorer.look(params, images), scorer.prepare(params, tokens))


# --- captions ---------------------------------------------------------------------------------------------------------


def test_captions_of_image_reward(tmp_path):
    """As transformers' BertTokenizer gives them, whose folder does not tell its class; [ENC] and [DEC] come last."""
    path = scores.write_image_reward(tmp_path / "image_reward")
    scorer = REWARDS["image_reward"](scores.blip_config(), None)
    tokens = scorer.tokens(path)
    texts = ["Real. red Apple", "", "flat [DEC] unknownword", "old boat " * 30]
    found = tokens(texts)
    assert {name: array.shape for name, array in found.items()} == {"ids": (4, LENGTH), "mask": (4, LENGTH)}
    assert all(array.dtype == np.int32 for array in found.values())
    words = scores.bert_words()
    names = [*words, "[DEC]", "[ENC]"]
    rows = [[names[i] for i in row[mask > 0]] for row, mask in zip(found["ids"], found["mask"], strict=True)]
    assert rows[0] == ["[CLS]", "real", ".", "red", "apple", "[SEP]"]
    assert rows[1] == ["[CLS]", "[SEP]"]
    assert rows[2] == ["[CLS]", "flat", "[DEC]", "[UNK]", "[SEP]"]
    assert rows[3] == ["[CLS]", *(["old", "boat"] * 17)[: LENGTH - 2], "[SEP]"]
    assert (found["ids"][found["mask"] == 0] == 0).all()
    theirs = transformers.BertTokenizer.from_pretrained(path / "tokenizer")(texts[:2], padding="max_length",
                                                                            max_length=LENGTH)  # fmt: skip
    np.testing.assert_array_equal(found["ids"][:2], theirs["input_ids"])
    shapes = jax.tree.map(lambda a: (a.shape[1:], a.dtype), found)
    assert shapes == jax.tree.map(lambda s: (s.shape, s.dtype), scorer.token_shapes())


def test_a_wrong_tokenizer(tmp_path):
    size = len(scores.bert_words()) + 2
    scorer = REWARDS["image_reward"](scores.blip_config(), None)
    scores.write_bert_tokenizer(tmp_path / "cased" / "tokenizer", cased=True)
    message = rf"cased/tokenizer is not .* with \[DEC\] and \[ENC\] it has {size + 1} tokens, the network {size}"
    with pytest.raises(UserError, match=message):
        scorer.tokens(tmp_path / "cased")
    with pytest.raises(UserError, match="is not a folder"):
        scorer.tokens(tmp_path / "none")
    with pytest.raises(UserError, match="holds no tokenizer"):
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "tokenizer_config.json").write_text("{}")
        text.load_tokenizer(tmp_path / "empty")


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_pixels_of_v25_match_torch():
    """The whole picture, its sides not kept in proportion."""
    scorer = REWARDS["aesthetic_v25"](scores.AESTHETIC_V25, None)
    images = np.random.default_rng(0).random((2, 48, 64, 3), np.float32)
    x = torch.tensor(images.transpose(0, 3, 1, 2))
    x = torch.nn.functional.interpolate(x, size=(30, 30), mode="bicubic", antialias=True, align_corners=False)
    theirs = (2 * x - 1).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(scorer.pixels(images), theirs, atol=1e-5)


@pytest.mark.parametrize("kind", ["image_reward", "aesthetic", "aesthetic_v25"])
def test_scores_have_gradients_and_know_their_samples(kind, tmp_path):
    """A batch's scores are those of its samples alone; words count for ImageReward and for no other."""
    write = scores.write_image_reward if kind == "image_reward" else lambda path: scores.write_aesthetic(path, kind)
    path = write(tmp_path / "reward")
    scorer, params = reward(kind, path)
    tokens = scorer.tokens(path)
    images = jnp.asarray(np.random.default_rng(1).random((2, 40, 48, 3), np.float32))
    run = jax.jit(jax.value_and_grad(lambda x, t: score(scorer, params, x, t).sum()))
    both, gradient = run(images, tokens(["red apple", "flat. old boat"]))
    alone = [run(images[i : i + 1], tokens([caption]))[0] for i, caption in enumerate(["red apple", "flat. old boat"])]
    np.testing.assert_allclose(both, sum(alone), rtol=1e-4)
    assert all(np.abs(gradient[i]).max() > 0 for i in range(2)) and both.dtype == jnp.float32
    other = run(images, tokens(["blue car", "flat. old boat"]))[0]
    assert (abs(other - both) > 1e-4) == (kind == "image_reward")


# --- an update --------------------------------------------------------------------------------------------------------


def test_an_update_with_all_three(models, compiled, tmp_path):
    """Beside each other in one mixture: one update, every term with a reward and a gradient."""
    changes = {"reward__models__clip__weight": 0.0}
    for kind, write in (
        ("image_reward", scores.write_image_reward),
        ("aesthetic", scores.write_aesthetic),
        ("aesthetic_v25", lambda path: scores.write_aesthetic(path, "aesthetic_v25")),
    ):
        changes |= {f"reward__models__{kind}__path": str(write(tmp_path / kind)),
                    f"reward__models__{kind}__weight": 0.5}  # fmt: skip
    config = tiny.config(models, steps=1, compilation_cache=compiled, reward__margin=50.0, **changes)
    train.train(config, tmp_path / "run")
    (found,) = runs.numbers(tmp_path / "run")
    assert {"denoise/reward", "inversion/reward"} < set(found)
    assert found["grad_norm"] > 0 and found["denoise/reward"] != found["inversion/reward"]
