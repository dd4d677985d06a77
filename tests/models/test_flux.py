"""The transformer against diffusers' ``FluxTransformer2DModel``: outputs and all gradients, float32; and its files."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig
from diffusers.loaders import single_file_utils
from diffusers.models.embeddings import get_timestep_embedding
from helpers import references

from srpo_jax.families.flux import image_ids, text_ids
from srpo_jax.models import block_cache
from srpo_jax.models.compute import Compute, abstract, bind, build
from srpo_jax.models.flux import Flux, FluxConfig
from srpo_jax.models.flux_layers import sinusoid
from srpo_jax.weights import engine
from srpo_jax.weights.flux import bfl_rules, diffusers_rules

TOLERANCE = 1e-5  # of differences, relative to the largest entry


@functools.cache
def reference(guidance: bool):
    """diffusers' tiny random model, its config as ours, its tensors by name."""
    model = references.randomise(references.flux_transformer(guidance=guidance), 0, scale=0.1)
    tensors = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    return model, FluxConfig.from_dict(dict(model.config)), tensors


def ours(guidance: bool, compute: Compute = Compute()):  # noqa: B008  (frozen)
    """Our graph definition and the reference's parameters."""
    _, config, tensors = reference(guidance)
    graphdef, like = abstract(lambda rngs: Flux(config, compute, rngs=rngs))
    return graphdef, jax.tree.map(jnp.asarray, engine.to_params(diffusers_rules(config), tensors, like))


