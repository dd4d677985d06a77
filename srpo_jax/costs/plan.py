"""What a recipe takes on devices that need not be there: the update, compiled ahead of time and read.

Memory is the compiler's plan, arithmetic is counted from sizes (``work``), collectives and what passes through a
device's memory are read from the program (``hlo``, ``traffic``), and time is a roofline (``roofline``).
"""

import dataclasses
import re
import time
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from srpo_jax import checkpoint, program, sharding
from srpo_jax import config as config_lib
from srpo_jax.architectures import Architecture
from srpo_jax.costs import hlo, host_memory, keeping, roofline, topologies, traffic, work
from srpo_jax.costs.hardware import GIB
from srpo_jax.costs.topologies import Target
from srpo_jax.errors import UserError
from srpo_jax.program import Program


class Candidate(NamedTuple):
    """A recipe on a target, and all that a run builds before its first update.

    Attributes:
      config: validated; of "auto", what it stands for on the target.
      architecture: sizes.
      target: the devices.
      built: the update.
      encoders: the parameters of the text encoders by folder, ``ShapeDtypeStruct`` with shardings; empty where the run
        needs none.
    """

    config: ConfigDict
    architecture: Architecture
    target: Target
    built: Program
    encoders: dict[str, Any]

    @property
    def name(self) -> str:
        """For a reader."""
        return f"{self.target.name}, {self.config.data.height}x{self.config.data.width}"


def prepare(
    config: ConfigDict, architecture: Architecture, target: Target, device_batch: int | None = None
) -> Candidate:
    """Builds the update for a target. Raises UserError for what does not fit together; nothing is compiled yet."""
    if config.optim.offload and target.platform == "gpu":
        raise UserError(
            f"--topology={target.name}: GPUs that are not there have no host, whose memory config.optim.offload=True "
            "needs; plan without it, less the bytes of the optimizer"
        )
    mesh = sharding.make_mesh(config.mesh, topologies.devices(target))
    config = config.copy_and_resolve_references()
    config.model.attention = program.attention_of(config, mesh)
    for part in ("autoencoder", "reward"):
        config.remat[part] = program.remat_of(config, part, mesh)
    if device_batch is not None:
        at_once = device_batch * sharding.batch_parts(mesh)
        if config.data.batch_size % at_once:
            raise UserError(
                f"--device-batch={device_batch}: {target.name} takes {at_once} samples at a time, which do not divide "
                f"config.data.batch_size={config.data.batch_size}; with config.mesh.tensor=N, N devices share a sample"
            )
        config.optim.accumulation = config.data.batch_size // at_once
    built = program.build(config, mesh, architecture)
    return Candidate(config, architecture, target, built, keeping.encoders(config, architecture, built))


def settle(candidate: Candidate) -> tuple[Candidate, dict[str, Any]]:
    """As ``check``, with the candidate that was checked: of ``remat.transformer=auto``, one that keeps as much as
    fits."""
    plain = check(candidate)
    if candidate.config.remat.transformer != "auto":
        return candidate, plain
    architecture, mesh = candidate.architecture, candidate.built.mesh
    for config in keeping.options(candidate.config, architecture, mesh, plain["memory"]["headroom"]):
        chosen = candidate._replace(config=config, built=program.build(config, mesh, architecture))
        report = check(chosen)
        if report["fits"]:
            return chosen, report
    config = candidate.config.copy_and_resolve_references()
    config.remat.transformer = "full"  # what was checked
    return candidate._replace(config=config), plain | {"config": config_lib.flatten(config)}


