"""The emoji pictures as a tensorflow-datasets builder; TensorFlow itself is neither needed nor imported.

    builder = Emoji(data_dir="~/data")
    builder.download_and_prepare(file_format="array_record")
    source = builder.as_data_source("holdout")  # random access: source[0]["image"] is uint8 [64, 64, 3]

Nothing is downloaded: the pictures are part of the package.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from srpo_jax.emoji import pictures, world


class Emoji(tfds.core.GeneratorBasedBuilder):
    """Pictures of single concepts in several styles, with captions. Splits "train" and "holdout" share no concept.

    Two configurations: "world" (default), the concepts that the shipped models know, and "all". An example has

      image: uint8 ``[64, 64, 3]``, on white.
      caption, style, prompt: text (bytes when read back), as in "red apple", "3D", "3D. red apple".
      id: the concept's code points in hex, joined by "-".
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Styles 3D, Flat and Mono of 1,555 concepts."}
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name="world", description="The concepts that the shipped models know."),
        tfds.core.BuilderConfig(name="all", description="Every concept of the data set."),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=(pictures.SIZE, pictures.SIZE, 3), dtype=np.uint8, encoding_format="png"
                    ),
                    "caption": tfds.features.Text(),
                    "style": tfds.features.Text(),
                    "prompt": tfds.features.Text(),
                    "id": tfds.features.Text(),
                }
            ),
            supervised_keys=("prompt", "image"),
            homepage="https://github.com/microsoft/fluentui-emoji",
            license="MIT (Fluent Emoji, Copyright (c) Microsoft Corporation)",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # nothing to download
        return {split: self._generate_examples(split) for split in world.SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        known = world.world() if self.builder_config.name == "world" else world.concepts()
        chosen = [concept for concept in known if concept.split == split]
        for style, images in zip(world.STYLES, pictures.load(chosen), strict=True):
            for concept, image in zip(chosen, images, strict=True):
                yield (
                    f"{style}/{concept.id}",
                    {
                        # A PIL image: encoding a numpy array would need TensorFlow.
                        "image": Image.fromarray(image),
                        "caption": concept.caption,
                        "style": style,
                        "prompt": world.prompt(concept, style),
                        "id": concept.id,
                    },
                )
