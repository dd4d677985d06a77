"""FLUX.1's geometry, positions and schedule, against diffusers' pipeline."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from srpo_jax import schema
from srpo_jax.errors import UserError
from srpo_jax.families.flux import FLUX, Scheduler, image_ids, pipeline_schedule


def test_packing_is_that_of_flux_and_inverts():
    latents = np.random.default_rng(0).normal(size=(2, 4, 6, 16)).astype(np.float32)
    nchw = torch.tensor(latents).permute(0, 3, 1, 2)
    expected = nchw.view(2, 16, 2, 2, 3, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 6, 64).numpy()
    packed = FLUX.pack(jnp.asarray(latents))
    np.testing.assert_array_equal(packed, expected)
    np.testing.assert_array_equal(FLUX.unpack(packed, 32, 48), latents)


def test_image_ids_are_row_and_column():
    ids = image_ids(2, 3).reshape(2, 3, 3)
    assert (ids[1, 2] == [0, 1, 2]).all()
    assert image_ids(2, 3).shape == (6, 3)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(("steps", "tokens"), [(4, 16), (28, 2025), (50, 4096)])
def test_pipeline_schedule_is_diffusers(steps, tokens, dynamic):
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic, base_shift=0.5, max_shift=1.15)
    config = dict(scheduler.config)
    mu = calculate_shift(tokens, config["base_image_seq_len"], config["max_image_seq_len"], 0.5, 1.15)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    np.testing.assert_allclose(
        pipeline_schedule(steps, tokens, schema.read(Scheduler, config, "scheduler")),
        scheduler.sigmas.numpy(),
        rtol=3e-7,
    )


def test_sizes_of_pictures():
    assert FLUX.latent_shape(720, 512) == (90, 64, 16) and FLUX.token_shape(720, 512) == (45 * 32, 64)
    FLUX.check_size(720, 16, ("a", "b"))
    for size, message in (((720, 700), "b=700: must be a positive multiple of 16"), ((0, 16), "a=0: must be")):
        with pytest.raises(UserError, match=message):
            FLUX.check_size(*size, ("a", "b"))
