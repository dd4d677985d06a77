"""Two processes with disks of their own evaluate together: the first writes, and knows alone what is there."""

import json
import sys

import numpy as np
from helpers import children
from PIL import Image

from srpo_jax import evaluate


def start_two(flags, outs):
    """Runs the command in two processes, each with a folder of its own; fails if one fails."""
    port = children.free_port()
    job = [f"--coordinator=127.0.0.1:{port}", "--process-count=2"]
    command = [sys.executable, "-m", "srpo_jax.evaluate", *flags, *job]
    told = children.together(
        [[*command, f"--process-id={process}", f"--out={out}"] for process, out in enumerate(outs)], timeout=400
    )
    assert [code for code, *_ in told] == [0, 0], told
    return [out for _, out, _ in told]


def lines(out):
    return [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]


def test_two_processes_as_one(models, model, tmp_path):
    flags = [
        f"--model=m={model}", f"--prompts={models / 'held_out.txt'}", f"--score=hps:{models / 'hps'}", "--height=32",
        "--width=32", "--steps=2", "--text-length=8",
    ]  # fmt: skip
    outs = tmp_path / "first", tmp_path / "second"
    told = start_two(flags, outs)
    assert "report.html" in told[0] and "report.html" not in told[1] and not outs[1].exists()
    evaluate.main([*flags, "--batch=2", f"--out={tmp_path / 'alone'}"])
    own, alone = lines(outs[0]), lines(tmp_path / "alone")
    assert [line["file"] for line in own] == [line["file"] for line in alone]
    for mine, theirs in zip(own, alone, strict=True):
        first, second = (np.asarray(Image.open(out / mine["file"]), np.int32) for out in (outs[0], tmp_path / "alone"))
        assert np.abs(first - second).max() <= 1
        np.testing.assert_allclose(mine["scores"]["hps"], theirs["scores"]["hps"], atol=2e-3)
    # Pictures that only the first process has get another score.
    start_two([*flags, f"--score=again=hps:{models / 'hps'}"], outs)
    more = lines(outs[0])[len(own) :]
    assert not outs[1].exists()
    for mine, again in zip(own, more, strict=True):
        np.testing.assert_allclose(again["scores"]["again"], mine["scores"]["hps"], atol=1e-6)
