"""A tensorflow-datasets data set of encoded prompts or pictures, written shard by shard and read without TensorFlow.

    DIR/encoding.json                               what is encoded by what: ``Manifest``; written first
    DIR/prompts.json                                all texts, in the order of the records
    DIR/srpo-train.array_record-00000-of-00012 ...  a shard appears under its name when all of it is there
    DIR/features.json, dataset_info.json            written last: with them the data set is complete

A record holds ``prompt`` (text) and arrays, bit for bit: ``text`` [T, C] and ``pooled`` [P], the text encoders'
features; of a picture also ``latents`` [H/8, W/8, 16], float32, scaled as the transformer takes them. ArrayRecord
compresses each record (zstd): T5-XXL's features of 512 tokens in bfloat16, 4.2 MB a prompt, take at most some 3.3 MB.
Those at padding are kept: transformers attend to them, and they differ from each other.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from srpo_jax import reading, schema, storage
from srpo_jax.errors import UserError
from srpo_jax.weights.files import Spec, read_json

FORMAT = "srpo_jax.data/1"
MANIFEST, PROMPTS, COMPLETE = "encoding.json", "prompts.json", "dataset_info.json"
NAME, SPLIT = "srpo", "train"
LATENTS = "latents"  # the name of the array that only pictures have
SHARD_BYTES = 256 << 20  # of a shard, before compression: what a kill can cost
SHARD_RECORDS = 4096  # at most


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a data set holds and what made it.

    Attributes:
      count: examples.
      shard_size: examples of a shard; the last one may have fewer.
      arrays: of an example, by name.
      encoders: fingerprints of what computed the arrays, by folder of the pipeline (``weights.fingerprint``).
      digest: of the texts (and of whatever else was encoded) in their order, from ``digest``.
      model, source: for people: the pipeline folder and where the examples came from.
    """

    count: int
    shard_size: int
    arrays: dict[str, Spec]
    encoders: dict[str, str]
    digest: str
    model: str
    source: str

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.count // self.shard_size)

    def members(self, shard: int) -> range:
        """The examples of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.count))

    def content(self) -> dict[str, Any]:
        """As ``encoding.json`` has it."""
        arrays = {name: {"shape": list(spec.shape), "dtype": str(spec.dtype)} for name, spec in self.arrays.items()}
        return {"format": FORMAT} | dataclasses.asdict(self) | {"arrays": arrays}


def digest(texts: Sequence[str]) -> str:
    """16 hexadecimal digits that other texts, or these in another order, do not have."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:16]


