r"""Times an update and each of its parts, with random weights, and says how far from the hardware's peak they are.

    python -m srpo_jax.benchmark                                        # two CPU cores, one minute
    python -m srpo_jax.benchmark --preset=wide --device-batch=4
    python -m srpo_jax.benchmark --config=configs/flux_dev_hps.py --device-batch=1 --json=speed.json

PRESETS, sizes and recipe where there is no --config:

  small  a 5-million-parameter FLUX on 64x64 pictures, float32: any machine
  medium 12 blocks of width 256 on 256x256 pictures, float32: a CPU, with more work
  wide   FLUX.1-dev's widths, 4 + 8 of its 19 + 38 blocks, the released recipe: one 80 GB GPU
  full   FLUX.1-dev, the released recipe

The sizes of a recipe are those of the folders that it names, or FLUX.1-dev's published ones. Of the parts, "update" is
the whole, the only one that needs memory for the optimiser's state.

Utilisation (MFU) is of the model's FLOPs (srpo_jax/costs/flops.py): recomputation does not count as work. The peak is
the maker's figure for bfloat16; for a CPU it is the best float32 matrix product measured here, for another device
unknown.
"""

import argparse
import json
import sys

from ml_collections import ConfigDict

from srpo_jax import architectures, command, errors, families, program, sharding, storage, validation
from srpo_jax.architectures import Architecture
from srpo_jax.costs import presets, timing, work
from srpo_jax.errors import UserError


def parse(arguments: list[str] | None) -> tuple[ConfigDict, Architecture, argparse.Namespace]:
    """Reads a command line: the config with its batch, the sizes, and the flags. Raises UserError."""
    parser, known = command.parser("benchmark", __doc__), [*work.PARTS, timing.UPDATE]
    words = "one of those above (default: small)"
    parser.add_argument("--preset", choices=sorted(presets.PRESETS), default="small", help=words)
    words = "published sizes, where the recipe names no folder of a model (default: %(default)s)"
    parser.add_argument("--sizes", choices=families.published(), default=families.published()[0], help=words)
    words = "blocks of the transformer instead of all"
    parser.add_argument("--depth", type=command.words, metavar="DOUBLE,SINGLE", help=words)
    words = "samples that a device takes at a time; the batch is that many on every device (default: 1)"
    parser.add_argument("--device-batch", type=command.at_least(1), metavar="N", help=words)
    words = f"which parts are timed, of {', '.join(known)} (default: all)"
    parser.add_argument("--parts", type=command.words, default=known, metavar="PART,...", help=words)
    words = "timed calls of each after one to warm up; the median counts (default: 5)"
    parser.add_argument("--runs", type=command.at_least(1), default=5, metavar="N", help=words)
    parser.add_argument("--json", type=command.local, metavar="FILE", help="for everything measured")
    words = "for profiles of one more call of each part, for TensorBoard's profiler or Perfetto"
    parser.add_argument("--trace", type=command.local, metavar="FOLDER", help=words)
    config, values = command.parse_recipe(parser, arguments, lambda values: presets.PRESETS[values.preset]().config)
    validation.validate(config, paths=False)
    if unknown := set(values.parts) - set(known):
        raise UserError(f"--parts: {unknown.pop()!r} is unknown; choose of {', '.join(known)}")
    if values.config is None:
        architecture = presets.PRESETS[values.preset]().architecture
        if set(architectures.used_rewards(config)) != set(architecture.rewards):
            raise UserError(
                f"--preset={values.preset} has the sizes of {', '.join(architecture.rewards)} only: give other rewards "
                "no weight, or use --config"
            )
    elif config.model.path:
        architecture = architectures.read(config)
    else:
        architecture = architectures.published(config, values.sizes)
    if values.depth:
        architecture = presets.shallow(architecture, presets.depth(values.depth))
    mesh = sharding.make_mesh(config.mesh)
    config.model.attention = program.attention_of(config, mesh)
    each = values.device_batch or (presets.DEVICE_BATCH.get(values.preset, 1) if values.config is None else 1)
    config.data.batch_size = each * sharding.batch_parts(mesh) * config.optim.accumulation
    return config, architecture, values


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. Raises UserError."""
    config, architecture, values = parse(arguments)
    if values.json:
        storage.check_writable(values.json, "--json", folder=False)
    report = timing.benchmark(config, architecture, values.runs, tuple(values.parts), trace=values.trace)
    if values.json:
        values.json.parent.mkdir(parents=True, exist_ok=True)
        values.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(errors.run(main))
