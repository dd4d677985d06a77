"""Token ids beside open_clip's and transformers' own, and tokenizers that are not a network's."""

import gzip
import json
import random
import shutil
import unicodedata

import jax
import numpy as np
import pytest
import transformers
from helpers import tiny
from open_clip import tokenizer as open_clip

from srpo_jax import architectures, conditions, program, sharding, text, tokens
from srpo_jax.data import loading
from srpo_jax.emoji import tokenizers
from srpo_jax.errors import UserError
from srpo_jax.families.flux_text import FluxTextEncoders
from srpo_jax.models.clip import LEGACY_EOS_TOKEN_ID, VIT_H_14, ClipTextConfig
from srpo_jax.models.compute import Compute
from srpo_jax.models.t5 import T5Config

LENGTH = 77


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """OpenAI's vocabulary in the files of openai/clip-vit-large-patch14 and FLUX.1-dev's ``tokenizer``."""
    path = tmp_path_factory.mktemp("tokenizer")
    theirs = open_clip.SimpleTokenizer()
    names = {tokens.START: tokenizers.START, tokens.END: tokenizers.END}
    vocabulary = {names.get(token, token): number for token, number in theirs.encoder.items()}
    merges = gzip.open(open_clip.default_bpe()).read().decode().split("\n")[1 : len(theirs.bpe_ranks) + 1]
    specials = {"bos_token": tokenizers.START} | dict.fromkeys(("eos_token", "pad_token", "unk_token"), tokenizers.END)
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "do_lower_case": True} | specials
    (path / "vocab.json").write_text(json.dumps(vocabulary))
    (path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


WORDS = (
    "a photo of the old Lighthouse by SEA at 5:30 o'clock 1024x768 it's they'll DON'T café naïve Zürich façade "
    "Ångström İstanbul ΣΊΣΥΦΟΣ straße МОСКВА こんにちは 世界 漢字 한국어 عربى हिन्दी ไทย https://a.b/c?d=e&f f/2.8 ½ ² №"
).split()
ODDITIES = [
    *"“”‘’‚„«»‹›–—―−…•·¡¿§¶†‡°′″",
    *"&amp; &lt;b&gt; &quot; &#39; &nbsp; &eacute; &#x2019; &amp;amp; &amp;lt;i&amp;gt; &amp;quot; &amp;#39;".split(),
    *"&copy &notit; & <b> </b> <br/> < > <| |> <|endoftext|> <end_of_text> <start_of_text> {x} [y] (z) a_b".split(),
    *"#tag @name $5 100% ^ ~ ` ＦＵＬＬ ｗｉｄｔｈ １２３ ！？ （全） ﾊﾝｶｸ ﬁne ﬂow oﬃce ﬀ ﬆ ĳ ǆ ß ſ ℌ ⅷ ①".split(),
    *"cafÃ© â€œquotedâ€\x9d donâ€™t Ã¼ber naÃ¯ve â€“ ðŸ˜€ Â£5 ÃƒÂ© MÃ¼nchen schÃ¶n".split(),
    *"😀 👍🏽 👩\u200d👩\u200d👧 🇩🇪 ❤️ 🧑🏿\u200d🚀 ☂ ☃︎ ♛ ∑ √ → ← ∞ ≠ ⛩".split(),
    *"e\u0301 a\u0308 o\u0302\u0323 Z\u0351\u036e\u0348algo e&#769; \u0301 क\u094d\u0937 \u1112\u1161\u11ab".split(),
    *"'S 'ſ 'LL '' ' \" \\ \\n \x1b[31mred\x1b[0m \ufeff \u200b \u00ad \x00 \x7f \ufffd \U0010ffff \ue000".split(),
    *("\ud83d", "\ud83d\ude00", "\U00030000", "\u0558", "\U00011de0"),  # letters and a digit of newer Unicodes
]
SPACES = [
    " ",
    " ",
    " ",
    "  ",
    "",
    "\t",
    "\n",
    "\r\n",
    "\u00a0",
    "\u2003",
    "\u3000",
    "\u2028",
    "\x0b",
    "\x1c",
    "\x85",
    "\u202f",
    " \n\t ",
]


def captions(count, seed=0):
    """Captions with what language models and web pages put into them; some are longer than 77 tokens."""
    draw = random.Random(seed)
    for number in range(count):
        length = draw.choice([1, 3, 8, 20, 60] if number % 10 else [90])
        parts = []
        for _ in range(length):
            kind = draw.random()
            if kind < 0.5:
                word = draw.choice(WORDS)
            elif kind < 0.9:
                word = draw.choice(ODDITIES)
            else:
                word = "".join(
                    chr(draw.choice([draw.randrange(32, 0x250), draw.randrange(0x2000, 0x2FFF)])) for _ in range(3)
                )
            parts += [draw.choice([word, word, word.upper(), word.title()]), draw.choice(SPACES)]
        yield "".join(parts)


def first_difference(texts, ours, theirs):
    return next((pair for pair in zip(texts, ours, theirs, strict=True) if pair[1] != pair[2]), None)


def test_open_clips_ids_of_captions_of_every_kind(folder):
    """A thousand captions, equal to the last id, padding included; transformers' own are others for most of them."""
    texts = ["", " ", *WORDS, *ODDITIES, *captions(1000)]
    tokenizer = text.load_tokenizer(folder)
    ours = text.tokenize(tokens.OpenClipTokenizer(tokenizer, folder), texts, LENGTH).tolist()
    reference = open_clip.SimpleTokenizer()
    theirs = reference(texts, LENGTH).tolist()
    assert first_difference(texts, ours, theirs) is None
    assert sum(row[-1] == 49407 for row in ours) > 50 and max(map(len, texts)) > 500
    plain = [t for t in texts if not any(0xD800 <= ord(c) < 0xE000 for c in t)]
    hf = text.tokenize(tokenizer, plain, LENGTH, 0).tolist()
    theirs = reference(plain, LENGTH).tolist()
    assert sum(a != b for a, b in zip(hf, theirs, strict=True)) > len(plain) / 2


@pytest.mark.parametrize(("caption", "clean"), [
    ("A “Curly” quote’s", "a \"curly\" quote's"),
    ("R&amp;amp;D &amp;lt;b&amp;gt;", "r&d <b>"),
    ("ＦＵＬＬ ﬁre\u3000ﬂy", "full fire fly"),
    ("cafÃ© â€œhiâ€\x9d\n", "café \"hi\""),
    ("half \ud83d an emoji", "half \ufffd an emoji"),
])  # fmt: skip
def test_what_cleaning_does(caption, clean):
    assert tokens.open_clip_text(caption) == clean


def test_processors_of_transformers_clean_nothing(folder):
    """PickScore and CLIP read captions as transformers does: NFC, one space for spaces, lower case. Held to open_clip's
    tokenizer with that for a cleaning. Left out is where the two differ beyond it: specials in a text, the final sigma,
    the newest letters, what counts as space."""
    reference = open_clip.SimpleTokenizer()
    reference.clean_fn = lambda caption: " ".join(unicodedata.normalize("NFC", caption).split()).lower()
    left = ("\ud83d", "_of_text>", "<|endoftext|>", "σ", "ς", "'ſ", "\x1c", "\U00030000", "\u0558", "\U00011de0")
    texts = [t for t in captions(1500, 1) if not any(word in t.lower() for word in left)]
    assert len(texts) > 500
    processor = transformers.CLIPTokenizer.from_pretrained(folder)
    rows = processor(texts, truncation=True, max_length=LENGTH, padding="max_length")["input_ids"]
    ours = text.tokenize(text.load_tokenizer(folder), texts, LENGTH).tolist()
    assert ours == rows
    theirs = reference(texts, LENGTH).tolist()
    ours = text.tokenize(text.load_tokenizer(folder), texts, LENGTH, 0).tolist()
    assert first_difference(texts, ours, theirs) is None


def test_tokenizers_of_other_networks(folder, tmp_path):
    """Ids below the vocabulary, texts that end where the network looks."""
    clip_l, words = text.load_tokenizer(folder), tmp_path / "words"
    size = tokenizers.train_clip_tokenizer(tiny.PROMPTS, words, LENGTH)
    small = text.load_tokenizer(words)
    t5_size = tokenizers.train_t5_tokenizer(tiny.PROMPTS, tmp_path / "t5", LENGTH)
    t5 = text.load_tokenizer(tmp_path / "t5")
    legacy = ClipTextConfig(size, eos_token_id=LEGACY_EOS_TOKEN_ID)
    for tokenizer, config in (
        (clip_l, VIT_H_14.text_config),
        (clip_l, ClipTextConfig()),
        (small, legacy),
        (small, ClipTextConfig(size, eos_token_id=size - 1)),
        (t5, T5Config(t5_size, 8, 8, 8, 1, 1)),
        (t5, T5Config(t5_size + 28, 8, 8, 8, 1, 1)),
    ):
        tokens.check(tokenizer, config, "here")
    for tokenizer, config, message in (
        (small, VIT_H_14.text_config, f"it ends a text with {size - 1}, the network reads its feature at 49407"),
        (small, ClipTextConfig(), f"it ends a text with {size - 1}, the network reads its feature at 49407"),
        (clip_l, legacy, f"its ids reach 49407, the network's end at {size - 1}"),
        (t5, VIT_H_14.text_config, "it ends a text with 1, the network"),
        (t5, T5Config(t5_size - 1, 8, 8, 8, 1, 1), f"its ids reach {t5_size - 1}"),
    ):
        with pytest.raises(UserError, match=f"here is not this network's tokenizer: {message}"):
            tokens.check(tokenizer, config, "here")
    with pytest.raises(UserError, match="here is no tokenizer of a CLIP"):
        tokens.OpenClipTokenizer(t5, "here")


def test_rows_are_cut_before_their_end(folder):
    tokenizer = tokens.OpenClipTokenizer(text.load_tokenizer(folder), folder)
    (row,) = text.tokenize(tokenizer, ["a b c d"], 4)
    np.testing.assert_array_equal(row, [49406, 320, 321, 49407])
    assert tokenizer(["a b c d"], False, 4)["input_ids"] == [[49406, 320, 321, 322, 323, 49407]]


def test_half_a_character_is_named(folder):
    """open_clip's cleaning mends it; HF's tokenizers would raise a TypeError about their own types."""
    tokenizer = text.load_tokenizer(folder)
    with pytest.raises(UserError, match=r"^'a \\ud83d b' holds half a character, .*; mend this text"):
        text.tokenize(tokenizer, ["whole", "a \ud83d b"], LENGTH)
    with pytest.raises(ValueError, match="must be of type `str`"):  # not a user's fault, and not hidden
        text.tokenize(tokenizer, [3], LENGTH)


# --- training ---


def conditioner(models, **changes):
    """The batches of a run on tiny networks, whose examples come with their features."""
    settings = tiny.config(models, **changes)
    mesh = sharding.make_mesh(settings.mesh, jax.devices()[:1])
    return conditions.Conditioner(settings, program.build(settings, mesh, architectures.read(settings)), None)


def test_a_run_reads_captions_as_its_rewards_do(tmp_path):
    """HPS's are cleaned, the others' are not; a tokenizer of another network is refused before anything is compiled."""
    models = tiny.write_all(tmp_path)
    both = {
        "reward__models__hps__weight": 1.0,
        "reward__models__clip__weight": 1.0,
        "reward__models__hps__path": str(models / "hps"),
    }
    features = {"text": np.zeros((2, 1, 1), np.float32), "pooled": np.zeros((2, 1), np.float32)}
    ids = {}
    for captions in (["RED&amp;amp;blue “ｃａｒ”", "ﬂy"], ['red&blue "car"', "fly"]):
        examples = loading.Examples(captions, features)
        batch = conditioner(models, **both).batch(examples, 1)
        ids[captions[1]] = {name: np.asarray(rows["caption"]) for name, rows in batch.reward_tokens.items()}
    np.testing.assert_array_equal(ids["ﬂy"]["hps"], ids["fly"]["hps"])
    assert (ids["ﬂy"]["clip"] != ids["fly"]["clip"]).any()
    shutil.rmtree(models / "clip" / "tokenizer")
    size = tokenizers.train_clip_tokenizer(["short"], models / "clip" / "tokenizer", tiny.LENGTH)
    with pytest.raises(
        UserError, match=f"clip/tokenizer is not this network's tokenizer: it ends a text with {size - 1}"
    ):
        conditioner(models)
    shutil.rmtree(models / "pipeline" / "tokenizer_2")
    shutil.copytree(models / "hps" / "tokenizer", models / "pipeline" / "tokenizer_2")
    with pytest.raises(UserError, match="tokenizer_2 is not this network's tokenizer: its ids reach"):
        FluxTextEncoders(models / "pipeline", Compute())
