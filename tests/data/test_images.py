"""Pictures with captions: where they come from, what is wrong with them, how they are cropped."""

import json
import re

import numpy as np
import pytest
from helpers.photos import content, picture, write_folder
from PIL import Image

from srpo_jax.data import images
from srpo_jax.emoji.dataset import Emoji
from srpo_jax.errors import UserError

HEIGHT, WIDTH = 32, 48


# --- sources ----------------------------------------------------------------------------------------------------------


def listed(pictures):
    return [(found.caption, found.content()) for found in pictures]


def test_a_folder_with_captions_beside_the_pictures(tmp_path):
    root = write_folder(tmp_path / "photos", ["a fox", " ein Bär,\nder singt "])
    (root / "more").mkdir()
    picture(5).save(root / "more" / "UPPER.JPG", "JPEG")
    (root / "more" / "UPPER.txt").write_text("\ufeff狐", encoding="utf-8")
    (root / ".cache").mkdir()
    picture(6).save(root / ".cache" / "hidden.png")
    (root / "notes.md").write_text("not a picture")
    picture(7).save(root / "lonely.webp")
    pictures, wrong = images.read(root)
    files = [root / "0.png", root / "1.png", root / "more" / "UPPER.JPG"]
    captions = ["a fox", "ein Bär, der singt", "狐"]
    assert listed(pictures) == list(zip(captions, [file.read_bytes() for file in files], strict=True))
    assert [found.name for found in pictures] == list(map(str, files))
    assert wrong == [f"{root / 'lonely.webp'} has no caption"]


def test_a_folder_with_metadata(tmp_path):
    (tmp_path / "sub").mkdir()
    picture(0).save(tmp_path / "sub" / "a.png")
    picture(1).save(tmp_path / "b.gif")
    lines = [
        {"file_name": "b.gif", "text": " a fox ", "caption": "other"},
        {"file_name": "sub/a.png", "text": "a bear", "n": 1},
        {"file_name": "none.png", "text": None},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError, match=r"metadata.jsonl: name the column .*'text', 'caption'"):
        images.read(tmp_path)
    pictures, wrong = images.read(tmp_path, "text")
    expected = [("a fox", (tmp_path / "b.gif").read_bytes()), ("a bear", (tmp_path / "sub" / "a.png").read_bytes())]
    assert listed(pictures) == expected
    assert wrong == [f"{tmp_path / 'none.png'} (metadata.jsonl, line 3) has no caption"]


def test_an_image_set_of_tensorflow_datasets(tmp_path):
    builder = Emoji(data_dir=tmp_path)
    builder.download_and_prepare(file_format="array_record")
    decoded = builder.as_data_source("holdout")
    pictures, wrong = images.read(f"tfds:{builder.data_dir}:holdout", "caption")
    assert len(pictures) == len(decoded) and not wrong
    for index in range(0, len(decoded), 20):
        assert pictures[index].caption == decoded[index]["caption"].decode()
        np.testing.assert_array_equal(images.load(pictures[index], 64, 64)[0], decoded[index]["image"])
    assert pictures[3].name == f"example 3 of tfds:{builder.data_dir}:holdout"
    train = images.read(builder.data_dir, "id")[0]  # a folder of a data set, whose split is "train"
    assert len(train) == len(builder.as_data_source("train"))


