"""The embedded world: the list is consistent with the data set, and the splits never touch."""

import csv

import pytest

from srpo_jax.emoji import world


def test_the_list_names_concepts_of_the_data_set_once_each():
    with open(world.DATA / "world.csv", encoding="utf-8", newline="") as file:
        listed = [(row["id"], row["caption"]) for row in csv.DictReader(file)]
    known = {concept.id: concept.caption for concept in world.concepts()}
    assert len(world.concepts()) == 1555
    assert len(set(listed)) == len(listed) == len(world.world()) == 241
    assert all(known[identifier] == caption for identifier, caption in listed)


def test_splits_are_the_data_sets_and_share_nothing():
    train, holdout = world.split("train"), world.split("holdout")
    assert (len(train), len(holdout)) == (182, 59)
    assert not {concept.caption for concept in train} & {concept.caption for concept in holdout}
    assert set(train) | set(holdout) == set(world.world())
    with pytest.raises(ValueError, match="'test' is unknown"):
        world.split("test")


def test_prompts():
    apple = next(concept for concept in world.world() if concept.emoji == "\N{RED APPLE}")
    assert world.prompt(apple) == "red apple"
    assert [world.prompt(apple, style) for style in world.STYLES] == [
        "3D. red apple",
        "Flat. red apple",
        "Mono. red apple",
    ]
    with pytest.raises(ValueError, match="'Oil' is unknown"):
        world.prompt(apple, "Oil")


def test_captions_are_short_enough_for_the_text_encoders():
    assert max(len(concept.caption.split()) for concept in world.world()) <= 4
