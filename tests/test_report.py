"""The HTML report: well formed, self-contained, true to its numbers, and safe with any text."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from srpo_jax import report

VOID = {"meta", "img", "line", "circle", "polyline", "br"}


class Checker(HTMLParser):
    """Collects tags and the text of a page, and complains about unbalanced ones."""

    def __init__(self):
        super().__init__()
        self.open, self.images, self.links, self.text = [], [], [], []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [value for name, value in attributes.items() if name in ("src", "href", "xlink:href", "data")]
        if tag == "img":
            self.images.append(attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def example() -> report.Report:
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    pictures = (report.Shown(pixels, "judge: 3D"), report.Shown(255 - pixels))
    return report.Report(
        title="Aligned <b>& well</b>",
        lead="What was done.",
        verdicts=(
            report.Verdict("share", "81 %", "at least 80 %", True),
            report.Verdict("accuracy", "-5", "at most -3", False),
            report.Verdict("time", "7 min", "", None),
        ),
        galleries=(
            report.Gallery(
                "Held out", "Two seeds.", ("before", "after"), (report.Comparison("red 'apple'", (pictures, pictures)),)
            ),
            report.Gallery("All", "", ("before",), (report.Comparison("fox", (pictures,)),), folded=True),
        ),
        charts=(
            report.Chart(
                "Share", "Judged.", {"3D": [(0, 0.25), (20, 0.75)], "Flat": [(0, 0.5), (20, 0.25)]}, percent=True
            ),
        ),
        tables=(report.PageTable("Config", ("key", "value"), (("a.b", "<script>alert(1)</script>"),)),),
    )


def test_page_is_well_formed_and_loads_nothing():
    page = report.render(example())
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.links and all(link.startswith("data:image/png;base64,") for link in checker.links)
    assert "url(" not in page and "@import" not in page and "http" not in page
    assert "<script" not in page and "<b>" not in page
    assert "Aligned <b>& well</b>" in checker.text  # escaped in the source, whole for the reader
    assert page.count(">reached<") == 1 and page.count(">missed<") == 1


def test_pictures_survive_exactly():
    checker = Checker()
    checker.feed(report.render(example()))
    assert [image["alt"] for image in checker.images[:2]] == ["red 'apple', before"] * 2
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
        report.render(report.Report("t", "", (), (floats,), (), ()))
    with pytest.raises(ValueError, match="'p' has 0 columns for 1 stages"):
        report.render(
            report.Report("t", "", (), (report.Gallery("g", "", ("a",), (report.Comparison("p", ()),)),), (), ())
        )
    with pytest.raises(ValueError, match="chart 'c' has no finite point"):
        report.render(report.Report("t", "", (), (), (report.Chart("c", "", {"x": [(0, float("nan"))]}),), ()))
