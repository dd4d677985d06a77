"""What people reported of other programs, tried with the commands here: input, command, exit code, and what is told or
what is read. Each kind has siblings that nobody reported.

Nothing is encoded or drawn: what the commands would encode or draw is the value.
"""

import bz2
import gzip
import io
import json
import lzma
import os
import re
import types
import typing

import pyarrow
import pyarrow.parquet
import pytest
from helpers.photos import content, picture
from PIL import PngImagePlugin

from srpo_jax import encode, errors, generate, main

HALF = '{"prompt": "a fox"}\n{"prompt": "a smile \\ud83d"}\n'
FOX = ["a red fox", "a blue car"]
MAX_SEED = 2**64 - 1


class Case(typing.NamedTuple):
    """Files by name, the words of a command (run in their folder), its exit code, and what it reads or says."""

    files: dict
    words: str
    code: int
    found: list | str


def parquet(**columns):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def prompts(name, data, found, *, code=0, more=""):
    return Case({name: data}, f"encode --prompts={name} {more}", code, found)


def refused(name, data, message, more=""):
    return prompts(name, data, message, code=1, more=more)


def photo(kind="PNG", **options):
    return content(picture(0, 96, 64), kind, **options)


def photos(files, found, *, code=0, more=""):
    return Case({f"d/{name}": data for name, data in files.items()}, f"encode --images=d {more}", code, found)


def lines(*objects):
    return "".join(json.dumps(item) + "\n" for item in objects)


def link(target):
    return types.SimpleNamespace(target=target)


def big_text():
    info = PngImagePlugin.PngInfo()
    info.add_itxt("workflow", "x" * (2 << 20), zip=True)
    return photo(pnginfo=info)


A, B = {"file_name": "a.png", "text": "a red fox"}, {"file_name": "b.png", "text": "a blue car"}
TWO = {"a.png": photo(), "b.png": photo()}

