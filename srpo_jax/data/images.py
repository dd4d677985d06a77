"""Pictures with captions, as people have them: a folder, or an image set of tensorflow-datasets.

    FOLDER             pictures with captions beside them or in metadata.jsonl, .csv or .parquet: see ``folders``
    tfds:NAME[:SPLIT]  a prepared data set of tensorflow-datasets, or the folder of one, with an image and a text
    FOLDER             the same, if FOLDER holds a dataset_info.json

Everything that is wrong with a picture is found, by the picture's name, before anything is encoded (``examine``). A
picture is resized (Lanczos) and cropped around its centre to one size in one go; the sides that do not fit are lost.
Colours are brought from a picture's own profile into sRGB, in which networks were trained (``profiles``).
"""

import concurrent.futures
import functools
import hashlib
import io
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from srpo_jax import terminal
from srpo_jax.data import folders, plain, profiles, sources
from srpo_jax.data.folders import Picture
from srpo_jax.errors import UserError

# What is decoded, by content. Others Pillow hands to programs of the machine, as EPS to Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM")
MAX_PIXELS = 1 << 27  # of a picture unless told otherwise: a file of kilobytes can hold gigapixels
MAX_BYTES = 8  # of a file for each of these pixels: 16-bit RGBA
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit warns; the one above refuses
# Modes that Pillow turns into RGB without losing what they hold; 16-bit grey would become white.
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
OUTSIDE = ("refuse", "read")
THREADS = 8  # that decode: Pillow gives way to other threads while it does
# Programs that draw put how they did into the PNG, megabytes of it; Pillow takes one by default.
PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = 64 << 20, 256 << 20


class PictureSet(NamedTuple):
    """Pictures to be encoded at one size (pixels); ``digest`` tells them, in this order and size, from others.

    ``max_pixels`` is what one of them may have.
    """

    pictures: list[Picture]
    digest: str
    height: int
    width: int
    max_pixels: int = MAX_PIXELS


# --- sources ----------------------------------------------------------------------------------------------------------


def read(
    spec: str | os.PathLike, column: str | None = None, outside: bool = False, max_pixels: int = MAX_PIXELS
) -> tuple[list[Picture], list[str]]:
    """The pictures of a source in its order, and what is wrong with those that have no caption, or must not be read, a
    line each.

    Args:
      spec: as above.
      column: of the captions, where there are several.
      outside: whether ``metadata.jsonl`` may name pictures outside of its folder, by ``..``, absolute paths or links.
      max_pixels: of a picture; files of more than ``MAX_BYTES`` times as many bytes are not read.

    Raises UserError if the source is missing or is not what it should be, or holds no picture with a caption.
    """
    spec = os.fspath(spec)
    path = pathlib.Path(spec)
    if spec.startswith(sources.TFDS):
        entries = _read_tfds(spec.removeprefix(sources.TFDS), column)
    elif sources.is_tfds(path):
        entries = _read_tfds(spec, column)
    elif not path.is_dir():
        raise UserError(f"{spec} is not a folder; expected a folder of pictures or tfds:NAME[:SPLIT]")
    else:
        entries = folders.read(path, column, outside, MAX_BYTES * max_pixels)
    pictures, wrong = [], []
    for picture in entries:
        if isinstance(picture, str):
            wrong.append(picture)
        elif picture.caption:
            pictures.append(picture)
        else:
            wrong.append(f"{picture.name} has no caption")
    if not pictures:
        raise UserError(f"{spec} holds no picture with a caption" + (f": {wrong[0]}" if wrong else ""))
    return pictures, wrong


def _read_tfds(spec: str, column: str | None) -> Iterator[Picture | str]:
    import tensorflow_datasets as tfds

    captions = [plain.prompt(caption, f"tfds:{spec}, {place}") for caption, place in sources.read_tfds(spec, column)]
    builder, split = sources.open_tfds(spec)
    named = sorted(name for name, feature in builder.info.features.items() if isinstance(feature, tfds.features.Image))
    if len(named) != 1 and "image" not in named:
        raise UserError(f"tfds:{spec} has {', '.join(named) or 'no'} image features; expected one, or one named image")
    chosen = named[0] if len(named) == 1 else "image"
    # A picture is stored as the bytes of its file: read as such, it is decoded as any other.
    alone = tfds.features.FeaturesDict({chosen: tfds.features.Text()})
    source = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)

    def content(index: int) -> Callable[[], bytes]:
        return lambda: alone.deserialize_example_np(source[index])[chosen]

    for index, caption in enumerate(captions):
        yield Picture(f"example {index} of tfds:{spec}", caption, content(index))


