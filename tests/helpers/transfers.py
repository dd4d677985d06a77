"""JAX's transfer guard as accelerators apply it, on the CPU.

Arrays of a CPU are on the host already, so JAX lets reads of them pass whatever the guard says, and a run that is
refused at its first checkpoint on a TPU goes through on a CPU. (From the host to a device, JAX's own guard holds on the
CPU too.) ``install`` puts the guard where an accelerator has it: on every way from an array to the host.
"""

import contextlib

import jax
import numpy as np
from jax._src.array import ArrayImpl
from jax._src.lib import guard_lib

LEVEL = guard_lib.TransferGuardLevel
# numpy reads a CPU's array by the buffer protocol, which no method of the array sees; on an accelerator there is none.
READERS = ("asarray", "array", "ascontiguousarray", "copy", "concatenate", "stack")


def check() -> None:
    """Raises what JAX raises, if this thread's guard disallows a transfer to the host that nobody asked for."""
    here, everywhere = guard_lib.thread_local_state(), guard_lib.global_state()
    level = here.device_to_host or everywhere.device_to_host or LEVEL.ALLOW
    if level == LEVEL.DISALLOW_EXPLICIT or (level == LEVEL.DISALLOW and not here.explicit_device_get):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: Disallowed device-to-host transfer (as on an accelerator)")


def install() -> contextlib.ExitStack:
    """Guards reads of arrays in this process until what is returned is closed.

    Stricter than JAX in one point: an array whose value is on the host already is guarded too.
    """
    undo = contextlib.ExitStack()

    def put(owner: object, name: str, new: object) -> None:
        undo.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, new)

    value, copy = ArrayImpl._value, ArrayImpl.copy_to_host_async

    def read(self: jax.Array) -> np.ndarray:  # __array__, item, float, bool, print, device_get
        check()
        return value.fget(self)

    def start_copy(self: jax.Array) -> None:
        check()
        copy(self)

    put(ArrayImpl, "_value", property(read))
    put(ArrayImpl, "copy_to_host_async", start_copy)
    for name in READERS:

        def reader(first: object, *rest: object, _plain: object = getattr(np, name), **options: object) -> np.ndarray:
            parts = first if isinstance(first, list | tuple) else (first,)
            if any(isinstance(part, jax.Array) for part in parts):
                check()
            return _plain(first, *rest, **options)

        put(np, name, reader)
    return undo
