"""One kind of error for everything a user can put right: bad files, keys, flags and prompts."""

import contextlib
import os
import select
import sys
from collections.abc import Callable

from srpo_jax import host


class UserError(Exception):
    """Something the user can mend. The message is one line: it names the file, key or flag, and the remedy.

    ``code`` is the exit code of a command that ends with it.
    """

    code = 1


class StorageError(UserError):
    """A disk or bucket did not take what was to be written: the same command may go on once it does."""

    code = 74  # EX_IOERR of sysexits.h


def tell(text: str) -> None:
    """Prints a line on stderr. That this is a log on a full disk, or closed, stops nobody from ending."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def run(main: Callable[[], None]) -> int:
    """Calls ``main`` and returns a process exit code: 0, or a ``UserError``'s after printing it as one line on stderr.

    Every command passes here before JAX starts its devices: so GPUs may pin what the machine has (see ``host``). Where
    nobody reads what is printed any more (``... | head``), the exit code is 141, as a shell has it of a closed pipe.
    """
    host.raise_pinned_limit(os.environ, host.memory())
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        tell(f"error: {error}")
        return error.code
    except BrokenPipeError:
        if not _nobody_reads():
            raise  # another pipe's, as a connection's
        # Python flushes once more at its end, and would print a traceback then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def _nobody_reads() -> bool:
    """Whether stdout is a pipe whose other end is closed."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)  # errors are always reported
        return bool(poll.poll(0))
    except OSError:  # no file
        return False
