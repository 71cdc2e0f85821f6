"""Claims about text sources: what a document is, where it goes, and what is refused."""

import json
import subprocess
import sys
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import config as configuration
from pipeline.config import CorpusConfig
from pipeline.data import corpus, documents, text_files, tokenizer
from pipeline.data.sources import python_docs, shakespeare
from pipeline.data.sources import text as text_source
from pipeline.errors import InputError
from tests.conftest import ROOT


def settings(source="text", path="", pattern="**/*", field="text", val_fraction=0.1):
    place = {"path": str(path), "pattern": pattern, "field": field}
    mix = "0.5 shakespeare + 0.5 python-docs"
    return CorpusConfig(source=source, **place, mix=mix, val_fraction=val_fraction)


def read(config):
    """{document name: (split, text)}, parts put together."""
    found = {}
    for name, split, text, starts, *_ in corpus.documents(config):
        assert starts == (name not in found)
        found[name] = (split, found.get(name, ("", ""))[1] + text)
    return found


def texts(config):
    return {name: text for name, (_, text) in read(config).items()}


@pytest.fixture(scope="module")
def docs():
    return read(settings("python-docs"))


# --- python-docs


def test_python_docs_hold_the_reference_and_the_docstrings(docs):
    assert "Assert statements are a convenient way" in docs["topic assert"][1]
    assert docs["module bisect"][1].startswith("module bisect\n\nBisection algorithms.\n\n")
    assert (
        "\n\nclass ArgumentParser(_AttributeHolder, _ActionsContainer)\n\nObject for"
        in (docs["module argparse"][1])
    )


def test_python_docs_are_as_large_as_the_default_recipe_expects(docs):
    size = sum(len(text.encode()) for _, text in docs.values())
    assert 1_900_000 < size < 3_200_000
    assert {split for split, _ in docs.values()} == {"train", "val"}


def test_python_docs_leave_out_tests_idlelib_and_what_is_installed(docs):
    parts = {part for name in docs for part in name.removeprefix("module ").split(".")}
    assert not parts & {"test", "tests", "idlelib", "pytest", "tiktoken", "numpy"}


def test_python_docs_import_none_of_what_they_describe(docs):
    assert {"module turtle", "topic assert"} <= docs.keys()
    code = (
        "import sys; from pipeline.data.sources import python_docs; "
        "python_docs.texts(); print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"this", "turtle", "pydoc_data.topics"} & set(done.stdout.split())


def test_docstrings_are_found_at_every_depth_and_nothing_else(tmp_path):
    path = tmp_path / "example.py"
    path.write_text(
        '"""Module."""\nif True:\n  class A(B, metaclass=M):\n    """Class."""\n'
        '    async def f(self, x: int = 3, *, y):\n      """Method."""\n'
        '      def inner(): "Inner."\n      return "no docstring"\n'
    )
    assert python_docs._module_text("example", python_docs._parsed(path)) == (
        "module example\n\nModule.\n\nclass A(B)\n\nClass.\n\n"
        "A.f(self, x: int=3, *, y)\n\nMethod.\n\nA.f.inner()\n\nInner.\n"
    )


def test_a_module_without_docstrings_is_no_document(tmp_path, monkeypatch):
    path = tmp_path / "example.py"
    path.write_text("x = 'text'\n")
    found = python_docs._module_text("example", python_docs._parsed(path))
    assert found == ""
    texts = {"module a": "a", "module b": "b", "module example": found}
    monkeypatch.setattr(python_docs, "texts", lambda: texts)
    assert read(settings("python-docs")).keys() == {"module a", "module b"}
    assert corpus.check(settings("python-docs"))["empty"] == 0  # left out by no one's wish


@pytest.mark.fault(16)
def test_what_is_no_text_in_a_docstring_becomes_an_escape(tmp_path):
    path = tmp_path / "example.py"
    path.write_text('"""a \\0 b \\ud800 c \\d"""\n')
    assert "a \\x00 b \\ud800 c \\d" in python_docs._module_text(
        "example", python_docs._parsed(path)
    )


def test_a_python_without_documentation_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="comes without its documentation"):
        python_docs._topics(tmp_path / "topics.py")


# --- splits


