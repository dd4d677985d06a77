"""The toy world of ``tests/golden/methods``: a velocity field, a decoder and a reward as small networks of ours."""

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from srpo_jax.algorithm.batch import Batch
from srpo_jax.algorithm.networks import Frozen, Networks
from srpo_jax.algorithm.settings import Settings
from srpo_jax.config import default
from srpo_jax.families.flux import FLUX, FluxFamily
from srpo_jax.models.compute import Compute

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "methods" / "methods.npz")
WEIGHTS = ("W1", "Wm", "wt", "wg", "Wc", "b1", "W2", "b2", "a")


class Field(nnx.Module):
    STACKS, RULES = (), ((r".*", P()),)

    def __init__(self):
        self.compute = Compute()
        for name in WEIGHTS:
            setattr(self, name, nnx.Param(jnp.asarray(GOLDEN[f"field/{name}"])))


class Pixels(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.asarray(GOLDEN["input/decoder"]))


class ToyFamily(FluxFamily):
    """FLUX.1's geometry and shift around the toy field."""

    def prepare(self, transformer, condition, time, guidance):
        f = transformer
        drawn = time[:, None] * f.wt[...] + guidance[:, None] * f.wg[...] + condition["pooled"] @ f.Wc[...] + f.b1[...]
        return {"drawn": drawn}

    def velocity(self, transformer, x, condition, prepared, height, width):
        f = transformer
        inner = x @ f.W1[...] + (x.mean(1) @ f.Wm[...] + prepared["drawn"])[:, None]
        return jnp.tanh(inner) @ f.W2[...] + f.b2[...] + f.a[...] * x

    def decode(self, autoencoder, tokens, height, width):
        return (self.unpack(tokens, height, width) / 0.3611 + 0.1159) @ autoencoder.kernel[...].T


@dataclasses.dataclass(frozen=True)
class ToyReward:
    weight: float = 1.0

    def prepare(self, params, tokens):
        return tokens

    def look(self, params, images):
        features = (images - 0.5).transpose(0, 3, 1, 2).reshape(len(images), -1) @ params
        return features / jnp.linalg.norm(features, axis=-1, keepdims=True)

    def score(self, params, seen, prepared):
        return (seen * prepared).sum(-1)


def world():
    """(networks, parameters, frozen)."""
    (field, params), (pixels, decoder) = (nnx.split(module) for module in (Field(), Pixels()))
    networks = Networks(ToyFamily(), field, pixels, {"toy": ToyReward()})
    frozen = Frozen(nnx.to_pure_dict(decoder), {"toy": jnp.asarray(GOLDEN["input/proj"])})
    return networks, nnx.to_pure_dict(params), frozen


def batch():
    text = jnp.asarray(GOLDEN["input/text"])
    return Batch({"pooled": jnp.asarray(GOLDEN["input/pooled"])}, {"toy": {"caption": text}})


def noise():
    return FLUX.pack(jnp.asarray(GOLDEN["input/noise"]).transpose(0, 2, 3, 1))


def settings(method, **changes):
    """FlowBP's constants: 25 steps, guidance 4, hinge 0.55, the shift by size, times as they are."""
    config = default()
    config.method, config.reward.margin = method, 0.55
    config.data.height = config.data.width = 32
    config.rollout.shift, config.model.truncate_time, config.refl.late_steps = 0.0, False, 11
    config.rollout.guidance = config.align.guidance = float(GOLDEN["input/guidance"])
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return Settings.from_config(config, FLUX)


def relative_error(ours, wanted):
    """Of a gradient against ``wanted``, by name: over all weights together."""
    pairs = [(np.asarray(ours[name], np.float64), np.asarray(wanted[name], np.float64)) for name in WEIGHTS]
    difference, norm = (np.sqrt(sum((x**2).sum() for x in values)) for values in
                        ([a - b for a, b in pairs], [b for _, b in pairs]))  # fmt: skip
    return difference / norm


def recorded(case):
    return {name: GOLDEN[f"{case}/grad_{name}"] for name in WEIGHTS}
