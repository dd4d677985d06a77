"""What the methods ask for, on a velocity field that can be followed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from srpo_jax import config as config_lib
from srpo_jax.algorithm import direct_align, flow
from srpo_jax.algorithm.batch import Images
from srpo_jax.algorithm.methods import METHODS
from srpo_jax.algorithm.settings import Settings
from srpo_jax.families.flux import FLUX

SHAPE = 2, 3, 4  # samples, tokens, features


def field(x, sigma):
    return jnp.sin(3 * x) + sigma


def settings_of(method, **changes):
    config = config_lib.default()
    config.method = method
    config.update_from_flattened_dict(changes)
    return Settings.from_config(config, FLUX)


def rolled(settings, method, batch=SHAPE[0]):
    """A rollout through ``field``, the method's own random numbers, and the states that it keeps."""
    noise = jax.random.normal(jax.random.key(1), SHAPE)
    own = method.draw(settings, lambda purpose: jax.random.fold_in(jax.random.key(2), purpose), SHAPE)
    keep = method.keep(settings, own, batch)
    sigmas = flow.shifted_schedule(settings.rollout_steps, settings.shift)
    latents, states, _ = flow.sample(lambda x, sigma, *_: (field(x, sigma), ()), noise, sigmas, keep)
    return Images(latents, noise, states), own, sigmas


def recovered(terms, index):
    term = jax.tree.map(lambda leaf: leaf[index], terms)
    v = field(term.noisy, flow.per_sample(term.sigma_from, term.noisy.ndim))
    return direct_align.recover(term.noisy, v, term.noise, term.sigma_from, term.sigma_to)


def test_draft_lv_takes_the_rollouts_own_last_step_too():
    """The first term's image is the rollout's, reached by the step that made it; the loss is the mean of 1 + n."""
    settings, method = settings_of("draft_lv", **{"draft_lv.renoisings": 3, "rollout.steps": 5}), METHODS["draft_lv"]
    images, own, sigmas = rolled(settings, method)
    terms = method.terms(settings, images, own)
    assert method.names(settings) == ("base", "renoised", "renoised", "renoised")
    assert terms.noisy.shape == (4, *SHAPE)
    np.testing.assert_allclose(recovered(terms, 0), images.latents, atol=1e-6)
    for index in (1, 2, 3):
        fresh = flow.add_noise(images.latents, own[:, index - 1], terms.sigma_from[index])
        np.testing.assert_allclose(terms.noisy[index], fresh, atol=1e-6)
        assert float(jnp.abs(recovered(terms, index) - images.latents).max()) > 1e-3
    np.testing.assert_allclose(terms.weight, 1 / 4)
    np.testing.assert_allclose(terms.sigma_from, sigmas[-2])


def test_draft_lv_of_pictures_that_no_rollout_made():
    settings = settings_of("draft_lv", **{"draft_lv.renoisings": 2, "data.images": "stored"})
    noises = jnp.zeros((SHAPE[0], 2, *SHAPE[1:]))
    terms = METHODS["draft_lv"].terms(settings, Images(jnp.ones(SHAPE), jnp.ones(SHAPE)), noises)
    assert METHODS["draft_lv"].names(settings) == ("renoised", "renoised") and len(terms.weight) == 2
    np.testing.assert_allclose(terms.weight, 1 / 2)


def test_refl_starts_from_the_state_of_its_late_step():
    settings, method = (
        settings_of("refl", **{"rollout.steps": 6, "refl.late_steps": 2, "rollout.draws": "per_sample"}),
        METHODS["refl"],
    )
    images, step, sigmas = rolled(settings, method)
    terms = method.terms(settings, images, step)
    assert set(np.asarray(step)) <= {4, 5}
    np.testing.assert_allclose(terms.sigma_from[0], sigmas[np.asarray(step)])
    for sample, last in enumerate(np.asarray(step) == 5):
        same = np.allclose(recovered(terms, 0)[sample], images.latents[sample], atol=1e-6)
        assert same == last  # before the last step, one long step leads elsewhere than two


@pytest.mark.parametrize("name", ["srpo", "direct_align", "refl", "draft_lv"])
def test_as_many_terms_as_names(name):
    settings, method = settings_of(name), METHODS[name]
    own = method.draw(settings, lambda purpose: jax.random.fold_in(jax.random.key(2), purpose), SHAPE)
    keep = method.keep and method.keep(settings, own, SHAPE[0])
    states = None if keep is None else jnp.zeros((*keep.shape, *SHAPE[1:]))
    terms = method.terms(settings, Images(jnp.ones(SHAPE), jnp.ones(SHAPE), states), own)
    assert {leaf.shape[:2] for leaf in jax.tree.leaves(terms)} == {(len(method.names(settings)), SHAPE[0])}
    np.testing.assert_allclose(jnp.sum(terms.weight, 0) if name != "direct_align" else 1, 1, rtol=1e-6)
