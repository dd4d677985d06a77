"""A chain of passes on eight virtual devices, split along the batch, parameters and heads, against one device."""

import json
import pathlib

import jax
import numpy as np
from helpers import children, tiny

from srpo_jax import architectures, conditions, program, sharding
from srpo_jax.data.loading import Examples
from srpo_jax.weights import engine

MESHES = {"one": (1, 1, 1), "all": (2, 2, 2)}


def update_on_both(models):
    """Child: one update of LeapAlign on one device and on eight, whose weights and nesting read whole samples."""
    metrics, moments = {}, {}
    for name, (data, fsdp, tensor) in MESHES.items():
        config = tiny.config(
            pathlib.Path(models), method="leapalign", data__batch_size=8, rollout__steps=3,
            rollout__draws="per_sample", leapalign__tau=1e-3, reward__margin=5.0, mesh__data=data, mesh__fsdp=fsdp,
            mesh__tensor=tensor,
        )  # fmt: skip
        mesh = sharding.make_mesh(config.mesh, jax.devices()[: data * fsdp * tensor])
        architecture = architectures.read(config)
        built = program.build(config, mesh, architecture)
        encode = conditions.prompt_encoder(config, built, architecture)
        prompts = [tiny.PROMPTS[i % 7] for i in sharding.local_rows(mesh, 8)]
        batch = conditions.Conditioner(config, built, encode).batch(Examples(prompts, {}), 1)
        state, frozen = program.initial_state(config, built), program.load_frozen(config, built)
        state, found = built.lower().compile()(state, frozen, batch)
        metrics[name] = {key: float(value) for key, value in found.items()}
        mean = engine.flatten(jax.device_get(state.opt_state.mean.values))
        moments[name] = np.concatenate([np.ravel(mean[path]) for path in sorted(mean)])
    distances = {
        name: float(np.linalg.norm(found - moments["one"]) / np.linalg.norm(found)) for name, found in moments.items()
    }
    print(json.dumps({"metrics": metrics, "distances": distances}))


def test_eight_devices_give_the_numbers_of_one(models):
    report = children.call(update_on_both, models)
    found, wanted = report["metrics"]["all"], report["metrics"]["one"]
    np.testing.assert_allclose(list(found.values()), [wanted[key] for key in found], rtol=2e-4, atol=1e-6)
    assert report["distances"]["all"] < 5e-5
