"""One kind of error for everything a user can put right: bad files, keys, flags and prompts.

What the operating system and the libraries say of a disk, a right or a name is put into one line here, too.
"""

import contextlib
import errno
import os
import re
import select
import sys
from collections.abc import Callable

from srpo_jax import host


class UserError(Exception):
    """Something the user can mend. The message is one line: it names the file, key or flag, and the remedy.

    It is ``plain``, whatever the names and libraries' words in it hold. ``code`` is the exit code of a command that
    ends with it.
    """

    code = 1

    def __init__(self, message: str = ""):
        super().__init__(plain(message))


class StorageError(UserError):
    """A disk or bucket did not take what was to be written: the same command may go on once it does."""

    code = 74  # EX_IOERR of sysexits.h


def plain(text: str) -> str:
    """A text in one line, with its control characters visible."""
    text = re.sub(r"\s*[\r\n]+\s*", " ", text).strip()
    hidden = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
    return re.sub(hidden, lambda found: ascii(found[0])[1:-1], text)


_REMEDIES = {
    errno.ENOSPC: "free some space, or choose a folder on another disk",
    errno.EDQUOT: "free some space, or choose a folder on another disk",
    errno.EFBIG: "choose a folder on another disk",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "change its rights, or choose another place",
    errno.EPERM: "change its rights, or choose another place",
    errno.ENOENT: "check the name",
    errno.ENOTDIR: "a file is in the way of a folder: remove it, or choose another place",
    errno.EEXIST: "a file is in the way of a folder: remove it, or choose another place",
    errno.EISDIR: "a folder is in the way of a file: remove it, or choose another place",
    errno.ENOTEMPTY: "a folder is in the way: remove it, or choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its links lead to themselves: mend them",
    errno.EMFILE: "allow more open files (`ulimit -n`)",
    errno.ENFILE: "allow more open files (`ulimit -n`)",
    errno.EIO: "the disk or its network fails: check it, and choose another place",
    errno.ESTALE: "the disk or its network fails: check it, and choose another place",
    errno.EINVAL: "choose another file",
}
# What libraries that are not written in Python say where the operating system has said it; of a disk, so that it counts
# even where another error came of it.
_SPOKEN = {
    "No space left on device": errno.ENOSPC,
    "Disk quota exceeded": errno.EDQUOT,
    "Read-only file system": errno.EROFS,
    "Permission denied": errno.EACCES,
    "Input/output error": errno.EIO,
    "Stale file handle": errno.ESTALE,
}


def told(error: BaseException) -> str | None:
    """What an error of the operating system, or of a library that passes one on, means for the user, in one line; None
    for any other error."""
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        names = " and ".join(os.fsdecode(name) for name in (error.filename, error.filename2) if name is not None)
        return f"{names + ': ' if names else ''}{error.strerror}; {_REMEDIES[error.errno]}"
    while error is not None:
        for words, number in _SPOKEN.items():
            if words in str(error):
                place = re.search(r"/[^\s\"']+", str(error))
                named = f"{place[0].rstrip(':.,;)]')}: " if place else ""
                return f"{named}{words}; {_REMEDIES[number]}"
        error = error.__cause__ or error.__context__
    return None


def brief(error: BaseException, most: int = 300) -> str:
    """An error of whatever kind in a line: its class, and the first ``most`` characters with its words."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:most]


def reported(error: BaseException) -> int | None:
    """Says in a line what a command ends with, and returns its exit code; None, and nothing said, for what is neither
    a ``UserError`` nor known to ``told``: a fault of ours."""
    words = str(error) if isinstance(error, UserError) else told(error)
    if words is None:
        return None
    tell(f"error: {plain(words)}")
    return error.code if isinstance(error, UserError) else 1


def tell(text: str) -> None:
    """Prints a line on stderr. That this is a log on a full disk, or closed, stops nobody from ending."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def run(main: Callable[[], None]) -> int:
    """Calls ``main`` and returns a process exit code: 0, or a ``UserError``'s after printing it, or 1 after printing
    what ``told`` makes of another error, as one line on stderr.

    Every command passes here before JAX starts its devices: so GPUs may pin what the machine has (see ``host``). Where
    nobody reads what is printed any more (``... | head``), the exit code is 141, as a shell has it of a closed pipe.
    """
    host.raise_pinned_limit(os.environ, host.memory())
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        if not _nobody_reads():
            raise  # another pipe's, as a connection's
        # Python flushes once more at its end, and would print a traceback then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if (code := reported(error)) is None:
            raise
        return code
    return 0


def _nobody_reads() -> bool:
    """Whether stdout is a pipe whose other end is closed."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)  # errors are always reported
        return bool(poll.poll(0))
    except OSError:  # no file
        return False