def check(candidate: Candidate) -> dict[str, Any]:
    """Compiles the update and returns all there is to know, for JSON; see ``verdict.describe`` for its meaning."""
    config, target, built = candidate.config, candidate.target, candidate.built
    devices = list(built.mesh.devices.flat)
    parts = work.update(config, candidate.architecture)
    started = time.perf_counter()
    try:
        compiled, refused = built.lower().compile(), None
    except jax.errors.JaxRuntimeError as error:
        compiled, refused = None, _refused(f"{error}")
        if refused is None:
            raise
    except RuntimeError as error:  # of jax.nn, where the backend "cudnn" finds no library
        raise UserError(f"{target.name}: {error} {topologies.INSTALL[target.platform]}") from error
    seconds = time.perf_counter() - started
    memory = _memory(candidate, compiled, refused)
    found, moved = hlo.Collectives((), ()), traffic.Traffic(0.0, 0.0)
    if compiled is not None:
        text = compiled.as_text()
        found, moved = hlo.collectives(text, len(devices)), traffic.of(text)
    places = [topologies.place(target, device) for device in devices] if found.found else []
    away = roofline.shard_bytes(built.state.opt_state, host=True)
    time_of = roofline.estimate(parts, moved, away, found.found, target, places)
    return {
        "topology": target.name,
        "device": target.chip.name,
        "devices": len(devices),
        "mesh": dict(built.mesh.shape),
        "jax": jax.__version__,
        "config": config_lib.flatten(config),
        "architecture": dataclasses.asdict(candidate.architecture.transformer),
        "blocks": list(candidate.architecture.family.blocks(candidate.architecture.transformer)),
        "compile_seconds": seconds,
        "compiled": compiled is not None,
        "memory": memory,
        "host_memory": _save(candidate)._asdict(),
        "model_flops": {name: part.model for name, part in parts.items()},
        "hardware_flops": {name: part.hardware for name, part in parts.items()},
        "traffic": moved._asdict(),
        "collectives": _traffic(found.found, target, places),
        "loops_of_unknown_length": list(found.unknown),
        "seconds": {
            **time_of._asdict(),
            "best": time_of.best,
            "expected": time_of.expected,
            "bound": time_of.bound,
        },
        "fits": compiled is not None and memory["headroom"] >= 0,
    }


def _refused(message: str) -> tuple[str, float] | None:
    """What libtpu says of a program that does not fit: ("planned" or "temporaries", their bytes); None of another."""
    unit = {"K": 2.0**10, "M": 2.0**20, "G": GIB, "T": 2.0**40}
    for what, pattern in (
        ("planned", r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm"),
        ("temporaries", r"required for HLO temporaries \(([\d.]+)([KMGT])\)"),
    ):
        if match := re.search(pattern, message):
            return what, float(match[1]) * unit[match[2]]
    return None


def _memory(candidate: Candidate, compiled: Any, refused: tuple[str, float] | None) -> dict[str, Any]:
    """Bytes on a device: the arguments by what they are, the compiler's plan, and what is left."""
    state, built = candidate.built.state, candidate.built
    online = candidate.config.data.encode == "online"
    memory = {
        "arguments": {
            "weights": roofline.shard_bytes(state.params),
            "optimizer": roofline.shard_bytes(state.opt_state),
            "ema": roofline.shard_bytes(state.ema),
            "base": roofline.shard_bytes(built.frozen.base),
            "frozen": roofline.shard_bytes(built.frozen._replace(base=None)),
            "batch": roofline.shard_bytes((built.batch, state.rollout, state.step)),
        },
        # With stored prompts they make room before the first update.
        "text_encoders": roofline.shard_bytes(candidate.encoders) if online else 0,
        "host": roofline.shard_bytes(state.opt_state, host=True),
        "capacity": candidate.target.memory,
    }
    if compiled is None:
        what, size = refused
        memory["planned"] = size + (sum(memory["arguments"].values()) if what == "temporaries" else 0)
    else:
        plan = compiled.memory_analysis()
        memory["temporaries"] = plan.temp_size_in_bytes
        memory["code"] = plan.generated_code_size_in_bytes
        memory["compiler_peak"] = plan.peak_memory_in_bytes
        memory["compiler_arguments"] = plan.argument_size_in_bytes
        memory["planned"] = keeping.planned(compiled, sum(memory["arguments"].values()))
    memory["needed"] = memory["planned"] + memory["text_encoders"]
    memory["headroom"] = memory["capacity"] - memory["needed"]
    return memory


def _save(candidate: Candidate) -> host_memory.HostMemory:
    """What a checkpoint takes of each host."""
    state, target = candidate.built.state, candidate.target
    return host_memory.of_save([getattr(state, name) for name in checkpoint.ARRAYS], target.hosts, target.platform)


def _traffic(
    found: tuple[hlo.Collective, ...], target: Target, places: list[tuple[int, ...]]
) -> dict[str, dict[str, float]]:
    """By kind: how many instructions, how often they run, and the bytes that a device gets."""
    table = {}
    for item in found:
        row = table.setdefault(roofline.kind(item, target, places), {"instructions": 0, "runs": 0, "bytes": 0.0})
        row["instructions"] += 1
        row["runs"] += item.runs
        row["bytes"] += item.runs * item.traffic
    return table
