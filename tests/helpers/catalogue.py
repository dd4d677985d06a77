"""The catalogue of bad inputs: what is given to which command, and the line that comes of it. A row is a test.

A row has a name, the words of a command line, a regular expression for the line on stderr, and the files that the words
name, below ``{here}``: text, bytes, or a function that makes the file. ``{pipeline}`` is a converted pipeline, in which
the row's files under "pipeline/" stand in for its own; ``{diffusers}`` the same in diffusers' layout, under
"diffusers/"; ``{recipe}`` a recipe that would train in seconds.
"""

import io
import json
import os
import re
import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

DEEP = "[" * 100_000
LONG = "a" * 5_000
GENERATE = "generate --model={pipeline} --out={here}/out --height=32 --width=32 --steps=1"
DRAW = f"{GENERATE} --prompt=fox"
MAIN = "main --config={recipe} --workdir={here}/run"
ENCODE = "encode --model={pipeline} --out={here}/out"
PROMPTS = f"{ENCODE} --prompts={{here}}/"
PICTURE, CAPTION = "photos/a.png", "photos/a.txt"
PICTURES = f"{ENCODE} --height=32 --width=32 --images={{here}}/photos"
IMPORT = "convert import --source={diffusers} --target={here}/out"


class Bad(NamedTuple):
    """A row; ``code`` is the command's exit code."""

    name: str
    words: str
    says: str
    files: Mapping[str, Any] = {}
    code: int = 1


class Changed(NamedTuple):
    """A JSON file of the model with other values; dots lead into objects."""

    values: Mapping[str, Any]


def changed(**values: Any) -> Changed:
    return Changed({key.replace("__", "."): value for key, value in values.items()})


