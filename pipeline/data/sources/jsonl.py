"""JSON lines: one document a line, the field `corpus.field` of its object."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline.data.documents import Document, Refuse, document, no_field, refusing, share
from pipeline.data.listing import files, packed
from pipeline.data.text_files import Line, checked, json_object, lines
from pipeline.errors import InputError

if TYPE_CHECKING:
    from pipeline.config import CorpusConfig

SUFFIXES = packed(".jsonl")


def documents(config: CorpusConfig, refuse: Refuse) -> Iterator[Document]:
    for name, path in files(config, SUFFIXES).items():
        with refusing(refuse, path):
            for line in lines(path):
                with refusing(refuse, path):
                    text = line_text(line, config.field)
                    yield from document(f"{name}:{line.number}", share(config), [text])


def line_text(line: Line, field: str) -> str:
    """The text of one field of a line's object; raises InputError naming the line."""
    found = json_object(line)
    if field not in found:
        raise no_field(field, found, line.where)
    if not isinstance(found[field], str):
        kind = type(found[field]).__name__
        raise InputError(f"{line.where}: corpus.field={field}: text is expected, got {kind}")
    return checked(found[field], line.where)
