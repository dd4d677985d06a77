"""Signals while the last checkpoint of a run is written."""

import json
import signal
import subprocess
import sys

import pytest
from helpers import children

from srpo_jax import checkpoint

# Sends itself so many signals when the arrays of the last checkpoint are written but not committed.
CHILD = """
import json, os, pathlib, signal, sys, time
import orbax.checkpoint as ocp
from helpers import tiny
from srpo_jax import errors, main

path, workdir, changes, count = sys.argv[1:]
finalize = ocp.StandardCheckpointHandler.finalize


def strike_and_finalize(self, directory):
    if directory.name.startswith("params"):
        for _ in range(int(count)):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    finalize(self, directory)


ocp.StandardCheckpointHandler.finalize = strike_and_finalize
main.parse = lambda argv: main.Command(tiny.config(pathlib.Path(path), **json.loads(changes)), workdir)
sys.exit(errors.run(main.main))
"""


@pytest.mark.parametrize(("count", "code", "kept"), [(1, 0, [1]), (2, -signal.SIGTERM, [])])
def test_one_signal_does_not_cut_it_off_and_a_second_acts_at_once(models, compiled, tmp_path, count, code, kept):
    changes = dict(steps=1, compilation_cache=compiled)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, models, tmp_path / "run", json.dumps(changes), str(count)],
        env=children.environment(JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0"),
        capture_output=True,
        text=True,
    )
    assert child.returncode == code, child.stderr
    assert checkpoint.steps(tmp_path / "run") == kept
