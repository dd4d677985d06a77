"""The autoencoder against diffusers: outputs, gradients, both file formats, rematerialisation, errors."""

import json
import re

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from helpers import parity, references
from safetensors.numpy import load_file

from srpo_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from srpo_jax.models.compute import Compute, abstract, bind, build
from srpo_jax.weights import autoencoder as tables
from srpo_jax.weights import engine
from srpo_jax.weights.rules import Table

# name: (sizes that differ from the references' own, latents' batch, height, width)
CASES = {
    "one block": ({"latent_channels": 4}, (2, 4, 4)),
    "two blocks, wide picture": ({"layers_per_block": 2, "block_out_channels": (8, 16, 16, 24)}, (1, 2, 5)),
    "three resolutions, tall picture": (
        {
            "block_out_channels": (8, 12, 12), "norm_num_groups": 2, "latent_channels": 5,
            "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
        },
        (3, 5, 3),
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A random model of diffusers; config, our parameters and tensors from its files; the latents' shape."""
    changes, shape = CASES[request.param]
    model = references.autoencoder(**changes)
    path = tmp_path_factory.mktemp("vae")
    model.save_pretrained(path)
    config = AutoencoderConfig.from_dict(json.loads((path / "config.json").read_text()))
    tensors = load_file(path / "diffusion_pytorch_model.safetensors")
    _, like = abstract(lambda rngs: Autoencoder(config, Compute(), rngs=rngs))
    params = engine.to_params(tables.diffusers_rules(config), tensors, like)
    return model, config, jax.tree.map(jnp.asarray, params), tensors, shape


def network(config: AutoencoderConfig, compute: Compute = Compute()):  # noqa: B008 (frozen)
    return abstract(lambda rngs: Autoencoder(config, compute, rngs=rngs))[0]


def to_torch(array: np.ndarray) -> torch.Tensor:
    """NHWC -> a contiguous NCHW tensor."""
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """NCHW -> NHWC."""
    return tensor.detach().numpy().transpose(0, 2, 3, 1)


def value_and_pull(function, params, inputs, cotangents):
    """A function's value, and its gradients by parameters and inputs for the cotangents of the value; one program."""

    def both(params, inputs, cotangents):
        value, pull = jax.vjp(function, params, inputs)
        return value, *pull(cotangents)

    return jax.jit(both)(params, inputs, cotangents)


def assert_same_gradients(ours, model: torch.nn.Module, config: AutoencoderConfig, side: str) -> None:
    """Compares the gradients of the encoder's or the decoder's parameters; the other side took no part."""
    rules = tables.diffusers_rules(config).rules
    table = Table(tuple(rule for rule in rules if rule.targets[0].startswith(side)))
    others = tuple(name for name, _ in model.named_parameters() if not name.startswith(side))
    parity.assert_same_gradients({side: ours[side]}, model, table, others)


def test_decoder(case):
    """Pictures, and gradients by latents and every parameter of the decoder, are those of diffusers."""
    model, config, params, _, (batch, height, width) = case
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(batch, height, width, config.latent_channels)).astype(np.float32)
    theirs_in = to_torch(latents).requires_grad_()
    theirs = model.decode(theirs_in).sample
    cotangent = rng.normal(size=to_numpy(theirs).shape).astype(np.float32)
    model.zero_grad()
    theirs.backward(to_torch(cotangent))
    graphdef = network(config)

    ours, by_params, by_latents = value_and_pull(
        lambda params, latents: bind(graphdef, params).decode(latents), params, latents, cotangent
    )

    assert ours.shape == (batch, config.factor * height, config.factor * width, 3)
    assert parity.relative_error(ours, to_numpy(theirs)) < parity.TOLERANCE
    assert parity.relative_error(by_latents, to_numpy(theirs_in.grad)) < parity.TOLERANCE
    assert_same_gradients(by_params, model, config, "decoder")


def test_encoder(case):
    """The moments of latents, and gradients by pixels and every parameter of the encoder, are those of diffusers."""
    model, config, params, _, (batch, height, width) = case
    rng = np.random.default_rng(1)
    images = rng.uniform(-1, 1, (batch, config.factor * height, config.factor * width, 3)).astype(np.float32)
    theirs_in = to_torch(images).requires_grad_()
    theirs = model.encode(theirs_in).latent_dist
    shape = (batch, height, width, config.latent_channels)
    cotangents = tuple(rng.normal(size=shape).astype(np.float32) for _ in range(2))
    model.zero_grad()
    torch.autograd.backward([theirs.mean, theirs.logvar], [to_torch(cotangent) for cotangent in cotangents])
    graphdef = network(config)

    ours, by_params, by_images = value_and_pull(
        lambda params, images: bind(graphdef, params).encode(images), params, images, cotangents
    )

    assert parity.relative_error(ours[0], to_numpy(theirs.mean)) < parity.TOLERANCE
    assert parity.relative_error(ours[1], to_numpy(theirs.logvar)) < parity.TOLERANCE
    assert parity.relative_error(by_images, to_numpy(theirs_in.grad)) < parity.TOLERANCE
    assert_same_gradients(by_params, model, config, "encoder")


def test_files(case):
    """Both tables are exact in both directions, and diffusers reads BFL's keys as we write them."""
    model, config, params, tensors, _ = case
    parity.assert_exact_round_trip(tables.diffusers_rules(config), tensors, params)
    bfl = engine.from_params(tables.bfl_rules(config), params)
    parity.assert_exact_round_trip(tables.bfl_rules(config), bfl, params)
    # diffusers' own reader of such files, an implementation that shares nothing with ours.
    read = convert_ldm_vae_checkpoint({name: torch.tensor(np.array(t)) for name, t in bfl.items()}, dict(model.config))
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(read[name].numpy(), tensor, name)


def test_bfl_names():
    """The names of FLUX.1's ae.safetensors: how many, and some that are easily mistaken."""
    config = AutoencoderConfig()
    _, like = abstract(lambda rngs: Autoencoder(config, Compute(), rngs=rngs))
    shapes = {name: leaf.shape for name, leaf in engine.flatten(like).items()}
    names = engine.source_shapes(tables.bfl_rules(config), shapes)
    assert len(names) == len(engine.source_shapes(tables.diffusers_rules(config), shapes)) == 244
    assert sum(np.prod(shape) for shape in names.values()) == 83_819_683
    assert names["encoder.conv_out.weight"] == (32, 512, 3, 3)
    assert names["encoder.down.1.block.0.nin_shortcut.weight"] == (256, 128, 1, 1)
    assert names["encoder.down.2.downsample.conv.weight"] == (512, 512, 3, 3)
    assert names["encoder.mid.attn_1.q.weight"] == (512, 512, 1, 1)
    # The finest level of the decoder is number 0, and the only one without upsampling.
    assert names["decoder.up.0.block.0.conv1.weight"] == (128, 256, 3, 3)
    assert names["decoder.up.3.block.2.conv2.weight"] == (512, 512, 3, 3)
    assert "decoder.up.0.upsample.conv.weight" not in names and "decoder.up.3.upsample.conv.weight" in names


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_nothing(remat):
    """Outputs and gradients with rematerialisation are those without, and blocks are in fact recomputed."""
    config = AutoencoderConfig(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, latent_channels=3)
    _, params = build(lambda rngs: Autoencoder(config, Compute(), rngs=rngs))
    latents = np.random.default_rng(0).normal(size=(2, 3, 4, 3)).astype(np.float32)

    def value_and_gradient(remat: str):
        graphdef = network(config, Compute(remat=remat))
        function = jax.value_and_grad(lambda params: jnp.sum(jnp.square(bind(graphdef, params).decode(latents))))
        return jax.jit(function)(params), str(jax.make_jaxpr(function)(params))

    (kept, kept_program), (redone, redone_program) = value_and_gradient("none"), value_and_gradient(remat)
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(redone), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(np.abs(a).max()))
    assert "checkpoint" not in kept_program and redone_program.count("prevent_cse") >= 8


