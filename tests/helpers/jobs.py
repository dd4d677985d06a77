"""Trainings in processes of their own, which things happen to."""

import json
import subprocess
import sys

from helpers import children

# What happens to a process by its own hand: {"step": 2, "process": 1, "where": "update" | "save", "signal": 9}.
ONE_OF_TWO = """
import json, os, pathlib, sys
import orbax.checkpoint as ocp
from helpers import tiny
from srpo_jax import conditions, errors, main, metrics

path, workdir, changes, event, coordinator, process = sys.argv[1:]
event, process = json.loads(event), int(process)
write, batch, finalize = metrics.Metrics.write, conditions.Conditioner.batch, ocp.StandardCheckpointHandler.finalize


def strike(where, step):
    if event and (event["process"], event["where"], event["step"]) == (process, where, step):
        os.kill(os.getpid(), event["signal"])


def write_and_strike(self, step, values):
    write(self, step, values)
    strike("update", step)


def tell_batch(self, examples, step):
    print(json.dumps([step, examples.prompts]), flush=True)
    return batch(self, examples, step)


def finalize_and_strike(self, directory):  # process 0 does it when all have written their arrays
    strike("save", int(directory.parent.name.split(".")[0]))
    finalize(self, directory)


metrics.Metrics.write, conditions.Conditioner.batch = write_and_strike, tell_batch
ocp.StandardCheckpointHandler.finalize = finalize_and_strike
config = tiny.config(pathlib.Path(path), **json.loads(changes))
main.parse = lambda argv: main.Command(config, workdir, coordinator, process, 2)
sys.exit(errors.run(main.main))
"""


def start_two(models, workdir, changes, event=None, before=""):
    """[(exit code, stdout, stderr)] of both processes of a training; fails if one does not end.

    They run the code ``before`` first."""
    words = [models, workdir, json.dumps(changes), json.dumps(event), f"127.0.0.1:{children.free_port()}"]
    pair = [[sys.executable, "-c", before + ONE_OF_TWO, *words, process] for process in (0, 1)]
    return children.together(pair, timeout=150)


ALONE = """
import json, os, pathlib, signal, sys
from helpers import tiny
from srpo_jax import errors, main, metrics

path, workdir, changes = sys.argv[1:]
write = metrics.Metrics.write


def write_and_kill(self, step, values):
    write(self, step, values)
    if step == 3:
        os.kill(os.getpid(), signal.SIGTERM)  # in the middle of the run, at a certain moment


metrics.Metrics.write = write_and_kill
main.parse = lambda argv: main.Command(tiny.config(pathlib.Path(path), **json.loads(changes)), workdir)
sys.exit(errors.run(main.main))
"""


def stop_after_three(models, workdir, changes, before=""):
    """A training by one process that gets SIGTERM after update 3, as a ``CompletedProcess``. It runs ``before``
    first."""
    words = [sys.executable, "-c", before + ALONE, models, workdir, json.dumps(changes)]
    return subprocess.run(words, env=children.environment(), capture_output=True, text=True)
