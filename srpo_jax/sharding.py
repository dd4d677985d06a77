"""Where arrays live: the mesh, one table of rules for the parameters of every network, and constraints on activations.

Axes of the mesh:
  data    splits the batch; the only axis that goes from one TPU slice to another.
  fsdp    splits the batch, and parameters, gradients and optimiser state with it (each layer is gathered when it runs).
  tensor  splits attention heads and hidden features; devices along it hold the same samples.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from srpo_jax.errors import UserError
from srpo_jax.models.compute import path_name
from srpo_jax.optim import Optimizer

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

# (pattern, axes) on "<network>.<path>"; the first that matches the whole name decides. Networks are named as in
# weights/folder. Repeated blocks have a leading layer axis, which stays whole: the scan over layers reads one slice at
# a time. Within a pair of layers the first is split by columns and the second by rows, so that only the second one's
# result crosses "tensor".
RULES: tuple[tuple[str, P], ...] = (
    # The transformer that is trained.
    (r"flux\.(img_in|txt_in)\.kernel", P(None, "fsdp")),
    (r"flux\.(time|guidance|vector)_in\.in_layer\.kernel", P(None, "fsdp")),
    (r"flux\.(time|guidance|vector)_in\.out_layer\.kernel", P("fsdp", None)),
    (r"flux\.\w+_blocks\.(img_|txt_|)mod\.kernel(\.codes|)", P(None, "fsdp", "tensor")),
    (r"flux\.\w+_blocks\.(\w+_attn\.|)qkv\.kernel(\.codes|)", P(None, "fsdp", None, "tensor", None)),
    (r"flux\.\w+_blocks\.(\w+_attn\.|)qkv\.bias", P(None, None, "tensor", None)),
    (r"flux\.\w+_blocks\.(\w+_mlp\.in_layer|mlp_in)\.kernel(\.codes|)", P(None, "fsdp", "tensor")),
    (r"flux\.\w+_blocks\.(\w+_mlp\.in_layer|mlp_in)\.bias", P(None, "tensor")),
    (r"flux\.\w+_blocks\.(\w+_attn\.proj|\w+_mlp\.out_layer|out)\.kernel(\.codes|)", P(None, "tensor", "fsdp")),
    # Scales of quantised kernels: blocks lie along the inputs, and are fewer.
    (r"flux\.\w+_blocks\.(\w+_attn\.|)qkv\.kernel\.scales", P(None, None, None, "tensor", None)),
    (r"flux\.\w+_blocks\.(\w+_attn\.proj|\w+_mlp\.out_layer|out)\.kernel\.scales", P(None, None, "fsdp")),
    (r"flux\.\w+_blocks\..*kernel\.scales", P(None, None, "tensor")),
    # Factors of LoRA: A's inputs lie as the kernel's, B's outputs as the kernel's; the rank is too small to be split.
    (r"flux\.\w+_blocks\.(.*_attn\.proj|.*_mlp\.out_layer|out)\.lora_a", P(None, "tensor")),
    (r"flux\.\w+_blocks\..*lora_a", P(None, "fsdp")),
    (r"flux\.\w+_blocks\.(\w+_attn\.|)qkv\.lora_b", P(None, None, None, "tensor", None)),
    (r"flux\.\w+_blocks\.(.*_attn\.proj|.*_mlp\.out_layer|out)\.lora_b", P(None, None, "fsdp")),
    (r"flux\.\w+_blocks\..*lora_b", P(None, None, "tensor")),
    (r"flux\.final_mod\.kernel", P("fsdp", "tensor")),
    (r"flux\.final_out\.kernel", P("fsdp", None)),
    (r"flux\..*(bias|scale)", P()),
    # The autoencoder is small (84 million parameters in FLUX.1).
    (r"autoencoder\..*", P()),
    # Rewards (ViT-H-14: a billion parameters) and the text encoders.
    (r"(clip|clip_text|t5)\..*blocks\.attn\.[qkv]\.kernel", P(None, "fsdp", "tensor")),
    (r"(clip|clip_text|t5)\..*blocks\.attn\.[qkv]\.bias", P(None, "tensor")),
    (r"(clip|clip_text|t5)\..*blocks\.mlp\.(in_layer|gate|up)\.kernel", P(None, "fsdp", "tensor")),
    (r"(clip|clip_text|t5)\..*blocks\.mlp\.(in_layer|gate|up)\.bias", P(None, "tensor")),
    (r"(clip|clip_text|t5)\..*blocks\.(attn\.proj|mlp\.out_layer|mlp\.down)\.kernel", P(None, "tensor", "fsdp")),
    (r"(clip|clip_text|t5)\..*token_embedding", P(None, "fsdp")),
    (r"clip\..*projection\.kernel", P("fsdp", None)),
    (r"clip\.vision\.patch_embedding\.kernel|t5\.relative_bias\.embedding", P()),
    (r"(clip|clip_text|t5)\..*(bias|scale|class_embedding|position_embedding)", P()),
)

# Layers of frozen networks around attention heads that "tensor" may not divide, as the 12 of CLIP-L beside FLUX's 24:
# what it does not divide stays whole. (Their kernels may be split where the heads are not: 768 columns, say, by 8.)
MAY_STAY_WHOLE = r"(clip|clip_text|t5)\..*blocks\.attn\..*"


# --- the mesh ---------------------------------------------------------------------------------------------------------


def make_mesh(sizes: Any, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of so many devices along each axis (data, fsdp, tensor; one may be -1 and takes the rest of them).

    Several TPU slices are joined by the data-centre network alone, which is too slow for weights: "data" goes from
    slice to slice, and "fsdp" and "tensor" stay within one. GPUs of several hosts are in the order of their hosts.

    Args:
      sizes: anything with an attribute per axis, as a config's ``mesh`` part.
      devices: all of the job's by default; may be those of a topology that is not there.

    Raises UserError for sizes that are no numbers of devices, that do not multiply to the number of devices, and that
    do not fit the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = [getattr(sizes, axis) for axis in AXES]
    named = "mesh: " + ", ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
    if any(size < 1 and size != -1 for size in shape):
        raise UserError(f"{named}: each must be at least 1, or -1 for the rest of the devices")
    if shape.count(-1) > 1:
        raise UserError(f"{named}: only one of them can be -1 (the rest of the devices)")
    if -1 in shape:
        fixed = math.prod(size for size in shape if size != -1)
        if len(devices) % fixed:
            raise UserError(f"{named} does not fit {len(devices)} devices: {fixed} does not divide them")
        shape[shape.index(-1)] = len(devices) // fixed
    if math.prod(shape) != len(devices):
        raise UserError(f"{named} needs {math.prod(shape)} devices, here are {len(devices)}; -1 takes the rest")
    slices = _slices(devices)
    if slices == 1:
        return Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), AXES)
    if shape[0] % slices:
        raise UserError(
            f"{named}: the devices are {slices} slices, between which only the axis data can go; set data to {slices} "
            "or a multiple of it"
        )
    within, between = (shape[0] // slices, *shape[1:]), (slices, 1, 1)
    grid = mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES)


def _slices(devices: Sequence[Any]) -> int:
    """How many TPU slices the devices are of. (JAX numbers the hosts of GPUs likewise, which need no such care.)"""
    if devices[0].platform != "tpu":
        return 1
    # Devices of a single slice may have no such attribute.
    return len({getattr(device, "slice_index", 0) for device in devices})


# --- parameters -------------------------------------------------------------------------------------------------------


def matches(pattern: str, name: str) -> bool:
    """Whether a rule's pattern is for the parameter of this full name."""
    return re.fullmatch(pattern, name) is not None


