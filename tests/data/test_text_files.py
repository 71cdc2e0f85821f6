"""Claims about text out of files: packed ones, JSON lines in two readings, columns of Parquet."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import corpus, text_files
from pipeline.errors import InputError

TEXTS = [f"Document {i}, and some words in it.\n" * 3 for i in range(400)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


PACK: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstd}
packings = pytest.mark.parametrize("suffix", PACK)


def settings(path: Path, source: str = "jsonl", field: str = "text") -> Any:
    about = {"source": source, "path": str(path), "field": field}
    return SimpleNamespace(pattern="**/*", val_fraction=0.1, **about)


def texts(config: Any) -> list[str]:
    found: list[str] = []
    for document in corpus.documents(config):
        if document.starts:
            found.append("")
        found[-1] += document.text
    return found


def refused(config: Any) -> str:
    with pytest.raises(InputError) as caught:
        corpus.check(config)
    return str(caught.value)


# --- packed files


@pytest.mark.fault(66)
@packings
def test_packed_json_lines_are_the_documents_of_the_plain_ones(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"x.jsonl{suffix}").write_bytes(PACK[suffix](LINES))
    assert texts(settings(tmp_path)) == texts(settings(tmp_path / f"x.jsonl{suffix}")) == TEXTS


@pytest.mark.fault(66)
@packings
def test_packed_text_is_read_beside_plain_text(tmp_path: Path, suffix: str) -> None:
    content = "\ufeffnaïve 中文\r\n🦜 " * 9
    (tmp_path / f"A.TXT{suffix}").write_bytes(PACK[suffix](content.encode()))
    (tmp_path / "b.md").write_bytes(content.encode())
    plain = content.removeprefix("\ufeff")
    assert texts(settings(tmp_path, "text")) == [plain, plain]


@packings
def test_a_packed_text_on_its_own_becomes_blocks_in_both_splits(
    tmp_path: Path, suffix: str
) -> None:
    text = "".join(f"Paragraph {i} of a longer text.\n\n" for i in range(3000))
    (tmp_path / f"book.txt{suffix}").write_bytes(PACK[suffix](text.encode()))
    found = list(corpus.documents(settings(tmp_path / f"book.txt{suffix}", "text")))
    assert "".join(document.text for document in found) == text
    assert {document.split for document in found} == {"train", "val"}


@pytest.mark.fault(66)
@packings
def test_all_members_of_a_packed_file_are_read(tmp_path: Path, suffix: str) -> None:
    half = LINES.index(b"\n", len(LINES) // 2) + 1
    parts = [LINES[:half], LINES[half:-40], b"", LINES[-40:]]
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(b"".join(map(PACK[suffix], parts)))
    assert texts(settings(path)) == TEXTS


SPOILT: dict[str, Callable[[bytes], bytes]] = {
    "cut in the middle": lambda content: content[: len(content) // 2],
    "cut by a byte": lambda content: content[:-1],
    "cut in its second member": lambda content: content + content[:7],
    "followed by something else": lambda content: content + b"something else",
    "empty": lambda content: b"",
    "not packed": lambda content: LINES,
}


@pytest.mark.fault(66)
@packings
@pytest.mark.parametrize("source", ["jsonl", "text"])
@pytest.mark.parametrize("how", SPOILT)
def test_a_damaged_packed_file_is_one_error(
    tmp_path: Path, source: str, how: str, suffix: str
) -> None:
    path = tmp_path / f"x.{source.replace('text', 'txt')}{suffix}"
    path.write_bytes(SPOILT[how](PACK[suffix](LINES)))
    said = refused(settings(path, source))
    assert said.startswith(f"{path}: not a whole {text_files.CODECS[suffix]} file: ")
    assert len(said.splitlines()) == 1


@pytest.mark.fault(66)
def test_a_bit_that_turned_in_a_gzip_file_is_found_by_its_checksum(tmp_path: Path) -> None:
    content = PACK[".gz"](LINES)
    (tmp_path / "x.jsonl.gz").write_bytes(content[:300] + bytes([content[300] ^ 8]) + content[301:])
    assert "x.jsonl.gz: not a whole gzip file: " in refused(settings(tmp_path))


@pytest.mark.fault(66, control=True)
def test_a_packed_file_read_as_text_is_a_line_of_nonsense_for_every_newline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "CODECS", {})
    (tmp_path / "x.jsonl.gz").write_bytes(PACK[".gz"](LINES))
    assert len(refused(settings(tmp_path)).splitlines()) > 1


@packings
def test_places_in_a_packed_file_are_those_of_its_text(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(PACK[suffix](b'{"text": "fine"}\n\n{"text": "\xff"}'))
    assert refused(settings(path)) == f"{path}: line 3: invalid UTF-8 at byte 28 of the file"
    path = tmp_path / f"x.txt{suffix}"
    path.write_bytes(PACK[suffix](b"x" * 400_000 + b"\0"))
    assert "NUL at byte 400000" in refused(settings(path, "text"))


def test_a_disk_that_fails_is_not_taken_for_a_damaged_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    (tmp_path / "x.jsonl.gz").write_bytes(PACK[".gz"](LINES))
    monkeypatch.setattr(pa, "CompressedInputStream", fail)
    assert refused(settings(tmp_path)).endswith("x.jsonl.gz: cannot be read: Input/output error")


@packings
@pytest.mark.parametrize("source", ["jsonl", "text"])
def test_a_large_packed_file_is_streamed(tmp_path: Path, source: str, suffix: str) -> None:
    """Python's and Arrow's own memory, each under a quarter of 24 MB that pack into one."""
    path = tmp_path / f"x.{source.replace('text', 'txt')}{suffix}"
    line = json.dumps({"text": "".join(TEXTS)}).encode() + b"\n"
    content = line * (24_000_000 // len(line) + 1)
    path.write_bytes(PACK[suffix](content))
    assert path.stat().st_size < len(content) / 20
    del content
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    arrow = max(
        pa.total_allocated_bytes() - before for _ in corpus.documents(settings(path, source))
    )
    _, python = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert python < 6_000_000 and arrow < 6_000_000


# --- JSON lines


@pytest.mark.fault(66)
def test_a_byte_order_mark_before_any_line_goes(tmp_path: Path) -> None:
    mark, line = text_files.BOM, b'{"text": "a"}\n'
    (tmp_path / "x.jsonl").write_bytes(mark + line + mark + line + mark + b"\n")
    assert texts(settings(tmp_path)) == ["a", "a"]


@pytest.mark.fault(66)
def test_a_name_that_stands_twice_in_an_object_is_refused(tmp_path: Path) -> None:
    inside = '{"text": "a", "meta": {"a": 1, "a": 2}}\n'
    (tmp_path / "x.jsonl").write_text(inside + '{"text": "a", "id": 1, "text": "b"}\n')
    said = refused(settings(tmp_path))
    assert said.endswith("x.jsonl: line 2: text stands more than once in the object")


@pytest.mark.fault(66, control=True)
def test_jsons_reader_drops_a_value_whose_name_stands_twice() -> None:
    assert json.loads('{"text": "a", "text": "b"}') == {"text": "b"}


# --- Parquet


def parquet(folder: Path, table: pa.Table, **options: Any) -> Path:
    pq.write_table(table, folder / "x.parquet", **options)
    return folder / "x.parquet"


@pytest.mark.fault(66)
@pytest.mark.parametrize("index", [pa.int8(), pa.int32(), pa.uint16()])
@pytest.mark.parametrize("words", [pa.string(), pa.large_string()])
def test_a_column_of_a_dictionary_is_read(tmp_path: Path, index: Any, words: Any) -> None:
    values = [TEXTS[i % 90] for i in range(400)]
    column = pa.array(values).cast(pa.dictionary(index, words))
    path = parquet(tmp_path, pa.table({"text": column}), row_group_size=70)
    assert texts(settings(path, "parquet")) == values


@pytest.mark.fault(66)
def test_a_column_of_string_views_is_read(tmp_path: Path) -> None:
    path = parquet(tmp_path, pa.table({"text": pa.array(TEXTS, pa.string_view())}))
    assert texts(settings(path, "parquet")) == TEXTS


@pytest.mark.fault(66)
def test_a_column_that_stands_twice_is_one_error_that_names_it(tmp_path: Path) -> None:
    columns = [pa.array(TEXTS), pa.array(TEXTS), pa.array(range(400))]
    path = parquet(tmp_path, pa.Table.from_arrays(columns, names=["text", "text", "id"]))
    said = f"{path}: corpus.field=text: there are 2 columns of this name"
    assert refused(settings(path, "parquet")) == said


@pytest.mark.fault(66, control=True)
def test_arrow_alone_ends_in_a_key_error_for_a_column_that_stands_twice(tmp_path: Path) -> None:
    columns = [pa.array(TEXTS), pa.array(TEXTS)]
    path = parquet(tmp_path, pa.Table.from_arrays(columns, names=["text", "text"]))
    with pq.ParquetFile(path) as file, pytest.raises(KeyError):
        file.schema_arrow.field("text").type  # noqa: B018
        next(file.iter_batches(columns=["text"])).column("text")


@pytest.mark.fault(66)
def test_a_column_whose_name_begins_alike_is_another_one(tmp_path: Path) -> None:
    table = pa.table({"text.clean": ["wrong"] * 400, "text": TEXTS})
    assert texts(settings(parquet(tmp_path, table), "parquet")) == TEXTS


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array(["a", None]).dictionary_encode(), "row 1: corpus.field=text: text is expected"),
        (pa.array(["a", "\0"]).dictionary_encode(), "row 1: NUL character at 0"),
        (pa.array([b"a", b"b"]), "corpus.field=text: text is expected, got binary"),
        (pa.array([["a"], ["b"]]), "corpus.field=text: text is expected, got list"),
    ],
)
def test_a_column_that_holds_no_text_is_refused(tmp_path: Path, column: Any, message: str) -> None:
    path = parquet(tmp_path, pa.table({"text": column}))
    assert refused(settings(path, "parquet")).startswith(f"{path}: {message}")