def test_dtypes():
    """bfloat16 in the middle, float32 at the ends, near the float32 result; parameters are kept in their own dtype."""
    config = AutoencoderConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=2, latent_channels=3)
    graphdef, params = build(lambda rngs: Autoencoder(config, Compute(), rngs=rngs))
    half = Compute(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    half_graphdef, half_like = abstract(lambda rngs: Autoencoder(config, half, rngs=rngs))
    wide = {name for name, leaf in engine.flatten(half_like).items() if leaf.dtype == jnp.float32}
    assert wide == {name for name in engine.flatten(half_like) if "norm" in name}
    half_params = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), params, half_like)
    images = np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 3)).astype(np.float32)

    def there_and_back(graphdef, params, images):
        mean, logvar = bind(graphdef, params).encode(images)
        return mean, logvar, bind(graphdef, params).decode(mean)

    whole = jax.jit(there_and_back, static_argnums=0)(graphdef, params, images)
    short = jax.jit(there_and_back, static_argnums=0)(half_graphdef, half_params, images)
    for ours, theirs in zip(short, whole, strict=True):
        assert ours.dtype == jnp.float32
        assert 1e-6 < parity.relative_error(ours, theirs) < 0.05
    program = str(jax.make_jaxpr(there_and_back, static_argnums=0)(half_graphdef, half_params, images))
    convolutions = re.findall(r":(\w+)\[[\d,]*\] = conv_general_dilated", program)
    assert len(convolutions) > 10 and set(convolutions) == {"bf16"}


