"""Preflight's command line: what it reads, prints, writes and refuses."""

import json
import types

import pytest
from helpers import plans

from srpo_jax import errors, preflight
from srpo_jax.costs import plan, topologies

RECIPE = "--config=configs/flux_dev_hps.py"


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "--topology is missing"),
        (["--topology=v9:2x2"], "known are TPU slices"),
        (["--topology=v5e:2x2x2"], "a v5e slice has 2 axes, as v5e:2x2"),
        (["--topology=v5p:2x0x2"], "a v5p slice has 3 axes"),
        (["--topology=h100:12"], "give a number of GPUs up to 8"),
        (["--topology=h100:8", "--size=720"], "--size=720: write HEIGHTxWIDTH"),
        (["--topology=h100:8", "--size=720x0"], "config.data.width=0: must be at least 1"),
        (["--topology=h100:8", "--depth=3"], "--depth=3: give two numbers"),
        (["--topology=h100:8", "--config.rollout.stepz=3"], "do you mean config.rollout.steps"),
        (["--topology=h100:8", "now"], "'now' is not understood"),
    ],
)
def test_what_is_refused(words, message):
    with pytest.raises(errors.UserError, match=message):
        preflight.parse([RECIPE, *words])


def test_the_command(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit, match="0"):
        preflight.main(["--help"])
    shown = capsys.readouterr().out
    assert preflight.__doc__.strip() in shown and "--device-batch" in shown
    out = tmp_path / "new" / "fits.json"
    candidate = plans.candidate(tmp_path)
    report = plans.report(candidate)
    monkeypatch.setattr(topologies, "prepare", lambda: None)
    monkeypatch.setattr(preflight, "parse", lambda arguments: ([candidate, candidate], types.SimpleNamespace(json=out)))
    monkeypatch.setattr(plan, "check", lambda candidate: report)
    preflight.main()
    written = json.loads(out.read_text())
    assert [item["fits"] for item in written] == [True, True] and written[0]["memory"]["temporaries"] == 3 * 2**30
    assert "--config.model.attention=cudnn" in written[0]["advice"][0]
    said = capsys.readouterr().out
    assert said.count("\n| h100:1 |") == 2 and said.count("\n    --config.model.attention=cudnn") == 2
    report["fits"] = False
    with pytest.raises(SystemExit) as caught:
        preflight.main()
    assert caught.value.code == 2


def test_sizes_and_targets(monkeypatch):
    """Every size on every target, of the depth that was asked for."""
    asked = []
    monkeypatch.setattr(plan, "prepare", lambda *words: asked.append(words))
    words = ["--topology=v5e:2x2*2,h100:8", "--size=720x720,512x768", "--depth=2,3", "--device-batch=4"]
    preflight.parse([RECIPE, *words])
    assert [(target.name, config.data.height, config.data.width) for config, _, target, _ in asked] == [
        ("v5e:2x2*2", 720, 720), ("v5e:2x2*2", 512, 768), ("h100:8", 720, 720), ("h100:8", 512, 768),
    ]  # fmt: skip
    for _, architecture, _, each in asked:
        assert (architecture.transformer.num_layers, architecture.transformer.num_single_layers, each) == (2, 3, 4)
        assert architecture.text["text_encoder_2"].d_model == 4096
