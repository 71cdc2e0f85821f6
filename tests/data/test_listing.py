"""Claims about the files of a corpus: which are read, and that none is passed over in silence."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.data import corpus, documents, listing
from pipeline.errors import InputError


def settings(path: Path, source: str = "text", pattern: str = "**/*") -> Any:
    about = {"source": source, "path": str(path), "pattern": pattern}
    return SimpleNamespace(field="text", val_fraction=0.3, **about)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.txt", "sub/b.md", "sub/deeper/c.txt"):
        (tmp_path / "corpus" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "corpus" / name).write_text(f"text of {name}")
    return tmp_path / "corpus"


def taken(config: Any) -> list[str]:
    return list(corpus.files(config))


# --- linked folders


@pytest.fixture
def linked(folder: Path) -> Path:
    """The folder with a link to one beside it, which holds text."""
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "elsewhere" / "d.txt").write_text("text of d")
    (folder / "sub" / "linked").symlink_to(folder.parent / "elsewhere")
    return folder


@pytest.mark.fault(65)
@pytest.mark.parametrize("source", ["text", "jsonl", "parquet"])
def test_a_linked_folder_is_refused_by_name_with_the_ways_out(linked: Path, source: str) -> None:
    with pytest.raises(InputError) as caught:
        corpus.check(settings(linked, source))
    said = str(caught.value)
    assert f"corpus.path={linked}: sub/linked: a linked folder" in said
    assert "cp -rs" in said and "or name it in corpus.path" in said


@pytest.mark.fault(65)
def test_links_in_a_circle_are_refused_and_not_followed(folder: Path) -> None:
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "self").symlink_to(folder / "self")
    with pytest.raises(InputError, match="sub/up: a linked folder"):
        taken(settings(folder))
    (folder / "sub" / "up").unlink()
    assert len(taken(settings(folder))) == 3
    assert corpus.left_out(settings(folder)) == "left out 1 broken link (self)"


@pytest.mark.fault(65, control=True)
def test_pythons_own_glob_passes_a_linked_folder_over_in_silence(linked: Path) -> None:
    assert (linked / "sub" / "linked" / "d.txt").is_file()
    assert "d.txt" not in [path.name for path in linked.glob("**/*")]


@pytest.mark.fault(65, control=True)
def test_dvc_sees_no_edit_in_a_linked_folder_but_one_in_a_linked_file(linked: Path) -> None:
    from dvc.fs import LocalFileSystem

    (linked / "e.txt").symlink_to(linked.parent / "elsewhere" / "d.txt")
    seen = {os.path.relpath(path, linked) for path in LocalFileSystem().find(str(linked))}
    assert seen == {"a.txt", "e.txt", "sub/b.md", "sub/deeper/c.txt"}


def test_a_linked_file_and_a_linked_corpus_are_read(linked: Path) -> None:
    (linked / "sub" / "linked").unlink()
    (linked / "e.txt").symlink_to(linked.parent / "elsewhere" / "d.txt")
    (linked.parent / "top").symlink_to(linked)
    assert taken(settings(linked.parent / "top")) == [
        *("a.txt", "e.txt", "sub/b.md", "sub/deeper/c.txt")
    ]


@pytest.mark.parametrize("pattern", ["*", "sub/*.md", "sub/deeper/**/*"])
def test_a_linked_folder_that_the_pattern_does_not_reach_hurts_nobody(
    linked: Path, pattern: str
) -> None:
    assert len(taken(settings(linked, pattern=pattern))) == 1
    assert "not of corpus.pattern" in corpus.left_out(settings(linked, pattern=pattern))


# --- names that are no UTF-8


@pytest.fixture
def latin(folder: Path) -> Path:
    try:
        with open(os.fsencode(folder) + b"/caf\xe9.txt", "w") as file:
            file.write("text")
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    return folder


@pytest.mark.fault(65)
def test_a_name_that_is_not_utf8_is_one_error_that_shows_it(latin: Path) -> None:
    with pytest.raises(InputError) as caught:
        corpus.check(settings(latin))
    assert str(caught.value) == (
        rf"corpus.path={latin}: caf\xe9.txt: a name that is not UTF-8, which DVC refuses; rename it"
    )


@pytest.mark.fault(65)
def test_a_name_that_is_not_utf8_and_is_passed_over_can_be_printed(latin: Path) -> None:
    said = corpus.left_out(settings(latin, "jsonl"))
    assert r"caf\xe9.txt" in said and said.encode()


@pytest.mark.fault(65, control=True)
def test_such_a_name_cannot_be_hashed(latin: Path) -> None:
    [odd] = [path.name for path in latin.iterdir() if path.name.startswith("caf")]
    with pytest.raises(UnicodeEncodeError):
        documents.name_hash(odd)


# --- nothing in silence


@pytest.mark.fault(65)
def test_what_is_passed_over_is_counted_and_named_by_kind(folder: Path) -> None:
    for name in (".git/x.txt", "sub/._b.md", "e.csv", "sub/f.CSV", "g", "h.tar.gz", "i.json.zst"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    (folder / "gone.txt").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.txt")
    assert corpus.left_out(settings(folder)) == (
        "left out 2 .csv (e.csv, sub/f.CSV), 2 hidden (.git/, sub/._b.md), "
        "1 .json.zst (i.json.zst), 1 .tar.gz (h.tar.gz), 1 broken link (gone.txt), "
        "1 no plain file (pipe.txt), 1 of other kinds; "
        "corpus.source=text takes .txt and .md, also as .gz or .zst"
    )
    assert len(taken(settings(folder))) == 3


def test_nothing_is_said_where_nothing_is_passed_over(folder: Path) -> None:
    for name in (".gitkeep", "sub/.gitignore", "sub/sha256.json"):  # data/corpus, DVC, `fetch`
        (folder / name).touch()
    assert corpus.left_out(settings(folder)) == ""
    assert corpus.left_out(settings(folder / "a.txt", "jsonl")) == ""
    assert corpus.left_out(settings(Path("data/unset"), "python-docs")) == ""


def test_many_files_are_counted_and_few_are_named(folder: Path) -> None:
    for number in range(2000):
        (folder / f"{number:04}.csv").touch()
    said = corpus.left_out(settings(folder))
    assert said.startswith("left out 2,000 .csv (0000.csv, 0001.csv, 0002.csv, ...); corpus.source")


def test_what_does_not_print_is_shown_as_an_escape(folder: Path) -> None:
    (folder / "a\n\x1b[2Jb.csv").touch()
    assert r"(a\n\x1b[2Jb.csv)" in corpus.left_out(settings(folder))


def test_folders_that_the_pattern_does_not_reach_are_named_and_stay_shut(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "scandir", opened := Opened(os.scandir))
    assert taken(settings(folder, pattern="*")) == ["a.txt"]
    assert opened.names == [folder.name]
    said = corpus.left_out(settings(folder, pattern="*.txt"))
    assert said == "left out 1 not of corpus.pattern (sub/)"


class Opened:
    """os.scandir that keeps the names of the folders, and refuses the one named `shut`."""

    def __init__(self, scandir: Any) -> None:
        self.scandir, self.names = scandir, []

    def __call__(self, path: Any) -> Any:
        self.names.append(Path(path).name)
        if Path(path).name == "shut":
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return self.scandir(path)


def test_a_folder_that_cannot_be_read_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "shut").mkdir()
    monkeypatch.setattr(os, "scandir", Opened(os.scandir))
    assert corpus.left_out(settings(folder)) == "left out 1 unreadable (shut/)"


def test_where_no_file_is_found_the_error_says_what_there_is(folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        taken(settings(folder, "jsonl"))
    assert str(caught.value) == (
        f"corpus.path={folder}, corpus.pattern=**/*: no file found; left out 2 .txt (a.txt, "
        "sub/deeper/c.txt), 1 .md (sub/b.md); corpus.source=jsonl takes .jsonl, also as .gz or .zst"
    )
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match="no file found; .* takes .parquet; .* fetch fineweb-edu"):
        taken(settings(folder / "empty", "parquet"))


def test_the_suffix_in_a_pattern_takes_what_the_source_would_not(folder: Path) -> None:
    for name in ("a.json.gz", "b.json", "c.jsonl.zst", "d.JSONL"):
        (folder / name).touch()
    assert taken(settings(folder, "jsonl")) == ["c.jsonl.zst", "d.JSONL"]
    assert taken(settings(folder, "jsonl", "**/*.json.gz")) == ["a.json.gz"]


@pytest.mark.parametrize(
    ("pattern", "path", "fits"),
    [
        ("**/*", "a", True),
        ("**/*", "a/b/c", True),
        ("**", "a/b", True),
        ("a/**", "a/b/c", True),
        ("a/**/c", "a/c", True),
        ("a/**/c", "a/b/b/c", True),
        ("a/**/c", "a/b/d", False),
        ("*", "a/b", False),
        ("a/*", "a", False),
        ("*/*", "a/b/c", False),
        ("[ab].?xt", "b.txt", True),
        ("[!ab].txt", "b.txt", False),
        ("A", "a", False),
    ],
)
def test_a_pattern_means_on_every_python_what_it_says(pattern: str, path: str, fits: bool) -> None:
    parts, wanted = path.split("/"), pattern.split("/")
    assert listing._fits(parts, wanted) == fits
    assert not fits or all(listing._fits(parts[:n], wanted, below=True) for n in range(len(parts)))
