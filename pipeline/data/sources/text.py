"""Plain text: one document a file, or the blocks of a file on its own."""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.data.documents import Document, document, name_hash, share
from pipeline.data.listing import files, packed
from pipeline.data.text_files import opened
from pipeline.errors import InputError, Refuse, refusing

if TYPE_CHECKING:
    from pipeline.config import CorpusConfig

SUFFIXES = packed(".txt", ".md")
READ_BYTES = 1 << 18  # of a file at a time
RULE = (
    "; of two or more files at least one goes to each split; a file on its own is cut at "
    "blank lines into the documents file#0, file#1, ..."
)


def documents(config: CorpusConfig, refuse: Refuse) -> Iterator[Document]:
    """One document a file; the blocks of a file on its own."""
    paths = files(config, SUFFIXES)
    if len(paths) > 1:
        # Moved as little as gives each split one of a few files.
        hashes = sorted(map(name_hash, paths))
        border = min(max(share(config), hashes[0] + 1), hashes[-1])
        for name, path in paths.items():
            with refusing(refuse, path):
                yield from document(name, border, _read(path))
        return
    [(name, path)] = paths.items()
    # Some 20 blocks for the smaller split, so that it is not left empty, of 256 B to 64 KiB.
    size = path.stat().st_size // math.ceil(20 / config.val_fraction)
    size = min(max(size, 256), 1 << 16)
    with refusing(refuse, path):
        for index, block in enumerate(_blocks(_read(path), size)):
            yield from document(f"{name}#{index}", share(config), [block])


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
    with opened(path) as file:
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
