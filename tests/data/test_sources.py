"""Prompt files of every kind, what is wrong with them, and the filters."""

import json
import os

import pyarrow
import pyarrow.parquet
import pytest

from srpo_jax.data import filters, sources
from srpo_jax.emoji.dataset import Emoji
from srpo_jax.errors import UserError

TEXTS = ["a fox", "ein Bär\u2028und mehr", '狐, "quoted"']


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --- what is read -----------------------------------------------------------------------------------------------------


def test_lines_become_prompts(tmp_path):
    path = write(tmp_path / "p.txt", '\ufeff a fox \r\n\r\n  ein Bär\u2028und mehr\n狐, "quoted"\n')
    assert sources.read(path) == TEXTS


CSV = 'id,prompt\r\n1, a fox \r\n2,ein Bär\u2028und mehr\r\n\r\n3,\r\n4,"狐, ""quoted"""\r\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.csv", CSV),
        ("p.tsv", 'Note\tcaption\nx\ta fox\nx\tein Bär\u2028und mehr\nx\t"狐, ""quoted"""\n'),
        ("p.JSON", json.dumps(TEXTS)),  # HPDv2's benchmark
        ("p.json", json.dumps([{"prompt": text, "image_path": ["a", "b"]} for text in TEXTS])),
        ("videos2caption.json", json.dumps([{"caption": text, "prompt_embed_path": "0.pt"} for text in TEXTS])),
        ("p.jsonl", "\n".join(json.dumps({"text": text, "n": 1}, ensure_ascii=False) for text in TEXTS) + "\n\n"),
        ("p.ndjson", "\n".join(map(json.dumps, TEXTS))),
    ],
)
def test_tables_become_prompts(tmp_path, name, content):
    assert sources.read(write(tmp_path / name, content)) == TEXTS


def test_a_column_is_named(tmp_path):
    path = write(tmp_path / "p.csv", "prompt,caption\na,b\n")
    assert sources.read(path, "caption") == ["b"]
    path = write(tmp_path / "p.jsonl", '{"prompt": "a", "caption": null}\n{"caption": "b"}\n')
    assert sources.read(path, "caption") == ["b"]


def test_parquet(tmp_path):
    table = pyarrow.table({"image": [b"x"] * 4, "prompt": [*TEXTS, None]})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet", row_group_size=2)
    assert sources.read(tmp_path / "b.parquet") == TEXTS
    write(tmp_path / "a.txt", "first\n")
    assert sources.read(tmp_path / "*.*") == ["first", *TEXTS]


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    """The folder of the shipped pictures as a prepared data set."""
    builder = Emoji(data_dir=tmp_path_factory.mktemp("tfds"))
    builder.download_and_prepare(file_format="array_record")
    return builder.data_dir


def test_tensorflow_datasets(emoji):
    holdout = sources.read(f"tfds:{emoji}:holdout", "prompt")
    assert len(holdout) == 3 * 59 and holdout[0].split(". ")[0] in ("3D", "Flat", "Mono")
    assert len(sources.read(emoji, "caption")) == 3 * 182  # split train
    with pytest.raises(UserError, match="no split 'test'; write .*:SPLIT, there are .*holdout"):
        sources.read(f"tfds:{emoji}:test")
    with pytest.raises(UserError, match="name the column .* there are 'caption', 'id', 'prompt', 'style'"):
        sources.read(emoji)
    with pytest.raises(UserError, match="tfds:no_such_set cannot be opened"):
        sources.read("tfds:no_such_set")


