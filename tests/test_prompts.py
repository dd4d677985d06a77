"""Prompt files and their stream."""

import json

import pytest

from srpo_jax.data import prompts
from srpo_jax.errors import UserError


def test_lines_become_prompts(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeff a fox \r\n\r\n  ein Bär\u2028und mehr\n狐\n".encode())
    assert prompts.read_prompts(path) == ["a fox", "ein Bär\u2028und mehr", "狐"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no prompt"), (b" \n\n", "holds no prompt"), (b"a\nb\xff\nc", r"not UTF-8 \(line 2\)")],
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "p.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        prompts.read_prompts(path)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        prompts.read_prompts(tmp_path / "none.txt")
    with pytest.raises(UserError, match="directory"):
        prompts.read_prompts(tmp_path)


def take(stream, count):
    return [next(stream) for _ in range(count)]


def test_every_prompt_once_a_round_in_changing_order():
    texts = [str(i) for i in range(10)]
    seen = sum(take(prompts.batches(texts, 4, seed=0), 5), [])
    assert sorted(seen[:10]) == sorted(seen[10:]) == sorted(texts)
    assert len({tuple(seen[:10]), tuple(seen[10:]), tuple(texts)}) == 3


def test_seed_decides_the_order():
    texts = [str(i) for i in range(10)]
    first, again, other = (take(prompts.batches(texts, 4, seed=seed), 3) for seed in (0, 0, 1))
    assert first == again != other


def test_position_survives_json():
    texts = [str(i) for i in range(7)]
    stream = prompts.batches(texts, 3, seed=0)
    take(stream, 4)
    position = json.loads(json.dumps(stream.get_state()))
    expected = take(stream, 6)
    other = prompts.batches(texts, 3, seed=0)
    other.set_state(position)
    assert take(other, 6) == expected


def test_processes_share_a_batch():
    texts = [str(i) for i in range(7)]
    whole = take(prompts.batches(texts, 4, seed=0), 5)
    first, second = (take(prompts.batches(texts, 4, 0, rows), 5) for rows in ([0, 2], [1, 3]))
    assert [[a, c, b, d] for (a, b), (c, d) in zip(first, second, strict=True)] == whole


def test_fewer_prompts_than_a_batch():
    assert take(prompts.batches(["a"], 3, seed=0), 2) == [["a"] * 3] * 2
