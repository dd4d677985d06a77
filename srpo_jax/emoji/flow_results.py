"""What comes out of ``train_flow``: sheets of samples, and the pipeline as a folder that diffusers reads."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp

from srpo_jax import convert, schema
from srpo_jax.algorithm import flow
from srpo_jax.emoji import pictures, world
from srpo_jax.emoji.flow_data import FlowData
from srpo_jax.emoji.flow_networks import FlowNetworks
from srpo_jax.families.flux import FLUX, Scheduler, pipeline_schedule
from srpo_jax.families.guidance import classifier_free
from srpo_jax.models.compute import Params, bind
from srpo_jax.weights import folder

SCHEDULER = {  # FLUX.1-dev's
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
SHOWN = ("red apple", "dog face", "pizza", "rocket", "sunflower", "owl", "guitar", "house")


class SampleSheet:
    """Draws sheets of samples: per shown concept two bare captions, then one of each style."""

    def __init__(self, networks: FlowNetworks, data: FlowData, vae: pathlib.Path):
        _, graphdef, decoder = folder.load(vae, "autoencoder")
        concepts = len(world.world())
        known = [concept.caption for concept in world.world()]
        shown = [known.index(caption) for caption in SHOWN if caption in known]
        kinds = (len(world.STYLES), len(world.STYLES), *range(len(world.STYLES)))
        rows = jnp.asarray([kind * concepts + concept for concept in shown for kind in kinds])
        noise = jax.random.normal(jax.random.key(0), (len(rows), *data.tokens.shape[1:]))
        sigmas = pipeline_schedule(20, data.tokens.shape[1], schema.read(Scheduler, SCHEDULER, "scheduler"))
        self._columns = len(kinds)

        def sample(params: Params, guidance: float, distilled: bool) -> jax.Array:
            given = networks.encode(params, data.t5_ids[rows], data.clip_ids[rows])
            blank = jnp.full_like(rows, data.empty)
            empty = networks.encode(params, data.t5_ids[blank], data.clip_ids[blank])

            def velocity(x: jax.Array, sigma: jax.Array, _: jax.Array, memory: tuple) -> tuple[jax.Array, tuple]:
                level, one = jnp.full(len(x), sigma), jnp.ones(len(x))
                if distilled:
                    return networks.velocity(params, x, level, guidance * one, given), memory
                conditional, without = (networks.velocity(params, x, level, one, read) for read in (given, empty))
                return classifier_free(conditional, without, guidance * one), memory

            model = bind(graphdef, decoder)
            return FLUX.decode(model, flow.sample(velocity, noise, sigmas), pictures.SIZE, pictures.SIZE)

        self._sample = jax.jit(sample, static_argnames=("guidance", "distilled"))

    def __call__(self, params: Params, guidance: float, distilled: bool, path: pathlib.Path) -> None:
        """Saves a sheet as PNG."""
        images = pictures.to_uint8(self._sample(params, guidance, distilled))
        pictures.sheet(images, 2 * self._columns).save(path)


def write_pipeline(
    params: Params, networks: FlowNetworks, vae: pathlib.Path, workdir: pathlib.Path, target: pathlib.Path
) -> None:
    """Writes the pipeline in our format to ``workdir/ours`` and as a diffusers folder, in bfloat16, to ``target``."""
    ours = workdir / "ours"
    for name, component in FLUX.components.items():
        if name in params:
            folder.save(ours / name, component.network, networks.configs[name], params[name])
    shutil.copytree(vae, ours / "vae", dirs_exist_ok=True)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(workdir / name, ours / name, dirs_exist_ok=True)
    (ours / "scheduler").mkdir(exist_ok=True)
    (ours / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2) + "\n")
    fresh = target.with_name(f"{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    convert.export_folder(ours, fresh, "diffusers", convert.DTYPES["bfloat16"])
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)
