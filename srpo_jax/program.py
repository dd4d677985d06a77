"""What a configuration compiles to: networks, optimiser, the layout of every array, and the jitted update.

``build`` needs the networks' sizes and a mesh, no weights and no accelerator: the same program is compiled ahead of
time for a machine that is not there (``Program.lower``) and run for real on arrays from ``initial_state`` and
``load_frozen``.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from srpo_jax import optim, seeds, sharding
from srpo_jax.algorithm import step
from srpo_jax.algorithm.batch import Batch, Rollout
from srpo_jax.algorithm.networks import Frozen, Networks
from srpo_jax.algorithm.preference import VARIANTS
from srpo_jax.algorithm.settings import Settings
from srpo_jax.algorithm.step import TrainState
from srpo_jax.architectures import Architecture, used_rewards
from srpo_jax.errors import UserError
from srpo_jax.families.base import AUTOENCODER, TRANSFORMER
from srpo_jax.models import attention, lora, rotary
from srpo_jax.models.compute import Compute, Params
from srpo_jax.models.lora import Lora
from srpo_jax.optim import Optimizer
from srpo_jax.rewards import REWARDS
from srpo_jax.weights import adapters, engine, folder, quantized


class Computes(NamedTuple):
    """Execution options of each network: weights that are trained have a dtype of their own."""

    transformer: Compute
    autoencoder: Compute
    reward: Compute
    text: Compute


def attention_of(config: ConfigDict, mesh: Mesh) -> str:
    """The transformer's attention backend: what a configuration asks for, or what "auto" stands for on the mesh."""
    return attention.choose(config.model.attention, mesh.devices.flat[0], config.model.dtype)


def remat_of(config: ConfigDict, part: str, mesh: Mesh) -> str:
    """What a part keeps for its backward pass: what a configuration asks for, or what "auto" stands for on the mesh.

    On CPUs, whose memory is the machine's, that is everything; elsewhere the blocks' inputs alone, and of the
    transformer what has room beside them, which is known once the update was compiled (``costs.keeping``).
    """
    if config.remat[part] != "auto":
        return config.remat[part]
    return "none" if mesh.devices.flat[0].platform == "cpu" else "full"


def computes(config: ConfigDict, mesh: Mesh) -> Computes:
    """The execution options that a configuration asks for."""
    frozen = Compute(
        dtype=jnp.dtype(config.model.dtype),
        param_dtype=jnp.dtype(config.model.dtype),
        attention=attention_of(config, mesh),
        rotary=rotary.choose(mesh.devices.flat[0]),
        scan_unroll=config.model.scan_unroll,
        mesh=mesh,
        constrain=sharding.constraint(mesh),
    )
    # With LoRA the factors are trained, which are float32 always.
    stored = frozen.param_dtype if config.lora.rank else jnp.dtype(config.optim.weights)
    return Computes(
        transformer=dataclasses.replace(frozen, param_dtype=stored, remat=remat_of(config, "transformer", mesh)),
        autoencoder=dataclasses.replace(frozen, remat=remat_of(config, "autoencoder", mesh)),
        # Rewards read 50 to 729 patches or 77 words: too few for a kernel to save memory, with heads (80 wide in
        # ViT-H-14) that kernels do not take. T5 adds a bias to its logits, which not every backend can.
        reward=dataclasses.replace(frozen, attention="xla", remat=remat_of(config, "reward", mesh)),
        text=dataclasses.replace(frozen, attention="xla"),
    )


# On NVIDIA GPUs, cuBLAS's matrix products are faster than XLA's own at FLUX's sizes, and need no tuning when they are
# compiled (docs/performance.md).
GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
# On CPUs, YNNPACK's convolutions, the default, run on one core; without them XLA takes Eigen's, which run on all. What
# it makes of attention, a sum and the product before it in one, is slower than the two. This names what YNNPACK may do:
# nothing. Both are for an update and its parts, not for sampling.
CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": ""}


# On TPUs, weights that are split are gathered whole, beside the work before they are needed. Left to itself, XLA
# multiplies each part as it arrives, and reads, writes and rounds the sum so far in bfloat16 every time
# (docs/performance.md).
TPU_OPTIONS = {
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
}
OPTIONS = {"gpu": GPU_OPTIONS, "cuda": GPU_OPTIONS, "cpu": CPU_OPTIONS, "tpu": TPU_OPTIONS}


def compiler_options(mesh: Mesh) -> dict[str, Any]:
    """What XLA is told for a mesh's devices, unless the environment's XLA_FLAGS, or libtpu's, say otherwise."""
    device = mesh.local_devices[0]
    told = os.environ.get("XLA_FLAGS", "") + os.environ.get("LIBTPU_INIT_ARGS", "")
    options = OPTIONS.get(device.platform, {})
    return {name: value for name, value in options.items() if name not in told and _is_known(device, name, value)}


