"""The HTML report: well formed, self-contained, true to its numbers, and safe with any text."""

import base64
import hashlib
import io
import json
import re

import numpy as np
import pytest
from helpers.pages import Checker
from PIL import Image

from srpo_jax import report


def example() -> report.Report:
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    pictures = (report.Shown(pixels, "judge: 3D"), report.Shown(255 - pixels, text="0.25"))
    return report.Report(
        title="Aligned <b>& well</b>",
        lead="What was done.",
        parts=(
            report.Verdicts((
                report.Verdict("share", "81 %", "at least 80 %", True),
                report.Verdict("accuracy", "-5", "at most -3", False),
                report.Verdict("time", "7 min", "", None),
            )),
            report.Notes("Mind", ("This <i>misleads</i>.",)),
            report.Gallery(
                "Held out", "Two seeds.", ("before", "after"), (report.Comparison("red 'apple'", (pictures, pictures)),)
            ),
            report.Charts((
                report.Chart(
                    "Share", "Judged.", {"3D": [(0, 0.25), (20, 0.75)], "Flat": [(0, 0.5), (20, 0.25)]}, percent=True,
                    intervals={"3D": [(0.125, 0.5), (0.5, 0.75)]},
                ),
            )),
            report.Gallery("All", "", ("before",), (report.Comparison("fox", (pictures,)),), folded=True),
            report.PageTable("Config", ("key", "value"), (("a.b", "<script>alert(1)</script>"),)),
        ),
    )  # fmt: skip


def browser() -> report.Report:
    picture = (report.Shown(np.zeros((200, 100, 3), np.uint8), link="images/a.png"),)
    entries = (
        report.Browsed(report.Comparison('<script>alert("1")</script>', (picture,)), '"a" & b', {"gain": -0.5}),
        report.Browsed(report.Comparison("fox", (picture,)), "", {}),
    )
    return report.Report("t", "", (report.Browser("All", "", ("before",), entries, ("gain", "loss")),))


def test_page_is_well_formed_and_loads_nothing():
    page = report.render(example())
    checker = Checker(page)
    assert checker.links and all(link.startswith("data:image/png;base64,") for link in checker.links)
    assert "url(" not in page and "@import" not in page and "http:" not in page and "https:" not in page
    assert "default-src 'none'" in page
    assert "<script" not in page and "<b>" not in page and "<i>" not in page
    assert "Aligned <b>& well</b>" in checker.text  # escaped in the source, whole for the reader
    assert page.count(">reached<") == 1 and page.count(">missed<") == 1


def test_every_curve_has_a_table_and_its_intervals():
    page = report.render(example())
    text = " ".join(page.split())
    assert '<th scope="col">update</th><th scope="col">3D</th><th scope="col">Flat</th>' in text
    assert '<th scope="row">0</th><td>25 % (12.5 % to 50 %)</td><td>50 %</td>' in text
    assert '<th scope="row">20</th><td>75 % (50 % to 75 %)</td><td>25 %</td>' in text
    assert page.count("stroke-opacity='0.3'") == 2


def test_headings_lead_through_the_page():
    headings = re.findall(r"<h(\d)>", report.render(example()))
    assert headings[0] == "1" and set(headings[1:]) == {"2"}
    assert re.findall(r"<h(\d)>", report.render(browser())) == ["1", "2", "3", "3"]


def test_a_browser_is_whole_without_its_script_which_no_prompt_can_add_to():
    page = report.render(browser())
    checker = Checker(page)
    assert page.count("<script>") == 1  # ours
    script = re.search(r"<script>(.*)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert '<script>alert("1")</script>' in checker.text  # as its heading, for people
    assert [image["alt"] for image in checker.images] == ['<script>alert("1")</script>, before', "fox, before"]
    assert [card["data-category"] for card in checker.cards] == ['"a" & b', ""]
    assert [json.loads(card["data-numbers"]) for card in checker.cards] == [[-0.5, None], [None, None]]
    assert "images/a.png" in checker.links and "data:image/jpeg;base64," in page  # the whole one, and a small one


def test_pictures_survive_exactly():
    checker = Checker(report.render(example()))
    assert [image["alt"] for image in checker.images[:2]] == [f"red 'apple', before, image {i}" for i in (1, 2)]
    assert checker.images[0]["title"] == "judge: 3D"
    data = base64.b64decode(checker.images[0]["src"].split(",")[1])
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO(data))), np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    )


def test_curves_are_drawn_to_scale():
    page = report.render(example())
    lines = [
        [tuple(map(float, point.split(","))) for point in points.split()]
        for points in re.findall(r"points='([^']*)'", page)
    ]
    (left, low), (right, high) = lines[0]
    (_, middle), (_, low_again) = lines[1]
    assert (left, right) == (report.LEFT, report.WIDTH - report.RIGHT)
    assert low == low_again and high < middle < low
    assert (low - middle) / (low - high) == pytest.approx(0.5, abs=0.01)
    assert "3D, update 20: 75 %" in page


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (-3.2, 17.0), (0.101, 0.1012), (5.0, 5.0), (0.0, 0.0)])
def test_ticks_enclose_the_range_evenly(low, high):
    marks = report.ticks(low, high)
    assert marks[0] <= low + 1e-9 and marks[-1] >= high - 1e-9
    assert 2 <= len(marks) <= 8
    np.testing.assert_allclose(np.diff(marks), marks[1] - marks[0], rtol=1e-6)


def test_bad_material_is_refused():
    floats = report.Gallery("g", "", ("a",), (report.Comparison("p", ((report.Shown(np.zeros((4, 4, 3))),),)),))
    with pytest.raises(ValueError, match=r"must be \[H, W, 3\] uint8, not \[4, 4, 3\] float64"):
        report.render(report.Report("t", "", (floats,)))
    lacking = report.Comparison("p", ())
    for part in (
        report.Gallery("g", "", ("a",), (lacking,)),
        report.Browser("b", "", ("a",), (report.Browsed(lacking),)),
    ):
        with pytest.raises(ValueError, match="'p' has 0 columns for 1 stages"):
            report.render(report.Report("t", "", (part,)))
    with pytest.raises(ValueError, match="chart 'c' has no finite point"):
        report.render(report.Report("t", "", (report.Charts((report.Chart("c", "", {"x": [(0, float("nan"))]}),)),)))