def test_a_document_goes_to_the_split_of_its_names_hash(tmp_path):
    lines = tmp_path / "x.jsonl"
    lines.write_text("".join(f'{{"text": "t{i}"}}\n' for i in range(2000)))
    found = read(settings("jsonl", lines, val_fraction=0.2))
    val = {name for name, (split, _) in found.items() if split == "val"}
    assert val == {name for name in found if documents.name_hash(name) < 0.2 * 2**64}
    assert 0.17 < len(val) / len(found) < 0.23
    smaller = read(settings("jsonl", lines, val_fraction=0.1))
    assert {name for name, (split, _) in smaller.items() if split == "val"} < val


def test_the_hash_of_a_name_never_changes():
    assert documents.name_hash("module argparse") == 0xC6D4BC37FBB5CADB


def test_of_two_files_one_goes_to_each_split(tmp_path):
    for a in range(20):
        folder = tmp_path / str(a)
        folder.mkdir()
        for b in "xy":
            (folder / f"{a}{b}.txt").write_text("text")
        assert {split for split, _ in read(settings(path=folder)).values()} == {"train", "val"}


def test_documents_do_not_depend_on_where_the_files_lie_or_their_order(tmp_path):
    for folder, names in (("here", "abcd"), ("deeper/there", "dcba")):
        root = tmp_path / folder
        (root / "sub").mkdir(parents=True)
        for name in names:
            (root / "sub" / f"{name}.txt").write_text(f"text of {name}")
    one = list(corpus.documents(settings(path=tmp_path / "here")))
    two = list(corpus.documents(settings(path=tmp_path / "deeper" / "there")))
    assert one == two
    assert [d.name for d in one] == ["sub/a.txt", "sub/b.txt", "sub/c.txt", "sub/d.txt"]


def test_the_description_names_no_path(tmp_path):
    for source in corpus.SOURCES:
        about = corpus.describe(settings(source, tmp_path))
        assert about["source"] == source and "0.1" in about["split_rule"]
        assert str(tmp_path) not in json.dumps(about)


# --- files


@pytest.fixture
def tree(tmp_path):
    for name in ("a.txt", "b.md", "c.rst", ".hidden.txt", "sub/d.TXT", "sub/e.csv", ".git/f.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "pattern", "names"),
    [
        ("", "**/*", ["a.txt", "b.md", "sub/d.TXT"]),
        ("", "*", ["a.txt", "b.md"]),
        ("", "*.rst", ["c.rst"]),
        ("", "**/*.txt", ["a.txt"]),
        ("", "**", ["a.txt", "b.md", "sub/d.TXT"]),
        ("", "sub/**/*", ["sub/d.TXT"]),
        ("", "./s*/?.T[X]T", ["sub/d.TXT"]),
        ("sub", "*", ["d.TXT"]),
    ],
)
def test_folder_and_pattern_take_the_files_they_name(tree, path, pattern, names):
    found = texts(settings(path=tree / path, pattern=pattern))
    assert {name.split("#")[0] for name in found} == set(names)
    if len(names) > 1:
        assert found == {name: f"text of {name}" for name in names}


@pytest.mark.parametrize("path", ["no/such/place", "*.txt", "~"])
def test_a_path_that_leads_nowhere_is_an_input_error(tree, path):
    with pytest.raises(InputError, match="corpus.path="):
        read(settings(path=tree / path))


def test_a_file_on_its_own_becomes_blocks_that_end_at_blank_lines(tmp_path):
    text = "".join(f"Paragraph {i} of a longer text.\nIts second line.\n\n" for i in range(1000))
    (tmp_path / "book.txt").write_text(text)
    found = read(settings(path=tmp_path / "book.txt"))
    assert "".join(t for _, t in found.values()) == text
    assert all(t.endswith("\n\n") for _, t in found.values())
    assert list(found)[:2] == ["book.txt#0", "book.txt#1"]
    val = [t for split, t in found.values() if split == "val"]
    assert 0.04 < sum(map(len, val)) / len(text) < 0.2


