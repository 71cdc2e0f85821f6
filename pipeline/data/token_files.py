"""Token files on disk: what they hold, opened and verified."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import regular
from pipeline.data import tokenizer
from pipeline.errors import InputError, cut, quoted

SPLITS = ("train", "val")
DTYPE = np.dtype("<u2")
# What meta.json says of every token file, in its order.
KIND = {
    "tokenizer": "gpt2",
    "dtype": "uint16",
    "byte_order": "little",
    "vocab_size": tokenizer.VOCAB_SIZE,
}
READ_BYTES = 1 << 22


@dataclass(frozen=True)
class Tokens:
    """One split: `ids` is (tokens,) uint16, mapped read-only; `bytes` counts the text's bytes."""

    ids: np.ndarray = field(repr=False)
    bytes: int
    sha256: str
    documents: int
    path: Path

    def __len__(self) -> int:
        return len(self.ids)


def open_tokens(folder: Path, split: str, *, verify: bool = True) -> Tokens:
    """Map a split that `write_tokens` wrote; `verify` reads it once for its hash and contents.

    Raises InputError where meta.json or the file is missing, or where the size, the data type,
    the tokenizer, the SHA-256, a token id or a count is not what it has to be.
    """
    record = _record(folder, split)
    path = folder / f"{split}.bin"
    expected = record["tokens"] * DTYPE.itemsize
    size = path.stat().st_size if path.is_file() else None
    if size != expected:
        actual = "no such file" if size is None else f"{size} bytes"
        raise InputError(f"{path}: {actual}, meta.json says {expected} bytes; {_AGAIN}")
    if record["tokens"] < 2:
        raise InputError(f"{path}: {record['tokens']} tokens; at least 2 are needed")
    if verify:
        _verify(path, record)
    ids = np.memmap(path, dtype=DTYPE, mode="r")
    return Tokens(ids, record["bytes"], record["sha256"], record["documents"], path)


_AGAIN = "tokenize again: `dvc repro -f -s tokenize`"
_ROT = "DVC's cache may hold the same bytes: `python -m pipeline verify cache --delete`"


def _record(folder: Path, split: str) -> dict[str, Any]:
    """What meta.json says of a split, checked as far as it goes without the file."""
    path = folder / "meta.json"
    try:
        meta = regular.read_json(path)
        record = meta["splits"][split]
        counts = [record[key] for key in ("tokens", "documents", "bytes")]
        good = all(type(count) is int and 0 <= count < 1 << 62 for count in counts)
        kind = {key: meta[key] for key in KIND}
        good = good and isinstance(record["sha256"], str)
    except InputError as error:
        way = _AGAIN if path.exists() else "tokenize first: `dvc repro tokenize`"
        raise InputError(f"{error}; {way}") from None
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(f"{path}: {split}: incomplete ({cut(str(error))}); {_AGAIN}") from None
    if not good:
        raise InputError(
            f"{path}: {split}: counts and a hash are expected, got {quoted(record)}; {_AGAIN}"
        )
    for key, got in kind.items():
        if got != KIND[key]:
            raise InputError(f"{path}: {key}={cut(str(got))}: expected {KIND[key]}; {_AGAIN}")
    return record


def _verify(path: Path, record: dict[str, Any]) -> None:
    """Read a file of the right size once; raises InputError with all that is wrong in it."""
    lengths = np.zeros(1 << 16, np.int64)  # bytes of text by token id
    lengths[: tokenizer.VOCAB_SIZE] = tokenizer.token_byte_lengths()
    digest, largest, documents, text_bytes = hashlib.sha256(), 0, 0, 0
    with regular.opened(path) as file:
        while content := file.read(READ_BYTES):
            ids = np.frombuffer(content, DTYPE)
            digest.update(content)
            largest = max(largest, int(ids.max()))
            documents += int(np.count_nonzero(ids == tokenizer.EOT))
            text_bytes += int(lengths[ids].sum())
    actual = digest.hexdigest()
    problems = []
    if actual != record["sha256"]:
        problems.append(f"{path}: SHA-256 is {actual}, meta.json says {cut(record['sha256'])}")
    elif (documents, text_bytes) != (record["documents"], record["bytes"]):
        problems.append(
            f"{path}: {documents} documents and {text_bytes} bytes of text, "
            f"meta.json says {record['documents']} and {record['bytes']}"
        )
    if largest >= tokenizer.VOCAB_SIZE:
        problems.append(
            f"{path}: token {largest}: expected less than the vocabulary's {tokenizer.VOCAB_SIZE}"
        )
    if problems:
        raise InputError("\n  ".join(problems) + f"; {_ROT}, then {_AGAIN}")


def inspect(folder: Path) -> dict[str, bool]:
    """{what to tell of a file: is it whole}, from all that `open_tokens` looks at."""
    told: dict[str, bool] = {}  # what is wrong with meta.json is told once
    for split in SPLITS:
        try:
            tokens = open_tokens(folder, split)
        except InputError as error:
            told[str(error)] = False
        else:
            held = f"{len(tokens):,} tokens, {tokens.documents:,} documents, {tokens.bytes:,} bytes"
            told[f"{tokens.path}: whole, {held} of text"] = True
    return told
