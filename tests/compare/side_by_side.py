r"""Times an update beside the same update in PyTorch eager, on the CPU, in float32, with the same weights and threads.

    python tests/compare/side_by_side.py [--sizes=small] [--compile] [--runs=5] [--json=FILE] [--config.KEY=VALUE]

  small   the sizes of `python -m srpo_jax.benchmark --preset=small`, 8 samples
  demo    the same, the demonstration's 32 samples
  medium  12 blocks of width 256 on 256x256 pictures, 2 samples

PyTorch runs diffusers' transformer and autoencoder and transformers' CLIP (torch_baseline.py). First both compute the
same losses and gradients; then each part is timed, a call of ours and one of theirs in turn, and the ratio is the
median of the pairs'. Threads are the cores that the process may use. The last line names the worst ratio.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # the helpers
import helpers.torchvision_operators  # noqa: F401  (diffusers wants torchvision)
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch_baseline
from helpers import updates
from ml_collections import ConfigDict

from srpo_jax import command, errors, program, sharding, validation
from srpo_jax import config as config_lib
from srpo_jax.algorithm import preference, step
from srpo_jax.algorithm.batch import Batch, Draws
from srpo_jax.algorithm.methods import METHODS
from srpo_jax.algorithm.networks import Frozen
from srpo_jax.algorithm.preference import VARIANTS
from srpo_jax.architectures import Architecture
from srpo_jax.costs import parts, presets, timing, work
from srpo_jax.errors import UserError
from srpo_jax.models import compute
from srpo_jax.models.compute import Compute
from srpo_jax.weights import engine, flux, folder

SIZES = {"small": ("small", 8), "demo": ("small", 32), "medium": ("medium", 2)}  # preset, samples
PARTS = ("rollout", "transformer", "autoencoder", "reward", "optimizer", "update")


def random_params(network: str, config, seed: int):
    """A network's parameters as their modules make them, every norm and bias moved off its start."""
    _, constructor = folder.classes(network)
    _, params = compute.build(lambda rngs: constructor(config, Compute(), rngs=rngs), seed)
    leaves, structure = jax.tree.flatten(params)
    generator = np.random.default_rng(seed)
    return jax.tree.unflatten(
        structure, [np.asarray(x) + 0.02 * generator.standard_normal(x.shape, np.float32) for x in leaves]
    )


def same_inputs(architecture: Architecture, built: program.Program, count: int, length: int):
    """A random batch of ours and its draws."""
    generator = np.random.default_rng(0)
    ids = {}
    for name, sizes in architecture.rewards.items():
        text = sizes.text_config
        shape = (count, text.max_position_embeddings)
        ids[name] = {key: generator.integers(1, text.eos_token_id, shape, np.int32) for key in VARIANTS}
        for row in ids[name].values():
            row[:, -1] = text.eos_token_id
    transformer = architecture.transformer
    text = generator.standard_normal((count, length, transformer.joint_attention_dim), np.float32)
    pooled = generator.standard_normal((count, transformer.pooled_projection_dim), np.float32)
    draws = step.draw(built.networks, built.settings, jax.random.key(1), count)
    return Batch({"text": text, "pooled": pooled}, ids), draws


# Pixels are clipped to 0 .. 1, and the gradient of one that is clipped is 0. Rounding takes one at the border to either
# side, and one of 37,000 changes the whole gradient by half a percent: decoders here make pictures without contrast.
CONTRAST = 0.05


def without_borders(autoencoder):
    """The autoencoder's parameters with a decoder whose pixels, for whatever latents, all lie between 0 and 1."""
    last = autoencoder["decoder"]["conv_out"]
    return autoencoder | {
        "decoder": autoencoder["decoder"] | {"conv_out": {name: CONTRAST * leaf for name, leaf in last.items()}}
    }


def clipped(built, params, frozen, batch, draws) -> bool:
    """Whether a pixel of any term is clipped."""
    networks, settings = built.networks, built.settings

    @jax.jit
    def largest(params, frozen):
        images = step.images_of(networks, settings, params, frozen, batch, draws)
        terms = METHODS[settings.method].terms(settings, images, draws.own)
        prepared = preference.prepare(networks.rewards, frozen.rewards, batch.reward_tokens)
        given = networks, settings, params, frozen, batch.condition
        return jnp.abs(jax.lax.map(lambda term: step.run_term(*given, term, prepared).decoded, terms)).max()

    return bool(largest(params, frozen) >= 1)