def test_line_ends_stay_and_a_byte_order_mark_goes(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\xef\xbb\xbf")
    assert texts(settings(path=tmp_path))["a.txt"] == "one\r\ntwo\n\ufeff"


def test_a_multibyte_character_across_two_reads_is_one_character(tmp_path, monkeypatch):
    monkeypatch.setattr(text_source, "READ_BYTES", 5)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("naïve 中文 🦜 " * 9, encoding="utf-8")
    assert texts(settings(path=tmp_path))["a.txt"] == "naïve 中文 🦜 " * 9


# --- parts


@pytest.mark.parametrize(
    "text",
    [
        "It's a line.\n\n  Indented  text,  with  runs.\n\n\n\tTab 'll 've\u00a0x \r\n\r\n y\n"
        * 40,
        "one two  three   four\n" * 100,
        "naïve\u2003中文 \u200b🦜\x1c \n x\u0085 y " * 60,
    ],
)
@pytest.mark.parametrize("limit", [40, 64, 100])
def test_parts_have_the_tokens_of_the_whole(text, limit, monkeypatch):
    monkeypatch.setattr(documents, "PART_CHARACTERS", limit)
    parts = list(documents._parts(text[i : i + 50] for i in range(0, len(text), 50)))
    assert "".join(parts) == text and len(parts) > len(text) / limit - 1
    tokens = [token for part in parts for token in tokenizer.encode(part).tolist()]
    assert tokens == tokenizer.encode(text).tolist()


def test_no_part_is_longer_than_the_limit_even_without_whitespace(monkeypatch):
    monkeypatch.setattr(documents, "PART_CHARACTERS", 10)
    for text in ("x" * 95, " " * 95, "ab\n" + "y" * 80):
        parts = list(documents._parts([text]))
        assert "".join(parts) == text and max(map(len, parts)) <= 10


def test_a_run_of_a_million_spaces_can_be_tokenized():
    parts = list(documents._parts([" " * 1_000_000 + "x"]))
    assert sum(len(tokenizer.encode(part)) for part in parts) == 1_000_000


# --- what is refused


@pytest.mark.fault(16)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"x" * 70 + b"\xff\xfe", "a.txt: invalid UTF-8 at byte 70"),
        (b"x" * 63 + b"\xe4\xb8", "a.txt: invalid UTF-8 at byte 63"),
        ("ï".encode() + b"\xed\xa0\x80", "a.txt: invalid UTF-8 at byte 2"),
        ("ïx".encode() * 30 + b"\x00", "a.txt: NUL at byte 90"),
        ("hi".encode("utf-16"), "a.txt: invalid UTF-8 at byte 0"),
    ],
)
@pytest.mark.parametrize("read_bytes", [7, 1 << 18])
def test_bytes_that_are_no_text_are_refused_with_file_and_offset(
    tmp_path, monkeypatch, content, message, read_bytes
):
    monkeypatch.setattr(text_source, "READ_BYTES", read_bytes)
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(InputError, match=message):
        read(settings(path=tmp_path))


@pytest.mark.fault(16)
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "\xff"}', "line 3: invalid UTF-8 at byte 28 of the file"),
        (b'{"text": "a\\u0000b"}', "line 3: NUL character at 1"),
        (b'{"text": "ab\\ud800"}', r"line 3: lone surrogate U\+D800 at character 2"),
        (b'{"body": "x", "id": 3}', "line 3: corpus.field=text: no such field; .* body, id"),
        (b'{"text": null}', "line 3: corpus.field=text: text is expected, got NoneType"),
        (b'["x"]', "line 3: an object is expected, got list"),
        (b'{"text": "x"', "line 3: not JSON"),
        (b"[" * 100_000, "line 3: not JSON"),
    ],
)
def test_a_bad_json_line_is_refused_by_its_number(tmp_path, line, message):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line)
    with pytest.raises(InputError, match="x.jsonl: " + message):
        read(settings("jsonl", tmp_path / "x.jsonl"))


def test_a_json_line_too_long_to_parse_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "LINE_BYTES", 1 << 20)
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "' + b"x" * (1 << 20) + b'"}\n')
    with pytest.raises(InputError, match="line 1: over 1 MiB; try corpus.source=text"):
        read(settings("jsonl", tmp_path / "x.jsonl"))


def test_json_lines_are_documents_by_number_and_empty_ones_are_left_out(tmp_path):
    lines = ['{"text": "naïve \\ud83e\\udd9c"}', "", '{"text": ""}', '{"text": "b", "id": 1}']
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert texts(settings("jsonl", tmp_path)) == {"x.jsonl:1": "naïve 🦜", "x.jsonl:4": "b"}


