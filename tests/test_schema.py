"""Broken files of ours: whatever stands in them, one line says what is wrong."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from srpo_jax import config, metrics, record, schema
from srpo_jax.data import stored
from srpo_jax.errors import UserError
from srpo_jax.weights import folder

DEEP = "[" * 100_000
STRANGE = [None, True, -1, 0.5, 2**70, 1e400, "x", "", [], ["a"], [None], {}, {"a": 1}, [[1]], [-1, 2], [2**70]]


@dataclasses.dataclass(frozen=True)
class Inner:
    count: int


@dataclasses.dataclass(frozen=True)
class Outer:
    size: int
    rate: float
    names: dict[str, str]
    axes: tuple[int, ...]
    pair: tuple[int, str]
    inner: Inner
    free: str | None = None


GOOD = Outer(1, 2, {"a": "b"}, (1, 2), (1, "x"), Inner(0))


@dataclasses.dataclass(frozen=True)
class Outermost:
    rows: list[Outer]
    by_name: dict[str, Inner]


def test_what_was_written_is_rebuilt():
    whole = Outermost([GOOD, GOOD], {"a": Inner(3)})
    content = json.loads(json.dumps(dataclasses.asdict(whole)))
    assert schema.rebuild(Outermost, content, "it") == whole
    assert schema.rebuild(Outermost, {"rows": [], "by_name": {}}, "it") == Outermost([], {})
    for wrong in (
        content | {"more": 1},
        {"rows": []},
        content | {"by_name": {"a": {"count": "3"}}},
        content | {"by_name": {"a": {"count": 3, "more": 1}}},
        content | {"rows": [content["rows"][0] | {"inner": {}}]},
        *({"rows": strange, "by_name": {}} for strange in STRANGE if strange != []),
        *({"rows": [], "by_name": strange} for strange in STRANGE if strange != {}),
        *STRANGE,
    ):
        with pytest.raises(ValueError, match=r"^it: "):
            schema.rebuild(Outermost, wrong, "it")


def test_what_fits_and_what_does_not():
    assert schema.wrong(GOOD) == ""
    for name, value, words in (
        ("size", -1, "size=-1 must be a whole number, not negative"),
        ("size", True, "size=True must be"),
        ("size", 2**70, "size=1180591620717411303424 must be"),
        ("rate", float("nan"), "rate=nan must be a finite number"),
        ("names", {"a": 1}, "names={'a': 1} must be"),
        ("axes", (1, "2"), "axes=(1, '2') must be"),
        ("axes", 3, "axes=3 must be"),
        ("pair", (1, "x", 2), "pair="),
        ("inner", Inner(-1), "inner=Inner(count=-1)"),
        ("free", 3, "free=3 must be"),
    ):
        assert schema.wrong(dataclasses.replace(GOOD, **{name: value})).startswith(words)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_a_network_whose_config_holds_strange_values(model, tmp_path, part):
    """Each key of each network with each strange value: it is read, as it was or as an equal, or refused in a line."""
    shutil.copytree(model / part, tmp_path / part)
    file = tmp_path / part / "config.json"
    content = json.loads(file.read_text())
    refused = 0
    for name in content["config"]:
        for value in STRANGE:
            file.write_text(json.dumps(content | {"config": content["config"] | {name: value}}))
            try:
                folder.open_weights(tmp_path / part)
            except UserError as error:
                assert "\n" not in str(error)
                refused += 1
    assert refused > 8 * len(content["config"])
    for broken in ("", "{", "[]", DEEP, json.dumps(content | {"config": 3}), json.dumps(content | {"network": []})):
        file.write_text(broken)
        with pytest.raises(UserError):
            folder.open_weights(tmp_path / part)


def test_the_manifest_of_a_data_set(tmp_path):
    arrays = {"text": stored.Spec((8, 32), np.dtype(np.float32))}
    good = stored.Manifest(3, 2, arrays, {"vae": "0"}, "d", "m", "s").content()
    file = tmp_path / stored.MANIFEST
    file.write_text(json.dumps(good))
    stored.read_manifest(tmp_path)
    for name in good:
        for value in STRANGE:
            file.write_text(json.dumps(good | {name: value}))
            try:
                stored.read_manifest(tmp_path)
            except UserError as error:
                assert "\n" not in str(error)
    for shape in (["x"], [-1], 3, None):
        file.write_text(json.dumps(good | {"arrays": {"text": {"shape": shape, "dtype": "float32"}}}))
        with pytest.raises(UserError, match="is damaged"):
            stored.read_manifest(tmp_path)
    for dtype in ("nothing", 3, None, []):
        file.write_text(json.dumps(good | {"arrays": {"text": {"shape": [1], "dtype": dtype}}}))
        with pytest.raises(UserError, match="is damaged"):
            stored.read_manifest(tmp_path)
    for content in ("", "{}", "[1]", '{"a": 1}', DEEP, "null"):
        (tmp_path / stored.PROMPTS).write_text(content)
        with pytest.raises(UserError, match="prompts.json"):
            stored.read_prompts(tmp_path)


@pytest.mark.parametrize("content", [DEEP, "\0", '{"step": "1"}\n', "[1]\n", "3\n", '{"loss": 1}\n'])
def test_metrics_and_configs_that_hold_something_else(tmp_path, content):
    (tmp_path / metrics.JSONL).write_bytes(b'{"step": 1}\n' + content.encode() + b"\xff")
    assert metrics.read(tmp_path) == [{"step": 1}]
    (tmp_path / "config.json").write_text(content if content != '{"loss": 1}\n' else DEEP)
    with pytest.raises(UserError) as error:
        record.check(tmp_path, config.default(), {})
    assert "\n" not in str(error.value)