def make_inputs(guidance: bool, batch: int = 3, height: int = 4, width: int = 6, length: int = 5) -> dict:
    """Random inputs by diffusers' argument names; height and width in latents."""
    rng = np.random.default_rng(0)
    arrays = {
        "hidden_states": rng.normal(size=(batch, height * width // 4, 64)),
        "encoder_hidden_states": rng.normal(size=(batch, length, 24)),
        "pooled_projections": rng.normal(size=(batch, 20)),
        "timestep": rng.uniform(0.05, 1.0, size=batch),
        "guidance": rng.uniform(1.0, 4.0, size=batch) if guidance else None,
        "img_ids": image_ids(height // 2, width // 2),
        "txt_ids": text_ids(length),
    }
    return {name: None if array is None else array.astype(np.float32) for name, array in arrays.items()}


def call(graphdef, params, arrays: dict) -> jax.Array:
    """Our network with diffusers' argument names."""
    text = arrays["encoder_hidden_states"], arrays["pooled_projections"]
    ids = arrays["img_ids"], arrays["txt_ids"]
    return bind(graphdef, params)(arrays["hidden_states"], *text, arrays["timestep"], arrays["guidance"], *ids)


def error(a, b) -> float:
    """Largest difference, relative to the largest entry of ``b``."""
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("shape", [{}, {"batch": 1, "height": 8, "width": 2, "length": 1}])
def test_output_is_diffusers(guidance, shape):
    model, _, _ = reference(guidance)
    arrays = make_inputs(guidance, **shape)
    with torch.no_grad():
        theirs = model(**{name: None if a is None else torch.tensor(a) for name, a in arrays.items()}).sample
    assert error(jax.jit(functools.partial(call, ours(guidance)[0]))(ours(guidance)[1], arrays), theirs) < TOLERANCE


@pytest.mark.parametrize("guidance", [True, False])
def test_gradients_are_diffusers(guidance):
    model, config, _ = reference(guidance)
    arrays = make_inputs(guidance)
    for name in ("timestep", "guidance") if guidance else ("timestep",):
        arrays[name] = arrays[name] * np.float32(0.004)  # see test_sinusoid_is_diffusers
    weights = np.random.default_rng(1).normal(size=arrays["hidden_states"].shape).astype(np.float32)
    inputs = ("hidden_states", "encoder_hidden_states", "pooled_projections")

    tensors = {name: None if a is None else torch.tensor(a) for name, a in arrays.items()}
    for name in inputs:
        tensors[name].requires_grad_()
    model.zero_grad()
    (model(**tensors).sample * torch.tensor(weights)).sum().backward()

    graphdef, params = ours(guidance)

    @jax.jit
    def gradients(params, chosen):
        return jax.grad(lambda p, c: jnp.sum(call(graphdef, p, arrays | c) * weights), (0, 1))(params, chosen)

    by_params, by_inputs = gradients(params, {name: arrays[name] for name in inputs})
    for name in inputs:
        assert error(by_inputs[name], tensors[name].grad) < TOLERANCE, name
    by_params = engine.from_params(diffusers_rules(config), by_params)
    theirs = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    assert by_params.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert np.abs(gradient).max() > 0, name
        assert error(by_params[name], gradient) < TOLERANCE, name


def test_sinusoid_is_diffusers():
    """Two of torch's frequencies are not correctly rounded: at angles up to 4,000 the last bit is 2.4e-4."""
    values = np.array([0.0, 0.001, 0.4940067, 0.822, 1.0, 3.5], np.float32)
    theirs = get_timestep_embedding(torch.tensor(values) * 1000, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    np.testing.assert_allclose(sinusoid(values), theirs.numpy(), atol=2.5e-4)
    np.testing.assert_allclose(sinusoid(values[:2]), theirs.numpy()[:2], atol=2e-7)


@pytest.mark.parametrize(
    "options",
    [{"remat": "full"}, {"remat": "dots"}, {"remat": "out+attention"}, {"scan_unroll": 3}, {"rotary": "product"}],
    ids=str,
)
def test_execution_options_change_nothing(options):
    arrays = make_inputs(True)

    def gradient(compute: Compute):
        graphdef, params = ours(True, compute)
        return jax.jit(jax.grad(lambda p: jnp.sum(call(graphdef, p, arrays) ** 2)))(params)

    plain, other = engine.flatten(gradient(Compute())), engine.flatten(gradient(Compute(**options)))
    assert max(error(other[name], plain[name]) for name in plain) < TOLERANCE


def positional(arrays: dict) -> tuple:
    """Inputs in the order in which our network takes them."""
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance")
    return tuple(arrays[name] for name in (*names, "img_ids", "txt_ids"))


def through_cache(graphdef, ends):
    @jax.jit
    def run(params, inputs, change, renew):
        network, (latents, text, *vectors, image_ids, text_ids) = bind(graphdef, params), inputs
        modulations = network.modulations(*vectors)
        given = latents, text, modulations, image_ids, text_ids
        return block_cache.velocity(network, given, change, renew, ends)

    return run


def test_cached_blocks_are_diffusers_first_block_cache():
    """One evaluation that runs everything and two, of other states and times, that run the first block alone."""
    graphdef, params = ours(True)
    states = [make_inputs(True) for _ in range(3)]
    for index, arrays in enumerate(states):
        arrays["hidden_states"] = arrays["hidden_states"] * np.float32(1 - 0.2 * index)
        # See test_sinusoid_is_diffusers.
        arrays["timestep"] = arrays["timestep"] * np.float32(0.004 * (1 - 0.3 * index))
        arrays["guidance"] = arrays["guidance"] * np.float32(0.004)
    model = references.randomise(references.flux_transformer(guidance=True), 0, scale=0.1)
    model.enable_cache(FirstBlockCacheConfig(threshold=np.inf))
    with torch.no_grad(), model.cache_context("sample"):
        theirs = [model(**{name: torch.tensor(a) for name, a in arrays.items()}).sample for arrays in states]
    change = block_cache.no_change(bind(graphdef, params), 3, 5 + 6)
    for index, arrays in enumerate(states):
        found, change = through_cache(graphdef, (1, 0))(params, positional(arrays), change, index == 0)
        assert error(found, theirs[index]) < TOLERANCE
        assert index == 0 or error(call(graphdef, params, arrays), theirs[index]) > 0.01


@pytest.mark.parametrize("ends", [(0, 0), (1, 0), (0, 2), (2, 1), (2, 3)])
def test_a_cache_of_the_same_state_changes_nothing(ends):
    """Whether the blocks between the ends run or what they changed is added; there are 2 double and 3 single blocks."""
    graphdef, params = ours(True)
    arrays, run = make_inputs(True), through_cache(graphdef, ends)
    plain = call(graphdef, params, arrays)
    blank = block_cache.no_change(bind(graphdef, params), 3, 5 + 6)
    renewed, change = run(params, positional(arrays), blank, True)
    kept, same = run(params, positional(arrays), change, False)
    assert error(renewed, plain) < TOLERANCE and error(kept, plain) < TOLERANCE
    np.testing.assert_array_equal(same, change)
    assert bool(change.any()) == (ends != (2, 3))
    assert (error(run(params, positional(arrays), blank, False)[0], plain) > 0.01) == (ends != (2, 3))


def test_bfloat16_keeps_time_and_norms_in_float32():
    arrays = make_inputs(True)
    exact = call(*ours(True), arrays)
    graphdef, params = ours(True, Compute(dtype=jnp.bfloat16))
    rounded = call(graphdef, params, arrays)
    assert rounded.dtype == jnp.bfloat16
    assert error(rounded.astype(jnp.float32), exact) < 0.03
    # In bfloat16, 1000 * 0.822 would be 820.
    near = jnp.array([0.822, 0.8205], jnp.float32)
    assert sinusoid(near).dtype == jnp.float32
    assert np.abs(np.diff(sinusoid(near), axis=0)).max() > 0.5


def test_constrain_sees_all_activations():
    seen = []
    compute = Compute(constrain=lambda x, name: seen.append((name, x.ndim)) or x)
    graphdef, params = ours(True, compute)
    jax.eval_shape(functools.partial(call, graphdef), params, make_inputs(True))
    assert set(seen) == {("tokens", 3), ("heads", 4), ("features", 2), ("vectors", 2)}


def test_random_parameters_are_finite_and_differ_by_layer():
    _, config, _ = reference(True)
    graphdef, params = build(lambda rngs: Flux(config, Compute(), rngs=rngs), 3)
    kernel = params["double_blocks"]["img_attn"]["qkv"]["kernel"]
    assert kernel.shape == (2, 32, 3, 2, 16)
    assert not np.array_equal(kernel[0], kernel[1])
    assert bool(jnp.isfinite(call(graphdef, params, make_inputs(True))).all())


def test_wrong_use_is_refused():
    arrays = make_inputs(True)
    with pytest.raises(ValueError, match="guidance must be given"):
        call(*ours(True), arrays | {"guidance": None})
    with pytest.raises(ValueError, match="guidance must not be given"):
        call(*ours(False), arrays)
    values = dict(reference(True)[0].config)
    with pytest.raises(ValueError, match="lacks num_layers"):
        FluxConfig.from_dict({key: value for key, value in values.items() if key != "num_layers"})
    with pytest.raises(ValueError, match="patch_size"):
        FluxConfig.from_dict(values | {"patch_size": 2})
    with pytest.raises(ValueError, match="axes_dims_rope"):
        FluxConfig.from_dict(values | {"axes_dims_rope": (16, 56, 56)})


# --- files ---


@functools.cache
def diffusers_converter(width: int):
    """diffusers' own conversion of BFL files, which is written for FLUX.1's width, for another one."""
    function = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
    source = inspect.getsource(function)
    assert source.count("3072") == 1
    names = dict(vars(single_file_utils))
    exec(source.replace("3072", str(width)), names)
    return names[function.__name__]


@pytest.mark.parametrize("guidance", [True, False])
def test_bfl_files_are_what_diffusers_reads(guidance):
    _, config, tensors = reference(guidance)
    _, params = ours(guidance)
    bfl = engine.from_params(bfl_rules(config), params)
    back = diffusers_converter(config.width)({name: torch.tensor(tensor) for name, tensor in bfl.items()})
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name].numpy(), tensor, err_msg=name)
    again = engine.flatten(engine.to_params(bfl_rules(config), bfl, params))
    for name, leaf in engine.flatten(params).items():
        np.testing.assert_array_equal(again[name], leaf, err_msg=name)


def test_bfl_names_are_those_of_the_published_file():
    """Spot checks of names and shapes in ``flux1-dev.safetensors``, at this size."""
    _, config, _ = reference(True)
    shapes = {name: tensor.shape for name, tensor in engine.from_params(bfl_rules(config), ours(True)[1]).items()}
    width = config.width
    assert shapes["double_blocks.1.img_attn.qkv.weight"] == (3 * width, width)
    assert shapes["double_blocks.0.txt_attn.norm.key_norm.scale"] == (config.attention_head_dim,)
    assert shapes["double_blocks.0.txt_mlp.2.weight"] == (width, 4 * width)
    assert shapes["single_blocks.2.linear1.weight"] == (7 * width, width)
    assert shapes["single_blocks.2.linear2.bias"] == (width,)
    assert shapes["single_blocks.0.modulation.lin.weight"] == (3 * width, width)
    assert shapes["final_layer.adaLN_modulation.1.bias"] == (2 * width,)
    assert shapes["guidance_in.out_layer.weight"] == (width, width)