TEXT = {
    # --- separators ---
    "semicolons": prompts("p.csv", "id;prompt;style\n1;a red fox;photo\n2;a blue car;oil\n", FOX),
    "semicolons, a mark before": prompts("p.csv", "\ufeffprompt;id\r\na red fox;1\r\na blue car;2\r\n", FOX),
    "bars": prompts("p.csv", "id|prompt\n1|a red fox\n2|a blue car\n", FOX),
    "tabs in .csv": prompts("p.csv", "id\tprompt\n1\ta red fox\n2\ta blue car\n", FOX),
    "commas in .tsv": prompts("p.tsv", "id,prompt\n1,a red fox\n2,a blue car\n", FOX),
    "the line of Excel": prompts("p.csv", "sep=;\nid;prompt\n1;a red fox\n2;a blue car\n", FOX),
    "the line of Excel, another": prompts("p.csv", '"SEP=^"\r\nid^prompt\r\n1^a red fox\r\n2^a blue car\r\n', FOX),
    "semicolons, commas in text": prompts(
        "p.csv", 'n;caption\n1,5;"a fox; red, old"\n2,5;a car\n', ["a fox; red, old", "a car"]
    ),
    "semicolons, the column named": prompts(
        "p.csv", "id;title\n1;a red fox\n2;a blue car\n", FOX, more="--column=title"
    ),
    "commas, semicolons in text": prompts("p.csv", "prompt,n\na; b; c,1\n", ["a; b; c"]),
    "a table of old Macs": prompts("p.csv", "id,prompt\r1,a red fox\r2,a blue car\r", FOX),
    "a line that does not fit": refused(
        "p.csv", "sep=;\nid;prompt\n1;a;b\n", "p.csv, line 3: 3 fields under 2 columns"
    ),
    # --- columns ---
    "one column without a name": refused(
        "p.csv", "a red fox\na blue car\n", "p.csv begins with 'a red fox'.*line with prompt"
    ),
    "the same in quotes": refused("p.csv", '"a red fox, old"\n"a blue car"\n', "begins with 'a red fox, old'"),
    "the same in .tsv": refused("p.tsv", "a red fox\na blue car\n", "begins with 'a red fox'"),
    "one column with a strange name": prompts("p.csv", "title\na red fox\na blue car\n", FOX, more="--column=title"),
    "capital letters": prompts("p.csv", "ID,Prompt\n1,a red fox\n2,a blue car\n", FOX),
    "capital letters in JSON": prompts("p.jsonl", lines({"Text": "a red fox"}, {"Text": "a blue car"}), FOX),
    "two that could be": refused("p.csv", "prompt,caption\na,b\n", "name the column .* by --column=NAME"),
    "one name twice": refused("p.csv", "prompt,prompt\na,b\n", "several columns 'prompt'"),
    "objects without a text": refused("p.jsonl", lines({"id": "1"}), "line 1: name the column.*there are 'id'"),
    "objects with a file": refused("p.jsonl", lines({"file_name": "a.png"}), "line 1: name the column.*'file_name'"),
    "objects with an address": refused("p.json", '[{"url": "https://x"}]', "item 0: name the column.*'url'"),
    "Parquet without a text": refused("p.parquet", parquet(id=["1"]), "name the column.*'id'"),
    # --- characters ---
    "half an emoji": refused("p.jsonl", HALF, r"p.jsonl, line 2: \\ud83d is half of a character"),
    "half an emoji in a list": refused("p.json", r'["a", "b \udc00"]', r"item 1: \\udc00 is half of a character"),
    "a whole emoji": prompts("p.json", r'["a \ud83d\ude00"]', ["a \U0001f600"]),
    "half an emoji as bytes": refused("p.txt", b"a fox\na \xed\xa0\xbd\n", r"not UTF-8 \(line 2\)"),
    "a NUL in JSON": refused("p.jsonl", lines({"prompt": "a\0b"}), "line 1: the text holds a NUL"),
    "UTF-16": refused("p.txt", "a fox\na car".encode("utf-16"), "is UTF-16; save it as UTF-8"),
    "UTF-16 without a mark": refused("p.txt", "a fox\na car".encode("utf-16-le"), "holds a NUL .line 1.: it is UTF-16"),
    "old Macs": prompts("p.txt", "a red fox\ra blue car\r", FOX),
    "old Macs, JSON": prompts("p.jsonl", '"a red fox"\r"a blue car"\r', FOX),
    "marks within": prompts("p.txt", "a red fox\n\ufeffa blue car\n\ufeff\n", FOX),
    "marks within JSON": prompts("p.jsonl", '"a red fox"\n\ufeff"a blue car"\n', FOX),
    "of zero width": prompts("p.txt", "\u200b\na red fox\u200b\n\u2060\u200d\n a blue car \u00ad\n", FOX),
    "nothing to see": refused("p.txt", "\u200b\n\ufe0f\n\u3164\n", "holds no prompt"),
    "joined emoji stay": prompts(
        "p.txt", "\U0001f469\u200d\U0001f680\n\u2764\ufe0f\n", ["\U0001f469\u200d\U0001f680", "\u2764\ufe0f"]
    ),
    # --- packed ---
    "gzip": prompts("p.txt.gz", gzip.compress("\n".join(FOX).encode()), FOX),
    "gzip of CSV": prompts("p.CSV.GZ", gzip.compress(b"id;prompt\n1;a red fox\n2;a blue car\n"), FOX),
    "bzip2 of JSON Lines": prompts("p.jsonl.bz2", bz2.compress(lines(*FOX).encode()), FOX),
    "xz of Parquet": prompts("p.parquet.xz", lzma.compress(parquet(prompt=FOX)), FOX),
    "gzip by another name": refused("p.txt", gzip.compress(b"a"), "packed by gzip; name it so"),
    "gzip, cut off": refused("p.txt.gz", gzip.compress(b"a fox" * 999)[:-9], "cannot be unpacked"),
    "a name of gzip alone": refused("p.txt.gz", b"a fox\n", "cannot be unpacked"),
    "a spreadsheet": refused("p.xlsx", b"PK\x03\x04xx", "a zip archive or a spreadsheet"),
    "a folder of Parquet": Case(
        {"d/a.parquet": parquet(prompt=FOX)}, "encode --prompts=d", 1, r"pattern, as 'd/\*.parquet'"
    ),
    "a folder of save_to_disk": Case(
        {"d/dataset_info.json": "{}", "d/state.json": "{}"}, "encode --prompts=d", 1, "save_to_disk .*to_parquet"
    ),
}

