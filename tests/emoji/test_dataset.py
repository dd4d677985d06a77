"""The tensorflow-datasets builder: right pictures, right texts, and no TensorFlow."""

import collections
import sys

import numpy as np
import pytest

from srpo_jax.emoji import pictures, world
from srpo_jax.emoji.dataset import Emoji


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    builder = Emoji(data_dir=tmp_path_factory.mktemp("data"))
    builder.download_and_prepare(file_format="array_record")
    return builder


@pytest.mark.parametrize("split", world.SPLITS)
def test_every_concept_of_a_split_in_every_style(builder, split):
    source = builder.as_data_source(split)
    concepts = {concept.id: concept for concept in world.split(split)}
    assert len(source) == len(concepts) * len(world.STYLES)
    counts = collections.Counter()
    for example in source:
        concept, style = concepts[example["id"].decode()], example["style"].decode()
        assert example["caption"].decode() == concept.caption
        assert example["prompt"].decode() == world.prompt(concept, style)
        counts[concept.id, style] += 1
    assert set(counts.values()) == {1} and len(counts) == len(source)


def test_pictures_are_those_of_the_archives(builder):
    source = builder.as_data_source("holdout")
    for index in (0, len(source) // 2, len(source) - 1):
        example = source[index]
        concept = next(concept for concept in world.world() if concept.id == example["id"].decode())
        assert example["image"].dtype == np.uint8
        np.testing.assert_array_equal(example["image"], pictures.load([concept], [example["style"].decode()])[0, 0])


def test_tensorflow_stays_out(builder):
    assert builder.info.splits["train"].num_examples == 3 * len(world.split("train"))
    assert "tensorflow" not in sys.modules
