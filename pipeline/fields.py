"""One field of JSON lines, and one column of a Parquet file, as text."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import InputError

LINE_BYTES = 1 << 26  # longest JSON line: it has to be parsed in one piece
PARQUET_ROWS = 64  # a batch: few, since one row may hold a whole book
BUFFER_BYTES = 1 << 18  # of a Parquet file at a time


def lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, offset in the file, content) of the lines that are not blank."""
    with path.open("rb") as file:
        for number in itertools.count(1):
            start = file.tell()
            content = file.readline(LINE_BYTES + 1)
            if not content:
                return
            if len(content) > LINE_BYTES:
                where = f"{path}: line {number}"
                raise InputError(f"{where}: over {LINE_BYTES >> 20} MiB; try corpus.source=text")
            if content.strip():
                yield number, start, content


def line_text(content: bytes, start: int, field: str, where: str) -> str:
    """The field's text out of a line's bytes, which begin at `start`; InputError names `where`."""
    try:
        line = content.decode()
    except UnicodeDecodeError as error:
        at = start + error.start
        raise InputError(f"{where}: invalid UTF-8 at byte {at} of the file") from None
    return _field(line.removeprefix("\ufeff") if start == 0 else line, field, where)


def _field(line: str, field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {error}") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: an object is expected, got {type(record).__name__}")
    if field not in record:
        raise _no_field(field, record, where)
    if not isinstance(record[field], str):
        kind = type(record[field]).__name__
        raise InputError(f"{where}: corpus.field={field}: text is expected, got {kind}")
    return record[field]


def _no_field(field: str, names: Iterable[str], where: str) -> InputError:
    there = ", ".join(sorted(names)) or "none"
    return InputError(f"{where}: corpus.field={field}: no such field; there are: {there}")


def rows(path: Path, field: str) -> Iterator[Any]:
    """The column's values as Arrow scalars, each of them text or null."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Without these two a whole row group's column is read at once.
        with pq.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
            schema = file.schema_arrow
            if field not in schema.names:
                raise _no_field(field, schema.names, str(path))
            kind = schema.field(field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise InputError(f"{path}: corpus.field={field}: text is expected, got {kind}")
            for batch in file.iter_batches(PARQUET_ROWS, columns=[field], use_threads=False):
                yield from batch.column(0)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file: {error}") from None


def row_text(value: Any, field: str, where: str) -> str:
    """An Arrow scalar's text; raises InputError where it is null or no UTF-8."""
    if not value.is_valid:
        raise InputError(f"{where}: corpus.field={field}: text is expected, got null")
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: invalid UTF-8 at byte {error.start} of the text") from None