PICTURES = {
    # --- kinds of files ---
    **{
        kind: photos({f"a{kind}": photo(form), "a.txt": "a red fox"}, ["a red fox"])
        for kind, form in (
            (".jfif", "JPEG"),
            (".avif", "AVIF"),
            (".gif", "GIF"),
            (".JPE", "JPEG"),
            (".jp2", "JPEG2000"),
        )
    },
    "of telephones": photos({"a.heic": b"x", "a.txt": "a fox", **TWO}, "a.heic is a picture of a kind", code=1),
    "linked": photos({"../far/a.png": photo(), "../far/a.txt": "a red fox", "near": link("../far")}, ["a red fox"]),
    "a linked file": photos({"../a.png": photo(), "b.png": link("../a.png"), "b.txt": "a red fox"}, ["a red fox"]),
    "linked to itself": photos({"a.png": photo(), "a.txt": "a red fox", "round": link(".")}, ["a red fox"]),
    "linked twice": photos({"z/a.png": photo(), "z/a.txt": "a red fox", "b": link("z")}, ["a red fox"]),
    "much text": photos({"a.png": big_text(), "a.txt": "a red fox"}, ["a red fox"]),
    "packed together": photos({"000.tar": b"x"}, "000.tar is not looked into: unpack it", code=1),
    # --- captions ---
    ".caption": photos({"a.png": photo(), "a.caption": "a red fox"}, ["a red fox"]),
    ".TXT": photos({"a.png": photo(), "a.TXT": "a red fox"}, ["a red fox"]),
    "two that differ": photos({"a.png": photo(), "a.txt": "a", "a.caption": "b"}, "a.png has several captions", code=1),
    "two of one text": photos({"a.png": photo(), "a.txt": "a red fox", "a.caption": "a red fox\n"}, ["a red fox"]),
    "nothing to see": photos({"a.png": photo(), "a.txt": "\u200b"}, "a.png has no caption", code=1),
    "metadata.csv": photos({**TWO, "metadata.csv": "file_name;text\na.png;a red fox\nb.png;a blue car\n"}, FOX),
    "metadata.parquet": photos({**TWO, "metadata.parquet": parquet(file_name=["a.png", "b.png"], text=FOX)}, FOX),
    "metadata.jsonl below": photos(
        {"train/a.png": photo(), "train/b.png": photo(), "train/metadata.jsonl": lines(A, B)}, FOX
    ),
    "metadata.csv below, one column named": photos(
        {"x/a.png": photo(), "x/metadata.csv": "file_name,title\na.png,a red fox\n"},
        ["a red fox"],
        more="--column=title",
    ),
    "two metadata files": photos({**TWO, "metadata.csv": "", "metadata.jsonl": ""}, "keep one of them", code=1),
    "a line without a caption": photos(
        {**TWO, "metadata.jsonl": lines(A, {"file_name": "b.png"})}, FOX[:1], more="--broken=skip"
    ),
    "a line without a file": photos({**TWO, "metadata.jsonl": lines({"text": "x"}, A)}, FOX[:1], more="--broken=skip"),
    "a caption that is a number": photos(
        {**TWO, "metadata.jsonl": lines(A, {**B, "text": 3})}, FOX[:1], more="--broken=skip"
    ),
    "half an emoji": photos(
        {**TWO, "metadata.jsonl": lines(A, {**B, "text": "x \ud83d"})}, "half of a character", code=1
    ),
    "half an emoji, left out": photos(
        {**TWO, "metadata.jsonl": lines(A, {**B, "text": "x \ud83d"})}, FOX[:1], more="--broken=skip"
    ),
    "captions of another name": photos(
        {**TWO, "metadata.jsonl": lines({"file_name": "a.png", "tags": "x"})}, "name the column.*'tags'", code=1
    ),
}