def spec(name: str) -> P:
    """The rule for a parameter by its full name, as ``flux.img_in.kernel``. Raises ValueError if there is none."""
    for pattern, axes in RULES:
        if matches(pattern, name):
            return axes
    raise ValueError(f"no rule of sharding.RULES matches the parameter {name}")


def of(mesh: Mesh, network: str) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """``sharding(path, shape)`` for the parameters of a network, as ``weights.folder.load`` takes it.

    That function raises UserError for a dimension that its mesh axis does not divide, naming the parameter; only what
    ``MAY_STAY_WHOLE`` then is not split by "tensor".
    """

    def sharding(path: str, shape: tuple[int, ...]) -> NamedSharding:
        name = f"{network}.{path}"
        axes = spec(name)
        if len(axes) > len(shape):
            raise ValueError(f"the rule {axes} for {name} has more axes than its shape {shape}")
        if matches(MAY_STAY_WHOLE, name):
            whole = fitting(mesh, shape, axes)
            axes = P(*(there if axis == "tensor" else axis for axis, there in zip(axes, whole, strict=True)))
        for size, axis in zip(shape, axes, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                raise UserError(
                    f"config.mesh.{axis}={mesh.shape[axis]} does not divide the dimension {size} of {name} {shape}; "
                    f"choose a divisor of {size}"
                )
        return NamedSharding(mesh, axes)

    return sharding


def of_tree(mesh: Mesh, network: str, params: Any) -> Any:
    """The shardings of a network's parameters, a tree like ``params`` (arrays or ``ShapeDtypeStruct``)."""
    sharding = of(mesh, network)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: sharding(path_name(path), leaf.shape), params)