@functools.cache
def _is_known(device: jax.Device, name: str, value: Any) -> bool:
    """Whether the XLA of a device, which may be one that is not here, takes a compiler option: experimental ones come
    and go."""
    where = NamedSharding(Mesh([device], "x"), PartitionSpec())
    try:
        jax.jit(lambda: 0, out_shardings=where, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        logging.warning("XLA does not take the option %s=%s: %s", name, value, error)
        return False
    return True


# --- the program ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Program:
    """A training step, ready to be compiled.

    Attributes:
      mesh: the devices.
      networks, settings, optimizer: what ``step.make_update`` was given.
      computes: execution options of the networks.
      state, frozen, batch: the arguments of ``update`` as ``ShapeDtypeStruct`` with their shardings.
      update: jitted ``update(state, frozen, batch) -> (state, metrics)``; it takes the old state's memory. Its random
        key is derived from the seed and the step number.
    """

    mesh: Mesh
    networks: Networks
    settings: Settings
    optimizer: Optimizer
    computes: Computes
    state: TrainState
    frozen: Frozen
    batch: Batch
    update: Callable[[TrainState, Frozen, Batch], tuple[TrainState, dict[str, jax.Array]]]

    def lower(self) -> jax.stages.Lowered:
        """The update lowered for its abstract arguments: ``.compile()`` it for the mesh's devices, here or not."""
        return self.update.lower(self.state, self.frozen, self.batch)


def build(config: ConfigDict, mesh: Mesh, architecture: Architecture) -> Program:
    """Builds the program of a validated configuration. No array is made.

    Raises UserError for a mesh that does not fit the batch or a parameter, and for blocks that the transformer lacks.
    """
    settings, optimizer = Settings.from_config(config, architecture.family), optim.make_optimizer(config.optim)
    family = architecture.family
    family.check_size(settings.height, settings.width, ("config.data.height", "config.data.width"))
    family.check_text_length("config.data.text_length", config.data.text_length)
    part, devices = config.data.batch_size // config.optim.accumulation, sharding.batch_parts(mesh)
    if part % devices:
        raise UserError(
            f"config.data.batch_size / config.optim.accumulation = {part} must be a multiple of the {devices} devices "
            "along the mesh's data and fsdp axes"
        )
    _check_cache(config, architecture)
    options = computes(config, mesh)
    graphdef, params, base = _transformer(mesh, architecture, options.transformer, config)
    autoencoder, autoencoder_params = _network(mesh, family.decoder, architecture.autoencoder, options.autoencoder)
    rewards, reward_params = {}, {}
    for name, used in used_rewards(config).items():
        kind, sizes = REWARDS[used.kind], architecture.rewards[name]
        reward, reward_params[name] = _network(mesh, kind.network, sizes, options.reward)
        rewards[name] = kind(sizes, reward, used.weight)
    networks = Networks(family, graphdef, autoencoder, rewards)
    if config.rollout.gather:
        networks = dataclasses.replace(networks, gather=sharding.gather(mesh, family.network))

    everywhere = sharding.replicated(mesh)
    params_sharding = jax.tree.map(lambda leaf: leaf.sharding, params)
    opt_sharding = sharding.of_optimizer(mesh, optimizer, params, params_sharding, config.optim.offload)
    state = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere),
        params=params,
        opt_state=with_sharding(jax.eval_shape(optimizer.init, params), opt_sharding),
        ema=in_float32(params) if config.optim.ema_decay else None,
        rollout=_abstract_rollout(config, mesh, networks, settings) if settings.reuse > 1 else None,
    )
    update, seed = step.make_update(networks, settings, optimizer), config.seed

    def seeded_update(state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        return update(state, frozen, batch, jax.random.fold_in(seeds.key(seed), state.step + 1))

    return Program(
        mesh=mesh,
        networks=networks,
        settings=settings,
        optimizer=optimizer,
        computes=options,
        state=state,
        frozen=Frozen(autoencoder_params, reward_params, base),
        batch=_abstract_batch(config, mesh, architecture, networks, settings),
        update=jax.jit(
            seeded_update,
            donate_argnums=0,
            out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), everywhere),
            compiler_options=compiler_options(mesh),
        ),
    )


def _network(mesh: Mesh, network: str, sizes: Any, compute: Compute) -> tuple[Any, Any]:
    graphdef, params = folder.abstract(network, sizes, compute)
    return graphdef, with_sharding(params, sharding.of_tree(mesh, network, params))


def _check_cache(config: ConfigDict, architecture: Architecture) -> None:
    ends, blocks = tuple(config.rollout.cache_ends), architecture.family.blocks(architecture.transformer)
    if config.rollout.cache > 1 and (len(blocks) != len(ends) or any(e > b for e, b in zip(ends, blocks, strict=True))):
        raise UserError(
            f"config.rollout.cache_ends={ends}: this transformer has {' + '.join(map(str, blocks)) or 'no'} blocks"
        )


def _transformer(mesh: Mesh, architecture: Architecture, compute: Compute, config: ConfigDict) -> tuple[Any, Any, Any]:
    """(graph definition, what is trained, what is frozen beside it or None)."""
    settings, network = Lora.from_config(config.lora), architecture.family.network
    if settings is None:
        return *_network(mesh, network, architecture.transformer, compute), None
    try:
        graphdef, params = lora.abstract(folder.constructor(network, architecture.transformer, compute), settings)
    except ValueError as error:
        raise UserError(f"config.lora.targets: {error}") from error
    return graphdef, *lora.split(with_sharding(params, sharding.of_tree(mesh, network, params)))


