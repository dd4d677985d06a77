"""Where arrays live: the mesh, the parameters of every network by its own rules, and constraints on activations.

Every network's class has a table ``RULES``: (pattern, axes) on the dotted path of a parameter. Repeated blocks have a
leading layer axis, which stays whole: the scan over layers reads one slice at a time. Within a pair of layers the first
is split by columns and the second by rows, so that only the second one's result crosses "tensor". Parameters that the
class says ``MAY_STAY_WHOLE`` (a pattern), those around attention heads of frozen networks, are split over "tensor" only
where it divides them; those that it says are ``UNEVEN`` (another), of widths with few divisors, over no axis that does
not divide them.

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
from srpo_jax.weights import folder

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

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


def spec(network: str, path: str) -> P:
    """The rule for a parameter of a network by its dotted path, as ``img_in.kernel``: the first of the network's
    ``RULES`` whose pattern matches the whole path. Raises ValueError if there is none."""
    for pattern, axes in folder.classes(network)[1].RULES:
        if re.fullmatch(pattern, path):
            return axes
    raise ValueError(f"no rule of the {network} network (RULES) matches its parameter {path}")


def of(mesh: Mesh, network: str) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """``sharding(path, shape)`` for the parameters of a network, as ``weights.folder.load`` takes it.

    That function raises UserError for a dimension that its mesh axis does not divide, naming the parameter; only what
    ``MAY_STAY_WHOLE`` then is not split by "tensor", and what is ``UNEVEN`` by no axis.
    """

    def sharding(path: str, shape: tuple[int, ...]) -> NamedSharding:
        name = f"{network}.{path}"
        axes = spec(network, path)
        if len(axes) > len(shape):
            raise ValueError(f"the rule {axes} for {name} has more axes than its shape {shape}")
        made, whole = folder.classes(network)[1], fitting(mesh, shape, axes)
        if re.fullmatch(getattr(made, "UNEVEN", ""), path):
            axes = whole
        elif re.fullmatch(getattr(made, "MAY_STAY_WHOLE", ""), path):
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
        axes = spec(network, path)
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