def gather(mesh: Mesh, network: str) -> Callable[[str, jax.Array], jax.Array]:
    """``whole(path, leaf)``, for use in a compiled program: makes every device hold all of a parameter that is split
    over "fsdp"; what "tensor" splits stays split. ``leaf`` may be what was computed of the parameter, with its axes."""

    def whole(path: str, leaf: jax.Array) -> jax.Array:
        axes = spec(f"{network}.{path}")
        # First as it lies: else the compiler may gather what the leaf was computed of.
        here = fitting(mesh, leaf.shape, axes)
        leaf = jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, here))
        there = P(*(None if axis == "fsdp" else axis for axis in here))
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, there))

    return whole


def fitting(mesh: Mesh, shape: tuple[int, ...], axes: P) -> P:
    """The axes of a parameter for what belongs to it in another shape: what the mesh does not divide stays whole."""
    return P(*(axis if axis and not size % mesh.shape[axis] else None for size, axis in zip(shape, axes, strict=False)))


def of_optimizer(mesh: Mesh, optimizer: Optimizer, params: Any, shardings: Any, offload: bool = False) -> Any:
    """The shardings of an optimiser's state: what belongs to a parameter lies where it lies, counters everywhere.

    The scales of 8-bit moments have a shorter last axis; where the mesh does not divide it, it stays whole. With
    ``offload``, what belongs to a parameter lies in the memory of its devices' hosts.
    """
    abstract = jax.eval_shape(optimizer.init, params)

    def beside(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> NamedSharding:
        axes = fitting(mesh, leaf.shape, sharding.spec)
        return NamedSharding(mesh, axes, memory_kind="pinned_host" if offload else None)

    return optax.tree.map_params(
        optimizer,
        beside,
        abstract,
        shardings,
        transform_non_params=lambda _: replicated(mesh),
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, P())


# --- batches and activations ------------------------------------------------------------------------------------------


def of_batch(mesh: Mesh) -> NamedSharding:
    """Split along the first axis."""
    return NamedSharding(mesh, P(BATCH))


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def constraint(mesh: Mesh) -> Callable[[jax.Array, str], jax.Array]:
    """The ``constrain`` of ``models.compute.Compute``: samples stay on their devices, heads on their part of "tensor",
    or whole on all of it where it does not divide them (a transformer of which that is true has no place: ``of``).

    But for "features": vectors whose features are split over "fsdp" like the inputs of a kernel, for all samples of the
    devices along it.

    Raises UserError while tracing for a batch that the mesh does not divide.
    """
    activations = {
        "tokens": P(BATCH, None, None),
        "heads": P(BATCH, None, "tensor", None),
        "image": P(BATCH, None, None, None),
        "vectors": P(BATCH, None),
        "features": P("data", "fsdp"),
    }
    parts, tensor = batch_parts(mesh), mesh.shape["tensor"]

    def constrain(x: jax.Array, name: str) -> jax.Array:
        if x.shape[0] % parts:
            raise UserError(f"config.mesh: data * fsdp = {parts} does not divide a batch of {x.shape[0]}")
        axes = activations[name]
        if name == "heads" and x.shape[2] % tensor:
            axes = P(BATCH, None, None, None)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, axes))

    return constrain


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The samples of a batch that this process's devices hold, in ascending order."""
    rows = np.arange(batch_size)
    indices = of_batch(mesh).addressable_devices_indices_map((batch_size,))
    return sorted(set(np.concatenate([rows[index] for index in indices.values()]).tolist()))


def row_groups(mesh: Mesh, batch_size: int) -> list[tuple[list[int], list[int]]]:
    """[(processes, rows), ...]: processes whose devices hold the same samples of a batch, and these; no sample twice.

    Raises UserError for a mesh on which two processes share some of their samples but not all.
    """
    rows, held = np.arange(batch_size), {}
    for device, index in of_batch(mesh).devices_indices_map((batch_size,)).items():
        held.setdefault(device.process_index, set()).update(rows[index].tolist())
    groups = {}
    for process in sorted(held):
        groups.setdefault(tuple(sorted(held[process])), []).append(process)
    if sum(map(len, groups)) != batch_size:
        raise UserError("config.mesh: some processes share a part of their samples; choose another tensor")
    return [(processes, list(rows)) for rows, processes in groups.items()]


def fetch(array: jax.Array) -> np.ndarray:
    """This process's ``local_rows`` of an array that is split as ``of_batch``: undoes ``place``."""
    parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def place(mesh: Mesh, batch_size: int, local: np.ndarray) -> jax.Array:
    """A global array ``[batch_size, ...]`` split over the mesh from the ``local_rows`` of every process."""
    position = {row: place for place, row in enumerate(local_rows(mesh, batch_size))}
    shape, split = (batch_size, *local.shape[1:]), of_batch(mesh)
    # Device by device, since device_put is a transfer that a transfer guard takes for intended.
    shards = [
        jax.device_put(local[[position[row] for row in range(*index[0].indices(batch_size))]], device)
        for device, index in split.addressable_devices_indices_map(shape).items()
    ]
    return jax.make_array_from_single_device_arrays(shape, split, shards)
