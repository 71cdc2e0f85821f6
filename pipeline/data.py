"""Token files on disk, and deterministic batches from them."""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from pipeline import tokenizer
from pipeline.errors import ConfigError, InputError

if TYPE_CHECKING:  # torch costs 3 s, which the processes that tokenize do without
    import torch

    from pipeline.corpus import Document

SPLITS = ("train", "val")
DTYPE = np.dtype("<u2")
BATCH_BYTES = 1 << 20  # of text in one task of a worker
ALONE_BYTES = 4 << 20  # up to here starting workers costs more than they save
READ_BYTES = 1 << 22

Batch = list["Document"]
Encoded = dict[str, tuple[bytes, int, int]]  # split: (tokens as on disk, documents, bytes of text)


# --- writing


def write_tokens(
    documents: Iterable[Document],
    folder: Path,
    progress: Callable[[int], None] = lambda text_bytes: None,
    *,
    workers: int | None = None,
    source: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Tokenize into `folder`: train.bin and val.bin (uint16, little endian) and meta.json.

    One end-of-text token before each document; text is text, a literal `<|endoftext|>` too. The
    files depend on the documents alone, not on `workers` (None: one for each usable core).
    `progress` gets the bytes of text done since its last call; `source` goes into meta.json,
    which is returned. A file gets its final name when it is complete, meta.json the last.

    Raises InputError for an empty split, and what `documents` raises.
    """
    if tokenizer.VOCAB_SIZE > 1 << 16:
        raise ConfigError(f"a vocabulary of {tokenizer.VOCAB_SIZE} does not fit into uint16 tokens")
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        writers = {split: stack.enter_context(_Writer(folder, split)) for split in SPLITS}
        for encoded in _encode_all(_batches(documents), workers or _usable_cores()):
            for split, part in encoded.items():
                writers[split].add(*part)
            progress(sum(text_bytes for _, _, text_bytes in encoded.values()))
        meta = _meta(writers, source)
        (folder / "meta.json").unlink(missing_ok=True)  # no old record beside new files
        for writer in writers.values():
            writer.publish()
    _replace(folder / "meta.json", json.dumps(meta, indent=2) + "\n")
    return meta


class _Writer:
    """One split's file in the making: under a temporary name until `publish`."""

    def __init__(self, folder: Path, split: str) -> None:
        self.path = folder / f"{split}.bin"
        self.partial = folder / f"{split}.bin.partial"
        self.digest = hashlib.sha256()
        self.tokens = self.documents = self.text_bytes = 0

    def __enter__(self) -> _Writer:
        self.file: BinaryIO = self.partial.open("wb")
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()
        self.partial.unlink(missing_ok=True)

    def add(self, content: bytes, documents: int, text_bytes: int) -> None:
        self.file.write(content)
        self.digest.update(content)
        self.tokens += len(content) // DTYPE.itemsize
        self.documents += documents
        self.text_bytes += text_bytes

    def publish(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.partial, self.path)


def _meta(writers: dict[str, _Writer], source: dict[str, Any] | None) -> dict[str, Any]:
    """What meta.json says; raises InputError where a split is empty."""
    counts = ", ".join(f"{writers[s].documents} in {s}" for s in SPLITS)
    for split in SPLITS:
        if not writers[split].documents:
            raise InputError(
                f"the {split} split is empty: documents: {counts}; give the corpus more documents "
                "or change corpus.val_fraction"
            )
    return {
        "tokenizer": "gpt2",
        "dtype": "uint16",
        "byte_order": "little",
        "vocab_size": tokenizer.VOCAB_SIZE,
        "source": source or {},
        "splits": {
            split: {
                "tokens": writer.tokens,
                "documents": writer.documents,
                "bytes": writer.text_bytes,
                "sha256": writer.digest.hexdigest(),
            }
            for split, writer in writers.items()
        },
    }


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _batches(documents: Iterable[Document]) -> Iterator[Batch]:
    """Documents in lists of some BATCH_BYTES of text."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_all(batches: Iterator[Batch], workers: int) -> Iterator[Encoded]:
    """Every batch encoded, in order; by processes where there is enough for them to do."""
    tokenizer.gpt2()  # a missing tokenizer fails here, with its own message
    head, size = [], 0
    for batch in batches if workers > 1 else ():
        head.append(batch)
        size += sum(len(document.text) for document in batch)
        if size > ALONE_BYTES:
            yield from _encode_in_processes(chain(head, batches), workers)
            return
    yield from map(_encode, chain(head, batches))


def _encode_in_processes(batches: Iterable[Batch], workers: int) -> Iterator[Encoded]:
    """In order, with at most two batches a worker on the way, so that memory stays bounded."""
    # Spawned on every platform: a fork of a process with torch's threads may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    on_the_way: deque[Future[Encoded]] = deque()
    try:
        for batch in batches:
            on_the_way.append(pool.submit(_encode, batch))
            if len(on_the_way) > 2 * workers:
                yield on_the_way.popleft().result()
        while on_the_way:
            yield on_the_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Ctrl-C is for the parent to handle, whose end, however violent, ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    tokenizer.gpt2()


def _encode(batch: Batch) -> Encoded:
    """{split: (tokens as on disk, documents begun, bytes of text)}."""
    encoded: Encoded = {}
    for split in SPLITS:
        pieces, begun, text_bytes = [], 0, 0
        for document in batch:
            if document.split == split:
                pieces += [_EOT] if document.starts else []
                pieces.append(tokenizer.encode(document.text))
                begun += document.starts
                text_bytes += len(document.text.encode())
        if pieces:
            content = np.concatenate(pieces).astype(DTYPE, copy=False).tobytes()
            encoded[split] = (content, begun, text_bytes)
    return encoded


_EOT = np.array([tokenizer.EOT], dtype=np.uint16)


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# --- reading


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
    """Map a split that `write_tokens` wrote; `verify` reads it once for its hash and token ids.

    Raises InputError where meta.json or the file is missing, or where the size, the data type,
    the tokenizer, the SHA-256 or a token id is not what it has to be.
    """
    record = _record(folder, split)
    path = folder / f"{split}.bin"
    expected = record["tokens"] * DTYPE.itemsize
    size = path.stat().st_size if path.is_file() else None
    if size != expected:
        found = "no such file" if size is None else f"{size} bytes"
        raise InputError(f"{path}: {found}, meta.json says {expected} bytes; {_AGAIN}")
    if record["tokens"] < 2:
        raise InputError(f"{path}: {record['tokens']} tokens; at least 2 are needed")
    if verify:
        _verify(path, record["sha256"])
    ids = np.memmap(path, dtype=DTYPE, mode="r")
    return Tokens(ids, record["bytes"], record["sha256"], record["documents"], path)


_AGAIN = "tokenize again: `dvc repro -f -s tokenize`"


def _record(folder: Path, split: str) -> dict[str, Any]:
    """What meta.json says of a split, checked as far as it goes without the file."""
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        record = meta["splits"][split]
        counts = [record[key] for key in ("tokens", "documents", "bytes")]
        good = all(type(count) is int and count >= 0 for count in counts)
        fixed = {key: meta[key] for key in ("tokenizer", "dtype", "byte_order", "vocab_size")}
        good = good and isinstance(record["sha256"], str)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}; {_AGAIN}") from None
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(f"{path}: {split}: incomplete ({error}); {_AGAIN}") from None
    if not good:
        raise InputError(f"{path}: {split}: counts and a hash are expected, got {record}; {_AGAIN}")
    ours = ("gpt2", "uint16", "little", tokenizer.VOCAB_SIZE)
    for (key, value), accepted in zip(fixed.items(), ours, strict=True):
        if value != accepted:
            raise InputError(f"{path}: {key}={value}: expected {accepted}; {_AGAIN}")
    return record


def _verify(path: Path, sha256: str) -> None:
    digest, largest = hashlib.sha256(), 0
    with path.open("rb") as file:
        while content := file.read(READ_BYTES):
            digest.update(content)
            largest = max(largest, int(np.frombuffer(content, DTYPE).max()))
    if digest.hexdigest() != sha256:
        found = digest.hexdigest()
        raise InputError(f"{path}: SHA-256 is {found}, meta.json says {sha256}; {_AGAIN}")
    if largest >= tokenizer.VOCAB_SIZE:
        raise InputError(
            f"{path}: token {largest}: expected less than the vocabulary's {tokenizer.VOCAB_SIZE}"
        )


# --- batches


def check_length(tokens: Tokens, sequence_length: int) -> None:
    """Raise InputError where there is not one sequence and the token after it."""
    if len(tokens) <= sequence_length:
        raise InputError(
            f"{tokens.path}: {len(tokens)} tokens are too few for "
            f"train.sequence_length={sequence_length}: at least {sequence_length + 1} are needed; "
            "give the corpus more text or set a shorter length"
        )


def batch_at(
    tokens: Tokens,
    step: int,
    micro_step: int,
    *,
    batch_size: int,
    sequence_length: int,
    accumulate: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of one micro-batch, both (B, T) int64 on the CPU; a pure function.

    An epoch visits every window of T inputs once, in an order drawn from (seed, epoch); where
    the windows begin is drawn as well, so that the tokens that fill no window change by epoch.
    A step takes the next batch_size * accumulate * world windows, the same ones however that
    product is factored, going on into the next epoch rather than dropping any.
    """
    windows = (len(tokens) - 1) // sequence_length
    assert windows > 0, "check_length comes first"
    first = ((step * accumulate + micro_step) * world + rank) * batch_size
    samples = range(first, first + batch_size)
    starts = [_start(tokens, sequence_length, seed, *divmod(g, windows)) for g in samples]
    return _gather(tokens.ids, np.array(starts), sequence_length)


def _start(tokens: Tokens, length: int, seed: int, epoch: int, place: int) -> int:
    offset, order = _epoch(len(tokens), length, seed, epoch)
    return offset + int(order[place]) * length


@functools.lru_cache(maxsize=2)  # a batch may reach from one epoch into the next
def _epoch(count: int, length: int, seed: int, epoch: int) -> tuple[int, np.ndarray]:
    """Where the first window begins, and the order of the windows: (windows,) uint32."""
    windows, slack = divmod(count - 1, length)
    assert windows < 1 << 32
    generator = np.random.default_rng([seed, epoch])
    offset = int(generator.integers(slack + 1))
    return offset, generator.permutation(np.arange(windows, dtype=np.uint32))


def _gather(ids: np.ndarray, starts: np.ndarray, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    block = ids[starts[:, None] + np.arange(length + 1)].astype(np.int64)  # (B, T + 1)
    x, y = np.ascontiguousarray(block[:, :-1]), np.ascontiguousarray(block[:, 1:])
    return torch.from_numpy(x), torch.from_numpy(y)  # (B, T), (B, T)


def validation_windows(
    tokens: Tokens,
    *,
    batch_size: int,
    sequence_length: int,
    limit: int | None = None,
    rank: int = 0,
    world: int = 1,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Consecutive windows as inputs and targets, (B, T) int64 each, the ragged end as (1, t).

    Over all ranks every token but the first is a target exactly once, or with `limit` the first
    `limit` of those, whatever the batch size and `world`. Ranks take windows in turn, so one may
    have a batch fewer, or none: add sums and counts over ranks, not means.
    """
    targets = len(tokens) - 1 if limit is None else min(limit, len(tokens) - 1)
    full, ragged = divmod(targets, sequence_length)
    mine = np.arange(rank, full, world) * sequence_length
    for first in range(0, len(mine), batch_size):
        yield _gather(tokens.ids, mine[first : first + batch_size], sequence_length)
    if ragged and full % world == rank:
        yield _gather(tokens.ids, np.array([full * sequence_length]), ragged)