# --- what is not ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("p.txt", "", None, "holds no prompt"),
        ("p.txt", " \n\n", None, "holds no prompt"),
        ("p.txt", b"a\nb\xff\nc", None, r"not UTF-8 \(line 2\)"),
        ("p.txt", "a\n", "prompt", "without columns"),
        ("p.csv", "", None, "there are none"),
        ("p.csv", "a,b\n1,2\n", "c", "no column 'c'; there are 'a', 'b'"),
        ("p.csv", "a,b\n1,2\n", None, "name the column of the prompts by --column=NAME .*; there are .a., .b."),
        ("p.csv", "prompt,caption\n1,2\n", None, "name the column"),
        ("p.csv", "prompt,b\nred, green,2\n", None, "line 2: 3 fields under 2 columns; put quotes"),
        ("p.csv", 'prompt,b\n"red,2\n', None, "line 2: unexpected end of data"),
        ("p.json", '{"prompt": "a"}', None, "holds dict; expected a list"),
        ("p.json", '{"prompt": "a"}\n{"prompt": "b"}', None, "named .jsonl"),
        ("p.json", '["a", 3]', None, "item 1: expected text, found 3"),
        ("p.json", '[{"a": "x", "b": 1}]', "prompt", "item 0 has no column 'prompt'; there are 'a', 'b'"),
        ("p.json", '["a"]', "prompt", "expected an object with 'prompt'"),
        ("p.jsonl", '{"prompt": "a"}\n{"caption": "b"', None, "line 2, is not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n{"caption": "b"}', None, "line 2 has no column 'prompt'; there are 'caption'"),
        ("p.parquet", "PAR1", None, "cannot be read as Parquet"),
    ],
)
def test_bad_files(tmp_path, name, content, column, message):
    with pytest.raises(UserError, match=message) as error:
        sources.read(write(tmp_path / name, content), column)
    assert "\n" not in str(error.value) and name in str(error.value)


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        sources.read(tmp_path / "none.csv")
    with pytest.raises(UserError, match="it is a folder; expected a file of prompts"):
        sources.read(tmp_path)
    with pytest.raises(UserError, match="matches no file"):
        sources.read(tmp_path / "*.parquet")


# --- filters ----------------------------------------------------------------------------------------------------------

PROMPTS = ["a cat", "dog", "a cat", "a very long cat indeed", "a CAT", "a bird"]


def test_filters_count_what_they_leave_out():
    chosen = filters.Filter(min_length=4, max_length=10, include="(?i)cat|bird", exclude="CAT", unique=True)
    places, counts = filters.select(PROMPTS, chosen)
    assert places == [0, 5]
    words = "1 shorter than 4, 1 longer than 10, 0 without /(?i)cat|bird/, 1 with /CAT/, 1 repeated"
    assert filters.describe(6, counts) == f"6 prompts; left out: {words}; 2 stay"


def test_no_filter_keeps_everything():
    places, counts = filters.select(PROMPTS, filters.Filter())
    assert places == list(range(6)) and filters.describe(6, counts) == "6 prompts"


def test_a_sample_is_random_in_order_and_the_same_again():
    texts = [str(i) for i in range(50)]
    first, again, other = (filters.select(texts, filters.Filter(sample=20, seed=seed))[0] for seed in (0, 0, 1))
    assert first == again == sorted(set(first)) and len(first) == 20 and first != other
    assert filters.select(texts, filters.Filter(sample=60))[0] == list(range(50))


def test_filters_that_are_wrong():
    with pytest.raises(UserError, match=r"'\(' is not a regular expression"):
        filters.select(PROMPTS, filters.Filter(include="("))
    with pytest.raises(UserError, match="no prompt is left: 6 prompts; left out: 6 shorter than 99; 0 stay"):
        filters.select(PROMPTS, filters.Filter(min_length=99))


def test_a_pipe_of_prompts_is_read(tmp_path):
    """As a shell's ``--prompts=<(...)``."""
    reading, writing = os.pipe()
    os.write(writing, b"a fox\na bear\n")
    os.close(writing)
    assert sources.read(f"/dev/fd/{reading}") == ["a fox", "a bear"]
    os.close(reading)


def test_parquet_of_categories(tmp_path):
    """pandas' categories are dictionaries of texts."""
    texts = pyarrow.array(["a", "b", None, "a"]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"a.b": texts, "id": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    assert sources.read(tmp_path / "a.parquet", "a.b") == ["a", "b", "a"]
