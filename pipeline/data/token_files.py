"""Token files on disk: what they hold, opened and verified."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import regular
from pipeline.data import tokenizer
from pipeline.errors import InputError, cut, quoted
from pipeline.storage import verified

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
ANSWERS = ".answers"  # the suffix of the file that tells which tokens are an answer's


@dataclass(frozen=True, eq=False)
class Tokens:
    """One split: `ids` is (tokens,) uint16, mapped read-only; `bytes` counts the text's bytes.

    Of conversations `answers` is (tokens,) uint8, mapped as well: 1 for an answer's tokens, its
    end-of-text among them, 0 for the others; None where all are to be learned. `sha256` is that of
    the token file with the answers' file behind it.
    """

    ids: np.ndarray = field(repr=False)
    bytes: int
    sha256: str
    documents: int
    path: Path
    answers: np.ndarray | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def targets(self) -> int:
        """Tokens to be predicted: all but the first, or of conversations the answers'."""
        return len(self) - 1 if self.answers is None else int(np.count_nonzero(self.answers[1:]))


def open_tokens(folder: Path, split: str, *, verify: bool = True, anew: bool = False) -> Tokens:
    """Map a split that `write_tokens` wrote; `verify` reads it for its hash and contents.

    Once: what passed is not read again while it stays as it is, unless `anew`: `verified.once`.

    Raises InputError where meta.json or the file is missing, or where the size, the data type,
    the tokenizer, the SHA-256, a token id or a count is not what it has to be.
    """
    record = _record(folder, split)
    path = folder / f"{split}.bin"
    masked = [path.with_suffix(ANSWERS)] if "answers" in record else []
    for file, width in zip([path, *masked], (DTYPE.itemsize, 1), strict=False):
        expected = record["tokens"] * width
        size = file.stat().st_size if file.is_file() else None
        if size != expected:
            actual = "no such file" if size is None else f"{size} bytes"
            raise InputError(f"{file}: {actual}, meta.json says {expected} bytes; {_AGAIN}")
    if record["tokens"] < 2:
        raise InputError(f"{path}: {record['tokens']} tokens; at least 2 are needed")
    if verify:
        verified.once([path, *masked], record, partial(_verify, path, record), anew=anew)
    ids = np.memmap(path, dtype=DTYPE, mode="r")
    answers = np.memmap(masked[0], dtype=np.uint8, mode="r") if masked else None
    return Tokens(ids, record["bytes"], record["sha256"], record["documents"], path, answers)


_AGAIN = "tokenize again: `dvc repro -f -s tokenize`"
_ROT = "DVC's cache may hold the same bytes: `python -m pipeline verify cache --delete`"


def _record(folder: Path, split: str) -> dict[str, Any]:
    """What meta.json says of a split, checked as far as it goes without the file."""
    path = folder / "meta.json"
    try:
        meta = regular.read_json(path)
        record = meta["splits"][split]
        # Conversations without the file that tells their answers would be learned as a whole.
        chat = ["answers"] * ("answers" in record or meta["source"].get("source") == "chat")
        counts = [record[key] for key in ("tokens", "documents", "bytes", *chat)]
        good = all(type(count) is int and 0 <= count < 1 << 62 for count in counts)
        kind = {key: meta[key] for key in KIND}
        good = good and isinstance(record["sha256"], str)
    except InputError as error:
        way = _AGAIN if path.exists() else "tokenize first: `dvc repro tokenize`"
        raise InputError(f"{error}; {way}") from None
    except (KeyError, TypeError, IndexError, AttributeError) as error:
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
    """Read files of the right size once; raises InputError with all that is wrong in them."""
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
    found = {"documents": documents, "bytes": text_bytes}
    if "answers" in record:
        ids = np.memmap(path, dtype=DTYPE, mode="r")
        answers = np.memmap(path.with_suffix(ANSWERS), dtype=np.uint8, mode="r")
        digest.update(answers.data)
        found["answers"] = int(np.count_nonzero(answers))
        found["documents"] -= int(np.count_nonzero(answers[ids == tokenizer.EOT]))
    said = {key: record[key] for key in found}
    actual = digest.hexdigest()
    problems = []
    if actual != record["sha256"]:
        problems.append(f"{path}: SHA-256 is {actual}, meta.json says {cut(record['sha256'])}")
    elif found != said:
        problems.append(f"{path}: the tokens hold {found}, meta.json says {said}")
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
            tokens = open_tokens(folder, split, anew=True)
        except InputError as error:
            told[str(error)] = False
        else:
            answers = f" ({tokens.targets:,} of answers)" * (tokens.answers is not None)
            held = f"{len(tokens):,} tokens{answers}, {tokens.documents:,} documents"
            told[f"{tokens.path}: whole, {held}, {tokens.bytes:,} bytes of text"] = True
    return told
