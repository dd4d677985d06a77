"""The page of a run: what the files of a workdir say, whatever they are like, and how it goes in a browser."""

import json
import time

import numpy as np
import pytest
from etils import epath
from helpers import browser
from helpers.pages import Checker
from PIL import Image

from srpo_jax import config, main, record, run_page, run_pictures, sampling, terminal
from srpo_jax.evaluation import history
from srpo_jax.evaluation.history import Entry, Figure

PROMPTS = ["a red cat", "<script>document.title = 'taken'</script> & a dog", "a red fox", "a red fox"]
STEPS = (0, 5, 10, 15)


def shade(step, number):
    return 10 * number + step


def entry(step, how="how", **changes):
    scores = {
        "hps": Figure(0.28 + step / 1000, 0.27 + step / 1000, 0.29 + step / 1000, 4),
        "pick": Figure(22 - step / 10, None, None, 4),
    }
    values = {"signals": {"saturation": 0.25}, "seconds": {"draw": 20.0}, "warnings": [], "best": 5}
    return Entry(step, how, scores, **(values | changes))


@pytest.fixture
def workdir(tmp_path):
    """A run that stands at update 15 of 20, its evaluations and what its recipe was."""
    path = epath.Path(tmp_path / "my <run>")
    values = config.default()
    values.steps, values.evaluate.every, values.evaluate.scores = 20, 5, ("pick=pickscore:p",)
    record.write(path, values, {}, recipe=record.Recipe("configs/r.py", config.flatten(config.default())))
    lines = []
    for step in range(1, 16):
        figures = {"denoise/reward": step / 10, "inversion/reward": -step / 10, "denoise/caption_reward": 0.5}
        lines.append({"step": step, "loss": 1.0, "grad_norm": 2.0, "step_seconds": 3.0, "skipped": step // 8} | figures)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in STEPS:
        for number in range(len(PROMPTS)):
            pixels = np.full((16, 24, 3), shade(step, number), np.uint8)
            sampling.save_image(Image.fromarray(pixels), history.picture(path, step, number))
        scores = {"scores": {"hps": [0.25 + step * number / 100 for number in range(len(PROMPTS))]}, "signals": {}}
        (history.picture(path, step, 0).parent / "scores.json").write_text(json.dumps(scores))
    (path / "evaluations" / "prompts.json").write_text(json.dumps(PROMPTS))
    warned = entry(15, warnings=["hps rose while pick fell"])
    history.write(path, [entry(0), entry(5), entry(10), warned])
    return path


def drawn(workdir, heard=(), ended=False):
    run_page.Page(workdir, heard).write(ended)
    return (workdir / "report.html").read_text()


# --- what it says -----------------------------------------------------------------------------------------------------


def test_it_says_where_the_run_stands_and_how_it_did(workdir):
    page = drawn(workdir)
    text = " ".join(" ".join(Checker(page).text).split())
    assert "srpo with hps: it stands at update 15 of 20" in text and "Run my <run>" in text
    # Five updates of 3 s and one evaluation of 20 s.
    assert "Time left 35 s of updates and 1 evaluation" in text
    assert "hps 0.28 → 0.295 before → update 15, 95 % 0.285 to 0.305" in text
    assert "pick 22 → 20.5 before → update 15, 95 % no interval" in text
    assert "Best update 5" in text
    assert "hps is what this run trained with" in text and "pick is what" not in text
    assert "HPS-v2.1 does not show what SRPO does" in text
    assert "it ended at update 15 of 20" in drawn(workdir, ended=True)


def test_every_curve_has_its_table(workdir):
    page = drawn(workdir)
    titles = ("hps of held-out prompts", "pick of held-out prompts", "Reward in training", "Saturation", "Loss")
    assert all(f"<h2>{title}</h2>" in page for title in titles)
    assert page.count("<svg") == page.count("<summary>Numbers of this chart</summary>") == 8
    assert '<th scope="row">10</th><td>0.29 (0.28 to 0.3)</td>' in page
    assert '<th scope="row">10</th><td>21</td>' in page  # no interval
    assert '<th scope="row">15</th><td>1.5</td><td>-1.5</td>' in page  # both branches
    assert page.count("stroke-opacity='0.3'") == len(STEPS)  # of hps alone


def test_a_long_runs_curves_are_short():
    points = [(step, float(step)) for step in range(1, 1001)]
    found = run_page.thinned(points, 9)
    assert len(found) == 112 <= run_page.POINTS and found[0] == (9, 5.0) and found[-1][0] == 1000
    assert run_page.thinned([], 0) == []


def test_what_differs_from_the_recipe_and_what_was_changed(workdir):
    change = {"time": "t", "after_update": 4, "key": "optim.clip_norm", "from": 0.1, "to": 0.2}
    (workdir / "changes.jsonl").write_text(json.dumps(change) + "\n")
    page = drawn(workdir)
    assert '<th scope="row">steps</th><td>19</td><td>20</td>' in page and "The recipe is configs/r.py." in page
    assert '<th scope="row">optim.clip_norm</th><td>4</td><td>0.1</td><td>0.2</td>' in page
    (workdir / "recipe.json").unlink()
    assert "What differs from the defaults" in drawn(workdir)


def test_the_recipe_is_what_its_file_says():
    task = main.parse(["--config=configs/emoji.py", "--workdir=w", "--config.steps=3"])
    assert task.recipe.file == "configs/emoji.py"
    assert (task.config.steps, task.recipe.values["steps"]) == (3, 16)


def test_evaluations_that_do_not_compare_are_left_out(workdir):
    history.write(workdir, [entry(0, "other"), entry(5), entry(10)])
    page = drawn(workdir)
    assert "1 earlier evaluations are left out" in page and '<th scope="row">0</th>' not in page
    assert "update 5 → update 10" in page


# --- warnings ---------------------------------------------------------------------------------------------------------


def test_warnings_of_all_starts_are_shown(workdir):
    with terminal.warnings() as heard:
        terminal.warn("a <b>disk</b> is full")
        page = run_page.Page(workdir, heard)
        page.write()
        page.write()
    terminal.warn("not of this run")
    text = drawn(workdir, ["another start", "hps rose while pick fell"])
    assert text.count("a &lt;b&gt;disk&lt;/b&gt; is full") == 1 and "another start" in text
    assert text.count("hps rose while pick fell") == 1  # of the evaluation and of the terminal
    assert "After update 15: hps rose" in text and "not of this run" not in text
    assert "1 in all, at last update 8." in text  # skipped


def test_whatever_hinders_the_page_is_a_warning(workdir, capsys):
    before = drawn(workdir)
    history.picture(workdir, 10, 1).write_bytes(b"no picture")
    assert drawn(workdir) == before
    assert "report.html was not drawn (UnidentifiedImageError:" in capsys.readouterr().err
    (workdir / "config.json").write_text("{")
    assert drawn(workdir) == before


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_pictures_are_of_each_prompt_at_every_moment(workdir):
    checker = Checker(drawn(workdir))
    assert [card["data-prompt"] for card in checker.cards] == PROMPTS[:3]  # the first of two of one prompt
    gains = [json.loads(card["data-numbers"])[0] for card in checker.cards]
    assert gains == pytest.approx([0, 0.15, 0.3])
    assert [image["alt"] for image in checker.images[:2]] == ["a red cat, before", "a red cat, update 5"]
    assert "evaluations/000005/0001.png" in checker.links
    assert all(image["src"].startswith("data:image/png") for image in checker.images)


def test_without_evaluations_sample_grids_are_cut(tmp_path):
    workdir = epath.Path(tmp_path)
    record.write(workdir, config.default(), {})
    images = np.arange(3, dtype=np.uint8)[:, None, None, None] + np.zeros((3, 8, 16, 3), np.uint8)
    for cell, image in zip(sampling.cut(np.asarray(sampling.grid(images)), 3), images, strict=True):
        np.testing.assert_array_equal(cell, image)
    for step in (0, 10):
        sampling.save_image(sampling.grid(images), workdir / "samples" / f"{step:06d}.png")
    assert "<article" not in drawn(workdir)  # nobody knows of what they are
    (workdir / "samples" / "prompts.json").write_text('["a", "b", "c"]')
    checker = Checker(drawn(workdir))
    assert [card["data-prompt"] for card in checker.cards] == ["a", "b", "c"]
    assert len({image["src"] for image in checker.images}) == 3 and len(checker.images) == 6


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 100, 1000])
def test_some_moments_stay_while_a_run_grows(count):
    steps = list(range(0, 5 * count, 5))
    found = run_pictures.spread(steps, [steps[count // 3]])
    assert len(found) <= run_pictures.MOMENTS and found == sorted(set(found))
    assert {steps[0], steps[-1], steps[count // 3]} <= set(found)
    assert len(found) >= min(count, 5)
    later = run_pictures.spread([*steps, 5 * count], [])
    assert len(set(run_pictures.spread(steps)[:-1]) & set(later)) >= len(later) // 2 - 1


# --- in a browser -----------------------------------------------------------------------------------------------------

IMAGES = "[...document.querySelectorAll('.browser img')].filter(image => image.checkVisibility())"
SEEN = f"""{IMAGES}.map(image => {{
  const canvas = document.createElement('canvas').getContext('2d'); canvas.drawImage(image, 0, 0);
  return canvas.getImageData(0, 0, 1, 1).data[0]; }})"""
LABEL = "document.querySelector('.moment input').getAttribute('aria-valuetext')"
UNNAMED = """[...document.querySelectorAll('input, select, button, img, svg, a')].filter(element =>
  element.checkVisibility() && !(element.alt || element.ariaLabel || element.textContent.trim()
  || element.querySelector('img[alt]')
  || [...(element.labels || [])].some(each => each.textContent.trim()))).length"""


def seen(page):
    """A pixel of each picture that is seen; those that come into view are loaded then."""
    while not page.run(f"{IMAGES}.every(image => image.complete && image.naturalWidth)"):
        time.sleep(0.02)
    return page.run(SEEN)


@pytest.mark.skipif(browser.CHROMIUM is None, reason="there is no Chromium here (Debian's package: chromium)")
def test_the_slider_and_the_filter_in_a_browser(workdir, tmp_path):
    drawn(workdir)
    with browser.started(tmp_path / "profile") as page:
        page.open((workdir / "report.html").as_uri())
        assert seen(page) == [shade(15, n) for n in range(3)] and page.run(LABEL) == "update 15"
        # By the keyboard alone.
        page.run("document.querySelector('.moment input').focus()")
        for moment, step in (("Home", 0), ("ArrowRight", 5)):
            page.press(moment)
            assert seen(page) == [shade(step, n) for n in range(3)]
            assert page.run(LABEL) == page.run("document.querySelector('.moment b').textContent")
        page.run("document.querySelector('.moment [type=checkbox]').click()")
        assert seen(page) == [shade(step, n) for n in range(3) for step in (0, 5)]
        page.run("document.querySelector('.moment [type=checkbox]').click()")
        page.run("const words = document.querySelector('[type=search]'); words.value = 'RED'; "
                 "words.dispatchEvent(new Event('input', {bubbles: true}))")  # fmt: skip
        assert seen(page) == [shade(5, n) for n in (0, 2)]
        page.press("End")
        assert seen(page) == [shade(15, n) for n in (0, 2)]
        for width in (390, 1280):
            for dark in (False, True):
                page.size(width, 800)
                page.dark(dark)
                assert page.run("document.documentElement.scrollWidth") <= width
                page.screenshot(tmp_path / f"{width}{'-dark' if dark else ''}.png")
        light, dark = (np.asarray(Image.open(tmp_path / f"390{kind}.png").convert("L")) for kind in ("", "-dark"))
        assert light.mean() > 200 and dark.mean() < 60
        assert page.run(UNNAMED) == 0
        levels = page.run("[...document.querySelectorAll('h1, h2, h3')].map(heading => Number(heading.tagName[1]))")
        assert levels[0] == 1 and all(later - level <= 1 for level, later in zip(levels, levels[1:], strict=False))
        assert page.run("document.title") == "Run my <run>"
        assert page.problems == []
