"""Documents: their split, by a hash of the name, and their parts; what every source is made of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from pipeline.errors import InputError, some

if TYPE_CHECKING:
    from pipeline.config import CorpusConfig

PART_CHARACTERS = 1 << 18  # tiktoken's regex fails on whitespace runs of some 900,000


class Document(NamedTuple):
    """A document, or one part of it: `starts` is true for the first part.

    A part ends where the encoding cannot tell (see `_cut`) and holds at most PART_CHARACTERS. Of a
    conversation `answer` says whether the part is a whole answer, which end-of-text will follow and
    which alone is to be learned; None where all text is. `source` is a name in a mix, else "".
    """

    name: str
    split: str  # "train" | "val"
    text: str
    starts: bool = True
    answer: bool | None = None
    source: str = ""


def no_field(field: str, names: Iterable[str], where: str) -> InputError:
    """The error for a line or file without the field that `corpus.field` names."""
    there = some(sorted(names)) or "none"
    return InputError(f"{where}: corpus.field={field}: no such field; there are: {there}")


# --- splits and parts


def name_hash(name: str) -> int:
    """The first 8 bytes of the name's SHA-256, big endian: where in [0, 2^64) it falls."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def share(config: CorpusConfig) -> int:
    """The border of hashes: names below it go to val."""
    return int(config.val_fraction * (1 << 64))


def document(name: str, border: int, chunks: Iterable[str]) -> Iterator[Document]:
    """The parts of one document, whose text comes in pieces of any size.

    It goes to val if its name's hash is below `border`. An empty one is a single part without text.
    """
    split = "val" if name_hash(name) < border else "train"
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
