"""Text sources as documents: the language's own documentation, text, JSON lines, Parquet."""

from __future__ import annotations

import codecs
import hashlib
import math
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.data import listing, text_fields
from pipeline.data.sources import python_docs
from pipeline.errors import InputError

if TYPE_CHECKING:
    from pipeline.config import CorpusConfig

READ_BYTES = 1 << 18  # of a text file at a time
PART_CHARACTERS = 1 << 18  # tiktoken's regex fails on whitespace runs of some 900,000
MOST_PROBLEMS = 8  # named at once
_HASH_RANGE = 1 << 64


class Document(NamedTuple):
    """A document, or one part of it: `starts` is true for the first part.

    A part ends where the encoding cannot tell (see `_cut`) and holds at most PART_CHARACTERS.
    """

    name: str
    split: str  # "train" | "val"
    text: str
    starts: bool = True


def documents(config: CorpusConfig) -> Iterator[Document]:
    """Every document of the source, streamed, in an order that depends on the content alone.

    Documents without any text are left out; `check` counts them, and `listing.left_out` says which
    files are passed over. Raises InputError naming the file and the byte offset, line or row of
    invalid text, or corpus.field and the fields there are.
    """
    return (document for document in SOURCES[config.source](config, _raise) if document.text)


def check(
    config: CorpusConfig, progress: Callable[[int], None] = lambda characters: None
) -> dict[str, int]:
    """Read all of the source as `documents` does, before any work.

    Gives the documents of each split, and as `empty` how many are left out for want of text.

    Raises one InputError that names everything unusable, up to MOST_PROBLEMS places. `progress`
    gets the characters of text read since its last call.
    """
    problems: list[str] = []

    def keep(error: InputError) -> None:
        problems.append(str(error))
        if len(problems) == MOST_PROBLEMS:
            raise _Enough

    counts = {"train": 0, "val": 0, "empty": 0}
    try:
        for document in SOURCES[config.source](config, keep):
            counts[document.split if document.text else "empty"] += document.starts
            progress(len(document.text))
    except _Enough:
        problems.append("and perhaps more: the rest has not been read")
    if problems:
        raise InputError("\n  ".join(problems))
    return counts


def describe(config: CorpusConfig) -> dict[str, Any]:
    """What meta.json says of the source: nothing that depends on where the files lie."""
    rule = f"val when sha256(document name)[:8] / 2**64 < {config.val_fraction:g}"
    about: dict[str, Any] = {"source": config.source, "split_rule": rule}
    if config.source == "python-docs":
        about["python"] = platform.python_version()
    if config.source == "text":
        about["split_rule"] += (
            "; of two or more files at least one goes to each split; a file on its own is cut at "
            "blank lines into the documents file#0, file#1, ..."
        )
    if config.source in ("jsonl", "parquet"):
        about["field"] = config.field
    return about


# --- what is refused

Refuse = Callable[[InputError], None]  # told of a file, line or row that cannot be used


class _Enough(Exception):
    """As many problems as a person reads."""


def _raise(error: InputError) -> None:
    raise error


@contextmanager
def _refusing(refuse: Refuse, path: Path) -> Iterator[None]:
    """What is wrong with a file, or a part of it, goes to `refuse`."""
    try:
        yield
    except InputError as error:
        refuse(error)
    except OSError as error:
        refuse(InputError(f"{path}: cannot be read: {error.strerror or error}"))


# --- splits and parts