# --- one picture ------------------------------------------------------------------------------------------------------


def decode(content: bytes, height: int, width: int, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A picture's file as uint8 [height, width, 3], as ``upright`` has it, cropped.

    Raises ValueError as ``upright`` does, and for a picture that would have to be enlarged.
    """
    image = upright(content, max_pixels)
    if image.width < width or image.height < height:
        raise ValueError(f"is {image.width}x{image.height}, smaller than {width}x{height}")
    return np.asarray(crop(image, height, width))


def upright(content: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A picture's file as RGB in sRGB: turned upright, on white where it is transparent; of an animation, its start.

    Raises ValueError, with the reason, for a file that is damaged, not a picture of 8 bits, or of too many pixels.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_formats()) as opened:
            if opened.width * opened.height > max_pixels:
                raise OSError(f"{opened.width}x{opened.height} are more than {max_pixels} pixels")
            image = ImageOps.exif_transpose(opened)
            image.load()
    except Exception as error:  # of a damaged file Pillow's decoders raise whatever they stumble over
        raise ValueError(f"cannot be decoded ({str(error).partition(' <')[0] or type(error).__name__})") from error
    if image.mode not in MODES:
        raise ValueError(f"has pixels of mode {image.mode}; save it as 8-bit RGB")
    image = profiles.to_srgb(image)
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of ``FORMATS`` that this Pillow knows."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """The largest centred part of an image that has the wanted shape, at ``height`` x ``width`` pixels."""
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
    box = (left, top, left + scale * width, top + scale * height)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def load(picture: Picture, height: int, width: int, max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, bytes]:
    """The pixels of a picture, as ``decode``, and the SHA-256 of its file. Raises ValueError, with the reason."""
    try:
        content = picture.content()
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror or error})") from error
    return decode(content, height, width, max_pixels), hashlib.sha256(content).digest()


# --- all of them ------------------------------------------------------------------------------------------------------


def examine(
    pictures: Sequence[Picture], height: int, width: int, progress: bool = False, max_pixels: int = MAX_PIXELS
) -> tuple[list[bytes], dict[int, str]]:
    """Decodes every picture once: what is broken is known before the first one is encoded.

    Returns:
      The SHA-256 of every file (b"" for a broken one), and what is wrong with the broken ones, by their place.
    """

    def look(picture: Picture) -> tuple[bytes, str]:
        try:
            return load(picture, height, width, max_pixels)[1], ""
        except ValueError as error:
            return b"", f"{picture.name} {error}"

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        bar = terminal.bar(len(pictures), "picture", "checking", shown=progress)
        found = []
        with bar:
            for result in pool.map(look, pictures):
                found.append(result)
                bar.update()
    return [digest for digest, _ in found], {place: wrong for place, (_, wrong) in enumerate(found) if wrong}


class Loader:
    """Reads examined pictures as a batch: ``loader(places)`` is uint8 [len(places), height, width, 3].

    Raises UserError for a picture that has been damaged or removed since.
    """

    def __init__(self, images: PictureSet):
        self._images, self._pool = images, concurrent.futures.ThreadPoolExecutor(THREADS)

    def __call__(self, places: Sequence[int]) -> np.ndarray:
        return np.stack(list(self._pool.map(self._load, places)))

    def _load(self, place: int) -> np.ndarray:
        picture = self._images.pictures[place]
        try:
            return load(picture, self._images.height, self._images.width, self._images.max_pixels)[0]
        except ValueError as error:
            raise UserError(f"{picture.name} {error}, and was whole when encoding began") from error


def digest(digests: Sequence[bytes], height: int, width: int) -> str:
    """16 hexadecimal digits that other files, in another order or at another size, do not have."""
    return hashlib.sha256(f"{height}x{width}".encode() + b"".join(digests)).hexdigest()[:16]


def describe_broken(wrong: Sequence[str], total: int) -> str:
    """One line on what is wrong with some of ``total`` pictures."""
    more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return f"{len(wrong)} of {total} pictures cannot be used: {wrong[0]}{more}"
