"""Trains a micro model for thousands of updates and looks whether memory, open files, threads and the time of an update
stay what they are.

    python tests/endurance/soak.py [--steps=2000] [--out=FOLDER]

The run is a user's, `python -m srpo_jax.main`, with a checkpoint every 50 updates and samples every 200. What its
process takes is read from Linux every second and compared, the second quarter of the updates with the last one. An
update's time is that of the processor, which other work on the machine does not change much. Exit code: 0 if all of it
is flat, else 1.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # the helpers
import recipes
from helpers import children

from srpo_jax import metrics

CHANGES = dict(checkpoint__every=50, sample__every=200, sample__count=2, optim__ema_decay=0.9)
# How much more the last quarter may take than the second one, as a factor.
LIMITS = {"memory": 1.03, "files": 1.0, "threads": 1.0, "seconds": 1.1}
TICKS = os.sysconf("SC_CLK_TCK")


class Sample(NamedTuple):
    """What a process takes after an update: bytes, open files, threads, and the processor's seconds until then."""

    step: int
    memory: int
    files: int
    threads: int
    seconds: float


def look(process: int, step: int) -> Sample:
    """Raises OSError if the process is gone."""
    folder = pathlib.Path("/proc", str(process))
    fields = (folder / "stat").read_text().rpartition(")")[2].split()
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    memory, files = 1024 * int(status["VmRSS"].split()[0]), len(list((folder / "fd").iterdir()))
    return Sample(step, memory, files, int(status["Threads"]), (int(fields[11]) + int(fields[12])) / TICKS)


def quarter(samples: list[Sample], steps: int, number: int) -> dict[str, float]:
    """Medians of a quarter of the updates, and the processor's seconds of an update in it."""
    here = [sample for sample in samples if number - 1 <= 4 * sample.step / steps < number]
    found = {name: statistics.median(getattr(sample, name) for sample in here) for name in Sample._fields[1:4]}
    return found | {"seconds": (here[-1].seconds - here[0].seconds) / (here[-1].step - here[0].step)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = (args.out or pathlib.Path(folder)).absolute()
        recipe = recipes.write(out, steps=args.steps, **CHANGES)
        words = [sys.executable, "-m", "srpo_jax.main", f"--config={recipe}", f"--workdir={out / 'run'}"]
        with open(out / "log", "wb") as log:
            child = subprocess.Popen(words, env=children.environment(), stdout=log, stderr=log)
        samples, shown = [], 0
        while child.poll() is None:
            time.sleep(1)
            records = metrics.read(out / "run")
            step = records[-1]["step"] if records else 0
            try:
                samples.append(look(child.pid, step))
            except (OSError, KeyError):  # it has just ended
                break
            if step >= shown + args.steps / 20:
                shown = step
                print(f"update {step}: {samples[-1].memory / 1e6:.0f} MB, {samples[-1].files} files", flush=True)
        if child.wait():
            sys.exit(f"the run failed: {(out / 'log').read_text()[-2000:]}")
        assert [record["step"] for record in metrics.read(out / "run")] == list(range(1, args.steps + 1))
        before, after = (quarter(samples, args.steps, number) for number in (2, 4))
    for name, limit in LIMITS.items():
        good = "flat" if after[name] <= limit * before[name] else "NOT FLAT"
        print(f"{name}: {before[name]:.6g} in the second quarter, {after[name]:.6g} in the last one: {good}")
    sys.exit(any(after[name] > limit * before[name] for name, limit in LIMITS.items()))


if __name__ == "__main__":
    main()
