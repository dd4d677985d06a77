"""The mesh, and the table of rules at full size; test_many_devices runs what they lay out."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from srpo_jax import optim, sharding
from srpo_jax.config import default
from srpo_jax.errors import UserError
from srpo_jax.families.flux import DEV
from srpo_jax.models import lora
from srpo_jax.models.clip import VIT_H_14
from srpo_jax.weights import engine, folder

FULL_SIZE = {
    "flux": DEV.transformer,
    "autoencoder": DEV.autoencoder,
    "clip": VIT_H_14,
    "clip_text": DEV.text["text_encoder"],
    "t5": DEV.text["text_encoder_2"],
}


@functools.cache
def parameters(network):
    return folder.abstract(network, FULL_SIZE[network])[1]


def quantised_with_factors():
    """FLUX.1-dev's parameters under LoRA on every layer."""
    return lora.abstract(folder.constructor("flux", DEV.transformer), lora.Lora(16, 16.0, (".*",), "nf4"))[1]


class Sizes:
    def __init__(self, data, fsdp, tensor):
        self.data, self.fsdp, self.tensor = data, fsdp, tensor


# --- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", FULL_SIZE)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 8, 1), (1, 16, 4), (1, 64, 1), (1, 256, 1)])
def test_every_parameter_of_full_size_has_its_place(network, shape):
    """A v5e pod's 256 devices divide everything; what stays whole on every device is small."""
    mesh = AbstractMesh(shape, sharding.AXES)
    params = parameters(network)
    places = engine.flatten(sharding.of_tree(mesh, network, params))
    shapes = {name: leaf.shape for name, leaf in engine.flatten(params).items()}
    held = sum(math.prod(places[name].shard_shape(shape)) for name, shape in shapes.items())
    share = held / sum(map(math.prod, shapes.values()))
    if network == "autoencoder":  # small, and on every device
        assert share == 1
    else:
        # Tables of vocabularies, a third of CLIP-L's parameters, are not split along "tensor".
        bound = 0.005 if mesh.shape["tensor"] == 1 else 0.02
        assert 0 <= share - 1 / (mesh.shape["fsdp"] * mesh.shape["tensor"]) < bound


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 8, 1), (1, 16, 4), (1, 64, 1)])
def test_every_factor_and_code_of_full_size_has_its_place(shape):
    """What stays whole on every device beside 4-bit weights: the scales, and factors along the rank."""
    mesh = AbstractMesh(shape, sharding.AXES)
    params = quantised_with_factors()
    places = engine.flatten(sharding.of_tree(mesh, "flux", params))
    shapes = {name: leaf.shape for name, leaf in engine.flatten(params).items()}
    kinds = {kind: {name for name in shapes if name.endswith(kind)} for kind in (".codes", ".lora_a", ".lora_b")}
    assert {kind: len(names) for kind, names in kinds.items()} == {".codes": 14, ".lora_a": 14, ".lora_b": 14}
    split = {
        name for names in kinds.values() for name in names if places[name].shard_shape(shapes[name]) != shapes[name]
    }
    if mesh.size == 1:
        assert not split
    elif mesh.shape["tensor"] == 1:  # of the factors, those that lie along "fsdp"
        assert kinds[".codes"] < split
    else:
        assert split == set().union(*kinds.values())


def test_every_rule_is_used():
    """By the first rule that matches, as always: a rule that an earlier one hides would be a mistake."""
    used: dict[tuple, set] = {}
    for network in FULL_SIZE:
        paths = list(engine.flatten(parameters(network)))
        if network == "flux":
            paths += engine.flatten(quantised_with_factors())
        patterns = [pattern for pattern, _ in folder.classes(network)[1].RULES]
        found = used.setdefault(tuple(patterns), set())  # Clip and ClipText share theirs
        found |= {next(pattern for pattern in patterns if re.fullmatch(pattern, path)) for path in paths}
    assert len(used) == 4
    for patterns, found in used.items():
        assert found == set(patterns)


def test_a_parameter_without_a_rule():
    with pytest.raises(ValueError, match="no rule of the flux network .* matches its parameter new.kernel"):
        sharding.spec("flux", "new.kernel")


def test_an_indivisible_dimension_names_the_parameter():
    place = sharding.of(AbstractMesh((1, 7, 5), sharding.AXES), "flux")
    message = r"config\.mesh\.fsdp=7 does not divide the dimension 3072 of flux\.double_blocks\.img_mod\.kernel"
    with pytest.raises(UserError, match=message):
        place("double_blocks.img_mod.kernel", (19, 3072, 18432))
    with pytest.raises(UserError, match=r"config\.mesh\.tensor=5 does not divide the dimension 24"):
        place("double_blocks.img_attn.qkv.bias", (19, 3, 24, 128))


@pytest.mark.parametrize(
    ("weights", "moments", "each"),
    [("float32", "float32", 12), ("bfloat16", "bfloat16", 6), ("bfloat16", "float8", 4 + 2 * 4 / 128)],
)
def test_the_optimizer_of_full_size(weights, moments, each):
    """Bytes of weights and moments a parameter; moments lie where their parameters lie, and so do their scales."""
    config = default().optim
    config.weights, config.moments = weights, moments
    mesh, params = AbstractMesh((1, 8, 2), sharding.AXES), parameters("flux")
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, weights), params)
    places = sharding.of_tree(mesh, "flux", params)
    optimizer = optim.make_optimizer(config)
    abstract = jax.eval_shape(optimizer.init, params)
    found = sharding.of_optimizer(mesh, optimizer, params, places)
    wanted = engine.flatten(places)
    for moment, where in ((abstract.mean, found.mean), (abstract.root, found.root)):
        assert engine.flatten(where.values) == wanted
        kinds = {leaf.dtype for leaf in jax.tree.leaves(moment.values)}
        assert kinds == {jnp.dtype(optim.FLOAT8 if moments == "float8" else moments)}
    bytes_of = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((params, abstract))]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert sum(bytes_of) / count == pytest.approx(each, rel=1e-3)
    if moments == "float8":
        scales = engine.flatten(found.root.scale)
        whole = [name for name in scales if scales[name].spec != wanted[name].spec and wanted[name].spec != P()]
        assert whole == []