def with_sharding(tree: Any, shardings: Any) -> Any:
    """Abstract arrays like ``tree``, each in the place that a tree of shardings gives it."""
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), tree, shardings)


def in_float32(tree: Any) -> Any:
    """Abstract float32 arrays in the shapes and places of ``tree``: what is averaged or summed of parameters."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding), tree)


def _abstract_rollout(config: ConfigDict, mesh: Mesh, networks: Networks, settings: Settings) -> Rollout:
    shape = (config.data.batch_size, *networks.tokens(settings))
    array = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding.of_batch(mesh))
    return Rollout(latents=array, noise=array)


def _abstract_batch(
    config: ConfigDict, mesh: Mesh, architecture: Architecture, networks: Networks, settings: Settings
) -> Batch:
    count, split = config.data.batch_size, sharding.of_batch(mesh)
    dtype = jnp.dtype(config.model.dtype)

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((count, *shape), dtype, sharding=split)

    condition = architecture.family.condition(architecture.transformer, config.data.text_length)
    return Batch(
        condition={name: array(shape, dtype) for name, shape in condition.items()},
        reward_tokens={
            name: {
                variant: jax.tree.map(lambda ids: array(ids.shape, ids.dtype), reward.token_shapes())
                for variant in VARIANTS
            }
            for name, reward in networks.rewards.items()
        },
        latents=_abstract_rollout(config, mesh, networks, settings).latents if settings.offline else None,
    )


# --- arrays for it ----------------------------------------------------------------------------------------------------


def initial_state(config: ConfigDict, program: Program) -> TrainState:
    """The state before the first update: the pipeline's transformer, each device reading its own shards of it, or new
    factors beside it."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.state)
    if program.frozen.base is None:
        params = _load_transformer(config, program)
    else:
        params = _initial_factors(config, program, shardings.params)
    return TrainState(
        step=jax.device_put(np.int32(0), shardings.step),
        params=params,
        opt_state=jax.jit(program.optimizer.init, out_shardings=shardings.opt_state)(params),
        # A copy: the update takes the memory of both.
        ema=None if shardings.ema is None else jax.jit(lambda p: jax.tree.map(_copy_in_float32, p))(params),
        # Never read: the first update makes the first rollout.
        rollout=jax.jit(lambda: _zeros(program.state.rollout), out_shardings=shardings.rollout)(),
    )


def _initial_factors(config: ConfigDict, program: Program, shardings: Any) -> Params:
    """New factors, or those of ``config.lora.init``."""
    if not config.lora.init:
        return jax.jit(lambda: lora.initial(program.state.params, config.seed), out_shardings=shardings)()
    if not pathlib.Path(config.lora.init).exists():
        raise UserError(f"config.lora.init={config.lora.init!r} does not exist; name a LoRA's file or folder")
    family, where = program.networks.family, pathlib.Path(config.model.path) / TRANSFORMER
    sizes = folder.read_config(where, family.network)[1]
    arrays = adapters.read(config.lora.init, sizes, Lora.from_config(config.lora))
    return jax.tree.map(
        lambda array, where: jax.make_array_from_callback(array.shape, where, lambda index: array[index]),
        engine.unflatten(arrays, program.state.params),
        shardings,
    )


def _copy_in_float32(x: jax.Array) -> jax.Array:
    return jnp.array(x, jnp.float32, copy=True)


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)


def load_frozen(config: ConfigDict, program: Program) -> Frozen:
    """The autoencoder, the rewards and, with LoRA, the transformer, in the compute dtype or quantised."""
    mesh, options, family = program.mesh, program.computes, program.networks.family
    path = pathlib.Path(config.model.path) / AUTOENCODER
    autoencoder = folder.load(path, family.decoder, options.autoencoder, sharding.of(mesh, family.decoder))[2]
    rewards = {}
    for name, used in used_rewards(config).items():
        network = REWARDS[used.kind].network
        rewards[name] = folder.load(used.path, network, options.reward, sharding.of(mesh, network))[2]
    return Frozen(autoencoder, rewards, None if program.frozen.base is None else _load_transformer(config, program))


def _load_transformer(config: ConfigDict, program: Program) -> Params:
    path, network = pathlib.Path(config.model.path) / TRANSFORMER, program.networks.family.network
    return load_transformer(path, network, program.computes.transformer, program.mesh, config.lora.quantize)


def load_transformer(
    path: str | os.PathLike, network: str, compute: Compute, mesh: Mesh, quantize: str = "none"
) -> Params:
    """A transformer's parameters on a mesh, from a folder of ours: in ``compute.param_dtype``, or the kernels of its
    blocks quantised (``lora.quantize``), as an adapted network has them."""
    place = sharding.of(mesh, network)
    if quantize != "none":
        return quantized.load(path, network, quantize, compute, place)
    return folder.load(path, network, compute, place)[2]
