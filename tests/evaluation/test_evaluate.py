"""The command, from tiny models to a page: what pictures depend on, what is made once, what goes on after a kill."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import optax
import pytest
from helpers import children
from PIL import Image

from srpo_jax import checkpoint, evaluate, generate, sharding
from srpo_jax.algorithm.step import TrainState
from srpo_jax.errors import UserError
from srpo_jax.evaluation import scoring, signals
from srpo_jax.evaluation.candidates import Item
from srpo_jax.weights import folder

SIZE = ["--height=32", "--width=32", "--steps=2", "--text-length=8"]


@pytest.fixture(scope="module")
def workdir(model, tmp_path_factory):
    """A run with two checkpoints that hold other weights each, the second with the pipeline's own as its average."""
    path = tmp_path_factory.mktemp("run")
    _, _, params = folder.load(model / "transformer", "flux")
    checkpoints = checkpoint.Checkpoints(path, keep=3)
    for step, factor in ((2, 1.05), (4, 1.1)):
        moved = jax.tree.map(lambda x, factor=factor: x * factor, params)
        state = TrainState(jax.device_put(np.int32(step)), moved, optax.sgd(1.0).init(params), params)
        checkpoints.save(step, state, {})
    checkpoints.close()
    return path


def words(models, out, *more, prompts="held_out.txt"):
    return [f"--out={out}", f"--prompts={models / prompts}", *SIZE, *more]


def lines(out):
    return [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]


def read(path):
    return np.asarray(Image.open(path), np.int32)


