"""What people read of a plan: every figure of a report in its place."""

import dataclasses

from helpers import plans, tiny

from srpo_jax.costs import verdict


def test_a_plan_that_fits(tmp_path):
    candidate = plans.candidate(tmp_path, steps=19)
    text = verdict.describe(candidate, plans.report(candidate))
    assert text.splitlines() == [
        "h100:1, 32x48: 1 x H100 SXM, mesh data 1, fsdp 1, tensor 1",
        "  transformer   0.000339 billion parameters, 1 + 2 blocks, attention xla, remat none",
        "  batch         4, 2 at a time",
        "  memory of a device, GiB",
        "    arguments       3.25  (weights 1.00, optimizer 2.00, frozen 0.25, batch 0.00)",
        "    temporaries     3.00",
        "    code            0.06",
        "    planned         7.00",
        "    encoders        0.50  (text encoders, beside the update)",
        "    headroom       67.00  of 74.50",
        "  a save takes 5.0 GiB of each process's host (the copy 3.0, the writer 2.0), 3.0 of it pinned",
        "  TFLOP         6 of the model, 8 of the hardware, an update",
        "  all-gather              5.00 GB a device in 40 runs",
        "  seconds       1.25 at best (compute 1, memory 0.25, interconnect 0.5), 2 expected",
        # 6 TFLOP in 2 seconds, of 989 a second.
        "                19 updates in 0.633 minutes, MFU 0%",
        "  fits",
    ]
    candidate = candidate._replace(target=candidate.target._replace(chip=candidate.target.chip._replace(flops=10e12)))
    assert "MFU 30%" in verdict.describe(candidate, plans.report(candidate))


def test_a_plan_that_does_not_fit(tmp_path):
    candidate = plans.candidate(tmp_path, steps=19)
    sizes = candidate.architecture._replace(transformer=dataclasses.replace(tiny.FLUX, num_layers=3))
    report = plans.report(candidate) | {"compiled": False, "fits": False, "advice": ["--less"]}
    report["memory"] |= {"host": 2**30, "headroom": -(2**29)}
    lines = verdict.describe(candidate._replace(architecture=sizes), report).splitlines()
    assert "    on the host     1.00  (moments)" in lines and "    headroom       -0.50  of 74.50" in lines
    assert lines[-2:] == ["  does not fit; try", "    --less"]
    assert not any(line.startswith(("    temporaries", "  seconds")) for line in lines)


def test_a_table(tmp_path):
    report = plans.report(plans.candidate(tmp_path))
    rows = verdict.table([report, report | {"compiled": False, "fits": False}]).splitlines()
    assert rows[2] == "| h100:1 | 32x48 | 1, 1, 1 | 2 | 3.25 | 3.00 | 7.50 | 74.50 | 5 | 1.25 | 2 | fits |"
    assert rows[3] == "| h100:1 | 32x48 | 1, 1, 1 | 2 | 3.25 | - | 7.50 | 74.50 | - | - | - | does not fit |"
    assert len({row.count("|") for row in rows}) == 1
