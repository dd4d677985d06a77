r"""Says whether a recipe fits an accelerator that is not there, and how long an update will take.

    python -m srpo_jax.preflight --config=configs/flux_dev_hps.py --topology=v5p:2x2x2 --device-batch=1
    python -m srpo_jax.preflight --config=configs/flux_dev_hps.py --topology=h100:8,h200:8 --device-batch=1 \
        --json=fits.json

Compiles the training update itself, ahead of time: rollout, autoencoder, reward, gradient and optimiser. That takes two
CPU minutes and 4 GB of memory, no weights and no accelerator. Sizes are those of the folders that the recipe names, or
FLUX.1-dev's published ones; model.attention=auto stands for what the target has. The compilers are extra packages: pip
install -e '.[preflight-tpu]' (libtpu) and pip install -e '.[preflight-cuda]' (jax's CUDA plugin, cuDNN), in the
versions that belong to jax.

Memory is what the compiler plans for each device, and the text encoders, where they stay beside the update. The time is
a roofline (srpo_jax/costs/roofline.py): "at best" with every published peak reached, "expected" with matrix products
at 60 % of theirs. Exit codes: 0 all fit, 2 something does not, 1 a mistake.
"""

import argparse
import json
import re
import sys

from srpo_jax import architectures, command, errors, families, storage, validation
from srpo_jax.costs import advice, plan, presets, topologies, verdict
from srpo_jax.costs.plan import Candidate
from srpo_jax.errors import UserError


def parse(arguments: list[str] | None) -> tuple[list[Candidate], argparse.Namespace]:
    """Reads a command line: what to plan, and the flags. Raises UserError, also for what cannot be built."""
    parser = command.parser("preflight", __doc__)
    words = (
        "TPU slice by shape in chips (v4, v5e, v5p, v6e, tpu7x: v5e:4x4, v5p:2x2x2), several slices of one shape as "
        "v5e:4x4*2 (with --config.mesh.data=2), or GPUs (a100, a100-40gb, h100, h100-pcie, h200, b200, rtx4090: "
        "h100:8, h100:4x8 as hosts x GPUs); several with commas"
    )
    parser.add_argument("--topology", type=command.words, required=True, help=words)
    words = "of the images, HEIGHTxWIDTH, instead of the recipe's; several with commas"
    parser.add_argument("--size", type=command.words, help=words)
    words = "samples that a device takes at a time: sets optim.accumulation"
    parser.add_argument("--device-batch", type=command.at_least(1), metavar="N", help=words)
    words = "published sizes, where the recipe names no folder of a model (default: %(default)s)"
    parser.add_argument("--sizes", choices=families.published(), default=families.published()[0], help=words)
    words = "blocks of the transformer instead of all"
    parser.add_argument("--depth", type=command.words, metavar="DOUBLE,SINGLE", help=words)
    parser.add_argument("--json", type=command.local, metavar="FILE", help="for everything found, a list")
    config, values = command.parse_recipe(parser, arguments)
    targets = [topologies.parse(name) for name in values.topology]
    configs = []
    for size in values.size or [f"{config.data.height}x{config.data.width}"]:
        match = re.fullmatch(r"(\d+)x(\d+)", size)
        if match is None:
            raise UserError(f"--size={size}: write HEIGHTxWIDTH in pixels, as 720x720")
        sized = config.copy_and_resolve_references()
        sized.data.height, sized.data.width = int(match[1]), int(match[2])
        validation.validate(sized, paths=False)
        configs.append(sized)
    sizes = architectures.read(config) if config.model.path else architectures.published(config, values.sizes)
    if values.depth:
        sizes = presets.shallow(sizes, presets.depth(values.depth))
    each = values.device_batch
    return [plan.prepare(sized, sizes, target, each) for target in targets for sized in configs], values


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. Raises UserError."""
    topologies.prepare()
    candidates, values = parse(arguments)
    if values.json:
        storage.check_writable(values.json, "--json", folder=False)
    reports = []
    for candidate in candidates:
        candidate, report = plan.settle(candidate)  # noqa: PLW2901
        report["advice"] = advice.advise(candidate, report)
        reports.append(report)
        print(verdict.describe(candidate, report), flush=True)
    if len(reports) > 1:
        print("\n" + verdict.table(reports))
    if values.json:
        values.json.parent.mkdir(parents=True, exist_ok=True)
        values.json.write_text(json.dumps(reports, indent=2) + "\n", encoding="utf-8")
    if not all(report["fits"] for report in reports):
        sys.exit(2)


if __name__ == "__main__":
    sys.exit(errors.run(main))
