"""Parquet: one document a row, the column `corpus.field`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import regular
from pipeline.data.documents import Document, document, no_field, share
from pipeline.data.listing import files
from pipeline.data.text_files import checked
from pipeline.errors import InputError, Refuse, cut, refusing

if TYPE_CHECKING:
    from pipeline.config import CorpusConfig

SUFFIXES = (".parquet",)
BATCH_ROWS = 64  # few, since one row may hold a whole book
BUFFER_BYTES = 1 << 18  # of a file at a time


def documents(config: CorpusConfig, refuse: Refuse) -> Iterator[Document]:
    for name, path in files(config, SUFFIXES).items():
        with refusing(refuse, path):
            for number, value in enumerate(rows(path, config.field)):
                with refusing(refuse, path):
                    text = row_text(value, config.field, f"{path}: row {number}")
                    yield from document(f"{name}:{number}", share(config), [text])


def rows(path: Path, field: str) -> Iterator[Any]:
    """The column's values as Arrow scalars, each of them text or null."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    regular.check(path)
    try:
        # Without these two a whole row group's column is read at once.
        with pq.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
            kind = _column(file.schema_arrow, field, path)
            if pa.types.is_dictionary(kind):
                # In batches each would hold all words so far: the time grows with their square.
                for group in range(file.num_row_groups):
                    yield from file.read_row_group(group, [field], use_threads=False)[field]
                return
            for batch in file.iter_batches(BATCH_ROWS, columns=[field], use_threads=False):
                yield from batch.column(field)  # by name: `columns` takes "text.x" for "text", too
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file: {cut(str(error))}") from None


def _column(schema: Any, field: str, path: Path) -> Any:
    """The Arrow type of the column; raises InputError unless there is one, and of text."""
    from pyarrow import types

    if field not in schema.names:
        raise no_field(field, schema.names, str(path))
    if (times := schema.names.count(field)) > 1:
        raise InputError(f"{path}: corpus.field={field}: there are {times} columns of this name")
    kind = schema.field(field).type
    plain = kind.value_type if types.is_dictionary(kind) else kind  # pandas calls it a category
    kinds = (types.is_string, types.is_large_string, types.is_string_view)
    if not any(is_text(plain) for is_text in kinds):
        raise InputError(f"{path}: corpus.field={field}: text is expected, got {kind}")
    return kind


def row_text(value: Any, field: str, where: str) -> str:
    """An Arrow scalar's text; raises InputError where it is null, no UTF-8 or not `checked`."""
    text = None
    if value.is_valid:
        try:
            text = value.as_py()
        except UnicodeDecodeError as error:
            at = error.start
            raise InputError(f"{where}: invalid UTF-8 at byte {at} of the text") from None
    if text is None:  # of a dictionary, the word may be null
        raise InputError(f"{where}: corpus.field={field}: text is expected, got null")
    return checked(text, where)
