"""The prompts of an evaluation: our own list, categories as files have them, and no prompt twice."""

import collections

import pytest

from srpo_jax.errors import UserError
from srpo_jax.evaluation import prompts

CATEGORIES = ("people", "animals", "places", "objects", "text", "counts", "colours", "light", "styles")


def test_our_own_list():
    found = prompts.read()
    assert len(found) == len({prompt.text for prompt in found}) == 100
    counts = collections.Counter(prompt.category for prompt in found)
    assert set(counts) == set(CATEGORIES) and min(counts.values()) >= 10
    # Its head has one of each.
    assert [prompt.category for prompt in found[:9]] == list(CATEGORIES)
    assert prompts.read(count=9) == found[:9]


@pytest.mark.parametrize(
    ("name", "content", "options", "expected"),
    [
        ("p.csv", "prompt,category\na,x\n,y\nb,\na,z\n", {}, [("a", "x"), ("b", "")]),
        (
            "p.csv",
            "Prompts,Category\na,x\nb,y\n",
            {"column": "Prompts", "category": "Category"},
            [("a", "x"), ("b", "y")],
        ),
        ("p.jsonl", '{"tag": "counting", "prompt": "a"}\n', {"category": "tag"}, [("a", "counting")]),
        ("p.jsonl", '{"prompt": "a", "n": 1}\n{"prompt": "b", "n": 2}\n', {"category": "n"}, [("a", "1"), ("b", "2")]),
        ("p.txt", "a\nb\na\n", {}, [("a", ""), ("b", "")]),
        ("p.json", '["a", "b"]', {"count": 1}, [("a", "")]),
    ],
)
def test_categories(tmp_path, name, content, options, expected):
    (tmp_path / name).write_text(content)
    assert prompts.read(tmp_path / name, **options) == expected


def test_files_of_a_pattern_are_categories(tmp_path):
    for name in ("photo", "anime"):
        (tmp_path / f"{name}.json").write_text(f'["{name} a", "both"]')
    found = prompts.read(f"{tmp_path}/*.json")
    assert found == [("anime a", "anime"), ("both", "anime"), ("photo a", "photo")]


@pytest.mark.parametrize(
    ("name", "content", "category", "message"),
    [
        ("p.csv", "prompt\na\n", "kind", "has no column 'kind'"),
        ("p.txt", "a\n", "kind", "without columns"),
        ("p.csv", "one,two\na,b\n", None, "name the column of the prompts"),
        ("none.txt", None, None, "none.txt cannot be read"),
    ],
)
def test_what_is_wrong(tmp_path, name, content, category, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        prompts.read(tmp_path / name, category=category)