def compare(built, architecture, params, frozen, batch, draws, theirs) -> dict[str, float]:
    """The relative differences of the losses and of the whole gradient. Fails if they are not those of rounding."""
    assert not clipped(built, params, frozen, batch, draws)
    gradient = updates.rolled_out_gradient(built.networks, built.settings)
    ours, metrics = gradient(params, frozen, batch, draws)
    losses = theirs.gradient(torch_baseline.inputs_of(batch, draws))
    table = flux.diffusers_rules(architecture.transformer)
    ours = engine.from_params(table, jax.tree.map(np.asarray, ours))
    found = {name: p.grad.numpy() for name, p in theirs.transformer.named_parameters()}
    theirs.optimizer.zero_grad()
    distance = np.sqrt(sum(np.square(ours[name] - found[name]).sum() for name in found))
    difference = {
        "losses": float(np.max(np.abs(np.asarray(metrics["loss"]) - losses) / np.abs(losses))),
        "gradient": float(distance / np.sqrt(sum(np.square(g).sum() for g in found.values()))),
    }
    assert difference["losses"] < 1e-4 and difference["gradient"] < 1e-4, difference
    return difference


def whole(built: program.Program) -> parts.Part:
    """Our whole update, as a part of itself."""
    return parts.Part("update", built.update, (built.state, built.frozen, built.batch), 1)


def torch_parts(update: torch_baseline.Update, inputs: torch_baseline.Inputs, count: int):
    """What is timed in PyTorch, by part: a call each."""
    settings = update.settings
    level, x = torch.full((count,), 0.8), inputs.noise.clone()
    cotangent = torch.ones_like(x)
    picture = torch.rand(count, 3, settings.height, settings.width) * 2 - 1
    target = update.captions(inputs)[0]

    def transformer():
        update.velocity(x, inputs, level, settings.guidance).backward(cotangent)

    def autoencoder():
        latents = x.requires_grad_(True)
        torch.autograd.grad(update.decode(latents), latents, picture)

    def reward():
        image = picture.requires_grad_(True)
        torch.autograd.grad(update.score(image, target).sum(), image)

    return {
        "rollout": lambda: update.rollout(inputs),
        "transformer": transformer,
        "autoencoder": autoencoder,
        "reward": reward,
        "optimizer": update.optimize,
        "update": lambda: update(inputs),
    }


def ours_prepared(part: parts.Part):
    """(seconds to compile a part of ours, a call that runs it once on numbers of its own)."""
    started = time.perf_counter()
    compiled = part.function.lower(*part.arguments).compile()
    seconds = time.perf_counter() - started
    values = parts.fill(part.arguments)

    def call() -> None:
        nonlocal values
        result = jax.block_until_ready(compiled(*values))
        if part.name in timing.AGAIN:
            values = timing.AGAIN[part.name](values, result)

    return seconds, call


def timed_in_turn(calls: dict, runs: int) -> dict[str, list[float]]:
    """Seconds of each call, ``runs`` times in turn, so that a machine that slows down slows all of them.

    Before each timed call the same runs once untimed: caches and sleeping threads are then its own.
    """
    taken = {name: [] for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            call()
            started = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - started)
    return taken


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. Raises UserError."""
    parser = command.parser("side_by_side", __doc__)
    parser.prog = "python tests/compare/side_by_side.py"
    parser.add_argument("--compile", action="store_true", help="time torch.compile too, which needs a C++ compiler")
    words = "timed calls of each part (default: 5)"
    parser.add_argument("--runs", type=command.at_least(1), default=5, metavar="N", help=words)
    parser.add_argument("--json", type=command.local, metavar="FILE", help="for everything measured, by size")
    recipes, values = parse(parser, arguments)
    reports = {}
    for size, config in recipes.items():
        print(f"--- {size} ---")
        reports[size] = run(config, architecture(size), values)
    if values.json:
        values.json.write_text(json.dumps(reports, indent=2) + "\n", encoding="utf-8")
    ratios = {size: report["parts"]["update"]["eager_ratio"] for size, report in reports.items()}
    worst = min(ratios, key=ratios.get)
    print(", ".join(f"{size} {ratio:.2f}x" for size, ratio in ratios.items()) + f"; worst: {worst}")


def parse(
    parser: argparse.ArgumentParser, arguments: list[str] | None
) -> tuple[dict[str, ConfigDict], argparse.Namespace]:
    """Adds --sizes and the keys of recipes, and reads the flags. Returns a validated recipe a size, and what else was
    given. Raises UserError."""
    words = f"of {', '.join(SIZES)} (default: all)"
    parser.add_argument("--sizes", type=command.words, default=list(SIZES), metavar="SIZE,...", help=words)
    config, values = command.parse_recipe(parser, arguments, lambda values: recipe(values.sizes[0]))
    changed = changes(config, recipe(values.sizes[0]))
    recipes = {size: recipe(size) for size in values.sizes}
    for config in recipes.values():
        config.update_from_flattened_dict(changed)
        validation.validate(config, paths=False)
    return recipes, values


def architecture(size: str) -> Architecture:
    """The networks' sizes."""
    return presets.PRESETS[SIZES[size][0]]().architecture


