"""The command that draws preflight's reports: an SVG that says what it compares, and what is refused."""

import json
import xml.etree.ElementTree

import pytest
from helpers.reports import REPORTS

from srpo_jax import errors, growth


def test_the_command(tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        growth.main(["--help"])
    shown = capsys.readouterr().out
    assert growth.__doc__.strip() in shown and "--reports" in shown
    for number, group in enumerate((REPORTS[4:], REPORTS[:4])):
        (tmp_path / f"{number}.json").write_text(json.dumps(group))
    out = tmp_path / "new" / "growth.svg"
    words = [f"--reports={tmp_path}/*.json", "--base=v5p:2x2x2,1024x1024,1", f"--out={out}"]
    with pytest.raises(errors.UserError, match="no two of them"):  # of 16 devices, nothing is like it
        growth.main([f"--reports={tmp_path}/0.json", f"--out={out}"])
    growth.main([*words])
    text = out.read_text()
    assert "57 blocks, 8 x TPU v5p, 1024 pixels, batch 32" in text
    tree = xml.etree.ElementTree.fromstring(text)
    circles = [node for node in tree.iter("{http://www.w3.org/2000/svg}circle")]
    assert len(circles) == 2 * 2 * 2  # one row of two charts, two lines of two points each


@pytest.mark.parametrize(
    "words, message",
    [
        (["--out=x.svg"], "--reports is missing"),
        (["--reports=none*.json", "--out=x.svg"], "there is no such file"),
        (["--reports=REAL"], "--out is missing"),
        (["--reports=REAL", "--out=x.svg", "--base=here"], "--base=here is none of v5p:2x2x2,720x720,1"),
        (["--reports=OTHER", "--out=x.svg"], "was not written by preflight's --json"),
        (["--colour=red"], "unrecognized flag --colour"),
        (["--reports=REAL", "--out=x.svg", "now"], "'now' is not understood"),
    ],
)
def test_what_is_refused(words, message, tmp_path):
    (tmp_path / "real.json").write_text(json.dumps(REPORTS))
    (tmp_path / "other.json").write_text("[{}]")
    words = [w.replace("REAL", f"{tmp_path}/real.json").replace("OTHER", f"{tmp_path}/other.json") for w in words]
    with pytest.raises(errors.UserError, match=message):
        growth.main([*words])
