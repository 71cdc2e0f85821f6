"""Documents into token files, by all cores; `token_files` reads what this writes."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pipeline import regular
from pipeline.data import tokenizer
from pipeline.data.documents import Document
from pipeline.data.token_files import ANSWERS, DTYPE, KIND, READ_BYTES, SPLITS
from pipeline.errors import ConfigError, InputError
from pipeline.storage import folders

BATCH_BYTES = 1 << 18  # of text in one task of a worker: 15 ms and a few MB; 1 MB was no faster
KEPT_EVERY = 1 << 26  # bytes of tokens, a few seconds of work, that a kill costs at most
TOKENS_OF = "tokens of "  # and a source of a mix: a count in meta.json
JOURNAL = "tokens.json"  # beside unfinished files: what of them is on the disk

FILES = [split + suffix for split in SPLITS for suffix in (".bin", ANSWERS)]

log = logging.getLogger(__name__)

# {split: {suffix: content of that file}, and how many tokens, documents begun, ... these are}
Encoded = dict[str, tuple[dict[str, bytes], dict[str, int]]]


def write_tokens(
    documents: Iterable[Document],
    folder: Path,
    progress: Callable[[int], None] = lambda text_bytes: None,
    *,
    workers: int | None = None,
    source: dict[str, Any] | None = None,
    kept: Path | None = None,
) -> dict[str, Any]:
    """Tokenize into `folder`: train.bin and val.bin (uint16, little endian) and meta.json.

    One end-of-text token before each document; text is text, a literal `<|endoftext|>` too. Of
    conversations there are train.answers and val.answers as well, see `Tokens.answers`. The
    files depend on the documents alone, not on `workers` (None: one for each usable core).
    `progress` gets the bytes of text done since its last call; `source` goes into meta.json,
    which is returned. A file gets its final name when it is complete, meta.json the last.

    In the folder `kept` unfinished files outlive this process: another with the same documents
    reads past those that are done and goes on, to the same bytes.

    Raises InputError for an empty split, and what `documents` raises.
    """
    if tokenizer.VOCAB_SIZE > 1 << 16:
        raise ConfigError(f"a vocabulary of {tokenizer.VOCAB_SIZE} does not fit into uint16 tokens")
    folder.mkdir(parents=True, exist_ok=True)
    with _Growing(kept or folder, keeps=kept is not None) as growing:
        rest = islice(documents, growing.parts, None)
        for parts, encoded in _encode_all(_batches(rest), workers or usable_cores()):
            growing.add(parts, encoded)
            progress(sum(more["bytes"] for _, more in encoded.values()))
        refuse_empty({split: growing.counts[split]["documents"] for split in SPLITS})
        meta = {**KIND, "source": source or {}, "splits": growing.finished()}
        (folder / "meta.json").unlink(missing_ok=True)  # no old record beside new files
        for name, file in growing.files.items():
            if name in growing.lengths():
                _publish(file, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        _write_json(folder / "meta.json", meta)
    return meta


def begun(kept: Path) -> dict[str, Any] | None:
    """What another process has left in the folder for `write_tokens` to go on from, if it has.

    {"parts": documents' parts that are done, "splits": their counts as in meta.json, "files":
    SHA-256 by name}.
    """
    there = [kept / JOURNAL, *(kept / f"{name}.partial" for name in FILES)]
    return regular.read_json(kept / JOURNAL) if all(path.exists() for path in there) else None


class _Growing:
    """The files of both splits on their way: what is in them, counted and hashed."""

    def __init__(self, place: Path, keeps: bool):
        self.place, self.keeps = place, keeps
        self.files: dict[str, BinaryIO] = {}
        found = begun(place) if keeps else None
        self._open(found)
        if found and self._hashes() != found["files"]:
            log.warning("%s: what was kept is damaged; tokenizing starts anew", place)
            self._open(None)

    def _open(self, found: dict[str, Any] | None) -> None:
        """The files with what is `found`, and no more; empty ones without it."""
        self._close()
        self.parts, self.unkept = found["parts"] if found else 0, 0
        self.counts = {s: Counter[str](found["splits"][s] if found else {}) for s in SPLITS}
        self.digests = {name: hashlib.sha256() for name in FILES}
        for name in FILES:
            file = (self.place / f"{name}.partial").open("r+b" if found else "w+b")
            self.files[name] = file
            left = self.lengths().get(name, 0)
            while content := file.read(min(left, READ_BYTES)):
                self.digests[name].update(content)
                left -= len(content)
            file.truncate()

    def lengths(self) -> dict[str, int]:
        """Bytes of each file that there is; the answers' only of conversations."""
        bins = {f"{s}.bin": self.counts[s]["tokens"] * DTYPE.itemsize for s in SPLITS}
        told = {
            s + ANSWERS: self.counts[s]["tokens"] for s in SPLITS if "answers" in self.counts[s]
        }
        return bins | told

    def add(self, parts: int, encoded: Encoded) -> None:
        """Append a batch of so many documents' parts; now and then all is kept on the disk."""
        self.parts += parts
        for split, (contents, more) in encoded.items():
            self.counts[split].update(more)
            for suffix, content in contents.items():
                self.files[split + suffix].write(content)
                self.digests[split + suffix].update(content)
                self.unkept += len(content)
        if self.keeps and self.unkept >= KEPT_EVERY:
            self.unkept = 0
            for file in self.files.values():
                _sync(file)
            journal = {"parts": self.parts, "splits": self.counts, "files": self._hashes()}
            _write_json(self.place / JOURNAL, journal)

    def _hashes(self) -> dict[str, str]:
        return {name: digest.hexdigest() for name, digest in self.digests.items()}

    def finished(self) -> dict[str, dict[str, Any]]:
        """Counts and SHA-256 by split, as meta.json has them; nothing is added later."""
        for split in SPLITS:  # of conversations the answers' file is part of what was read
            file = self.files[split + ANSWERS]
            file.seek(0)
            while content := file.read(READ_BYTES):
                self.digests[f"{split}.bin"].update(content)
        hashes = self._hashes()
        return {s: {**self.counts[s], "sha256": hashes[f"{s}.bin"]} for s in SPLITS}

    def _close(self) -> None:
        for file in self.files.values():
            file.close()

    def __enter__(self) -> _Growing:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        for name in FILES:
            if not self.keeps:
                (self.place / f"{name}.partial").unlink(missing_ok=True)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(f"{json.dumps(content, indent=2)}\n".encode())
            _publish(file, path)
    finally:
        partial.unlink(missing_ok=True)


