"""The drawing of preflight's reports: what is compared with what."""

from helpers.reports import BASE, REPORTS

from srpo_jax.costs import curves


def test_a_row_varies_one_thing():
    base = curves.point(BASE)
    assert base == curves.Point("TPU v5p", 1, 720, 57, 8)
    rows = {
        name: [(x, item["seconds"]["expected"]) for x, item in curves.select(REPORTS, base, name)]
        for name in curves.PANELS
    }
    assert rows == {
        "samples": [(1, 18.0), (2, 16.0)],
        "side": [(720, 18.0), (1024, 40.0)],
        "blocks": [(57, 18.0)],
        "devices": [(8, 18.0), (16, 9.0)],
    }
    pairs = curves.charts(REPORTS, base)
    assert [seconds.x_label for seconds, _ in pairs] == [curves.PANELS[name] for name in ("samples", "side", "devices")]
    seconds, memory = pairs[1]
    assert seconds.series["at best"] == [(720, 13.0), (1024, 20.0)] and seconds.limits == (0.0, 40.0)
    assert memory.series == {"needed": [(720, 34.0), (1024, 34.0)], "arguments": [(720, 16.0), (1024, 16.0)]}