def unbuilt(config: AutoencoderConfig) -> Autoencoder:
    """The network without numbers, for what does not touch its parameters."""
    return bind(*abstract(lambda rngs: Autoencoder(config, Compute(), rngs=rngs)))


def test_scaling():
    """FLUX's constants, both ways."""
    model = unbuilt(AutoencoderConfig())
    assert model.config.factor == 8
    raw = np.random.default_rng(0).normal(size=(1, 2, 2, 16)).astype(np.float32)
    scaled = model.scale_latents(raw)
    np.testing.assert_allclose(scaled, (raw - 0.1159) * 0.3611, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.unscale_latents(scaled), raw, rtol=1e-5, atol=1e-5)


def test_errors():
    """What the network cannot be or take is said in one line."""
    known = dict(diffusers.AutoencoderKL(block_out_channels=(32,), shift_factor=0.1).config)
    with pytest.raises(ValueError, match="use_quant_conv=True; only False"):
        AutoencoderConfig.from_dict(known)
    known |= {"use_quant_conv": False, "use_post_quant_conv": False}
    assert AutoencoderConfig.from_dict(known).block_out_channels == (32,)
    with pytest.raises(ValueError, match="lacks shift_factor"):
        AutoencoderConfig.from_dict(known | {"shift_factor": None})
    with pytest.raises(ValueError, match="act_fn='gelu'"):
        AutoencoderConfig.from_dict(known | {"act_fn": "gelu"})
    with pytest.raises(ValueError, match="down_block_types"):
        AutoencoderConfig.from_dict(known | {"down_block_types": ["AttnDownBlock2D"]})
    with pytest.raises(ValueError, match="norm_num_groups=32 does not divide the width 40"):
        AutoencoderConfig(block_out_channels=(32, 40))
    config = AutoencoderConfig(block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=2, latent_channels=3)
    model = unbuilt(config)
    with pytest.raises(ValueError, match="9x8 cannot be encoded: make both sides multiples of 2"):
        model.encode(np.zeros((1, 9, 8, 3), np.float32))
