"""A corpus as documents: the sources there are, and the check of all text before any work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.data import listing, tokenizer
from pipeline.data.documents import Document
from pipeline.data.sources import chat, jsonl, parquet, python_docs, shakespeare, text
from pipeline.errors import InputError, Refuse, collecting

if TYPE_CHECKING:
    from pipeline.config import CorpusConfig


CALIBRATED = 1 << 20  # characters of each source in a mix that say how many a token has


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

    Returns the number of documents of each split, as `empty` of those left out for want of text,
    and by the name of each source of a mix, which is read once, its characters. Raises one
    InputError that names everything unusable (see `collecting`). `progress` gets the characters of
    text read since its last call.
    """
    counts = {"train": 0, "val": 0, "empty": 0}
    with collecting() as refuse:
        for name, (_, part) in _parts(config).items():
            for document in SOURCES[part.source].documents(part, refuse):
                counts[document.split if document.text else "empty"] += document.starts
                if name:
                    counts[name] = counts.get(name, 0) + len(document.text)
                progress(len(document.text))
    return counts


def _raise(error: InputError) -> None:
    raise error


def files(config: CorpusConfig) -> dict[str, Path]:
    """The files that the source reads, as `listing.files` has them; none without suffixes."""
    found = {}
    for name, (_, part) in _parts(config).items():
        if suffixes := SOURCES[part.source].suffixes:
            own = listing.files(part, suffixes)
            found |= {f"{name}/{file}" if name else file: path for file, path in own.items()}
    return found


def left_out(config: CorpusConfig) -> str:
    """The files that the source passes over: see `listing.left_out`."""
    said = {
        name: listing.left_out(part, SOURCES[part.source].suffixes)
        for name, (_, part) in _parts(config).items()
    }
    return "; ".join(f"{name}: {line}" if name else line for name, line in said.items() if line)


def reads_files(config: CorpusConfig) -> bool:
    """Whether the source reads files under corpus.path."""
    return any(SOURCES[part.source].suffixes for _, part in _parts(config).values())


# --- a mix


def _parts(config: CorpusConfig) -> dict[str, tuple[float, CorpusConfig]]:
    """The sources of a mix with their shares, or the one that there is, by no name."""
    return config.parts() if config.source == "mix" else {"": (1.0, config)}


def times_read(config: CorpusConfig, counts: dict[str, int]) -> dict[str, float]:
    """How often a mix takes the text of each source; `counts` are those of `check`.

    Raises InputError where a source has none.
    """
    parts = _parts(config)
    least = {n: _rate(n, part) * counts[n] / share for n, (share, part) in parts.items()}
    return {name: max(least.values()) / tokens for name, tokens in least.items()}


def _mixed(config: CorpusConfig, refuse: Refuse) -> Iterator[Document]:
    """Whole documents of all sources, next of the one that is furthest behind its share of tokens.

    So every part of the file has these shares, its beginning, too. It ends with the source that
    lasts longest; the others begin again. Tokens are estimated, by a rate for each source.
    """
    parts, unread = config.parts(), set(config.parts())
    weights = {name: _rate(name, part) / share for name, (share, part) in parts.items()}

    def begin(name: str) -> tuple[Iterator[Document], Document]:
        part = parts[name][1]
        stream = (d for d in SOURCES[part.source].documents(part, refuse) if d.text)
        return stream, next(stream)  # `_rate` has found text

    running = {name: begin(name) for name in parts}
    done = dict.fromkeys(parts, 0.0)
    while unread:
        name = min(done, key=done.__getitem__)
        stream, document = running[name]
        following: Document | None = document
        while following and (following is document or not following.starts):
            yield following._replace(source=name)
            done[name] += len(following.text) * weights[name]
            following = next(stream, None)
        if following is None:
            unread.discard(name)
        running[name] = (stream, following) if following else begin(name)


def _rate(name: str, part: CorpusConfig) -> float:
    """Tokens a character, by the first text of the source; raises InputError where it has none."""
    texts, size = [], 0
    for document in SOURCES[part.source].documents(part, _raise):
        texts += [document.text] * bool(document.text)
        size += len(document.text)
        if size >= CALIBRATED:
            break
    if not size:
        raise InputError(f"corpus.mix: {name}: no text is there")
    return len(tokenizer.encode_documents(texts)) / size


def _about_mix(config: CorpusConfig) -> dict[str, str]:
    facts = {"mix": config.mix}
    for name, (_, part) in config.parts().items():
        facts |= {f"{name} {key}": said for key, said in SOURCES[part.source].about(part).items()}
    return facts


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
    "mix": Source(_mixed, about=_about_mix),
}