WORDS = {
    # --- folders of pictures that were drawn ---
    "old pictures": Case(
        {"out/0000-a-cat.png": b"", "p.txt": "a fox"}, "generate --prompts=p.txt", 1, "out holds 1 files.*0000-a-cat"
    ),
    "more pictures than now": Case(
        {"out/0001-a-cat.png": b"", "p.txt": "a fox"}, "generate --prompts=p.txt", 1, "out holds 1 files"
    ),
    "something else": Case(
        {"out/notes.md": b"", "p.txt": "a fox"}, "generate --prompts=p.txt", 1, "holds 1 files.*notes.md"
    ),
    "pictures of these prompts": Case(
        {"out/0000-a-fox.png": b"", "out/.DS_Store": b"", "out/lost+found/x": b"", "p.txt": "a fox"},
        "generate --prompts=p.txt --height=40",
        1,
        "--height=40: must be",
    ),
    "a file": Case({"out": b"", "p.txt": "a fox"}, "generate --prompts=p.txt", 1, "--out=out: .*out is no folder"),
    "no column": Case({"p.csv": "a,b\n1,2\n"}, "generate --prompts=p.csv", 1, "name the column .*--column=NAME"),
    # --- keys ---
    "lr": Case({}, "main --config.optim.lr=1", 1, "do you mean config.optim.learning_rate"),
    "wd": Case({}, "main --config.optim.wd=1", 1, "do you mean config.optim.weight_decay"),
    "a key without its group": Case({}, "main --config.learning_rate=1", 1, "do you mean config.optim.learning_rate"),
    "a key of another group": Case({}, "main --config.data.guidance=1", 1, "do you mean config.align.guidance"),
    "nothing like it": Case({}, "main --config.optim.zzz=1", 1, "config.optim.zzz is unknown; see --help"),
    "a number that is none": Case({}, "generate --guidance=nan", 1, "--guidance=nan: must be a finite number"),
    "a seed beyond 64 bits": Case({}, f"generate --seed={MAX_SEED + 1}", 1, f"must be from 0 to {MAX_SEED}"),
    # --- names of workdirs ---
    "brackets": Case({}, "main --workdir=lr[1e-5]", 1, r"lr\[1e-5\].: checkpoints cannot be opened in a folder"),
    "brackets above": Case({}, "main --workdir=a[b]/run", 1, "checkpoints cannot be opened"),
    "a star": Case({}, "main --workdir=run*", 1, "checkpoints cannot be opened"),
    "a backslash": Case({}, "main --workdir=runs\\hps", 1, "checkpoints cannot be opened"),
    "no UTF-8": Case({}, "main --workdir=run\udcff", 1, "the name is not UTF-8; give it another one"),
    "brackets, read": Case(
        {"a[b]/x": b""}, "generate --prompt=x --checkpoint=a[b]", 1, "checkpoints cannot be opened.*rename the folder"
    ),
}


def write(files):
    for name, data in files.items():
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        if isinstance(data, types.SimpleNamespace):
            os.symlink(data.target, name)
        else:
            with open(name, "wb") as file:
                file.write(data if isinstance(data, bytes) else data.encode())


CASES = {f"{group}: {name}": case for group, cases in (("text", TEXT), ("pictures", PICTURES), ("words", WORDS))
         for name, case in cases.items()}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_report(case, model, recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(case.files)
    before, read = sorted(tmp_path.rglob("*")), []
    monkeypatch.setattr(
        encode, "encode_prompts", lambda model, texts, out, **options: read.extend(texts) or made(texts)
    )
    monkeypatch.setattr("srpo_jax.command.read_recipe", lambda spec: recipe().lock())
    command, *words = case.words.split()
    usual = {
        "encode": [f"--model={model}", "--out=out", *(["--height=32", "--width=48"] if "--images=d" in words else [])],
        "generate": [f"--model={model}", "--out=out"],
        "main": ["--config=recipe.py", *([] if "--workdir" in case.words else ["--workdir=w"])],
    }
    run = {"encode": encode, "generate": generate, "main": main}[command]
    code = errors.run(lambda: run.main([*usual[command], *words]))
    told = capsys.readouterr().err
    assert code == case.code, told
    if code == 0:
        assert read == case.found
    else:
        assert told.splitlines()[-1].startswith("error: ") and re.search(case.found, told)
    assert sorted(tmp_path.rglob("*")) == before


def made(texts):
    return types.SimpleNamespace(count=len(texts))
