"""A job of several processes: how they find each other, and what they have to agree on."""

import contextlib
import glob
import importlib.util
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax._src import distributed as internals  # the service's client has no public name
from jax.experimental import multihost_utils

from srpo_jax import errors, pulse
from srpo_jax.errors import UserError

# What SLURM's srun gives to each of its tasks; a shell inside an allocation has some of them.
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")

# Seconds without a sign of life after which a process counts as lost, and those that are left end (see ``pulse``). JAX
# has signs of its own, and aborts with many words: it gets twice the time.
HEARTBEAT = 60
# Seconds in which all processes of a job have to be there, and after which one that waits says so.
ARRIVAL, SAY_SO = 300, 15
# Seconds in which what all processes do together, as an update, has to come to its end.
PATIENCE = 1800
# What the libraries say of it: transports (Gloo between CPUs, NCCL between GPUs), JAX's coordination service, and the
# codes that gRPC has for the failures of others.
SIGNS_OF_LOSS = (
    r"Gloo|NCCL|heartbeat|[Bb]arrier (has )?(failed|timed out)|^(UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED)\b"
)


@contextlib.contextmanager
def job(coordinator: str | None = None, process_id: int | None = None, process_count: int | None = None) -> Iterator:
    """Joins this process to its job, as ``start`` does, for a block that works in step with the others.

    A process of a job whose block fails says why and is gone: the usual end would wait for the other processes, which
    wait for this one. So they notice at once, or after ``HEARTBEAT`` seconds, and end too. Exit codes: ``pulse.LOST``
    if another process was lost, a UserError's own, else 1.
    """
    start(coordinator, process_id, process_count)
    try:
        with _signs_of_life():
            yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        if is_loss(error):
            return pulse.end(str(error).splitlines()[0])
        code = errors.reported(error)
        if code is None:
            code = 1
            errors.tell(traceback.format_exc())
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code)


def is_loss(error: BaseException | None) -> bool:
    """Whether an exception says that another process of the job, or the way to it, is lost."""
    # What fails while it is dispatched, as small programs on CPUs do, JAX raises as ValueError.
    kinds = jax.errors.JaxRuntimeError, ValueError
    return isinstance(error, kinds) and bool(re.search(SIGNS_OF_LOSS, str(error)))


def start(coordinator: str | None = None, process_id: int | None = None, process_count: int | None = None) -> None:
    """Joins this process to its job, if there is one; to be called before anything else asks JAX for devices.

    With the three arguments, by them. On a TPU machine, by its metadata. Under srun with several tasks (one a GPU), by
    SLURM's variables. Else the process stays alone.

    Args:
      coordinator: HOST:PORT of process 0.
      process_id: of this process, from 0.
      process_count: of the job.

    Raises UserError if some of the three are missing or do not fit each other.
    """
    given = {"--coordinator": coordinator, "--process-id": process_id, "--process-count": process_count}
    missing = [flag for flag, value in given.items() if value is None]
    if not missing:
        if not 0 <= process_id < process_count:
            raise UserError(f"--process-id={process_id} must be from 0 to --process-count={process_count} less one")
        _initialize(coordinator, process_count, process_id)
    elif len(missing) < len(given):
        raise UserError(f"{', '.join(missing)} is missing: give all of {', '.join(given)}, or none of them")
    elif _tpu() or (all(name in os.environ for name in SLURM) and int(os.environ["SLURM_NTASKS"]) > 1):
        _initialize()


def _initialize(*place: str | int) -> None:
    with _arrival():
        if place and place[2] == 0:
            _wait_for_port(place[0])
        jax.distributed.initialize(
            *place,
            heartbeat_timeout_seconds=2 * HEARTBEAT,
            initialization_timeout=2 * ARRIVAL,
            shutdown_timeout_seconds=PATIENCE,  # one may still write what the others do not
        )
    if between_cpus():
        # A program for CPUs that comes out of a cache runs collectives at once that do not depend on each other.
        jax.config.update("jax_enable_compilation_cache", False)


