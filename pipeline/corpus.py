"""Text sources as documents: the language's own documentation, text, JSON lines, Parquet."""

from __future__ import annotations

import ast
import codecs
import glob
import hashlib
import itertools
import json
import math
import platform
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.errors import InputError

if TYPE_CHECKING:
    from pipeline.config import CorpusConfig

READ_BYTES = 1 << 18  # of a text file at a time
PART_CHARACTERS = 1 << 18  # tiktoken's regex fails on whitespace runs of some 900,000
LINE_BYTES = 1 << 26  # longest JSON line: it has to be parsed in one piece
PARQUET_ROWS = 64  # a batch: few, since one row may hold a whole book
_HASH_RANGE = 1 << 64
_SUFFIXES = {"text": (".txt", ".md"), "jsonl": (".jsonl",), "parquet": (".parquet",)}
# Tests hold broken syntax and data rather than prose; idlelib documents a program's inside.
_LEFT_OUT = {"test", "tests", "idlelib"}


class Document(NamedTuple):
    """A document, or one part of it: `starts` is true for the first part.

    A part ends where the encoding cannot tell (see `_cut`) and holds at most PART_CHARACTERS.
    """

    name: str
    split: str  # "train" | "val"
    text: str
    starts: bool = True


def documents(config: CorpusConfig) -> Iterator[Document]:
    """Every document of the source, streamed, in an order that depends on the content alone.

    Documents without any text are left out. Raises InputError naming the file and the byte
    offset, line or row of invalid text, or corpus.field and the fields there are.
    """
    return SOURCES[config.source](config)


def describe(config: CorpusConfig) -> dict[str, Any]:
    """What meta.json says of the source: nothing that depends on where the files lie."""
    rule = f"val when sha256(document name)[:8] / 2**64 < {config.val_fraction:g}"
    about: dict[str, Any] = {"source": config.source, "split_rule": rule}
    if config.source == "python-docs":
        about["python"] = platform.python_version()
    if config.source == "text":
        about["split_rule"] += (
            "; of two or more files at least one goes to each split; a file on its own is cut at "
            "blank lines into the documents file#0, file#1, ..."
        )
    if config.source in ("jsonl", "parquet"):
        about["field"] = config.field
    return about


# --- splits and parts


def name_hash(name: str) -> int:
    """The first 8 bytes of the name's SHA-256, big endian: where in [0, 2^64) it falls."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _share(config: CorpusConfig) -> int:
    """Names whose hash is below go to val."""
    return int(config.val_fraction * _HASH_RANGE)


def _share_among(names: list[str], config: CorpusConfig) -> int:
    """As `_share`, moved as little as gives each split one of a few known documents."""
    hashes = sorted(name_hash(name) for name in names)
    return min(max(_share(config), hashes[0] + 1), hashes[-1])


def _document(name: str, share: int, chunks: Iterable[str]) -> Iterator[Document]:
    """The parts of one document from its text in pieces of any size."""
    split = "val" if name_hash(name) < share else "train"
    starts = True
    for part in _parts(chunks):
        yield Document(name, split, part, starts)
        starts = False


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


def _checked(text: str, where: str) -> str:
    if "\0" in text:
        raise InputError(f"{where}: NUL character at {text.index(chr(0))}; is this really text?")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        raise InputError(f"{where}: lone surrogate {code} at character {error.start}") from None
    return text


# --- python-docs


def _python_docs(config: CorpusConfig) -> Iterator[Document]:
    """The language reference and the standard library's docstrings, from the sources on disk."""
    library = Path(sysconfig.get_path("stdlib"))
    texts = _topics(library / "pydoc_data" / "topics.py")
    for path in _modules(library):
        name = ".".join(path.relative_to(library).with_suffix("").parts).removesuffix(".__init__")
        texts[f"module {name}"] = _module_text(name, _parsed(path))
    for name in sorted(texts):
        yield from _document(name, _share(config), [texts[name]])


