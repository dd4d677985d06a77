"""The study: its plan is one that can be run, its cells are made once, its verdicts are those of the figures."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from srpo_jax import architectures, lock, report, train, validation
from srpo_jax.emoji import demo, recovery, study, study_page, study_plan, study_results, study_run, world
from srpo_jax.emoji.recovery import DIRECT_ALIGN, ONE_STEP, Recovered
from srpo_jax.emoji.study_plan import BIASED, HONEST, PRESETS, Case
from srpo_jax.emoji.study_run import Cell, Moment
from srpo_jax.errors import UserError

FULL = PRESETS["full"]


@pytest.fixture(scope="module")
def emoji_recipe(tmp_path_factory):
    """The recipe with paths of converted networks."""
    config = demo.load_recipe()
    demo.prepare(tmp_path_factory.mktemp("study"), config)
    return config


@pytest.fixture(scope="module", params=list(PRESETS))
def planned(request, emoji_recipe):
    """(preset, recipe, parts) of each preset."""
    preset = PRESETS[request.param]
    config = study_plan.changed(emoji_recipe, preset.changes)
    return preset, config, study_plan.parts(preset, config, architectures.read(config))


def named(parts, name):
    """The part of that name."""
    return next(part for part in parts if part.name == name)


def test_every_case_is_a_run_that_is_allowed(planned):
    _, config, parts = planned
    assert tuple(part.name for part in parts) == study_plan.PARTS
    for case in (case for part in parts for case in part.cases):
        own = study_plan.changed(config, case.changes)
        own.steps, own.checkpoint.every, own.sample.every = case.moments[-1], case.moments[0], 0
        validation.validate(own)


def test_a_folder_is_one_case_and_says_what_is_in_it(planned):
    cases = {}
    for case in (case for part in planned[2] for case in part.cases):
        assert cases.setdefault(case.folder, case) == case
    assert cases["words/3D"].changes == {}
    for part in planned[2]:
        for _, own in study_plan.by_reward(part):
            assert len({case.name for case in own}) == len(own)
    told = {(json.dumps(case.changes), case.reward, case.moments, case.rates, case.styles) for case in cases.values()}
    assert len(told) == len(cases)


def test_methods_cost_the_same(emoji_recipe):
    config = study_plan.changed(emoji_recipe, FULL.changes)
    architecture = architectures.read(config)
    methods = named(study_plan.parts(FULL, config, architecture), "methods")
    budget = FULL.updates * study_plan.flops(config, architecture)
    for case in methods.cases:
        one = study_plan.flops(study_plan.changed(config, case.changes), architecture)
        assert abs(case.moments[0] * one - budget) <= one / 2
        assert case.moments[-1] == FULL.longer * case.moments[0] and case.rates == FULL.rates
    assert {(case.reward, case.name) for case in methods.cases} == {
        (reward, name) for reward in (HONEST, BIASED) for name in FULL.methods
    }


# --- cells ------------------------------------------------------------------------------------------------------------


def moment(update: int, *, styled: float = 0.5, right: float = 1.0, chroma: float = 0.2, count: int = 12) -> Moment:
    """Of ``count`` pictures; numbers vary a little from picture to picture."""
    styles = [0 if index < styled * count else 1 for index in range(count)]
    noise = np.random.default_rng(update).normal(0, 0.005, count)
    found = [int(index < right * count) for index in range(count)]
    return Moment(update, styles, found, (chroma + noise).tolist(), [0.3] * count, [0.1] * count)


def test_the_learning_rate_is_the_one_that_serves_style_and_concept_best(tmp_path):
    workshop = object.__new__(study_run.Workshop)  # of which only files are asked
    workshop.out = tmp_path
    case = Case("methods/x", "x", {}, (3, 9), rates=(1e-5, 3e-5, 1e-4))
    for rate, styled, right in ((1e-5, 0.25, 1.0), (3e-5, 0.75, 0.9), (1e-4, 1.0, 0.25)):
        file = tmp_path / "cells" / "methods" / "x" / f"rate_{rate:g}.json"
        workshop._write(file, Cell(0, rate, 0.0, 1.0, 0, [moment(3, styled=styled, right=right)]))
    assert workshop._rate(case) == 3e-5


def test_a_damaged_cell_is_named(tmp_path):
    workshop = object.__new__(study_run.Workshop)
    workshop.out = tmp_path
    case = Case("guard/x", "x", {}, (3,))
    file = workshop.file(case, 1)
    assert workshop.read(case, 1) is None
    workshop._write(file, Cell(1, 1e-5, 0.5, 1.0, 0, [moment(3)]))
    assert workshop.read(case, 1).moments[0] == moment(3)
    whole = file.read_text()
    for content in (whole[:40], whole.replace('"seed": 1', '"seed": "1"'), whole.replace("update_seconds", "seconds_")):
        file.write_text(content)
        with pytest.raises(UserError, match=r"1\.json is no cell of a study; delete it"):
            workshop.read(case, 1)


# --- findings ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def findings(planned, tmp_path):
    """Made up: inversion guards, late steps hack, one step recovers worse at high noise only."""
    preset, config, parts = planned
    count = 4 * 3  # pictures
    cells = {}
    for case in (case for part in parts for case in part.cases):
        hacked = 0.2 if case.folder.startswith("guard/srpo_0") or case.folder == "guard/srpo_2.0" else 0.3
        if case.folder == "methods/biased/srpo":
            hacked = 0.2
        if case.folder.startswith("levels/"):
            hacked = 0.2 if case.folder.endswith("_40_49") else 0.3  # against what the paper says
        figures = {"chroma": hacked, "right": 0.0 if case.name == "srpo" else 1.0, "count": count}
        cells[case.folder] = [
            Cell(seed, 3e-5, 0.5, 9.0, 0, [moment(update, **figures) for update in case.moments])
            for seed in range(preset.seeds)
        ]
    noise = np.random.default_rng(0).uniform(0, 0.01, count)
    recovered = [
        Recovered(way, level, ((0.3 * level if way == ONE_STEP else 0.01) + noise).tolist(), [1] * count, [1] * count)
        for level in recovery.LEVELS
        for way in (ONE_STEP, DIRECT_ALIGN)
    ]
    concepts = world.split("holdout")[:4]
    return study_results.Findings(config, concepts, parts, moment(0, count=count), cells, recovered, tmp_path)


def test_claims_agree_where_the_figures_do(findings):
    rows = {row[0]: row for row in study_results.claim_table(findings).rows}
    guards = [row for text, row in rows.items() if text.startswith("the inversion branch")]
    assert guards and {row[-1] for row in guards} == {"agrees"}
    assert all(row[2].startswith("-0.100 [-0.1") for row in guards)
    (levels,) = (row for text, row in rows.items() if text.startswith("late steps"))
    assert levels[-1] == "disagrees"
    words = [row for text, row in rows.items() if text.startswith("words steer")]
    assert len(words) == 2 and {row[-1] for row in words} <= {"disagrees", "agrees", "no difference seen"}
    methods = [case for case in named(findings.parts, "methods").cases if case.name == "srpo"]
    times = methods[0].moments[-1] // methods[0].moments[0]  # 5 in full, 2 of the small preset
    (longer,) = (row for text, row in rows.items() if text.endswith(f"{times} times as long: srpo minus refl"))
    assert longer[-1] == "agrees" and -0.11 < float(longer[2].split()[0]) < -0.09
    kept = [row for text, row in rows.items() if text.startswith("a larger discount of the denoising branch")]
    assert len(kept) == 4 and all(row[2].startswith("1.000 [") and row[-1] == "agrees" for row in kept)
    recovered = [row for text, row in rows.items() if text.startswith("Direct-Align recovers")]
    assert len(recovered) == 3 and {row[-1] for row in recovered} == {"agrees"}


def test_rollouts_are_compared_with_the_recipe(findings):
    """Every source of images less the recipe's, pair by pair: here 12 pictures of which a case gets one less right."""
    part = named(findings.parts, "images")
    for case in part.cases[1:]:
        for cell in findings.cells[case.folder]:
            cell.moments[-1].right[0] = 1 - cell.moments[-1].right[0]
    title = f"{part.title}: differences"
    (table,) = (table for table in study_results.tables(findings) if table.title == title)
    assert [row[0] for row in table.rows] == [case.name for case in part.cases[1:]]
    for row in table.rows:
        assert row[1].startswith("0.0 % [") and row[3].startswith("0.000 [")
        assert row[2].startswith(("8.3 % [", "-8.3 % ["))
    alone = findings.cells | {part.cases[0].folder: []}
    tables = study_results.tables(dataclasses.replace(findings, cells=alone))
    assert title not in [table.title for table in tables]


