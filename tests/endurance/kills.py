"""Kills a training of two processes again and again, starts it again at once, and compares its end with a run that
nobody disturbed: the same metrics and weights, bit for bit.

    python tests/endurance/kills.py [--kills=10] [--load=0] [--seed=0] [--out=FOLDER]

The processes are those of a user: `python -m srpo_jax.main`, at the same coordinator's port every time. Either of them
gets SIGKILL, every fifth time SIGSTOP (and SIGKILL when the other one has ended), some updates after the start, in the
middle of whatever it does then. ``--load`` processes that do nothing but count keep the machine busy. A start that
fails without being struck is told with its last words and counts as a failure. Exit code: 0 if all went well, else 1.
"""

import argparse
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # the helpers
import recipes
from helpers import children
from helpers.runs import arrays, assert_same, numbers

from srpo_jax import pulse

BUSY = "while True: pass"
LEAST, MOST = 1, 5  # updates between a start and what happens to it
LIMIT = 240  # seconds in which a process has to end after the other one was struck, or to come to its updates


def start(recipe, workdir, port, logs):
    """Both processes; their words go to files."""
    words = [sys.executable, "-m", "srpo_jax.main", f"--config={recipe}", f"--workdir={workdir}", "--process-count=2"]
    words.append(f"--coordinator=127.0.0.1:{port}")
    return [
        subprocess.Popen([*words, f"--process-id={process}"], env=children.environment(), stdout=log, stderr=log)
        for process, log in enumerate(open(file, "wb") for file in logs)
    ]


def updates(log):
    """The updates that a start has reported."""
    return [int(step) for step in re.findall(r"^step (\d+)/", log.read_text(errors="replace"), re.M)]


def last(log):
    """The last words of a process."""
    return log.read_text(errors="replace").strip()[-1500:]


def strike(pair, logs, count, victim, number):
    """Waits for ``count`` updates and sends a signal; whether both went on until then, and the other one noticed."""
    began = time.monotonic()
    while len(updates(logs[0])) < count:
        codes = [child.poll() for child in pair]
        if any(code is not None for code in codes):
            for child in pair:
                try:
                    child.wait(LIMIT)
                except subprocess.TimeoutExpired:
                    child.kill()
            print(f"  failed by itself after {time.monotonic() - began:.0f} s: {[child.wait() for child in pair]}")
            for log in logs:
                print("   ", last(log).replace("\n", "\n    "))
            return False
        time.sleep(0.05)
    ready = time.monotonic() - began
    time.sleep(random.random())
    pair[victim].send_signal(number)
    struck = time.monotonic()
    try:
        code = pair[1 - victim].wait(LIMIT)
    except subprocess.TimeoutExpired:
        code = None
    seconds = time.monotonic() - struck
    for child in pair:
        child.kill()
        child.wait()
    good = code in (pulse.LOST, -signal.SIGABRT)
    name = signal.Signals(number).name
    print(
        f"  {count} updates after {ready:.0f} s; {name} to {victim}; the other: {code} after {seconds:.1f} s",
        flush=True,
    )
    if not good:
        print("   ", last(logs[1 - victim]).replace("\n", "\n    "))
    return good


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--load", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        out = (args.out or pathlib.Path(folder)).absolute()
        steps = MOST * args.kills + 2
        recipe = recipes.write(out, steps=steps, data__batch_size=2, checkpoint__every=2)
        logs = [out / "0.log", out / "1.log"]
        calm, struck, port, failures = out / "calm", out / "struck", children.free_port(), 0
        assert [child.wait() for child in start(recipe, calm, port, logs)] == [0, 0], [last(log) for log in logs]
        busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(args.load)]
        try:
            for kill in range(args.kills):
                print(f"start {kill + 1}", flush=True)
                pair = start(recipe, struck, port, logs)
                number = signal.SIGSTOP if kill % 5 == 4 else signal.SIGKILL
                failures += not strike(pair, logs, random.randint(LEAST, MOST), random.randrange(2), number)
            codes = [child.wait() for child in start(recipe, struck, port, logs)]
        finally:
            for child in busy:
                child.kill()
        if codes != [0, 0]:
            print(f"the last start failed: {codes}", *map(last, logs), sep="\n")
            sys.exit(1)
        assert numbers(struck) == numbers(calm)
        assert_same(arrays(struck, steps), arrays(calm, steps))
        print(f"{args.kills} times struck, {failures} failures; the end is that of a calm run, bit for bit")
        sys.exit(bool(failures))


if __name__ == "__main__":
    main()
