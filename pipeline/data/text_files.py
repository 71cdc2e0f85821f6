"""Text files, packed ones too: as bytes, as checked text, as JSON lines."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from pipeline import regular
from pipeline.errors import InputError, cut

LINE_BYTES = 1 << 26  # longest JSON line: it has to be parsed in one piece
BUFFER_BYTES = 1 << 18  # of a packed file at a time
CODECS = {".gz": "gzip", ".zst": "zstd"}  # Arrow's names
BOM = b"\xef\xbb\xbf"


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """A file's bytes as a stream, unpacked where its name ends in `.gz` or `.zst`.

    Of several members or frames all are read. Raises InputError for a packed file that is damaged
    or cut short, and OSError as files do.
    """
    codec = CODECS.get(path.suffix.lower())
    with regular.opened(path) as file:
        if codec is None:
            yield file
            return
        import pyarrow as pa

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
        parsed = _DECODER.decode(line.content.decode())
    except UnicodeDecodeError as error:
        at = line.start + error.start
        raise InputError(f"{line.where}: invalid UTF-8 at byte {at} of the file") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{line.where}: not JSON: {cut(str(error))}") from None
    return plain_object(parsed, line.where)


def plain_object(parsed: Any, where: str) -> dict[str, Any]:
    """What a line holds, or a part of it, if it is an object; raises as `json_object` does."""
    if not isinstance(parsed, dict):
        raise InputError(f"{where}: an object is expected, got {type(parsed).__name__}")
    if isinstance(parsed, _Doubled):
        raise InputError(f"{where}: {cut(parsed.name)} stands more than once in the object")
    return parsed


class _Doubled(dict[str, Any]):
    """An object in which a name stands more than once."""

    name: str


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    plain = dict(pairs)
    if len(plain) == len(pairs):
        return plain
    doubled = _Doubled(plain)
    [(doubled.name, _)] = Counter(name for name, _ in pairs).most_common(1)
    return doubled


_DECODER = json.JSONDecoder(object_pairs_hook=_object)  # `json.loads` would make one for each line
