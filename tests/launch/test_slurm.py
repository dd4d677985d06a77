"""SLURM: the batch script, and what it does with stand-ins for sbatch and srun."""

import re

import pytest
from helpers.launching import AWKWARD, CONFIG, launch, write_program

SLURM = ("--nodes=4", "--gpus=h100:8", "--time=24:00:00", CONFIG, "--workdir=my runs")


def test_slurm_batch_script():
    text = launch("slurm.sh", *SLURM, "--sbatch-flags=--partition=gpu --mem=0", "--dry-run", "--", "--config.steps=3")
    first, script = text.split("\n", 1)
    assert first == "sbatch --partition=gpu --mem=0 <<'SCRIPT'" and script.endswith("\nSCRIPT\n")
    options = re.findall(r"^#SBATCH (\S+)$", script, re.M)
    assert options == ["--job-name=srpo", "--nodes=4", "--gres=gpu:h100:8", "--ntasks-per-node=8", "--cpus-per-task=8",
                       "--time=24:00:00", "--signal=TERM@600", "--requeue", "--open-mode=append",
                       "--output=./%x-%j.log"]  # fmt: skip
    assert f"-u -m srpo_jax.main {CONFIG} --workdir='my runs' --config.steps=3" in script


@pytest.mark.parametrize("code, requeued", [(0, False), (1, False), (143, True)])
def test_slurm_requeues_what_was_saved(tmp_path, code, requeued):
    # sbatch runs the batch script at once; srun runs one process.
    write_program(tmp_path / "bin/sbatch", "#!/bin/sh\nSLURM_JOB_ID=7 exec bash\n")
    write_program(tmp_path / "bin/srun", '#!/bin/sh\nshift 2\nexec "$@"\n')
    write_program(tmp_path / "bin/scontrol", f'#!/bin/sh\necho "$@" >{tmp_path}/requeued\n')
    write_program(tmp_path / "bin/python", f'#!/bin/sh\nprintf "%s\\n" "$@" >{tmp_path}/words\nexit {code}\n')
    flags = (*SLURM, f"--python={tmp_path}/bin/python", f"--logs={tmp_path}")
    launch("slurm.sh", *flags, "--", *AWKWARD, code=code, PATH=f"{tmp_path}/bin:/usr/bin:/bin")
    words = (tmp_path / "words").read_text().splitlines()
    assert words == ["-u", "-m", "srpo_jax.main", CONFIG, "--workdir=my runs", *AWKWARD]
    told = tmp_path / "requeued"
    assert (told.read_text() if told.exists() else None) == ("requeue 7\n" if requeued else None)


def test_slurm_checks_what_the_job_would_miss(tmp_path):
    write_program(tmp_path / "bin/sbatch", "#!/bin/sh\nexit 0\n")
    path = f"{tmp_path}/bin:/usr/bin:/bin"
    assert "is not a folder; make it" in launch("slurm.sh", *SLURM, "--python=/bin/sh", "--logs=no", code=1, PATH=path)
    assert "there is no /no/python; use launch/local.sh" in launch(
        "slurm.sh", *SLURM, "--python=/no/python", code=1, PATH=path
    )
