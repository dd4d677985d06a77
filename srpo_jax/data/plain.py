"""Text as files have it: unpacked, decoded, cut into lines; and what of it is a prompt.

A file may be packed, which its last ending says: prompts.txt.gz, .bz2 or .xz. What would train on something else than
was meant, or end a run in the middle, is refused when it is read, by file and line: text that is not UTF-8, a NUL (of
UTF-16, mostly), and half of a character, as a JSON file has it whose emoji were cut in two.
"""

import bz2
import gzip
import lzma
import os
import pathlib
import re
import unicodedata
import zlib

from srpo_jax import reading
from srpo_jax.errors import UserError

PACKED = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}
# How files begin that are no text, and what to do about them.
KINDS = (
    (b"\x1f\x8b", "packed by gzip; name it so, as prompts.txt.gz"),
    (b"BZh", "packed by bzip2; name it so, as prompts.txt.bz2"),
    (b"\xfd7zXZ", "packed by xz; name it so, as prompts.txt.xz"),
    (b"\x28\xb5\x2f\xfd", "packed by zstd; unpack it"),
    (b"PK\x03\x04", "a zip archive or a spreadsheet; unpack it, or save the sheet as CSV"),
    (b"PAR1", "a Parquet file; name it so, as prompts.parquet"),
    (b"ARROW1", "an Arrow file; save it as Parquet"),
    (b"\xff\xfe", "UTF-16; save it as UTF-8"),
    (b"\xfe\xff", "UTF-16; save it as UTF-8"),
)
# Characters that nobody sees, at the ends of a prompt as white space is: byte order marks, of zero width, directions,
# soft hyphens, blanks that count as letters. Within it they join emoji and words, and stay.
INVISIBLE = "\ufeff\u200b\u200c\u200d\u200e\u200f\u2060\u180e\u00ad\u2800\u3164\u115f\u1160\uffa0"
_ENDS = re.compile(rf"\A[\s{INVISIBLE}]+|[\s{INVISIBLE}]+\Z")
_UNSEEN = ("Cc", "Cf", "Mn", "Me", "Zs", "Zl", "Zp")  # of Unicode's categories


def kind(path: pathlib.Path) -> str:
    """The ending that says what a file holds, in small letters: ".csv" of ``words.CSV`` and of ``words.csv.gz``."""
    suffix = path.suffix.lower()
    return path.with_suffix("").suffix.lower() if suffix in PACKED else suffix


def read_bytes(path: pathlib.Path, pipe: bool = False) -> bytes:
    """A file's content, unpacked; ``pipe`` lets it be a pipe, as a shell's ``<(...)``.

    Raises UserError if it cannot be read, or is not packed as its name says.
    """
    try:
        content = reading.content(path, pipe=pipe)
    except OSError as error:
        hint = "; expected a file of prompts or a tensorflow-datasets folder" if path.is_dir() else ""
        raise UserError(f"{path} cannot be read: {error.strerror}{hint}") from error
    unpack = PACKED.get(path.suffix.lower())
    try:
        return unpack(content) if unpack else content
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{path} cannot be unpacked ({error}); get it again, or give it unpacked") from error


def read_text(path: pathlib.Path, pipe: bool = False) -> str:
    """A file's text; ``pipe`` as in ``read_bytes``.

    Raises UserError if it cannot be read or is not UTF-8 (names the line).
    """
    content = read_bytes(path, pipe)
    if found := next((words for start, words in KINDS if content.startswith(start)), None):
        raise UserError(f"{path} is {found}")
    try:
        # utf-8-sig: editors on Windows put a byte order mark in front.
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = len(lines(content[: error.start].decode(errors="replace")))
        raise UserError(f"{path} is not UTF-8 (line {line}); save it as UTF-8") from error
    if "\0" in text:
        line = len(lines(text[: text.index("\0")]))
        raise UserError(f"{path} holds a NUL (line {line}): it is UTF-16, or damaged; save it as UTF-8")
    return text


def lines(text: str) -> list[str]:
    r"""The lines of a text, which end with ``\n``, ``\r\n`` or ``\r``."""
    # Not splitlines(): it also splits at characters that a prompt may hold, as a form feed or U+2028.
    return re.split(r"\r\n|\r|\n", text)


def prompt(text: str, where: str) -> str:
    """A prompt without white space and what nobody sees at its ends; "" if there is nothing to see.

    Raises UserError that says ``where`` if it holds half of a character or a NUL.
    """
    check(text, where)
    found = _ENDS.sub("", text.replace("\ufeff", ""))  # a byte order mark is no text, wherever two files were joined
    return "" if all(unicodedata.category(character) in _UNSEEN for character in found) else found


def check(text: str, where: str) -> None:
    """Raises UserError that says ``where`` if a text holds half of a character or a NUL, which no file of ours can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start].encode("unicode_escape").decode()
        raise UserError(f"{where}: {half} is half of a character, as of an emoji cut in two; mend it") from None
    if "\0" in text:
        raise UserError(f"{where}: the text holds a NUL; mend it")


def folder_hint(path: str | os.PathLike) -> str:
    """What to give in the place of a folder that is no source of prompts, by what lies in it; "" if that says nothing.

    Begins with "; ".
    """
    path = pathlib.Path(path)
    if (path / "state.json").exists():
        return "; it was made by save_to_disk of Hugging Face's datasets: save it with to_parquet, and name that file"
    for ending in (".parquet", ".jsonl", ".csv", ".txt"):
        if found := next(path.rglob(f"*{ending}"), None):
            return f"; name its files by a pattern, as '{found.parent}/*{ending}'"
    return ""