def test_what_is_not_there_yet_is_left_out(findings):
    nothing = dataclasses.replace(findings, cells=dict.fromkeys(findings.cells, []), recovered=[])
    assert study_results.claim_table(nothing) is None and study_results.markdown(nothing) == ""
    assert "0 runs" in report.render(study_page.page(nothing))


def test_tables_and_page(findings):
    text = study_results.markdown(findings)
    parts = [part for part in findings.parts if part.name != "methods"]
    assert all(f"## {title}\n" in text for part in parts for title, _ in study_results.titled(part))
    assert all(f"| {case.name} |" in text for part in findings.parts for case in part.cases)
    for reward in (HONEST, BIASED):
        cases = [case for case in named(findings.parts, "methods").cases if case.reward == reward]
        for when in ("at equal compute", "longer"):
            title = f"Methods, {reward if reward == BIASED else 'honest'} reward, {when}"
            assert f"## {title}\n" in text
            (table,) = (table for table in study_results.tables(findings) if table.title == f"{title}: differences")
            assert [row[0] for row in table.rows] == [case.name for case in cases[1:]]
            expected = 0.1 if reward == BIASED else 0.0  # pictures vary by 0.005
            assert all(abs(float(row[3].split()[0]) - expected) < 0.01 for row in table.rows)
    assert "| 0.5 | one step | 0.15" in text
    page = report.render(study_page.page(findings))
    groups = -(-len(named(findings.parts, "methods").cases) // 2 // len(report.COLOURS))
    assert page.count("<svg") == 2 + 3 + 2 * 3 * (groups + 1) and "What the paper says" in page


def test_pictures_of_cases_of_one_name_are_those_of_their_own_reward(findings):
    """In ``methods`` both rewards have a case of every method."""
    colours = {"before.npy": 0, "methods/reward/srpo/0.npy": 80, "methods/biased/srpo/0.npy": 160}
    for name, colour in colours.items():
        file = findings.out / "cells" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, np.full((2, 4, 8, 8, 3), colour, np.uint8))
    found = {gallery.title: gallery for gallery in study_page.galleries(findings)}
    for word, colour in (("honest", 80), ("biased", 160)):
        gallery = found[f"Pictures: all methods at equal compute, {word} reward"]
        assert gallery.stages == ("before", "srpo")
        for compared in gallery.comparisons:
            assert [int(shown.pixels.max()) for (shown,) in compared.columns] == [0, colour]