def recipe(size: str) -> ConfigDict:
    """The recipe of a size. Raises UserError for one that is unknown."""
    if size not in SIZES:
        raise UserError(f"--sizes={size}: must be of {', '.join(SIZES)}")
    preset, count = SIZES[size]
    config = presets.PRESETS[preset]().config
    config.data.batch_size = count
    return config


def changes(config: ConfigDict, plain: ConfigDict) -> dict[str, Any]:
    """What flags changed, by key."""
    before = config_lib.flatten(plain)
    return {key: value for key, value in config_lib.flatten(config).items() if value != before[key]}


class Sides(NamedTuple):
    """One recipe's update, with the same numbers on both sides.

    Attributes:
      built: ours.
      params, frozen, batch, draws: what it is given.
      inputs: the same for PyTorch's.
      baseline: makes PyTorch's update.
    """

    built: program.Program
    params: Any
    frozen: Frozen
    batch: Batch
    draws: Draws
    inputs: torch_baseline.Inputs
    baseline: Callable[[], torch_baseline.Update]


def sides(config: ConfigDict, architecture: Architecture) -> Sides:
    """Both, on as many threads as the process may use cores."""
    torch.set_num_threads(threads())
    built = program.build(config, sharding.make_mesh(config.mesh), architecture)
    params = random_params("flux", architecture.transformer, 1)
    ((name, towers),) = architecture.rewards.items()
    autoencoder = without_borders(random_params("autoencoder", architecture.autoencoder, 2))
    frozen = Frozen(autoencoder, {name: random_params("clip", towers, 3)})
    batch, draws = same_inputs(architecture, built, config.data.batch_size, config.data.text_length)

    def baseline():
        models = torch_baseline.build(architecture, params, frozen)
        return torch_baseline.Update(built.settings, *models, name, config.optim)

    return Sides(built, params, frozen, batch, draws, torch_baseline.inputs_of(batch, draws), baseline)


def threads() -> int:
    """Cores that the process may use."""
    return len(os.sched_getaffinity(0))


def run(config, architecture, values) -> dict:
    """Compares, times and prints; returns all that was measured."""
    count, runs = config.data.batch_size, values.runs
    built, params, frozen, batch, draws, inputs, baseline = sides(config, architecture)
    difference = compare(built, architecture, params, frozen, batch, draws, baseline())
    print(f"same losses within {difference['losses']:.1g}, same gradient within {difference['gradient']:.1g}")

    theirs = {"eager": torch_parts(baseline(), inputs, count)}
    if values.compile:
        compiled = baseline()
        compiled.transformer.forward = torch.compile(compiled.transformer.forward)
        compiled.vae.decode = torch.compile(compiled.vae.decode)
        compiled.reward.get_image_features = torch.compile(compiled.reward.get_image_features)
        theirs["compile"] = torch_parts(compiled, inputs, count)
    report = {"threads": threads(), "torch": torch.__version__, "jax": jax.__version__, "difference": difference}
    report["config"], report["parts"] = config_lib.flatten(config), {}
    ours = {part.name: part for part in parts.take_apart(config, built)}
    ours["update"] = whole(built)
    counted = work.update(config, architecture)
    print(f"{threads()} threads; batch {count}; seconds a call, and how many times faster ours is")
    print(f"{'part':<12} {'GFLOP':>8} {'ours':>8} {'compile':>8}" + "".join(f" {kind:>9} {'':>6}" for kind in theirs))
    for part in PARTS:
        compile_seconds, call = ours_prepared(ours[part])
        first = {}
        for kind, calls in theirs.items():
            started = time.perf_counter()
            calls[part]()
            first[f"{kind}_first"] = time.perf_counter() - started
        taken = timed_in_turn({"ours": call, **{kind: calls[part] for kind, calls in theirs.items()}}, runs)
        total = sum(w.model for w in counted.values()) if part == "update" else counted[part].model / ours[part].calls
        row = {name: statistics.median(seconds) for name, seconds in taken.items()}
        row |= {"compile_seconds": compile_seconds, "model_flops": total, **first}
        line = f"{part:<12} {total / 1e9:8.4g} {row['ours']:8.4f} {compile_seconds:8.2f}"
        for kind in theirs:
            ratios = [slow / fast for slow, fast in zip(taken[kind], taken["ours"], strict=True)]
            row[f"{kind}_ratio"] = statistics.median(ratios)
            line += f" {row[kind]:9.4f} {row[f'{kind}_ratio']:5.2f}x"
        print(line, flush=True)
        report["parts"][part] = row
    return report


if __name__ == "__main__":
    sys.exit(errors.run(main))
