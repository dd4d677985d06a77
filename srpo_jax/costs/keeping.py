"""What ``remat.transformer=auto`` stands for: as much of each block as a device has room for.

The update is compiled with nothing kept, its plan says what is left of the device's memory, and of the values that a
block has names for (``models.compute.KEPT``) as many are kept as fit, first those that spare most work for their bytes.
"""

import math

from jax.sharding import Mesh
from ml_collections import ConfigDict

from srpo_jax import program, sharding
from srpo_jax.algorithm import methods
from srpo_jax.algorithm.settings import Settings
from srpo_jax.architectures import Architecture
from srpo_jax.costs import work
from srpo_jax.costs.hardware import GIB
from srpo_jax.models.compute import KEPT
from srpo_jax.program import Program

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


def fewer(remat: str) -> str:
    """The next smaller option, where a choice turned out not to fit."""
    return remat.rpartition("+")[0] or "full"


def build(config: ConfigDict, mesh: Mesh, architecture: Architecture) -> tuple[Program, ConfigDict]:
    """The program of a configuration on devices that are here, and the configuration with what ``remat.transformer``
    stands for: on a CPU, whose memory is the machine's, "none". Raises UserError as ``program.build`` does."""
    built = program.build(config, mesh, architecture)
    if config.remat.transformer != "auto":
        return built, config
    settled = config.copy_and_resolve_references()
    limit = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        settled.remat.transformer = "none"
    else:
        plan = built.lower().compile().memory_analysis()
        results = plan.output_size_in_bytes - plan.alias_size_in_bytes
        taken = plan.argument_size_in_bytes + results + plan.temp_size_in_bytes + plan.generated_code_size_in_bytes
        settled.remat.transformer = choose(config, architecture, mesh, limit - taken)
    return program.build(settled, mesh, architecture), settled