# --- the command ------------------------------------------------------------------------------------------------------


def test_shrunk_study(tmp_path, monkeypatch, capsys):
    """From the shipped weights to the report, one run of one seed; then nothing is left to do."""
    real = study_plan.parts

    def few(*args):
        return tuple(
            dataclasses.replace(part, cases=part.cases[:1] if part.name == "guard" else ()) for part in real(*args)
        )

    monkeypatch.setattr(study_plan, "parts", few)
    command = [f"--out={tmp_path}", "--preset=small", "--only=recovery,guard", "--seeds=1"]
    study.main(command)
    assert "1/1 guard: SRPO, k = 2, seed 0: wanted " in capsys.readouterr().out
    cell = json.loads((tmp_path / "cells" / "guard" / "srpo_2.0" / "0.json").read_text())
    assert cell["seed"] == 0 and [one["update"] for one in cell["moments"]] == [1]
    assert {len(numbers) for numbers in list(cell["moments"][0].values())[1:]} == {3 * 2}
    before = json.loads((tmp_path / "cells" / "before.json").read_text())["moments"][0]
    assert np.mean(before["right"]) >= 0.6  # the shipped model draws what it is asked for
    assert not list((tmp_path / "runs").rglob("*.json"))  # checkpoints are gone
    found = recovery.read(tmp_path / "recovery.json")
    errors = {(one.way, one.level): np.mean(one.error) for one in found}
    assert errors[ONE_STEP, 0.9] > 2 * errors[DIRECT_ALIGN, 0.9]
    page, table = ((tmp_path / name).read_text() for name in ("report.html", "study.md"))
    assert "SRPO, k = 2" in page and "<img " in page and "| SRPO, k = 2 | 1 |" in table

    monkeypatch.setattr(train, "train", lambda *args: pytest.fail("it was done"))
    study.main(command)
    assert "1 of 1 runs are done" in capsys.readouterr().out
    assert (tmp_path / "study.md").read_text() == table
    with pytest.raises(UserError, match="has a study of another size"):
        study.main([f"--out={tmp_path}"])


def test_a_second_one_in_the_folder_is_refused(tmp_path):
    with lock.Lock(tmp_path) as held:
        held.acquire()
        with pytest.raises(UserError, match=r"is in use by process .*, or choose another --out"):
            study.main([f"--out={tmp_path}"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flag, message", [("--only=guard,colour", "--only=colour: must be of recovery"), ("--seeds=4", "must be at most 3")]
)
def test_bad_flags_are_refused(flag, message, tmp_path):
    with pytest.raises(UserError, match=message):
        study.main([f"--out={tmp_path}", flag])
    assert list(pathlib.Path(tmp_path).iterdir()) == []