@pytest.mark.parametrize(
    ("files", "column", "message"),
    [
        ({}, None, r"holds no picture \(.png, .apng, .jpg"),
        ({"a.png": b""}, None, "holds no picture with a caption: .*a.png has no caption"),
        ({"a.png": b"", "a.txt": b" \n"}, None, "a.png has no caption"),
        ({"a.png": b"", "a.txt": b"x\n\xff"}, None, r"a.txt is not UTF-8 \(line 2\)"),
        ({"a.png": b"", "a.txt": b"x"}, "text", "has no metadata.jsonl: .* leave out 'text'"),
        ({"metadata.jsonl": b'{"text": "x"}'}, None, "metadata.jsonl, line 1: expected an object with 'file_name'"),
        ({"metadata.jsonl": b'["a.png"]'}, None, "metadata.jsonl, line 1: expected an object with 'file_name'"),
        ({"metadata.jsonl": b'{"file_name": "a.png"}'}, None, "name the column of the prompts .* there are none"),
        ({"metadata.jsonl": b'{"file_name": "a.png", "text": 3}'}, None, "line 1: the caption is not text"),
        ({"metadata.jsonl": b"{"}, None, "metadata.jsonl, line 1, is not JSON"),
    ],
)
def test_sources_that_are_no_pictures(tmp_path, files, column, message):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        images.read(tmp_path, column)
    assert "\n" not in str(error.value)


def test_what_is_no_source(tmp_path):
    with pytest.raises(UserError, match="none is not a folder; expected a folder of pictures or tfds:NAME"):
        images.read(tmp_path / "none")
    with pytest.raises(UserError, match="tfds:nothing_of_this_name cannot be opened"):
        images.read("tfds:nothing_of_this_name")


# --- one picture ------------------------------------------------------------------------------------------------------


def test_the_largest_centred_part_is_taken():
    """Of a picture whose colours are its coordinates."""
    rows, columns = np.mgrid[0:120, 0:200].astype(np.uint8)
    image = Image.fromarray(np.stack([rows, columns, np.full_like(rows, 7)], axis=-1))
    np.testing.assert_array_equal(images.decode(content(image), 120, 200), np.asarray(image))
    wide = images.decode(content(image), 32, 96).astype(np.float32)  # all 200 columns and the middle 66.7 rows
    np.testing.assert_allclose(wide[16, :, 1], (np.arange(96) + 0.5) * 200 / 96 - 0.5, atol=1.5)
    np.testing.assert_allclose(wide[:, 48, 0], 60 - 200 / 6 + (np.arange(32) + 0.5) * 200 / 96 - 0.5, atol=1.5)
    tall = images.decode(content(image), 96, 32).astype(np.float32)  # all 120 rows and the middle 40 columns
    np.testing.assert_allclose(tall[48, :, 1], 80 + (np.arange(32) + 0.5) * 120 / 96 - 0.5, atol=1.5)
    assert (wide[..., 2] == 7).all() and (tall[..., 2] == 7).all()


def test_pictures_are_turned_upright_and_laid_on_white():
    image = picture(0)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    turned = images.decode(content(image, "PNG", exif=exif), 60, 40)
    np.testing.assert_array_equal(turned, np.rot90(np.asarray(image), -1))
    clear = image.convert("RGBA")
    clear.putalpha(Image.fromarray(np.repeat(np.uint8([[255, 0]]), 40, axis=0).repeat(30, axis=1)))
    laid = images.decode(content(clear), 40, 60)
    assert (laid[:, 30:] == 255).all()
    np.testing.assert_array_equal(laid[:, :30], np.asarray(image)[:, :30])
    grey = image.convert("L")
    np.testing.assert_array_equal(images.decode(content(grey), 40, 60), np.asarray(grey)[..., None].repeat(3, axis=-1))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be decoded (cannot identify image file)"),
        (content(picture(0))[:-400], "cannot be decoded ("),
        (content(picture(0, 400, 400), "JPEG")[:2000], "cannot be decoded ("),
        (content(picture(0, 100, 31)), "is 100x31, smaller than 48x32"),
        (content(picture(0, 47, 100)), "is 47x100, smaller than 48x32"),
        (
            content(Image.fromarray(np.full((40, 60), 40000, np.uint16))),
            "has pixels of mode I;16; save it as 8-bit RGB",
        ),
    ],
)
def test_pictures_that_cannot_be_used(data, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        images.decode(data, HEIGHT, WIDTH)
