"""What could make an update faster, one change at a time: predictions, and ``benchmark`` in a process for each."""

import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from srpo_jax.costs.hardware import GIB


class Trial(NamedTuple):
    """One change.

    Attributes:
      group: what it belongs to.
      name: also of its files.
      prediction: what it should do, and why; written down before it was measured.
      words: added to benchmark's command line.
      xla: added to XLA_FLAGS.
      parts: which parts are measured.
      against: the trial it is compared with.
    """

    group: str
    name: str
    prediction: str
    words: tuple[str, ...] = ()
    xla: str = ""
    parts: str = ""
    against: str = "baseline"


TRANSFORMER = "rollout,transformer"
CUDNN = "--config.model.attention=cudnn"
# What all trials share unless they say otherwise: the last of two words for one key counts.
COMMON = (CUDNN, "--config.remat.autoencoder=full", "--config.remat.reward=full")

# The whole model, its update in two parts, as a recipe's batch passes in many.
FULL = ("--preset=full", *COMMON, "--config.optim.accumulation=2")
FEW_BITS = ("--config.optim.weights=bfloat16", "--config.optim.moments=float8")

TRIALS = (
    Trial("baseline", "baseline", "rollout at 60 % MFU, gradient at 55 %, autoencoder and reward 5 % of the update"),
    Trial("attention", "attention-xla", "rollout 1.4x slower: 24 heads' float32 logits, 0.6 GB a block, pass through "
          "memory three times", ("--config.model.attention=xla",), parts=TRANSFORMER),
    Trial("size", "1024-cudnn", "MFU 2 points higher than at 720: attention is 17 % of the FLOPs and cuDNN's is good",
          ("--config.data.height=1024", "--config.data.width=1024"), parts=TRANSFORMER),
    Trial("size", "1024-xla", "rollout 1.5x slower than cuDNN's: the logits grow with the square",
          ("--config.data.height=1024", "--config.data.width=1024", "--config.model.attention=xla"), parts=TRANSFORMER,
          against="1024-cudnn"),
    Trial("size", "512-cudnn", "MFU 5 points lower than at 720: 1536 tokens leave the small products bound by memory",
          ("--config.data.height=512", "--config.data.width=512"), parts=TRANSFORMER),
    Trial("remat", "remat-none", "gradient 1.3x faster (8 -> 6 forward passes' FLOPs), if 12 blocks' activations fit",
          ("--config.remat.transformer=none",), parts="transformer"),
    Trial("remat", "remat-dots", "gradient 1.2x faster: only attention and elementwise work again",
          ("--config.remat.transformer=dots",), parts="transformer"),
    Trial("remat", "remat-autoencoder-none", "autoencoder 1.15x faster, 6 GB more",
          ("--config.remat.autoencoder=none",), parts="autoencoder"),
    Trial("batch", "batch-2", "rollout and gradient a sample 1.05x faster: weights are read once for two",
          ("--device-batch=2",)),
    Trial("batch", "batch-4", "no more than batch-2", ("--device-batch=4",)),
    Trial("terms", "merge-terms", "gradient a sample 1.05x faster, as a batch of 2, for 1.5 GB of activations",
          ("--config.optim.merge_terms=true",)),
    Trial("terms", "accumulation-2", "the optimiser's share halves, all else as it is",
          ("--config.optim.accumulation=2",), parts="update,optimizer"),
    Trial("rollout", "rollout-int8", "rollout 1.3x faster: products are 61 % of its time and run 1.8 times as fast",
          ("--config.rollout.dtype=int8",), parts="rollout"),
    Trial("rollout", "rollout-float8", "rollout 1.4x faster: as int8, and half the bytes where sums are written",
          ("--config.rollout.dtype=float8",), parts="rollout"),
    Trial("rollout", "rollout-cache-3", "rollout 2.6x faster: 0.38 of the FLOPs, and as well used",
          ("--config.rollout.cache=3",), parts="rollout"),
    Trial("rollout", "rollout-cache-3-float8", "rollout 3.5x faster: both at once",
          ("--config.rollout.cache=3", "--config.rollout.dtype=float8"), parts="rollout"),
    Trial("unroll", "unroll-2", "no difference above 1 %: a block takes milliseconds, a loop's turn microseconds",
          ("--config.model.scan_unroll=2",), parts=TRANSFORMER),
    Trial("unroll", "unroll-4", "the same", ("--config.model.scan_unroll=4",), parts=TRANSFORMER),
    Trial("unroll", "rollout-unroll", "rollout 1.13x faster: 7.5 of the 21.5 GB that a step moves are copies of "
          "weights", ("--config.rollout.unroll=true",), parts="rollout"),
    Trial("unroll", "rollout-unroll-batch-4", "rollout 1.04x faster than batch-4's: the same copies beside four "
          "samples", ("--config.rollout.unroll=true", "--device-batch=4"), parts="rollout", against="batch-4"),
    Trial("unroll", "rollout-unroll-float8-batch-4", "rollout 1.5x faster than batch-4's: products in half the time",
          ("--config.rollout.unroll=true", "--config.rollout.dtype=float8", "--device-batch=4"), parts="rollout",
          against="batch-4"),
    Trial("flags", "latency-hiding", "one GPU: nothing to hide; several: gathers of the next block's weights overlap",
          xla="--xla_gpu_enable_latency_hiding_scheduler=true"),
    Trial("flags", "triton-gemm", "gradient 1.07x slower, the rollout the same; measured so on an H200",
          xla="--xla_gpu_enable_triton_gemm=true"),
    Trial("flags", "slices-in-place", "rollout 1.1x faster a batch of 1: layers' weights are not copied",
          xla="--xla_gpu_enable_dynamic_slice_fusion=true"),
    Trial("flags", "cublaslt", "within 2 %; bias and GELU may join the product", xla="--xla_gpu_enable_cublaslt=true"),
    Trial("flags", "no-command-buffer", "within 1 %: launches are hidden behind milliseconds of work",
          xla="--xla_gpu_enable_command_buffer="),
    Trial("flags", "autotune-4", "1 to 3 % faster, compiles longer", xla="--xla_gpu_autotune_level=4"),
    Trial("full", "full-few-bits", "114 GiB of an H200's 131; 2.4 s a sample, and 0.1 s of optimiser (it moves 200 GB)",
          (*FULL, *FEW_BITS, "--device-batch=2"), parts="update,optimizer", against="full-few-bits"),
    Trial("full", "full-offload", "93 GiB; 1 s an update longer: moments of 23 GiB come and go over PCIe",
          (*FULL, *FEW_BITS, "--device-batch=2", "--config.optim.offload=true"), parts="update",
          against="full-few-bits"),
    Trial("full", "lora", "28 GiB of an H100's 75; a tenth less time a sample than full-few-bits: no gradients of "
          "weights, 2 of 8 forward passes", (*FULL, "--config.lora.rank=16"), parts="update", against="full-few-bits"),
    Trial("full", "lora-int8", "18 GiB; within 5 % of lora: weights are read in half the bytes, and unpacked",
          (*FULL, "--config.lora.rank=16", "--config.lora.quantize=int8"), parts="update", against="lora"),
    Trial("full", "lora-nf4", "12 GiB; 10 % slower than lora: unpacking is by a table",
          (*FULL, "--config.lora.rank=16", "--config.lora.quantize=nf4"), parts="update", against="lora"),
)  # fmt: skip
GROUPS = tuple(dict.fromkeys(trial.group for trial in TRIALS))


