"""Text out of files, checked: packed ones too, JSON lines, one column of a Parquet file."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from pipeline import regular
from pipeline.errors import InputError, cut, some

LINE_BYTES = 1 << 26  # longest JSON line: it has to be parsed in one piece
PARQUET_ROWS = 64  # a batch: few, since one row may hold a whole book
BUFFER_BYTES = 1 << 18  # of a file at a time
CODECS = {".gz": "gzip", ".zst": "zstd"}  # Arrow's names
BOM = b"\xef\xbb\xbf"


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A file's bytes as a stream, unpacked where its name ends in `.gz` or `.zst`.

    Of several members or frames all are read. Raises InputError for a packed file that is damaged
    or cut short, and OSError as files do.
    """
    codec = CODECS.get(path.suffix.lower())
    if codec is None:
        with regular.opened(path) as file:
            yield file
        return
    import pyarrow as pa

    with regular.opened(path) as file:
        if not file.peek(1):
            raise InputError(f"{path}: not a whole {codec} file: it is empty")
        try:
            with pa.CompressedInputStream(file, codec) as unpacked:
                yield io.BufferedReader(unpacked, BUFFER_BYTES)
        except OSError as error:
            if error.errno is not None:  # of the disk, not of the codec
                raise
            raise InputError(f"{path}: not a whole {codec} file: {error}") from None


def checked(text: str, where: str) -> str:
    """The text as it is; raises InputError for a NUL and for what no UTF-8 can hold."""
    if "\0" in text:
        raise InputError(f"{where}: NUL character at {text.index(chr(0))}; is this really text?")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise InputError(f"{where}: lone surrogate {code} at character {error.start}") from None
    return text


# --- JSON lines


class Line(NamedTuple):
    """A line of a file: `number` counts from 1, `start` is its first byte's place in the file."""

    where: str  # "path: line 3"
    number: int
    start: int
    content: bytes


def lines(path: Path) -> Iterator[Line]:
    """The lines that are not blank, without a byte order mark; raises as `opened` does."""
    start = 0
    with opened(path) as file:
        for number, content in enumerate(iter(lambda: file.readline(LINE_BYTES + 1), b""), 1):
            where = f"{path}: line {number}"
            if len(content) > LINE_BYTES:
                raise InputError(f"{where}: over {LINE_BYTES >> 20} MiB; try corpus.source=text")
            mark = len(BOM) if content.startswith(BOM) else 0
            if content[mark:].strip():
                yield Line(where, number, start + mark, content[mark:])
            start += len(content)


def json_object(line: Line) -> dict[str, Any]:
    """The object in a line; raises InputError naming the line where there is none, or two readings.

    Of a name that stands twice in it, JSON's readers drop one value without a word.
    """
    try:
        found = _DECODER.decode(line.content.decode())
    except UnicodeDecodeError as error:
        at = line.start + error.start
        raise InputError(f"{line.where}: invalid UTF-8 at byte {at} of the file") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{line.where}: not JSON: {cut(str(error))}") from None
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise InputError(f"{line.where}: an object is expected, got {kind}")
    if isinstance(found, _Doubled):
        raise InputError(f"{line.where}: {cut(found.name)} stands more than once in the object")
    return found


class _Doubled(dict[str, Any]):
    """An object in which a name stands more than once."""

    name: str


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    doubled = _Doubled(found)
    [(doubled.name, _)] = Counter(name for name, _ in pairs).most_common(1)
    return doubled


_DECODER = json.JSONDecoder(object_pairs_hook=_object)  # `json.loads` would make one for each line


def line_text(line: Line, field: str) -> str:
    """The text of one field of a line's object; raises InputError naming the line."""
    found = json_object(line)
    if field not in found:
        raise _no_field(field, found, line.where)
    if not isinstance(found[field], str):
        kind = type(found[field]).__name__
        raise InputError(f"{line.where}: corpus.field={field}: text is expected, got {kind}")
    return checked(found[field], line.where)


def _no_field(field: str, names: Iterable[str], where: str) -> InputError:
    there = some(sorted(names)) or "none"
    return InputError(f"{where}: corpus.field={field}: no such field; there are: {there}")


# --- Parquet


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
            for batch in file.iter_batches(PARQUET_ROWS, columns=[field], use_threads=False):
                yield from batch.column(field)  # by name: `columns` takes "text.x" for "text", too
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file: {cut(str(error))}") from None


def _column(schema: Any, field: str, path: Path) -> Any:
    """The Arrow type of the column; raises InputError unless there is one, and of text."""
    from pyarrow import types

    if field not in schema.names:
        raise _no_field(field, schema.names, str(path))
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
