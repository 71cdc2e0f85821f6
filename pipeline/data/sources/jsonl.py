"""JSON lines: one document a line, the field `corpus.field` of its object."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline.data.documents import Document, document, no_field, share
from pipeline.data.listing import files, packed
from pipeline.data.text_files import Line, checked, json_object, lines
from pipeline.errors import InputError, Refuse, refusing

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
    fields = json_object(line)
    if field not in fields:
        raise no_field(field, fields, line.where)
    if not isinstance(fields[field], str):
        kind = type(fields[field]).__name__
        raise InputError(f"{line.where}: corpus.field={field}: text is expected, got {kind}")
    return checked(fields[field], line.where)
