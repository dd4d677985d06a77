"""Trains the embedded world's autoencoder from nothing: FLUX's format (16 channels, factor 8) for 64x64 pictures.

    python -m srpo_jax.emoji.train_autoencoder --workdir=/tmp/vae

The same workdir resumes. At the end the folder holds ``ours/`` (our format) and ``vae/`` (diffusers format), both in
bfloat16, ``quality.json``, and sheets of pictures above their reconstructions. On a CPU, two virtual devices
(XLA_FLAGS=--xla_force_host_platform_device_count=2) share each batch: more of the work is then parallel.

The encoder's mean is trained to be white: over pictures and positions the 16 channels of the SCALED latents have mean 0
and covariance 1. So there is no KL term: a fixed small noise on the latents asks for a decoder that forgives the errors
of a flow model. The loss is squared error with extra weight on colour, and a little absolute error for clean flats.
"""

import dataclasses
import functools
import json
import math
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from srpo_jax import command, convert, errors
from srpo_jax.emoji import pictures, training, world
from srpo_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from srpo_jax.models.compute import Compute, Params, bind, build
from srpo_jax.weights import folder

# Most width at low resolution: the convolutions at 64x64 and 32x32 take most of the time all the same.
CONFIG = AutoencoderConfig(block_out_channels=(16, 32, 64, 128), layers_per_block=1, norm_num_groups=4)
NOISE = 0.05  # standard deviation of the training noise on scaled latents (which have standard deviation 1)
COLOUR, ABSOLUTE, WHITE = 0.5, 0.1, 0.02  # weights of the loss beside the squared error
WORLD_WEIGHT = 12.0  # how much more often a picture of the world is drawn than another: 70 % of the draws


@dataclasses.dataclass(frozen=True)
class PictureData:
    """Pictures to train on, with the probability of each, and the two sets on which quality is told.

    ``train`` uint8 [N, 64, 64, 3] and ``probabilities`` [N]; ``held_out`` and ``world`` uint8 [styles, K, 64, 64, 3].
    """

    train: np.ndarray
    probabilities: np.ndarray
    held_out: np.ndarray
    world: np.ndarray


def load_pictures() -> PictureData:
    """Everything is trained on, the whole world too, except the holdout concepts outside the world."""
    inside = set(world.world())
    held_out = [concept for concept in world.concepts() if concept.split == "holdout" and concept not in inside]
    train = [concept for concept in world.concepts() if concept not in set(held_out)]
    weights = np.tile([WORLD_WEIGHT if concept in inside else 1.0 for concept in train], len(world.STYLES))
    images = pictures.load(train)
    return PictureData(
        train=images.reshape(-1, *images.shape[2:]),
        probabilities=weights / weights.sum(),
        held_out=pictures.load(held_out),
        world=images[:, [concept in inside for concept in train]],
    )


def choose_pictures(data: PictureData, seed: int, step: int, batch: int) -> np.ndarray:
    """The pictures of a step, float32 [batch, 64, 64, 3] in [-1, 1], with repetition."""
    chosen = np.random.default_rng((seed, step)).choice(len(data.train), batch, p=data.probabilities)
    return pictures.to_float(data.train[chosen])


def fresh_params(config: AutoencoderConfig, seed: int) -> tuple[nnx.GraphDef, Params]:
    """Graph definition and parameters: residual branches start at zero, the log variance is the training noise's."""
    graphdef, params = build(lambda rngs: Autoencoder(config, Compute(), rngs=rngs), seed)

    def start(path, leaf: jax.Array) -> jax.Array:
        keys = [entry.key for entry in path]
        return jnp.zeros_like(leaf) if keys[-2:] == ["conv2", "kernel"] else leaf

    params = jax.tree_util.tree_map_with_path(start, params)
    out, channels = params["encoder"]["conv_out"], config.latent_channels
    out["kernel"] = out["kernel"].at[..., channels:].set(0.0)
    out["bias"] = out["bias"].at[channels:].set(2 * math.log(NOISE / config.scaling_factor))
    return graphdef, params


def reconstruction_loss(
    graphdef: nnx.GraphDef, params: Params, images: jax.Array, key: jax.Array
) -> tuple[jax.Array, training.Values]:
    """The loss of a batch [B, H, W, 3] in [-1, 1], and its parts."""
    model = bind(graphdef, params)
    latents = model.scale_latents(model.encode(images)[0])
    noisy = latents + NOISE * jax.random.normal(key, latents.shape)
    error = model.decode(model.unscale_latents(noisy)) - images
    squared, absolute = jnp.mean(jnp.square(error)), jnp.mean(jnp.abs(error))
    colour = jnp.mean(jnp.square(error - jnp.roll(error, 1, axis=-1)))  # red - blue, green - red, blue - green
    flat = latents.reshape(-1, latents.shape[-1])
    mean = flat.mean(0)
    covariance = (flat - mean).T @ (flat - mean) / len(flat)
    white = (jnp.square(mean).sum() + jnp.square(covariance - jnp.eye(len(mean))).sum()) / len(mean)
    loss = squared + COLOUR * colour + ABSOLUTE * absolute + WHITE * white
    return loss, {"squared": squared, "colour": colour, "absolute": absolute, "white": white}