def _topics(path: Path) -> dict[str, str]:
    """The language reference: {"topic assert": text, ...}."""
    for node in _parsed(path).body if path.is_file() else ():
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "topics":
            topics = ast.literal_eval(node.value)
            return {f"topic {name}": f"{_plain(topics[name])}\n" for name in topics}
    raise InputError(
        f"{path}: not there or without topics: this Python comes without its documentation; "
        "install one that has it, or set corpus.source to text, jsonl or parquet"
    )


def _modules(library: Path) -> list[Path]:
    """Sources of the modules that CPython lists as its own, without tests and idlelib."""
    tops = [library / name for name in sys.stdlib_module_names]
    found = [path for top in tops for path in (top.with_suffix(".py"), *top.rglob("*.py"))]
    left_out = {path for path in found if _LEFT_OUT.intersection(path.relative_to(library).parts)}
    return [path for path in found if path.is_file() and path not in left_out]


def _parsed(path: Path) -> ast.Module:
    with warnings.catch_warnings():  # the library's own invalid escapes are no concern here
        warnings.simplefilter("ignore")
        try:
            return ast.parse(path.read_bytes())
        except (SyntaxError, ValueError) as error:
            raise InputError(f"{path}: not a Python source: {error}") from None


def _module_text(name: str, tree: ast.Module) -> str:
    """The docstrings of a module under headings that say what each describes; "" without any."""
    sections = list(_sections(tree, f"module {name}", ""))
    return "\n\n".join(sections) + "\n" if sections else ""


def _sections(node: ast.AST, heading: str, prefix: str) -> Iterator[str]:
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    if isinstance(node, kinds):
        text = _plain(ast.get_docstring(node) or "")
        if text:
            yield f"{heading}\n\n{text}"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            bases = ", ".join(ast.unparse(base) for base in child.bases)
            line = f"class {prefix}{child.name}" + (f"({bases})" if bases else "")
            yield from _sections(child, line, f"{prefix}{child.name}.")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            line = f"{prefix}{child.name}({ast.unparse(child.args)})"
            yield from _sections(child, line, f"{prefix}{child.name}.")
        elif not isinstance(child, ast.expr):  # `if` and `try` hold definitions, too
            yield from _sections(child, "", prefix)


def _plain(text: str) -> str:
    """Without outer whitespace, and with what is no text written as escapes."""
    return text.strip().encode("utf-8", "backslashreplace").decode().replace("\0", r"\x00")


# --- files


def _files(config: CorpusConfig) -> dict[str, Path]:
    """{name: path}, sorted by name: relative to corpus.path, with forward slashes.

    corpus.path is a file, a folder of which corpus.pattern says what to take, or itself a glob.
    Only the source's own suffixes are taken unless the pattern ends in another; nothing hidden.
    """
    path = Path(config.path).expanduser()
    if path.is_file():
        return {path.name: path}
    if path.is_dir():
        root, pattern, found = path, config.pattern, path.glob(config.pattern)
    elif glob.has_magic(config.path):
        plain = itertools.takewhile(lambda part: not glob.has_magic(part), path.parts)
        root, pattern = Path(*plain), path.name
        found = map(Path, glob.iglob(str(path), recursive=True))
    else:
        raise InputError(f"corpus.path={config.path}: no such file or folder")
    suffixes = _SUFFIXES[config.source]
    taken = {}
    for file in found:
        parts = file.relative_to(root).parts
        hidden = any(part.startswith(".") for part in parts)
        kind = Path(pattern).suffix or file.suffix.lower() in suffixes
        if file.is_file() and kind and not hidden:
            taken["/".join(parts)] = file
    if not taken:
        asked = f"corpus.path={config.path}, corpus.pattern={config.pattern}"
        raise InputError(f"{asked}: no file found; looked for {' and '.join(suffixes)}")
    return {name: taken[name] for name in sorted(taken)}


def _text(config: CorpusConfig) -> Iterator[Document]:
    """One document a file; the blocks of a file on its own."""
    files = _files(config)
    if len(files) > 1:
        share = _share_among(list(files), config)
        for name, path in files.items():
            yield from _document(name, share, _read(path))
        return
    [(name, path)] = files.items()
    size = _block_size(path.stat().st_size, config.val_fraction)
    for index, block in enumerate(_blocks(_read(path), size)):
        yield from _document(f"{name}#{index}", _share(config), [block])