def parquet(path, values, kind=None, **options):
    pq.write_table(
        pa.table({"id": range(len(values)), "text": pa.array(values, kind)}), path, **options
    )
    return path


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_parquet_rows_are_documents(tmp_path, kind):
    values = [f"row {i} 中" for i in range(300)]
    path = parquet(tmp_path / "x.parquet", values, kind, row_group_size=70)
    assert texts(settings("parquet", path)) == {f"x.parquet:{i}": v for i, v in enumerate(values)}


@pytest.mark.parametrize(
    ("values", "field", "message"),
    [
        (["a"], "body", "corpus.field=body: no such field; there are: id, text"),
        ([1, 2], "text", "corpus.field=text: text is expected, got int64"),
        (["a", None], "text", "row 1: corpus.field=text: text is expected, got null"),
        pytest.param(
            ["a", "b", "x\0"], "text", "row 2: NUL character at 1", marks=pytest.mark.fault(16)
        ),
    ],
)
def test_parquet_without_text_is_refused(tmp_path, values, field, message):
    path = parquet(tmp_path / "x.parquet", values)
    with pytest.raises(InputError, match=f"x.parquet: {message}"):
        read(settings("parquet", path, field=field))


@pytest.mark.fault(16)
def test_parquet_with_invalid_utf8_is_refused_by_its_row(tmp_path):
    raw = pa.array([b"fine", b"ab\xff"]).view(pa.string())
    path = parquet(tmp_path / "x.parquet", raw)
    with pytest.raises(InputError, match="row 1: invalid UTF-8 at byte 2 of the text"):
        read(settings("parquet", path))


@pytest.mark.parametrize("content", [b"", b"PAR1 garbage PAR1"])
def test_a_file_that_is_no_parquet_is_refused(tmp_path, content):
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(InputError, match="x.parquet: not a readable Parquet file"):
        read(settings("parquet", tmp_path))


@pytest.mark.fault(16, control=True)
def test_readers_that_are_not_asked_to_be_strict_take_what_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\xff\0")
    assert (tmp_path / "a.txt").read_text("utf-8", errors="replace") == "a\ufffd\0"
    assert json.loads(r'{"text": "a\u0000\ud800"}')["text"] == "a\0\ud800"
    raw = pa.array([b"ab\xff"]).view(pa.string())
    assert pq.read_table(parquet(tmp_path / "x.parquet", raw)).num_rows == 1


