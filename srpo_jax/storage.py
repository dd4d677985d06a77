"""Where a run's files lie: in a folder of this machine, or in a bucket (``gs://BUCKET/PATH``).

Paths are ``etils.epath`` paths, as Orbax's are. An object of a bucket is written as a whole and appears as a whole;
there is no appending and no renaming.
"""

import contextlib
import glob
import importlib.util
import os
import pathlib

from etils import epath

from srpo_jax.errors import StorageError, UserError, brief

BUCKET = "gs://"
FRESH_DISK = "lost+found"  # the folder that a disk has from the start: with it alone, a folder counts as empty


def path(name: str | os.PathLike) -> epath.Path:
    """A path by its name.

    Raises UserError for a kind of path that is not supported, or a gs:// path that this machine has no package for.
    """
    text = os.fspath(name)
    if "://" in text and not text.startswith(BUCKET):
        raise UserError(f"{text}: only local folders and {BUCKET}BUCKET/PATH are supported")
    if text.startswith(BUCKET):
        # The file systems that epath takes, the first if it is there.
        if importlib.util.find_spec("tensorflow") is None:
            if importlib.util.find_spec("gcsfs") is None:
                raise UserError(f"{text}: this needs another package; run `pip install gcsfs`")
            _forget_listings()
        if not text[len(BUCKET) :].strip("/"):
            raise UserError(f"{text} names no bucket; give {BUCKET}BUCKET/PATH")
    return epath.Path(text)


def in_bucket(place: epath.Path) -> bool:
    """Whether a path is of a bucket."""
    return os.fspath(place).startswith(BUCKET)


def absolute(place: epath.Path) -> epath.Path:
    """The path from the root."""
    return place if in_bucket(place) else epath.Path(os.path.abspath(place))


def check(place: epath.Path) -> None:
    """Asks a bucket for a path, which need not exist.

    Raises StorageError if there is no answer, and UserError if checkpoints could not be opened in it: Orbax looks for
    their parts by a pattern that begins with the path as it is, and takes a backslash for a slash.
    """
    full = os.fspath(absolute(place))
    if glob.has_magic(full) or "\\" in full or full.encode(errors="ignore").decode() != full:
        raise UserError(
            f"{full!r}: checkpoints cannot be opened in a folder whose path has *, ?, [, a backslash or what is no "
            "character; rename the folder, or choose another"
        )
    if not in_bucket(place):
        return
    try:
        place.exists()
    except Exception as error:  # of several libraries: no credentials, no rights, no network
        raise _refused(place, "read", error) from error


def check_writable(place: str | os.PathLike, flag: str, folder: bool = True) -> None:
    """Asks whether a local folder, or file, can be made or written to, and makes nothing; ``flag`` names it to the
    user. What is in a bucket passes.

    Raises UserError if something else is there or in the way, or the disk or its rights forbid it.
    """
    if os.fspath(place).startswith(BUCKET):
        return
    whole = pathlib.Path(os.path.abspath(place))
    there = next(path for path in (whole, *whole.parents) if os.path.lexists(path))
    if folder or there != whole:
        good, words = there.is_dir(), "is no folder"
    else:
        good, words = not there.is_dir(), "is a folder"
    if not good:
        raise UserError(f"{flag}={place}: {there} {words}; choose another place")
    if not os.access(there, os.W_OK | os.X_OK if there.is_dir() else os.W_OK):
        raise UserError(f"{flag}={place}: {there} cannot be written to; change its rights, or choose another place")


def write(place: epath.Path, content: bytes) -> None:
    """Writes a file, at once or not at all; a local folder is made for it. Raises StorageError."""
    if in_bucket(place):
        try:
            place.write_bytes(content)
        except Exception as error:
            raise _refused(place, "written", error) from error
        return
    if place.exists() and not place.is_file():  # whose place the new file would take
        raise UserError(f"{place} is no file; choose another place")
    partial = place.with_name(f".{place.name}.partial")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, place)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)  # half of it would keep a full disk full
        raise StorageError(f"{place} cannot be written: {error.strerror}") from error


def rename(place: epath.Path, new: epath.Path) -> None:
    """Gives a folder another name; in a bucket, its objects, one after the other. Raises StorageError if one
    refuses."""
    if not in_bucket(place):
        place.rename(new)
        return
    try:
        place.rename(new)
    except Exception as error:
        raise _refused(place, "renamed", error) from error


def checksum(place: epath.Path) -> str:
    """What a bucket says of an object's content, its CRC-32C or MD5; "" if this machine's package does not tell."""
    if importlib.util.find_spec("gcsfs") is None:
        return ""
    import fsspec

    found = fsspec.filesystem("gs").info(os.fspath(place))
    return found.get("crc32c") or found.get("md5Hash") or ""


def _refused(place: epath.Path, what: str, error: Exception) -> StorageError:
    return StorageError(
        f"{place} cannot be {what} ({brief(error)}); check the bucket's name and its rights, and log in with "
        "`gcloud auth application-default login`"
    )


def _forget_listings() -> None:
    """Lets gcsfs ask the bucket each time: what it remembers of folders is wrong once another process has written."""
    import fsspec.config

    for protocol in ("gcs", "gs"):
        fsspec.config.conf.setdefault(protocol, {})["use_listings_cache"] = False
