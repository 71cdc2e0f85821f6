"""A corpus as documents: the sources there are, and the check of all text before any work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.data import listing
from pipeline.data.documents import Document
from pipeline.data.sources import chat, jsonl, parquet, python_docs, shakespeare, text
from pipeline.errors import InputError, Refuse, collecting

if TYPE_CHECKING:
    from pipeline.config import CorpusConfig


class Source(NamedTuple):
    """A kind of corpus.

    `documents` streams all documents, empty ones too, and goes on after what it has refused.
    """

    documents: Callable[[CorpusConfig, Refuse], Iterator[Document]]
    suffixes: tuple[str, ...] = ()  # of the files that it reads; none: corpus.path is not read
    rule: str = ""  # added to the split rule in meta.json
    about: Callable[[CorpusConfig], dict[str, str]] = lambda config: {}  # facts for meta.json


def documents(config: CorpusConfig) -> Iterator[Document]:
    """Every document of the source, streamed, in an order that depends on the content alone.

    Documents without any text are left out; `check` counts them, and `left_out` names the files
    that are passed over. Raises InputError naming the file and the byte offset, line or row of
    invalid text, or corpus.field and the fields there are.
    """
    every = SOURCES[config.source].documents(config, _raise)
    return (document for document in every if document.text)


def check(
    config: CorpusConfig, progress: Callable[[int], None] = lambda characters: None
) -> dict[str, int]:
    """Read all of the source as `documents` does, before any work.

    Returns the number of documents of each split, and as `empty` of those left out for want of
    text. Raises one InputError that names everything unusable (see `collecting`). `progress` gets
    the characters of text read since its last call.
    """
    counts = {"train": 0, "val": 0, "empty": 0}
    with collecting() as refuse:
        for document in SOURCES[config.source].documents(config, refuse):
            counts[document.split if document.text else "empty"] += document.starts
            progress(len(document.text))
    return counts


def _raise(error: InputError) -> None:
    raise error


def files(config: CorpusConfig) -> dict[str, Path]:
    """The files that the source reads, as `listing.files` has them; none without suffixes."""
    suffixes = SOURCES[config.source].suffixes
    return listing.files(config, suffixes) if suffixes else {}


def left_out(config: CorpusConfig) -> str:
    """The files that the source passes over: see `listing.left_out`."""
    return listing.left_out(config, SOURCES[config.source].suffixes)


def describe(config: CorpusConfig) -> dict[str, Any]:
    """The source as meta.json describes it, free of anything that depends on where files lie."""
    source = SOURCES[config.source]
    rule = f"val when sha256(document name)[:8] / 2**64 < {config.val_fraction:g}{source.rule}"
    return {"source": config.source, "split_rule": rule} | source.about(config)


SOURCES = {
    "shakespeare": Source(shakespeare.documents, about=shakespeare.about),
    "python-docs": Source(python_docs.documents, about=python_docs.about),
    "text": Source(text.documents, text.SUFFIXES, text.RULE),
    "jsonl": Source(jsonl.documents, jsonl.SUFFIXES, about=lambda c: {"field": c.field}),
    "parquet": Source(parquet.documents, parquet.SUFFIXES, about=lambda c: {"field": c.field}),
    "chat": Source(chat.documents, chat.SUFFIXES, about=lambda c: {"template": chat.TEMPLATE}),
}