def _block_size(file_bytes: int, val_fraction: float) -> int:
    """Some 20 blocks for the smaller split, so that it is not left empty, of 256 B to 64 KiB."""
    return min(max(file_bytes // math.ceil(20 / val_fraction), 256), 1 << 16)


def _blocks(chunks: Iterable[str], size: int) -> Iterator[str]:
    """Blocks of `size` to twice `size` characters that end at a blank line where there is one."""
    held = ""
    for chunk in chunks:
        held += chunk
        start = 0
        while len(held) - start > 2 * size:
            end = _block_end(held, start, size)
            yield held[start:end]
            start = end
        held = held[start:]
    if held:
        yield held


def _block_end(text: str, start: int, size: int) -> int:
    for mark in ("\n\n", "\n\r\n", "\n", " "):
        place = text.find(mark, start + size, start + 2 * size)
        if place >= 0:
            return place + len(mark)
    return start + 2 * size


def _read(path: Path) -> Iterator[str]:
    """A UTF-8 file's text in pieces, line ends as they are, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0  # in the file, of the bytes that the decoder has not yet turned into text
    with path.open("rb") as file:
        while True:
            content = file.read(READ_BYTES)
            try:
                text = decoder.decode(content, final=not content)
            except UnicodeDecodeError as error:
                at = offset + error.start
                raise InputError(f"{path}: invalid UTF-8 at byte {at}; convert it") from None
            if "\0" in text:
                at = offset + len(text[: text.index("\0")].encode())
                raise InputError(f"{path}: NUL at byte {at}; is this really text?")
            yield text.removeprefix("\ufeff") if offset == 0 else text
            if not content:
                return
            offset = file.tell() - len(decoder.getstate()[0])


def _jsonl(config: CorpusConfig) -> Iterator[Document]:
    """One document a line: the field `corpus.field` of its object."""
    for name, path in _files(config).items():
        for number, line in _lines(path):
            where = f"{path}: line {number}"
            text = _field(line, config.field, where)
            yield from _document(f"{name}:{number}", _share(config), [_checked(text, where)])


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of the lines that are not blank."""
    with path.open("rb") as file:
        for number in itertools.count(1):
            content = file.readline(LINE_BYTES + 1)
            if not content:
                return
            where = f"{path}: line {number}"
            if len(content) > LINE_BYTES:
                raise InputError(f"{where}: over {LINE_BYTES >> 20} MiB; try corpus.source=text")
            try:
                line = content.decode()
            except UnicodeDecodeError as error:
                at = file.tell() - len(content) + error.start
                raise InputError(f"{where}: invalid UTF-8 at byte {at} of the file") from None
            if line.strip():
                yield number, line.removeprefix("\ufeff") if number == 1 else line


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


def _parquet(config: CorpusConfig) -> Iterator[Document]:
    """One document a row: the column `corpus.field`."""
    for name, path in _files(config).items():
        for number, text in enumerate(_rows(path, config.field)):
            where = f"{path}: row {number}"
            yield from _document(f"{name}:{number}", _share(config), [_checked(text, where)])


def _rows(path: Path, field: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Without these two a whole row group's column is read at once.
        with pq.ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False) as file:
            schema = file.schema_arrow
            if field not in schema.names:
                raise _no_field(field, schema.names, str(path))
            kind = schema.field(field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise InputError(f"{path}: corpus.field={field}: text is expected, got {kind}")
            row = 0
            for batch in file.iter_batches(PARQUET_ROWS, columns=[field], use_threads=False):
                for value in batch.column(0):
                    yield _row_text(value, f"{path}: row {row}", field)
                    row += 1
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file: {error}") from None


def _row_text(value: Any, where: str, field: str) -> str:
    if not value.is_valid:
        raise InputError(f"{where}: corpus.field={field}: text is expected, got null")
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: invalid UTF-8 at byte {error.start} of the text") from None


SOURCES: dict[str, Callable[[CorpusConfig], Iterator[Document]]] = {
    "python-docs": _python_docs,
    "text": _text,
    "jsonl": _jsonl,
    "parquet": _parquet,
}