def make_transformation(steps: int, learning_rate: float) -> optax.GradientTransformation:
    """Adam whose decay to zero takes half of the run and replaces weight averaging."""
    decay = optax.cosine_decay_schedule(learning_rate, steps - steps // 2)
    warmup = min(200, steps // 10)
    return training.clipped_adamw(learning_rate, warmup, steps // 2, decay, b1=0.9, b2=0.98, weight_decay=1e-4)


@functools.partial(jax.jit, static_argnames=("graphdef", "transformation"), donate_argnames=("state",))
def _update(state: training.State, images, key, *, graphdef, transformation) -> tuple[training.State, training.Values]:
    loss = functools.partial(reconstruction_loss, graphdef)
    params, moments, parts = training.descend(loss, transformation, state["params"], state["moments"], images, key)
    return {"params": params, "moments": moments}, parts


@functools.partial(jax.jit, static_argnames=("graphdef",))
def _encode(params, images, *, graphdef):
    model = bind(graphdef, params)
    return model.scale_latents(model.encode(images)[0])


@functools.partial(jax.jit, static_argnames=("graphdef",))
def _decode(params, latents, *, graphdef):
    model = bind(graphdef, params)
    return model.decode(model.unscale_latents(latents))


def _in_batches(function, array: np.ndarray, size: int = 32) -> np.ndarray:
    """Maps over the leading axes [styles, K]; the last batch is filled up, so that one program serves all."""
    flat = array.reshape(-1, *array.shape[2:])
    padded = np.concatenate([flat, np.repeat(flat[-1:], -len(flat) % size, axis=0)])
    parts = [np.asarray(function(padded[start : start + size])) for start in range(0, len(padded), size)]
    result = np.concatenate(parts)[: len(flat)]
    return result.reshape(*array.shape[:2], *result.shape[1:])


def to_latents(graphdef: nnx.GraphDef, params: Params, images: np.ndarray) -> np.ndarray:
    """uint8 pictures [styles, K, H, W, 3] -> scaled latents [styles, K, H/8, W/8, C]."""
    return _in_batches(lambda x: _encode(params, pictures.to_float(x), graphdef=graphdef), images)


def to_pictures(graphdef: nnx.GraphDef, params: Params, latents: np.ndarray) -> np.ndarray:
    """Scaled latents [styles, K, H/8, W/8, C] -> pictures in [-1, 1], float32 [styles, K, H, W, 3]."""
    return _in_batches(lambda z: _decode(params, z, graphdef=graphdef), latents)


def quality(graphdef: nnx.GraphDef, params: Params, images: np.ndarray) -> dict[str, float]:
    """Mean PSNR in dB of reconstructed uint8 pictures [styles, K, H, W, 3], overall and per style."""
    values = pictures.psnr(
        to_pictures(graphdef, params, to_latents(graphdef, params, images)), pictures.to_float(images)
    )
    return {"all": float(values.mean())} | {
        style: float(row.mean()) for style, row in zip(world.STYLES, values, strict=True)
    }


def linear_quality(data: PictureData, components: int, patch: int) -> dict[str, float]:
    """As ``quality`` for held-out pictures and the best linear autoencoder (PCA) with as many numbers per patch."""

    def patches(images: np.ndarray) -> np.ndarray:
        *lead, height, width, channels = images.shape
        split = images.reshape(*lead, height // patch, patch, width // patch, patch, channels)
        return pictures.to_float(np.moveaxis(split, -4, -3)).reshape(*lead, -1, patch * patch * channels)

    flat = patches(data.train).reshape(-1, patch * patch * 3)
    mean = flat.mean(0)
    basis = np.linalg.eigh(np.cov(flat - mean, rowvar=False).astype(np.float64))[1][:, -components:].astype(np.float32)
    truth = patches(data.held_out)
    error = np.square(np.clip((truth - mean) @ basis @ basis.T + mean, -1, 1) - truth).mean((-2, -1))
    values = 10 * np.log10(4.0 / error)
    return {"all": float(values.mean())} | {
        style: float(row.mean()) for style, row in zip(world.STYLES, values, strict=True)
    }


def whitened(params: Params, latents: np.ndarray, config: AutoencoderConfig) -> Params:
    """Folds what is left of the channels' mean and scale into the convolutions around the latents.

    Args:
      latents: scaled latents [..., C] of pictures.

    Returns:
      Parameters whose scaled latents have mean 0 and standard deviation 1 per channel over those pictures. The
      reconstructions stay the same, except near the border, where the decoder's convolution sees zeros: that matters
      as little as the mean is small.
    """
    flat = latents.reshape(-1, latents.shape[-1]).astype(np.float64)
    mean, deviation = flat.mean(0), flat.std(0)
    # old raw = gain * new raw + offset
    gain = deviation
    offset = (mean - config.shift_factor * config.scaling_factor * (deviation - 1)) / config.scaling_factor
    out, enter = params["encoder"]["conv_out"], params["decoder"]["conv_in"]
    channels = config.latent_channels
    kernel, bias = np.array(out["kernel"], np.float64), np.array(out["bias"], np.float64)
    kernel[..., :channels] /= gain
    bias[:channels] = (bias[:channels] - offset) / gain
    bias[channels:] -= 2 * np.log(gain)
    first = np.array(enter["kernel"], np.float64)
    entry = {"kernel": first * gain[:, None], "bias": enter["bias"] + np.einsum("hwio,i->o", first, offset)}
    single = functools.partial(jax.tree.map, lambda leaf: jnp.asarray(leaf, jnp.float32))
    return params | {
        "encoder": params["encoder"] | {"conv_out": single({"kernel": kernel, "bias": bias})},
        "decoder": params["decoder"] | {"conv_in": single(entry)},
    }


def _told(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in figures.items())


def write_results(workdir: pathlib.Path, graphdef: nnx.GraphDef, params: Params, data: PictureData) -> None:
    """Writes the folders, the figures (``quality.json``) and a sheet of pictures beside their reconstructions."""
    params = whitened(params, to_latents(graphdef, params, data.world), CONFIG)
    # What is shipped is bfloat16, so that is what is judged.
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), params)
    folder.save(workdir / "ours", "autoencoder", CONFIG, params, jnp.bfloat16)
    shutil.rmtree(workdir / "vae", ignore_errors=True)  # of an earlier call
    convert.export_folder(workdir / "ours", workdir / "vae", "diffusers")
    latents = to_latents(graphdef, params, data.world).reshape(-1, CONFIG.latent_channels)
    figures = {
        "held_out": quality(graphdef, params, data.held_out),
        "linear": linear_quality(data, CONFIG.latent_channels, CONFIG.factor),
        "world": quality(graphdef, params, data.world),
        "latent_mean": latents.mean(0).tolist(),
        "latent_deviation": latents.std(0).tolist(),
    }
    (workdir / "quality.json").write_text(json.dumps(figures, indent=1))
    for name in ("held_out", "linear", "world"):
        print(f"PSNR in dB, {name}: {_told(figures[name])}")
    for name in ("held_out", "world"):
        concepts = getattr(data, name).shape[1]
        shown = getattr(data, name)[:, np.linspace(0, concepts - 1, min(12, concepts)).astype(int)]
        rebuilt = pictures.to_uint8(to_pictures(graphdef, params, to_latents(graphdef, params, shown)))
        rows = np.stack([shown, rebuilt], 1).reshape(-1, *shown.shape[2:])
        pictures.sheet(rows, shown.shape[1]).save(workdir / f"{name}.png")


def make_autoencoder(
    workdir: pathlib.Path, steps: int, batch: int, learning_rate: float, seed: int, every: int
) -> None:
    """Trains for ``steps`` steps, or what is left of them, and writes the results."""
    data = load_pictures()
    graphdef, params = fresh_params(CONFIG, seed)
    transformation = make_transformation(steps, learning_rate)
    # The batch is cut over the devices, everything else is whole on each. See the docstring for why a CPU may have two.
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, cut = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{count / 1e6:.2f} M parameters, {len(data.train)} pictures, {jax.device_count()} device(s)", flush=True)

    def inputs(step: int) -> tuple[jax.Array, jax.Array]:
        return jax.device_put(choose_pictures(data, seed, step, batch), cut), training.step_key(seed, step)

    def show(state: training.State) -> None:
        print(f"held-out PSNR in dB: {_told(quality(graphdef, state['params'], data.held_out))}", flush=True)

    state = training.fit(
        "autoencoder",
        workdir / "checkpoints",
        jax.device_put({"params": params, "moments": transformation.init(params)}, whole),
        functools.partial(_update, graphdef=graphdef, transformation=transformation),
        inputs,
        steps,
        every=every,
        keep=2,
        show=show,
    )
    write_results(workdir, graphdef, state["params"], data)


def main(arguments: list[str] | None = None) -> None:
    """Parses the flags and trains. Raises UserError."""
    parser = command.parser("emoji.train_autoencoder", __doc__)
    parser.add_argument("--workdir", type=command.local, required=True, help="for checkpoints and results")
    parser.add_argument("--steps", type=command.at_least(1), default=1600, help="(default: 1600)")
    parser.add_argument("--batch", type=command.at_least(1), default=16, help="(default: 16)")
    parser.add_argument("--learning-rate", type=command.positive, default=2e-3, help="(default: 2e-3)")
    parser.add_argument("--seed", type=command.seed, default=0, help="(default: 0)")
    words = "steps between checkpoints and held-out figures (default: 400)"
    parser.add_argument("--every", type=command.at_least(1), default=400, help=words)
    flags = parser.parse_args(arguments)
    flags.workdir.mkdir(parents=True, exist_ok=True)
    make_autoencoder(flags.workdir, flags.steps, flags.batch, flags.learning_rate, flags.seed, flags.every)


if __name__ == "__main__":
    sys.exit(errors.run(main))