def _publish(file: BinaryIO, path: Path) -> None:
    """Give a whole file its final name, once it is on the disk."""
    _sync(file)
    file.close()
    try:
        os.replace(file.name, path)
    except OSError as error:
        if error.errno != errno.EXDEV:  # another disk, as where data/ is a link to one
            raise
        folders.copy(Path(file.name), path)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


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


def _encode_all(batches: Iterator[list[Document]], workers: int) -> Iterator[tuple[int, Encoded]]:
    """Every batch's length and tokens, in order, with few on the way, so that memory stays bounded.

    By threads: tiktoken works outside Python's lock, and nothing has to be started or sent. Two
    processes took 1.1 times as long for 96 MB, and 1.2 times for 12 MB.
    """
    tokenizer.encode("")  # loads it; where it is missing this fails, with its own message
    on_the_way: deque[tuple[int, Future[Encoded]]] = deque()

    def done() -> tuple[int, Encoded]:
        length, encoded = on_the_way.popleft()
        return length, encoded.result()

    with ThreadPoolExecutor(workers) as pool:
        for batch in batches:
            on_the_way.append((len(batch), pool.submit(_encode, batch)))
            if len(on_the_way) > 2 * workers:
                yield done()
        while on_the_way:
            yield done()


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
            if starts and documents[0].source:  # of a mix, what each source gives is counted
                own = np.split(own[0], np.flatnonzero(own[0] == tokenizer.EOT)[1:])
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
        if documents[0].source:
            for document, piece in zip(documents, pieces, strict=True):
                key = TOKENS_OF + document.source
                sizes[key] = sizes.get(key, 0) + len(piece)
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