def header(**entries: Any) -> bytes:
    """A safetensors file of a header alone."""
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def tensor(shape: Any, offsets: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def png(width: int = 64, height: int = 64, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, "PNG")
    return file.getvalue()


def huge(side: int) -> bytes:
    """The head of a PNG file of that side, and no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def parquet(make: Callable[[Any], Any]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"prompt": make(pyarrow)}), sink)
    return sink.getvalue().to_pybytes()


def not_utf8(pyarrow: Any) -> Any:
    offsets = pyarrow.array([0, 2, 4], pyarrow.int32()).buffers()[1]
    return pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, offsets, pyarrow.py_buffer(b"ok\xff\xfe")])


def metadata(name: Any, **more: Any) -> dict[str, Any]:
    return {"photos/metadata.jsonl": json.dumps({"file_name": name, "text": "a fox"} | more), "photos/a.png": png()}


def link(target: str) -> Callable[[os.PathLike], None]:
    return lambda path: os.symlink(target, path)


def folder(path: os.PathLike) -> None:
    os.mkdir(path)


FLAGS = [
    Bad("a negative seed", f"{DRAW} --seed=-1", r"^--seed=-1: must be from 0 to 18446744073709551615;"),
    Bad("a seed beyond 64 bits", f"{DRAW} --seed=18446744073709551616", r"^--seed=1844\d+: must be from 0 to 1844"),
    Bad("a seed that is no whole number", f"{DRAW} --seed=1e3", r"^--seed=1e3: must be a whole number;"),
    Bad("an axis of no devices", f"{DRAW} --data=0", r"^--data=0: must be at least 1, or -1 for the rest"),
    Bad("steps without end", f"{DRAW} --steps=99999999999", r"^--steps=99999999999: must be at most 10000;"),
    Bad("steps of thousands of digits", f"{DRAW} --steps={'9' * 5000}", r"^--steps=9+: must be a whole number;"),
    Bad("guidance that is no number", f"{DRAW} --guidance=nan", r"^--guidance=nan: must be a finite number;"),
    Bad("negative guidance", f"{DRAW} --guidance=-1", r"^--guidance=-1: must be from 0 to 1000;"),
    Bad("guidance that overflows", f"{DRAW} --guidance=1e38", r"^--guidance=1e38: must be from 0 to 1000;"),
    Bad(
        "a picture of a million pixels a side", f"{DRAW} --height=1000000", r"^--height=1000000: must be at most 16384"
    ),
    Bad(
        "more tokens than the model takes",
        f"{DRAW} --text-length=100000",
        r"^--text-length=100000: FLUX.1 takes at most 512 tokens of a prompt$",
    ),
    Bad(
        "the same when encoding",
        f"{PROMPTS}a.txt --text-length=513",
        r"^--text-length=513: FLUX.1 takes at most 512",
        {"a.txt": "fox"},
    ),
    Bad("an empty path", f"{GENERATE} --prompts=", r"^--prompts=: is empty; name a file or folder;"),
    Bad(
        "a path that is not UTF-8",
        f"{GENERATE} --prompts=\udcff.txt",
        r"^--prompts='\\udcff.txt': the name is not UTF-",
    ),
    Bad(
        "a prompt for a file of prompts",
        f"{GENERATE} --prompts={'fox_' * 100}",
        r"^'fox_fox_.*'\.\.\. is too long for the name of a file; a prompt itself is given by --prompt$",
    ),
    Bad("a path that is too long in the middle", f"{GENERATE} --prompts=/{LONG}/a.txt", r"File name too long"),
    Bad(
        "a size beyond all numbers",
        f"convert export --source=a --target=b --format=bfl --max-shard-size={'9' * 400}",
        r"^--max-shard-size=9+: must be a size, as 10GB or 500MB;",
    ),
    Bad("a device for prompts", f"{GENERATE} --prompts=/dev/zero", r"^/dev/zero cannot be read: a device, not a file$"),
    Bad(
        "a folder for prompts", f"{GENERATE} --prompts={{here}}", r" cannot be read: it is a folder; expected a file of"
    ),
    Bad("a pattern of nothing", f"{GENERATE} --prompts={{here}}/*.none", r"\*\.none matches no file$"),
    Bad(
        "a file in the way of a folder",
        f"{DRAW} --out={{here}}/a",
        r"^--out=.*/a: .*/a is no folder; choose",
        {"a": ""},
    ),
    Bad(
        "a file in the way above it",
        f"{DRAW} --out={{here}}/a/b",
        r"^--out=.*/a/b: .*/a is no folder; choose",
        {"a": ""},
    ),
    Bad("a file for a workdir", f"{MAIN}/a", r"^--workdir=.*/run/a: .*/run is no folder; choose another", {"run": ""}),
    Bad(
        "a file for a data set", f"{PROMPTS}a --out={{here}}/a", r"^--out=.*/a: .*/a is no folder; choose", {"a": "fox"}
    ),
    Bad(
        "a file for an evaluation", "evaluate --model={pipeline} --out={here}/a", r"^--out=.*/a is no folder", {"a": ""}
    ),
    Bad(
        "a folder for a sheet", "inspect_data {here} --sheet={here}", r"^--sheet=.* is a folder; choose another place$"
    ),
    Bad(
        "a folder for a drawing", "growth --reports={here}/*.json --out={here}", r"^--out=.* is a folder; choose anoth"
    ),
    Bad(
        "reports of something else",
        "growth --reports={here}/a.json --out={here}/a.svg",
        r"^--reports: .*a\.json was not written by preflight's --json",
        {"a.json": "[1, {}]"},
    ),
    Bad("latents that are no file of arrays", f"{DRAW} --latents={{here}}/a", r"expected an npz file", {"a": "fox"}),
    Bad("latents of a device", f"{DRAW} --latents=/dev/zero", r"^--latents=/dev/zero: a device, not a file; expected"),
    Bad(
        "latents that are no numbers",
        f"{DRAW} --latents={{here}}/a.npz",
        r"`latents` must be finite floating-point",
        {"a.npz": npz(latents=np.full((1, 4, 64), np.nan, np.float32))},
    ),
    Bad(
        "latents under another name",
        f"{DRAW} --latents={{here}}/a.npz",
        r"^--latents=.*expected an npz file with an",
        {"a.npz": npz(noise=np.zeros(3))},
    ),
    Bad(
        "a run that is none",
        f"{DRAW} --checkpoint={{here}}/a",
        r"/a is not a folder; expected the --workdir",
        {"a": ""},
    ),
    Bad(
        "a flag of pictures for prompts",
        f"{PROMPTS}a.txt --outside=read",
        r"^--outside=read is for --images; leave it",
        {"a.txt": "fox"},
    ),
]

KEYS = [
    Bad(f"--config.{key}={value}", f"{MAIN} --config.{key}={value}", rf"^(--)?config\.{re.escape(key)}.*{says}")
    for key, value, says in (
        ("seed", "-1", "must be from 0 to 18446744073709551615"),
        ("seed", str(2**64), "must be from 0 to 18446744073709551615"),
        ("steps", "0", "must be at least 1"),
        ("steps", "1" + 30 * "0", "must be at most 1000000000"),
        ("align.train_timestep", "(5.0,25.0)", "must be whole numbers, as 1,2"),
        ("align.discount_positive", "(None,None)", "must be finite numbers"),
        ("align.discount_positive", "('a','b')", "must be finite numbers"),
        ("align.weights", "0.1,nan", "must be finite numbers"),
        ("align.length", "1000000000", "must be at most 1000000"),
        ("rollout.guidance", "nan", "must be a finite number"),
        ("rollout.guidance", "1e30", "must be at most 1000"),
        ("rollout.steps", "1000000", "must be at most 10000"),
        ("rollout.cache_ends", "1,-1", "must be two whole numbers"),
        ("optim.learning_rate", "inf", "must be a finite number"),
        ("optim.learning_rate", "1e39", "must be a finite number"),
        ("optim.b1", "1", "must be at least 0 and less than 1"),
        ("data.height", "999999999", "must be at most 16384"),
        ("data.text_length", "1000", "FLUX.1 takes at most 512 tokens"),
        ("data.filter.include", "(", "is not a regular expression"),
        ("lora.targets", "a[", "is not a regular expression"),
        ("mesh.data", "0", "must be at least 1, or -1"),
        ("sample.count", "-3", "must be at least 1"),
        ("reward.models.clip.weight", "-1", "must not be negative"),
    )
]

TEXTS = [
    Bad("JSON in JSON in JSON", f"{PROMPTS}a.json", r"a\.json is not JSON: it is nested too deeply$", {"a.json": DEEP}),
    Bad(
        "the same in a line", f"{PROMPTS}a.jsonl", r"line 2, is not JSON: it is nested too", {"a.jsonl": '"x"\n' + DEEP}
    ),
    Bad(
        "a value in a value that is no text",
        f"{PROMPTS}a.json",
        r"item 0: expected text, found",
        {"a.json": f"[{'[' * 900}{']' * 901}"},
    ),
    Bad(
        "a number of 5,000 digits",
        f"{PROMPTS}a.json",
        r"a\.json is not JSON: Exceeds the limit",
        {"a.json": "9" * 5000},
    ),
    Bad("JSON that is no list", f"{PROMPTS}a.json", r"holds dict; expected a list", {"a.json": "{}"}),
    Bad("numbers for prompts", f"{PROMPTS}a.json", r"item 0: expected text, found 1$", {"a.json": "[1]"}),
    Bad("lines under the name of JSON", f"{PROMPTS}a.json", r"named \.jsonl$", {"a.json": '{"a": 1}\n{"a": 2}'}),
    Bad("a line that is no JSON", f"{PROMPTS}a.jsonl", r"a\.jsonl, line 2, is not JSON", {"a.jsonl": '"fox"\nbear'}),
    Bad("a quote that is not closed", f"{PROMPTS}a.csv", r"a\.csv, line \d: unexpected end", {"a.csv": 'prompt\n"fox'}),
    Bad("more fields than columns", f"{PROMPTS}a.csv", r"line 2: 2 fields under 1 col", {"a.csv": "prompt\na, b"}),
    Bad(
        "no such column", f"{PROMPTS}a.csv --column=x", r"has no column 'x'; there are 'prompt'", {"a.csv": "prompt\na"}
    ),
    Bad("text that is not UTF-8", f"{PROMPTS}a.txt", r"a\.txt is not UTF-8 \(line 2\)", {"a.txt": b"fox\n\xff\xfe"}),
    Bad("an empty file", f"{PROMPTS}a.txt", r"a\.txt holds no prompt$", {"a.txt": ""}),
    Bad("no Parquet", f"{PROMPTS}a.parquet", r"a\.parquet cannot be read as Parquet", {"a.parquet": b"PAR1xxxxPAR1"}),
    Bad(
        "Parquet that is cut short",
        f"{PROMPTS}a.parquet",
        r"a\.parquet cannot be read as Parquet",
        {"a.parquet": parquet(lambda pa: pa.array(["fox"]))[:-20]},
    ),
    Bad(
        "a device for Parquet",
        f"{PROMPTS}a.parquet",
        r"cannot be read as Parquet: a device",
        {"a.parquet": link("/dev/zero")},
    ),
    Bad(
        "times in nanoseconds",
        f"{PROMPTS}a.parquet",
        r"the column 'prompt' holds timestamp\[ns\], not text; name another",
        {"a.parquet": parquet(lambda pa: pa.array([1], pa.timestamp("ns")))},
    ),
    Bad(
        "lists for prompts",
        f"{PROMPTS}a.parquet",
        r"the column 'prompt' holds list<.*>, not text",
        {"a.parquet": parquet(lambda pa: pa.array([["fox"]]))},
    ),
    Bad(
        "bytes in Parquet that are no text",
        f"{PROMPTS}a.parquet",
        r"a\.parquet, row 1, is not UTF-8",
        {"a.parquet": parquet(not_utf8)},
    ),
    Bad(
        "an expression that is none",
        f"{PROMPTS}a.txt --include=(",
        r"^include: '\(' is not a regular expr",
        {"a.txt": "fox"},
    ),
    Bad(
        "an expression that goes on for ever",
        f"{PROMPTS}a.txt --include=(a|aa)+$",
        r"^include: .* takes more than 1 s for 'aaa.*write it without a repetition inside",
        {"a.txt": "a" * 60 + "b"},
    ),
    Bad("a data set that nobody knows", f"{ENCODE} --prompts=tfds:{{here}}/none", r"^tfds:.*/none cannot be opened"),
    Bad(
        "a data set that is broken",
        f"{ENCODE} --prompts={{here}}/d",
        r"^tfds:.*/d cannot be opened",
        {"d/dataset_info.json": "{"},
    ),
]

PHOTOS = [
    Bad(
        "a picture above the folder",
        PICTURES,
        r"no picture with a caption: .*/\.\./x\.png \(metadata\.jsonl, line 1\) lies outside of "
        r".*/photos; copy it there, or let such pictures be read by --outside=read",
        metadata("../x.png") | {"x.png": png()},
    ),
    Bad(
        "an absolute path",
        PICTURES,
        r"/etc/passwd \(metadata\.jsonl, line 1\) lies outside of",
        metadata("/etc/passwd"),
    ),
    Bad(
        "a link that leads out",
        PICTURES,
        r"b\.png .* lies outside of",
        metadata("b.png") | {"photos/b.png": link("../x.png"), "x.png": png()},
    ),
    Bad(
        "a folder that leads out",
        PICTURES,
        r"more/x\.png .* lies outside",
        metadata("more/x.png") | {"photos/more": link(".."), "x.png": png()},
    ),
    Bad(
        "a device",
        f"{PICTURES} --outside=read",
        r"/dev/zero .* cannot be read \(a device, not a file\)",
        metadata("/dev/zero"),
    ),
    Bad(
        "a device for a picture to compare",
        "evaluate --pictures={here}/photos --score=clip:{reward} --out={here}/out --outside=read",
        r"/dev/zero .* cannot be read: a device, not a file",
        metadata("/dev/zero"),
    ),
    Bad("a null character", PICTURES, r"line 1: the text holds a NUL; mend it", metadata("a\0.png")),
    Bad(
        "half a character",
        PICTURES,
        r"line 1: \\ud83d is half of a character",
        metadata("\ud83d.png"),
    ),
    Bad("a name of 5,000 letters", PICTURES, r"aaa\.\.\. .* cannot be read \(File name too long\)", metadata(LONG)),
    Bad("the folder itself", PICTURES, r"cannot be read \(Is a directory\)", metadata(".")),
    Bad("a number for a name", PICTURES, r"line 1: expected an object with 'file_name'$", metadata(3)),
    Bad("a number for a caption", PICTURES, r"line 1: the caption is not text$", metadata("a.png", text=3)),
    Bad(
        "a line that is too deep",
        PICTURES,
        r"line 1, is not JSON: it is nested too deeply",
        {"photos/metadata.jsonl": DEEP},
    ),
    Bad(
        "a pipe for a list of pictures",
        PICTURES,
        r"cannot be read: a pipe, not a file",
        {"photos/metadata.jsonl": os.mkfifo},
    ),
    Bad(
        "a pipe for a picture",
        PICTURES,
        r"a\.png cannot be read \(a pipe, not a file\)",
        {PICTURE: os.mkfifo, CAPTION: "fox"},
    ),
    Bad(
        "a pipe for a caption",
        PICTURES,
        r"a\.txt cannot be read: a pipe, not a file",
        {PICTURE: png(), CAPTION: os.mkfifo},
    ),
    Bad(
        "a folder named like a picture",
        PICTURES,
        r"holds no picture",
        {PICTURE: folder, CAPTION: "fox"},
    ),
    Bad(
        "a picture of 13,000 x 13,000",
        PICTURES,
        r"13000x13000 are more than 134217728 pixels",
        {PICTURE: huge(13_000), CAPTION: "fox"},
    ),
    Bad(
        "a picture beyond --max-pixels",
        f"{PICTURES} --max-pixels=4095",
        r"64x64 are more than 4095 pixels",
        metadata("a.png"),
    ),
    Bad(
        "a file beyond --max-pixels",
        f"{PICTURES} --max-pixels=10",
        r"\d+ bytes, and at most 80 are read",
        metadata("a.png"),
    ),
    Bad(
        "a picture of 16 bits",
        PICTURES,
        r"a\.png has pixels of mode I;16; save it",
        {PICTURE: png(mode="I;16"), CAPTION: "fox"},
    ),
    Bad("a picture that is cut short", PICTURES, r"a\.png cannot be decoded", {PICTURE: png()[:60], CAPTION: "fox"}),
    Bad(
        "a picture that is too small",
        PICTURES,
        r"a\.png is 16x16, smaller than 32x32",
        {PICTURE: png(16, 16), CAPTION: "fox"},
    ),
    Bad(
        "a program for Ghostscript",
        PICTURES,
        r"a\.png cannot be decoded \(cannot identify image file",
        {PICTURE: "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", CAPTION: "fox"},
    ),
]

TRANSFORMER, VAE, CLIP, T5 = (
    f"pipeline/{part}/config.json" for part in ("transformer", "vae", "text_encoder", "text_encoder_2")
)
WEIGHTS = "pipeline/vae/weights.safetensors"
TOKENIZER = "pipeline/tokenizer_2"
SCHEDULER = "pipeline/scheduler/scheduler_config.json"
MODELS = [
    Bad(
        "a negative number of blocks",
        DRAW,
        r"num_layers=-1 must be a whole number from 0 to 1024$",
        {TRANSFORMER: changed(config__num_layers=-1)},
    ),
    Bad(
        "text for a number of blocks",
        DRAW,
        r"num_layers='3' must be a whole number",
        {TRANSFORMER: changed(config__num_layers="3")},
    ),
    Bad(
        "a million blocks",
        DRAW,
        r"num_layers=1000000 must be a whole number from 0 to 1024",
        {TRANSFORMER: changed(config__num_layers=10**6)},
    ),
    Bad(
        "no heads",
        DRAW,
        r"num_attention_heads=0 must be a whole number from 1 to",
        {TRANSFORMER: changed(config__num_attention_heads=0)},
    ),
    Bad(
        "two axes",
        DRAW,
        r"axes_dims_rope=\[8, 8\] must be a list of 3",
        {TRANSFORMER: changed(config__axes_dims_rope=[8, 8])},
    ),
    Bad(
        "a width beyond all memory",
        DRAW,
        r"are wider than 1048576$",
        {TRANSFORMER: changed(config__num_attention_heads=2**20)},
    ),
    Bad(
        "sizes that are no object",
        DRAW,
        r"expected an object with the sizes of the network, found 3$",
        {TRANSFORMER: changed(config=3)},
    ),
    Bad(
        "no groups of channels",
        DRAW,
        r"norm_num_groups=0 must be a whole number from 1 to",
        {VAE: changed(config__norm_num_groups=0)},
    ),
    Bad(
        "no levels",
        DRAW,
        r"block_out_channels=\[\] must be a list, each .*; from 1 to 8 of them",
        {VAE: changed(config__block_out_channels=[])},
    ),
    Bad(
        "layers without end",
        DRAW,
        r"layers_per_block=1000000000000 must be a whole number from 1 to 16",
        {VAE: changed(config__layers_per_block=10**12)},
    ),
    Bad(
        "a factor of 0",
        DRAW,
        r"scaling_factor=0 must be a number from 1e-06 to",
        {VAE: changed(config__scaling_factor=0)},
    ),
    Bad(
        "a list for a width",
        DRAW,
        r"hidden_size=\[16\] must be a whole number",
        {CLIP: changed(config__hidden_size=[16])},
    ),
    Bad(
        "heads that do not divide the width",
        DRAW,
        r"hidden_size=16 is not a multiple of num_attention_heads=3",
        {CLIP: changed(config__num_attention_heads=3)},
    ),
    Bad("an object for an activation", DRAW, r"hidden_act=\{\} must be text$", {CLIP: changed(config__hidden_act={})}),
    Bad(
        "no buckets of distance",
        DRAW,
        r"num_buckets=0 must be a whole number from 4 to",
        {T5: changed(config__relative_attention_num_buckets=0)},
    ),
    Bad(
        "a distance within the first bucket",
        DRAW,
        r"max_distance=2 must be larger than a quarter of",
        {T5: changed(config__relative_attention_max_distance=2)},
    ),
    Bad(
        "an epsilon that is no number",
        DRAW,
        r"layer_norm_epsilon=nan must be a number from 0 to 1",
        {T5: changed(config__layer_norm_epsilon=float("nan"))},
    ),
    Bad(
        "a config that is too deep", DRAW, r"config\.json cannot be read as JSON: it is nested too deeply", {VAE: DEEP}
    ),
    Bad(
        "a device for a config",
        DRAW,
        r"config\.json cannot be read as JSON: a device, not a file",
        {VAE: link("/dev/zero")},
    ),
    Bad("a pipe for a config", DRAW, r"config\.json cannot be read as JSON: a pipe, not a file", {VAE: os.mkfifo}),
    Bad("text for a shift", DRAW, r"shift='3' must be a number from 0.001 to 1000", {SCHEDULER: changed(shift="3")}),
    Bad(
        "a schedule without a slope",
        DRAW,
        r"base_image_seq_len=256 must be less than max_image_seq_len=256",
        {SCHEDULER: changed(max_image_seq_len=256)},
    ),
    Bad(
        "yes for true",
        DRAW,
        r"use_dynamic_shifting='yes' must be true or false",
        {SCHEDULER: changed(use_dynamic_shifting="yes")},
    ),
    Bad(
        "a list for a kind of shift",
        DRAW,
        r"time_shift_type=\[1\] is not supported",
        {SCHEDULER: changed(time_shift_type=[1])},
    ),
    Bad("a scheduler that is no object", DRAW, r"scheduler_config\.json holds no JSON object", {SCHEDULER: "[]"}),
    Bad(
        "a scheduler that training reads",
        f"{MAIN} --config.model.path={{pipeline}} --config.sample.every=1",
        r"max_shift=1e\+99 must be a number from -10 to 10",
        {SCHEDULER: changed(max_shift=1e99)},
    ),
    Bad(
        "a header that is too deep",
        DRAW,
        r"is not a safetensors file \(it is nested too deeply\)",
        {WEIGHTS: struct.pack("<Q", 100_000) + DEEP.encode()},
    ),
    Bad(
        "a negative shape",
        DRAW,
        r"tensor x: shape=\[-1\] must be a list, each a whole",
        {WEIGHTS: header(x=tensor([-1], [0, 4]))},
    ),
    Bad(
        "a shape of a hundred axes",
        DRAW,
        r"tensor x: shape=\[1, 1.* must be a list",
        {WEIGHTS: header(x=tensor([1] * 100, [0, 4]))},
    ),
    Bad("a number for a tensor", DRAW, r"tensor x: expected an object, found 3", {WEIGHTS: header(x=3)}),
    Bad("a list for a dtype", DRAW, r"tensor x: dtype=\[\] must be text", {WEIGHTS: header(x=tensor([1], [0, 4], []))}),
    Bad("a device for weights", DRAW, r"a device, not a file; choose another file", {WEIGHTS: link("/dev/zero")}),
    Bad(
        "a tokenizer whose length is text",
        DRAW,
        r"model_max_length='x' must be a whole number, at least 2",
        {f"{TOKENIZER}/tokenizer_config.json": changed(model_max_length="x")},
    ),
    Bad(
        "a tokenizer that is broken",
        DRAW,
        r"tokenizer_2 cannot be read as a tokenizer",
        {f"{TOKENIZER}/tokenizer.json": '{"version": 1'},
    ),
]

INDEX = "diffusers/model_index.json"
SHARDS = "diffusers/vae/diffusion_pytorch_model.safetensors.index.json"
IMPORTS = [
    Bad(
        "a number for a component",
        IMPORT,
        r"vae=3 must be a list of two, a library and a class, or null$",
        {INDEX: changed(vae=3)},
    ),
    Bad(
        "an object for a component",
        IMPORT,
        r"transformer=\{'a': 1\} must be a list of two",
        {INDEX: changed(transformer={"a": 1})},
    ),
    Bad(
        "an empty list for a component", IMPORT, r"scheduler=\[\] must be a list of two", {INDEX: changed(scheduler=[])}
    ),
    Bad(
        "a list for a pipeline's class",
        IMPORT,
        r"describes no pipeline; expected a FluxPipeline",
        {INDEX: changed(_class_name=["FluxPipeline"])},
    ),
    Bad(
        "negative sizes in others' config",
        IMPORT,
        r"in_channels=-64 must be a whole number from 1 to",
        {"diffusers/transformer/config.json": changed(in_channels=-64)},
    ),
    Bad(
        "a number for a list of blocks",
        IMPORT,
        r"down_block_types=3; only 'DownEncoderBlock2D' is supported",
        {"diffusers/vae/config.json": changed(down_block_types=3)},
    ),
    Bad(
        "shards elsewhere",
        IMPORT,
        r"names '\.\./x\.safetensors', which is no file of weights beside it",
        {SHARDS: '{"weight_map": {"a": "../x.safetensors"}}'},
    ),
    Bad(
        "an index that names itself",
        IMPORT,
        r"which is no file of weights beside it",
        {SHARDS: json.dumps({"weight_map": {"a": SHARDS.rpartition("/")[2]}})},
    ),
    Bad("an index of a list", IMPORT, r"has no weight_map", {SHARDS: '{"weight_map": []}'}),
    Bad(
        "a device for weights of others",
        "convert import --source=/dev/zero --target={here}/out",
        r"^/dev/zero does not exist$",
    ),
    Bad(
        "a tokenizer without a class",
        "convert export --source={pipeline} --target={here}/out --format=diffusers",
        r"tokenizer_config\.json: tokenizer_class=None must be text; export needs it$",
        {"pipeline/tokenizer/tokenizer_config.json": "{}"},
    ),
    Bad(
        "a data set's manifest that is broken",
        "inspect_data {here}/d",
        r"encoding\.json is damaged",
        {"d/encoding.json": '{"format": "srpo_jax.data/1", "arrays": 3}'},
    ),
]

CATALOGUE = [*FLAGS, *KEYS, *TEXTS, *PHOTOS, *MODELS, *IMPORTS]
