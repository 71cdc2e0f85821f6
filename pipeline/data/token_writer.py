"""Documents into token files, by all cores; `token_files` reads what this writes."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from pipeline.data import tokenizer
from pipeline.data.token_files import DTYPE, SPLITS
from pipeline.errors import ConfigError, InputError

if TYPE_CHECKING:
    from pipeline.data.documents import Document

BATCH_BYTES = 1 << 18  # of text in one task of a worker: 15 ms and a few MB; 1 MB was no faster

Batch = list["Document"]
Encoded = dict[str, tuple[bytes, int, int]]  # split: (tokens as on disk, documents, bytes of text)


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
        for encoded in _encode_all(_batches(documents), workers or usable_cores()):
            for split, part in encoded.items():
                writers[split].add(*part)
            progress(sum(text_bytes for _, _, text_bytes in encoded.values()))
        refuse_empty({split: writer.documents for split, writer in writers.items()})
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


def refuse_empty(documents: dict[str, int]) -> None:
    """Raise InputError where a split has no document; `documents` counts them by split."""
    counts = ", ".join(f"{documents[split]} in {split}" for split in SPLITS)
    for split in SPLITS:
        if not documents[split]:
            raise InputError(
                f"the {split} split is empty: documents: {counts}; give the corpus more documents "
                "or change corpus.val_fraction"
            )


def _meta(writers: dict[str, _Writer], source: dict[str, Any] | None) -> dict[str, Any]:
    """What meta.json says."""
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
    """Every batch encoded, in order, with few of them on the way, so that memory stays bounded.

    By threads: tiktoken works outside Python's lock, and nothing has to be started or sent. Two
    processes took 1.1 times as long for 96 MB, and 1.2 times for 12 MB.
    """
    tokenizer.encode("")  # loads it; where it is missing this fails, with its own message
    if workers == 1:
        yield from map(_encode, batches)
        return
    pool = ThreadPoolExecutor(workers)
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


def _encode(batch: Batch) -> Encoded:
    """{split: (tokens as on disk, documents begun, bytes of text)}."""
    encoded: Encoded = {}
    for split in SPLITS:
        documents = [document for document in batch if document.split == split]
        if documents:
            runs = groupby(documents, key=lambda document: document.starts)
            pieces = [piece for starts, run in runs for piece in _encode_run(run, starts)]
            content = np.concatenate(pieces).astype(DTYPE, copy=False).tobytes()
            begun = sum(document.starts for document in documents)
            encoded[split] = (content, begun, sum(len(d.text.encode()) for d in documents))
    return encoded


def _encode_run(run: Iterable[Document], starts: bool) -> Iterator[np.ndarray]:
    """Documents that all start are encoded in one call; parts that go on each by themselves."""
    texts = [document.text for document in run]
    if starts:
        yield tokenizer.encode_documents(texts)
    else:
        yield from map(tokenizer.encode, texts)


def usable_cores() -> int:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
