"""Documents into token files, by all cores; `token_files` reads what this writes."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipeline.data import tokenizer
from pipeline.data.documents import Document
from pipeline.data.token_files import ANSWERS, DTYPE, KIND, READ_BYTES, SPLITS
from pipeline.errors import ConfigError, InputError

BATCH_BYTES = 1 << 18  # of text in one task of a worker: 15 ms and a few MB; 1 MB was no faster

# {split: {suffix: content of that file}, and how many tokens, documents begun, ... these are}
Encoded = dict[str, tuple[dict[str, bytes], dict[str, int]]]


def write_tokens(
    documents: Iterable[Document],
    folder: Path,
    progress: Callable[[int], None] = lambda text_bytes: None,
    *,
    workers: int | None = None,
    source: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Tokenize into `folder`: train.bin and val.bin (uint16, little endian) and meta.json.

    One end-of-text token before each document; text is text, a literal `<|endoftext|>` too. Of
    conversations there are train.answers and val.answers as well, see `Tokens.answers`. The
    files depend on the documents alone, not on `workers` (None: one for each usable core).
    `progress` gets the bytes of text done since its last call; `source` goes into meta.json,
    which is returned. A file gets its final name when it is complete, meta.json the last.

    Raises InputError for an empty split, and what `documents` raises.
    """
    if tokenizer.VOCAB_SIZE > 1 << 16:
        raise ConfigError(f"a vocabulary of {tokenizer.VOCAB_SIZE} does not fit into uint16 tokens")
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        paths = [folder / f"{split}{suffix}" for split in SPLITS for suffix in (".bin", ANSWERS)]
        files = {path.name: stack.enter_context(_aside(path)) for path in paths}
        digests = {split: hashlib.sha256() for split in SPLITS}
        counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
        for encoded in _encode_all(_batches(documents), workers or usable_cores()):
            for split, (contents, more) in encoded.items():
                for suffix, content in contents.items():
                    files[split + suffix].write(content)
                digests[split].update(contents[".bin"])
                counts[split].update(more)
            progress(sum(more["bytes"] for _, more in encoded.values()))
        refuse_empty({split: counts[split]["documents"] for split in SPLITS})
        for split in SPLITS:  # of conversations the answers' file is part of what was read
            files[split + ANSWERS].seek(0)
            while content := files[split + ANSWERS].read(READ_BYTES):
                digests[split].update(content)
        meta = {
            **KIND,
            "source": source or {},
            "splits": {s: {**counts[s], "sha256": digests[s].hexdigest()} for s in SPLITS},
        }
        (folder / "meta.json").unlink(missing_ok=True)  # no old record beside new files
        for path in paths:
            if path.suffix != ANSWERS or "answers" in counts[path.stem]:
                _publish(files[path.name], path)
            else:
                path.unlink(missing_ok=True)
        file = stack.enter_context(_aside(folder / "meta.json"))
        file.write(f"{json.dumps(meta, indent=2)}\n".encode())
        _publish(file, folder / "meta.json")
    return meta


@contextmanager
def _aside(path: Path) -> Iterator[BinaryIO]:
    """A file to write under a temporary name, which is gone in the end unless `_publish`ed."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("w+b") as file:
            yield file
    finally:
        partial.unlink(missing_ok=True)


def _publish(file: BinaryIO, path: Path) -> None:
    """Give a whole file its final name, once it is on the disk."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(file.name, path)


def refuse_empty(documents: dict[str, int]) -> None:
    """Raise InputError where a split has no document; `documents` counts them by split."""
    counts = ", ".join(f"{documents[split]} in {split}" for split in SPLITS)
    for split in SPLITS:
        if not documents[split]:
            raise InputError(
                f"the {split} split is empty: documents: {counts}; give the corpus more documents "
                "or change corpus.val_fraction"
            )


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
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


def _encode_all(batches: Iterator[list[Document]], workers: int) -> Iterator[Encoded]:
    """Every batch encoded, in order, with few of them on the way, so that memory stays bounded.

    By threads: tiktoken works outside Python's lock, and nothing has to be started or sent. Two
    processes took 1.1 times as long for 96 MB, and 1.2 times for 12 MB.
    """
    tokenizer.encode("")  # loads it; where it is missing this fails, with its own message
    on_the_way: deque[Future[Encoded]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for batch in batches:
            on_the_way.append(pool.submit(_encode, batch))
            if len(on_the_way) > 2 * workers:
                yield on_the_way.popleft().result()
        while on_the_way:
            yield on_the_way.popleft().result()


def _encode(batch: list[Document]) -> Encoded:
    encoded: Encoded = {}
    for split in SPLITS:
        documents = [document for document in batch if document.split == split]
        if not documents:
            continue
        pieces: list[np.ndarray] = []
        answers: list[np.ndarray] = []
        for (starts, answer), run in groupby(documents, key=lambda d: (d.starts, d.answer)):
            texts = [document.text for document in run]
            if starts:
                own = [tokenizer.encode_documents(texts)]
            else:  # parts that go on, each by itself
                end = np.array([tokenizer.EOT] * bool(answer), DTYPE)
                own = [np.append(tokenizer.encode(text), end) for text in texts]
            pieces += own
            if answer is not None:
                answers += (np.full(len(piece), answer, np.uint8) for piece in own)
        tokens = np.concatenate(pieces).astype(DTYPE, copy=False)
        contents = {".bin": tokens.tobytes()}
        sizes = {
            "tokens": len(tokens),
            "documents": sum(document.starts for document in documents),
            "bytes": sum(len(document.text.encode()) for document in documents),
        }
        if answers:
            told = np.concatenate(answers)
            assert len(told) == len(tokens), "a corpus is of conversations, or none of it is"
            contents[ANSWERS], sizes["answers"] = told.tobytes(), int(told.sum())
        encoded[split] = (contents, sizes)
    return encoded


def usable_cores() -> int:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
