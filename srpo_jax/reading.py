"""Files that others made are read with care: behind a name can be a device that never ends, or a pipe without a writer.

Reasons come as ``OSError`` with words for people in ``strerror``, whatever the name is: too long, or with a null
character in it.
"""

import errno
import os
import stat

_KINDS = (
    (stat.S_ISDIR, errno.EISDIR, "Is a directory"),
    (stat.S_ISCHR, errno.EINVAL, "a device, not a file"),
    (stat.S_ISBLK, errno.EINVAL, "a device, not a file"),
    (stat.S_ISSOCK, errno.EINVAL, "a socket, not a file"),
)


def check(path: str | os.PathLike, pipe: bool = False) -> os.stat_result:
    """Looks at a file without opening it. Raises OSError if it is not there, or not a file.

    ``pipe`` lets pipes pass, as a shell's ``<(...)`` makes them.
    """
    try:
        found = os.stat(path)
    except ValueError as error:  # of a null character
        raise OSError(errno.EINVAL, "a name that no file can have", os.fspath(path)) from error
    for kind, number, words in _KINDS:
        if kind(found.st_mode):
            raise OSError(number, words, os.fspath(path))
    if stat.S_ISFIFO(found.st_mode) and not pipe:
        raise OSError(errno.EINVAL, "a pipe, not a file", os.fspath(path))
    return found


def content(path: str | os.PathLike, most: int | None = None, pipe: bool = False) -> bytes:
    """A file's bytes. Raises OSError as ``check``, and for more than ``most`` bytes."""
    size = check(path, pipe).st_size
    if most is not None and size > most:
        raise OSError(errno.EFBIG, f"{size} bytes, and at most {most} are read", os.fspath(path))
    with open(path, "rb") as file:
        return file.read()
