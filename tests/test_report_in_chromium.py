"""The page as a browser has it: it pages, filters, sorts and shows the matrix, complains of nothing, fits a phone."""

import numpy as np
import pytest
from helpers import browser

from srpo_jax import report

pytestmark = pytest.mark.skipif(
    browser.CHROMIUM is None, reason="there is no Chromium here (Debian's package: chromium)"
)

PROMPTS = 30
SHOWN = "[...document.querySelectorAll('.browser h3')].filter(h => h.checkVisibility()).map(h => h.textContent)"
STATUS = "document.querySelector('[role=status]').textContent"


def example() -> report.Report:
    entries = []
    for number in range(PROMPTS):
        picture = report.Shown(np.full((8, 8, 3), 8 * number, np.uint8), text=f"hps {number}")
        columns = ((picture, picture), (picture, picture), (picture, picture))
        numbers = {"gain": -float(number)} if number else {}
        prompt = f"<script>document.title = 'taken'</script> {'red' if number % 3 == 0 else 'blue'} {number}"
        entries.append(report.Browsed(report.Comparison(prompt, columns), "odd" if number % 2 else "even", numbers))
    chart = report.Chart("Curve", "", {"hps": [(0, 1), (4, 2)]}, intervals={"hps": [(0, 2), (1, 3)]})
    return report.Report("The title", "", (
        report.Charts((chart,)),
        report.Browser("Pictures", "", ("before", "after", "a model of a very long name"), tuple(entries), ("gain",)),
        report.PageTable("Wide", tuple(f"column {n}" for n in range(30)), (tuple("1" * 12 for _ in range(30)),)),
    ))  # fmt: skip


def test_the_page_in_a_browser(tmp_path):
    (tmp_path / "report.html").write_text(report.render(example()), encoding="utf-8")
    with browser.started(tmp_path / "profile") as page:
        page.open((tmp_path / "report.html").as_uri())

        def choose(name, value):
            field = f"document.querySelector('.controls').elements[{name!r}]"
            page.run(f"{field}.value = {value!r}; {field}.dispatchEvent(new Event('input', {{bubbles: true}}))")

        numbers = lambda: [int(text.split()[-1]) for text in page.run(SHOWN)]  # noqa: E731
        assert numbers() == list(range(12)) and page.run(STATUS) == "page 1 of 3, 30 of 30 prompts"
        page.run("document.querySelector('[name=next]').click()")
        page.run("document.querySelector('[name=next]').click()")
        assert numbers() == list(range(24, 30)) and page.run("document.querySelector('[name=next]').disabled")
        # A filter leads back to the first page.
        choose("words", "RED")
        assert numbers() == list(range(0, 30, 3)) and page.run(STATUS) == "page 1 of 1, 10 of 30 prompts"
        choose("category", "odd")
        assert numbers() == [3, 9, 15, 21, 27]
        choose("order", "+0")
        assert numbers() == [27, 21, 15, 9, 3]
        choose("category", "")
        choose("order", "-0")
        assert numbers() == [*range(3, 30, 3), 0]  # what has no number comes last
        pictures = "[...document.querySelectorAll('.browser img')].filter(image => image.checkVisibility()).length"
        assert page.run(pictures) == 10 * 6
        choose("view", "1")
        assert page.run(pictures) == 10 * 2
        stages = "[...document.querySelectorAll('.browser .stage')].filter(stage => stage.checkVisibility())"
        assert page.run(f"new Set({stages}.map(stage => stage.firstChild.textContent)).size") == 1
        choose("view", "")
        for width in (390, 1280):
            page.size(width, 800)
            assert page.run("document.documentElement.scrollWidth") <= width
            page.screenshot(tmp_path / f"{width}.png")
        assert page.run("document.title") == "The title"
        assert page.problems == []