def command_line(trial: Trial, out: pathlib.Path, shared: Sequence[str]) -> list[str]:
    """The command line of a trial."""
    words = [*shared, *trial.words, f"--json={out / trial.name}.json"]
    if trial.parts:
        words.append(f"--parts={trial.parts}")
    return [sys.executable, "-m", "srpo_jax.benchmark", *words]


def attempt(trial: Trial, out: pathlib.Path, shared: Sequence[str], minutes: float) -> dict:
    """Runs a trial unless its result is there. Returns benchmark's report, or ``{"failed": the last line it said}``."""
    result, log = out / f"{trial.name}.json", out / f"{trial.name}.log"
    if not result.exists():
        environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"} | os.environ  # JAX takes 75 % of a GPU by default
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {trial.xla}".strip()
        with log.open("w", encoding="utf-8") as file:
            try:
                subprocess.run(
                    command_line(trial, out, shared), env=environment, stdout=file, stderr=subprocess.STDOUT,
                    timeout=60 * minutes, check=True,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                return {"failed": f"not done in {minutes:g} minutes"}
            except subprocess.CalledProcessError as error:
                lines = [line.strip() for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
                return {"failed": lines[-1] if lines else f"exit code {error.returncode}"}
    return json.loads(result.read_text(encoding="utf-8"))


def table(trials: Sequence[Trial], results: dict[str, dict]) -> str:
    """Rows of markdown: a trial and a part each, with the ratio of the seconds a sample to the trial it changes."""
    rows = ["| trial | prediction | part | s a sample | MFU | temporaries, GiB | compile, s | times as fast |"]
    rows.append("|" + "---|" * 8)
    for trial in trials:
        found, other = results[trial.name], results.get(trial.against, {})
        if "failed" in found:
            rows.append(f"| {trial.name} | {trial.prediction} | failed: {_cell(found['failed'])} | | | | | |")
            continue
        for position, (name, part) in enumerate(found["parts"].items()):
            seconds = _per_sample(found, name)
            ratio = ""
            if trial.name != trial.against and name in other.get("parts", {}):
                ratio = f"{_per_sample(other, name) / seconds:.3f}"
            mfu = "" if part["mfu"] is None else f"{part['mfu']:.1%}"
            temporaries = part["memory"].get("temporaries", 0) / GIB
            first = (trial.name, trial.prediction) if not position else ("", "")
            rows.append(
                f"| {first[0]} | {first[1]} | {name} | {seconds:.4g} | {mfu} | {temporaries:.3g} | "
                f"{part['compile_seconds']:.1f} | {ratio} |"
            )
    return "\n".join(rows) + "\n"


def _per_sample(report: dict, part: str) -> float:
    return report["parts"][part]["seconds"] / report["config"]["data.batch_size"]


def _cell(text: str) -> str:
    return text.replace("|", "/")[:160]


def run(
    out: pathlib.Path,
    groups: Sequence[str],
    preset: str = "wide",
    device_batch: int = 1,
    runs: int = 3,
    minutes: float = 20.0,
) -> None:
    """Runs the trials of some groups, says how each went, and writes OUT/sweep.md and OUT/sweep.json after each.

    Args:
      out: folder, made if need be; a trial whose result lies there is not run again.
      groups: of ``GROUPS``.
      preset: of ``presets.PRESETS``.
      device_batch: samples a device takes at a time, where the trial does not set it.
      runs: timed calls of each program.
      minutes: a trial is given up after so many.
    """
    out.mkdir(parents=True, exist_ok=True)
    shared = [f"--preset={preset}", f"--device-batch={device_batch}", f"--runs={runs}"]
    shared += COMMON if preset != "small" else ()
    chosen = [trial for trial in TRIALS if trial.group in groups]
    results = {}
    for number, trial in enumerate(chosen, 1):
        started = time.monotonic()
        found = results[trial.name] = attempt(trial, out, shared, minutes)
        told = found.get("failed") or ", ".join(
            f"{name} {_per_sample(found, name):.4g} s a sample" for name in found["parts"]
        )
        print(f"{number}/{len(chosen)} {trial.name}, {time.monotonic() - started:.0f} s: {told}", flush=True)
        (out / "sweep.md").write_text(table(chosen[:number], results), encoding="utf-8")
        (out / "sweep.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