def name_hash(name: str) -> int:
    """The first 8 bytes of the name's SHA-256, big endian: where in [0, 2^64) it falls."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _share(config: CorpusConfig) -> int:
    """Names whose hash is below go to val."""
    return int(config.val_fraction * _HASH_RANGE)


def _share_among(names: list[str], config: CorpusConfig) -> int:
    """As `_share`, moved as little as gives each split one of a few known documents."""
    hashes = sorted(name_hash(name) for name in names)
    return min(max(_share(config), hashes[0] + 1), hashes[-1])


def _document(name: str, share: int, chunks: Iterable[str]) -> Iterator[Document]:
    """The parts of one document from its text in pieces of any size; one without text if empty."""
    split = "val" if name_hash(name) < share else "train"
    starts = True
    for part in _parts(chunks):
        yield Document(name, split, part, starts)
        starts = False
    if starts:
        yield Document(name, split, "")


def _parts(chunks: Iterable[str]) -> Iterator[str]:
    held = ""
    for chunk in chunks:
        held += chunk
        while len(held) > PART_CHARACTERS:
            cut = _cut(held, PART_CHARACTERS)
            yield held[:cut]
            held = held[cut:]
    if held:
        yield held


def _cut(text: str, limit: int) -> int:
    """The last place up to `limit` where cutting changes no token, else `limit`.

    Before a space or newline that follows something else: no alternative of GPT-2's pattern
    goes on from a character that is no whitespace to one that is, nor looks back. A text with
    no such place in half of the limit is cut anyhow, at the cost of a token or two.
    """
    for mark in "\n ":
        place = text.rfind(mark, limit // 2, limit + 1)
        while place > 0 and text[place - 1].isspace():
            place = text.rfind(mark, limit // 2, place)
        if place > 0:
            return place
    return limit


# --- the language's own documentation


def _python_docs(config: CorpusConfig, refuse: Refuse) -> Iterator[Document]:
    """One document a topic of the reference, and one a module of the standard library."""
    texts = python_docs.texts()
    for name in sorted(name for name, text in texts.items() if text):
        yield from _document(name, _share(config), [texts[name]])


# --- files


def _text(config: CorpusConfig, refuse: Refuse) -> Iterator[Document]:
    """One document a file; the blocks of a file on its own."""
    files = listing.files(config)
    if len(files) > 1:
        share = _share_among(list(files), config)
        for name, path in files.items():
            with _refusing(refuse, path):
                yield from _document(name, share, _read(path))
        return
    [(name, path)] = files.items()
    size = _block_size(path.stat().st_size, config.val_fraction)
    with _refusing(refuse, path):
        for index, block in enumerate(_blocks(_read(path), size)):
            yield from _document(f"{name}#{index}", _share(config), [block])


def _block_size(file_bytes: int, val_fraction: float) -> int:
    """Some 20 blocks for the smaller split, so that it is not left empty, of 256 B to 64 KiB."""
    return min(max(file_bytes // math.ceil(20 / val_fraction), 256), 1 << 16)


def _blocks(chunks: Iterable[str], size: int) -> Iterator[str]:
    """Blocks of `size` to twice `size` characters that end at a blank line where there is one."""
    held = ""
    for chunk in chunks:
        held += chunk
        start = 0
        while len(held) - start > 2 * size:
            end = _block_end(held, start, size)
            yield held[start:end]
            start = end
        held = held[start:]
    if held:
        yield held


def _block_end(text: str, start: int, size: int) -> int:
    for mark in ("\n\n", "\n\r\n", "\n", " "):
        place = text.find(mark, start + size, start + 2 * size)
        if place >= 0:
            return place + len(mark)
    return start + 2 * size


def _read(path: Path) -> Iterator[str]:
    """A UTF-8 file's text in pieces, line ends as they are, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    total = offset = 0  # bytes read; where those begin that are not yet turned into text
    with text_fields.opened(path) as file:
        while True:
            content = file.read(READ_BYTES)
            try:
                text = decoder.decode(content, final=not content)
            except UnicodeDecodeError as error:
                at = offset + error.start
                raise InputError(f"{path}: invalid UTF-8 at byte {at}; convert it") from None
            if "\0" in text:
                at = offset + len(text[: text.index("\0")].encode())
                raise InputError(f"{path}: NUL at byte {at}; is this really text?")
            yield text.removeprefix("\ufeff") if offset == 0 else text
            if not content:
                return
            total += len(content)
            offset = total - len(decoder.getstate()[0])


def _jsonl(config: CorpusConfig, refuse: Refuse) -> Iterator[Document]:
    """One document a line: the field `corpus.field` of its object."""
    for name, path in listing.files(config).items():
        with _refusing(refuse, path):
            for line in text_fields.lines(path):
                with _refusing(refuse, path):
                    chunks = [text_fields.line_text(line, config.field)]
                    yield from _document(f"{name}:{line.number}", _share(config), chunks)


def _parquet(config: CorpusConfig, refuse: Refuse) -> Iterator[Document]:
    """One document a row: the column `corpus.field`."""
    for name, path in listing.files(config).items():
        with _refusing(refuse, path):
            for number, value in enumerate(text_fields.rows(path, config.field)):
                where = f"{path}: row {number}"
                with _refusing(refuse, path):
                    chunks = [text_fields.row_text(value, config.field, where)]
                    yield from _document(f"{name}:{number}", _share(config), chunks)


SOURCES: dict[str, Callable[[CorpusConfig, Refuse], Iterator[Document]]] = {
    "python-docs": _python_docs,
    "text": _text,
    "jsonl": _jsonl,
    "parquet": _parquet,
}