def test_models_are_compared_from_prompts_to_the_page(models, model, workdir, tmp_path, capsys):
    out = tmp_path / "out"
    evaluate.main(words(
        models, out, f"--model=base={model}", f"--checkpoint={workdir}@all", f"--score=hps:{models / 'hps'}",
        f"--score=second=clip:{models / 'clip'}", "--images=2", "--batch=4",
    ))  # fmt: skip
    found = lines(out)
    labels = ["base", f"{workdir.name}@2", f"{workdir.name}@4"]
    assert [line["model"] for line in found] == [label for label in labels for _ in range(6)]
    for line in found:
        assert read(out / line["file"]).shape == (32, 32, 3) and list(line["scores"]) == ["hps", "second"]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["comparisons"] == 4 and len(summary["rows"]) == 6
    by = {(row["model"], row["score"]): row for row in summary["rows"]}
    for label in labels:
        values = np.array([line["scores"]["hps"] for line in found if line["model"] == label])
        base = np.array([line["scores"]["hps"] for line in found if line["model"] == "base"])
        row = by[label, "hps"]
        assert row["mean"] == pytest.approx(values.mean(), rel=1e-6) and row["pictures"] == 6 and row["prompts"] == 3
        if label != "base":
            assert row["difference"] == pytest.approx((values - base).mean(), rel=1e-4)
            assert row["wins"] == pytest.approx(np.mean(values > base), rel=1e-6)
    assert "difference" not in by["base", "hps"]
    with open(out / "summary.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["verdict"] for row in table[:2]] == ["", ""] and float(table[2]["wins"]) == by[labels[1], "hps"]["wins"]
    page = (out / "report.html").read_text()
    assert page.count("<article ") == 3 and page.count("<img ") == 3 * 3 * 2 + 2 * 3  # browser, best and worst case
    assert page.count('class="chart"') == 2 and ".289 before and .289 after" in page
    printed = capsys.readouterr().out
    assert "note: HPS-v2.1 does not show what SRPO does" in printed and "seconds: read weights" in printed
    assert "4 comparisons are made here" in printed and "Checkpoints of one run are alike" in printed


def test_a_picture_depends_on_prompt_and_number_alone(models, model, tmp_path):
    """Not on batches, nor on the order of the prompts, nor on which others there are; and each number is another."""
    (tmp_path / "turned.txt").write_text("tall tower\nblack dog\n")
    cases = {"all": ("held_out.txt", 3), "same": (tmp_path / "turned.txt", 3), "one": (tmp_path / "turned.txt", 1)}
    for name, (prompts, batch) in cases.items():
        evaluate.main(words(models, tmp_path / name, f"--model=m={model}", "--images=2", f"--batch={batch}",
                            prompts=prompts))  # fmt: skip
    files = sorted(path.name for path in (tmp_path / "same/images/m").iterdir())
    assert len(files) == 4 and len(list((tmp_path / "all/images/m").iterdir())) == 6
    for name in files:
        whole, same, one = (read(tmp_path / case / "images/m" / name) for case in cases)
        np.testing.assert_array_equal(whole, same)
        assert np.abs(whole - one).max() <= 1  # another compiled program rounds in another way
    first, second = (read(tmp_path / "all/images/m" / Item("black dog", number).file) for number in range(2))
    assert np.abs(first - second).mean() > 1


def test_names_of_pictures():
    one = Item("a fox / \u2028 ÄÖ", 3)
    assert one.name.dtype == np.uint32 and one.name.shape == (3,) and one.name[2] == 3
    assert one.file.endswith("-3.png") and "/" not in one.file
    assert (Item("a", 0).name != Item("b", 0).name).any() and Item("a", 0).file != Item("a!", 0).file
    # The first 8 bytes of sha256("a") are ca978112 ca1bbdca.
    assert Item("a", 1).name.tolist() == [0xCA978112, 0xCA1BBDCA, 1]


def test_nothing_is_made_twice(models, model, workdir, tmp_path, monkeypatch):
    out, score = tmp_path / "out", f"--score=hps:{models / 'hps'}"
    evaluate.main(words(models, out, f"--model=m={model}", score, "--count=2"))
    before = (out / "scores.jsonl").read_bytes()
    drawn, real = [], generate.read_transformer
    monkeypatch.setattr(generate, "read_transformer", lambda *args: drawn.append(args[4]) or real(*args))
    # A score more, then a prompt and a model more: each adds its own lines behind those that are there.
    more = f"--score=second=clip:{models / 'clip'}"
    evaluate.main(words(models, out, f"--model=m={model}", score, more, "--count=2"))
    assert not drawn
    found = lines(out)
    assert (out / "scores.jsonl").read_bytes().startswith(before)
    assert [list(line["scores"]) for line in found] == [["hps"]] * 2 + [["second"]] * 2
    evaluate.main(words(models, out, f"--model=m={model}", f"--checkpoint=c={workdir}", score))
    assert len(drawn) == 2 and [line["model"] for line in lines(out)[4:]] == ["m", "c", "c", "c"]
    assert len(json.loads((out / "summary.json").read_text())["rows"]) == 2
    # What was cut off in the middle of a line is made again.
    whole = (out / "scores.jsonl").read_bytes()
    (out / "scores.jsonl").write_bytes(whole[:-20])
    evaluate.main(words(models, out, f"--model=m={model}", f"--checkpoint=c={workdir}", score))
    assert (out / "scores.jsonl").read_bytes() == whole and len(drawn) == 2


def test_goes_on_after_a_kill_to_the_same_bytes(models, model, tmp_path):
    (tmp_path / "prompts.txt").write_text("".join(f"red apple {number}\n" for number in range(400)))
    more = [f"--model=m={model}", f"--score=hps:{models / 'hps'}", "--batch=2"]

    def start(out, count):
        flags = words(models, out, *more, f"--count={count}", prompts=tmp_path / "prompts.txt")
        return subprocess.Popen(
            [sys.executable, "-m", "srpo_jax.evaluate", *flags], env=children.environment(), stdout=subprocess.DEVNULL
        )

    child, file = start(tmp_path / "killed", 400), tmp_path / "killed/scores.jsonl"
    deadline = time.monotonic() + 300
    while not file.exists() or file.read_bytes().count(b"\n") < 3:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    there = file.read_bytes()
    count = there.count(b"\n")
    assert count < 390 and not (tmp_path / "killed/report.html").exists()
    for out in ("killed", "whole"):
        assert start(tmp_path / out, count + 5).wait() == 0
    assert file.read_bytes() == (tmp_path / "whole/scores.jsonl").read_bytes()
    assert file.read_bytes().startswith(there[: there.rfind(b"\n") + 1])
    for name in ("summary.json", "summary.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_pictures_of_others_are_scored_under_their_captions(models, model, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    generator = np.random.default_rng(0)
    entries = []
    for number, (prompt, side) in enumerate(
        [("black dog", 32), ("white bird", 40), ("black dog", 32), ("no such", 32)]
    ):
        pixels = generator.integers(0, 256, (side, 32, 3), np.uint8)
        Image.fromarray(pixels).save(theirs / f"{number}.png")
        entries.append({"file_name": f"{number}.png", "prompt": prompt})
    (theirs / "metadata.jsonl").write_text("\n".join(map(json.dumps, entries)))
    score = f"--score=hps:{models / 'hps'}"
    evaluate.main([f"--out={tmp_path / 'alone'}", f"--pictures={theirs}", score, "--images=2"])
    alone = lines(tmp_path / "alone")
    assert [(line["prompt"], line["image"]) for line in alone] == [
        ("black dog", 0), ("black dog", 1), ("white bird", 0), ("no such", 0),
    ]  # fmt: skip
    # The scorer itself says the same of them, one by one.
    scorer = _judge(f"hps:{models / 'hps'}", 1)
    for line, number in zip(alone, (0, 2, 1, 3), strict=True):
        own = scorer(np.asarray(Image.open(theirs / f"{number}.png"))[None], [line["prompt"]])
        assert line["scores"]["hps"] == pytest.approx(float(own[0][0]), abs=1e-5)
    assert not (tmp_path / "alone/images").exists()
    # Beside a model, on prompts that both have.
    evaluate.main(words(models, tmp_path / "both", f"--model=m={model}", f"--pictures={theirs}", score))
    rows = json.loads((tmp_path / "both/summary.json").read_text())["rows"]
    assert [(row["model"], row["pictures"]) for row in rows] == [("m", 3), ("theirs", 2)]
    assert rows[1]["pairs"] == 2


def _judges(at_once):
    return scoring.Judges(sharding.make_mesh(types.SimpleNamespace(data=1, fsdp=-1, tensor=1)), at_once)


def _judge(text, at_once):
    return _judges(at_once).judge(scoring.parse([text], "--score")[0])


def test_sgp_hps_diversity_and_signs_of_collapse(models, tmp_path, capsys):
    """Of pictures that are there: nothing is drawn."""
    theirs, out, generator = tmp_path / "theirs", tmp_path / "out", np.random.default_rng(0)
    theirs.mkdir()
    pictures = generator.integers(0, 256, (4, 32, 32, 3), np.uint8)
    captions = ["black dog", "black dog", "white bird", "white bird"]
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        Image.fromarray(picture).save(theirs / f"{number}.png")
        (theirs / f"{number}.txt").write_text(caption)
    hps, clip = models / "hps", models / "clip"
    flags = [f"--pictures={theirs}", "--images=2", f"--score=sgp_hps:{hps}", f"--score=look=diversity:{clip}"]
    evaluate.main([f"--out={out}", *flags])
    first, last = lines(out)[:4], lines(out)[4:]
    judge = _judge(f"hps:{hps}", 4)
    d = judge(pictures, [f"Realistic photo {c}" for c in captions])[0].astype(np.float64)
    d -= judge(pictures, [f"CG Render {c}" for c in captions])[0]
    for name, expected in (("sgp_hps", d), ("sgp_hps_win", d > 0), ("sgp_hps_sigmoid", 1 / (1 + np.exp(-100 * d)))):
        np.testing.assert_allclose([line["scores"][name] for line in first], expected, atol=2e-4)
    # The number of a picture is that of its caption: two prompts, two pictures each, of unit features.
    seen = _judges(4).features(scoring.parse([f"diversity:{clip}"], "--score")[0])(pictures).reshape(2, 2, -1)
    of_prompts = np.array([line["scores"]["look"] for line in last]).reshape(2, 2).mean(1)
    np.testing.assert_allclose(of_prompts, signals.diversity(seen), atol=1e-5)
    assert [line["signals"] for line in first] == [signals.of_picture(picture) for picture in pictures]
    summary = json.loads((out / "summary.json").read_text())
    assert [row["score"] for row in summary["rows"]] == ["sgp_hps", "sgp_hps_win", "sgp_hps_sigmoid", "look"]
    means = {row["score"]: row["mean"] for row in summary["signals"]}
    assert means == {
        name: pytest.approx(np.mean([line["signals"][name] for line in first]), rel=1e-6)
        for name in signals.OF_PICTURES
    }
    assert "Signs of collapse" in (out / "report.html").read_text()
    assert "SGP-HPS as the paper prints it" in capsys.readouterr().out
    before = (out / "scores.jsonl").read_bytes()
    evaluate.main([f"--out={out}", *flags])
    assert (out / "scores.jsonl").read_bytes() == before
    # What an earlier version has written lacks the signals: they are added, and nothing else.
    old = [{key: value for key, value in line.items() if key != "signals"} for line in lines(out)]
    (out / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    evaluate.main([f"--out={out}", *flags])
    added = lines(out)[8:]
    assert [line["signals"] for line in added] == [line["signals"] for line in first]
    assert all(line["scores"] == {} for line in added)


def test_scores_are_on_the_scale_of_their_publications(models):
    """PickScore and CLIP are printed as exp(logit_scale) cos, not as the loss has them; HPS as the cosine."""
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    (plain,) = _judge(f"hps:{models / 'clip'}", 2)(images, ["black dog"] * 2)
    (published,) = _judge(f"pickscore:{models / 'clip'}", 2)(images, ["black dog"] * 2)
    _, _, params = folder.load(models / "clip", "clip")
    assert np.abs(plain).max() <= 1
    tokens = np.exp(np.float32(params["logit_scale"]))
    np.testing.assert_allclose(published, plain * tokens, rtol=1e-4)


def test_prompts_are_shown_as_text(models, model, tmp_path):
    (tmp_path / "p.csv").write_text('prompt,category\n<script>alert(1)</script>,"a ""b"" <i>"\n')
    evaluate.main(
        words(models, tmp_path / "out", f"--model=<b>={model}".replace("<b>", "b"), prompts=tmp_path / "p.csv")
    )
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("<script>") == 1 and "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "<i>" not in page


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "name what to evaluate"),
        (["--checkpoint={run}"], "name the pipeline that it was trained from before it"),
        (["--model={m}", "--checkpoint={run}@3"], "holds no checkpoint of step 3; there are 2, 4"),
        (["--model={m}", "--model={m}"], "are both called 'pipeline'; give one another name"),
        (["--model={m}", "--ema"], "--ema is of a --checkpoint"),
        (["--model={m}", "--checkpoint={run}", "--quantize=nf4"], "--quantize=nf4 is for the base of a LoRA run"),
        (["--model={m}", "--score={m}"], r"write \[NAME=\]KIND:PATH"),
        (["--model={m}", "--score=taste:x"], "'taste' is no kind of score; choose one of hps"),
        (["--model={m}", "--score=hps:{m}/vae"], "holds a autoencoder network; expected clip"),
        (["--model={m}", "--score=hps:{hps}", "--score=hps:{hps}"], "two scores have one name"),
        (["--model={m}", "--score=diversity:{hps}"], "compares the pictures of a prompt: give --images=2 or more"),
        (["--model={m}", "--step=best"], "--step is of a --checkpoint; give one"),
        (["--model={m}", "--checkpoint={run}@best"], "names no best update; set checkpoint.best"),
        (["--model={m}", "--checkpoint={run}", "--step=best"], "names no best update; set checkpoint.best"),
        (["--model={m}", "--height=40"], "--height=40: must be a positive multiple of 16"),
        (["--model={m}", "--writes=geneval", "--images=4"], "expected an object|is not JSON"),
        (["--model={m}", "--writes=dpg"], "--images=1: dpg judges 4 pictures of each prompt"),
        (["--model={m}", "--category=kind"], "without columns; leave out the column 'kind'"),
        (["--pictures={m}"], "holds no picture"),
    ],
)
def test_bad_input_leaves_nothing(models, model, workdir, tmp_path, flags, message):
    given = [flag.format(m=model, run=workdir, hps=models / "hps") for flag in flags]
    with pytest.raises(UserError, match=message) as error:
        evaluate.main([*words(models, tmp_path / "out"), *given])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_another_evaluation_in_the_folder_is_refused(models, model, workdir, tmp_path):
    out = tmp_path / "out"
    evaluate.main(words(models, out, f"--model=m={model}", "--count=1"))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for flags, message in (
        ([f"--model=m={model}", "--seed=1"], "holds pictures of --seed=0, not 1; choose another --out"),
        ([f"--model=x={model}", f"--checkpoint=m={workdir}"], "holds 'm' of .*with other weights or pictures"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.main(words(models, out, "--count=1", *flags))
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_the_average_of_a_checkpoint(models, model, workdir, tmp_path):
    for name, flags in (("plain", []), ("average", ["--ema"])):
        out = tmp_path / name
        evaluate.main(words(models, out, f"--model=m={model}", f"--checkpoint=c={workdir}@4", "--count=1", *flags))
    own, plain, average = (
        read(next((tmp_path / place).iterdir())) for place in ("plain/images/m", "plain/images/c", "average/images/c")
    )
    assert np.abs(own - plain).mean() > 0.1
    np.testing.assert_array_equal(own, average)
