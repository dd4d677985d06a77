"""The evaluations of a run, as its workdir keeps them."""

import json

import pytest

from srpo_jax.evaluation import history
from srpo_jax.evaluation.history import Entry, Figure


def entry(step: int, **scores: float) -> Entry:
    figures = {name: Figure(mean, mean - 1, None, 4) for name, mean in scores.items()}
    return Entry(step, "how", figures, {"saturation": 0.5}, {"draw": 1.5}, ["a warning"], None)


def test_what_is_written_is_read(tmp_path):
    entries = [entry(0, hps=0.25), entry(10, hps=0.5)]
    history.write(tmp_path, entries)
    assert history.read(tmp_path) == entries
    lines = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["scores"]["hps"] == {"mean": 0.5, "low": -0.5, "high": None, "n": 4}


def test_an_empty_workdir_has_none(tmp_path):
    assert history.read(tmp_path) == []
    assert history.prompts(tmp_path) == []


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 10, "sco',  # cut off
        "[1]",
        '{"step": 10}',
        '{"step": 0, "how": "", "scores": {}, "signals": {}, "seconds": {}, "warnings": [], "best": null}',  # again
        '{"step": 10, "how": "", "scores": {}, "signals": {"x": "y"}, "seconds": {}, "warnings": [], "best": null}',
        '{"step": 10, "how": "", "scores": {"hps": 1}, "signals": {}, "seconds": {}, "warnings": [], "best": null}',
    ],
)
def test_reading_ends_at_a_broken_line(tmp_path, line):
    history.write(tmp_path, [entry(0, hps=0.25)])
    with open(tmp_path / "evaluations.jsonl", "a") as file:
        file.write(line + "\n" + json.dumps({"step": 20}) + "\n")
    assert [found.step for found in history.read(tmp_path)] == [0]


def test_prompts_that_are_no_list_of_texts_are_none(tmp_path):
    (tmp_path / "evaluations").mkdir()
    for content, found in (('["a cat"]', ["a cat"]), ("{}", []), ("[1]", []), ('["a', [])):
        (tmp_path / "evaluations" / "prompts.json").write_text(content)
        assert history.prompts(tmp_path) == found
