r"""Times an update and each of its parts, with random weights, and says how far from the hardware's peak they are.

    python -m srpo_jax.benchmark                                        # two CPU cores, one minute
    python -m srpo_jax.benchmark --preset=wide --config.model.attention=cudnn
    python -m srpo_jax.benchmark --config=configs/flux_dev_hps.py --device-batch=1 --json=speed.json

  --preset         sizes and recipe, where there is no --config:
                     small  a 5-million-parameter FLUX on 64x64 pictures, float32: any machine
                     wide   FLUX.1-dev's widths, 4 + 8 of its 19 + 38 blocks, the released recipe: one 80 GB GPU
                     full   FLUX.1-dev, the released recipe
  --config         recipe; the sizes are those of the folders that it names, or FLUX.1-dev's published ones.
                   --config.KEY=VALUE overrides a key of the recipe or the preset
  --depth          DOUBLE,SINGLE blocks of the transformer instead of all
  --device-batch   samples that a device takes at a time; the batch is that many on every device (default: 1)
  --parts          which parts are timed, of captions, rollout, transformer, autoencoder, reward, optimizer, update
                   (default: all); "update" is the whole, the only one that needs memory for the optimiser's state
  --runs           timed calls of each after one to warm up; the median counts (default: 5)
  --json           file for everything measured
  --trace          folder for profiles of one more call of each part, for TensorBoard's profiler or Perfetto

Utilisation (MFU) is of the model's FLOPs (srpo_jax/costs/flops.py): recomputation does not count as work. The peak is
the maker's figure for bfloat16; for a CPU it is the best float32 matrix product measured here, for another device
unknown.
"""

import json
import pathlib
import sys
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from srpo_jax import architectures, command, errors, program, sharding
from srpo_jax import config as config_lib
from srpo_jax.costs import presets, timing, work
from srpo_jax.errors import UserError
from srpo_jax.program import Architecture


def parse(argv: list[str]) -> tuple[ConfigDict, Architecture, dict[str, Any]]:
    """Reads a command line: the config with its batch, the sizes, and the flags. Raises UserError."""

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_enum("preset", "small", sorted(presets.PRESETS), "", flag_values=values)
        flags.DEFINE_list("depth", None, "", flag_values=values)
        flags.DEFINE_integer("device-batch", None, "", lower_bound=1, flag_values=values)
        flags.DEFINE_list("parts", [*work.PARTS, timing.UPDATE], "", flag_values=values)
        flags.DEFINE_integer("runs", 5, "", lower_bound=1, flag_values=values)
        flags.DEFINE_string("json", None, "", flag_values=values)
        flags.DEFINE_string("trace", None, "", flag_values=values)

    chosen = {}

    def default(found: dict[str, Any]) -> ConfigDict:
        chosen["preset"] = presets.PRESETS[found["preset"]]()
        return chosen["preset"].config

    config, values = command.parse(argv, "python -m srpo_jax.benchmark", define, default)
    config_lib.validate(config, paths=False)
    unknown = set(values["parts"]) - {*work.PARTS, timing.UPDATE}
    if unknown:
        raise UserError(f"--parts: {unknown.pop()!r} is unknown; choose of {', '.join([*work.PARTS, timing.UPDATE])}")
    if chosen:
        architecture = chosen["preset"].architecture
        if set(program.used_rewards(config)) != set(architecture.rewards):
            raise UserError(f"--preset={values['preset']} has the sizes of {', '.join(architecture.rewards)} only: "
                            "give other rewards no weight, or use --config")  # fmt: skip
    elif config.model.path:
        architecture = program.read_architecture(config)
    else:
        architecture = architectures.published(config, "flux-dev")[0]
    if values["depth"]:
        architecture = presets.shallow(architecture, presets.depth(values["depth"]))
    mesh = sharding.make_mesh(config.mesh)
    each = values["device-batch"] or (presets.DEVICE_BATCH.get(values["preset"], 1) if chosen else 1)
    config.data.batch_size = each * sharding.batch_parts(mesh) * config.optim.accumulation
    return config, architecture, values


def main() -> None:
    """Runs the command line. Raises UserError."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(__doc__)
        return
    config, architecture, values = parse(sys.argv)
    trace = pathlib.Path(values["trace"]) if values["trace"] else None
    report = timing.benchmark(config, architecture, values["runs"], tuple(values["parts"]), trace=trace)
    if values["json"]:
        path = pathlib.Path(values["json"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(errors.run(main))