def default_shard_size(arrays: Mapping[str, Spec]) -> int:
    """Examples that make a shard of about ``SHARD_BYTES``."""
    return max(1, min(SHARD_RECORDS, SHARD_BYTES // sum(spec.nbytes for spec in arrays.values())))


def read_manifest(path: str | os.PathLike) -> Manifest:
    """The manifest of a data set, complete or not. Raises UserError if the folder has none or it is not ours."""
    path = _local(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; expected a data set made by `python -m srpo_jax.encode`")
    content = read_json(path / MANIFEST)
    if content.pop("format", None) != FORMAT:
        raise UserError(f"{path / MANIFEST} is not in the format {FORMAT}; encode the prompts again")
    try:
        arrays = {
            name: Spec(tuple(array["shape"]), np.dtype(str(array["dtype"])))
            for name, array in content["arrays"].items()
        }
        found = Manifest(**content | {"arrays": arrays})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path / MANIFEST} is damaged ({error}); encode the prompts again") from error
    words = schema.wrong(found) or ("" if found.shard_size else "shard_size=0")
    if words:
        raise UserError(f"{path / MANIFEST} is damaged ({words}); encode the prompts again")
    return found


def read_prompts(path: str | os.PathLike) -> list[str]:
    """The texts of all examples of a data set, complete or not, without reading the records. Raises UserError."""
    file = pathlib.Path(path) / PROMPTS
    try:
        found = schema.parse(reading.content(file))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); copy it again") from error
    if not isinstance(found, list) or not all(isinstance(prompt, str) for prompt in found):
        raise UserError(f"{file} is damaged (it holds no list of texts); copy it again")
    return found


def _local(path: str | os.PathLike) -> pathlib.Path:
    if "://" in os.fspath(path):
        raise UserError(f"{path}: ArrayRecord files lie in folders; mount the bucket (gcsfuse) and name the folder")
    return pathlib.Path(path)


def features(manifest: Manifest) -> Any:
    """The features of a record, as tensorflow-datasets describes them."""
    import tensorflow_datasets as tfds

    # As bytes: the library's other encodings have no bfloat16, and are slow.
    arrays = {
        name: tfds.features.Tensor(shape=spec.shape, dtype=spec.dtype, encoding=tfds.features.Encoding.BYTES)
        for name, spec in manifest.arrays.items()
    }
    return tfds.features.FeaturesDict({"prompt": tfds.features.Text()} | arrays)


# --- writing ----------------------------------------------------------------------------------------------------------


def shard_file(path: str | os.PathLike, manifest: Manifest, shard: int) -> pathlib.Path:
    """The file of a complete shard."""
    return pathlib.Path(path) / f"{NAME}-{SPLIT}.array_record-{shard:05d}-of-{manifest.shards:05d}"


def missing_shards(path: str | os.PathLike, manifest: Manifest) -> list[int]:
    """The shards that are still to be written."""
    return [shard for shard in range(manifest.shards) if not shard_file(path, manifest, shard).exists()]


def plan(path: str | os.PathLike, wanted: Manifest) -> Manifest:
    """Checks that ``wanted`` may be written to a folder, which need not exist, or goes on there. Writes nothing.

    Returns:
      ``wanted`` with the shard size of what is there already.

    Raises UserError if the folder holds something else, or a data set that differs (the message says in what).
    """
    path = _local(path)
    storage.check_writable(path, "--out")
    if not path.exists() or (path.is_dir() and all(inner.name == storage.FRESH_DISK for inner in path.iterdir())):
        return wanted
    if not (path / MANIFEST).exists():
        raise UserError(f"{path} exists and is not a data set of encoded prompts or pictures; choose another folder")
    there = read_manifest(path)
    known = {
        "count": "the number of examples", "arrays": "the arrays (length, size, dtype)", "encoders": "the encoders",
        "digest": "the prompts" if LATENTS not in wanted.arrays else "the pictures or their captions",
    }  # fmt: skip
    if different := [words for key, words in known.items() if getattr(there, key) != getattr(wanted, key)]:
        raise UserError(f"{path} holds a data set that differs in {', '.join(different)}; choose another folder")
    return there


def begin(path: str | os.PathLike, manifest: Manifest, texts: Sequence[str]) -> None:
    """Makes the folder with its manifest and texts, and removes what an interrupted run left; one process does it."""
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    for left in path.glob(f".{NAME}-*.partial"):
        left.unlink()
    if not (path / MANIFEST).exists():
        _write(path / PROMPTS, json.dumps(list(texts), ensure_ascii=False, indent=0))
        _write(path / MANIFEST, json.dumps(manifest.content(), ensure_ascii=False, indent=2))


class Writer:
    """Writes shards of a data set, one after the other.

    Args:
      path: the folder, begun.
      manifest: of the data set.
      shards: those to write; ``write`` wants their members in this order.

    Use as a context manager: a shard that is not complete when the block ends is removed.
    """

    def __init__(self, path: str | os.PathLike, manifest: Manifest, shards: Sequence[int]):
        self._path, self._manifest, self._shards = pathlib.Path(path), manifest, list(shards)
        self._features = features(manifest)
        self._file: ArrayRecordWriter | None = None
        self._written = 0

    def write(self, prompt: str, arrays: Mapping[str, np.ndarray]) -> None:
        """The next example. Raises ValueError for arrays that are not those of the manifest."""
        if self._file is None:
            # Records of their own groups can be read one by one.
            self._file, self._written = ArrayRecordWriter(str(self._partial()), "group_size:1"), 0
        self._file.write(self._features.serialize_example({"prompt": prompt, **arrays}))
        self._written += 1
        if self._written == len(self._manifest.members(self._shards[0])):
            self._file.close()
            self._file = None
            with open(self._partial(), "rb") as file:
                os.fsync(file.fileno())
            os.replace(self._partial(), shard_file(self._path, self._manifest, self._shards.pop(0)))

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._partial().unlink(missing_ok=True)

    def _partial(self) -> pathlib.Path:
        file = shard_file(self._path, self._manifest, self._shards[0])
        return file.with_name(f".{file.name}.partial")


def finish(path: str | os.PathLike, manifest: Manifest) -> None:
    """Writes what makes a folder whose shards are all there a tensorflow-datasets data set; one process does it.

    Raises UserError for a shard that is missing or damaged.
    """
    import tensorflow_datasets as tfds

    path = pathlib.Path(path)
    if missing := missing_shards(path, manifest):
        raise UserError(
            f"{path} lacks {len(missing)} of {manifest.shards} shards: all processes have to write to one folder; "
            "the same command again goes on"
        )
    lengths = []
    for shard in range(manifest.shards):
        file = shard_file(path, manifest, shard)
        reader = ArrayRecordReader(str(file))
        lengths.append(reader.num_records())
        reader.close()
        if lengths[-1] != len(manifest.members(shard)):
            raise UserError(f"{file} is damaged; move it away, and the same command again makes it anew")
    template = tfds.core.ShardedFileTemplate(
        data_dir=path, dataset_name=NAME, split=SPLIT, filetype_suffix="array_record"
    )
    size = sum(shard_file(path, manifest, shard).stat().st_size for shard in range(manifest.shards))
    split = tfds.core.SplitInfo(name=SPLIT, shard_lengths=lengths, num_bytes=size, filename_template=template)
    tfds.folder_dataset.write_metadata(
        data_dir=str(path),
        features=features(manifest),
        split_infos=[split],
        version="1.0.0",
        check_data=False,
        description=f"Prompts encoded by {manifest.model}; see {MANIFEST}.",
    )


def _write(path: pathlib.Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)


# --- reading ----------------------------------------------------------------------------------------------------------


class DataSet:
    """A complete data set; examples can be read in any order and by several threads.

    Args:
      path: the folder.

    Attributes:
      manifest: what it holds.

    Raises UserError if the folder is not a data set or is not complete.
    """

    def __init__(self, path: str | os.PathLike):
        import tensorflow_datasets as tfds

        self.path, self.manifest = pathlib.Path(path), read_manifest(path)
        if not (self.path / COMPLETE).exists():
            missing = len(missing_shards(path, self.manifest))
            raise UserError(
                f"{path} is not complete ({missing} of {self.manifest.shards} shards are missing); "
                "the command that began it goes on"
            )
        if missing := missing_shards(path, self.manifest):
            raise UserError(f"{shard_file(path, self.manifest, missing[0])} is missing; copy or encode it again")
        self._source = tfds.builder_from_directory(str(path)).as_data_source(SPLIT)

    def __len__(self) -> int:
        return len(self._source)

    def read(self, places: Sequence[int]) -> list[dict[str, Any]]:
        """The examples at these places: ``prompt`` as text, arrays by name as numpy arrays."""
        examples = self._source.__getitems__(list(places))
        return [example | {"prompt": example["prompt"].decode("utf-8")} for example in examples]
