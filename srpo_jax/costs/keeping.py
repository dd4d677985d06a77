"""What ``remat.transformer=auto`` stands for: as much of each block as a device has room for; on a CPU all of it.

The update is compiled with nothing kept, its plan says what is left of the device's memory, and of the values that a
block has names for (``models.compute.KEPT``) as many are kept as fit, first those that spare most work for their bytes.
"""

import math
from collections.abc import Iterator
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from srpo_jax import distributed, program, sharding
from srpo_jax.algorithm import methods
from srpo_jax.algorithm.settings import Settings
from srpo_jax.architectures import Architecture
from srpo_jax.costs import work
from srpo_jax.costs.hardware import GIB
from srpo_jax.costs.roofline import shard_bytes
from srpo_jax.costs.topologies import MIB
from srpo_jax.models.compute import KEPT
from srpo_jax.program import Program
from srpo_jax.weights import folder

# Left free of what the plan leaves: the compiler keeps some values twice, and plans anew around those that are kept.
MARGIN = 1.0 * GIB


def sizes(config: ConfigDict, architecture: Architecture, mesh: Mesh) -> dict[str, int]:
    """Bytes that keeping a value of all blocks takes of each device, by name; nothing of a family without names."""
    samples = math.ceil(config.data.batch_size / config.optim.accumulation / sharding.batch_parts(mesh))
    if config.optim.merge_terms:
        samples *= methods.cost(Settings.from_config(config, architecture.family)).pictures
    each = 4 if config.model.dtype == "float32" else 2
    numbers = architecture.family.kept(architecture.transformer, *work.tokens(config, architecture.family))
    return {name: each * samples * numbers[name] for name in KEPT if name in numbers}


def choose(config: ConfigDict, architecture: Architecture, mesh: Mesh, room: float) -> str:
    """The option of ``remat.transformer`` for so many bytes that a device has left where all is "full"."""
    names, left = [], room - MARGIN
    for name, size in sizes(config, architecture, mesh).items():
        if size > left:
            break
        names.append(name)
        left -= size
    return "+".join(names) or "full"


def options(config: ConfigDict, architecture: Architecture, mesh: Mesh, room: float) -> Iterator[ConfigDict]:
    """The configuration with the option that ``choose`` names, then with ever smaller ones, where one turns out not to
    fit; none where all is to be "full"."""
    remat = choose(config, architecture, mesh, room)
    while remat != "full":
        chosen = config.copy_and_resolve_references()
        chosen.remat.transformer = remat
        yield chosen
        remat = remat.rpartition("+")[0] or "full"


def encoders(config: ConfigDict, architecture: Architecture, built: Program) -> dict[str, Any]:
    """The parameters of the text encoders as a run lays them out, by folder; empty where it needs none.

    Raises UserError for one that does not fit the mesh.
    """
    if config.data.encode != "online" and not config.sample.every:
        return {}
    found = {}
    for part, sizes in architecture.text.items():
        network = architecture.family.components[part].network
        params = folder.abstract(network, sizes, built.computes.text)[1]
        found[part] = program.with_sharding(params, sharding.of_tree(built.mesh, network, params))
    return found


def planned(compiled: Any, arguments: int) -> int:
    """Bytes of a device's memory that a compiled update takes, by the compiler's plan, with ``arguments`` bytes of
    arguments: what a program does not read is none of its own, and stays on the device, as half of the autoencoder."""
    plan = compiled.memory_analysis()
    results = plan.output_size_in_bytes - plan.alias_size_in_bytes  # what does not take an argument's place
    held = max(plan.argument_size_in_bytes, arguments)
    return held + results + plan.temp_size_in_bytes + plan.generated_code_size_in_bytes


def _memory(mesh: Mesh) -> int | None:
    """Bytes of a device's memory that programs may use; None where a device does not tell."""
    return (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")


def build(config: ConfigDict, mesh: Mesh, architecture: Architecture) -> tuple[Program, ConfigDict]:
    """The program of a configuration on devices that are here, and the configuration with what "auto" stands for.

    On an accelerator ``remat.transformer=auto`` compiles the update to see what is left of its memory beside the text
    encoders, and then what was chosen for it: twice, where all of it has room.

    Raises UserError as ``program.build`` does.
    """
    built, settled = program.build(config, mesh, architecture), config.copy_and_resolve_references()
    for part in settled.remat:
        settled.remat[part] = program.remat_of(config, part, mesh)
    limit = _memory(mesh)
    if config.remat.transformer != "auto" or settled.remat.transformer == "none" or limit is None:
        return built, settled
    beside = shard_bytes(encoders(config, architecture, built)) if config.data.encode == "online" else 0

    def room(built: Program) -> int:
        """Bytes that the update leaves of the device that has least, of all processes: all choose the same."""
        taken = planned(built.lower().compile(), shard_bytes((built.state, built.frozen, built.batch)))
        return -distributed.largest(-((limit - taken - beside) // MIB)) * MIB

    for chosen in options(settled, architecture, mesh, room(built)):
        candidate = program.build(chosen, mesh, architecture)
        if room(candidate) >= 0:
            return candidate, chosen
    return built, settled