def test_a_file_that_cannot_be_opened_is_an_input_error(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(text_source, "_read", refuse)
    with pytest.raises(InputError, match="a.txt: cannot be read: Permission denied"):
        read(settings(path=tmp_path))


# --- all of it looked at before any work


def spoilt(folder, source):
    """A corpus with a good document, two bad ones and a good one."""
    values = ["good", "x\0", "y\0", "good"]
    if source == "text":
        for number, value in enumerate(values):
            (folder / f"{number}.txt").write_text(value)
    elif source == "jsonl":
        lines = (json.dumps({"text": value}) for value in values)
        (folder / "x.jsonl").write_text("\n".join(lines))
    else:
        parquet(folder / "x.parquet", values)


@pytest.mark.fault(16)
@pytest.mark.parametrize("source", ["text", "jsonl", "parquet"])
def test_a_check_names_every_place_at_once(tmp_path, source):
    spoilt(tmp_path, source)
    with pytest.raises(InputError) as caught:
        corpus.check(settings(source, tmp_path))
    first, second = str(caught.value).split("\n  ")
    places = {
        "text": ("1.txt: NUL at byte 1", "2.txt: NUL at byte 1"),
        "jsonl": ("x.jsonl: line 2: NUL", "x.jsonl: line 3: NUL"),
        "parquet": ("x.parquet: row 1: NUL", "x.parquet: row 2: NUL"),
    }
    assert places[source][0] in first and places[source][1] in second


def test_a_check_names_files_that_are_wrong_in_different_ways(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"body": "x"}\n{"text": "\xff"}\n')
    (tmp_path / "b.jsonl").write_text("{")
    with pytest.raises(InputError) as caught:
        corpus.check(settings("jsonl", tmp_path))
    lines = str(caught.value).split("\n  ")
    found = [line.removeprefix(str(tmp_path))[1:] for line in lines]
    assert [line[:15] for line in found] == [
        "a.jsonl: line 1",
        "a.jsonl: line 2",
        "b.jsonl: line 1",
    ]


def test_a_check_reads_no_further_than_a_person_would(tmp_path):
    (tmp_path / "x.jsonl").write_text("{\n" * 1000)
    with pytest.raises(InputError) as caught:
        corpus.check(settings("jsonl", tmp_path))
    lines = str(caught.value).split("\n  ")
    assert len(lines) == 9 and "line 8: not JSON" in lines[7] and "perhaps more" in lines[8]


def test_a_check_counts_the_documents_of_each_split_and_the_text(tmp_path):
    for name in "abcdefgh":
        (tmp_path / f"{name}.txt").write_text(f"text of {name}")
    (tmp_path / "empty.txt").touch()
    done = []
    counts = corpus.check(settings(path=tmp_path, val_fraction=0.3), done.append)
    splits = [split for split, _ in read(settings(path=tmp_path, val_fraction=0.3)).values()]
    assert counts == {split: splits.count(split) for split in ("train", "val")} | {"empty": 1}
    assert sum(done) == 8 * len("text of a")


# --- a literal end-of-text


def literal(folder, source):
    """Three documents of the source with end-of-text in their text."""
    text = "before <|endoftext|> after"
    if source == "text":
        for name in "abc":
            (folder / f"{name}.txt").write_text(text)
    elif source == "jsonl":
        (folder / "x.jsonl").write_text((json.dumps({"text": text}) + "\n") * 3)
    elif source == "chat":
        messages = [{"role": role, "content": text} for role in ("user", "assistant")]
        (folder / "x.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 3)
    elif source == "parquet":
        parquet(folder / "x.parquet", [text] * 3)
    else:
        (folder / "pydoc_data").mkdir()
        topics = dict.fromkeys("abc", text)
        (folder / "pydoc_data" / "topics.py").write_text(f"topics = {topics!r}\n")


def test_the_choices_of_the_setting_are_the_sources_there_are():
    accepted = {name: words for name, words, _ in configuration.describe()}["corpus.source"]
    assert accepted == f"one of {', '.join(corpus.SOURCES)}"


@pytest.mark.fault(17)
@pytest.mark.parametrize("source", corpus.SOURCES)
def test_a_literal_end_of_text_is_plain_text_in_every_source(tmp_path, monkeypatch, source):
    literal(tmp_path, source)
    monkeypatch.setattr(python_docs.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(python_docs, "texts", python_docs.texts.__wrapped__)
    scenes = dict.fromkeys("abc", "before <|endoftext|> after")
    monkeypatch.setattr(shakespeare, "scenes", lambda: scenes)
    found = texts(settings(source, tmp_path)).values()
    whole = "User: {0}\nAssistant: {0}" if source == "chat" else "{0}"
    count = 6 if source == "mix" else 3  # of two sources
    assert [text.strip() for text in found] == [whole.format("before <|endoftext|> after")] * count
    for text in found:
        assert tokenizer.EOT not in tokenizer.encode(text).tolist()


@pytest.mark.fault(17, control=True)
def test_a_tokenizer_told_to_take_special_tokens_ends_the_text_there():
    text = "before <|endoftext|> after"
    assert tokenizer.EOT in tokenizer.gpt2().encode(text, allowed_special="all")


# --- streaming


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet"])
def test_a_large_file_is_streamed(tmp_path, source):
    """Python's and Arrow's own memory, each under a quarter of a 24 MB file's size."""
    paragraph = "".join(f"Line {i} of some text, like any other.\n" for i in range(50)) + "\n"
    path = tmp_path / f"x.{source}"
    if source == "text":
        path.write_text(paragraph * 13_000)
    elif source == "jsonl":
        path.write_text((json.dumps({"text": paragraph}) + "\n") * 13_000)
    else:
        values = [f"{i} {paragraph}" for i in range(13_000)]
        parquet(path, values, compression="none", use_dictionary=False)
        del values
    assert path.stat().st_size > 24_000_000
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    arrow = max(
        pa.total_allocated_bytes() - before for _ in corpus.documents(settings(source, path))
    )
    _, python = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert python < 6_000_000 and arrow < 6_000_000