def _wait_for_port(coordinator: str) -> None:
    """Waits until the port of process 0 is free: at once after a job was killed, another process of it may still be
    there. A second coordinator could listen on it too, and processes would meet the one or the other."""
    _, _, port = coordinator.rpartition(":")
    until = time.monotonic() + HEARTBEAT  # by then, what is left of a job has ended
    while port.isdecimal():
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", int(port))):
                return
        if time.monotonic() > until:
            words = "another process of this machine listens on this port; end it, or take another one"
            raise UserError(f"--coordinator={coordinator}: {words}")
        time.sleep(0.5)


@contextlib.contextmanager
def _arrival() -> Iterator[None]:
    """For a block that waits until all processes are there; JAX itself waits in silence, and aborts in the end."""
    remedy = (
        "start the command on all machines of the job (on a TPU slice: launch/tpu_pod.sh python -- ...), or with "
        "JAX_PLATFORMS=cpu to work on this one alone"
    )

    def give_up() -> None:
        errors.tell(f"error: not all processes of this job have come within {ARRIVAL} s; {remedy}")
        os._exit(pulse.LOST)

    timers = [
        threading.Timer(SAY_SO, errors.tell, (f"waiting for the other processes of this job: {remedy}",)),
        threading.Timer(ARRIVAL, give_up),
    ]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()


def _signs_of_life() -> contextlib.AbstractContextManager[None]:
    state = internals.global_state
    if state.client is None or state.num_processes == 1:
        return contextlib.nullcontext()
    return pulse.of_job(state.client, state.process_id, state.num_processes, HEARTBEAT)


def _tpu() -> bool:
    """Whether this machine has TPU chips that JAX is going to use."""
    wanted = os.environ.get("JAX_PLATFORMS", "")
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None and (not wanted or "tpu" in wanted)


def place() -> tuple[int, int]:
    """(the number of this process in its job, how many there are), without asking JAX for devices."""
    state = internals.global_state
    return state.process_id or 0, state.num_processes or 1


def between_cpus() -> bool:
    """Whether this is a job of several processes without accelerators, whose messages Gloo tells apart by their order
    alone."""
    return jax.process_count() > 1 and jax.default_backend() == "cpu"


_met: set[str] = set()  # where all processes of this job have met


def meet(where: str) -> None:
    """Waits until all processes are there, the first time that it is asked for; every process has to ask.

    Devices that exchange data for the first time are connected then: Gloo gives up after 30 s, but processes that read
    files or compile come minutes apart on a busy machine, and the first one of a job may have to wait for its workdir.
    """
    if where in _met or jax.process_count() == 1:
        return
    with pulse.bounded(PATIENCE, f"waiting for all processes before {where}"):
        internals.global_state.client.wait_at_barrier(f"srpo_jax/meet/{where}", timeout_in_ms=2000 * PATIENCE)
    _met.add(where)


def in_turn(made: Any) -> Any:
    """What a program with collectives made, a tree; between CPUs it is waited for.

    Two programs that run there at once, as the text encoders beside an update, send their messages in an order that
    differs from process to process. Accelerators keep programs in order.
    """
    if between_cpus():
        jax.block_until_ready(made)
    return made


def largest(value: int) -> int:
    """The largest value that any process of the job has; every process has to ask at the same point."""
    if jax.process_count() == 1:
        return value
    meet("agreeing")
    # A few bytes a step, which the library moves in ways that a transfer guard would not let pass.
    with jax.transfer_guard("allow"), pulse.bounded(PATIENCE, "agreeing with the other processes"):
        return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def of_first(array: np.ndarray) -> np.ndarray:
    """Process 0's array, of a shape and dtype that all processes know; every process has to ask at the same point."""
    if jax.process_count() == 1:
        return array
    meet("agreeing")
    with pulse.bounded(PATIENCE, "hearing from the first process"):
        return np.asarray(multihost_utils.broadcast_one_to_all(array))
